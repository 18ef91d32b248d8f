//! Receiving bytes together with descriptors (`SCM_RIGHTS`, unix(7)), and taking over
//! descriptors that a parent process left open.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

/// Descriptors that one message may carry: the kernel's own limit (`SCM_MAX_FD`), so that a message
/// is cut only where this process has no descriptor left.
pub(super) const MESSAGE_DESCRIPTORS_MAX: usize = 253;

/// Reads once. No bytes mean the end of the stream.
///
/// # Errors
///
/// The socket's; a read that reached the socket's timeout is `WouldBlock`. `ENOBUFS` where there was
/// no room for all descriptors: none of them is kept.
pub(super) fn receive(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    receive_with(stream, buffer, nix::cmsg_space!([RawFd; MESSAGE_DESCRIPTORS_MAX]))
}

/// [`receive`] with `control` as the room for descriptors.
fn receive_with(
    stream: &UnixStream,
    buffer: &mut [u8],
    mut control: Vec<u8>,
) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut slices = [IoSliceMut::new(buffer)];
    // Close-on-exec from the start: nothing that the VMM may ever spawn shall have them.
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut slices, Some(&mut control), flags)?;
    if message.flags.contains(MsgFlags::MSG_CTRUNC) {
        drop(installed(&control));
        return Err(Errno::ENOBUFS.into());
    }
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

/// The descriptors of a message that was cut, in the zeroed `control` that it was received with: the
/// kernel installs as many as there is room for, and nix gives access to none.
fn installed(control: &[u8]) -> Vec<OwnedFd> {
    const HEAD_BYTES: usize = size_of::<libc::cmsghdr>();
    if control.len() < HEAD_BYTES {
        return Vec::new();
    }
    // SAFETY: so many bytes are there, and any are a head, which is nothing but integers.
    let head = unsafe { control.as_ptr().cast::<libc::cmsghdr>().read_unaligned() };
    if (head.cmsg_level, head.cmsg_type) != (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
        return Vec::new();
    }
    let raw = control.get(HEAD_BYTES..head.cmsg_len).unwrap_or_default();
    let (raw, _) = raw.as_chunks::<{ size_of::<RawFd>() }>();
    let own = |bytes: &[u8; size_of::<RawFd>()]| {
        // SAFETY: the kernel has just installed it in this process for this message, and this is
        // its only mention, so it gets exactly one owner.
        unsafe { OwnedFd::from_raw_fd(RawFd::from_ne_bytes(*bytes)) }
    };
    raw.iter().map(own).collect()
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

#[cfg(test)]
mod tests {
    use std::io::{IoSlice, Read};

    use nix::sys::socket::{ControlMessage, sendmsg};

    use super::*;

    #[test]
    fn of_a_message_that_is_cut_nothing_is_kept() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (passed, mut peer) = UnixStream::pair().unwrap();
        let raw = [passed.as_raw_fd(); 3];
        let rights = [ControlMessage::ScmRights(&raw)];
        let bytes = [IoSlice::new(b"x")];
        sendmsg::<()>(theirs.as_raw_fd(), &bytes, &rights, MsgFlags::empty(), None).unwrap();
        drop(passed);
        // Aligned, it is room for two.
        let room = nix::cmsg_space!([RawFd; 1]);
        let error = receive_with(&ours, &mut [0; 8], room).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOBUFS));
        peer.set_nonblocking(true).unwrap();
        assert_eq!(peer.read(&mut [0]).unwrap(), 0, "the other end is closed");
    }
}
