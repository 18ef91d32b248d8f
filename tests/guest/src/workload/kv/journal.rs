//! The log: puts wait until their records are on stable storage.
//!
//! ```text
//!          begin: write of all that waits            ended          ended
//!   IDLE ───────────────────────────────▶ WRITING ────────▶ FLUSHING ────▶ DONE ── settle ──▶ IDLE
//!                                            └── failed, or the disk has no flush ──▶
//! ```
//!
//! While one batch is on its way the next one gathers. What always holds: record n is in sector n;
//! `next` is the number after the last record that is on stable storage, so that a batch that
//! failed leaves no gap: the next one is written over it.

use core::mem;

use guest_logic::kv::{Record, Request, SECTOR_BYTES, Status};

use crate::pool;
use crate::serial::say;
use crate::virtio::{Disk, DiskError, NoDevice, SECTORS_MAX};

/// A put that waits for its record.
#[derive(Clone, Copy)]
pub struct Put {
    /// Whose it is: a connection's place, and which of the connections that it has had.
    pub connection: usize,
    pub generation: u32,
    pub request: Request,
}

/// What becomes of a put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offer {
    Taken,
    /// Later, when a batch has ended.
    Busy,
    /// Never: the disk is full.
    Full,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Idle,
    Writing,
    Flushing,
    Done(Status),
}

struct Batch {
    puts: &'static mut [Option<Put>],
    count: usize,
}

pub struct Journal {
    disk: Option<Disk>,
    next: u64,
    phase: Phase,
    pending: Batch,
    gathering: Batch,
}

impl Batch {
    fn new() -> Option<Self> {
        Some(Self { puts: pool::slice(SECTORS_MAX, |_| None)?, count: 0 })
    }

    fn iter(&self) -> impl Iterator<Item = Put> {
        self.puts.iter().take(self.count).flatten().copied()
    }
}

impl Journal {
    /// The log of this disk, played back into `values`.
    pub fn open(disk: Option<Disk>, values: &mut [u64]) -> Result<Self, NoDevice> {
        let batch = || Batch::new().ok_or(NoDevice("has no memory for its log"));
        let (pending, gathering) = (batch()?, batch()?);
        let mut journal = Self { disk, next: 0, phase: Phase::Idle, pending, gathering };
        if let Some(disk) = &mut journal.disk {
            journal.next = replay(disk, values).map_err(|_| NoDevice("cannot be read"))?;
        }
        Ok(journal)
    }

    /// Sectors of the disk; 0 if there is none.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.disk.as_ref().map_or(0, Disk::sectors)
    }

    /// Takes a put into the next batch if there is room for it, there and on the disk.
    pub fn offer(&mut self, put: Put) -> Offer {
        let Batch { puts, count } = &mut self.gathering;
        // What is pending may fail, but then there is room for this one all the more.
        let number = self.next + (self.pending.count + *count) as u64;
        if self.disk.as_ref().is_some_and(|disk| number >= disk.sectors()) {
            return Offer::Full;
        }
        let Some(place) = puts.get_mut(*count) else { return Offer::Busy };
        *place = Some(put);
        *count += 1;
        Offer::Taken
    }

    /// Begins to log what has gathered, if the last batch has been settled.
    pub fn begin(&mut self) {
        if self.phase != Phase::Idle || self.gathering.count == 0 {
            return;
        }
        mem::swap(&mut self.pending, &mut self.gathering);
        let Some(disk) = &mut self.disk else {
            self.phase = Phase::Done(Status::Ok);
            return;
        };
        let sectors = disk.data().chunks_exact_mut(SECTOR_BYTES);
        for ((number, sector), put) in (self.next..).zip(sectors).zip(self.pending.iter()) {
            let Request { key, value, id, .. } = put.request;
            sector.copy_from_slice(&Record { number, key, value, id }.encode());
        }
        disk.start_write(self.next, self.pending.count);
        self.phase = Phase::Writing;
    }

    /// Whether [`Journal::advance`] has something to do. Only reads.
    #[must_use]
    pub fn has_news(&self) -> bool {
        matches!(self.phase, Phase::Done(_)) || self.disk.as_ref().is_some_and(Disk::is_done)
    }

    /// Whether nothing is on its way.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.phase == Phase::Idle && self.gathering.count == 0
    }

    /// Takes note of what the disk has done; how the batch went, once it has ended. Its puts are
    /// then those of [`Journal::ended`], until [`Journal::settle`].
    pub fn advance(&mut self) -> Option<Status> {
        if let Some(disk) = &mut self.disk
            && let Some(result) = disk.finish()
        {
            self.phase = match (self.phase, result) {
                (Phase::Writing, Ok(())) if disk.can_flush() => {
                    disk.start_flush();
                    Phase::Flushing
                }
                (_, Ok(())) => Phase::Done(Status::Ok),
                (_, Err(DiskError(_))) => Phase::Done(Status::NotLogged),
            };
        }
        match self.phase {
            Phase::Done(status) => Some(status),
            _ => None,
        }
    }

    /// The puts of the batch that has ended, in the order of their records.
    pub fn ended(&self) -> impl Iterator<Item = Put> {
        self.pending.iter()
    }

    /// Forgets the batch that has ended.
    pub fn settle(&mut self) {
        if self.phase == Phase::Done(Status::Ok) {
            self.next += self.pending.count as u64;
        }
        self.pending.count = 0;
        self.phase = Phase::Idle;
    }
}

/// Reads the log up to its end; the number of its records.
fn replay(disk: &mut Disk, values: &mut [u64]) -> Result<u64, DiskError> {
    let mut next = 0;
    while next < disk.sectors() {
        let left = usize::try_from(disk.sectors() - next).unwrap_or(usize::MAX);
        let count = left.min(SECTORS_MAX);
        disk.start_read(next, count);
        loop {
            match disk.finish() {
                Some(result) => break result?,
                None => core::hint::spin_loop(),
            }
        }
        let (sectors, _) = disk.data().as_chunks::<SECTOR_BYTES>();
        for sector in sectors.iter().take(count) {
            match Record::decode(next, sector) {
                Ok(Some(Record { key, value, .. })) => {
                    if let Some(place) = values.get_mut(key as usize) {
                        *place = value;
                    }
                    next += 1;
                }
                Ok(None) => return Ok(next),
                Err(bad) => {
                    // A write that a power loss has torn was never answered.
                    say!("KV log ends at {next}: {bad}");
                    return Ok(next);
                }
            }
        }
    }
    Ok(next)
}
