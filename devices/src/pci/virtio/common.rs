//! The common configuration structure (virtio 1.2, 4.1.4.3): registers without consequences.
//!
//! What enters: accesses of any size; what leaves: the one write that has a consequence, that of
//! the status, as a value. What always holds: a write counts only as a whole register at its
//! natural width (a 64-bit one also as halves); a queue does not change once it is enabled.

use std::sync::atomic::Ordering;

use super::interrupt::{Interrupts, NO_VECTOR};
use super::layout::COMMON_BYTES;

/// Status bits (2.1).
pub(super) const ACKNOWLEDGE: u8 = 1;
pub(super) const DRIVER: u8 = 2;
pub(super) const DRIVER_OK: u8 = 4;
pub(super) const FEATURES_OK: u8 = 8;
pub(super) const NEEDS_RESET: u8 = 0x40;
pub(super) const FAILED: u8 = 0x80;

/// The device complies with version 1 (6).
pub(super) const VERSION_1: u64 = 1 << 32;
/// Used and available events (2.7.10).
pub(super) const EVENT_IDX: u64 = 1 << 29;

const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const CONFIG_VECTOR: u64 = 0x10;
const STATUS: u64 = 0x14;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_DESC: u64 = 0x20;
const QUEUE_DRIVER: u64 = 0x28;
const QUEUE_DEVICE: u64 = 0x30;

/// What the driver said about one queue; its vector is in [`Interrupts`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct QueueSetup {
    pub size_max: u16,
    pub size: u16,
    pub enabled: bool,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
}

impl QueueSetup {
    fn new(size_max: u16) -> Self {
        Self { size_max, size: size_max, enabled: false, desc: 0, avail: 0, used: 0 }
    }
}

/// The registers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Common {
    /// Features on offer.
    pub offered: u64,
    pub device_feature_select: u32,
    pub driver_feature_select: u32,
    pub driver_features: u64,
    pub queue_select: u16,
    pub queues: Vec<QueueSetup>,
}

impl Common {
    pub fn new(offered: u64, queue_sizes: &[u16]) -> Self {
        Self {
            offered,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: queue_sizes.iter().map(|size| QueueSetup::new(*size)).collect(),
        }
    }

    pub fn reset(&mut self) {
        let sizes: Vec<_> = self.queues.iter().map(|queue| queue.size_max).collect();
        *self = Self::new(self.offered, &sizes);
    }

    /// Whether the device can work with what the driver chose (3.1.1, step 5).
    pub fn features_acceptable(&self) -> bool {
        self.driver_features & !self.offered == 0 && self.driver_features & VERSION_1 != 0
    }

    pub fn read(&self, offset: u64, data: &mut [u8], interrupts: &Interrupts) {
        let image = self.image(interrupts);
        for (at, byte) in (offset..).zip(data) {
            *byte = usize::try_from(at).ok().and_then(|at| image.get(at).copied()).unwrap_or(0);
        }
    }

