//! One activation of a disk: from the driver's DRIVER_OK to its reset.
//!
//! ```text
//!   open ───────────────▶ closed          (reset; final)
//!     └──▶ stopped ─────────┘             (a ring made no sense: DEVICE_NEEDS_RESET)
//! ```
//!
//! What always holds: guest memory and rings are touched by who is inside the session
//! ([`Session::enter`]) only. [`Session::close`] waits until nobody is, and lets nobody in after
//! that; so the host's I/O of a closed session ends without effect on the guest. Inside, nobody
//! waits for the host, for parking or for a way into the session.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use tracing::{debug, warn};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::chain::Table;
use super::layout::{F_EVENT_IDX, F_INDIRECT_DESC};
use super::request::Status;
use super::state::BlkQueueState;
use crate::virtio::device::{
    ActivateError, Activation, ActiveQueue, GuestMemory, Interrupt, QueuePosition,
};
use crate::virtio::ring::enable_notification;

/// A ring, and which of its heads are in flight.
struct Ring {
    queue: Queue,
    /// Heads that a restored state had in flight and that were not read again yet.
    again: VecDeque<u16>,
    /// By head: taken and not answered.
    in_flight: Vec<bool>,
}

/// A queue of a session.
pub(super) struct SessionQueue {
    index: u16,
    ring: Mutex<Ring>,
    events: Epoll,
    /// Ready for the kernel to look at as long as `events` watches it.
    _doorbell: EventFd,
    /// Makes the queue's worker look around.
    wake: EventFd,
}

/// What a queue's worker finds.
pub(super) enum Taken {
    /// A head, and where its chain is.
    Head(u16, Table),
    /// Nothing; the driver rings when there is.
    Empty,
}

/// See the module's documentation.
pub(super) struct Session {
    id: u64,
    pub(super) memory: Arc<GuestMemory>,
    pub(super) features: u64,
    interrupt: Arc<dyn Interrupt>,
    open: RwLock<bool>,
    stopped: AtomicBool,
    pub(super) queues: Vec<SessionQueue>,
}

/// A place inside a session.
pub(super) struct Inside<'a> {
    session: &'a Session,
    _open: RwLockReadGuard<'a, bool>,
}

static NEXT_ID: AtomicU64 = AtomicU64::new(0);

impl Session {
    /// A session over what the driver has set up, going on from `restored` where there is one.
    pub(super) fn new(
        activation: Activation,
        restored: &[BlkQueueState],
        stopped: bool,
    ) -> Result<Self, ActivateError> {
        let Activation { memory, features, queues, interrupt } = activation;
        let mut list = Vec::with_capacity(queues.len());
        for active in queues {
            let state = restored.iter().find(|state| state.position.index == active.index);
            list.push(SessionQueue::new(active, features, state).map_err(ActivateError::Events)?);
        }
        Ok(Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            memory,
            features,
            interrupt,
            open: RwLock::new(true),
            stopped: AtomicBool::new(stopped),
            queues: list,
        })
    }

    /// Differs from that of every other session of the process.
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// Goes in, unless the session is closed. Under a pass, and not while inside.
    pub(super) fn enter(&self) -> Option<Inside<'_>> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        open.then_some(Inside { session: self, _open: open })
    }

    /// Waits until nobody is inside, and ends the workers.
    pub(super) fn close(&self) {
        *self.open.write().unwrap_or_else(PoisonError::into_inner) = false;
        for queue in &self.queues {
            queue.wake();
        }
    }

    /// The device waits for its reset.
    pub(super) fn stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    /// Where the queues stand. While nobody is inside.
    pub(super) fn positions(&self) -> impl Iterator<Item = QueuePosition> {
        self.queues.iter().map(SessionQueue::position)
    }
}

impl Inside<'_> {
    /// Takes the next head of a queue.
    pub(super) fn take(&self, at: usize) -> Taken {
        if self.session.stopped() {
            return Taken::Empty;
        }
        let taken = self.session.queues[at].lock().take(self.session);
        taken.unwrap_or_else(|why| {
            self.stop(at, why);
            Taken::Empty
        })
    }

    /// Answers a request: its status, then its place in the used ring. `len` is what was written
    /// in all; a chain without a status is given back with nothing written.
    pub(super) fn answer(
        &self,
        at: usize,
        head: u16,
        status: Option<(GuestAddress, Status)>,
        len: u32,
    ) {
        if self.session.stopped() {
            return;
        }
        let memory = self.session.memory.as_ref();
        if let Some((address, status)) = status
            && let Err(error) = memory.write_obj(status.byte(), address)
        {
            debug!(%error, "A status byte that was in guest memory is not any more");
        }
        let queue = &self.session.queues[at];
        let told = queue.lock().answer(memory, head, len);
        match told {
            Ok(true) => self.session.interrupt.queue(queue.index),
            Ok(false) => {}
            Err(why) => self.stop(at, why),
        }
    }

    /// Nothing is taken or answered any more until the driver resets the device.
    fn stop(&self, at: usize, why: &str) {
        if !self.session.stopped.swap(true, Ordering::Relaxed) {
            let index = self.session.queues[at].index;
            // The transport tells it, as often as a guest may fill the log.
            debug!(queue = index, why, "A queue of a disk makes no sense, the disk stops");
            self.session.interrupt.needs_reset(why);
        }
    }
}

