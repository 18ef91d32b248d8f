//! The network card (virtio 1.2, section 5.1) on a tap.
//!
//! ```text
//!   guest's rings ──copy, under a pass──▶ gate ──after its epoch's commit──▶ tap ──▶ world
//!        ▲                                                                    │
//!        └──────copy, under a pass──── buffer of the VMM ◀──── at once ───────┘
//! ```
//!
//! What enters: a [`NetOptions`], a driver's queues, frames of the world. What leaves: frames of
//! the guest, past the [`TxGate`]; counters; a [`NetState`]. What always holds:
//!
//! - A frame is answered to the guest when it is in the gate, so the state has it in the ring or
//!   the gate has it, and the gate lets nothing of an epoch out before that epoch's commit.
//! - vCPU threads do no I/O: each queue pair has a thread, which never blocks but in its wait.
//! - [`Net::new`] touches nothing of the host: a backup builds the device, and opens the tap when
//!   it takes over.
//! - What waits is bounded: the gate's limits, and one received frame for each pair.

/// When announcements are sent.
mod announce;
/// Workers without threads.
#[cfg(feature = "fuzzing")]
pub mod by_hand;
/// Commands of the driver.
mod control;
/// Feature bits and configuration space.
mod features;
/// Frames and their header.
pub mod frame;
/// Holds frames until their epoch is committed.
pub mod gate;
/// What the driver chose, applied to the tap.
mod host;
/// Ethernet addresses.
pub mod mac;
/// Towards the guest.
mod rx;
/// What the workers share.
mod shared;
/// Saved form.
pub mod state;
/// Towards the host.
pub mod tap;
/// From the guest.
mod tx;
/// The threads.
mod worker;

use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use thiserror::Error;
use virtio_queue::QueueT;

use self::control::ControlState;
use self::features::{ConfigSpace, MQ};
pub use self::features::{GuestOffloads, Offloads};
use self::gate::{Limits, TxGate};
use self::mac::MacAddress;
use self::shared::{ActivePair, Pair, Shared};
use self::state::NetState;
use self::tap::{TapQueue, TapSettings, TapSource};
use self::worker::Worker;
use super::device::{
    ActivateError, Activation, ActiveQueue, AttachError, DeviceType, QueuePosition, StateError,
    VirtioDevice,
};
use super::state::DeviceState;
use crate::counters::Counters;

/// Most queue pairs (5.1.4.1 allows 32768; a tap of Linux has 256 queues).
pub const QUEUE_PAIRS_MAX: u16 = 256;
/// Smallest MTU that a device may name (5.1.4.1).
pub const MTU_MIN: u16 = 68;

/// How a network card shall be.
#[derive(Debug)]
pub struct NetOptions {
    /// Its name, and its threads'.
    pub id: String,
    pub tap: TapSource,
    /// The guest's address. The same on both hosts.
    pub mac: MacAddress,
    /// Longest packet, told to the guest and set on the tap.
    pub mtu: Option<u16>,
    /// The host's end. Its `mtu` is that above.
    pub host: TapSettings,
    /// Pairs of a receive and a transmit queue.
    pub queue_pairs: u16,
    /// Of each queue, a power of two.
    pub queue_size: u16,
    pub offloads: Offloads,
    pub limits: Limits,
}

/// A network card cannot be built.
#[derive(Debug, Error)]
pub enum NetError {
    #[error("Network device {id}: {pairs} queue pairs, 1 to {QUEUE_PAIRS_MAX} are possible")]
    QueuePairs { id: String, pairs: u16 },
    #[error("Network device {id}: a queue size of {size} is no power of two from 2 to 32768")]
    QueueSize { id: String, size: u16 },
    #[error("Network device {id}: an MTU of {mtu} is less than {MTU_MIN}")]
    Mtu { id: String, mtu: u16 },
    #[error("Network device {id}: cannot make the descriptors that wake its threads")]
    Events { id: String, source: std::io::Error },
}

