//! Unix sockets, for two VMMs on one machine.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

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
}

impl Drop for Bound {
    fn drop(&mut self) {
        // Somebody else may have removed it already.
        let _ = std::fs::remove_file(&self.path);
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
    let listener = UnixListener::bind(path).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let bound = Bound { listener, path: path.to_owned() };
    Ok((Box::new(bound), Address::Unix(path.to_owned())))
}
