//! How bytes reach the peer, behind one small trait.
//!
//! Enters: an endpoint. Leaves: [`Stream`]s. Always holds: closing a stream from any thread wakes
//! whoever is blocked reading or writing it, so nobody needs to poll.

pub mod memory;
pub(crate) mod rdma;
mod tcp;
mod timed;
pub mod tls;
mod unix;

use std::io::{self, IoSlice, PipeReader, PipeWriter, Read, Write};
use std::net::{IpAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use thiserror::Error;
use vm_memory::{Bytes, ReadVolatile, VolatileMemoryError};

use crate::ids::{PAGE_SIZE, PageIndex};
use crate::log::Log;
use crate::ram::Slice;

pub use api::endpoint::Endpoint as Address;
pub(crate) use timed::Timed;

/// First pause of a listener while nobody can be accepted; doubles up to the last.
const PAUSE_MS_FIRST: u16 = 20;
const PAUSE_MS_LAST: u16 = 2000;

/// Why a connection could not be made or accepted.
#[derive(Debug, Error)]
pub enum TransportError {
    #[error("Cannot resolve '{0}'")]
    Resolve(String, #[source] io::Error),
    #[error("Cannot connect to '{0}'")]
    Connect(String, #[source] io::Error),
    #[error("Cannot listen on '{0}'")]
    Listen(String, #[source] io::Error),
    #[error("'{0}' is in use by another process: end that one, or listen on another path")]
    InUse(String),
    #[error("'{0}' exists and is no socket: remove it, or listen on another path")]
    NotSocket(PathBuf),
    #[error("Cannot remove the stale socket '{0}'")]
    RemoveStale(String, #[source] io::Error),
    #[error("Cannot accept a connection on '{0}'")]
    Accept(String, #[source] io::Error),
    #[error("No TLS connection with '{0}'")]
    Tls(String, #[source] tls::HandshakeError),
    #[error("Cannot set up a connection")]
    Setup(#[source] io::Error),
    #[error("This host cannot do RDMA")]
    Rdma(#[source] ::rdma::Error),
    #[error("The RDMA device did not answer within {patience_ms} ms")]
    Hung { patience_ms: u64 },
    #[error(
        "{threads} threads still wait for an RDMA device that does not answer: it has to be reset, or this \
         process started anew"
    )]
    Stuck { threads: usize },
}

/// Whether a time-out of the stream's own ended a call.
pub(crate) fn is_late(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// How fast a stream's bytes arrived of late, as the host knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// Bytes that were acknowledged in a second.
    pub bytes_per_s: u64,
    /// There was not always something to send: the link may carry more.
    pub is_least: bool,
}

/// Bytes to write, and the page of guest memory that has the same ones, if it is to be read there.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    pub bytes: &'a [u8],
    /// All of it: `bytes` has as many as a page.
    pub page: Option<PageIndex>,
}

impl<'a> From<&'a [u8]> for Part<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self { bytes, page: None }
    }
}

/// What is kept until nobody reads guest memory any more; its end, by dropping it, says so.
pub type Lease = Box<dyn Send + Sync>;

/// A reliable byte stream in both directions.
pub trait Stream: Read + Write + Send {
    /// Whether [`Stream::gather`] reads pages in guest memory, if they are there to be read.
    fn gathers(&self) -> bool {
        false
    }

    /// Waits until frames of so many bytes in so many parts go out without waiting for the peer, so that
    /// pages may be lent for them: somebody may wait to write one. `false`: the link would take so long for them that
    /// they are better copied.
    ///
    /// # Errors
    /// As [`Write::write`].
    fn may_lend(&mut self, bytes: usize, parts: usize) -> io::Result<bool> {
        let _ = (bytes, parts);
        Ok(true)
    }

    /// Writes all of `parts`. What is read in guest memory must not change before `leases` have ended,
    /// which may be long after this returns: when nothing of it is sent again any more.
    /// [`Write::flush`] waits for that.
    ///
    /// # Errors
    /// As [`Write::write`]. Then the leases end with the stream, at the latest.
    fn gather(&mut self, parts: &[Part<'_>], leases: Vec<Lease>) -> io::Result<()> {
        write_all_parts(self, parts)?;
        drop(leases);
        Ok(())
    }

    /// Writes runs of pages, each its first and their number, from guest memory as it is straight into the
    /// peer's: of a page that is written meanwhile any mixture may arrive. Returns before they are read;
    /// [`Write::flush`] waits until none of them is read any more. What is written to the stream after that
    /// arrives after them.
    ///
    /// # Errors
    /// As [`Write::write`]; [`io::ErrorKind::Unsupported`] if it has no way there.
    fn place(&mut self, window: &rdma::Window, runs: &[(PageIndex, u64)]) -> io::Result<()> {
        let _ = (window, runs);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Reads some bytes into a guest's memory, as [`Read::read`] does into a buffer; without a copy in
    /// between, where a system call can do it.
    ///
    /// # Errors
    /// As [`Read::read`].
    fn read_memory(&mut self, into: &Slice<'_>) -> io::Result<usize> {
        let mut page = [0; PAGE_SIZE];
        let count = self.read(&mut page[..into.len().min(PAGE_SIZE)])?;
        into.write_slice(&page[..count], 0).map_err(io::Error::other)?;
        Ok(count)
    }

    /// As [`Read::read`], of what has come already: fails with [`io::ErrorKind::WouldBlock`] rather than wait.
    ///
    /// # Errors
    /// As [`Read::read`].
    fn read_arrived(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.read(into)
    }

    /// Whether something can be read that [`Stream::readiness`] does not show: it was taken from the
    /// descriptor with what came before it.
    fn has_read_ahead(&self) -> bool {
        false
    }

    /// A second handle to the same stream.
    ///
    /// # Errors
    /// If the process has no descriptor left.
    fn duplicate(&self) -> io::Result<Box<dyn Stream>>;

    /// Ends both directions; blocked readers and writers of all handles return.
    fn close(&self);

    /// Ends the sending direction after what was written; the peer reads an end of file.
    fn finish(&self);

    /// A blocked read fails after this time; `None` waits as long as it takes.
    ///
    /// # Errors
    /// If the stream is broken.
    fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()>;

    /// A blocked write fails after this time; `None` waits as long as it takes.
    ///
    /// # Errors
    /// If the stream is broken.
    fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()>;

    /// What the link carried, where writing does not tell because what is written waits in a large
    /// buffer. `None` if nothing is known, or a write tells it.
    fn delivery(&self) -> Option<Delivery> {
        None
    }

    /// This host's address, of a stream between hosts.
    fn local_address(&self) -> Option<IpAddr> {
        None
    }

    /// What becomes readable with the stream, where that is a descriptor.
    fn readiness(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// An unreachable peer ends the stream after some multiples of `interval`, at least a second,
    /// although nothing is sent.
    ///
    /// # Errors
    /// If the stream is broken.
    fn keep_alive(&self, interval: Duration) -> io::Result<()> {
        // A stream within one host ends with its peer.
        let _ = interval;
        Ok(())
    }
}

/// Writes all of `slices`.
pub(crate) fn write_all_vectored<W: Write + ?Sized>(
    stream: &mut W,
    mut slices: &mut [IoSlice<'_>],
) -> io::Result<()> {
    while !slices.is_empty() {
        match stream.write_vectored(slices) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut slices, written),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Writes the bytes of all of `parts`.
pub(crate) fn write_all_parts<W: Write + ?Sized>(
    stream: &mut W,
    parts: &[Part<'_>],
) -> io::Result<()> {
    let filled = parts.iter().filter(|part| !part.bytes.is_empty());
    let mut slices: Vec<_> = filled.map(|part| IoSlice::new(part.bytes)).collect();
    write_all_vectored(stream, &mut slices)
}

/// [`Stream::read_memory`] of a socket.
fn read_socket(mut socket: impl ReadVolatile, into: &Slice<'_>) -> io::Result<usize> {
    let mut into = *into;
    socket.read_volatile(&mut into).map_err(|error| match error {
        VolatileMemoryError::IOError(error) => error,
        error => io::Error::other(error),
    })
}

/// Somebody who connected, of whom nothing was read yet.
pub(crate) enum Incoming {
    Tcp(TcpStream),
    /// Within this host, where TLS has no place.
    Local(Box<dyn Stream>),
}

impl Incoming {
    /// The stream, once the peer has shown its certificate where that is asked for; it may take `patience`
    /// for that.
    ///
    /// # Errors
    /// [`tls::HandshakeError`].
    pub(crate) fn admit(
        self,
        tls: Option<&tls::Server>,
        patience: Duration,
    ) -> Result<Box<dyn Stream>, tls::HandshakeError> {
        match (self, tls) {
            (Self::Tcp(stream), Some(tls)) => {
                let stream = tls.admit(stream, tls::Deadline::after(patience))?;
                Ok(Box::new(stream))
            }
            (Self::Tcp(stream), None) => Ok(Box::new(stream)),
            (Self::Local(stream), _) => Ok(stream),
        }
    }
}

/// Who was accepted, and the name of the peer.
pub(crate) type Accepted = (Incoming, String);

/// An accepting side.
pub(crate) trait Accept: Send {
    fn accept(&self) -> io::Result<Accepted>;
    fn fd(&self) -> std::os::fd::BorrowedFd<'_>;
}

/// Accepts streams until it is woken.
pub struct Listener {
    inner: Box<dyn Accept>,
    address: Address,
    wake: PipeReader,
    /// Why nobody is accepted for a while.
    log: Log,
}

/// Ends [`Listener::accept`] from another thread, when it is dropped.
#[derive(Debug)]
pub struct ListenerWaker {
    _end: PipeWriter,
}

impl Listener {
    /// Listens on `address`; port 0 picks a free one. The socket that a process left at a path when it died
    /// is replaced.
    ///
    /// # Errors
    /// [`TransportError::Listen`], [`TransportError::Resolve`]; of a path [`TransportError::InUse`],
    /// [`TransportError::NotSocket`], [`TransportError::RemoveStale`].
    pub fn bind(address: &Address) -> Result<(Self, ListenerWaker), TransportError> {
        let (wake, end) = io::pipe().map_err(TransportError::Setup)?;
        let (inner, address) = match address {
            Address::Tcp { host, port } => tcp::listen(host, *port)?,
            Address::Unix(path) => unix::listen(path)?,
            Address::Rdma { host, port } => {
                let (inner, address) = tcp::listen(host, *port)?;
                let Address::Tcp { host, port } = address else { unreachable!("of TCP") };
                (inner, Address::Rdma { host, port })
            }
        };
        let log = Log::default();
        Ok((Self { inner, address, wake, log }, ListenerWaker { _end: end }))
    }

    /// Where this listens, with the port that was picked.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Waits for the next peer and its name; `None` once the waker is gone. While the host lacks descriptors,
    /// memory or its network, nobody is accepted, and it is tried again.
    ///
    /// # Errors
    /// [`TransportError::Accept`].
    pub(crate) fn accept(&mut self) -> Result<Option<Accepted>, TransportError> {
        let name = self.address.to_string();
        let failed = |error| TransportError::Accept(name.clone(), error);
        let mut pause_ms = PAUSE_MS_FIRST;
        loop {
            let mut fds = [
                PollFd::new(self.inner.fd(), PollFlags::POLLIN),
                PollFd::new(self.wake.as_fd(), PollFlags::POLLIN | PollFlags::POLLHUP),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) => {}
                Err(nix::Error::EINTR) => continue,
                Err(error) => return Err(failed(error.into())),
            }
            if fds[1].any().unwrap_or(true) {
                return Ok(None);
            }
            match self.inner.accept() {
                Ok(accepted) => return Ok(Some(accepted)),
                Err(error) if is_of_connection(&error) => {}
                Err(error) if is_of_listener(&error) => return Err(failed(error)),
                Err(error) => {
                    if self.log.is_news(&error.to_string(), Instant::now()) {
                        tracing::warn!("nobody is accepted on {name} for a moment: {error}");
                    }
                    self.pause(pause_ms).map_err(failed)?;
                    pause_ms = (pause_ms * 2).min(PAUSE_MS_LAST);
                }
            }
        }
    }
}

impl Listener {
    /// Lets time pass, or the waker go.
    fn pause(&self, ms: u16) -> io::Result<()> {
        let mut wake = [PollFd::new(self.wake.as_fd(), PollFlags::POLLIN | PollFlags::POLLHUP)];
        match poll(&mut wake, PollTimeout::from(ms)) {
            Ok(_) | Err(nix::Error::EINTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Errors of accept(2) after which nobody can be accepted by this descriptor any more. All others pass: those of the
/// network, which it passes on from the new connection, and of what the host lacks or does not allow.
fn is_of_listener(error: &io::Error) -> bool {
    let of_listener = [libc::EBADF, libc::EINVAL, libc::ENOTSOCK];
    error.raw_os_error().is_some_and(|code| of_listener.contains(&code))
}

/// Errors of accept that concern one connection, and need no rest.
fn is_of_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, WouldBlock};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted | WouldBlock)
}

/// The transport's name, as [`api::replication::ReplicationInfo`] shows it.
#[must_use]
pub(crate) fn name(address: &Address, has_tls: bool) -> &'static str {
    match (address, has_tls) {
        (Address::Tcp { .. }, false) => "tcp",
        (Address::Tcp { .. }, true) => "tcp+tls",
        (Address::Unix(_), _) => "unix",
        (Address::Rdma { .. }, false) => "rdma",
        (Address::Rdma { .. }, true) => "rdma+tls",
    }
}

/// Where a backup listens, and how the two know each other.
#[derive(Clone, Debug)]
pub(crate) struct Destination {
    pub(crate) address: Address,
    pub(crate) tls: Option<tls::Client>,
}

impl Destination {
    /// Connects, within `timeout` for each address of the host and as long again for TLS.
    ///
    /// # Errors
    /// [`TransportError::Connect`], [`TransportError::Resolve`], [`TransportError::Tls`].
    pub(crate) fn connect(&self, timeout: Duration) -> Result<Box<dyn Stream>, TransportError> {
        let (host, port) = match &self.address {
            // What is not data goes by TCP.
            Address::Tcp { host, port } | Address::Rdma { host, port } => (host, *port),
            Address::Unix(path) => return unix::connect(path),
        };
        let socket = tcp::connect(host, port, timeout)?;
        let Some(tls) = &self.tls else { return Ok(Box::new(socket)) };
        let stream = tls.greet(socket, tls::Deadline::after(timeout));
        let stream =
            stream.map_err(|error| TransportError::Tls(self.address.to_string(), error))?;
        Ok(Box::new(stream))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use vm_memory::{GuestAddress, GuestMemoryBackend};

    use super::*;
    use crate::testing::Plain;

    /// Readable at once, and accepts somebody after these errors.
    struct Scarce(PipeReader, AtomicUsize, &'static [i32]);

    impl Accept for Scarce {
        fn accept(&self) -> io::Result<Accepted> {
            match self.2.get(self.1.fetch_add(1, Ordering::AcqRel)) {
                Some(code) => Err(io::Error::from_raw_os_error(*code)),
                None => Ok((Incoming::Local(memory::pair()?.0), "somebody".to_owned())),
            }
        }

        fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
            self.0.as_fd()
        }
    }

    fn scarce(errors: &'static [i32]) -> (Listener, ListenerWaker, PipeWriter) {
        let (ready, mut write) = io::pipe().unwrap();
        write.write_all(b"x").unwrap();
        let (wake, end) = io::pipe().unwrap();
        let inner = Box::new(Scarce(ready, AtomicUsize::new(0), errors));
        let address = Address::Tcp { host: "localhost".to_owned(), port: 1 };
        (Listener { inner, address, wake, log: Log::default() }, ListenerWaker { _end: end }, write)
    }

    #[test]
    fn a_lack_of_descriptors_passes() {
        let (mut listener, _waker, _write) = scarce(&[libc::EMFILE, libc::ENOMEM]);
        let (_, peer) = listener.accept().unwrap().unwrap();
        assert_eq!(peer, "somebody");
        // Of a host at its limit that now and then has one: it is told once, and not with each that comes.
        let again = io::Error::from_raw_os_error(libc::EMFILE).to_string();
        assert!(!listener.log.is_news(&again, Instant::now()));
    }

    /// What accept(2) passes on from the network, and what a filter of packets makes of it.
    #[test]
    fn a_network_that_is_down_passes_and_is_not_asked_without_rest() {
        const ERRORS: [i32; 4] = [libc::EPROTO, libc::ENETDOWN, libc::EHOSTUNREACH, libc::EPERM];
        let (mut listener, _waker, _write) = scarce(&ERRORS);
        let since = Instant::now();
        let (_, peer) = listener.accept().unwrap().unwrap();
        assert_eq!(peer, "somebody");
        let rest_ms: u16 = (0..4).map(|turn| PAUSE_MS_FIRST << turn).sum();
        assert!(since.elapsed() >= Duration::from_millis(rest_ms.into()));
    }

    #[test]
    fn a_descriptor_that_is_no_listener_is_the_end() {
        let errors: [&[i32]; 3] = [&[libc::EBADF], &[libc::EINVAL], &[libc::ENOTSOCK]];
        for errors in errors {
            let (mut listener, _waker, _write) = scarce(errors);
            let error = listener.accept().err().unwrap();
            assert!(matches!(error, TransportError::Accept(..)), "{error:?}");
        }
    }

    #[test]
    fn a_listener_that_lacks_descriptors_can_be_woken() {
        let (mut listener, waker, _write) = scarce(&[libc::EMFILE, libc::ENOMEM]);
        drop(waker);
        assert!(listener.accept().unwrap().is_none());
    }

    /// A socket, which the kernel reads from, and a stream that knows only buffers.
    #[test]
    fn any_stream_is_read_into_memory() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let tcp = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let peer = listener.accept().unwrap().0;
        let (plain, other) = memory::pair().unwrap();
        let streams: [(Box<dyn Stream>, Box<dyn Stream>); 3] = [
            (Box::new(tcp), Box::new(peer)),
            memory::pair().unwrap(),
            (Box::new(Plain::new(plain)), other),
        ];
        for (number, (mut from, mut to)) in (1u8..).zip(streams) {
            let ram = crate::testing::memory(&[(0, 3)]);
            let room = ram.mapping().get_slice(GuestAddress(10), 2 * PAGE_SIZE).unwrap();
            to.write_all(&[number; 3 * PAGE_SIZE]).unwrap();
            let mut done = 0;
            while done < room.len() {
                done += from.read_memory(&room.offset(done).unwrap()).unwrap();
            }
            let mut bytes = vec![0; 3 * PAGE_SIZE];
            ram.mapping().read_slice(&mut bytes, GuestAddress(0)).unwrap();
            let expected = |at| if (10..10 + 2 * PAGE_SIZE).contains(&at) { number } else { 0 };
            assert!(bytes.iter().enumerate().all(|(at, byte)| *byte == expected(at)));
            assert!(ram.written() > 0, "the VMM wrote it");
            to.close();
            drop(to);
            let mut rest = Vec::new();
            from.read_to_end(&mut rest).unwrap();
            assert_eq!(rest, [number; PAGE_SIZE]);
            assert_eq!(from.read_memory(&room).unwrap(), 0, "the end");
        }
    }
}
