//! The virtio transport over PCI, modern devices only (virtio 1.2, section 4.1).
//!
//! What enters: the driver's register accesses, on vCPU threads; what leaves: activations and
//! resets of a [`VirtioDevice`], and interrupts of its workers.
//!
//! ```text
//!   0 ─▶ ACKNOWLEDGE ─▶ DRIVER ─▶ FEATURES_OK ─▶ DRIVER_OK: device.activate
//!   ▲                                │ refused: the bit stays clear      │
//!   │ 0 written: device.reset        ▼                                   ▼
//!   └──────────────────────────── any state ◀──── NEEDS_RESET: a queue or the device is no good
//! ```
//!
//! What always holds:
//!
//! - A device is activated only with features that it offered and queues whose rings lie in guest
//!   memory; [`virtio_queue::QueueT::set_event_idx`] is set as the driver chose.
//! - Registers are locked while the device is activated or reset, and workers never wait for that
//!   lock; what they need is in `interrupt`.
//! - Without an interrupt pin there is no INTx: a driver uses MSI-X, or polls.

mod common;
mod doorbell;
mod interrupt;
mod layout;
mod state;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend};

pub use doorbell::Doorbells;
pub use layout::{BAR_BYTES, QUEUES_MAX};
pub use state::{CommonState, QueueState, VirtioPciState, VirtioStateError};

use super::config::ConfigSpace;
use super::{MessageSink, PciFunction, Region};
use crate::counters::Counter;
use crate::virtio::device::{
    ActivateError, Activation, ActiveQueue, GuestMemory, Interrupt, QueuePosition, VirtioDevice,
};
use common::{Common, DRIVER_OK, EVENT_IDX, FAILED, FEATURES_OK, NEEDS_RESET, VERSION_1};
use doorbell::DoorbellSet;
use interrupt::Interrupts;

/// What a driver did to its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    Activated,
    Reset,
}

/// Told on a vCPU's thread, with the device's id: it may only signal.
pub type Observer = Arc<dyn Fn(&str, Activity) + Send + Sync>;

/// What the VMM gives a virtio function. Device threads may keep `messages` for as long as their
/// host I/O lasts, past the function's own life.
#[derive(Clone)]
pub struct Host {
    pub memory: Arc<GuestMemory>,
    pub messages: Arc<dyn MessageSink>,
    pub doorbells: Arc<dyn Doorbells>,
    pub observer: Observer,
}

/// A device cannot be a PCI function.
#[derive(Debug, Error)]
pub enum TransportError {
    #[error("{id} has {count} queues, from 1 to {QUEUES_MAX} are possible")]
    Queues { id: String, count: usize },
    #[error("{id} has a queue of size {size}, which is no power of two up to 32768")]
    QueueSize { id: String, size: u16 },
    #[error("Cannot make the doorbells of {id}")]
    Doorbells { id: String, source: io::Error },
}

/// The function. It is put into slot `slot` of a [`super::root::PciRoot`].
pub struct VirtioPci {
    slot: u8,
    device: Arc<dyn VirtioDevice>,
    host: Host,
    config: Mutex<ConfigSpace>,
    power_on: ConfigSpace,
    msix_capability: usize,
    access_capability: usize,
    registers: Mutex<Common>,
    active: AtomicBool,
    interrupts: Arc<Interrupts>,
    doorbells: DoorbellSet,
    activations: Counter,
    resets: Counter,
}

