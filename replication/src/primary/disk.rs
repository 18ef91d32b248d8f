//! The disks' sender: one thread, one connection, so that what it sends arrives in order.
//!
//! ```text
//!   Copy:   blocks that are marked, pass by pass, until few are left     (the guest writes on)
//!   Rest:   once changes are logged, the blocks that are marked still
//!   Epoch:  the log of an epoch, and its end
//! ```
//!
//! What the host knows to be zero is not read. On some file systems that is wrong for what was
//! written and is not on the storage yet: so all is flushed first, once changes are recorded, and a
//! block that was changed since is read.
//!
//! A block that is read after logging began may have some of what the log has too: the log is
//! applied over it and ends with the last value of each byte. It is read by this thread, which
//! may wait for the host's disk as long as it likes: neither a vCPU nor a pause waits for it.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use thiserror::Error;

use crate::disk::{
    BLOCK_BYTES, CHANGE_BYTES_MAX, COPY_BYTES_MAX, Change, Disks, Journal, Log, Operation,
};
use crate::engine::spawn;
use crate::engine::status::Counters;
use crate::error::Error;
use crate::ids::EpochId;
use crate::transport::Stream;
use crate::wire::{ChangeHead, ConnectionPart, End, FrameWriter, Kind, WireError};

/// Passes of a copy after which the rest is taken, however large.
const PASSES_MAX: u32 = 8;
/// Marked blocks that are sent while changes are logged already.
const REST_BYTES: u64 = 16 << 20;

/// What the thread is to do.
pub(super) enum Job {
    Copy { number: u64 },
    Rest { number: u64 },
    Epoch { epoch: EpochId, log: Log },
}

/// Why the thread has ended.
#[derive(Debug, Error)]
pub(super) enum DiskError {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("Cannot read disk {disk} at byte {offset}")]
    Read { disk: usize, offset: u64, source: io::Error },
}

/// What the thread reports: the number of a copy that is out.
pub(super) type Sent = Result<u64, DiskError>;

/// The disks of a protected guest.
pub(super) struct DiskSender {
    pub(super) journal: Arc<Journal>,
    disks: Arc<dyn Disks>,
    /// `None` at the end: the thread may be waiting for a job.
    jobs: Option<Sender<Job>>,
    closer: Box<dyn Stream>,
    closed: Arc<AtomicBool>,
    /// Disconnected once the thread has ended.
    ended: Receiver<()>,
}

impl DiskSender {
    /// Starts the thread. Nothing is recorded before [`DiskSender::attach`].
    pub(super) fn start(
        disks: Arc<dyn Disks>,
        journal: Arc<Journal>,
        writer: FrameWriter<Box<dyn Stream>>,
        counters: &Arc<Counters>,
        deliver: impl Fn(Sent) -> bool + Send + 'static,
    ) -> Result<Self, Error> {
        let closer =
            writer.get_ref().duplicate().map_err(|error| Error::Wire(WireError::Io(error)))?;
        let (jobs, queue) = unbounded();
        let closed = Arc::new(AtomicBool::new(false));
        let thread = Sending {
            sizes: disks.sizes_bytes(),
            disks: Arc::clone(&disks),
            journal: Arc::clone(&journal),
            writer,
            counters: Arc::clone(counters),
            closed: Arc::clone(&closed),
            knows_holes: None,
            zeroes: None,
            counted: 0,
        };
        let (ends, ended) = bounded(0);
        // Not joined: a host's disk that hangs must not hang the engine's end.
        spawn("repl-disk", None, move || {
            thread.run(&queue, deliver);
            drop::<Sender<()>>(ends);
        })?;
        Ok(Self { journal, disks, jobs: Some(jobs), closer, closed, ended })
    }

    /// From now on every change is recorded.
    pub(super) fn attach(&self) {
        self.disks.set_journal(Some(Arc::clone(&self.journal)));
    }

    /// Nothing is recorded any more, and nobody waits.
    pub(super) fn detach(&self) {
        self.disks.set_journal(None);
        self.journal.stop_log();
    }

    pub(super) fn give(&self, job: Job) {
        if let Some(jobs) = &self.jobs {
            // A thread that is gone has reported why.
            let _ = jobs.send(job);
        }
    }

