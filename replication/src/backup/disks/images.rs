//! The thread that brings committed changes into the images.
//!
//! Enters: the changes of acknowledged epochs, in order. Leaves: the images, where each prefix of
//! the order is what a power cut could have left of the primary's. A flush of the guest is one here.
//! The engine goes on meanwhile, and asks [`Images::is_behind`] before it acknowledges more.
//!
//! Who settles waits for all that waits: flushes are left out from then on, and each image is flushed once,
//! behind everything. A power cut before that would leave images that no flush has put in order, and nobody to
//! use them: the machine state that goes with them is in memory only.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

use super::ImageError;
use crate::disk::{Change, Operation, ReplicaDisk, carry_out};
use crate::engine::spawn;
use crate::engine::status::Counters;
use crate::error::{Error, chain};

/// What a flush counts as among the bytes that wait: a disk is busy with one for about as long.
const FLUSH_BYTES: u64 = 64 << 10;
/// Most of what a range that is zeroed or discarded counts as; many hosts write nothing for it.
const RANGE_BYTES_MAX: u64 = 1 << 20;

/// How much work a change is, in bytes that wait for an image.
fn work_bytes(change: &Change) -> u64 {
    let more = match change.operation {
        Operation::Write => 0,
        Operation::Flush => FLUSH_BYTES,
        Operation::Zero { .. } | Operation::Discard => change.len.min(RANGE_BYTES_MAX),
    };
    change.cost_bytes() + more
}

enum Job {
    Apply(Vec<Change>),
    Settle(Sender<Result<(), String>>),
}

/// The images of a replica, and the thread that writes them.
pub(in crate::backup) struct Images {
    disks: Vec<Arc<dyn ReplicaDisk>>,
    jobs: Option<Sender<Job>>,
    waiting_bytes: Arc<AtomicU64>,
    limit_bytes: u64,
    /// Somebody settles: what a flush would put in order is not looked at before that is over.
    hurry: Arc<AtomicBool>,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Images {
    /// Starts the thread. `tell` is called when an epoch's changes are in the images, or with why
    /// they are not: nothing is written after that. More than `limit_bytes` that wait are enough.
    pub(in crate::backup) fn start(
        disks: Vec<Arc<dyn ReplicaDisk>>,
        limit_bytes: u64,
        counters: &Arc<Counters>,
        tell: impl Fn(Result<(), String>) + Send + 'static,
    ) -> Result<Self, Error> {
        let (jobs, queue) = unbounded();
        let waiting_bytes = Arc::<AtomicU64>::default();
        let (hurry, ended) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        let writer = Writer {
            disks: disks.clone(),
            waiting_bytes: Arc::clone(&waiting_bytes),
            hurry: Arc::clone(&hurry),
            ended: Arc::clone(&ended),
            counters: Arc::clone(counters),
            failed: None,
        };
        let thread = spawn("repl-image", None, move || writer.run(&queue, tell))?;
        let (jobs, thread) = (Some(jobs), Some(thread));
        Ok(Self { disks, jobs, waiting_bytes, limit_bytes, hurry, ended, thread })
    }

    pub(in crate::backup) fn disks(&self) -> &[Arc<dyn ReplicaDisk>] {
        &self.disks
    }

    /// Changes of an epoch that is acknowledged.
    pub(in crate::backup) fn apply(&self, changes: Vec<Change>) {
        if changes.is_empty() {
            return;
        }
        let work = changes.iter().map(work_bytes).sum();
        self.waiting_bytes.fetch_add(work, Ordering::AcqRel);
        self.give(Job::Apply(changes));
    }

    /// So much waits for the images that another epoch is not to be acknowledged.
    pub(in crate::backup) fn is_behind(&self) -> bool {
        self.waiting_bytes.load(Ordering::Acquire) > self.limit_bytes
    }

    /// Waits until everything acknowledged is in the images, durably; else why it is not.
    pub(in crate::backup) fn settle(&self) -> Result<(), String> {
        let (answer, answered) = bounded(1);
        self.hurry.store(true, Ordering::Release);
        self.give(Job::Settle(answer));
        answered.recv().unwrap_or_else(|_| Err("The images' thread has ended".to_owned()))
    }

    fn give(&self, job: Job) {
        if let Some(jobs) = &self.jobs {
            // The thread ends with this sender.
            let _ = jobs.send(job);
        }
    }
}

impl Drop for Images {
    /// Ends the thread: nothing is written when this returns, whoever has the images then.
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
        self.jobs = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("The images' thread panicked");
        }
    }
}

