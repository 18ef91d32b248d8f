//! What the workers of one device share with it and with each other.
//!
//! Locks, in this order: a pass, a pair's slot, the control state. None is held during host I/O,
//! so whoever takes one waits for copying at most.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_queue::QueueT;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::control::ControlState;
use super::gate::TxGate;
use super::mac::MacAddress;
use crate::counters::Counter;
use crate::output_gate::Waker;
use crate::virtio::device::{ActiveQueue, GuestMemory, Interrupt, QueuePosition};
use crate::virtio::turnstile::Turnstile;

/// What woke a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Token {
    /// Something changed: look at everything.
    Wake = 0,
    Tap = 1,
    Timer = 2,
    Receive = 3,
    Transmit = 4,
    Control = 5,
}

impl Token {
    pub fn from_data(data: u64) -> Option<Self> {
        [Self::Wake, Self::Tap, Self::Timer, Self::Receive, Self::Transmit, Self::Control]
            .into_iter()
            .find(|token| *token as u64 == data)
    }
}

/// What happens to frames.
#[derive(Debug, Default)]
pub struct NetCounters {
    pub rx_frames: Counter,
    pub rx_bytes: Counter,
    /// Frames that the guest could not take.
    pub rx_dropped: Counter,
    /// Failed reads of the tap.
    pub rx_errors: Counter,
    pub tx_frames: Counter,
    pub tx_bytes: Counter,
    /// Frames that the tap refused.
    pub tx_dropped: Counter,
    /// Chains of the guest that are no frames.
    pub tx_errors: Counter,
    pub control_commands: Counter,
    pub control_errors: Counter,
    pub announcements: Counter,
}

impl NetCounters {
    pub fn list(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("rx_frames", self.rx_frames.get()),
            ("rx_bytes", self.rx_bytes.get()),
            ("rx_dropped", self.rx_dropped.get()),
            ("rx_errors", self.rx_errors.get()),
            ("tx_frames", self.tx_frames.get()),
            ("tx_bytes", self.tx_bytes.get()),
            ("tx_dropped", self.tx_dropped.get()),
            ("tx_errors", self.tx_errors.get()),
            ("control_commands", self.control_commands.get()),
            ("control_errors", self.control_errors.get()),
            ("announcements", self.announcements.get()),
        ]
    }
}

/// What a driver has set up for one pair.
pub struct ActivePair {
    pub memory: Arc<GuestMemory>,
    pub interrupt: Arc<dyn Interrupt>,
    pub features: u64,
    pub receive: Option<ActiveQueue>,
    pub transmit: Option<ActiveQueue>,
    /// Of the first pair only.
    pub control: Option<ActiveQueue>,
}

impl ActivePair {
    /// Where its queues stand.
    pub fn positions(&self) -> impl Iterator<Item = QueuePosition> {
        self.queues().map(|(_, active)| QueuePosition {
            index: active.index,
            next_avail: active.queue.next_avail(),
            next_used: active.queue.next_used(),
        })
    }

    fn queues(&self) -> impl Iterator<Item = (Token, &ActiveQueue)> {
        let tokens = [Token::Receive, Token::Transmit, Token::Control];
        let queues = [&self.receive, &self.transmit, &self.control];
        tokens.into_iter().zip(queues).filter_map(|(token, queue)| Some((token, queue.as_ref()?)))
    }
}

/// A queue pair and what its worker waits for.
pub struct Pair {
    slot: Mutex<Option<ActivePair>>,
    pub epoll: Epoll,
    wake: EventFd,
}

impl Pair {
    pub fn new() -> io::Result<Self> {
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let epoll = Epoll::new()?;
        // Edges, here and at the doorbells: each signal is one, and nobody has to read, so that
        // no event of a queue that is gone can be mistaken for one that is there.
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let event = EpollEvent::new(events, Token::Wake as u64);
        epoll.ctl(ControlOperation::Add, wake.as_raw_fd(), event)?;
        Ok(Self { slot: Mutex::new(None), epoll, wake })
    }

    /// Makes the worker look at everything.
    pub fn wake(&self) {
        if let Err(error) = self.wake.write(1) {
            tracing::warn!("A network worker was not woken: {error}");
        }
    }

    /// The same, for a caller that outlives the pair.
    pub fn waker(&self) -> io::Result<Waker> {
        let wake = self.wake.try_clone()?;
        Ok(Arc::new(move || {
            if let Err(error) = wake.write(1) {
                tracing::warn!("A network worker was not woken: {error}");
            }
        }))
    }

    /// Gives the worker its queues. On an error it has none.
    pub fn install(&self, active: ActivePair) -> io::Result<()> {
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
        *slot = Some(active);
        drop(slot);
        self.wake();
        Ok(())
    }

    /// Takes the queues away. On return the worker does not touch them any more.
    pub fn clear(&self) {
        if let Some(active) = self.slot().take() {
            self.forget(&active);
        }
    }

    /// The transport may hold copies of the descriptors, so closing ours does not end the watch.
    fn forget(&self, active: &ActivePair) {
        for (_, queue) in active.queues() {
            let doorbell = queue.doorbell.as_raw_fd();
            let event = EpollEvent::default();
            if let Err(error) = self.epoll.ctl(ControlOperation::Delete, doorbell, event) {
                tracing::debug!("A doorbell was not watched: {error}");
            }
        }
    }

    pub fn slot(&self) -> MutexGuard<'_, Option<ActivePair>> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See the module's documentation.
pub struct Shared {
    pub id: String,
    pub turnstile: Turnstile,
    pub gate: Arc<TxGate>,
    pub pairs: Vec<Pair>,
    control: Mutex<ControlState>,
    mac: Mutex<MacAddress>,
    pub counters: NetCounters,
    /// Queues of the tap that carry traffic: those of the pairs in use.
    pub taps_enabled: AtomicUsize,
    /// A ring made no sense; nothing is answered until the reset.
    pub broken: AtomicBool,
    /// The world shall be told where the guest is.
    pub announce_frames: AtomicBool,
    /// The guest shall be asked to announce itself.
    pub announce_guest: AtomicBool,
    pub stop: AtomicBool,
}

impl Shared {
    pub fn new(id: String, gate: Arc<TxGate>, pairs: Vec<Pair>, mac: MacAddress) -> Self {
        Self {
            id,
            turnstile: Turnstile::default(),
            gate,
            pairs,
            control: Mutex::default(),
            mac: Mutex::new(mac),
            counters: NetCounters::default(),
            taps_enabled: AtomicUsize::new(0),
            broken: AtomicBool::new(false),
            announce_frames: AtomicBool::new(false),
            announce_guest: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        }
    }

    pub fn control(&self) -> MutexGuard<'_, ControlState> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn mac(&self) -> MacAddress {
        *self.mac.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn set_mac(&self, mac: MacAddress) {
        *self.mac.lock().unwrap_or_else(PoisonError::into_inner) = mac;
    }

    pub fn pairs_max(&self) -> u16 {
        u16::try_from(self.pairs.len()).unwrap_or(u16::MAX)
    }

    pub fn wake_all(&self) {
        for pair in &self.pairs {
            pair.wake();
        }
    }
}
