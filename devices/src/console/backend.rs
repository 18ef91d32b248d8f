//! Where a port leads on the host.
//!
//! What enters: a [`PortMode`]; what leaves: a source of input and a sink of output for the two
//! threads of a [`super::HostSide`], and what must be undone at the end.
//!
//! | Mode | Input | Output when nobody reads |
//! |---|---|---|
//! | Null | none | discarded |
//! | Tty | standard input | the newest 64 KiB wait, see [`crate::output_gate`] |
//! | Pty | the pty | as Tty, and some KiB in the kernel |
//! | File | none | appended |
//! | Socket | the client | dropped without a client; as Tty with a client that does not read |
//!
//! A file that exists is appended to: a restart, or a take-over to the same path on shared
//! storage, must not destroy the log.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::openpty;
use nix::sys::socket::{MsgFlags, send};
use nix::sys::stat::{SFlag, fstat};
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
use nix::unistd::{isatty, ttyname};
use thiserror::Error;

use super::tty::{RawMode, is_foreground};

/// Where a serial port or console leads. One that is off is no device: do not make one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortMode {
    /// Nowhere.
    Null,
    /// Standard input and output.
    Tty,
    /// A new pseudoterminal.
    Pty,
    /// A file, appended to.
    File(PathBuf),
    /// A UNIX socket on which one client at a time is served.
    Socket(PathBuf),
}

/// Errors of opening the host side.
#[derive(Debug, Error)]
pub enum BackendError {
    /// Standard input or output.
    #[error("Using the terminal failed")]
    Tty(#[source] io::Error),
    /// No pseudoterminal.
    #[error("Opening a pseudoterminal failed")]
    Pty(#[source] nix::Error),
    /// The output file.
    #[error("Opening the file {path} failed")]
    File { path: PathBuf, source: io::Error },
    /// The listening socket.
    #[error("Listening on the socket {path} failed")]
    Socket { path: PathBuf, source: io::Error },
    /// Another process listens there, or it is no socket.
    #[error("The socket path {0} is in use")]
    SocketInUse(PathBuf),
    /// Eventfds or threads.
    #[error("Starting the {what} failed")]
    Start { what: String, source: io::Error },
}

/// How long the end of a pty waits for who reads its last words, and between two looks.
const READER_PATIENCE: Duration = Duration::from_millis(100);
const READER_PAUSE: Duration = Duration::from_millis(1);
const READER_LOOKS: u32 = 10;

/// Where input comes from.
#[derive(Debug)]
pub(super) enum Source {
    Stream(File),
    Socket { listener: UnixListener, client: Arc<ClientSlot> },
}

/// Where output goes. No write waits for a reader, except to a regular file.
#[derive(Debug)]
pub(super) enum Sink {
    /// Non-blocking, or a regular file.
    Stream(File),
    /// Standard output that is a socket: its blocking mode is shared with other processes.
    SharedSocket(OwnedFd),
    Client(Arc<ClientSlot>),
}

/// The client of a socket, if there is one: set by the input thread, used by the output thread.
#[derive(Debug, Default)]
pub(super) struct ClientSlot(Mutex<Option<Arc<UnixStream>>>);

impl ClientSlot {
    pub(super) fn set(&self, client: Option<Arc<UnixStream>>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = client;
    }

    pub(super) fn get(&self) -> Option<Arc<UnixStream>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Removes the socket's path, at the end.
#[derive(Debug)]
struct SocketPath(PathBuf);

impl Drop for SocketPath {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            tracing::debug!("The socket {} was not removed: {error}", self.0.display());
        }
    }
}

#[derive(Debug)]
struct Pty {
    slave: OwnedFd,
    _master: File,
    path: PathBuf,
}

/// An open host side. The fields that are not taken are undone when it is dropped.
#[derive(Debug, Default)]
pub(super) struct Backend {
    /// Standard input may be a terminal, with a size.
    pub(super) is_tty: bool,
    pub(super) source: Option<Source>,
    pub(super) sink: Option<Sink>,
    /// Kept open: the slave so that the pty never hangs up when a reader leaves, the master so that
    /// the end of the threads does not hang it up.
    pty: Option<Pty>,
    _raw_mode: Option<RawMode>,
    _socket_path: Option<SocketPath>,
}

impl Backend {
    pub(super) fn open(mode: &PortMode) -> Result<Self, BackendError> {
        match mode {
            PortMode::Null => Ok(Self::default()),
            PortMode::Tty => open_tty().map_err(BackendError::Tty),
            PortMode::Pty => open_pty().map_err(BackendError::Pty),
            PortMode::File(path) => {
                let file = open_file(path)
                    .map_err(|source| BackendError::File { path: path.clone(), source })?;
                Ok(Self { sink: Some(Sink::Stream(file)), ..Self::default() })
            }
            PortMode::Socket(path) => open_socket(path),
        }
    }

