//! The console (virtio 1.2, section 5.3): one port, with a receive and a transmit queue.
//!
//! ```text
//!   transmit ring ──copy, under a pass──▶ OutputGate ──after its epoch's commit──▶ backend
//!   receive ring ◀──copy, under a pass── input thread ◀─────────────────────────── backend
//! ```
//!
//! What enters: a [`PortMode`], a driver's queues, input of the backend. What leaves: the guest's
//! output, past the gate; a [`ConsoleState`]. What always holds:
//!
//! - Output is answered to the guest when it is in the gate, so a state has it in the ring or as
//!   pending output. While the gate is throttled the ring is not served.
//! - Input that has no buffer of the guest waits on the host's side, as does all input while the
//!   device is parked or has no driver.
//! - The features on offer depend on nothing, so that primary and backup offer the same. The size
//!   is the host's: zeroes where the backend is no terminal. A driver is told of it whenever the
//!   device becomes active, after a take-over too. It is as it was then: a terminal that is resized
//!   later is not followed.
//! - As with a serial port the backend is open from the first, on a backup also: its pty has a name.

/// Towards the guest.
mod rx;
/// What the threads share.
mod shared;
/// Saved form.
pub mod state;
/// From the guest.
mod tx;
/// The thread.
mod worker;

use std::fmt;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use self::shared::{Active, Shared};
use self::state::ConsoleState;
use self::worker::Worker;
use super::device::{
    ActivateError, Activation, AttachError, DeviceType, QueuePosition, StateError, VirtioDevice,
};
use super::state::DeviceState;
use crate::console::{BackendError, HostSide, PortMode, WindowSize};
use crate::output_gate::OutputGate;

const QUEUE_SIZE_MAX: u16 = 256;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// VIRTIO_CONSOLE_F_SIZE (5.3.3).
const SIZE: u64 = 1 << 0;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
/// Bytes of the configuration space with a meaning: columns and rows. What comes after belongs to
/// features that are not on offer.
const CONFIG_BYTES: usize = 4;

/// See the module's documentation.
pub struct Console {
    shared: Arc<Shared>,
    host: HostSide,
    worker: Mutex<Option<JoinHandle<()>>>,
}

impl Console {
    /// Opens the host side and starts the threads.
    pub fn open(id: &str, mode: &PortMode) -> Result<Self, BackendError> {
        let failed = |source| BackendError::Start { what: format!("worker of {id}"), source };
        let mut host = HostSide::open(mode)?;
        let shared = Arc::new(Shared::new(id, Arc::clone(host.gate())).map_err(failed)?);
        host.gate().set_space_waker(shared.waker().map_err(failed)?);
        host.start("console", Arc::clone(&shared) as _)?;
        let worker = Worker::spawn(&shared).map_err(failed)?;
        Ok(Self { shared, host, worker: Mutex::new(Some(worker)) })
    }

    /// Where the engine holds and releases what the guest puts out.
    #[must_use]
    pub fn gate(&self) -> &Arc<OutputGate> {
        &self.shared.gate
    }

    /// Where a pty's other side is, for `vm.info`.
    #[must_use]
    pub fn pty_path(&self) -> Option<&Path> {
        self.host.pty_path()
    }

    /// Writes what was released and ends the host side. A second call finds nothing to do.
    pub fn finish(&self) {
        self.host.finish();
    }
}

/// The work of a console that has no threads.
#[cfg(feature = "fuzzing")]
pub struct ByHand(Worker);

#[cfg(feature = "fuzzing")]
impl ByHand {
    /// What the worker does when the driver's bell has rung. True if there may be more. Not while
    /// parked.
    pub fn turn(&mut self) -> bool {
        self.0.turn()
    }

    /// Input of the host; how much of it the guest's buffers took. Not while parked.
    #[must_use]
    pub fn input(&self, bytes: &[u8]) -> usize {
        self.0.input(bytes)
    }
}

