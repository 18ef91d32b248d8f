//! A stream whose reads all end by one moment, however few bytes each of them brings.

use std::io::{self, Read};
use std::time::{Duration, Instant};

use super::Stream;

/// See the module's documentation.
pub(crate) struct Timed {
    pub(crate) stream: Box<dyn Stream>,
    /// The end of all reads, and most that one of them may take.
    pub(crate) until: Instant,
    pub(crate) each: Duration,
}

impl Read for Timed {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(left.min(self.each)))?;
        self.stream.read(into)
    }
}
