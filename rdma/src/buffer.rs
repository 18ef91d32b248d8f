//! Memory of our own that a device may access.

use std::ptr::NonNull;
use std::sync::Arc;
use std::{fmt, io};

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use crate::error::Error;
use crate::memory::{Access, MemoryRegion, ProtectionDomain, Remote, Segment};

/// Pages that are mapped for a region, zero at first. Bytes go in and out by copying, since a device
/// may read and write them at any time.
pub struct Buffer {
    /// `None` once it is dropped: before the mapping.
    region: Option<MemoryRegion>,
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is accessed through methods that copy, whose bounds are checked; what a device
// does to it meanwhile changes bytes, not validity.
unsafe impl Send for Buffer {}

impl Buffer {
    /// Maps `len` bytes, 1 at least, and registers them.
    ///
    /// # Errors
    /// If there is no memory for it, or it cannot be locked.
    pub fn new(domain: &Arc<ProtectionDomain>, len: usize, access: Access) -> Result<Self, Error> {
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing else.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        let start = if address == libc::MAP_FAILED { None } else { NonNull::new(address.cast()) };
        let Some(start) = start else {
            let what = format!("be given a buffer of {len} bytes");
            return Err(domain.context().failed(what, io::Error::last_os_error()));
        };
        let mut buffer = Self { region: None, start, len };
        // SAFETY: the mapping is this buffer's, which unmaps it after the region; all access is by raw
        // copies.
        buffer.region = Some(unsafe { MemoryRegion::register(domain, start, len, access)? });
        Ok(buffer)
    }

    fn region(&self) -> &MemoryRegion {
        self.region.as_ref().expect("a buffer has its region until it is dropped")
    }

    /// Bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where a peer finds it.
    #[must_use]
    pub fn remote(&self) -> Remote {
        Remote { address: self.region().address(), key: self.region().remote_key() }
    }

    /// `len` bytes from `offset` on, for a request.
    ///
    /// # Errors
    /// If they are not within the buffer.
    pub fn segment(&self, offset: usize, len: u32) -> Result<Segment, Error> {
        self.region().segment(offset, len)
    }

    /// Copies `from` in, at `offset`.
    ///
    /// # Panics
    /// If it does not fit.
    pub fn write(&mut self, offset: usize, from: &[u8]) {
        self.check(offset, from.len());
        // SAFETY: inside the mapping, as just checked, which no reference points into.
        unsafe {
            let to = self.start.as_ptr().add(offset);
            std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len());
        }
    }

