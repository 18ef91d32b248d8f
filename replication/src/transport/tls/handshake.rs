//! From a TCP connection to a [`TlsStream`], or to the reason why not.
//!
//! Enters: a connection, and how long the peer may take for all of it. Leaves: a stream whose peer was
//! verified, and knows that it was. Always holds: bytes of a peer go to TLS and nowhere else. The only look
//! at them beside it compares the first ones with those of a frame, for a better reason than TLS has.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use rustls::{ClientConnection, Connection, ServerConnection};

use super::credentials::{Client, Server};
use super::errors::{HandshakeError, Side};
use super::stream::{Incoming, PIECE_BYTES, TlsStream};
use super::{ADMITTED, PROTOCOL};
use crate::transport::is_late;
use crate::wire::MAGIC;

/// How long a peer that is refused may take to hear why.
const FAREWELL: Duration = Duration::from_secs(1);
/// Reads of what such a peer still sends.
const FAREWELL_READS_MAX: u32 = 64;

/// Until when a peer has to have finished.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline {
    at: Instant,
    patience: Duration,
}

impl Deadline {
    /// `patience` from now on.
    pub(crate) fn after(patience: Duration) -> Self {
        Self { at: Instant::now() + patience, patience }
    }

    /// `None` once it is over; a socket takes no time-out of zero.
    fn left(&self) -> Option<Duration> {
        self.at.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    }
}

impl Client {
    /// The primary's end of a connection to a backup.
    ///
    /// # Errors
    /// [`HandshakeError`].
    pub(crate) fn greet(
        &self,
        socket: TcpStream,
        deadline: Deadline,
    ) -> Result<TlsStream, HandshakeError> {
        let peer = Side::Backup;
        let session = ClientConnection::new(self.config.clone(), self.name.clone())
            .map_err(|error| HandshakeError::of(peer, error))?;
        let mut shaking = Shaking::new(socket, session.into(), peer, deadline);
        match shaking.run().and_then(|()| shaking.await_admission()) {
            Ok(()) => shaking.done(),
            Err(error) => Err(shaking.part(error)),
        }
    }
}

impl Server {
    /// The backup's end of a connection of a primary.
    ///
    /// # Errors
    /// [`HandshakeError`].
    pub(crate) fn admit(
        &self,
        socket: TcpStream,
        deadline: Deadline,
    ) -> Result<TlsStream, HandshakeError> {
        let peer = Side::Primary;
        let session = ServerConnection::new(self.config.clone())
            .map_err(|error| HandshakeError::of(peer, error))?;
        let mut shaking = Shaking::new(socket, session.into(), peer, deadline);
        match shaking.run().and_then(|()| shaking.admit()) {
            Ok(()) => shaking.done(),
            Err(error) => Err(shaking.part(error)),
        }
    }
}

/// A handshake under way.
struct Shaking {
    socket: TcpStream,
    session: Connection,
    incoming: Incoming,
    peer: Side,
    deadline: Deadline,
    /// Nothing was read yet.
    is_first: bool,
}

impl Shaking {
    fn new(socket: TcpStream, mut session: Connection, peer: Side, deadline: Deadline) -> Self {
        session.set_buffer_limit(Some(PIECE_BYTES));
        Self { socket, session, incoming: Incoming::new(), peer, deadline, is_first: true }
    }

    /// Both sides' hellos and certificates.
    fn run(&mut self) -> Result<(), HandshakeError> {
        loop {
            self.speak()?;
            if !self.session.is_handshaking() {
                break;
            }
            self.hear()?;
        }
        if self.session.alpn_protocol() == Some(PROTOCOL) {
            Ok(())
        } else {
            Err(HandshakeError::Foreign(self.peer))
        }
    }

    /// Tells a primary whose certificate was verified.
    fn admit(&mut self) -> Result<(), HandshakeError> {
        let word = self.session.writer().write_all(&[ADMITTED]);
        word.map_err(|error| self.failed(error))?;
        self.speak()
    }

