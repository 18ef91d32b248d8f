//! A stream with nothing but what a stream must have.

use std::io::{self, Read, Write};
use std::time::Duration;

use crate::transport::Stream;

/// Reads, writes and ends as another stream does; what a stream may have beside that is left out.
pub struct Plain {
    pub stream: Box<dyn Stream>,
    /// What a flush finds.
    pub flushed: fn() -> io::Result<()>,
}

impl Plain {
    #[must_use]
    pub fn new(stream: Box<dyn Stream>) -> Self {
        Self { stream, flushed: || Ok(()) }
    }
}

impl Read for Plain {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.stream.read(into)
    }
}

impl Write for Plain {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        (self.flushed)()
    }
}

impl Stream for Plain {
    fn duplicate(&self) -> io::Result<Box<dyn Stream>> {
        self.stream.duplicate()
    }

    fn close(&self) {
        self.stream.close();
    }

    fn finish(&self) {
        self.stream.finish();
    }

    fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream.set_read_timeout(timeout)
    }

    fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream.set_write_timeout(timeout)
    }
}
