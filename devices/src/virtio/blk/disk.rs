//! The device: what the transport and the VMM see of a disk.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use tracing::warn;

use super::config::{BlkConfig, BlkError};
use super::engine::{Engine, KeptDurable, ThreadPool};
use super::image::{Image, OpenError, open};
use super::layout::{SECTOR_SHIFT, config_space, features};
use super::session::Session;
use super::state::{BlkQueueState, BlkState};
use super::worker::{Core, rules, run};
use super::write_log::WriteLog;
use crate::virtio::device::{
    ActivateError, Activation, AttachError, DeviceType, QueuePosition, StateError, VirtioDevice,
};
use crate::virtio::state::DeviceState;

/// Threads for the host's I/O: for each queue, at least, and at most.
const THREADS_PER_QUEUE: u16 = 4;
const THREADS_MAX: u16 = 16;

/// How long a disk that goes away waits for the host, so that its image can be used at once.
const CLOSE_PATIENCE: Duration = Duration::from_secs(10);

/// Whether the disk works, and what it will go on from.
#[derive(Default)]
struct Life {
    session: Option<Arc<Session>>,
    restored: Option<BlkState>,
}

/// A virtio block device. See the module's documentation.
pub struct Disk {
    config: BlkConfig,
    pub(super) core: Arc<Core>,
    /// Of the image, when it was looked at.
    image_sectors: u64,
    /// What the guest is told: the image's, or less after a restore.
    capacity_sectors: AtomicU64,
    life: Mutex<Life>,
    /// Nobody but [`Disk::turn`] works on the rings.
    #[cfg(feature = "fuzzing")]
    by_hand: std::sync::atomic::AtomicBool,
}

impl Disk {
    /// A disk over the image of `config`, which is looked at and not locked.
    pub fn new(config: BlkConfig) -> Result<Self, BlkError> {
        let image_sectors = config.validate()? >> SECTOR_SHIFT;
        Ok(Self {
            core: Arc::new(Core::new(config.identification())),
            image_sectors,
            capacity_sectors: AtomicU64::new(image_sectors),
            life: Mutex::default(),
            #[cfg(feature = "fuzzing")]
            by_hand: std::sync::atomic::AtomicBool::new(false),
            config,
        })
    }

    /// Attaches something else than the configured image, of at least the same size.
    pub fn attach_image(&self, image: &Arc<dyn Image>) -> Result<(), AttachError> {
        if self.core.engine.get().is_some() {
            // Before there are threads that would hold the image for a moment.
            return Err(self.attached_before());
        }
        let what = || format!("Cannot start the threads of disk {}", self.config.id);
        let count = self.config.num_queues.saturating_mul(THREADS_PER_QUEUE).min(THREADS_MAX);
        let names = (0..count).map(|at| self.config.thread_name(&format!("_io{at}"))).collect();
        let pool = ThreadPool::start(image, names, &self.core.durability)
            .map_err(|source| AttachError { what: what(), source: Some(source) })?;
        self.attach_engine(Arc::new(pool))?;
        *self.image_slot() = Some(Arc::clone(image));
        Ok(())
    }

    fn image_slot(&self) -> MutexGuard<'_, Option<Arc<dyn Image>>> {
        self.core.image.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The slot's share of the image; who is using it at this moment has one too.
    pub(super) fn let_go_of_image(&self) {
        let image = self.image_slot().take();
        // Not under the slot's lock: to close a file may take its time.
        drop(image);
    }

    /// Opens and locks the configured image, before the disk is attached: for a copy of another
    /// host's image that is written from outside first. Does nothing if that was done.
    pub fn claim(&self) -> Result<Arc<dyn Image>, AttachError> {
        let mut slot = self.image_slot();
        if let Some(image) = &*slot {
            return Ok(Arc::clone(image));
        }
        if self.core.engine.get().is_some() {
            // It was given up for good, see [`Disk::discard`]; the lock may be the peer's.
            return Err(self.attached_before());
        }
        let len = self.image_sectors << SECTOR_SHIFT;
        let image: Arc<dyn Image> = Arc::new(open(&self.config, len).map_err(attach_error)?);
        Ok(Arc::clone(slot.insert(image)))
    }

    pub fn is_readonly(&self) -> bool {
        self.config.readonly
    }

    /// Whole sectors of the image, whatever the guest is told.
    pub fn image_bytes(&self) -> u64 {
        self.image_sectors << SECTOR_SHIFT
    }

