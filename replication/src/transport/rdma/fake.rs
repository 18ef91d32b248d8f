//! A device that is none: both sides are in one process, and a WRITE is a copy of pages. It takes its time for each
//! piece that it registers, has room for so many, and does a queue pair's requests late, in their order. One that is
//! *late* registers each after something was written that may have been in the one before.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ::rdma::{Error, Remote};
use api::replication::RdmaPath;
use vm_memory::GuestAddress;

use super::lent::Lent;
use super::pieces::Purpose;
use super::registrar;
use super::window::{Placed, Window};
use crate::ids::{PAGE_SIZE, PageIndex};
use crate::ram::Ram;
use crate::transport::Stream;

/// Pieces of it: the memories of tests are small.
pub(super) const PIECE_BYTES: u64 = 16 * PAGE_SIZE as u64;
/// How long a piece takes.
const PIECE_TIME: Duration = Duration::from_millis(1);
const BASE: u64 = 1 << 40;

/// Of all devices, by key: a WRITE names that of a piece that is open.
static OPEN: Mutex<BTreeMap<u32, (Ram, PageIndex, u64)>> = Mutex::new(BTreeMap::new());
/// WRITEs that were done.
static WRITES: Mutex<u64> = Mutex::new(0);
static WRITTEN: Condvar = Condvar::new();
static KEYS: AtomicU32 = AtomicU32::new(1);
/// By memory.
static READ: Mutex<BTreeMap<usize, Reading>> = Mutex::new(BTreeMap::new());

/// Pieces of a memory that the device was to read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reading {
    /// Ever registered.
    pub(crate) made: usize,
    /// Registered now.
    pub(crate) now: usize,
}

fn read<T>(ram: &Ram, look: impl FnOnce(&mut Reading) -> T) -> T {
    let mut all = READ.lock().unwrap_or_else(PoisonError::into_inner);
    look(all.entry(Arc::as_ptr(ram.mapping()).addr()).or_default())
}

/// Of this memory.
pub(crate) fn reading(ram: &Ram) -> Reading {
    read(ram, |reading| *reading)
}

fn open() -> MutexGuard<'static, BTreeMap<u32, (Ram, PageIndex, u64)>> {
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn writes() -> MutexGuard<'static, u64> {
    WRITES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How many pieces of this memory peers may write.
pub(crate) fn open_pieces(ram: &Ram) -> usize {
    open().values().filter(|(of, ..)| Arc::ptr_eq(of.mapping(), ram.mapping())).count()
}

/// What a connection uses.
pub(super) fn path() -> RdmaPath {
    RdmaPath {
        device: super::FAKE.to_owned(),
        port: 1,
        gid_index: 0,
        gid: "::".to_owned(),
        mtu_bytes: 4096,
        depth: 64,
        registered_bytes: 0,
        from_memory_bytes: 0,
        straight_bytes: 0,
    }
}

/// What a device does.
pub(crate) struct Plan {
    /// Pieces that it has room for.
    left: AtomicU64,
    late: Option<Mutex<Late>>,
}

/// What one that is late has registered: pages from the first on, and how many WRITEs there were before the last
/// piece of these was ready.
#[derive(Default)]
struct Late {
    pages: u64,
    writes: u64,
}

/// A piece that is registered.
pub(super) struct Memory {
    ram: Ram,
    first: PageIndex,
    key: Option<u32>,
}