#[cfg(feature = "fuzzing")]
impl Console {
    /// A console without threads and without a host side, and who does its work.
    pub fn by_hand(id: &str) -> Result<(Self, ByHand), BackendError> {
        let failed = |source| BackendError::Start { what: format!("worker of {id}"), source };
        let host = HostSide::open(&PortMode::Null)?;
        let shared = Arc::new(Shared::new(id, Arc::new(OutputGate::new())).map_err(failed)?);
        let worker = ByHand(Worker::by_hand(&shared));
        Ok((Self { shared, host, worker: Mutex::new(None) }, worker))
    }
}

impl VirtioDevice for Console {
    fn id(&self) -> &str {
        &self.shared.id
    }

    fn device_type(&self) -> DeviceType {
        DeviceType::Console
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE_MAX; 2]
    }

    fn features(&self) -> u64 {
        SIZE | EVENT_IDX
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let size = self.shared.size.load(Ordering::SeqCst);
        let mut space = [0; CONFIG_BYTES];
        space[..2].copy_from_slice(&(size >> 16).to_le_bytes()[..2]);
        space[2..].copy_from_slice(&size.to_le_bytes()[..2]);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let known = space.get(start..).unwrap_or_default();
        let len = known.len().min(data.len());
        data.fill(0);
        data[..len].copy_from_slice(&known[..len]);
    }

    fn attach(&self) -> Result<(), AttachError> {
        Ok(())
    }

    fn activate(&self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, features, queues, interrupt } = activation;
        let found = queues.len();
        let (mut receive, mut transmit) = (None, None);
        for queue in queues {
            match queue.index {
                RECEIVE => receive = Some(queue),
                TRANSMIT => transmit = Some(queue),
                index => tracing::debug!("Queue {index} of {} has no use", self.shared.id),
            }
        }
        // Firmware may have no use for input.
        if transmit.is_none() {
            return Err(ActivateError::Queues { found, needed: 2 });
        }
        let WindowSize { cols, rows } = self.host.window();
        self.shared.size.store(u32::from(cols) << 16 | u32::from(rows), Ordering::SeqCst);
        self.shared.size_due.store(true, Ordering::SeqCst);
        let sized = features & SIZE != 0;
        let active = Active { memory, interrupt, receive, transmit, sized, broken: false };
        self.shared.install(active).map_err(ActivateError::Events)
    }

    fn reset(&self) {
        self.shared.clear();
    }

    fn park(&self) {
        self.shared.turnstile.park();
    }

    fn unpark(&self) {
        self.shared.turnstile.unpark();
        self.shared.wake();
    }

    fn save(&self) -> DeviceState {
        DeviceState::Console(ConsoleState {
            taken_bytes: self.shared.slot().taken_bytes,
            pending_output: self.shared.gate.pending(),
        })
    }

    fn check(&self, state: &DeviceState) -> Result<(), StateError> {
        let DeviceState::Console(state) = state else { return Err(StateError::Kind) };
        state.validate()
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        self.check(state)?;
        let DeviceState::Console(state) = state else { return Err(StateError::Kind) };
        let mut slot = self.shared.slot();
        if slot.active.is_some() {
            return Err(StateError::Unusable("the device is active".to_owned()));
        }
        slot.taken_bytes = state.taken_bytes;
        drop(slot);
        self.shared.gate.write(&state.pending_output);
        Ok(())
    }

    fn queue_positions(&self) -> Vec<QueuePosition> {
        self.shared.slot().active.iter().flat_map(Active::positions).collect()
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut counters = self.shared.counters();
        counters.extend(self.host.counters());
        counters
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::SeqCst);
        self.shared.wake();
        let worker = self.worker.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(worker) = worker
            && worker.join().is_err()
        {
            tracing::error!("The worker of {} has panicked", self.shared.id);
        }
    }
}

impl fmt::Debug for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Console").field("id", &self.shared.id).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
