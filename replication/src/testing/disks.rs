//! Disks of plain memory, with a host that takes its time.
//!
//! A [`MemoryDisks`] has two images of each disk: what the host has, into which a change goes in
//! two halves while the guest may stand still, and what the guest knows, into which it goes whole
//! when it ends. The machine state has a checksum of the latter and the ranges that are under way,
//! so a replica can tell whether its image is the primary's at that seal.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock};

use super::{Machine, lock};
use crate::disk::{
    CHANGE_BYTES_MAX, CHANGE_COST_BYTES, Disks, Journal, Operation, ReplicaDisk, Told,
};

fn at(range: &Range<u64>) -> Range<usize> {
    let index = |at: u64| usize::try_from(at).expect("a test's image is small");
    index(range.start)..index(range.end)
}

/// What the guest may know.
#[derive(Debug, Default)]
struct Known {
    images: Vec<Vec<u8>>,
    /// By a number: what the host is doing at the moment.
    under_way: BTreeMap<u64, (usize, Range<u64>)>,
    next: u64,
}

/// The disks of a protected machine.
pub struct MemoryDisks {
    host: Vec<Mutex<Vec<u8>>>,
    /// What the host's storage has: what was not flushed looks like a hole where this is zero.
    stored: Vec<Mutex<Vec<u8>>>,
    /// Flushes for a copy fail from here on.
    pub unflushable: AtomicBool,
    /// Done once, between a flush for a copy and what follows it.
    pub after_flush: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    known: Mutex<Known>,
    journal: RwLock<Option<Arc<Journal>>>,
    wakes: Mutex<u64>,
    woken: Condvar,
    /// Reads of a copy fail from here on.
    pub broken: AtomicBool,
}

/// What a guest asks of its disk.
#[derive(Clone, Debug)]
pub struct Request {
    pub disk: usize,
    pub operation: Operation,
    pub range: Range<u64>,
    /// What is written: this byte throughout.
    pub fill: u8,
}

impl MemoryDisks {
    /// Disks that contain `images`.
    #[must_use]
    pub fn new(images: Vec<Vec<u8>>) -> Arc<Self> {
        Arc::new(Self {
            host: images.iter().cloned().map(Mutex::new).collect(),
            stored: images.iter().map(|image| Mutex::new(vec![0; image.len()])).collect(),
            unflushable: AtomicBool::new(false),
            after_flush: Mutex::default(),
            known: Mutex::new(Known { images, ..Known::default() }),
            journal: RwLock::default(),
            wakes: Mutex::default(),
            woken: Condvar::new(),
            broken: AtomicBool::new(false),
        })
    }

    /// Whether changes are told to anybody.
    #[must_use]
    pub fn is_journalled(&self) -> bool {
        self.journal().is_some()
    }

    /// What the guest knows of a disk.
    #[must_use]
    pub fn image(&self, disk: usize) -> Vec<u8> {
        lock(&self.known).images[disk].clone()
    }

