//! What a device's workers reach: interrupts and the status.
//!
//! What always holds: nothing here waits for a device or for the transport's registers, so a
//! worker that interrupts under its pass never waits for a vCPU that resets the device.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

use super::common::{DRIVER_OK, NEEDS_RESET};
use crate::counters::Counter;
use crate::pci::MessageSink;
use crate::pci::msix::Msix;
use crate::virtio::device::Interrupt;

/// No vector: the event does not interrupt (virtio 1.2, 4.1.5.1.2).
pub(super) const NO_VECTOR: u16 = 0xffff;
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;
/// A guest can provoke these messages, so only the first are written to the log.
const LOGGED_MAX: u64 = 10;

pub(super) struct Interrupts {
    pub id: String,
    pub msix: Msix,
    pub status: AtomicU8,
    pub isr: AtomicU8,
    pub generation: AtomicU8,
    pub config_vector: AtomicU16,
    pub queue_vectors: Vec<AtomicU16>,
    pub needs_resets: Counter,
}

impl Interrupts {
    /// One vector for each queue and one for the configuration.
    pub fn new(id: &str, queues: usize, messages: Arc<dyn MessageSink>) -> Self {
        let vectors = u16::try_from(queues + 1).unwrap_or(1);
        Self {
            id: id.to_owned(),
            msix: Msix::new(vectors, messages),
            status: AtomicU8::new(0),
            isr: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            needs_resets: Counter::default(),
        }
    }

    /// As after a reset by the driver; the MSI-X table is PCI's and stays.
    pub fn reset(&self) {
        self.status.store(0, Ordering::Release);
        self.isr.store(0, Ordering::Release);
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
    }

    /// What a driver gets when it asks for a vector that does not exist.
    pub fn vector_or_none(&self, vector: u16) -> u16 {
        if vector < self.msix.vectors() { vector } else { NO_VECTOR }
    }

    fn signal(&self, vector: u16, isr: u8) {
        // A driver that polls without MSI-X finds the reason in the interrupt status.
        if !self.msix.signal(vector) {
            self.isr.fetch_or(isr, Ordering::AcqRel);
        }
    }
}

impl Interrupt for Interrupts {
    fn queue(&self, index: u16) {
        if let Some(vector) = self.queue_vectors.get(usize::from(index)) {
            self.signal(vector.load(Ordering::Acquire), ISR_QUEUE);
        }
    }

    fn config(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.signal(self.config_vector.load(Ordering::Acquire), ISR_CONFIG);
    }

    fn needs_reset(&self, why: &str) {
        // Not where the driver has reset the device meanwhile: it waits for a status of 0, and this
        // would be there for ever.
        let spoil = |status: u8| (status & DRIVER_OK != 0).then_some(status | NEEDS_RESET);
        if self.status.fetch_update(Ordering::AcqRel, Ordering::Acquire, spoil).is_err() {
            return;
        }
        self.needs_resets.add(1);
        if self.needs_resets.get() <= LOGGED_MAX {
            tracing::warn!("{} stops until its driver resets it: {why}", self.id);
        }
        self.config();
    }
}