    /// Ends the connection; the thread follows.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.closer.close();
    }

    /// As [`DiskSender::close`], and waits until the thread has let go of the images, for `limit`
    /// at most: whoever ends a VM may use them at once.
    pub(super) fn end(mut self, limit: Duration) {
        self.detach();
        self.close();
        self.jobs = None;
        // Nothing is ever sent: the wait ends with the thread, or the patience.
        let _ = self.ended.recv_timeout(limit);
    }
}

impl Drop for DiskSender {
    /// An engine that ends in whatever way leaves no journal behind that nobody reads.
    fn drop(&mut self) {
        self.detach();
    }
}

/// A run of zeroes that was not sent yet.
struct Zeroes {
    disk: usize,
    range: Range<u64>,
}

struct Sending {
    sizes: Vec<u64>,
    disks: Arc<dyn Disks>,
    journal: Arc<Journal>,
    writer: FrameWriter<Box<dyn Stream>>,
    counters: Arc<Counters>,
    closed: Arc<AtomicBool>,
    /// Whether the images were flushed; unknown before the first copy.
    knows_holes: Option<bool>,
    zeroes: Option<Zeroes>,
    /// Bytes of the writer that the counters know.
    counted: u64,
}

impl Sending {
    fn run(mut self, queue: &Receiver<Job>, deliver: impl Fn(Sent) -> bool) {
        for job in queue {
            let done = match job {
                Job::Copy { number } => self.copy().map(|()| Some(number)),
                // Called off: nobody waits for the report.
                Job::Rest { .. } if !self.journal.wait_log() => Ok(None),
                Job::Rest { number } => self.pass().map(|()| Some(number)),
                Job::Epoch { epoch, log } => self.epoch(epoch, log).map(|()| None),
            };
            let told = match done {
                Ok(None) => continue,
                Ok(Some(number)) => Ok(number),
                Err(error) => Err(error),
            };
            let failed = told.is_err();
            if !deliver(told) || failed {
                return;
            }
        }
    }

    /// Passes over what is marked, while that shrinks.
    fn copy(&mut self) -> Result<(), DiskError> {
        if self.knows_holes.is_none() {
            self.knows_holes = Some(self.flush_images());
        }
        let mut before = u64::MAX;
        for _ in 0..PASSES_MAX {
            self.pass()?;
            let rest = self.journal.marked_bytes();
            if rest <= REST_BYTES || rest > before - before / 4 {
                break;
            }
            before = rest;
        }
        Ok(())
    }

    /// False if the storage refuses: then everything is read.
    fn flush_images(&self) -> bool {
        (0..self.sizes.len()).all(|disk| {
            let flushed = self.disks.flush(disk);
            if let Err(error) = &flushed {
                tracing::warn!("disk {disk} cannot be flushed, so its holes are read: {error}");
            }
            flushed.is_ok()
        })
    }

    fn is_hole(&self, disk: usize, range: &Range<u64>) -> bool {
        self.knows_holes == Some(true)
            && !self.journal.is_touched(disk, range)
            && self.disks.hole_bytes(disk, range.start) >= range.end - range.start
    }

    fn pass(&mut self) -> Result<(), DiskError> {
        let mut buffer = vec![0; CHANGE_BYTES_MAX];
        let most = CHANGE_BYTES_MAX as u64;
        for disk in 0..self.sizes.len() {
            let mut at = 0;
            while let Some(range) = self.journal.next_marked(disk, at, most) {
                if self.closed.load(Ordering::Acquire) {
                    return Err(WireError::Closed.into());
                }
                at = range.end;
                self.blocks(disk, range, &mut buffer)?;
            }
        }
        self.flush_zeroes()
    }