    fn journal(&self) -> Option<Arc<Journal>> {
        self.journal.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Room for one change, in whichever journal there is.
    fn reserve(&self, cost: u64) -> Option<Arc<Journal>> {
        let mut wakes = lock(&self.wakes);
        loop {
            let journal = self.journal()?;
            if journal.reserve(cost) {
                return Some(journal);
            }
            let before = *wakes;
            wakes = self
                .woken
                .wait_while(wakes, |now| *now == before)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Carries out a request of `machine`'s guest as a device would. `None`: destroyed.
    pub fn request(&self, machine: &Machine, request: &Request) -> Option<()> {
        let Request { disk, operation, ref range, fill } = *request;
        let len = range.end - range.start;
        let data = if operation == Operation::Write { vec![fill; at(range).len()] } else { vec![] };
        let cost = CHANGE_BYTES_MAX as u64 + CHANGE_COST_BYTES;
        let journal = self.reserve(cost);
        let number = machine.run(|_| {
            let mut known = lock(&self.known);
            known.next += 1;
            let number = known.next;
            known.under_way.insert(number, (disk, range.clone()));
            number
        });
        let change = |image: &mut [u8], range: &Range<u64>| match operation {
            Operation::Write => image[at(range)].fill(fill),
            Operation::Zero { .. } | Operation::Discard => image[at(range)].fill(0),
            Operation::Flush => {}
        };
        let ended = number.and_then(|number| {
            let middle = range.start + len / 2;
            change(&mut lock(&self.host[disk]), &(range.start..middle));
            std::thread::yield_now();
            change(&mut lock(&self.host[disk]), &(middle..range.end));
            machine.run(|_| {
                let offset = range.start;
                let disk_number = u32::try_from(disk).expect("few disks");
                if let Some(journal) = self.journal() {
                    journal.record(Told { disk: disk_number, operation, offset, len, data: &data });
                }
                let mut known = lock(&self.known);
                known.under_way.remove(&number);
                change(&mut known.images[disk], range);
            })
        });
        if let Some(journal) = journal {
            journal.release(cost);
        }
        ended
    }

    /// What a machine state says of the disks.
    pub(super) fn state(&self) -> Vec<u8> {
        let known = lock(&self.known);
        let mut out = Vec::new();
        for (disk, image) in known.images.iter().enumerate() {
            let under_way: Vec<_> =
                known.under_way.values().filter(|(of, _)| *of == disk).map(|(_, at)| at).collect();
            out.extend(masked(image, under_way.iter().copied()).to_le_bytes());
            out.extend((under_way.len() as u64).to_le_bytes());
            for range in under_way {
                out.extend(range.start.to_le_bytes());
                out.extend(range.end.to_le_bytes());
            }
        }
        out
    }
}

/// The checksum of an image without what is under way, which may be anything.
fn masked<'a>(image: &[u8], under_way: impl Iterator<Item = &'a Range<u64>>) -> u32 {
    let mut image = image.to_vec();
    under_way.for_each(|range| image[at(range)].fill(0));
    crc32fast::hash(&image)
}

impl Disks for MemoryDisks {
    fn sizes_bytes(&self) -> Vec<u64> {
        self.host.iter().map(|image| lock(image).len() as u64).collect()
    }

    fn read(&self, disk: usize, offset: u64, into: &mut [u8]) -> io::Result<()> {
        if self.broken.load(Ordering::Acquire) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let range = offset..offset + into.len() as u64;
        into.copy_from_slice(&lock(&self.host[disk])[at(&range)]);
        Ok(())
    }

    fn hole_bytes(&self, disk: usize, offset: u64) -> u64 {
        let stored = lock(&self.stored[disk]);
        let from = usize::try_from(offset).expect("a test's image is small");
        stored[from..].iter().take_while(|byte| **byte == 0).count() as u64
    }

    fn flush(&self, disk: usize) -> io::Result<()> {
        if self.unflushable.load(Ordering::Acquire) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let host = lock(&self.host[disk]).clone();
        *lock(&self.stored[disk]) = host;
        let after = lock(&self.after_flush).take();
        if let Some(after) = after {
            after();
        }
        Ok(())
    }

    fn set_journal(&self, journal: Option<Arc<Journal>>) {
        *self.journal.write().unwrap_or_else(PoisonError::into_inner) = journal;
        self.wake();
    }

    fn wake(&self) {
        *lock(&self.wakes) += 1;
        self.woken.notify_all();
    }
}

/// The image of a replica.
pub struct MemoryImage {
    bytes: Mutex<Vec<u8>>,
    /// Changes after which the host refuses all.
    pub changes_left: AtomicU64,
    pub flushes: AtomicU64,
    /// Held by a test, nothing ends.
    pub busy: Mutex<()>,
    /// Changes that wait for that.
    pub waiting: AtomicU64,
    /// Held by a test, no flush ends.
    pub flushing: Mutex<()>,
}

impl MemoryImage {
    /// An image that contains `bytes`.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::new(bytes),
            changes_left: AtomicU64::new(u64::MAX),
            flushes: AtomicU64::new(0),
            busy: Mutex::default(),
            waiting: AtomicU64::new(0),
            flushing: Mutex::default(),
        })
    }

    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        lock(&self.bytes).clone()
    }

    fn change(&self, change: impl FnOnce(&mut [u8])) -> io::Result<()> {
        self.waiting.fetch_add(1, Ordering::AcqRel);
        drop(lock(&self.busy));
        self.waiting.fetch_sub(1, Ordering::AcqRel);
        let fewer = |left: u64| left.checked_sub(1);
        if self.changes_left.fetch_update(Ordering::AcqRel, Ordering::Acquire, fewer).is_err() {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        change(&mut lock(&self.bytes));
        Ok(())
    }
}

impl ReplicaDisk for MemoryImage {
    fn size_bytes(&self) -> u64 {
        lock(&self.bytes).len() as u64
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.change(|image| image[at(&(offset..offset + data.len() as u64))].copy_from_slice(data))
    }

    fn zero(&self, offset: u64, len: u64, _unmap: bool) -> io::Result<()> {
        self.change(|image| image[at(&(offset..offset + len))].fill(0))
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.zero(offset, len, true)
    }

    fn flush(&self) -> io::Result<()> {
        drop(lock(&self.flushing));
        self.flushes.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }
}

/// What is wrong with the images of a replica, by what the primary's machine state says.
pub(super) fn compare(images: &[Arc<MemoryImage>], state: &[u8]) -> Result<(), String> {
    let (numbers, mut rest) =
        (|from: &[u8]| u64::from_le_bytes(from.try_into().expect("8")), state);
    for (disk, image) in images.iter().enumerate() {
        let (head, tail) = rest.split_at_checked(12).ok_or("the state has too few disks")?;
        let sum = u32::from_le_bytes(head[..4].try_into().expect("4"));
        let count = usize::try_from(numbers(&head[4..])).map_err(|error| error.to_string())?;
        let (ranges, tail) = tail.split_at_checked(16 * count).ok_or("the state is too short")?;
        let ranges: Vec<_> =
            ranges.chunks(16).map(|pair| numbers(&pair[..8])..numbers(&pair[8..])).collect();
        let found = masked(&image.bytes(), ranges.iter());
        if found != sum {
            return Err(format!("disk {disk} is {found:08x}, the primary's {sum:08x}"));
        }
        rest = tail;
    }
    if rest.is_empty() { Ok(()) } else { Err("the state has too many disks".to_owned()) }
}
