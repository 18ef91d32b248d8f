//! A stream through TLS, by several handles on several threads.
//!
//! ```text
//!   reader   [incoming: socket -> ciphertext]   [session: decrypt]   -> the caller's memory
//!   writer   [outgoing: [session: encrypt] -> ciphertext -> socket]
//! ```
//!
//! Enters: plaintext, and ciphertext from the socket. Leaves: the same the other way. There are three locks,
//! and nobody is held up by them who would not wait for the socket anyway:
//!
//! - `session`, TLS's state: held for at most [`PIECE_BYTES`] of encryption, or a record of decryption into
//!   the reader's memory. Whoever has it waits for no other lock and no socket.
//! - `incoming`: of whoever reads, also while the socket has nothing. Beside it that thread takes `session`,
//!   and `outgoing` only where nobody has it ([`Shared::flush`]): a reader never waits for a writer.
//! - `outgoing`: of whoever writes, also while the socket takes nothing. Beside it that thread takes
//!   `session`: a writer never waits for a reader.
//!
//! So no two threads wait for each other, and two peers that both write and both read never do: each
//! reader goes on reading. What TLS has to say by itself (an alert, the answer to a change of keys) comes up
//! while reading. The reader sends as much of it as the socket takes at once. Where a writer is at it, that one
//! looks again after it has let go of `outgoing`; what the socket did not take goes ahead of the next write, as
//! RFC 8446, 4.6.3 demands of an answer.
//!
//! Always holds: no more is buffered than a piece in each direction; the end of the TCP connection
//! without TLS's own farewell (6.1) is an error, so nobody on the path can pass a cut for an end.

use std::io::{self, BufRead, ErrorKind, IoSlice, Read, Write};
use std::net::{IpAddr, Shutdown, TcpStream};
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, TryLockError};
use std::time::Duration;

use nix::sys::socket::{MsgFlags, recv, send};
use rustls::{Connection, Reader};
use vm_memory::Bytes;

use super::lock;
use crate::ram::Slice;
use crate::transport::{Delivery, Stream};

/// Most bytes that are encrypted, and then sent, at once: records of 16 KiB by the dozen, since a system call
/// for each would cost a part of what encrypting it does.
pub(super) const PIECE_BYTES: usize = 256 << 10;
/// Most bytes of ciphertext that are read ahead.
const AHEAD_BYTES: usize = 128 << 10;

/// Ciphertext that came and was not decrypted yet.
pub(super) struct Incoming {
    buffer: Box<[u8]>,
    unread: Range<usize>,
}

impl Incoming {
    pub(super) fn new() -> Self {
        Self { buffer: vec![0; AHEAD_BYTES].into_boxed_slice(), unread: 0..0 }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.unread.is_empty()
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.buffer[self.unread.clone()]
    }

    /// Reads more; only once nothing is left.
    pub(super) fn fill(
        &mut self,
        read: impl FnOnce(&mut [u8]) -> io::Result<usize>,
    ) -> io::Result<usize> {
        assert!(self.is_empty(), "what is unread would be overwritten");
        let count = read(&mut self.buffer)?;
        self.unread = 0..count;
        Ok(count)
    }

    /// Gives the session some of it; `false` if there is nothing, or nothing counts after a farewell.
    pub(super) fn feed(&mut self, session: &mut Connection) -> Result<bool, rustls::Error> {
        let mut bytes = self.bytes();
        if bytes.is_empty() {
            return Ok(false);
        }
        let taken = session.read_tls(&mut bytes);
        // It refuses more only while plaintext waits for a reader, who takes that first.
        let taken = taken.map_err(|error| rustls::Error::General(error.to_string()))?;
        if taken == 0 {
            self.unread = 0..0;
            return Ok(false);
        }
        self.unread.start += taken;
        session.process_new_packets()?;
        Ok(true)
    }
}

/// Ciphertext that leaves.
#[derive(Default)]
struct Outgoing {
    bytes: Vec<u8>,
    /// Of them, how many the socket has.
    sent: usize,
    /// Nothing can follow: the farewell was said, or a record was torn.
    is_over: bool,
}

/// What a call does where the socket is not ready.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wait {
    AsLongAsItTakes,
    Never,
}

struct Shared {
    socket: TcpStream,
    session: Mutex<Connection>,
    incoming: Mutex<Incoming>,
    outgoing: Mutex<Outgoing>,
    /// This side has closed it.
    is_closed: AtomicBool,
}

