//! The saved form of a virtio function. Snapshots and epochs carry the same.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::common::{Common, DRIVER_OK, FEATURES_OK, VERSION_1};
use super::interrupt::{Interrupts, NO_VECTOR};
use super::layout::QUEUES_MAX;
use crate::pci::config::{ConfigError, ConfigState};
use crate::pci::msix::{MsixError, MsixState};
use crate::virtio::device::{ActivateError, QueuePosition, StateError};
use crate::virtio::state::DeviceState;

/// A queue as the driver set it up, and how far it has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    pub size: u16,
    pub vector: u16,
    pub enabled: bool,
    /// Guest-physical addresses.
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    pub next_avail: u16,
    pub next_used: u16,
}

/// The common configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommonState {
    pub device_feature_select: u32,
    pub driver_feature_select: u32,
    pub driver_features: u64,
    pub config_vector: u16,
    pub status: u8,
    pub config_generation: u8,
    pub isr: u8,
    pub queue_select: u16,
    pub queues: Vec<QueueState>,
}

/// A virtio function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioPciState {
    /// The device's id in the VM's configuration.
    pub id: String,
    pub slot: u8,
    pub config: ConfigState,
    pub msix: MsixState,
    pub common: CommonState,
    pub device: DeviceState,
}

/// A saved virtio function is not usable.
#[derive(Debug, Error)]
pub enum VirtioStateError {
    #[error("The state is of {found} in slot {found_slot}, not of {expected} in slot {slot}")]
    Other { found: String, found_slot: u8, expected: String, slot: u8 },
    #[error("The configuration space of {id} is not usable")]
    Config { id: String, source: ConfigError },
    #[error("The interrupts of {id} are not usable")]
    Msix { id: String, source: MsixError },
    #[error("{id} has {found} queues in its state instead of {expected}")]
    Queues { id: String, found: usize, expected: usize },
    #[error("Queue {index} of {id} is not usable")]
    Queue { id: String, index: usize },
    #[error("{id} has interrupt vectors in its state that it does not have")]
    Vector { id: String },
    #[error("{id} has features in its state that were never agreed on")]
    Features { id: String },
    #[error("{id} refused its state")]
    Device { id: String, source: StateError },
    #[error("{id} cannot go on")]
    Activate { id: String, source: ActivateError },
}

impl VirtioPciState {
    /// What can be said without the machine that is to load this.
    pub fn validate(&self) -> Result<(), VirtioStateError> {
        let id = || self.id.clone();
        let queues = &self.common.queues;
        if queues.len() > QUEUES_MAX {
            let (found, expected) = (queues.len(), QUEUES_MAX);
            return Err(VirtioStateError::Queues { id: id(), found, expected });
        }
        if self.msix.entries.len() != queues.len() + 1 {
            let (found, expected) = (self.msix.entries.len(), queues.len() + 1);
            let source = MsixError { found, expected };
            return Err(VirtioStateError::Msix { id: id(), source });
        }
        let vectors = queues.iter().map(|queue| queue.vector);
        let exists = |vector: u16| usize::from(vector) <= queues.len() || vector == NO_VECTOR;
        if !vectors.chain([self.common.config_vector]).all(exists) {
            return Err(VirtioStateError::Vector { id: id() });
        }
        if let Some(index) = queues.iter().position(|queue| !queue.size.is_power_of_two()) {
            return Err(VirtioStateError::Queue { id: id(), index });
        }
        let device = self.device.validate();
        device.map_err(|source| VirtioStateError::Device { id: id(), source })
    }
}

impl CommonState {
    pub(super) fn of(
        common: &Common,
        interrupts: &Interrupts,
        positions: &[QueuePosition],
    ) -> Self {
        let queues = common.queues.iter().zip(&interrupts.queue_vectors).zip(0u16..);
        let queues = queues.map(|((queue, vector), index)| {
            let found = positions.iter().find(|position| position.index == index);
            let position = found.copied().unwrap_or_default();
            QueueState {
                size: queue.size,
                vector: vector.load(Ordering::Acquire),
                enabled: queue.enabled,
                desc: queue.desc,
                avail: queue.avail,
                used: queue.used,
                next_avail: position.next_avail,
                next_used: position.next_used,
            }
        });
        Self {
            device_feature_select: common.device_feature_select,
            driver_feature_select: common.driver_feature_select,
            driver_features: common.driver_features,
            config_vector: interrupts.config_vector.load(Ordering::Acquire),
            status: interrupts.status.load(Ordering::Acquire),
            config_generation: interrupts.generation.load(Ordering::Acquire),
            isr: interrupts.isr.load(Ordering::Acquire),
            queue_select: common.queue_select,
            queues: queues.collect(),
        }
    }

    /// Whether registers that look like `common` could be in this state.
    pub(super) fn check(&self, id: &str, common: &Common) -> Result<(), VirtioStateError> {
        let id = || id.to_owned();
        let (found, expected) = (self.queues.len(), common.queues.len());
        if found != expected {
            return Err(VirtioStateError::Queues { id: id(), found, expected });
        }
        for (index, (queue, own)) in self.queues.iter().zip(&common.queues).enumerate() {
            if !queue.size.is_power_of_two() || queue.size > own.size_max {
                return Err(VirtioStateError::Queue { id: id(), index });
            }
        }
        // Before FEATURES_OK a driver may have written anything, and past it only what was agreed.
        let agreed = self.status & FEATURES_OK != 0;
        let acceptable =
            self.driver_features & !common.offered == 0 && self.driver_features & VERSION_1 != 0;
        let driven = self.status & DRIVER_OK != 0;
        if agreed && !acceptable || driven && !agreed {
            return Err(VirtioStateError::Features { id: id() });
        }
        Ok(())
    }

    /// Loads what [`CommonState::check`] found good.
    pub(super) fn load(&self, common: &mut Common, interrupts: &Interrupts) {
        common.device_feature_select = self.device_feature_select;
        common.driver_feature_select = self.driver_feature_select;
        common.driver_features = self.driver_features;
        common.queue_select = self.queue_select;
        for (own, queue) in common.queues.iter_mut().zip(&self.queues) {
            own.size = queue.size;
            own.enabled = queue.enabled;
            (own.desc, own.avail, own.used) = (queue.desc, queue.avail, queue.used);
        }
        for (own, queue) in interrupts.queue_vectors.iter().zip(&self.queues) {
            own.store(interrupts.vector_or_none(queue.vector), Ordering::Release);
        }
        let vector = interrupts.vector_or_none(self.config_vector);
        interrupts.config_vector.store(vector, Ordering::Release);
        interrupts.status.store(self.status, Ordering::Release);
        interrupts.generation.store(self.config_generation, Ordering::Release);
        interrupts.isr.store(self.isr, Ordering::Release);
    }

    /// Where the queues stand.
    pub(super) fn positions(&self) -> Vec<QueuePosition> {
        let queues = (0u16..).zip(&self.queues);
        let position = |(index, queue): (u16, &QueueState)| QueuePosition {
            index,
            next_avail: queue.next_avail,
            next_used: queue.next_used,
        };
        queues.map(position).collect()
    }
}
