//! A stream that ends nowhere: what is written waits to be taken, and what is read was put there. For
//! whoever carries bytes himself, as a simulator does.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::transport::Stream;
use crate::wire::HEADER_BYTES;

/// Cheap to clone; all clones are the same tape.
#[derive(Clone, Debug, Default)]
pub struct Tape(Arc<Mutex<VecDeque<u8>>>);

impl Tape {
    fn lock(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All that was written.
    #[must_use]
    pub fn take(&self) -> Vec<u8> {
        self.lock().drain(..).collect()
    }

    /// To be read after what is there.
    pub fn put(&self, bytes: &[u8]) {
        self.lock().extend(bytes);
    }

    /// Whether a frame can be read to its end, if its header says how long it is.
    #[must_use]
    pub fn has_frame(&self) -> bool {
        let bytes = self.lock();
        let length: Option<Vec<u8>> = (8..12).map(|at| bytes.get(at).copied()).collect();
        let length = length.and_then(|length| <[u8; 4]>::try_from(length).ok());
        let length = length.map_or(usize::MAX, |length| u32::from_le_bytes(length) as usize);
        bytes.len() >= length.saturating_add(HEADER_BYTES)
    }
}

impl Read for Tape {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.lock().read(into)
    }
}

impl Write for Tape {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.lock().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for Tape {
    fn duplicate(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(self.clone()))
    }

    fn close(&self) {}

    fn finish(&self) {}

    fn set_read_timeout(&self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }

    fn set_write_timeout(&self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
}
