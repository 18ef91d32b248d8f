//! Frames: header, checksum, sequence.

use std::io::{ErrorKind, IoSlice, Read, Write};

use super::changes::CHANGE_HEAD_BYTES;
use super::message::{DESCRIPTION_SLACK_BYTES, GRANT_BYTES, SEAL_SLACK_BYTES};
use super::pages::{END_BYTES, PAGES_BYTES_MAX, RAW_PAGES_MAX};
use super::sums::SUMS_BYTES_MAX;
use super::verbs::VERBS_BYTES;
use super::{ABORT_BYTES_MAX, GRANTS_MAX, MAGIC, VERSION, WireError};
use crate::disk::CHANGE_BYTES_MAX;
use crate::guest::{DESCRIPTION_BYTES_MAX, STATE_BYTES_MAX};
use crate::ids::{PAGE_SIZE, PageIndex};
use crate::ram::Slice;
use crate::transport::{Lease, Part, Stream, rdma, write_all_vectored};

/// Bytes of a frame's header.
pub const HEADER_BYTES: usize = 32;

/// The random number of one attempt of a primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionId(pub u64);

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    Hello = 1,
    Offer = 2,
    Welcome = 3,
    Abort = 4,
    Paired = 5,
    Resync = 6,
    ResyncReady = 7,
    Seal = 8,
    Ack = 9,
    Heartbeat = 10,
    Stop = 11,
    StopDone = 12,
    HandedOver = 13,
    Pages = 14,
    End = 15,
    Change = 16,
    Progress = 17,
    Verbs = 18,
    Refuse = 19,
    WindowAsk = 20,
    WindowOpen = 21,
    WindowNone = 22,
    WindowEnd = 23,
    WindowClosed = 24,
    Sums = 25,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        const ALL: [Kind; 25] = [
            Kind::Hello,
            Kind::Offer,
            Kind::Welcome,
            Kind::Abort,
            Kind::Paired,
            Kind::Resync,
            Kind::ResyncReady,
            Kind::Seal,
            Kind::Ack,
            Kind::Heartbeat,
            Kind::Stop,
            Kind::StopDone,
            Kind::HandedOver,
            Kind::Pages,
            Kind::End,
            Kind::Change,
            Kind::Progress,
            Kind::Verbs,
            Kind::Refuse,
            Kind::WindowAsk,
            Kind::WindowOpen,
            Kind::WindowNone,
            Kind::WindowEnd,
            Kind::WindowClosed,
            Kind::Sums,
        ];
        ALL.into_iter().find(|kind| *kind as u8 == byte)
    }

    /// Most bytes of a payload of this kind.
    #[must_use]
    pub fn cap(self) -> usize {
        match self {
            Self::Hello | Self::Welcome => 64,
            Self::Offer => DESCRIPTION_BYTES_MAX + DESCRIPTION_SLACK_BYTES,
            Self::Abort | Self::Refuse => ABORT_BYTES_MAX,
            Self::Paired | Self::Progress => 8,
            Self::HandedOver => 9,
            Self::WindowAsk | Self::WindowEnd | Self::WindowClosed => 8,
            Self::WindowOpen => 16 + GRANTS_MAX * GRANT_BYTES,
            Self::WindowNone => 8 + ABORT_BYTES_MAX,
            Self::Sums => SUMS_BYTES_MAX,
            Self::Resync | Self::ResyncReady | Self::Heartbeat | Self::Stop | Self::StopDone => 0,
            Self::Seal => STATE_BYTES_MAX + SEAL_SLACK_BYTES,
            Self::Ack => 16,
            Self::Pages => PAGES_BYTES_MAX,
            Self::End => END_BYTES,
            Self::Verbs => VERBS_BYTES,
            Self::Change => CHANGE_HEAD_BYTES + CHANGE_BYTES_MAX,
        }
    }
}

/// A frame's header, checked except for its checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub kind: Kind,
    /// Bytes of payload, within the cap of the kind.
    pub length: usize,
    pub session: SessionId,
    pub sequence: u64,
    crc: u32,
}