    fn image(&self, interrupts: &Interrupts) -> Vec<u8> {
        let select = usize::from(self.queue_select);
        let vector = interrupts.queue_vectors.get(select);
        let queue = self.queues.get(select);
        let word = |of: fn(&QueueSetup) -> u64| queue.map_or(0, of).to_le_bytes();
        let mut image = Vec::new();
        image.extend(self.device_feature_select.to_le_bytes());
        image.extend(half(self.offered, self.device_feature_select).to_le_bytes());
        image.extend(self.driver_feature_select.to_le_bytes());
        image.extend(half(self.driver_features, self.driver_feature_select).to_le_bytes());
        image.extend(interrupts.config_vector.load(Ordering::Acquire).to_le_bytes());
        image.extend(u16::try_from(self.queues.len()).unwrap_or(0).to_le_bytes());
        image.push(interrupts.status.load(Ordering::Acquire));
        image.push(interrupts.generation.load(Ordering::Acquire));
        image.extend(self.queue_select.to_le_bytes());
        // A queue that is not there has size 0.
        image.extend(queue.map_or(0, |queue| queue.size).to_le_bytes());
        let vector = vector.map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire));
        image.extend(vector.to_le_bytes());
        image.extend(u16::from(queue.is_some_and(|queue| queue.enabled)).to_le_bytes());
        image.extend(queue.map_or(0, |_| self.queue_select).to_le_bytes());
        image.extend(word(|queue| queue.desc));
        image.extend(word(|queue| queue.avail));
        image.extend(word(|queue| queue.used));
        debug_assert_eq!(u64::try_from(image.len()), Ok(COMMON_BYTES));
        image
    }

    /// Takes a write; a value for the status is returned.
    pub fn write(&mut self, offset: u64, data: &[u8], interrupts: &Interrupts) -> Option<u8> {
        let status = interrupts.status.load(Ordering::Acquire);
        match *data {
            [value] if offset == STATUS => return Some(value),
            [a, b] => self.write_16(offset, u16::from_le_bytes([a, b]), status, interrupts),
            [a, b, c, d] => self.write_32(offset, u32::from_le_bytes([a, b, c, d]), status),
            [a, b, c, d, e, f, g, h] if offset >= QUEUE_DESC && offset.is_multiple_of(8) => {
                self.write_32(offset, u32::from_le_bytes([a, b, c, d]), status);
                self.write_32(offset + 4, u32::from_le_bytes([e, f, g, h]), status);
            }
            _ => {}
        }
        None
    }

    fn write_16(&mut self, offset: u64, value: u16, status: u8, interrupts: &Interrupts) {
        let vector = interrupts.queue_vectors.get(usize::from(self.queue_select));
        match offset {
            CONFIG_VECTOR => {
                let vector = interrupts.vector_or_none(value);
                interrupts.config_vector.store(vector, Ordering::Release);
            }
            QUEUE_SELECT => self.queue_select = value,
            QUEUE_VECTOR => {
                if let Some(place) = vector {
                    place.store(interrupts.vector_or_none(value), Ordering::Release);
                }
            }
            QUEUE_SIZE => {
                if let Some(queue) = self.queue_in_setup(status)
                    && value.is_power_of_two()
                    && value <= queue.size_max
                {
                    queue.size = value;
                }
            }
            QUEUE_ENABLE if value == 1 => {
                if let Some(queue) = self.queue_in_setup(status) {
                    queue.enabled = true;
                }
            }
            _ => {}
        }
    }

    fn write_32(&mut self, offset: u64, value: u32, status: u8) {
        match offset {
            DEVICE_FEATURE_SELECT => self.device_feature_select = value,
            DRIVER_FEATURE_SELECT => self.driver_feature_select = value,
            DRIVER_FEATURE if status & FEATURES_OK == 0 => {
                let old = self.driver_features;
                let value = u64::from(value);
                self.driver_features = match self.driver_feature_select {
                    0 => old >> 32 << 32 | value,
                    1 => value << 32 | old & 0xffff_ffff,
                    // There are no features past 64; a driver that wants one is refused.
                    _ => old,
                };
            }
            _ => {
                let Some(queue) = self.queue_in_setup(status) else { return };
                let place = match offset & !7 {
                    QUEUE_DESC => &mut queue.desc,
                    QUEUE_DRIVER => &mut queue.avail,
                    QUEUE_DEVICE => &mut queue.used,
                    _ => return,
                };
                match offset & 7 {
                    0 => *place = *place >> 32 << 32 | u64::from(value),
                    4 => *place = u64::from(value) << 32 | *place & 0xffff_ffff,
                    _ => {}
                }
            }
        }
    }

    /// The selected queue, while the driver may still change it.
    fn queue_in_setup(&mut self, status: u8) -> Option<&mut QueueSetup> {
        let queue = self.queues.get_mut(usize::from(self.queue_select))?;
        (!queue.enabled && status & DRIVER_OK == 0).then_some(queue)
    }
}

fn half(features: u64, select: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = features.to_le_bytes();
    match select {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}
