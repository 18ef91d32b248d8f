//! A stream that ends nowhere: what is written waits to be taken, and what is read was put there. For
//! whoever carries bytes himself, as a simulator does.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::transport::Stream;
use crate::wire::HEADER_BYTES;

#[derive(Debug, Default)]
struct Reel {
    bytes: VecDeque<u8>,
    is_closed: bool,
    is_finished: bool,
}

/// Cheap to clone; all clones are the same tape.
#[derive(Clone, Debug, Default)]
pub struct Tape(Arc<Mutex<Reel>>);

impl Tape {
    fn lock(&self) -> MutexGuard<'_, Reel> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All that was written.
    #[must_use]
    pub fn take(&self) -> Vec<u8> {
        self.lock().bytes.drain(..).collect()
    }

    /// To be read after what is there.
    pub fn put(&self, bytes: &[u8]) {
        self.lock().bytes.extend(bytes);
    }

    /// Whether a frame can be read to its end, if its header says how long it is.
    #[must_use]
    pub fn has_frame(&self) -> bool {
        self.has_frames(1)
    }

    /// The same of so many frames, one after the other.
    #[must_use]
    pub fn has_frames(&self, count: usize) -> bool {
        let bytes = &self.lock().bytes;
        let end = |from: usize| {
            let length: Option<Vec<u8>> =
                (8..12).map(|at| bytes.get(from.checked_add(at)?).copied()).collect();
            let length = u32::from_le_bytes(length?.try_into().ok()?) as usize;
            from.checked_add(HEADER_BYTES)?.checked_add(length).filter(|end| *end <= bytes.len())
        };
        (0..count).try_fold(0, |from, _| end(from)).is_some()
    }

    /// Whether somebody has closed it, and whether somebody has said that nothing more is written.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.lock().is_closed
    }

    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.lock().is_finished
    }
}

impl Read for Tape {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.lock().bytes.read(into)
    }
}

impl Write for Tape {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.lock().bytes.extend(bytes);
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

    fn close(&self) {
        self.lock().is_closed = true;
    }

    fn finish(&self) {
        self.lock().is_finished = true;
    }

    fn set_read_timeout(&self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }

    fn set_write_timeout(&self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
}
