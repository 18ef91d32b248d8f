//! Unix sockets, for two VMMs on one machine.

use std::fs;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr};

use super::{Accept, Accepted, Address, Incoming, Stream, TransportError, read_socket};
use crate::ram::Slice;

impl Stream for UnixStream {
    fn read_memory(&mut self, into: &Slice<'_>) -> io::Result<usize> {
        read_socket(self, into)
    }

    fn duplicate(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(self.try_clone()?))
    }

    fn close(&self) {
        // Fails only where there is no connection any more.
        let _ = self.shutdown(Shutdown::Both);
    }

    fn finish(&self) {
        let _ = self.shutdown(Shutdown::Write);
    }

    fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        Self::set_read_timeout(self, timeout)
    }

    fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        Self::set_write_timeout(self, timeout)
    }
}

pub(super) fn connect(path: &Path) -> Result<Box<dyn Stream>, TransportError> {
    match UnixStream::connect(path) {
        Ok(stream) => Ok(Box::new(stream)),
        Err(error) => Err(TransportError::Connect(format!("unix:{}", path.display()), error)),
    }
}

/// Removes its socket file when it goes.
struct Bound {
    listener: UnixListener,
    path: PathBuf,
    /// The file's device and inode.
    file: (u64, u64),
}

impl Drop for Bound {
    fn drop(&mut self) {
        // Another process may have put its own socket there in the meantime.
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|found| (found.dev(), found.ino()) == self.file);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "Cannot remove the socket");
        }
    }
}

impl Accept for Bound {
    fn accept(&self) -> io::Result<Accepted> {
        let (stream, _) = self.listener.accept()?;
        stream.set_nonblocking(false)?;
        Ok((Incoming::Local(Box::new(stream)), format!("unix:{}", self.path.display())))
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

pub(super) fn listen(path: &Path) -> Result<(Box<dyn Accept>, Address), TransportError> {
    let failed = |error| TransportError::Listen(format!("unix:{}", path.display()), error);
    remove_stale(path)?;
    let listener = UnixListener::bind(path).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let made = fs::symlink_metadata(path).map_err(failed)?;
    let bound = Bound { listener, path: path.to_owned(), file: (made.dev(), made.ino()) };
    Ok((Box::new(bound), Address::Unix(path.to_owned())))
}

/// Removes the socket of a process that died; anything else at `path` is an error.
fn remove_stale(path: &Path) -> Result<(), TransportError> {
    let name = || format!("unix:{}", path.display());
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(TransportError::Listen(name(), error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(TransportError::NotSocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    match knock(path) {
        // Of one that accepts nobody the queue is full.
        Ok(()) | Err(Errno::EAGAIN) => Err(TransportError::InUse(name())),
        Err(Errno::ECONNREFUSED) => {
            fs::remove_file(path).map_err(|error| TransportError::RemoveStale(name(), error))
        }
        Err(error) => Err(TransportError::Listen(name(), error.into())),
    }
}

/// Whether somebody listens at `path`, without waiting for a process that may be stopped.
fn knock(path: &Path) -> nix::Result<()> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    socket::connect(socket.as_raw_fd(), &UnixAddr::new(path)?)
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::Backlog;
    use tempfile::TempDir;

    use super::*;
    use crate::transport::Listener;

    fn place() -> (TempDir, PathBuf, Address) {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("backup.sock");
        (directory, path.clone(), Address::Unix(path))
    }

    #[test]
    fn the_socket_of_a_process_that_died_is_taken_over() {
        let (_directory, path, address) = place();
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let (mut listener, _waker) = Listener::bind(&address).unwrap();
        let _primary = UnixStream::connect(&path).unwrap();
        assert!(listener.accept().unwrap().is_some());
        drop(listener);
        assert!(!path.exists(), "it goes with its listener");
    }

    #[test]
    fn a_socket_that_somebody_listens_on_stays_his() {
        let (_directory, path, address) = place();
        let theirs = UnixListener::bind(&path).unwrap();
        // One in the queue fills it.
        socket::listen(&theirs, Backlog::new(0).unwrap()).unwrap();
        for queue in ["empty", "full"] {
            let error = Listener::bind(&address).err().unwrap();
            assert!(matches!(error, TransportError::InUse(_)), "{queue}: {error:?}");
            let said = error.to_string();
            assert!(said.contains("backup.sock' is in use"), "{said}");
            assert!(said.ends_with("end that one, or listen on another path"), "{said}");
        }
        theirs.accept().unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_file_that_is_no_socket_stays() {
        let (_directory, path, address) = place();
        fs::write(&path, "data").unwrap();
        let error = Listener::bind(&address).err().unwrap();
        assert!(matches!(error, TransportError::NotSocket(_)), "{error:?}");
        assert_eq!(fs::read(&path).unwrap(), b"data");
    }

    #[test]
    fn a_listener_leaves_the_socket_of_its_successor() {
        let (directory, path, address) = place();
        let (listener, _waker) = Listener::bind(&address).unwrap();
        fs::rename(&path, directory.path().join("old.sock")).unwrap();
        let _successor = UnixListener::bind(&path).unwrap();
        drop(listener);
        UnixStream::connect(&path).unwrap();
    }
}
