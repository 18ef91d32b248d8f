//! What KVM shares with a process by mapping a vCPU's descriptor.

use std::num::NonZeroUsize;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use vmm_sys_util::errno;

/// Memory that the kernel and this process write. It lives as long as whoever holds it, the
/// descriptor being closed or not; who holds it says how it is accessed.
pub(crate) struct Mapping {
    start: NonNull<u8>,
    size: NonZeroUsize,
}

impl Mapping {
    /// Maps `size` bytes, 1 at least, from `offset` of the descriptor on.
    pub(crate) fn new(
        fd: &(impl AsRawFd + ?Sized),
        size: usize,
        offset: i64,
    ) -> Result<Self, errno::Error> {
        let size = NonZeroUsize::new(size).ok_or_else(|| errno::Error::new(libc::EINVAL))?;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing else.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size.get(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                offset,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(errno::Error::last());
        }
        let start = NonNull::new(address.cast()).ok_or_else(errno::Error::last)?;
        Ok(Self { start, size })
    }

    /// The first byte, at a page's border.
    pub(crate) fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Bytes.
    pub(crate) fn size(&self) -> usize {
        self.size.get()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and nothing borrows from it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.size.get()) };
    }
}