struct Writer {
    disks: Vec<Arc<dyn ReplicaDisk>>,
    waiting_bytes: Arc<AtomicU64>,
    hurry: Arc<AtomicBool>,
    ended: Arc<AtomicBool>,
    counters: Arc<Counters>,
    failed: Option<String>,
}

impl Writer {
    fn run(mut self, queue: &Receiver<Job>, tell: impl Fn(Result<(), String>)) {
        for job in queue {
            match job {
                Job::Apply(changes) => {
                    let before = self.failed.is_some();
                    self.apply(changes);
                    match &self.failed {
                        None => tell(Ok(())),
                        Some(error) if !before => tell(Err(error.clone())),
                        Some(_) => {}
                    }
                }
                Job::Settle(answer) => {
                    self.flush();
                    self.hurry.store(false, Ordering::Release);
                    // The engine waits for it.
                    let _ = answer.send(self.failed.clone().map_or(Ok(()), Err));
                }
            }
        }
    }

    fn apply(&mut self, changes: Vec<Change>) {
        for change in changes {
            let is_left_out =
                change.operation == Operation::Flush && self.hurry.load(Ordering::Acquire);
            if !is_left_out && !self.ended.load(Ordering::Acquire) {
                self.carry_out(&change);
            }
            self.waiting_bytes.fetch_sub(work_bytes(&change), Ordering::AcqRel);
        }
    }

    /// Nothing after the first change that fails.
    fn carry_out(&mut self, change: &Change) {
        if self.failed.is_some() {
            return;
        }
        let disk = self.disks[change.disk as usize].as_ref();
        if let Err(source) = carry_out(disk, change, &self.counters.images, &self.ended) {
            self.failed = Some(chain(&ImageError { disk: change.disk, source }));
        }
    }

    fn flush(&mut self) {
        for disk in 0..u32::try_from(self.disks.len()).unwrap_or(u32::MAX) {
            let (operation, data) = (Operation::Flush, vec![]);
            self.carry_out(&Change { disk, operation, offset: 0, len: 0, data });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::testing::MemoryImage;

    /// Whoever ends the thread waits for the piece at hand, and not for all of a change.
    #[test]
    fn a_change_that_is_long_ends_where_it_is() {
        const PIECE: usize = 4 << 20;
        let image = MemoryImage::new(vec![7; 4 * PIECE]);
        let busy = image.busy.lock().unwrap();
        let disks = vec![Arc::clone(&image) as _];
        let images = Images::start(disks, 1 << 20, &Arc::default(), |_| {}).unwrap();
        let (operation, len) = (Operation::Discard, 4 * PIECE as u64);
        images.apply(vec![Change { disk: 0, operation, offset: 0, len, data: vec![] }]);
        let soon = |is_so: &dyn Fn() -> bool| {
            let since = Instant::now();
            while !is_so() {
                assert!(since.elapsed() < Duration::from_secs(60));
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        soon(&|| image.waiting.load(Ordering::Acquire) > 0);
        let ended = Arc::clone(&images.ended);
        std::thread::scope(|scope| {
            scope.spawn(|| drop(images));
            soon(&|| ended.load(Ordering::Acquire));
            drop(busy);
        });
        let bytes = image.bytes();
        assert!(bytes[..PIECE].iter().all(|byte| *byte == 0));
        assert!(bytes[PIECE..].iter().all(|byte| *byte == 7), "more than the piece at hand");
    }

    /// A primary that waits for the images hears that this host is at it, also when all that is left is to make
    /// them durable.
    #[test]
    fn the_last_flush_is_something_that_goes_on() {
        let image = MemoryImage::new(vec![0; 4096]);
        let flushing = image.flushing.lock().unwrap();
        let counters = Arc::<Counters>::default();
        let images =
            Images::start(vec![Arc::clone(&image) as _], 1 << 20, &counters, |_| {}).unwrap();
        std::thread::scope(|scope| {
            let settles = scope.spawn(|| images.settle());
            let (since, mut said) = (Instant::now(), counters.images.count());
            for _ in 0..3 {
                loop {
                    let now = counters.images.count();
                    if now != said {
                        said = now;
                        break;
                    }
                    if since.elapsed() > Duration::from_secs(5) {
                        drop(flushing);
                        panic!("nothing is said");
                    }
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            drop(flushing);
            settles.join().unwrap().unwrap();
        });
    }
}
