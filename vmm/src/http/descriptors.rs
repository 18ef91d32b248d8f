//! Receiving bytes together with descriptors (`SCM_RIGHTS`, unix(7)), and taking over
//! descriptors that a parent process left open.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

/// Descriptors that one message may carry: the kernel's own limit (`SCM_MAX_FD`), so that
/// nothing is ever cut off silently.
const MESSAGE_DESCRIPTORS_MAX: usize = 253;

/// Reads once. No bytes mean the end of the stream.
///
/// # Errors
///
/// The socket's; a read that reached the socket's timeout is `WouldBlock`.
pub(super) fn receive(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut control = nix::cmsg_space!([RawFd; MESSAGE_DESCRIPTORS_MAX]);
    let mut slices = [IoSliceMut::new(buffer)];
    // Close-on-exec from the start: nothing that the VMM may ever spawn shall have them.
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut slices, Some(&mut control), flags)?;
    let mut descriptors = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = part {
            // SAFETY: the kernel has just installed these descriptors in this process for this
            // message, and `raw` is their only mention, so each gets exactly one owner.
            descriptors.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok((message.bytes, descriptors))
}

/// A descriptor of our own for one that the parent process left open at `raw`.
///
/// # Errors
///
/// `raw` is no open descriptor, or none is free.
pub fn inherit(raw: RawFd) -> io::Result<OwnedFd> {
    // Past the standard streams, should one of them be closed.
    const LOWEST: libc::c_int = 3;
    // SAFETY: F_DUPFD_CLOEXEC reads and writes no memory of this process.
    let duplicate = unsafe { libc::fcntl(raw, libc::F_DUPFD_CLOEXEC, LOWEST) };
    if duplicate < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: fcntl returned a new descriptor that nothing else in this process knows.
    Ok(unsafe { OwnedFd::from_raw_fd(duplicate) })
}