fn failed(error: &rustls::Error) -> io::Error {
    // Whoever could make a record fail its check could have cut the connection as well: it is lost, and
    // that says nothing about what the peer sent.
    io::Error::new(ErrorKind::ConnectionAborted, format!("TLS failed: {error}"))
}

/// TCP's end without TLS's.
fn cut_off() -> io::Error {
    let what = "The connection was cut off: it ended without TLS's farewell";
    io::Error::new(ErrorKind::UnexpectedEof, what)
}

fn over() -> io::Error {
    io::Error::new(ErrorKind::BrokenPipe, "Nothing can be sent any more")
}

impl Shared {
    /// Lets `take` have the plaintext that comes next.
    fn read(
        &self,
        wait: Wait,
        mut take: impl FnMut(&mut Reader<'_>) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let mut incoming = lock(&self.incoming);
        loop {
            if let Some(count) = self.decrypt(&mut incoming, &mut take)? {
                return Ok(count);
            }
            let came = incoming.fill(|into| match wait {
                Wait::AsLongAsItTakes => (&self.socket).read(into),
                Wait::Never => {
                    let now = MsgFlags::MSG_DONTWAIT;
                    recv(self.socket.as_raw_fd(), into, now).map_err(io::Error::from)
                }
            })?;
            if came == 0 {
                let is_closed = self.is_closed.load(Ordering::Acquire);
                return if is_closed { Ok(0) } else { Err(cut_off()) };
            }
        }
    }

    /// What `take` made of the plaintext; `None` if there is none, and no ciphertext left.
    fn decrypt(
        &self,
        incoming: &mut Incoming,
        take: &mut impl FnMut(&mut Reader<'_>) -> io::Result<usize>,
    ) -> io::Result<Option<usize>> {
        let mut session = lock(&self.session);
        let done = loop {
            match take(&mut session.reader()) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                taken => break taken.map(Some),
            }
            match incoming.feed(&mut session) {
                Ok(true) => {}
                Ok(false) => break Ok(None),
                Err(error) => break Err(failed(&error)),
            }
        };
        let has_to_say = session.wants_write();
        drop(session);
        if has_to_say {
            self.flush();
        }
        done
    }

    /// Encrypts some of `slices` and sends it.
    fn write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        if slices.iter().all(|slice| slice.is_empty()) {
            return Ok(0);
        }
        let mut outgoing = lock(&self.outgoing);
        if outgoing.is_over {
            return Err(over());
        }
        let count = {
            let mut session = lock(&self.session);
            let count = session.writer().write_vectored(slices)?;
            take_ciphertext(&mut session, &mut outgoing)?;
            count
        };
        if let Err(error) = self.send(&mut outgoing, Wait::AsLongAsItTakes) {
            // The caller takes nothing of it for written, and the peer may have half a record.
            outgoing.is_over = true;
            return Err(error);
        }
        drop(outgoing);
        // A reader that found `outgoing` taken has left something behind, or will not any more.
        if lock(&self.session).wants_write() {
            self.flush();
        }
        Ok(count)
    }

    /// Sends what TLS has to say by itself, without waiting for anybody. Where somebody else sends,
    /// that one calls this after it.
    fn flush(&self) {
        loop {
            let mut outgoing = match self.outgoing.try_lock() {
                Ok(outgoing) => outgoing,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return,
            };
            if outgoing.is_over || take_ciphertext(&mut lock(&self.session), &mut outgoing).is_err()
            {
                return;
            }
            match self.send(&mut outgoing, Wait::Never) {
                Ok(()) => {}
                // It goes ahead of the next write.
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => {
                    outgoing.is_over = true;
                    return;
                }
            }
            drop(outgoing);
            if !lock(&self.session).wants_write() {
                return;
            }
        }
    }

