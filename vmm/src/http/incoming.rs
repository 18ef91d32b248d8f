//! The bounded buffer of one connection: bytes that have come and are not used yet, and the
//! descriptors that came with them.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use super::descriptors::{MESSAGE_DESCRIPTORS_MAX, receive};

/// Bytes read at a time, and so the most that is read past the end of a request.
const CHUNK_BYTES: usize = 16 << 10;
/// Descriptors that may wait for their request: a card takes up to 128, one for each queue pair, a
/// restore those of all its cards, and a client sends them with one message. A connection that
/// brings more is refused, so that those of two messages are the most that it has.
const DESCRIPTORS_MAX: usize = MESSAGE_DESCRIPTORS_MAX;

/// Why no more bytes come.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    #[error("Deadline has passed")]
    TimedOut,
    #[error("More than {DESCRIPTORS_MAX} descriptors came")]
    TooManyDescriptors,
    #[error("Connection is broken")]
    Broken(#[source] io::Error),
}

/// What has come on a connection.
///
/// Offsets count from the connection's first byte. `recvmsg` ends a read at a message that
/// carries descriptors, so the offset after that read lies within (or at the end of) the request
/// that the descriptors belong to, even when several requests are under way at once.
pub(super) struct Incoming {
    bytes: Vec<u8>,
    /// Offset of `bytes[0]`.
    start: u64,
    descriptors: Vec<(u64, OwnedFd)>,
}

impl Incoming {
    pub(super) fn new() -> Self {
        Self { bytes: Vec::new(), start: 0, descriptors: Vec::new() }
    }

    /// The bytes that are not used yet.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Reads once, until `deadline` at the latest, and says how many bytes came: 0 at the end
    /// of the stream.
    pub(super) fn fill(
        &mut self,
        stream: &UnixStream,
        deadline: Instant,
    ) -> Result<usize, ReadError> {
        let mut chunk = [0; CHUNK_BYTES];
        let (count, descriptors) = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ReadError::TimedOut);
            }
            stream.set_read_timeout(Some(left)).map_err(ReadError::Broken)?;
            match receive(stream, &mut chunk) {
                Ok(received) => break received,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(ReadError::Broken(error)),
            }
        };
        self.bytes.extend_from_slice(&chunk[..count]);
        let end = self.end_offset();
        self.descriptors.extend(descriptors.into_iter().map(|fd| (end, fd)));
        if self.descriptors.len() > DESCRIPTORS_MAX {
            return Err(ReadError::TooManyDescriptors);
        }
        Ok(count)
    }

    /// Takes the first `count` bytes, or fewer where fewer have come.
    pub(super) fn take(&mut self, count: usize) -> Vec<u8> {
        let count = count.min(self.bytes.len());
        let rest = self.bytes.split_off(count);
        self.start += u64::try_from(count).expect("usize is at most 64 bits wide");
        std::mem::replace(&mut self.bytes, rest)
    }

    /// Takes the descriptors of the bytes that have been taken.
    pub(super) fn take_descriptors(&mut self) -> Vec<OwnedFd> {
        let start = self.start;
        let (taken, left) = std::mem::take(&mut self.descriptors)
            .into_iter()
            .partition(|(offset, _)| *offset <= start);
        self.descriptors = left;
        let taken: Vec<(u64, OwnedFd)> = taken;
        taken.into_iter().map(|(_, fd)| fd).collect()
    }

    fn end_offset(&self) -> u64 {
        self.start + u64::try_from(self.bytes.len()).expect("usize is at most 64 bits wide")
    }
}