impl VirtioPci {
    /// `base` is where the BAR is at power-on, a multiple of [`BAR_BYTES`].
    pub fn new(
        slot: u8,
        base: u64,
        device: Arc<dyn VirtioDevice>,
        host: Host,
    ) -> Result<Self, TransportError> {
        let id = || device.id().to_owned();
        let sizes = device.queue_sizes();
        let count = sizes.len();
        if count == 0 || count > QUEUES_MAX {
            return Err(TransportError::Queues { id: id(), count });
        }
        let usable = |size: &u16| size.is_power_of_two();
        if let Some(&size) = sizes.iter().find(|size| !usable(size)) {
            return Err(TransportError::QueueSize { id: id(), size });
        }
        let interrupts = Arc::new(Interrupts::new(device.id(), count, Arc::clone(&host.messages)));
        let layout = layout::build(device.device_type(), interrupts.msix.vectors(), base);
        let doorbells = DoorbellSet::new(count, Arc::clone(&host.doorbells))
            .map_err(|source| TransportError::Doorbells { id: id(), source })?;
        Ok(Self {
            slot,
            registers: Mutex::new(Common::new(device.features() | VERSION_1, &sizes)),
            device,
            host,
            power_on: layout.config.clone(),
            config: Mutex::new(layout.config),
            msix_capability: layout.msix,
            access_capability: layout.access,
            active: AtomicBool::new(false),
            interrupts,
            doorbells,
            activations: Counter::default(),
            resets: Counter::default(),
        })
    }

    #[must_use]
    pub fn device(&self) -> &Arc<dyn VirtioDevice> {
        &self.device
    }

    #[must_use]
    pub fn slot(&self) -> u8 {
        self.slot
    }

