//! virtio-rng (virtio 1.2, section 5.4): fills the guest's buffers with bytes of a source.
//!
//! ```text
//!   source ──read, no pass──▶ stock, 4 KiB ──under a pass──▶ the next buffer ──▶ interrupt
//! ```
//!
//! What enters: the driver's empty buffers; what leaves: random bytes. What always holds:
//!
//! - The source is read ahead, before a buffer is taken from the ring, so nothing is ever in
//!   flight and the device has no state beside its queue. No byte is given out twice.
//! - One buffer a pass, and at most [`STOCK_BYTES`] of it: the driver comes back for more.
//! - The worker waits for the source, a vCPU never does; a reset takes the queue away from it and
//!   does not wait for more than a buffer's copying.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::Bytes;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::{
    ActivateError, Activation, AttachError, DeviceType, GuestMemory, Interrupt, QueuePosition,
    StateError, VirtioDevice,
};
use super::ring::{RingError, enable_notification};
use super::state::DeviceState;
use super::turnstile::Turnstile;
use crate::counters::Counter;

/// Most bytes that one buffer gets.
pub const STOCK_BYTES: usize = 4096;

const QUEUE_SIZE: u16 = 256;
const EVENT_IDX: u64 = 1 << 29;

/// The device.
pub struct Rng {
    shared: Arc<Shared>,
    worker: Mutex<Option<JoinHandle<()>>>,
    /// Nobody but [`Rng::turn`] works on the ring.
    #[cfg(feature = "fuzzing")]
    by_hand: AtomicBool,
}

struct Shared {
    id: String,
    path: PathBuf,
    source: Mutex<Option<Arc<File>>>,
    turnstile: Turnstile,
    /// Locked under a pass by the worker, and by who activates or resets.
    active: Mutex<Option<Active>>,
    /// Wakes the worker: what is active has changed, or the device ends.
    changed: EventFd,
    ends: AtomicBool,
    requests: Counter,
    bytes: Counter,
    source_errors: Counter,
}

struct Active {
    memory: Arc<GuestMemory>,
    queue: Queue,
    doorbell: Arc<EventFd>,
    interrupt: Arc<dyn Interrupt>,
    /// The ring made no sense: nothing happens until a reset.
    broken: bool,
}

impl Rng {
    /// `path` is opened by [`VirtioDevice::attach`].
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn new(id: &str, path: PathBuf) -> io::Result<Self> {
        let shared = Shared {
            id: id.to_owned(),
            path,
            source: Mutex::default(),
            turnstile: Turnstile::default(),
            active: Mutex::default(),
            changed: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            ends: AtomicBool::new(false),
            requests: Counter::default(),
            bytes: Counter::default(),
            source_errors: Counter::default(),
        };
        Ok(Self {
            shared: Arc::new(shared),
            worker: Mutex::default(),
            #[cfg(feature = "fuzzing")]
            by_hand: AtomicBool::new(false),
        })
    }

    /// Starts the worker, which stays for the device's life.
    fn start(&self, source: Arc<File>) -> Result<(), ActivateError> {
        #[cfg(feature = "fuzzing")]
        if self.by_hand.load(Ordering::Relaxed) {
            return Ok(());
        }
        let mut worker = self.worker.lock().unwrap_or_else(PoisonError::into_inner);
        if worker.as_ref().is_some_and(|worker| !worker.is_finished()) {
            return Ok(());
        }
        let shared = Arc::clone(&self.shared);
        let waits = Waits::new(&shared).map_err(ActivateError::Events)?;
        let mut name = self.shared.id.clone();
        name.truncate(15);
        let handle = std::thread::Builder::new()
            .name(name)
            .spawn(move || shared.work(&source, waits))
            .map_err(ActivateError::Thread)?;
        *worker = Some(handle);
        Ok(())
    }
}

#[cfg(feature = "fuzzing")]
impl Rng {
    /// The device gets no thread: [`Rng::turn`] does its work.
    pub fn work_by_hand(&self) {
        self.by_hand.store(true, Ordering::Relaxed);
    }

    /// Fills one buffer by way of `stock`. True if there may be more. Not while parked.
    pub fn turn(&self, stock: &mut Vec<u8>) -> bool {
        let Some(source) = self.shared.source().clone() else { return false };
        let ready = self.shared.refill(&mut source.as_ref(), stock) == Source::Ready;
        ready && self.shared.serve(stock) == Served::One
    }
}

impl VirtioDevice for Rng {
    fn id(&self) -> &str {
        &self.shared.id
    }