/// The queues of a tap, one for each pair.
type Taps = [Arc<dyn TapQueue>];
type Spawned = std::io::Result<JoinHandle<()>>;
type Attached = Result<(), AttachError>;

/// What the host lends, and who works with it.
enum Attachment {
    Missing(TapSource),
    /// Nothing any more: the device ends, or its tap is being opened.
    None,
    Attached(Vec<JoinHandle<()>>),
}

/// See the module's documentation.
pub struct Net {
    shared: Arc<Shared>,
    offered: u64,
    mtu: Option<u16>,
    host: TapSettings,
    queue_size: u16,
    attachment: Mutex<Attachment>,
}

impl Net {
    /// A card that has no tap yet.
    pub fn new(options: NetOptions) -> Result<Self, NetError> {
        let NetOptions { id, tap, mac, mtu, mut host, queue_pairs, queue_size, offloads, limits } =
            options;
        if !(1..=QUEUE_PAIRS_MAX).contains(&queue_pairs) {
            return Err(NetError::QueuePairs { id, pairs: queue_pairs });
        }
        if !queue_size.is_power_of_two() || queue_size < 2 {
            return Err(NetError::QueueSize { id, size: queue_size });
        }
        if let Some(mtu) = mtu.filter(|mtu| *mtu < MTU_MIN) {
            return Err(NetError::Mtu { id, mtu });
        }
        host.mtu = mtu;
        let pairs: Result<Vec<_>, _> = (0..queue_pairs).map(|_| Pair::new()).collect();
        let pairs = match pairs {
            Ok(pairs) => pairs,
            Err(source) => return Err(NetError::Events { id, source }),
        };
        let gate = Arc::new(TxGate::new(pairs.len(), limits));
        for (lane, pair) in pairs.iter().enumerate() {
            match pair.waker() {
                Ok(waker) => gate.set_lane_waker(lane, waker),
                Err(source) => return Err(NetError::Events { id, source }),
            }
        }
        Ok(Self {
            shared: Arc::new(Shared::new(id, gate, pairs, mac)),
            offered: features::offered(offloads, queue_pairs, mtu.is_some()),
            mtu,
            host,
            queue_size,
            attachment: Mutex::new(Attachment::Missing(tap)),
        })
    }

    /// Where the engine holds and releases what the guest sends.
    #[must_use]
    pub fn gate(&self) -> &Arc<TxGate> {
        &self.shared.gate
    }

    /// The guest's address.
    #[must_use]
    pub fn mac(&self) -> MacAddress {
        self.shared.mac()
    }

    /// Whether the host would lend the tap now; one that is attached has it.
    ///
    /// # Errors
    /// Why it would not.
    pub fn try_attach(&self) -> Result<(), AttachError> {
        let Attachment::Missing(source) = &*self.attachment() else { return Ok(()) };
        tap::try_open(source, self.shared.pairs.len()).map_err(|error| {
            let AttachError { what, source } = AttachError::from(error);
            let what = format!("Cannot attach network device {}: {what}", self.shared.id);
            AttachError { what, source }
        })
    }

    /// Takes the tap, and has `spawn` start the threads; what could not be done may be tried again.
    fn attach_with(&self, spawn: impl Fn(&Arc<Shared>, usize, &Taps) -> Spawned) -> Attached {
        let failed = |error: &dyn fmt::Display| {
            format!("Cannot attach network device {}: {error}", self.shared.id)
        };
        let mut attachment = self.attachment();
        let source = match std::mem::replace(&mut *attachment, Attachment::None) {
            Attachment::Missing(source) => source,
            other => {
                *attachment = other;
                let what = failed(&"it was attached before");
                return Err(AttachError { what, source: None });
            }
        };
        drop(attachment);
        let taps = tap::open(&source, self.shared.pairs.len(), &self.host).map_err(|error| {
            let error = AttachError::from(error);
            AttachError { what: failed(&error.what), source: error.source }
        });
        let attached = taps.and_then(|taps| self.start(&taps, spawn));
        if attached.is_err() {
            *self.attachment() = Attachment::Missing(source);
        }
        attached
    }

