//! A stream with nothing but what a stream must have.

use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};

use crate::ids::PageIndex;
use crate::transport::rdma::Window;
use crate::transport::{Lease, Part, Stream, write_all_parts};

/// Pages that are read in guest memory, and what keeps them as they are.
pub type Lent = Arc<Mutex<Vec<(Vec<PageIndex>, Vec<Lease>)>>>;

/// Runs of pages that were placed, each its first and their number.
pub type Placed = Arc<Mutex<Vec<Vec<(PageIndex, u64)>>>>;

/// Reads, writes and ends as another stream does; what a stream may have beside that is left out.
pub struct Plain {
    pub stream: Box<dyn Stream>,
    /// What a flush finds.
    pub flushed: fn() -> io::Result<()>,
    /// Where it says that it reads guest memory, and goes on reading it: what it was lent.
    pub lent: Option<Lent>,
    /// Where it waits for the peer to have room: it says so, and is told that there is; and whether it is to
    /// be lent pages then.
    pub room: Option<(Sender<()>, Receiver<bool>)>,
    /// Where pages are placed: the runs of each call.
    pub placed: Option<Placed>,
    /// It has waited.
    pub has_room: bool,
}

impl Plain {
    #[must_use]
    pub fn new(stream: Box<dyn Stream>) -> Self {
        Self { stream, flushed: || Ok(()), lent: None, room: None, placed: None, has_room: false }
    }

    fn await_room(&mut self) -> bool {
        let Some((asks, answers)) = &self.room else { return true };
        self.has_room = true;
        asks.send(()).is_ok() && answers.recv().unwrap_or(false)
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
    fn gathers(&self) -> bool {
        self.lent.is_some()
    }

    fn may_lend(&mut self, _: usize, _: usize) -> io::Result<bool> {
        Ok(self.await_room())
    }

    fn gather(&mut self, parts: &[Part<'_>], leases: Vec<Lease>) -> io::Result<()> {
        if !std::mem::take(&mut self.has_room) {
            self.await_room();
        }
        write_all_parts(self, parts)?;
        if let Some(lent) = &self.lent {
            let pages = parts.iter().filter_map(|part| part.page).collect();
            lent.lock().unwrap_or_else(PoisonError::into_inner).push((pages, leases));
        }
        Ok(())
    }

    fn place(&mut self, _: &Window, runs: &[(PageIndex, u64)]) -> io::Result<()> {
        let placed = self.placed.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        placed.lock().unwrap_or_else(PoisonError::into_inner).push(runs.to_vec());
        Ok(())
    }

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
