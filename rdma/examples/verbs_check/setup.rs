//! What the checks stand on: a device, connected queue pairs, memory of a memfd.

use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use rdma::{
    Access, Completion, CompletionChannel, CompletionQueue, ConnectOptions, Context, Depths,
    Library, MemoryRegion, Origin, Place, ProtectionDomain, QueuePair, Remote, Wanted,
};

pub const PAGE: usize = 4096;
/// Of a memory.
pub const PAGES: usize = 32;
const LIMIT: Duration = Duration::from_secs(20);

pub struct Bench {
    pub library: Arc<Library>,
    pub place: Place,
    pub context: Arc<Context>,
    domain: Arc<ProtectionDomain>,
}

/// One end.
pub struct Side {
    pub queue_pair: QueuePair,
    pub queue: Arc<CompletionQueue>,
    pub channel: Arc<CompletionChannel>,
}

impl Bench {
    pub fn new(address: IpAddr) -> Result<Self> {
        let library = Library::load()?;
        let wanted = Wanted { local: Some(address), ..Wanted::default() };
        let place = wanted.choose(&library.devices()?)?;
        println!("{place:?}");
        let context = Context::open(&library, &place.device)?;
        let domain = ProtectionDomain::new(&context)?;
        Ok(Self { library, place, context, domain })
    }

    pub fn domain(&self) -> &Arc<ProtectionDomain> {
        &self.domain
    }

    fn side(&self) -> Result<Side> {
        let channel = CompletionChannel::new(&self.context)?;
        let queue = CompletionQueue::new(&self.context, 512, Some(&channel))?;
        let origin = Origin {
            port: self.place.port,
            gid_index: self.place.gid_index,
            access: Access::REMOTE_WRITE | Access::REMOTE_READ,
        };
        let queue_pair = QueuePair::new(&self.domain, &queue, &queue, &Depths::default(), origin)?;
        Ok(Side { queue_pair, queue, channel })
    }

    /// Two ends that are connected to each other.
    pub fn pair(&self) -> Result<(Side, Side)> {
        let (a, b) = (self.side()?, self.side()?);
        let options = ConnectOptions { retries: 3, ..ConnectOptions::default() };
        a.queue_pair.connect(&b.queue_pair.endpoint(), &options)?;
        b.queue_pair.connect(&a.queue_pair.endpoint(), &options)?;
        Ok((a, b))
    }

    /// Memory of zeroes, registered.
    pub fn memory(&self, access: Access) -> Result<Memory> {
        let bytes = Bytes::new()?;
        // SAFETY: the mapping is unmapped only when `Bytes` is dropped, after the region, which `Memory`
        // has before it; nobody has a reference to it: it is read and written by copies.
        let region =
            unsafe { MemoryRegion::register(&self.domain, bytes.start, PAGES * PAGE, access) }?;
        Ok(Memory { region, bytes })
    }
}

/// Memory that is registered; fields are dropped in this order.
pub struct Memory {
    pub region: MemoryRegion,
    pub bytes: Bytes,
}

impl Memory {
    pub fn remote(&self, offset: usize) -> Remote {
        Remote { address: self.region.address() + offset as u64, key: self.region.remote_key() }
    }

    /// Ends the registration, keeps the memory.
    pub fn unregister(self) -> Bytes {
        drop(self.region);
        self.bytes
    }

    /// Fills it with bytes that tell places apart; 0: with zeroes.
    pub fn fill(&self, seed: u8) {
        for offset in 0..PAGES * PAGE {
            let place = offset.wrapping_mul(31) ^ (offset / PAGE).wrapping_mul(7);
            let byte = u8::try_from(place % 251).unwrap_or(0) ^ seed;
            let byte = if seed == 0 { 0 } else { byte };
            // SAFETY: the place is within the mapping, and no reference to it exists.
            unsafe { self.bytes.start.as_ptr().add(offset).write_volatile(byte) };
        }
    }

    pub fn bytes(&self, offset: usize, len: usize) -> Vec<u8> {
        self.bytes.bytes(offset, len)
    }

    pub fn is_all(&self, byte: u8) -> Result<()> {
        let all = self.bytes(0, PAGES * PAGE);
        ensure!(all.iter().all(|found| *found == byte), "the memory was written");
        Ok(())
    }
}

/// A shared mapping of a memfd.
pub struct Bytes {
    start: NonNull<u8>,
}

impl Bytes {
    fn new() -> Result<Self> {
        let file = memfd_create("verbs-check", MFdFlags::MFD_CLOEXEC)?;
        let len = PAGES * PAGE;
        nix::unistd::ftruncate(&file, i64::try_from(len)?)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let len = NonZeroUsize::new(len).unwrap_or(NonZeroUsize::MIN);
        // SAFETY: a new mapping, at a place that the kernel chooses.
        let start = unsafe { mmap(None, len, protection, MapFlags::MAP_SHARED, file.as_fd(), 0) }?;
        Ok(Self { start: start.cast() })
    }

    pub fn bytes(&self, offset: usize, len: usize) -> Vec<u8> {
        assert!(offset + len <= PAGES * PAGE);
        // SAFETY: the places are within the mapping.
        (offset..offset + len)
            .map(|place| unsafe { self.start.as_ptr().add(place).read_volatile() })
            .collect()
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no reference to it exists.
        let _ = unsafe { munmap(self.start.cast(), PAGES * PAGE) };
    }
}

/// Waits for so many completions.
pub fn completions(queue: &CompletionQueue, count: usize) -> Result<Vec<Completion>> {
    let mut found = vec![Completion::default(); count];
    let (mut done, end) = (0, Instant::now() + LIMIT);
    while done < count {
        done += queue.poll(&mut found[done..])?;
        ensure!(Instant::now() < end, "{done} of {count} completions came within {LIMIT:?}");
        std::thread::yield_now();
    }
    Ok(found)
}

/// What else is in the queue.
pub fn rest(queue: &CompletionQueue) -> Result<Vec<Completion>> {
    let mut found = vec![Completion::default(); 512];
    let count = queue.poll(&mut found)?;
    found.truncate(count);
    Ok(found)
}

/// Nothing more completes.
pub fn quiet(queue: &CompletionQueue) -> Result<()> {
    std::thread::sleep(Duration::from_millis(200));
    let more = rest(queue)?;
    ensure!(more.is_empty(), "completions that nobody asked for: {more:?}");
    Ok(())
}
