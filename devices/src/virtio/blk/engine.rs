//! Carries out I/O on the host, beside the threads that serve the guest.
//!
//! [`Engine`] is the seam for another way than threads, such as a ring of the kernel.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use super::buffer::Buffer;
use super::image::Image;

/// What to do with the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Read,
    /// Durable before it is done, if the guest has no way to ask for a flush. (Or if [`KeptDurable`].)
    Write {
        durable: bool,
    },
    Zero {
        len: u64,
        unmap: bool,
        durable: bool,
    },
    Discard {
        len: u64,
    },
    Flush,
}

/// One I/O, and what its buffer is after it.
#[derive(Debug)]
pub struct Io {
    pub operation: Operation,
    pub offset: u64,
    pub buffer: Buffer,
}

/// Called with an I/O that has ended.
pub type Done = Box<dyn FnOnce(Io, io::Result<()>) + Send>;

/// See the module's documentation.
pub trait Engine: Send + Sync {
    /// Begins an I/O, unless the engine is closed. `done` is called once, later, on a thread of
    /// the engine; it may wait there until the device is unparked, and may submit.
    fn submit(&self, io: Io, done: Done);
    /// Takes nothing more, forgets what has not begun without a call of `done`, and waits up to
    /// `patience` for what is under way. True if all of it ended.
    fn close(&self, patience: Duration) -> bool;
}

#[derive(Default)]
struct Jobs {
    list: VecDeque<(Io, Done)>,
    /// None once the engine is closed: the image's lock ends with the I/O that is under way then.
    image: Option<Arc<dyn Image>>,
    threads: usize,
}

#[derive(Default)]
struct Shared {
    jobs: Mutex<Jobs>,
    /// A job, a close, or the end of a thread.
    changed: Condvar,
    /// See [`Durability`].
    durability: Durability,
}

/// Whether each change is durable before it is done, whatever the guest may ask for: while anybody
/// keeps it so.
#[derive(Clone, Debug, Default)]
pub(super) struct Durability(Arc<AtomicUsize>);

/// Keeps changes of a disk durable, until it is dropped.
#[derive(Debug)]
pub struct KeptDurable(Durability);

impl Durability {
    /// For changes that reach the image from here on; what reached it before is for a flush that follows.
    pub(super) fn keep(&self) -> KeptDurable {
        self.0.fetch_add(1, Ordering::SeqCst);
        KeptDurable(self.clone())
    }

    fn is_kept(&self) -> bool {
        self.0.load(Ordering::SeqCst) > 0
    }
}

impl Drop for KeptDurable {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An engine of plain threads.
pub(super) struct ThreadPool {
    shared: Arc<Shared>,
}

impl ThreadPool {
    /// Starts a thread for each name. On an error none is left.
    pub(super) fn start(
        image: &Arc<dyn Image>,
        names: Vec<String>,
        durability: &Durability,
    ) -> io::Result<Self> {
        let jobs = Jobs { image: Some(Arc::clone(image)), ..Jobs::default() };
        let shared =
            Shared { jobs: Mutex::new(jobs), durability: durability.clone(), ..Shared::default() };
        let pool = Self { shared: Arc::new(shared) };
        for name in names {
            let shared = Arc::clone(&pool.shared);
            pool.shared.lock().threads += 1;
            let started = thread::Builder::new().name(name).spawn(move || serve(&shared));
            if let Err(error) = started {
                pool.shared.lock().threads -= 1;
                pool.close(Duration::ZERO);
                return Err(error);
            }
        }
        Ok(pool)
    }
}

fn serve(shared: &Shared) {
    loop {
        let jobs = shared.lock();
        let mut jobs = shared
            .changed
            .wait_while(jobs, |jobs| jobs.list.is_empty() && jobs.image.is_some())
            .unwrap_or_else(PoisonError::into_inner);
        let Some(image) = jobs.image.clone() else { break };
        let job = jobs.list.pop_front();
        drop(jobs);
        if let Some((mut io, done)) = job {
            let result = perform(image.as_ref(), &mut io, &shared.durability);
            // Before the answer, which may wait for the end of a park that never comes.
            drop(image);
            done(io, result);
        }
    }
    shared.lock().threads -= 1;
    shared.changed.notify_all();
}

/// Carries out one I/O.
fn perform(image: &dyn Image, io: &mut Io, durability: &Durability) -> io::Result<()> {
    // Looked at once the image has the change: who begins to keep it so after that flushes.
    let flush_if = |durable| if durable || durability.is_kept() { image.flush() } else { Ok(()) };
    match io.operation {
        Operation::Read => image.read_at(io.offset, io.buffer.bytes_mut()),
        Operation::Write { durable } => {
            image.write_at(io.offset, io.buffer.bytes())?;
            flush_if(durable)
        }
        Operation::Zero { len, unmap, durable } => {
            image.zero(io.offset, len, unmap)?;
            flush_if(durable)
        }
        Operation::Discard { len } => image.discard(io.offset, len),
        Operation::Flush => image.flush(),
    }
}

impl Engine for ThreadPool {
    fn submit(&self, io: Io, done: Done) {
        let mut jobs = self.shared.lock();
        if jobs.image.is_none() {
            return;
        }
        jobs.list.push_back((io, done));
        drop(jobs);
        self.shared.changed.notify_one();
    }

    fn close(&self, patience: Duration) -> bool {
        let mut jobs = self.shared.lock();
        let image = jobs.image.take();
        let abandoned = std::mem::take(&mut jobs.list);
        drop(jobs);
        // Outside of the lock: a job holds what it was made from.
        drop((image, abandoned));
        self.shared.changed.notify_all();
        let (jobs, _) = self
            .shared
            .changed
            .wait_timeout_while(self.shared.lock(), patience, |jobs| jobs.threads > 0)
            .unwrap_or_else(PoisonError::into_inner);
        jobs.threads == 0
    }
}