    /// The device's counters and the transport's.
    #[must_use]
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut all = self.device.counters();
        all.extend([
            ("activations", self.activations.get()),
            ("resets", self.resets.get()),
            ("needs_resets", self.interrupts.needs_resets.get()),
            ("interrupts", self.interrupts.msix.sent()),
        ]);
        all
    }

    /// The state. Only while the device is parked and no vCPU runs.
    #[must_use]
    pub fn save(&self) -> VirtioPciState {
        let common = self.lock();
        let active = self.active.load(Ordering::Acquire);
        let positions = if active { self.device.queue_positions() } else { Vec::new() };
        VirtioPciState {
            id: self.device.id().to_owned(),
            slot: self.slot,
            config: self.config().save(),
            msix: self.interrupts.msix.save(),
            common: CommonState::of(&common, &self.interrupts, &positions),
            device: self.device.save(),
        }
    }

    /// Whether [`VirtioPci::restore`] would load this, as far as that can be said before.
    pub fn check(&self, state: &VirtioPciState) -> Result<(), VirtioStateError> {
        state.validate()?;
        let id = self.device.id();
        if state.id != id || state.slot != self.slot {
            return Err(VirtioStateError::Other {
                found: state.id.clone(),
                found_slot: state.slot,
                expected: id.to_owned(),
                slot: self.slot,
            });
        }
        let config = self.power_on.check(&state.config);
        config.map_err(|source| VirtioStateError::Config { id: id.to_owned(), source })?;
        let msix = self.interrupts.msix.check(&state.msix);
        msix.map_err(|source| VirtioStateError::Msix { id: id.to_owned(), source })?;
        let device = self.device.check(&state.device);
        device.map_err(|source| VirtioStateError::Device { id: id.to_owned(), source })?;
        state.common.check(id, &self.lock())
    }

    /// Takes a saved state, and activates the device if it was active: its doorbells are rung,
    /// and it goes on when it is unparked. Only while parked; the root has to place anew, and
    /// [`VirtioPci::nudge`] is to follow when the vCPUs have their state. After an error the
    /// function is as after [`VirtioPci::reset`].
    pub fn restore(&self, state: &VirtioPciState) -> Result<(), VirtioStateError> {
        self.check(state)?;
        self.reset();
        self.load(state).inspect_err(|_| self.reset())
    }

    fn load(&self, state: &VirtioPciState) -> Result<(), VirtioStateError> {
        let id = || self.device.id().to_owned();
        let mut common = self.lock();
        let mut config = self.config();
        config
            .restore(&state.config)
            .map_err(|source| VirtioStateError::Config { id: id(), source })?;
        let control = config.u16_at(self.msix_capability + 2);
        drop(config);
        self.interrupts
            .msix
            .restore(&state.msix, control)
            .map_err(|source| VirtioStateError::Msix { id: id(), source })?;
        state.common.load(&mut common, &self.interrupts);
        self.device
            .restore(&state.device)
            .map_err(|source| VirtioStateError::Device { id: id(), source })?;
        let status = state.common.status;
        if status & NEEDS_RESET != 0 {
            // It had stopped for good: what it had in flight must not reach a later activation.
            self.device.reset();
        }
        if status & DRIVER_OK == 0 || status & NEEDS_RESET != 0 {
            return Ok(());
        }
        let queues = self
            .queues(&common, &state.common.positions())
            .map_err(|index| VirtioStateError::Queue { id: id(), index })?;
        self.activate(&common, queues)
            .map_err(|source| VirtioStateError::Activate { id: id(), source })
    }

    /// Interrupts for every queue of a restored device, so that nothing that was in flight at the
    /// capture waits for ever; drivers expect interrupts without a reason.
    pub fn nudge(&self) {
        if !self.active.load(Ordering::Acquire) {
            return;
        }
        for (index, queue) in (0u16..).zip(&self.lock().queues) {
            if queue.enabled {
                self.interrupts.queue(index);
            }
        }
    }

    /// Back to power-on. The root has to place anew.
    pub fn reset(&self) {
        let mut common = self.lock();
        self.stop();
        common.reset();
        self.interrupts.reset();
        self.interrupts.generation.store(0, Ordering::Release);
        self.interrupts.msix.reset();
        *self.config() = self.power_on.clone();
    }

    /// Idle devices are reset as well: a driver may have written to their configuration.
    fn stop(&self) {
        self.active.store(false, Ordering::Release);
        self.device.reset();
    }

    fn set_status(&self, common: &mut Common, value: u8) {
        if value == 0 {
            self.stop();
            common.reset();
            self.interrupts.reset();
            self.resets.add(1);
            (self.host.observer)(self.device.id(), Activity::Reset);
            return;
        }
        let before = self.interrupts.status.load(Ordering::Acquire);
        // A driver adds bits; it takes them back by a reset only (2.1.1).
        let mut added = value & !before & (common::ACKNOWLEDGE | common::DRIVER | FAILED);
        if value & !before & FEATURES_OK != 0 && common.features_acceptable() {
            added |= FEATURES_OK;
        }
        let begins = value & !before & DRIVER_OK != 0 && (before | added) & FEATURES_OK != 0;
        if begins {
            added |= DRIVER_OK;
        }
        self.interrupts.status.fetch_or(added, Ordering::AcqRel);
        if begins {
            self.begin(common);
        }
    }

    /// The driver is ready.
    fn begin(&self, common: &Common) {
        let queues = match self.queues(common, &[]) {
            Ok(queues) => queues,
            Err(index) => {
                let why = format!("queue {index} is not in guest memory");
                return self.interrupts.needs_reset(&why);
            }
        };
        match self.activate(common, queues) {
            Ok(()) => {
                self.activations.add(1);
                (self.host.observer)(self.device.id(), Activity::Activated);
            }
            Err(error) => self.interrupts.needs_reset(&error.to_string()),
        }
    }

    /// The enabled queues, checked against guest memory; the number of one that is no good.
    fn queues(
        &self,
        common: &Common,
        positions: &[QueuePosition],
    ) -> Result<Vec<(u16, Queue)>, usize> {
        let event_idx = common.driver_features & EVENT_IDX != 0;
        let mut queues = Vec::new();
        for (index, setup) in (0u16..).zip(&common.queues) {
            if !setup.enabled {
                continue;
            }
            let bad = usize::from(index);
            let found = positions.iter().find(|position| position.index == index);
            let position = found.copied().unwrap_or_default();
            let queue = Queue::try_from(virtio_queue::QueueState {
                max_size: setup.size_max,
                next_avail: position.next_avail,
                next_used: position.next_used,
                event_idx_enabled: event_idx,
                size: setup.size,
                ready: true,
                desc_table: setup.desc,
                avail_ring: setup.avail,
                used_ring: setup.used,
            });
            let queue = queue.map_err(|_| bad)?;
            if !self.rings_in_memory(&queue) {
                return Err(bad);
            }
            queues.push((index, queue));
        }
        Ok(queues)
    }

    /// Lengths of virtio 1.2, 2.7, event words included.
    fn rings_in_memory(&self, queue: &Queue) -> bool {
        let size = usize::from(queue.size());
        [
            (queue.desc_table(), 16 * size),
            (queue.avail_ring(), 6 + 2 * size),
            (queue.used_ring(), 6 + 8 * size),
        ]
        .into_iter()
        // The library takes a ring at address 0 for one that was not set.
        .all(|(at, len)| at != 0 && self.host.memory.check_range(GuestAddress(at), len))
    }

    fn activate(&self, common: &Common, queues: Vec<(u16, Queue)>) -> Result<(), ActivateError> {
        let mut active = Vec::with_capacity(queues.len());
        for (index, queue) in queues {
            let doorbell =
                self.doorbells.event(usize::from(index)).map_err(ActivateError::Events)?;
            active.push(ActiveQueue { index, queue, doorbell });
        }
        let indices: Vec<_> = active.iter().map(|queue| usize::from(queue.index)).collect();
        self.device.activate(Activation {
            memory: Arc::clone(&self.host.memory),
            features: common.driver_features,
            queues: active,
            interrupt: Arc::clone(&self.interrupts) as Arc<dyn Interrupt>,
        })?;
        self.active.store(true, Ordering::Release);
        for index in indices {
            self.doorbells.ring(index);
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Common> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Taken after the registers, where both are needed.
    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An area of the BAR and the offset in it.
fn area(offset: u64) -> (u64, u64) {
    const STARTS: [u64; 6] = [
        layout::PENDING,
        layout::TABLE,
        layout::NOTIFY,
        layout::DEVICE,
        layout::ISR,
        layout::COMMON,
    ];
    let start = STARTS.into_iter().find(|start| *start <= offset).unwrap_or(0);
    (start, offset - start)
}

impl PciFunction for VirtioPci {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let at = usize::from(offset);
        let access = layout::access(&self.config(), self.access_capability, at, data.len());
        if let Some(access) = access {
            let mut bytes = [0; 4];
            self.read_memory(access.offset, &mut bytes[..access.len]);
            self.config().put(layout::data_of(self.access_capability), &bytes);
        }
        self.config().read(at, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        let at = usize::from(offset);
        let mut config = self.config();
        config.write(at, data);
        // With the lock held: the last one to write the register has the last word.
        self.interrupts.msix.set_control(config.u16_at(self.msix_capability + 2));
        let access = layout::access(&config, self.access_capability, at, data.len());
        let bytes = config.u32_at(layout::data_of(self.access_capability)).to_le_bytes();
        drop(config);
        if let Some(access) = access {
            self.write_memory(access.offset, &bytes[..access.len]);
        }
    }

    fn region(&self) -> Option<Region> {
        self.config().decoded()
    }

    fn placed(&self, base: Option<u64>) {
        self.doorbells.place(base);
    }

    fn read_memory(&self, offset: u64, data: &mut [u8]) {
        match area(offset) {
            (layout::COMMON, at) => self.lock().read(at, data, &self.interrupts),
            (layout::ISR, 0) => {
                data.fill(0);
                if let [first, ..] = data {
                    // Reading clears (4.1.4.5).
                    *first = self.interrupts.isr.swap(0, Ordering::AcqRel);
                }
            }
            (layout::DEVICE, at) => self.device.read_config(at, data),
            (layout::TABLE, at) => self.interrupts.msix.read_table(at, data),
            (layout::PENDING, at) => self.interrupts.msix.read_pending(at, data),
            _ => data.fill(0),
        }
    }

    fn write_memory(&self, offset: u64, data: &[u8]) {
        match area(offset) {
            (layout::COMMON, at) => {
                let mut common = self.lock();
                if let Some(value) = common.write(at, data, &self.interrupts) {
                    self.set_status(&mut common, value);
                }
            }
            (layout::DEVICE, at) => self.device.write_config(at, data),
            (layout::NOTIFY, at) => self.doorbells.write(at),
            (layout::TABLE, at) => self.interrupts.msix.write_table(at, data),
            _ => {}
        }
    }
}