fn header_bytes(
    kind: Kind,
    length: u32,
    crc: u32,
    session: SessionId,
    sequence: u64,
) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
    bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
    bytes[6] = kind as u8;
    bytes[8..12].copy_from_slice(&length.to_le_bytes());
    bytes[12..16].copy_from_slice(&crc.to_le_bytes());
    bytes[16..24].copy_from_slice(&session.0.to_le_bytes());
    bytes[24..32].copy_from_slice(&sequence.to_le_bytes());
    bytes
}

fn u32_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

impl Header {
    /// Checks everything of a header that can be checked without the payload.
    fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, WireError> {
        let magic = u32_at(bytes, 0);
        if magic != MAGIC {
            return Err(WireError::Magic(magic));
        }
        let theirs = u16::from_le_bytes([bytes[4], bytes[5]]);
        if theirs != VERSION {
            return Err(WireError::Version { theirs });
        }
        let kind = Kind::from_byte(bytes[6]).ok_or(WireError::Kind(bytes[6]))?;
        if bytes[7] != 0 {
            return Err(WireError::Flags(bytes[7]));
        }
        let length = u64::from(u32_at(bytes, 8));
        let cap = kind.cap();
        let fits = usize::try_from(length).ok().filter(|length| *length <= cap);
        let length = fits.ok_or(WireError::Length { kind, length, cap: cap as u64 })?;
        Ok(Self {
            kind,
            length,
            session: SessionId(u64_at(bytes, 16)),
            sequence: u64_at(bytes, 24),
            crc: u32_at(bytes, 12),
        })
    }
}

/// Whether bytes are the begin of a TLS record (RFC 8446, 5.1) of the kinds with which a peer begins: an
/// alert, a handshake.
fn is_tls(bytes: &[u8]) -> bool {
    matches!(bytes, [21 | 22, 3, 0..=4, ..])
}

/// Writes frames to one direction of one connection.
#[derive(Debug)]
pub struct FrameWriter<W> {
    inner: W,
    session: SessionId,
    sequence: u64,
    bytes: u64,
}

impl<W: Write> FrameWriter<W> {
    pub fn new(inner: W, session: SessionId) -> Self {
        Self { inner, session, sequence: 0, bytes: 0 }
    }

    /// Whose frames these are.
    #[must_use]
    pub fn session(&self) -> SessionId {
        self.session
    }

    /// Waits until nothing that was written can fail on this side any more.
    ///
    /// # Errors
    /// [`WireError::Io`].
    pub fn flush(&mut self) -> Result<(), WireError> {
        self.inner.flush().map_err(WireError::Io)
    }

    /// The same place in the stream, written through another writer.
    pub fn map<X: Write>(self, wrap: impl FnOnce(W) -> X) -> FrameWriter<X> {
        FrameWriter {
            inner: wrap(self.inner),
            session: self.session,
            sequence: self.sequence,
            bytes: self.bytes,
        }
    }

    /// Bytes written so far, headers included.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The stream below.
    pub fn get_ref(&self) -> &W {
        &self.inner
    }

    /// Writes one frame whose payload is the concatenation of `parts`, without copying them.
    /// Returns the frame's checksum.
    ///
    /// # Errors
    /// [`WireError::Length`] if the payload exceeds the cap; [`WireError::Io`] from the stream.
    pub fn write(&mut self, kind: Kind, parts: &[&[u8]]) -> Result<u32, WireError> {
        let head = self.head(kind, parts.iter().copied())?;
        let mut slices = Vec::with_capacity(parts.len() + 1);
        slices.push(IoSlice::new(&head.bytes));
        slices.extend(parts.iter().filter(|part| !part.is_empty()).map(|part| IoSlice::new(part)));
        write_all_vectored(&mut self.inner, &mut slices).map_err(WireError::Io)?;
        Ok(self.written(&head))
    }

    /// The header of a frame with this payload.
    fn head<'a>(
        &self,
        kind: Kind,
        payload: impl Iterator<Item = &'a [u8]> + Clone,
    ) -> Result<Head, WireError> {
        let total: usize = payload.clone().map(<[u8]>::len).sum();
        let cap = kind.cap();
        let too_long = WireError::Length { kind, length: total as u64, cap: cap as u64 };
        let length = match u32::try_from(total) {
            Ok(length) if total <= cap => length,
            _ => return Err(too_long),
        };
        let blank = header_bytes(kind, length, 0, self.session, self.sequence);
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&blank);
        payload.for_each(|part| hasher.update(part));
        let crc = hasher.finalize();
        let bytes = header_bytes(kind, length, crc, self.session, self.sequence);
        Ok(Head { bytes, crc, length: total })
    }

    fn written(&mut self, head: &Head) -> u32 {
        self.sequence += 1;
        self.bytes += (HEADER_BYTES + head.length) as u64;
        head.crc
    }
}