    /// Waits for the backup to say that it verified this side.
    fn await_admission(&mut self) -> Result<(), HandshakeError> {
        let mut word = [0];
        loop {
            match self.session.reader().read(&mut word) {
                Ok(1) if word == [ADMITTED] => return Ok(()),
                Ok(1..) => return Err(HandshakeError::Foreign(self.peer)),
                Ok(0) => return Err(HandshakeError::Gone(self.peer)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.hear()?,
                Err(error) => return Err(self.failed(error)),
            }
        }
    }

    /// Sends what TLS has to say.
    fn speak(&mut self) -> Result<(), HandshakeError> {
        while self.session.wants_write() {
            let left = self.deadline.left().ok_or_else(|| self.late())?;
            let sent = self
                .socket
                .set_write_timeout(Some(left))
                .and_then(|()| self.session.write_tls(&mut self.socket));
            match sent {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failed(error)),
            }
        }
        Ok(())
    }

    /// Gives TLS some of what the peer says.
    fn hear(&mut self) -> Result<(), HandshakeError> {
        if self.incoming.is_empty() {
            let left = self.deadline.left().ok_or_else(|| self.late())?;
            let came = self
                .socket
                .set_read_timeout(Some(left))
                .and_then(|()| self.incoming.fill(|into| self.socket.read(into)));
            match came {
                Ok(0) => return Err(HandshakeError::Gone(self.peer)),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => return Ok(()),
                Err(error) => return Err(self.failed(error)),
            }
        }
        let is_plain = self.is_first && is_frame(self.incoming.bytes());
        self.is_first = false;
        let fed = self.incoming.feed(&mut self.session);
        if is_plain {
            return Err(HandshakeError::Plain(self.peer));
        }
        let closed = fed.and_then(|any| {
            let state = self.session.process_new_packets()?;
            Ok(!any || state.peer_has_closed())
        });
        match closed {
            Ok(false) => Ok(()),
            Ok(true) => Err(HandshakeError::Gone(self.peer)),
            Err(error) => Err(HandshakeError::of(self.peer, error)),
        }
    }

    fn late(&self) -> HandshakeError {
        let patience_ms = self.deadline.patience.as_millis();
        HandshakeError::Late { peer: self.peer, patience_ms }
    }

    fn failed(&self, source: io::Error) -> HandshakeError {
        if is_late(&source) { self.late() } else { HandshakeError::Io { peer: self.peer, source } }
    }

    /// Tells the peer, and waits a little for it to hear: bytes left unread would turn the last words into
    /// a reset. Returns the reason.
    fn part(mut self, reason: HandshakeError) -> HandshakeError {
        self.deadline = Deadline::after(FAREWELL);
        let told = self.speak();
        let is_there = self.socket.shutdown(Shutdown::Write).is_ok() && told.is_ok();
        let may_listen = !matches!(reason, HandshakeError::Late { .. } | HandshakeError::Gone(_));
        if is_there && may_listen {
            self.read_away();
        }
        reason
    }

    fn read_away(&mut self) {
        let mut scratch = vec![0; 64 << 10];
        for _ in 0..FAREWELL_READS_MAX {
            let Some(left) = self.deadline.left() else { return };
            let set = self.socket.set_read_timeout(Some(left));
            if !matches!(set.and_then(|()| self.socket.read(&mut scratch)), Ok(1..)) {
                return;
            }
        }
    }

    fn done(self) -> Result<TlsStream, HandshakeError> {
        let Self { socket, session, incoming, peer, .. } = self;
        let unset = socket.set_read_timeout(None).and_then(|()| socket.set_write_timeout(None));
        unset.map_err(|source| HandshakeError::Io { peer, source })?;
        Ok(TlsStream::new(socket, session, incoming))
    }
}

/// Whether bytes are the begin of a frame of a peer that speaks no TLS; no TLS record begins so.
fn is_frame(bytes: &[u8]) -> bool {
    let magic = MAGIC.to_le_bytes();
    let count = bytes.len().min(magic.len());
    count > 0 && bytes[..count] == magic[..count]
}
