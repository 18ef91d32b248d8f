//! The ioctls of userfaultfd, as far as write protection goes. Linux: `include/uapi/linux/userfaultfd.h`,
//! Documentation/admin-guide/mm/userfaultfd.rst.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use vmm_sys_util::errno;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iowr_nr};

const UFFDIO: u32 = 0xaa;
/// The version of the interface.
pub const API: u64 = 0xaa;

/// Faults by writing to a protected page are told apart.
pub const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
/// Write protection of shared memory.
pub const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
/// Pages that were never touched can be protected, in private memory too.
pub const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;

pub const REGISTER_MODE_WP: u64 = 1 << 1;
pub const WRITEPROTECT_MODE_WP: u64 = 1 << 0;
pub const EVENT_PAGEFAULT: u8 = 0x12;

#[repr(C)]
#[derive(Debug, Default)]
pub struct Api {
    pub api: u64,
    pub features: u64,
    pub ioctls: u64,
}

#[repr(C)]
#[derive(Debug, Default)]
pub struct Range {
    pub start: u64,
    pub len: u64,
}

#[repr(C)]
#[derive(Debug, Default)]
pub struct Register {
    pub range: Range,
    pub mode: u64,
    pub ioctls: u64,
}

#[repr(C)]
#[derive(Debug, Default)]
pub struct WriteProtect {
    pub range: Range,
    pub mode: u64,
}

/// `struct uffd_msg` of a page fault; other events have other words after the first.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Message {
    pub event: u8,
    reserved: [u8; 7],
    pub flags: u64,
    pub address: u64,
    feature: u64,
}

ioctl_iowr_nr!(UFFDIO_API, UFFDIO, 0x3f, Api);
ioctl_iowr_nr!(UFFDIO_REGISTER, UFFDIO, 0x00, Register);
ioctl_ior_nr!(UFFDIO_WAKE, UFFDIO, 0x02, Range);
ioctl_iowr_nr!(UFFDIO_WRITEPROTECT, UFFDIO, 0x06, WriteProtect);
ioctl_io_nr!(USERFAULTFD_IOC_NEW, UFFDIO, 0x00);

fn check(ret: i32) -> io::Result<i32> {
    if ret < 0 { Err(errno::Error::last().into()) } else { Ok(ret) }
}

/// A new descriptor that also sees faults that the kernel takes for us, as KVM does for a guest
/// (UFFD_USER_MODE_ONLY would lose those). Where the system call is not allowed, the device is
/// tried, whose permissions an administrator can set.
pub fn open() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: userfaultfd(2) takes one argument, and touches no memory.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let refused = match i32::try_from(fd) {
        // SAFETY: the kernel has just made the descriptor for us.
        Ok(fd) if fd >= 0 => return Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => io::Error::last_os_error(),
    };
    let Ok(device) = File::options().read(true).write(true).open("/dev/userfaultfd") else {
        return Err(refused);
    };
    let flags = u64::from(flags.unsigned_abs());
    // SAFETY: the ioctl takes flags and touches no memory.
    let fd = check(unsafe { ioctl_with_val(&device, USERFAULTFD_IOC_NEW(), flags) })?;
    // SAFETY: the kernel has just made the descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Agrees on the interface; what is returned holds the features that are on.
pub fn api(fd: &impl AsRawFd, features: u64) -> io::Result<Api> {
    let mut api = Api { api: API, features, ioctls: 0 };
    // SAFETY: the kernel reads and writes one structure of this layout.
    check(unsafe { ioctl_with_mut_ref(fd, UFFDIO_API(), &mut api) })?;
    Ok(api)
}

/// Watches a range of this process for writes to protected pages.
pub fn register(fd: &impl AsRawFd, range: Range) -> io::Result<Register> {
    let mut register = Register { range, mode: REGISTER_MODE_WP, ioctls: 0 };
    // SAFETY: the kernel reads and writes one structure of this layout. No content changes: an
    // access to a protected page waits, which no reader or writer can tell from being slow.
    check(unsafe { ioctl_with_mut_ref(fd, UFFDIO_REGISTER(), &mut register) })?;
    Ok(register)
}

/// Protects a registered range, or ends its protection and wakes who waits.
pub fn write_protect(fd: &impl AsRawFd, range: Range, protect: bool) -> io::Result<()> {
    let mode = if protect { WRITEPROTECT_MODE_WP } else { 0 };
    let mut request = WriteProtect { range, mode };
    // SAFETY: as for `register`.
    check(unsafe { ioctl_with_mut_ref(fd, UFFDIO_WRITEPROTECT(), &mut request) }).map(drop)
}

/// Wakes who waits in a range.
pub fn wake(fd: &impl AsRawFd, range: &Range) -> io::Result<()> {
    // SAFETY: as for `register`.
    check(unsafe { ioctl_with_ref(fd, UFFDIO_WAKE(), range) }).map(drop)
}

/// Reads messages, as many as are there and fit; 0 if none is there.
pub fn read(fd: &impl AsRawFd, messages: &mut [Message]) -> io::Result<usize> {
    let bytes = size_of_val(messages);
    // SAFETY: the kernel writes whole messages, which are plain words, up to `bytes`.
    let got = unsafe { libc::read(fd.as_raw_fd(), messages.as_mut_ptr().cast(), bytes) };
    match usize::try_from(got) {
        Ok(got) => Ok(got / size_of::<Message>()),
        Err(_) => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            error => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers as `strace` prints them for a program in C.
    #[test]
    fn the_numbers_are_the_kernel_s() {
        assert_eq!(size_of::<Message>(), 32);
        assert_eq!(UFFDIO_API(), 0xc018_aa3f);
        assert_eq!(UFFDIO_REGISTER(), 0xc020_aa00);
        assert_eq!(UFFDIO_WAKE(), 0x8010_aa02);
        assert_eq!(UFFDIO_WRITEPROTECT(), 0xc018_aa06);
        assert_eq!(USERFAULTFD_IOC_NEW(), 0xaa00);
    }
}