/// A header, and what it says.
struct Head {
    bytes: [u8; HEADER_BYTES],
    crc: u32,
    length: usize,
}

impl FrameWriter<Box<dyn Stream>> {
    /// As [`FrameWriter::write`]; what of the payload is in guest memory may be read there, until `leases`
    /// end (see [`Stream::gather`]).
    ///
    /// # Errors
    /// As [`FrameWriter::write`].
    pub(crate) fn gather(
        &mut self,
        kind: Kind,
        payload: &[Part<'_>],
        leases: Vec<Lease>,
    ) -> Result<u32, WireError> {
        let head = self.head(kind, payload.iter().map(|part| part.bytes))?;
        let mut parts = Vec::with_capacity(payload.len() + 1);
        parts.push(Part::from(&head.bytes[..]));
        parts.extend_from_slice(payload);
        self.inner.gather(&parts, leases).map_err(WireError::Io)?;
        Ok(self.written(&head))
    }

    /// As [`Stream::may_lend`], for frames of pages: one that waits for company, and the next.
    ///
    /// # Errors
    /// [`WireError::Io`] from the stream.
    pub(crate) fn may_lend(&mut self) -> Result<bool, WireError> {
        // Two headers, and for each page its length and its content.
        let parts = 2 * (2 + 2 * RAW_PAGES_MAX);
        self.inner.may_lend(2 * (HEADER_BYTES + PAGES_BYTES_MAX), parts).map_err(WireError::Io)
    }

    /// As [`Stream::place`], beside the frames.
    ///
    /// # Errors
    /// [`WireError::Io`] from the stream.
    pub(crate) fn place(
        &mut self,
        window: &rdma::Window,
        runs: &[(PageIndex, u64)],
    ) -> Result<(), WireError> {
        self.inner.place(window, runs).map_err(WireError::Io)
    }
}

/// Reads frames from one direction of one connection.
///
/// A frame is read in pieces so that page contents can go straight to where they are kept:
/// [`FrameReader::begin`], then [`FrameReader::read_into`] for the whole payload, then
/// [`FrameReader::finish`], which alone says whether the bytes were good.
#[derive(Debug)]
pub struct FrameReader<R> {
    inner: R,
    session: Option<SessionId>,
    sequence: u64,
    hasher: crc32fast::Hasher,
    rest: usize,
    bytes: u64,
}

impl<R: Read> FrameReader<R> {
    /// `session` is `None` where the first frame tells it.
    pub fn new(inner: R, session: Option<SessionId>) -> Self {
        let hasher = crc32fast::Hasher::new();
        Self { inner, session, sequence: 0, hasher, rest: 0, bytes: 0 }
    }

    /// Bytes read so far, headers included.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The session of the frames read so far, or as given.
    #[must_use]
    pub fn session(&self) -> Option<SessionId> {
        self.session
    }

    /// The stream below.
    pub fn get_ref(&self) -> &R {
        &self.inner
    }

    /// The stream below; reading from it leaves the frames behind.
    pub fn get_mut(&mut self) -> &mut R {
        &mut self.inner
    }

    /// The same place in the stream, read through another reader.
    pub fn map<S: Read>(self, wrap: impl FnOnce(R) -> S) -> FrameReader<S> {
        FrameReader {
            inner: wrap(self.inner),
            session: self.session,
            sequence: self.sequence,
            hasher: self.hasher,
            rest: self.rest,
            bytes: self.bytes,
        }
    }