    fn device_type(&self) -> DeviceType {
        DeviceType::Entropy
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        EVENT_IDX
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn attach(&self) -> Result<(), AttachError> {
        // Not blocking: a source that has nothing yet, a pipe say, is waited for by the worker.
        let source =
            File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&self.shared.path);
        let source = source.map_err(|source| AttachError {
            what: format!("Cannot open the source of random bytes {}", self.shared.path.display()),
            source: Some(source),
        })?;
        *self.shared.source() = Some(Arc::new(source));
        Ok(())
    }

    fn activate(&self, activation: Activation) -> Result<(), ActivateError> {
        let found = activation.queues.len();
        let mut queues = activation.queues.into_iter();
        let queue = queues.next().ok_or(ActivateError::Queues { found, needed: 1 })?;
        let source = self.shared.source().clone().ok_or(ActivateError::NotAttached)?;
        self.start(source)?;
        *self.shared.active() = Some(Active {
            memory: activation.memory,
            queue: queue.queue,
            doorbell: Arc::new(queue.doorbell),
            interrupt: activation.interrupt,
            broken: false,
        });
        self.shared.wake();
        Ok(())
    }

    fn reset(&self) {
        // The lock is the worker's while it copies.
        *self.shared.active() = None;
        self.shared.wake();
    }

    fn park(&self) {
        self.shared.turnstile.park();
    }

    fn unpark(&self) {
        self.shared.turnstile.unpark();
    }

    fn save(&self) -> DeviceState {
        DeviceState::Stateless
    }

    fn check(&self, state: &DeviceState) -> Result<(), StateError> {
        match state {
            DeviceState::Stateless => Ok(()),
            #[allow(unreachable_patterns, reason = "other devices have states of their own")]
            _ => Err(StateError::Kind),
        }
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        self.check(state)
    }

    fn queue_positions(&self) -> Vec<QueuePosition> {
        let position = |active: &Active| QueuePosition {
            index: 0,
            next_avail: active.queue.next_avail(),
            next_used: active.queue.next_used(),
        };
        self.shared.active().as_ref().map(position).into_iter().collect()
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("requests", self.shared.requests.get()),
            ("bytes", self.shared.bytes.get()),
            ("source_errors", self.shared.source_errors.get()),
        ]
    }
}

impl Drop for Rng {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::Release);
        *self.shared.active() = None;
        self.shared.turnstile.unpark();
        self.shared.wake();
        let worker = self.worker.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(worker) = worker {
            // The release profile has no panics to report, and nothing could be done about one.
            let _ = worker.join();
        }
    }
}

/// What the source has.
#[derive(Debug, PartialEq, Eq)]
enum Source {
    Ready,
    /// It says when it has something.
    Later,
    /// It is at its end, or broken: the next doorbell is the time to try again.
    Failed,
}

/// What became of a look into the ring.
#[derive(Debug, PartialEq, Eq)]
enum Served {
    /// A buffer was filled; there may be more.
    One,
    /// The ring is empty; the doorbell will ring.
    Empty,
    /// Nothing is active.
    Idle,
}

impl Shared {
    fn work(&self, mut source: &File, mut waits: Waits) {
        let mut stock = Vec::with_capacity(STOCK_BYTES);
        while !self.ends.load(Ordering::Acquire) {
            let doorbell = self.active().as_ref().map(|active| Arc::clone(&active.doorbell));
            let waited = match waits.listen(doorbell) {
                Ok(()) => self.turn(&mut source, &mut stock, &waits),
                Err(error) => Err(error),
            };
            if let Err(error) = waited {
                tracing::error!("{} has ended: {error}", self.id);
                return;
            }
        }
    }

    /// Serves the ring until it is empty, then waits for a doorbell.
    fn turn(&self, source: &mut &File, stock: &mut Vec<u8>, waits: &Waits) -> io::Result<()> {
        loop {
            // With nothing to give, the ring waits.
            match self.refill(source, stock) {
                Source::Ready => {}
                Source::Later => return waits.wait(Some(source)),
                Source::Failed => return waits.wait(None),
            }
            match self.serve(stock) {
                Served::One => {}
                Served::Empty | Served::Idle => return waits.wait(None),
            }
            if self.ends.load(Ordering::Acquire) {
                return Ok(());
            }
        }
    }

    /// Reads ahead, if nothing is left.
    fn refill(&self, source: &mut &File, stock: &mut Vec<u8>) -> Source {
        if !stock.is_empty() {
            return Source::Ready;
        }
        stock.resize(STOCK_BYTES, 0);
        let read = source.read(stock);
        stock.truncate(*read.as_ref().unwrap_or(&0));
        match read {
            Ok(1..) => Source::Ready,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Source::Later,
            Ok(0) | Err(_) => {
                self.source_errors.add(1);
                Source::Failed
            }
        }
    }