impl Plan {
    /// What is behind a blank in the device's name: a number of pieces, and perhaps that it is late.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (pieces, is_late) = match text.strip_suffix(" late") {
            Some(pieces) => (pieces, true),
            None => (text, false),
        };
        let late = is_late.then(Mutex::default);
        Some(Self { left: AtomicU64::new(pieces.parse().ok()?), late })
    }

    /// In the order of the pages, whichever thread asks first.
    fn wait(&self, first: PageIndex, pages: u64) {
        let Some(late) = &self.late else { return };
        let late = || late.lock().unwrap_or_else(PoisonError::into_inner);
        let waits = |writes: &mut u64| {
            let late = late();
            late.pages != first.0 || late.pages > 0 && late.writes == *writes
        };
        let writes = WRITTEN.wait_while(writes(), waits).unwrap_or_else(PoisonError::into_inner);
        *late() = Late { pages: first.0 + pages, writes: *writes };
        WRITTEN.notify_all();
    }

    pub(super) fn register(
        &self,
        ram: &Ram,
        purpose: Purpose,
        start: GuestAddress,
        pages: u64,
    ) -> Result<Memory, Error> {
        std::thread::sleep(PIECE_TIME);
        let region = ram.regions().iter().rev().find(|region| region.start.0 <= start.0).unwrap();
        let page = region.first.0 + (start.0 - region.start.0) / PAGE_SIZE as u64;
        self.wait(PageIndex(page), pages);
        let less = |left: u64| left.checked_sub(1);
        if self.left.fetch_update(Ordering::AcqRel, Ordering::Acquire, less).is_err() {
            return Err(Error::Option { what: "there is no room for another piece".to_owned() });
        }
        let (ram, first) = (ram.clone(), PageIndex(page));
        if purpose == Purpose::Reading {
            read(&ram, |of| (of.made, of.now) = (of.made + 1, of.now + 1));
        }
        let key = (purpose == Purpose::Opened).then(|| {
            // None is used again.
            let key = KEYS.fetch_add(1, Ordering::Relaxed);
            open().insert(key, (ram.clone(), first, pages));
            key
        });
        Ok(Memory { ram, first, key })
    }
}

impl Memory {
    pub(super) fn remote(&self) -> Remote {
        let address = BASE + self.first.0 * PAGE_SIZE as u64;
        Remote { address, key: self.key.unwrap_or(0) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        match self.key {
            Some(key) => drop(open().remove(&key)),
            None => read(&self.ram, |of| of.now -= 1),
        }
    }
}

/// The primary's end: frames go by the stream, as before.
pub(super) struct Writer {
    pub(super) stream: Box<dyn Stream>,
    pub(super) lent: Arc<Lent>,
    /// Posted, and not done.
    pub(super) posted: Vec<Placed>,
}

impl Writer {
    /// What a device does with requests before whatever is posted next.
    fn work(&mut self) -> io::Result<()> {
        let failed = |what: &str| io::Error::new(ErrorKind::ConnectionReset, what.to_owned());
        for write in self.posted.drain(..) {
            let here = self.lent.look(write.first, |memory| match memory {
                registrar::Memory::Fake(memory) => memory.ram.clone(),
                registrar::Memory::Device(_) => unreachable!("one kind of device"),
            });
            let here = here.ok_or_else(|| failed("local protection error"))?;
            // Nobody takes it back meanwhile.
            let open = open();
            let at = PageIndex((write.to.address - BASE) / PAGE_SIZE as u64);
            let (there, first, pages) =
                open.get(&write.to.key).ok_or_else(|| failed("remote access error"))?;
            if at.0 < first.0 || at.0 + write.pages > first.0 + pages {
                return Err(failed("remote access error"));
            }
            let mut bytes = [0; PAGE_SIZE];
            for page in 0..write.pages {
                assert!(here.read_page(PageIndex(write.first.0 + page), &mut bytes));
                assert!(there.write_page(PageIndex(at.0 + page), &bytes));
            }
            *writes() += 1;
            WRITTEN.notify_all();
        }
        Ok(())
    }
}

impl Read for Writer {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.stream.read(into)
    }
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.work()?;
        self.stream.write(bytes)
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.work()?;
        self.stream.write_vectored(slices)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.work()?;
        self.stream.flush()
    }
}

impl Stream for Writer {
    fn place(&mut self, window: &Window, runs: &[(PageIndex, u64)]) -> io::Result<()> {
        for run in runs {
            if !window.writes(*run, |page| self.lent.pages_left(page), &mut self.posted) {
                return Err(io::Error::new(ErrorKind::InvalidData, "not registered"));
            }
        }
        Ok(())
    }

    fn duplicate(&self) -> io::Result<Box<dyn Stream>> {
        self.stream.duplicate()
    }

    fn close(&self) {
        self.stream.close();
    }

    fn finish(&self) {
        self.stream.finish();
    }

    fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream.set_read_timeout(timeout)
    }

    fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream.set_write_timeout(timeout)
    }
}
