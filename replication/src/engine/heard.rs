//! When the peer was heard last.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::clock;
use crate::ram::Slice;
use crate::transport::Stream;

/// Shared by all threads that read from the peer.
#[derive(Clone, Debug)]
pub(crate) struct Heard {
    start: Instant,
    last_us: Arc<AtomicU64>,
}

impl Heard {
    /// Heard just now.
    pub(crate) fn new() -> Self {
        Self { start: clock::now(), last_us: Arc::default() }
    }

    pub(crate) fn now(&self) {
        let us = u64::try_from(clock::since(self.start).as_micros()).unwrap_or(u64::MAX);
        self.last_us.fetch_max(us, Ordering::Relaxed);
    }

    /// When silence will have lasted `timeout`.
    pub(crate) fn deadline(&self, timeout: Duration) -> Instant {
        self.start + Duration::from_micros(self.last_us.load(Ordering::Relaxed)) + timeout
    }

    /// Whether the silence that began before `deadline` goes on. If this process itself was
    /// stopped for so long that it says nothing about the peer, the peer gets another chance.
    pub(crate) fn is_silent(&self, timeout: Duration, slack: Duration) -> bool {
        let deadline = self.deadline(timeout);
        let now = clock::now();
        if now < deadline {
            return false;
        }
        if now.duration_since(deadline) > slack {
            self.now();
            return false;
        }
        true
    }
}

/// A reader that notes every byte that arrives.
pub(crate) struct Listening<R> {
    inner: R,
    heard: Heard,
}

impl<R> Listening<R> {
    pub(crate) fn new(inner: R, heard: Heard) -> Self {
        Self { inner, heard }
    }
}

impl<R> Listening<R> {
    /// The reader below.
    pub(crate) fn inner_mut(&mut self) -> &mut R {
        &mut self.inner
    }

    fn count(&self, count: usize) -> usize {
        if count > 0 {
            self.heard.now();
        }
        count
    }
}

impl Listening<Box<dyn Stream>> {
    /// See [`Stream::read_memory`].
    pub(crate) fn read_memory(&mut self, into: &Slice<'_>) -> io::Result<usize> {
        self.inner.read_memory(into).map(|count| self.count(count))
    }
}

impl<R: Read> Read for Listening<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.inner.read(into).map(|count| self.count(count))
    }
}
