//! What the worker, the input thread and the device share.
//!
//! Locks, in this order: a pass, the slot. Neither is held during host I/O.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_queue::QueueT;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::rx::{self, RxError};
use crate::console::{Input, Room};
use crate::counters::{Counter, Counters};
use crate::output_gate::{OutputGate, Waker};
use crate::virtio::chain_of;
use crate::virtio::device::{ActiveQueue, GuestMemory, Interrupt, QueuePosition};
use crate::virtio::turnstile::Turnstile;

/// What woke the worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Token {
    /// Something else than the rings has changed.
    Wake = 0,
    Receive = 1,
    Transmit = 2,
}

/// What a driver has set up.
pub struct Active {
    pub memory: Arc<GuestMemory>,
    pub interrupt: Arc<dyn Interrupt>,
    pub receive: Option<ActiveQueue>,
    pub transmit: Option<ActiveQueue>,
    /// The driver looks at the console's size.
    pub sized: bool,
    /// A ring made no sense: nothing happens until a reset.
    pub broken: bool,
}

impl Active {
    /// Where its queues stand.
    pub fn positions(&self) -> impl Iterator<Item = QueuePosition> {
        self.queues().map(|(_, active)| QueuePosition {
            index: active.index,
            next_avail: active.queue.next_avail(),
            next_used: active.queue.next_used(),
        })
    }

    fn queues(&self) -> impl Iterator<Item = (Token, &ActiveQueue)> {
        let queues = [(Token::Receive, &self.receive), (Token::Transmit, &self.transmit)];
        queues.into_iter().filter_map(|(token, queue)| Some((token, queue.as_ref()?)))
    }
}

/// What changes under a pass.
#[derive(Default)]
pub struct Slot {
    pub active: Option<Active>,
    /// See [`super::state::ConsoleState::taken_bytes`].
    pub taken_bytes: u64,
    rx_scratch: rx::Scratch,
}

/// What the driver is to hear at the end of a pass.
#[derive(Clone, Copy, Debug)]
pub enum Notice {
    Queue(u16),
    Config,
}

/// See the module's documentation.
pub struct Shared {
    pub id: String,
    pub gate: Arc<OutputGate>,
    pub turnstile: Turnstile,
    slot: Mutex<Slot>,
    pub epoll: Epoll,
    wake: EventFd,
    pub ends: AtomicBool,
    /// Columns in the upper half, rows in the lower one.
    pub size: AtomicU32,
    /// The driver is to be told of the size.
    pub size_due: AtomicBool,
    room: Room,
    input_bytes: Counter,
    pub output_errors: Counter,
}

impl Shared {
    pub fn new(id: &str, gate: Arc<OutputGate>) -> io::Result<Self> {
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let epoll = Epoll::new()?;
        // Edges, here and at the doorbells: each signal is one, and nobody has to read.
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, Token::Wake as u64);
        epoll.ctl(ControlOperation::Add, wake.as_raw_fd(), event)?;
        Ok(Self {
            id: id.to_owned(),
            gate,
            turnstile: Turnstile::default(),
            slot: Mutex::default(),
            epoll,
            wake,
            ends: AtomicBool::new(false),
            size: AtomicU32::new(0),
            size_due: AtomicBool::new(false),
            room: Room::new()?,
            input_bytes: Counter::default(),
            output_errors: Counter::default(),
        })
    }

    /// Makes the worker look at what is not in the rings.
    pub fn wake(&self) {
        if let Err(error) = self.wake.write(1) {
            tracing::warn!("The worker of {} was not woken: {error}", self.id);
        }
    }

    /// The same, for a caller that outlives the device.
    pub fn waker(&self) -> io::Result<Waker> {
        let wake = self.wake.try_clone()?;
        Ok(Arc::new(move || {
            if let Err(error) = wake.write(1) {
                tracing::warn!("A console's worker was not woken: {error}");
            }
        }))
    }

    pub fn slot(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the worker its queues. On an error it has none.
    pub fn install(&self, active: Active) -> io::Result<()> {
        let mut slot = self.slot();
        for (token, queue) in active.queues() {
            let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
            let event = EpollEvent::new(events, token as u64);
            let doorbell = queue.doorbell.as_raw_fd();
            if let Err(error) = self.epoll.ctl(ControlOperation::Add, doorbell, event) {
                self.forget(&active);
                return Err(error);
            }
        }
        slot.active = Some(active);
        drop(slot);
        self.wake();
        Ok(())
    }

    /// Takes the queues away. On return nobody touches them any more.
    pub fn clear(&self) {
        let mut slot = self.slot();
        slot.taken_bytes = 0;
        if let Some(active) = slot.active.take() {
            self.forget(&active);
        }
    }

    /// The transport may hold copies of the descriptors, so closing ours does not end the watch.
    fn forget(&self, active: &Active) {
        for (_, queue) in active.queues() {
            let doorbell = queue.doorbell.as_raw_fd();
            let event = EpollEvent::default();
            if let Err(error) = self.epoll.ctl(ControlOperation::Delete, doorbell, event) {
                tracing::debug!("A doorbell was not watched: {error}");
            }
        }
    }

    /// Does something with the queues under a pass. None if the device is parked, has no queues or
    /// is broken; an error breaks it.
    ///
    /// The driver hears of it in the same pass, but when the slot is free again: a transport may
    /// wait for it, to reset the device, with a lock held that its interrupts need.
    pub fn with_active<R, E: std::error::Error>(
        &self,
        f: impl FnOnce(&mut Active, &mut u64, &mut rx::Scratch) -> Result<(R, Option<Notice>), E>,
    ) -> Option<R> {
        let _pass = self.turnstile.try_enter()?;
        let mut slot = self.slot();
        let Slot { active, taken_bytes, rx_scratch } = &mut *slot;
        let active = active.as_mut().filter(|active| !active.broken)?;
        let interrupt = Arc::clone(&active.interrupt);
        match f(active, taken_bytes, rx_scratch) {
            Ok((result, notice)) => {
                drop(slot);
                match notice {
                    Some(Notice::Queue(index)) => interrupt.queue(index),
                    Some(Notice::Config) => interrupt.config(),
                    None => {}
                }
                Some(result)
            }
            Err(error) => {
                active.broken = true;
                drop(slot);
                interrupt.needs_reset(&chain_of(&error));
                None
            }
        }
    }

    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut counters = self.gate.counters();
        counters.push(("output_errors", self.output_errors.get()));
        counters.push(("input_bytes", self.input_bytes.get()));
        counters
    }
}

impl Input for Shared {
    fn take(&self, bytes: &[u8]) -> usize {
        // First of all: whoever makes room from here on tells.
        self.room.set_wanted(true);
        let taken = self.with_active(|active, _, scratch| {
            let Some(receive) = &mut active.receive else { return Ok::<_, RxError>((0, None)) };
            let (taken, interrupt) =
                rx::deliver(&mut receive.queue, &active.memory, bytes, scratch)?;
            Ok((taken, interrupt.then_some(Notice::Queue(receive.index))))
        });
        let taken = taken.unwrap_or(0);
        if taken == bytes.len() {
            self.room.set_wanted(false);
        }
        self.input_bytes.add_len(taken);
        taken
    }

    fn room(&self) -> &Room {
        &self.room
    }
}