impl Ring {
    fn take(&mut self, session: &Session) -> Result<Taken, &'static str> {
        let memory = session.memory.as_ref();
        let head = match self.again.pop_front() {
            Some(head) => head,
            None => match self.pop(memory)? {
                Some(head) => head,
                None => return Ok(Taken::Empty),
            },
        };
        let place = self.in_flight.get_mut(usize::from(head));
        let place = place.ok_or("the available ring names no descriptor of the queue")?;
        if *place {
            return Err("the available ring names a chain that is in flight");
        }
        *place = true;
        let table = Table {
            address: GuestAddress(self.queue.desc_table()),
            size: self.queue.size(),
            indirect: session.features & F_INDIRECT_DESC != 0,
        };
        Ok(Taken::Head(head, table))
    }

    /// The next head of the available ring; the driver is asked to ring if there is none.
    fn pop(&mut self, memory: &GuestMemory) -> Result<Option<u16>, &'static str> {
        const WHY: &str = "the available ring does not make sense";
        for _ in 0..2 {
            let mut available = self.queue.iter(memory).map_err(|_| WHY)?;
            if let Some(chain) = available.next() {
                return Ok(Some(chain.head_index()));
            }
            // Again if something came between the look and the request.
            if !enable_notification(&mut self.queue, memory).map_err(|_| WHY)? {
                break;
            }
        }
        Ok(None)
    }

    /// True if the driver wants to be told.
    fn answer(&mut self, memory: &GuestMemory, head: u16, len: u32) -> Result<bool, &'static str> {
        const WHY: &str = "the used ring cannot be written";
        self.queue.add_used(memory, head, len).map_err(|_| WHY)?;
        if let Some(place) = self.in_flight.get_mut(usize::from(head)) {
            *place = false;
        }
        self.queue.needs_notification(memory).map_err(|_| WHY)
    }
}

impl SessionQueue {
    fn new(
        active: ActiveQueue,
        features: u64,
        restored: Option<&BlkQueueState>,
    ) -> io::Result<Self> {
        let ActiveQueue { index, mut queue, doorbell } = active;
        queue.set_event_idx(features & F_EVENT_IDX != 0);
        if let Some(state) = restored {
            queue.set_next_avail(state.position.next_avail);
            queue.set_next_used(state.position.next_used);
        }
        let wake = EventFd::new(EFD_NONBLOCK)?;
        let events = Epoll::new()?;
        for event in [&doorbell, &wake] {
            // Edges: every signal is one, nobody reads. So a worker that is about to end takes no
            // signal away from the one that comes after it.
            let edges = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
            events.ctl(ControlOperation::Add, event.as_raw_fd(), edges)?;
        }
        let ring = Ring {
            again: restored.map(|state| state.in_flight.clone()).unwrap_or_default().into(),
            in_flight: vec![false; usize::from(queue.size())],
            queue,
        };
        Ok(Self { index, ring: Mutex::new(ring), events, _doorbell: doorbell, wake })
    }

    pub(super) fn index(&self) -> u16 {
        self.index
    }

    /// Waits until the driver rings or [`SessionQueue::wake`] is called, or was since the last
    /// wait. False if that is impossible.
    pub(super) fn wait(&self) -> bool {
        loop {
            match self.events.wait(-1, &mut [EpollEvent::default(); 2]) {
                Ok(_) => return true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    warn!(%error, queue = self.index, "Cannot wait for a disk's events");
                    return false;
                }
            }
        }
    }

    /// Makes the queue's worker look around. Never blocks.
    pub(super) fn wake(&self) {
        // Fails only when 2^64 signals were not read; the edge is there then too.
        let _ = self.wake.write(1);
    }

    /// Heads that were in flight in a restored state and have not been read again.
    pub(super) fn again(&self) -> Vec<u16> {
        self.lock().again.iter().copied().collect()
    }

    pub(super) fn position(&self) -> QueuePosition {
        let ring = self.lock();
        QueuePosition {
            index: self.index,
            next_avail: ring.queue.next_avail(),
            next_used: ring.queue.next_used(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