    /// Attaches an engine. An image that it works on is locked already.
    pub fn attach_engine(&self, engine: Arc<dyn Engine>) -> Result<(), AttachError> {
        self.core.engine.set(engine).map_err(|engine| {
            engine.close(Duration::ZERO);
            self.attached_before()
        })
    }

    fn attached_before(&self) -> AttachError {
        AttachError { what: format!("Disk {} was attached before", self.config.id), source: None }
    }

    /// The log has room again, see [`WriteLog::reserve`].
    pub fn wake(&self) {
        self.wake_worker();
    }

    /// Records every change that ends from now on in `log`, or in none.
    pub fn set_write_log(&self, log: Option<Arc<dyn WriteLog>>) {
        *self.core.log.write().unwrap_or_else(PoisonError::into_inner) = log;
    }

    /// Makes durable what was answered, and from now on each change before it is answered: whoever goes
    /// on with the guest elsewhere has its memory, in which these pages are clean, and not this host's
    /// page cache. Waits for the host's storage.
    ///
    /// # Errors
    /// What the storage says; nothing is kept then.
    pub fn keep_durable(&self) -> io::Result<KeptDurable> {
        let kept = self.core.durability.keep();
        let image = self.image_slot().clone();
        image.map_or(Ok(()), |image| image.flush())?;
        Ok(kept)
    }

    /// Bytes of the disk that the guest sees.
    pub fn capacity_bytes(&self) -> u64 {
        self.capacity_sectors.load(Ordering::Relaxed) << SECTOR_SHIFT
    }

    /// Makes a worker look for what may go to the host.
    pub(super) fn wake_worker(&self) {
        if let Some(session) = &self.life().session
            && let Some(queue) = session.queues.first()
        {
            queue.wake();
        }
    }