    /// Starts the threads on the queues of a tap, one for each pair, or none.
    fn start(
        &self,
        taps: &Taps,
        spawn: impl Fn(&Arc<Shared>, usize, &Taps) -> Spawned,
    ) -> Attached {
        let mut workers = Vec::with_capacity(taps.len());
        for index in 0..self.shared.pairs.len() {
            match spawn(&self.shared, index, taps) {
                Ok(worker) => workers.push(worker),
                Err(source) => {
                    self.stop(workers);
                    self.shared.stop.store(false, Ordering::SeqCst);
                    let what = format!("Cannot start a thread of network device {}", self.id());
                    return Err(AttachError { what, source: Some(source) });
                }
            }
        }
        *self.attachment() = Attachment::Attached(workers);
        Ok(())
    }

    fn stop(&self, workers: Vec<JoinHandle<()>>) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.wake_all();
        for worker in workers {
            if worker.join().is_err() {
                tracing::error!("A thread of network device {} has panicked", self.shared.id);
            }
        }
    }

    fn attachment(&self) -> MutexGuard<'_, Attachment> {
        self.attachment.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_active(&self) -> bool {
        self.shared.pairs.iter().any(|pair| pair.slot().is_some())
    }

    /// Which queue is the control queue depends on what the driver accepted (5.1.2).
    fn control_index(&self, features: u64) -> u16 {
        if features & MQ != 0 { 2 * self.shared.pairs_max() } else { 2 }
    }

    /// Sorts the queues of an activation by pair.
    fn pairs_of(&self, activation: Activation) -> Vec<(usize, ActivePair)> {
        let Activation { memory, features, queues, interrupt } = activation;
        let control_index = self.control_index(features);
        let positions = Arc::clone(&self.shared.control().positions);
        let mut pairs: Vec<(usize, ActivePair)> = Vec::new();
        for mut queue in queues {
            queue.queue.set_event_idx(features & features::EVENT_IDX != 0);
            if let Some(position) = positions.iter().find(|found| found.index == queue.index) {
                queue.queue.set_next_avail(position.next_avail);
                queue.queue.set_next_used(position.next_used);
            }
            let control = queue.index == control_index;
            let index = if control { 0 } else { usize::from(queue.index / 2) };
            if index >= self.shared.pairs.len() || !control && queue.index > control_index {
                tracing::debug!("Queue {} of {} has no use", queue.index, self.shared.id);
                continue;
            }
            if pairs.iter().all(|(found, _)| *found != index) {
                let (memory, interrupt) = (Arc::clone(&memory), Arc::clone(&interrupt));
                let (receive, transmit, control) = (None, None, None);
                let pair = ActivePair { memory, interrupt, features, receive, transmit, control };
                pairs.push((index, pair));
            }
            let Some((_, pair)) = pairs.iter_mut().find(|(found, _)| *found == index) else {
                continue;
            };
            let place = match (control, queue.index % 2) {
                (true, _) => &mut pair.control,
                (false, 0) => &mut pair.receive,
                (false, _) => &mut pair.transmit,
            };
            *place = Some(queue);
        }
        pairs
    }

    fn clear(&self) {
        for pair in &self.shared.pairs {
            pair.clear();
        }
    }
}

fn mac_of(state: &NetState) -> Result<MacAddress, StateError> {
    MacAddress::from_bytes(state.mac).map_err(|error| StateError::Unusable(error.to_string()))
}

