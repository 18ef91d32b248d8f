//! Claiming and removing the socket's file.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use nix::sys::socket::{getsockopt, sockopt};
use nix::sys::stat::{Mode, umask};

use super::HttpError;

/// A file that this process made and takes away again.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Another process may have put its own socket there in the meantime.
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|found| found.dev() == self.device && found.ino() == self.inode);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "Cannot remove the API socket");
        }
    }
}

/// Listens at `path`, which only this user can reach.
pub(super) fn bind(path: &Path) -> Result<(UnixListener, SocketFile), HttpError> {
    remove_stale(path)?;
    let error = |source| HttpError::Bind { path: path.to_owned(), source };
    let listener = bind_private(path).map_err(error)?;
    let made = fs::symlink_metadata(path).map_err(error)?;
    let file = SocketFile { path: path.to_owned(), device: made.dev(), inode: made.ino() };
    Ok((listener, file))
}

/// Takes over a listening socket that the parent process made.
pub(super) fn adopt(descriptor: OwnedFd) -> Result<UnixListener, HttpError> {
    let listening = getsockopt(&descriptor, sockopt::AcceptConn)
        .map_err(|error| HttpError::NotListening(error.into()))?;
    if !listening {
        return Err(HttpError::NotListening(io::ErrorKind::InvalidInput.into()));
    }
    let listener = UnixListener::from(descriptor);
    // A TCP socket would have no UNIX address.
    listener.local_addr().map_err(HttpError::NotListening)?;
    Ok(listener)
}

/// Binds under umask 077, so that there is no moment at which others could connect.
///
/// The mask belongs to the whole process. Should another thread create a file at this moment, it
/// gets fewer permissions, never more; two of us at once would leave the wrong mask behind, hence
/// the lock.
fn bind_private(path: &Path) -> io::Result<UnixListener> {
    static MASK: Mutex<()> = Mutex::new(());
    let _guard = MASK.lock().unwrap_or_else(PoisonError::into_inner);
    let before = umask(Mode::S_IRWXG | Mode::S_IRWXO);
    let listener = UnixListener::bind(path);
    umask(before);
    listener
}

/// Removes a socket that nobody listens on any more; anything else at `path` is an error.
fn remove_stale(path: &Path) -> Result<(), HttpError> {
    let examine = |source| HttpError::Examine { path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(examine(error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(HttpError::NotSocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(HttpError::InUse(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path)
            .map_err(|source| HttpError::RemoveStale { path: path.to_owned(), source }),
        Err(error) => Err(examine(error)),
    }
}
