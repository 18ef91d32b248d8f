//! The thread that brings committed changes into the images.
//!
//! Enters: the changes of acknowledged epochs, in order. Leaves: the images, where each prefix of
//! the order is what a power cut could have left of the primary's. A flush of the guest is one here.
//! The engine goes on meanwhile, and asks [`Images::is_behind`] before it acknowledges more.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

use super::ImageError;
use crate::disk::{Change, ReplicaDisk, carry_out};
use crate::engine::spawn;
use crate::engine::status::Counters;
use crate::error::{Error, chain};

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
        let ended = Arc::<AtomicBool>::default();
        let writer = Writer {
            disks: disks.clone(),
            waiting_bytes: Arc::clone(&waiting_bytes),
            ended: Arc::clone(&ended),
            counters: Arc::clone(counters),
            failed: None,
        };
        let thread = spawn("repl-image", None, move || writer.run(&queue, tell))?;
        let (jobs, thread) = (Some(jobs), Some(thread));
        Ok(Self { disks, jobs, waiting_bytes, limit_bytes, ended, thread })
    }

    pub(in crate::backup) fn disks(&self) -> &[Arc<dyn ReplicaDisk>] {
        &self.disks
    }

    /// Changes of an epoch that is acknowledged.
    pub(in crate::backup) fn apply(&self, changes: Vec<Change>) {
        if changes.is_empty() {
            return;
        }
        let cost = changes.iter().map(Change::cost_bytes).sum();
        self.waiting_bytes.fetch_add(cost, Ordering::AcqRel);
        self.give(Job::Apply(changes));
    }

    /// So much waits for the images that another epoch is not to be acknowledged.
    pub(in crate::backup) fn is_behind(&self) -> bool {
        self.waiting_bytes.load(Ordering::Acquire) > self.limit_bytes
    }

    /// Waits until everything acknowledged is in the images, durably; else why it is not.
    pub(in crate::backup) fn settle(&self) -> Result<(), String> {
        let (answer, answered) = bounded(1);
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
                    // The engine waits for it.
                    let _ = answer.send(self.failed.clone().map_or(Ok(()), Err));
                }
            }
        }
    }

    fn apply(&mut self, changes: Vec<Change>) {
        for change in changes {
            if self.failed.is_none() && !self.ended.load(Ordering::Acquire) {
                let disk = self.disks[change.disk as usize].as_ref();
                if let Err(source) = carry_out(disk, &change, &self.counters.images) {
                    self.failed = Some(chain(&ImageError { disk: change.disk, source }));
                }
            }
            self.waiting_bytes.fetch_sub(change.cost_bytes(), Ordering::AcqRel);
        }
    }

    fn flush(&mut self) {
        for (at, disk) in self.disks.iter().enumerate() {
            if self.failed.is_some() {
                return;
            }
            if let Err(source) = disk.flush() {
                let disk = u32::try_from(at).unwrap_or(u32::MAX);
                self.failed = Some(chain(&ImageError { disk, source }));
            }
        }
    }
}