impl VirtioDevice for Net {
    fn id(&self) -> &str {
        &self.shared.id
    }

    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.queue_size; 2 * self.shared.pairs.len() + 1]
    }

    fn features(&self) -> u64 {
        self.offered
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = ConfigSpace {
            mac: self.shared.mac().bytes(),
            announce: self.shared.control().announce,
            queue_pairs_max: self.shared.pairs_max(),
            mtu: self.mtu.unwrap_or(0),
        };
        config.read(offset, data);
    }

    fn attach(&self) -> Result<(), AttachError> {
        self.attach_with(Worker::spawn)
    }

    fn activate(&self, activation: Activation) -> Result<(), ActivateError> {
        if !matches!(*self.attachment(), Attachment::Attached(_)) {
            return Err(ActivateError::NotAttached);
        }
        let has = |index| activation.queues.iter().any(|queue: &ActiveQueue| queue.index == index);
        if !has(0) || !has(1) {
            let found = activation.queues.len();
            return Err(ActivateError::Queues { found, needed: 2 });
        }
        self.clear();
        for (index, active) in self.pairs_of(activation) {
            if let Err(error) = self.shared.pairs[index].install(active) {
                self.clear();
                return Err(ActivateError::Events(error));
            }
        }
        self.shared.control().positions = Arc::new([]);
        Ok(())
    }

    fn reset(&self) {
        self.clear();
        *self.shared.control() = ControlState::default();
        self.shared.announce_guest.store(false, Ordering::SeqCst);
        self.shared.broken.store(false, Ordering::SeqCst);
    }

    fn park(&self) {
        self.shared.turnstile.park();
    }

    fn unpark(&self) {
        self.shared.turnstile.unpark();
        self.shared.wake_all();
    }

    fn save(&self) -> DeviceState {
        let control = self.shared.control().clone();
        let queues =
            if self.is_active() { self.queue_positions() } else { control.positions.to_vec() };
        DeviceState::Net(NetState {
            mac: self.shared.mac().bytes(),
            guest_offloads: control.guest_offloads,
            active_pairs: control.pairs,
            announce: control.announce,
            queues,
        })
    }

    fn check(&self, state: &DeviceState) -> Result<(), StateError> {
        let DeviceState::Net(state) = state else { return Err(StateError::Kind) };
        let unusable = |why: String| Err(StateError::Unusable(why));
        mac_of(state)?;
        let pairs_max = self.shared.pairs_max();
        if !(1..=pairs_max).contains(&state.active_pairs) {
            return unusable(format!("{} of {pairs_max} queue pairs", state.active_pairs));
        }
        let offloads = state.guest_offloads;
        if offloads.is_some_and(|set| GuestOffloads::chosen(set, self.offered).is_none()) {
            return unusable(format!("offloads {offloads:x?} of {:x}", self.offered));
        }
        let ascending = state.queues.is_sorted_by(|a, b| a.index < b.index);
        if !ascending || state.queues.iter().any(|queue| queue.index > 2 * pairs_max) {
            return unusable("the queues are not those of the device".to_owned());
        }
        Ok(())
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        self.check(state)?;
        let DeviceState::Net(state) = state else { return Err(StateError::Kind) };
        if self.is_active() {
            return Err(StateError::Unusable("the device is active".to_owned()));
        }
        self.shared.set_mac(mac_of(state)?);
        *self.shared.control() = ControlState {
            guest_offloads: state.guest_offloads,
            pairs: state.active_pairs,
            announce: state.announce,
            positions: state.queues.as_slice().into(),
        };
        Ok(())
    }

    fn queue_positions(&self) -> Vec<QueuePosition> {
        let mut positions = Vec::new();
        for pair in &self.shared.pairs {
            if let Some(active) = &*pair.slot() {
                positions.extend(active.positions());
            }
        }
        positions.sort_by_key(|position| position.index);
        positions
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut counters = self.shared.counters.list();
        counters.extend(self.shared.gate.counters());
        counters
    }

    fn announce(&self) {
        self.shared.announce_frames.store(true, Ordering::SeqCst);
        self.announce_to_guest();
    }

    fn announce_to_guest(&self) {
        self.shared.announce_guest.store(true, Ordering::SeqCst);
        self.shared.wake_all();
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        let attachment = std::mem::replace(&mut *self.attachment(), Attachment::None);
        if let Attachment::Attached(workers) = attachment {
            self.stop(workers);
        }
    }
}

impl fmt::Debug for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Net").field("id", &self.shared.id).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