    /// Sends a range of at most a frame.
    fn blocks(
        &mut self,
        disk: usize,
        range: Range<u64>,
        buffer: &mut [u8],
    ) -> Result<(), DiskError> {
        let len = range.end - range.start;
        if self.is_hole(disk, &range) {
            return self.zero(disk, range);
        }
        let bytes = &mut buffer[..usize::try_from(len).expect("at most a frame")];
        let read = self.disks.read(disk, range.start, bytes);
        read.map_err(|source| DiskError::Read { disk, offset: range.start, source })?;
        let block = usize::try_from(BLOCK_BYTES).expect("a block is small");
        let mut at = 0;
        while at < bytes.len() {
            let zero = is_zero(&bytes[at..(at + block).min(bytes.len())]);
            let mut end = at;
            while end < bytes.len() && is_zero(&bytes[end..(end + block).min(bytes.len())]) == zero
            {
                end = (end + block).min(bytes.len());
            }
            let part = range.start + at as u64..range.start + end as u64;
            if zero {
                self.zero(disk, part)?;
            } else {
                self.flush_zeroes()?;
                self.straight(disk, Operation::Write, part, &bytes[at..end])?;
            }
            at = end;
        }
        Ok(())
    }

    fn zero(&mut self, disk: usize, range: Range<u64>) -> Result<(), DiskError> {
        if let Some(Zeroes { disk: of, range: before }) = &mut self.zeroes
            && *of == disk
            && before.end == range.start
            && range.end - before.start <= COPY_BYTES_MAX
        {
            before.end = range.end;
            return Ok(());
        }
        self.flush_zeroes()?;
        self.zeroes = Some(Zeroes { disk, range });
        Ok(())
    }

    fn flush_zeroes(&mut self) -> Result<(), DiskError> {
        match self.zeroes.take() {
            None => Ok(()),
            Some(Zeroes { disk, range }) => {
                self.straight(disk, Operation::Zero { unmap: true }, range, &[])
            }
        }
    }

    /// A piece of a first copy.
    fn straight(
        &mut self,
        disk: usize,
        operation: Operation,
        range: Range<u64>,
        data: &[u8],
    ) -> Result<(), DiskError> {
        let disk = u32::try_from(disk).expect("the number of disks is bounded");
        let (offset, len) = (range.start, range.end - range.start);
        let head = ChangeHead { epoch: EpochId(0), disk, operation, offset, len };
        self.writer.write(Kind::Change, &[&head.encode(), data])?;
        self.counters.synced_disk_bytes.fetch_add(len, Ordering::Relaxed);
        self.count(data.len());
        Ok(())
    }

    fn epoch(&mut self, epoch: EpochId, log: Log) -> Result<(), DiskError> {
        let mut part = ConnectionPart::default();
        for change in log.changes {
            let Change { ref data, .. } = change;
            let head = ChangeHead::of(epoch, &change).encode();
            let crc = self.writer.write(Kind::Change, &[&head, data])?;
            part.add(1, crc);
            self.count(data.len());
        }
        self.writer.write(Kind::End, &[&End { epoch, part }.encode()])?;
        self.count(0);
        Ok(())
    }

    fn count(&mut self, raw: usize) {
        let new = self.writer.bytes() - self.counted;
        self.counted += new;
        self.counters.wire_bytes.fetch_add(new, Ordering::Relaxed);
        self.counters.raw_bytes.fetch_add(raw as u64, Ordering::Relaxed);
    }
}

/// Whether bytes are all zero; fails at the first word of most that are not.
fn is_zero(bytes: &[u8]) -> bool {
    let (chunks, rest) = bytes.as_chunks::<64>();
    chunks.iter().all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::guest::Waker;
    use crate::testing::MemoryDisks;
    use crate::transport::memory;
    use crate::wire::SessionId;

    #[test]
    fn the_end_of_a_thread_that_has_nothing_to_do_is_not_waited_for() {
        const LIMIT: Duration = Duration::from_secs(20);
        let disks = MemoryDisks::new(vec![vec![0; 4096]]);
        let sizes = disks.sizes_bytes();
        let nobody = || Waker::new(|| {});
        let journal = Arc::new(Journal::new(&sizes, nobody(), nobody()));
        let (ours, _theirs) = memory::pair().unwrap();
        let writer = FrameWriter::new(ours, SessionId(1));
        let sender = DiskSender::start(disks, journal, writer, &Arc::default(), |_| true).unwrap();
        let start = Instant::now();
        sender.end(LIMIT);
        assert!(start.elapsed() < LIMIT, "it was waited for to the end of the patience");
    }
}