    /// Reads the next header and checks its place in the stream.
    ///
    /// # Errors
    /// Any [`WireError`]; [`WireError::Closed`] only between two frames.
    pub fn begin(&mut self) -> Result<Header, WireError> {
        assert_eq!(self.rest, 0, "the frame before was not read to its end");
        let mut bytes = [0; HEADER_BYTES];
        let mut filled = 0;
        while filled < HEADER_BYTES {
            match self.inner.read(&mut bytes[filled..]) {
                Ok(0) if filled == 0 => return Err(WireError::Closed),
                Ok(0) => return Err(self.unless_tls(&bytes[..filled], WireError::Truncated)),
                Ok(count) => filled += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    return Err(self.unless_tls(&bytes[..filled], WireError::Io(error)));
                }
            }
        }
        self.bytes += HEADER_BYTES as u64;
        let header = Header::parse(&bytes).map_err(|error| self.unless_tls(&bytes, error))?;
        if self.session.is_some_and(|session| session != header.session) {
            return Err(WireError::Session);
        }
        if header.sequence != self.sequence {
            return Err(WireError::Sequence { expected: self.sequence, found: header.sequence });
        }
        bytes[12..16].fill(0);
        self.hasher = crc32fast::Hasher::new();
        self.hasher.update(&bytes);
        self.rest = header.length;
        Ok(header)
    }

    /// The reason why the begin of a frame is none, or a better one: it is TLS's, with which a peer begins.
    fn unless_tls(&self, begin: &[u8], reason: WireError) -> WireError {
        if self.sequence == 0 && is_tls(begin) { WireError::Tls } else { reason }
    }

    /// Payload bytes of the current frame that were not read yet.
    #[must_use]
    pub fn rest(&self) -> usize {
        self.rest
    }

    /// Reads the next `into.len()` bytes of the payload; `false` if it holds fewer.
    pub fn read_into(&mut self, into: &mut [u8]) -> Result<bool, WireError> {
        if into.len() > self.rest {
            return Ok(false);
        }
        self.inner.read_exact(into).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => WireError::Truncated,
            _ => WireError::Io(error),
        })?;
        self.hasher.update(into);
        self.rest -= into.len();
        self.bytes += into.len() as u64;
        Ok(true)
    }

    /// Reads the next bytes of the payload by `read`, which reads some, straight into a guest's memory;
    /// `false` if it holds fewer.
    pub fn read_memory(
        &mut self,
        into: &Slice<'_>,
        mut read: impl FnMut(&mut R, &Slice<'_>) -> std::io::Result<usize>,
    ) -> Result<bool, WireError> {
        if into.len() > self.rest {
            return Ok(false);
        }
        let mut left = *into;
        while !left.is_empty() {
            let count = match read(&mut self.inner, &left) {
                Ok(0) => return Err(WireError::Truncated),
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(WireError::Io(error)),
            };
            let outside = |error| WireError::Io(std::io::Error::other(error));
            let (came, rest) = left.split_at(count).map_err(outside)?;
            self.hash(&came);
            self.rest -= count;
            self.bytes += count as u64;
            left = rest;
        }
        Ok(true)
    }

    /// A slice of memory that others could write is no slice of Rust's: its bytes are copied to be
    /// looked at, out of one cache into a nearer one.
    fn hash(&mut self, memory: &Slice<'_>) {
        let mut page = [0; PAGE_SIZE];
        for from in (0..memory.len()).step_by(PAGE_SIZE) {
            let count = memory.offset(from).map_or(0, |rest| rest.copy_to(&mut page));
            self.hasher.update(&page[..count]);
        }
    }

    /// Appends the rest of the payload to `into`, which grows only as bytes arrive.
    pub fn read_rest(&mut self, into: &mut Vec<u8>) -> Result<(), WireError> {
        const STEP: usize = 64 << 10;
        while self.rest > 0 {
            let from = into.len();
            into.resize(from + self.rest.min(STEP), 0);
            self.read_into(&mut into[from..])?;
        }
        Ok(())
    }

    /// Checks the checksum of the frame whose payload was read, and returns it.
    pub fn finish(&mut self, header: &Header) -> Result<u32, WireError> {
        assert_eq!(self.rest, 0, "the payload was not read to its end");
        let hasher = std::mem::take(&mut self.hasher);
        if hasher.finalize() != header.crc {
            return Err(WireError::Checksum { kind: header.kind });
        }
        self.session.get_or_insert(header.session);
        self.sequence += 1;
        Ok(header.crc)
    }

    /// Reads one whole frame; `payload` is replaced.
    pub fn read(&mut self, payload: &mut Vec<u8>) -> Result<Header, WireError> {
        let header = self.begin()?;
        payload.clear();
        self.read_rest(payload)?;
        self.finish(&header)?;
        Ok(header)
    }
}