    /// Fills one buffer, under one pass.
    fn serve(&self, stock: &mut Vec<u8>) -> Served {
        let _pass = self.turnstile.enter();
        let mut active = self.active();
        let Some(active) = active.as_mut().filter(|active| !active.broken) else {
            return Served::Idle;
        };
        match active.fill(stock) {
            Ok(Some(len)) => {
                self.requests.add(1);
                self.bytes.add_len(len);
                Served::One
            }
            Ok(None) => Served::Empty,
            Err(why) => {
                active.broken = true;
                active.interrupt.needs_reset(&why);
                Served::Idle
            }
        }
    }

    fn active(&self) -> MutexGuard<'_, Option<Active>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn source(&self) -> MutexGuard<'_, Option<Arc<File>>> {
        self.source.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // A counter at its end wakes as well.
        let _ = self.changed.write(1);
    }
}

impl Active {
    /// Takes the next buffer and fills it from the end of `stock`, as far as both go. `None` if
    /// there is no buffer, and then the next one rings the doorbell.
    fn fill(&mut self, stock: &mut Vec<u8>) -> Result<Option<usize>, String> {
        let memory = &*self.memory;
        let failed = |error: virtio_queue::Error| format!("its ring is not usable: {error}");
        let mut chain = self.queue.iter(memory).map_err(failed)?.next();
        let unusable = |error: RingError| format!("its ring is not usable: {error}");
        if chain.is_none() && enable_notification(&mut self.queue, memory).map_err(unusable)? {
            chain = self.queue.iter(memory).map_err(failed)?.next();
        }
        let Some(chain) = chain else { return Ok(None) };
        let head = chain.head_index();
        let mut filled = 0;
        for descriptor in chain.writable() {
            let room = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
            let rest = stock.len().saturating_sub(room);
            let bytes = stock.split_off(rest);
            memory
                .write_slice(&bytes, descriptor.addr())
                .map_err(|error| format!("a buffer is not in guest memory: {error}"))?;
            filled += bytes.len();
            if stock.is_empty() {
                break;
            }
        }
        let used = u32::try_from(filled).unwrap_or(u32::MAX);
        self.queue.add_used(memory, head, used).map_err(failed)?;
        if self.queue.needs_notification(memory).map_err(failed)? {
            self.interrupt.queue(0);
        }
        Ok(Some(filled))
    }
}

/// What the worker waits for.
struct Waits {
    epoll: Epoll,
    changed: EventFd,
    doorbell: Option<Arc<EventFd>>,
}

impl Waits {
    fn new(shared: &Shared) -> io::Result<Self> {
        let this =
            Self { epoll: Epoll::new()?, changed: shared.changed.try_clone()?, doorbell: None };
        this.watch(ControlOperation::Add, this.changed.as_raw_fd(), EventSet::IN)?;
        Ok(this)
    }

    /// Listens to this doorbell from now on, and to no other.
    fn listen(&mut self, doorbell: Option<Arc<EventFd>>) -> io::Result<()> {
        let same = match (&self.doorbell, &doorbell) {
            (Some(old), Some(new)) => Arc::ptr_eq(old, new),
            (None, None) => true,
            _ => false,
        };
        if same {
            return Ok(());
        }
        if let Some(old) = self.doorbell.take() {
            self.watch(ControlOperation::Delete, old.as_raw_fd(), EventSet::IN)?;
        }
        if let Some(new) = doorbell {
            self.watch(ControlOperation::Add, new.as_raw_fd(), EventSet::IN)?;
            self.doorbell = Some(new);
        }
        Ok(())
    }

    /// Waits for a doorbell, a change, or for `source` to have something.
    fn wait(&self, source: Option<&File>) -> io::Result<()> {
        // A regular file cannot be waited for, and at its end it has nothing to wait for.
        let watched = source.filter(|source| {
            self.watch(ControlOperation::Add, source.as_raw_fd(), EventSet::IN).is_ok()
        });
        let mut events = [EpollEvent::default(); 3];
        let waited = self.epoll.wait(-1, &mut events);
        if let Some(source) = watched {
            self.watch(ControlOperation::Delete, source.as_raw_fd(), EventSet::IN)?;
        }
        match waited {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
        for event in [Some(&self.changed), self.doorbell.as_deref()].into_iter().flatten() {
            // Nothing there is no error: another one of the three was.
            let _ = event.read();
        }
        Ok(())
    }

    fn watch(&self, what: ControlOperation, fd: i32, events: EventSet) -> io::Result<()> {
        let data = u64::try_from(fd).unwrap_or(u64::MAX);
        self.epoll.ctl(what, fd, EpollEvent::new(events, data))
    }
}
