//! Pages that are there before their first write.

use std::io;

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// Has the host put a page behind each of those that `memory` touches and that have none yet, ready
/// to be written, in one call: on their own, each first write is a fault, which costs about as much
/// again. What they read as stays.
///
/// # Errors
/// If the kernel does not know how (before Linux 5.14), the memory does not begin at a page's
/// border, or the host has no memory left. Nothing depends on it: a first write does the same.
pub fn populate<B: BitmapSlice>(memory: &VolatileSlice<'_, B>) -> io::Result<()> {
    let guard = memory.ptr_guard_mut();
    // SAFETY: a volatile slice is memory that is mapped for as long as it lives, and this advice
    // changes neither the mapping nor what a byte of it reads as.
    let result =
        unsafe { libc::madvise(guard.as_ptr().cast(), memory.len(), libc::MADV_POPULATE_WRITE) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
