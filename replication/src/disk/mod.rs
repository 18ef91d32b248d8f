//! Disks as replication sees them: byte ranges of images, and what was done to them.
//!
//! ```text
//!  primary:  guest's I/O ended ─▶ Journal ─┬ map of blocks ─▶ first copy ─▶ the image there
//!                                          └ log ─▶ epoch ─▶ staging ─▶ commit ─▶ the image there
//! ```
//!
//! Enters: every change of an image once the host has carried it out, before the guest hears of
//! it. Always holds: the image of the backup after epoch n is the primary's as the guest knew it
//! at that seal; what was under way then is in the machine state and is carried out again.

mod blocks;
mod journal;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

pub use blocks::BLOCK_BYTES;
pub use journal::{Journal, Log, Told};

/// Most disks of a VM.
pub const DISKS_MAX: usize = 256;
/// Ranges are whole sectors.
pub const SECTOR_BYTES: u64 = 512;
/// Most zeroes of one change of a first copy: whoever takes it shows progress, and ends when it is to.
pub const COPY_BYTES_MAX: u64 = 64 << 20;
/// Most bytes of data of one change.
pub const CHANGE_BYTES_MAX: usize = 1 << 20;
/// What a change costs beside its data, wherever it is kept.
pub const CHANGE_COST_BYTES: u64 = 128;

/// What was done to an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Write,
    /// The range reads as zeroes; its room may be freed if `unmap`.
    Zero {
        unmap: bool,
    },
    /// What the range contained is of no use any more.
    Discard,
    /// What was done before is durable.
    Flush,
}

/// One change of one disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The disk's place in the order of [`Disks::sizes_bytes`].
    pub disk: u32,
    pub operation: Operation,
    /// Bytes from the image's beginning.
    pub offset: u64,
    /// Bytes that it touches; 0 for a flush.
    pub len: u64,
    /// `len` bytes for a write, none otherwise.
    pub data: Vec<u8>,
}

impl Change {
    /// What it takes of a bounded log or staging.
    #[must_use]
    pub fn cost_bytes(&self) -> u64 {
        self.data.len() as u64 + CHANGE_COST_BYTES
    }
}

/// The disks of a machine that can be protected, those that the guest can write.
pub trait Disks: Send + Sync {
    /// Size of each disk as the guest sees it, whole sectors, at most [`DISKS_MAX`] of them. The
    /// same for the life of the guest.
    fn sizes_bytes(&self) -> Vec<u64>;

    /// Reads from an image while the guest writes to it: a range that is being written may read
    /// as anything between before and after. Called from a thread that may wait for the host.
    ///
    /// # Errors
    /// From the host.
    fn read(&self, disk: usize, offset: u64, into: &mut [u8]) -> io::Result<()>;

    /// Bytes from `offset` on that the host knows to be zero without reading; 0 if it does not. Some
    /// file systems know nothing of what was written and is not on the storage yet: true only of
    /// what was flushed since its last change.
    fn hole_bytes(&self, disk: usize, offset: u64) -> u64 {
        let _ = (disk, offset);
        0
    }

    /// What was written before is on the host's storage on return. Called from a thread that may
    /// wait for it.
    ///
    /// # Errors
    /// From the host.
    fn flush(&self, disk: usize) -> io::Result<()>;

    /// Tells every change that ends from now on to `journal`, or to nobody. A change is told after
    /// the host has carried it out and before the guest hears of it, with no seal in between; two
    /// that overlap in their order. Room for it is reserved before the host is given it.
    fn set_journal(&self, journal: Option<Arc<Journal>>);

    /// The journal has room again for a change that was refused.
    fn wake(&self);
}

/// An image that receives a replica. Never called from two threads at once.
pub trait ReplicaDisk: Send + Sync {
    /// Bytes that it has, whole sectors.
    fn size_bytes(&self) -> u64;

    /// # Errors
    /// From the host.
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// # Errors
    /// From the host.
    fn zero(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;

    /// # Errors
    /// From the host.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// What was done before is durable on return.
    ///
    /// # Errors
    /// From the host.
    fn flush(&self) -> io::Result<()>;
}

/// Most bytes that are zeroed or discarded at a time: where the host has to write them, more would
/// look like standing still.
const PIECE_BYTES: u64 = 4 << 20;

/// What the images of a replica have taken, as a backup says it with its heartbeats: only that it
/// grows is of meaning.
#[derive(Debug, Default)]
pub(crate) struct Done {
    /// Bytes that were written, zeroed or discarded.
    bytes: AtomicU64,
    /// Flushes that are under way, and how often somebody asked meanwhile: a host that makes much
    /// durable says nothing while it does, and is not dead.
    flushes: AtomicU64,
    asked: AtomicU64,
}

impl Done {
    /// Grows from one call to the next if something was done in between, or is being flushed.
    pub(crate) fn count(&self) -> u64 {
        if self.flushes.load(Ordering::Relaxed) > 0 {
            self.asked.fetch_add(1, Ordering::Relaxed);
        }
        self.bytes.load(Ordering::Relaxed).wrapping_add(self.asked.load(Ordering::Relaxed))
    }
}

/// Carries out a change whose range was checked, and counts its bytes in `done` as it goes on. Once it `ended`, what
/// is left of the change stays undone.
///
/// # Errors
/// From the host.
pub(crate) fn carry_out(
    disk: &dyn ReplicaDisk,
    change: &Change,
    done: &Done,
    ended: &AtomicBool,
) -> io::Result<()> {
    let count = |bytes| done.bytes.fetch_add(bytes, Ordering::Relaxed);
    let in_pieces = |piece: &dyn Fn(u64, u64) -> io::Result<()>| {
        let end = change.offset + change.len;
        let mut at = change.offset;
        while at < end && !ended.load(Ordering::Acquire) {
            let len = PIECE_BYTES.min(end - at);
            piece(at, len)?;
            at += len;
            count(len);
        }
        Ok(())
    };
    match change.operation {
        Operation::Write => {
            disk.write(change.offset, &change.data)?;
            count(change.data.len() as u64);
            Ok(())
        }
        Operation::Zero { unmap } => in_pieces(&|offset, len| disk.zero(offset, len, unmap)),
        Operation::Discard => in_pieces(&|offset, len| disk.discard(offset, len)),
        Operation::Flush => {
            done.flushes.fetch_add(1, Ordering::Relaxed);
            let flushed = disk.flush();
            count(1);
            done.flushes.fetch_sub(1, Ordering::Relaxed);
            flushed
        }
    }
}