    /// A pty's end takes what nobody has read yet with it: gives a reader a moment for the last
    /// words. No event tells that they were read, and a look may come before the kernel's worker has
    /// brought them to the other side: so several looks must find nothing.
    pub(super) fn wait_for_reader(&self) {
        let Some(Pty { slave, .. }) = &self.pty else { return };
        let since = Instant::now();
        let unread = || {
            let mut fds = [PollFd::new(slave.as_fd(), PollFlags::POLLIN)];
            matches!(poll(&mut fds, PollTimeout::ZERO), Ok(ready) if ready > 0)
        };
        let mut looks = READER_LOOKS;
        while looks > 0 && since.elapsed() < READER_PATIENCE {
            looks = if unread() { READER_LOOKS } else { looks - 1 };
            std::thread::sleep(READER_PAUSE);
        }
    }

    pub(super) fn pty_path(&self) -> Option<&Path> {
        self.pty.as_ref().map(|pty| pty.path.as_path())
    }
}

/// A regular file, which every write waits for the disk at most; or a FIFO, a terminal, which
/// may have no reader: neither opening nor writing it waits for one.
fn open_file(path: &Path) -> io::Result<File> {
    let is_fifo = fs::metadata(path).is_ok_and(|found| found.file_type().is_fifo());
    OpenOptions::new()
        .create(!is_fifo)
        .append(true)
        // A FIFO that is open for writing alone needs a reader first.
        .read(is_fifo)
        .custom_flags((OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits())
        .open(path)
}

fn open_tty() -> io::Result<Backend> {
    let stdin = io::stdin();
    // Reading a terminal from the background would stop this process.
    let source = if isatty(&stdin).unwrap_or(false) && !is_foreground(&stdin) {
        None
    } else {
        Some(Source::Stream(File::from(stdin.as_fd().try_clone_to_owned()?)))
    };
    let sink = stdout_sink(io::stdout().as_fd())?;
    let raw_mode = RawMode::enter().map_err(io::Error::from)?;
    let sink = Some(sink);
    Ok(Backend { is_tty: true, source, sink, _raw_mode: raw_mode, ..Backend::default() })
}

/// Standard output is shared with the shell and others, so O_NONBLOCK must not be set on it: a
/// terminal or pipe is opened anew. A file must not be, since its position would be lost.
fn stdout_sink(stdout: BorrowedFd<'_>) -> io::Result<Sink> {
    let kind = SFlag::from_bits_truncate(fstat(stdout)?.st_mode) & SFlag::S_IFMT;
    if kind == SFlag::S_IFSOCK {
        return Ok(Sink::SharedSocket(stdout.try_clone_to_owned()?));
    }
    if kind == SFlag::S_IFIFO || kind == SFlag::S_IFCHR {
        let anew = OpenOptions::new()
            .write(true)
            .custom_flags((OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits())
            .open(format!("/proc/self/fd/{}", stdout.as_raw_fd()));
        match anew {
            Ok(file) => return Ok(Sink::Stream(file)),
            Err(error) => tracing::debug!("Standard output stays blocking: {error}"),
        }
    }
    Ok(Sink::Stream(File::from(stdout.try_clone_to_owned()?)))
}

fn open_pty() -> Result<Backend, nix::Error> {
    let pty = openpty(None, None)?;
    let mut settings = tcgetattr(&pty.slave)?;
    cfmakeraw(&mut settings);
    tcsetattr(&pty.slave, SetArg::TCSANOW, &settings)?;
    for fd in [&pty.master, &pty.slave] {
        fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    }
    fcntl(&pty.master, FcntlArg::F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK))?;
    let path = ttyname(&pty.slave)?;
    let sink = File::from(pty.master);
    let again = || {
        let copy = sink.try_clone();
        copy.map_err(|error| nix::Error::from_raw(error.raw_os_error().unwrap_or(libc::EMFILE)))
    };
    let (source, master) = (again()?, again()?);
    Ok(Backend {
        source: Some(Source::Stream(source)),
        sink: Some(Sink::Stream(sink)),
        pty: Some(Pty { slave: pty.slave, _master: master, path }),
        ..Backend::default()
    })
}

fn open_socket(path: &Path) -> Result<Backend, BackendError> {
    let failed = |source| BackendError::Socket { path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
        Ok(found) => {
            // A socket that refuses was left behind by a process that is gone.
            if !found.file_type().is_socket() || !is_stale(path) {
                return Err(BackendError::SocketInUse(path.to_owned()));
            }
            fs::remove_file(path).map_err(failed)?;
        }
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    let socket_path = SocketPath(path.to_owned());
    listener.set_nonblocking(true).map_err(failed)?;
    let client = Arc::<ClientSlot>::default();
    Ok(Backend {
        source: Some(Source::Socket { listener, client: Arc::clone(&client) }),
        sink: Some(Sink::Client(client)),
        _socket_path: Some(socket_path),
        ..Backend::default()
    })
}

fn is_stale(path: &Path) -> bool {
    matches!(UnixStream::connect(path),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused)
}

/// Sends what fits now, whatever the socket's blocking mode, and never raises SIGPIPE.
pub(super) fn send_now(socket: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    Ok(send(socket.as_raw_fd(), bytes, flags)?)
}