    /// Sends all ciphertext.
    fn send(&self, outgoing: &mut Outgoing, wait: Wait) -> io::Result<()> {
        while outgoing.sent < outgoing.bytes.len() {
            let rest = &outgoing.bytes[outgoing.sent..];
            let sent = match wait {
                Wait::AsLongAsItTakes => (&self.socket).write(rest),
                Wait::Never => {
                    let now = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                    send(self.socket.as_raw_fd(), rest, now).map_err(io::Error::from)
                }
            };
            match sent {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => outgoing.sent += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        outgoing.bytes.clear();
        outgoing.sent = 0;
        Ok(())
    }

    /// Says TLS's farewell, after what was written.
    fn say_farewell(&self, outgoing: &mut Outgoing, wait: Wait) {
        if outgoing.is_over {
            return;
        }
        outgoing.is_over = true;
        let mut session = lock(&self.session);
        session.send_close_notify();
        let taken = take_ciphertext(&mut session, outgoing);
        drop(session);
        // A peer that takes no more learns of a cut instead.
        let _ = taken.and_then(|()| self.send(outgoing, wait));
    }
}

impl Drop for Shared {
    /// The last handle has gone: an end that this side means, if it did not say so before.
    fn drop(&mut self) {
        let mut outgoing = std::mem::take(&mut *lock(&self.outgoing));
        self.say_farewell(&mut outgoing, Wait::Never);
    }
}

/// All that a session has to send.
fn take_ciphertext(session: &mut Connection, outgoing: &mut Outgoing) -> io::Result<()> {
    while session.wants_write() {
        session.write_tls(&mut outgoing.bytes)?;
    }
    Ok(())
}

/// One handle of a stream.
pub(crate) struct TlsStream(Arc<Shared>);

impl TlsStream {
    pub(super) fn new(socket: TcpStream, session: Connection, incoming: Incoming) -> Self {
        Self(Arc::new(Shared {
            socket,
            session: Mutex::new(session),
            incoming: Mutex::new(incoming),
            outgoing: Mutex::default(),
            is_closed: AtomicBool::new(false),
        }))
    }
}

#[cfg(test)]
impl TlsStream {
    /// A second handle, as what it is.
    pub(super) fn another(&self) -> Self {
        Self(Arc::clone(&self.0))
    }

    /// Changes the keys of what this side sends, and asks the peer for the same.
    pub(super) fn change_keys(&self) {
        lock(&self.0.session).refresh_traffic_keys().unwrap();
        self.0.flush();
    }

    /// Ciphertext that the socket did not take.
    pub(super) fn held_bytes(&self) -> usize {
        lock(&self.0.outgoing).bytes.len()
    }
}

impl Read for TlsStream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if into.is_empty() {
            return Ok(0);
        }
        self.0.read(Wait::AsLongAsItTakes, |reader| reader.read(into))
    }
}

impl Write for TlsStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.write(slices)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for TlsStream {
    fn read_memory(&mut self, into: &Slice<'_>) -> io::Result<usize> {
        if into.is_empty() {
            return Ok(0);
        }
        self.0.read(Wait::AsLongAsItTakes, |reader| {
            let bytes = reader.fill_buf()?;
            let count = bytes.len().min(into.len());
            into.write_slice(&bytes[..count], 0).map_err(io::Error::other)?;
            reader.consume(count);
            Ok(count)
        })
    }

    fn read_arrived(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if into.is_empty() {
            return Ok(0);
        }
        self.0.read(Wait::Never, |reader| reader.read(into))
    }

    fn has_read_ahead(&self) -> bool {
        // Whoever else reads waits for the socket.
        let Ok(incoming) = self.0.incoming.try_lock() else { return false };
        !incoming.is_empty() || lock(&self.0.session).reader().fill_buf().is_ok()
    }

    fn duplicate(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(Self(Arc::clone(&self.0))))
    }

    /// Waits for nobody: where a thread writes, the peer learns of a cut.
    fn close(&self) {
        self.0.is_closed.store(true, Ordering::Release);
        if let Ok(mut outgoing) = self.0.outgoing.try_lock() {
            self.0.say_farewell(&mut outgoing, Wait::Never);
        }
        // Fails only where there is no connection any more.
        let _ = self.0.socket.shutdown(Shutdown::Both);
    }

    /// Waits for a write that is under way.
    fn finish(&self) {
        self.0.say_farewell(&mut lock(&self.0.outgoing), Wait::AsLongAsItTakes);
        let _ = self.0.socket.shutdown(Shutdown::Write);
    }

    fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.0.socket.set_read_timeout(timeout)
    }

    fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.0.socket.set_write_timeout(timeout)
    }

    /// TCP's: of ciphertext, which has 22 bytes more in each 16 KiB.
    fn delivery(&self) -> Option<Delivery> {
        Stream::delivery(&self.0.socket)
    }

    fn local_address(&self) -> Option<IpAddr> {
        self.0.socket.local_address()
    }

    fn readiness(&self) -> Option<BorrowedFd<'_>> {
        self.0.socket.readiness()
    }

    fn keep_alive(&self, interval: Duration) -> io::Result<()> {
        Stream::keep_alive(&self.0.socket, interval)
    }
}