    fn life(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start_workers(&self, session: &Arc<Session>) -> Result<(), ActivateError> {
        let capacity = self.capacity_sectors.load(Ordering::Relaxed);
        let rules = rules(session.features, capacity, &self.config);
        #[cfg(feature = "fuzzing")]
        if self.by_hand.load(Ordering::Relaxed) {
            return Ok(());
        }
        for (at, queue) in session.queues.iter().enumerate() {
            let (core, session) = (Arc::clone(&self.core), Arc::clone(session));
            thread::Builder::new()
                .name(self.config.thread_name(&format!("_q{}", queue.index())))
                .spawn(move || run(&core, &session, at, rules))
                .map_err(ActivateError::Thread)?;
        }
        Ok(())
    }

    fn end_session(&self, session: &Session) {
        session.close();
        self.core.schedule().abandon(session.id());
    }

    /// The state of a session.
    fn saved(&self, session: &Session) -> BlkState {
        let schedule = self.core.schedule();
        let stopped = session.stopped();
        let queues = session.queues.iter().map(|queue| {
            let mut in_flight = Vec::new();
            if !stopped {
                let of_queue =
                    schedule.of(session.id()).filter(|work| work.queue_index() == queue.index());
                in_flight.extend(of_queue.map(|work| work.head));
                // They are older than what the ring holds, and younger than what was read again.
                in_flight.extend(queue.again());
            }
            BlkQueueState { position: queue.position(), in_flight }
        });
        BlkState {
            capacity_sectors: self.capacity_sectors.load(Ordering::Relaxed),
            stopped,
            queues: queues.collect(),
        }
    }
}

impl VirtioDevice for Disk {
    fn id(&self) -> &str {
        &self.config.id
    }

    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.config.queue_size; usize::from(self.config.num_queues)]
    }

    fn features(&self) -> u64 {
        features(&self.config)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let space = config_space(&self.config, self.capacity_sectors.load(Ordering::Relaxed));
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(space.len());
        let fields = space[from..].iter().copied().chain(std::iter::repeat(0));
        data.iter_mut().zip(fields).for_each(|(byte, field)| *byte = field);
    }

    fn attach(&self) -> Result<(), AttachError> {
        self.attach_image(&self.claim()?)
    }

    fn activate(&self, activation: Activation) -> Result<(), ActivateError> {
        if self.core.engine.get().is_none() {
            return Err(ActivateError::NotAttached);
        }
        if activation.queues.is_empty() {
            return Err(ActivateError::Queues { found: 0, needed: 1 });
        }
        let mut life = self.life();
        let restored = life.restored.as_ref();
        let stopped = restored.is_some_and(|state| state.stopped);
        let queues = restored.map(|state| state.queues.as_slice()).unwrap_or_default();
        let session = Arc::new(Session::new(activation, queues, stopped)?);
        if let Err(error) = self.start_workers(&session) {
            self.end_session(&session);
            return Err(error);
        }
        life.restored = None;
        if let Some(before) = life.session.replace(session) {
            self.end_session(&before);
        }
        Ok(())
    }

    fn reset(&self) {
        let mut life = self.life();
        life.restored = None;
        if let Some(session) = life.session.take() {
            self.end_session(&session);
        }
    }

    fn park(&self) {
        self.core.turnstile.park();
    }

    fn unpark(&self) {
        self.core.turnstile.unpark();
    }

    fn save(&self) -> DeviceState {
        let life = self.life();
        let state = match (&life.session, &life.restored) {
            (Some(session), _) => self.saved(session),
            (None, Some(restored)) => restored.clone(),
            (None, None) => BlkState {
                capacity_sectors: self.capacity_sectors.load(Ordering::Relaxed),
                ..BlkState::default()
            },
        };
        DeviceState::Block(state)
    }

    fn check(&self, state: &DeviceState) -> Result<(), StateError> {
        let DeviceState::Block(state) = state else { return Err(StateError::Kind) };
        state.validate(&self.config, self.image_sectors)
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        self.check(state)?;
        let DeviceState::Block(state) = state else { return Err(StateError::Kind) };
        let mut life = self.life();
        if life.session.is_some() {
            return Err(StateError::Unusable("the disk is active".into()));
        }
        self.capacity_sectors.store(state.capacity_sectors, Ordering::Relaxed);
        life.restored = Some(state.clone());
        Ok(())
    }

    fn queue_positions(&self) -> Vec<QueuePosition> {
        self.life().session.iter().flat_map(|session| session.positions()).collect()
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let counters = &self.core.counters;
        vec![
            ("read_bytes", counters.read_bytes.get()),
            ("write_bytes", counters.write_bytes.get()),
            ("read_ops", counters.read_ops.get()),
            ("write_ops", counters.write_ops.get()),
            ("flush_ops", counters.flush_ops.get()),
            ("discard_ops", counters.discard_ops.get()),
            ("write_zeroes_ops", counters.write_zeroes_ops.get()),
            ("errors", counters.errors.get()),
            ("held_ops", counters.held_ops.get()),
            ("held_bytes", counters.held_bytes.get()),
            ("logged_ops", counters.logged_ops.get()),
            ("logged_bytes", counters.logged_bytes.get()),
        ]
    }
}

impl Drop for Disk {
    /// Ends the threads. Nothing of the guest is touched from here on, so those that wait for the
    /// end of a park may go.
    fn drop(&mut self) {
        self.reset();
        self.core.turnstile.unpark();
        if let Some(engine) = self.core.engine.get()
            && !engine.close(CLOSE_PATIENCE)
        {
            warn!(disk = self.config.id, "The host does not finish a disk's I/O");
        }
        // A worker that is on its way out holds the core, and must not hold the image's lock.
        self.let_go_of_image();
    }
}

#[cfg(feature = "fuzzing")]
impl Disk {
    /// From its next activation on the disk has no threads: [`Disk::turn`] does their work.
    pub fn work_by_hand(&self) {
        self.by_hand.store(true, Ordering::Relaxed);
    }

    /// Takes a worker's turn with each queue. True if there is more to do. Not while parked.
    pub fn turn(&self) -> bool {
        let Some(session) = self.life().session.clone() else { return false };
        let capacity = self.capacity_sectors.load(Ordering::Relaxed);
        let rules = rules(session.features, capacity, &self.config);
        let turn = |at| self.core.turn(&session, at, rules) == Some(true);
        (0..session.queues.len()).fold(false, |more, at| more | turn(at))
    }
}

/// As the transport's error: the image's path in front, the cause behind.
fn attach_error(error: OpenError) -> AttachError {
    let what = error.to_string();
    let source = match error {
        OpenError::Open(_, source) | OpenError::Lock(_, source) | OpenError::Direct(_, source) => {
            Some(source)
        }
        OpenError::Locked(_) | OpenError::Size(..) => None,
    };
    AttachError { what, source }
}