    /// Copies bytes from `offset` on out.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        self.check(offset, into.len());
        // SAFETY: as in `write`.
        unsafe {
            let from = self.start.as_ptr().add(offset);
            std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len());
        }
    }

    /// Copies `len` bytes from `offset` on to the beginning of `into`, as much as it has room for.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn read_volatile<B: BitmapSlice>(
        &self,
        offset: usize,
        len: usize,
        into: &VolatileSlice<'_, B>,
    ) {
        self.check(offset, len);
        // SAFETY: inside the mapping, as just checked, which stays while `self` does; nobody has a reference
        // to any of it.
        let from = unsafe { VolatileSlice::new(self.start.as_ptr().add(offset), len) };
        from.copy_to_volatile_slice(into.clone());
    }

    fn check(&self, offset: usize, len: usize) {
        let end = offset.checked_add(len);
        assert!(end.is_some_and(|end| end <= self.len), "{len} bytes at {offset} of {}", self.len);
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Buffer").field(&self.len).finish()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // The device lets go of the memory before it is unmapped. One that does not keeps the mapping, for
        // ever: it is nobody else's then, and no guest has to end for it.
        if let Some(Err(error)) = self.region.take().map(MemoryRegion::end) {
            let source = std::error::Error::source(&error).map(|source| format!(": {source}"));
            tracing::warn!("memory stays with the device: {error}{}", source.unwrap_or_default());
            return;
        }
        // SAFETY: mapped by `new`, and nobody has a pointer into it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::{c_int, c_void};
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicI32, Ordering};

    use vm_memory::{GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::abi;
    use crate::context::Context;
    use crate::lent::LentMemory;
    use crate::library::Library;

    /// What the device answers when it is to give back memory, and how often it gave back its domain.
    static ANSWER: AtomicI32 = AtomicI32::new(0);
    static DOMAINS: AtomicI32 = AtomicI32::new(0);

    unsafe extern "C" fn alloc_pd(_: *mut abi::Context) -> *mut abi::Pd {
        NonNull::dangling().as_ptr()
    }

    unsafe extern "C" fn dealloc_pd(_: *mut abi::Pd) -> c_int {
        DOMAINS.fetch_add(1, Ordering::Relaxed);
        0
    }

    unsafe extern "C" fn close_device(_: *mut abi::Context) -> c_int {
        0
    }

    unsafe extern "C" fn reg_mr(
        pd: *mut abi::Pd,
        addr: *mut c_void,
        length: usize,
        _: c_int,
    ) -> *mut abi::Mr {
        let context = std::ptr::null_mut();
        Box::into_raw(Box::new(abi::Mr { context, pd, addr, length, handle: 1, lkey: 2, rkey: 3 }))
    }

    unsafe extern "C" fn dereg_mr(raw: *mut abi::Mr) -> c_int {
        let answer = ANSWER.load(Ordering::Relaxed);
        if answer == 0 {
            // SAFETY: `reg_mr` made it, and it is given back once.
            drop(unsafe { Box::from_raw(raw) });
        }
        answer
    }

    fn is_mapped(address: u64, len: usize) -> bool {
        let mut there = [0; 4];
        let address = std::ptr::with_exposed_provenance_mut(usize::try_from(address).unwrap());
        // SAFETY: the kernel writes a byte for each of the four pages, or none.
        (unsafe { libc::mincore(address, len, there.as_mut_ptr()) }) == 0
    }

    fn library() -> Library {
        Library {
            ibv_alloc_pd: alloc_pd,
            ibv_dealloc_pd: dealloc_pd,
            ibv_close_device: close_device,
            ibv_reg_mr: reg_mr,
            ibv_dereg_mr: dereg_mr,
            ..Library::unusable()
        }
    }

    /// Answers, and whether the device keeps the memory.
    const KEPT: [(c_int, bool); 4] =
        [(0, false), (libc::EBUSY, true), (libc::EINVAL, true), (libc::EIO, true)];

    /// One at a time: what the device does is the same for all.
    static TURN: Mutex<()> = Mutex::new(());

    #[test]
    fn bytes_go_in_and_out() {
        let _turn = TURN.lock();
        let context = Context::of(library(), NonNull::dangling());
        ANSWER.store(0, Ordering::Relaxed);
        let domain = ProtectionDomain::new(&context).unwrap();
        let mut buffer = Buffer::new(&domain, 4096, Access::LOCAL_READ).unwrap();
        buffer.write(4090, b"abcdef");
        let mut out = [0; 8];
        buffer.read_volatile(4091, 5, &VolatileSlice::from(&mut out[..]));
        assert_eq!(&out, b"bcdef\0\0\0");
        let mut out = [0; 2];
        buffer.read_volatile(4091, 5, &VolatileSlice::from(&mut out[..]));
        assert_eq!(&out, b"bc", "as much as there is room for");
        buffer.read(4092, &mut out);
        assert_eq!(&out, b"cd");
        let read = |offset, len| {
            let mut into = [0; 8];
            buffer.read_volatile(offset, len, &VolatileSlice::from(&mut into[..]));
        };
        let outside = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| read(4092, 5)));
        assert!(outside.is_err());
    }

    /// A device that keeps a ring costs its mapping, and not the process, in which a healthy guest may run.
    #[test]
    fn a_ring_that_the_device_keeps_stays_mapped_and_nobody_ends() {
        const LEN: usize = 4 * 4096;
        let _turn = TURN.lock();
        let context = Context::of(library(), NonNull::dangling());
        for (answer, stays) in KEPT {
            ANSWER.store(answer, Ordering::Relaxed);
            let before = DOMAINS.load(Ordering::Relaxed);
            let domain = ProtectionDomain::new(&context).unwrap();
            let buffer = Buffer::new(&domain, LEN, Access::REMOTE_WRITE).unwrap();
            let at = buffer.remote().address;
            drop((buffer, domain));
            assert_eq!(is_mapped(at, LEN), stays, "{answer}");
            // What has memory is not given back either: a device would refuse that.
            assert_eq!(DOMAINS.load(Ordering::Relaxed) - before, i32::from(!stays), "{answer}");
        }
    }

    /// Nobody may take a guest's memory for its own again that a peer writes yet.
    #[test]
    fn memory_that_the_device_keeps_is_not_said_to_have_ended() {
        const LEN: usize = 4 * 4096;
        let _turn = TURN.lock();
        let context = Context::of(library(), NonNull::dangling());
        for (answer, stays) in KEPT {
            ANSWER.store(answer, Ordering::Relaxed);
            let domain = ProtectionDomain::new(&context).unwrap();
            let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), LEN)]).unwrap();
            let memory = Arc::new(memory);
            let lent = LentMemory::open(&domain, &memory, GuestAddress(0), LEN).unwrap();
            let at = lent.remote().address;
            assert_eq!(lent.end().is_err(), stays, "{answer}");
            drop(memory);
            assert_eq!(is_mapped(at, LEN), stays, "{answer}");
        }
    }
}
