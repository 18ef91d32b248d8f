//! Port and memory-mapped buses.
//!
//! What enters: an address and the bytes of one access, from a vCPU thread; what leaves: a call
//! to the device that registered the range, with the offset in that range. What always holds:
//! ranges never overlap; an address that nobody owns reads as all ones and swallows writes; an
//! access that crosses a range's end is split into bytes, as an 8-bit bus would do it.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use thiserror::Error;

use crate::counters::{Counter, Counters};

/// A device on a bus. `offset` counts from the start of the registered range and
/// `offset + data.len()` never passes its end.
pub trait BusDevice: Send + Sync {
    /// Fills `data`.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes `data`.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Errors of range registration.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BusError {
    /// Nothing to register.
    #[error("Empty {bus} range at {base:#x}")]
    Empty { bus: &'static str, base: u64 },
    /// The range does not fit the bus.
    #[error("Range {base:#x}+{len:#x} ends past the {bus} bus")]
    OutOfBus { bus: &'static str, base: u64, len: u64 },
    /// Somebody owns a part of the range.
    #[error("{bus} range {base:#x}+{len:#x} overlaps the one at {other:#x}")]
    Overlap { bus: &'static str, base: u64, len: u64, other: u64 },
}

struct Entry {
    base: u64,
    /// Inclusive, so that a range may end at the last address.
    last: u64,
    device: Arc<dyn BusDevice>,
}

/// One address space of devices.
pub struct Bus {
    name: &'static str,
    last_address: u64,
    /// Sorted by `base`.
    entries: RwLock<Vec<Entry>>,
    unknown_reads: Counter,
    unknown_writes: Counter,
}

impl Bus {
    /// The 64 Ki ports of x86.
    #[must_use]
    pub fn pio() -> Self {
        Self::new("PIO", 0xffff)
    }

    /// Guest physical addresses.
    #[must_use]
    pub fn mmio() -> Self {
        Self::new("MMIO", u64::MAX)
    }

    fn new(name: &'static str, last_address: u64) -> Self {
        Self {
            name,
            last_address,
            entries: RwLock::default(),
            unknown_reads: Counter::default(),
            unknown_writes: Counter::default(),
        }
    }

    /// Gives `device` the `len` addresses from `base`.
    pub fn insert(&self, base: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let bus = self.name;
        let span = len.checked_sub(1).ok_or(BusError::Empty { bus, base })?;
        let last = base
            .checked_add(span)
            .filter(|last| *last <= self.last_address)
            .ok_or(BusError::OutOfBus { bus, base, len })?;
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        let at = entries.partition_point(|entry| entry.last < base);
        if let Some(entry) = entries.get(at)
            && entry.base <= last
        {
            return Err(BusError::Overlap { bus, base, len, other: entry.base });
        }
        entries.insert(at, Entry { base, last, device });
        Ok(())
    }

    /// Takes away the range that starts at `base`.
    pub fn remove(&self, base: u64) -> Option<Arc<dyn BusDevice>> {
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        let at = entries.binary_search_by_key(&base, |entry| entry.base).ok()?;
        Some(entries.remove(at).device)
    }

    /// Reads `data.len()` bytes at `address`.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Found::Whole(device, offset) => device.read(offset, data),
            Found::Nothing => {
                self.unknown_reads.add(1);
                data.fill(0xff);
            }
            Found::Crossing => {
                for (at, byte) in (0u64..).zip(data.chunks_mut(1)) {
                    match address.checked_add(at) {
                        Some(address) => self.read(address, byte),
                        None => byte.fill(0xff),
                    }
                }
            }
        }
    }

    /// Writes `data` at `address`.
    pub fn write(&self, address: u64, data: &[u8]) {
        match self.find(address, data.len()) {
            Found::Whole(device, offset) => device.write(offset, data),
            Found::Nothing => self.unknown_writes.add(1),
            Found::Crossing => {
                for (at, byte) in (0u64..).zip(data.chunks(1)) {
                    if let Some(address) = address.checked_add(at) {
                        self.write(address, byte);
                    }
                }
            }
        }
    }

    fn find(&self, address: u64, len: usize) -> Found {
        let span = u64::try_from(len).unwrap_or(u64::MAX).saturating_sub(1);
        let Some(access_last) = address.checked_add(span) else {
            return Found::Crossing;
        };
        let entries = self.lock();
        let at = entries.partition_point(|entry| entry.last < address);
        match entries.get(at) {
            Some(entry) if entry.base <= address && access_last <= entry.last => {
                // Cloned so that the device runs without the lock: it may register ranges itself.
                Found::Whole(Arc::clone(&entry.device), address - entry.base)
            }
            Some(entry) if entry.base <= access_last && len > 1 => Found::Crossing,
            _ => Found::Nothing,
        }
    }

    fn lock(&self) -> RwLockReadGuard<'_, Vec<Entry>> {
        self.entries.read().unwrap_or_else(PoisonError::into_inner)
    }
}

enum Found {
    Whole(Arc<dyn BusDevice>, u64),
    /// Some bytes of the access belong to a device and others do not, or to another one.
    Crossing,
    Nothing,
}

impl Counters for Bus {
    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("unknown_reads", self.unknown_reads.get()),
            ("unknown_writes", self.unknown_writes.get()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;

    /// Reads give tag + offset of each byte; writes are recorded.
    struct Probe {
        tag: u8,
        writes: Mutex<Vec<(u64, Vec<u8>)>>,
    }

    impl Probe {
        fn new(tag: u8) -> Arc<Self> {
            Arc::new(Self { tag, writes: Mutex::default() })
        }
    }

    impl BusDevice for Probe {
        fn read(&self, offset: u64, data: &mut [u8]) {
            for (at, byte) in (offset..).zip(data) {
                *byte = self.tag.wrapping_add(at.to_le_bytes()[0]);
            }
        }

        fn write(&self, offset: u64, data: &[u8]) {
            self.writes.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn ranges_that_overlap_are_refused() {
        let bus = Bus::pio();
        bus.insert(0x100, 0x10, Probe::new(0)).unwrap();
        bus.insert(0x110, 0x10, Probe::new(0)).unwrap();
        bus.insert(0xf0, 0x10, Probe::new(0)).unwrap();
        for (base, len, other) in [
            (0x100, 0x10, 0x100),
            (0x10f, 1, 0x100),
            (0x10f, 2, 0x100),
            (0xe0, 0x11, 0xf0),
            (0x11f, 0x100, 0x110),
            (0x0, 0x1000, 0xf0),
        ] {
            assert_eq!(
                bus.insert(base, len, Probe::new(0)),
                Err(BusError::Overlap { bus: "PIO", base, len, other })
            );
        }
        assert!(bus.remove(0x100).is_some());
        assert!(bus.remove(0x100).is_none());
        bus.insert(0x104, 4, Probe::new(0)).unwrap();
    }

    #[test]
    fn ranges_that_do_not_fit_are_refused() {
        let bus = Bus::pio();
        assert_eq!(bus.insert(5, 0, Probe::new(0)), Err(BusError::Empty { bus: "PIO", base: 5 }));
        assert!(matches!(bus.insert(0xffff, 2, Probe::new(0)), Err(BusError::OutOfBus { .. })));
        bus.insert(0xffff, 1, Probe::new(0)).unwrap();
        let bus = Bus::mmio();
        bus.insert(u64::MAX, 1, Probe::new(0)).unwrap();
        assert!(matches!(bus.insert(u64::MAX, 2, Probe::new(0)), Err(BusError::OutOfBus { .. })));
        let mut data = [0; 4];
        bus.read(u64::MAX, &mut data);
        assert_eq!(data, [0, 0xff, 0xff, 0xff]);
    }

    #[test]
    fn unknown_addresses_read_as_ones_and_count() {
        let bus = Bus::mmio();
        let mut data = [0u8; 8];
        bus.read(0x1234, &mut data);
        assert_eq!(data, [0xff; 8]);
        bus.write(0x1234, &data);
        bus.write(u64::MAX, &data);
        assert_eq!(bus.counters(), vec![("unknown_reads", 1), ("unknown_writes", 2)]);
    }

    #[test]
    fn an_access_across_ranges_is_split() {
        let bus = Bus::pio();
        let low = Probe::new(0x10);
        let high = Probe::new(0x80);
        bus.insert(0x10, 4, low.clone()).unwrap();
        bus.insert(0x15, 4, high.clone()).unwrap();
        let mut data = [0u8; 4];
        bus.read(0x12, &mut data);
        assert_eq!(data, [0x12, 0x13, 0xff, 0x80]);
        bus.read(0xe, &mut data);
        assert_eq!(data, [0xff, 0xff, 0x10, 0x11]);
        bus.write(0x13, &[1, 2, 3, 4]);
        assert_eq!(*low.writes.lock().unwrap(), vec![(3, vec![1])]);
        assert_eq!(*high.writes.lock().unwrap(), vec![(0, vec![3]), (1, vec![4])]);
    }

    proptest! {
        #[test]
        fn lookups_agree_with_a_linear_search(
            ranges in prop::collection::vec((0u64..200, 1u64..20), 0..20),
            accesses in prop::collection::vec((0u64..230, 1usize..9), 0..50),
        ) {
            let bus = Bus::pio();
            let mut owner = vec![None; 256];
            for (tag, (base, len)) in (0u8..).zip(ranges) {
                let cells = usize::try_from(base).unwrap()..usize::try_from(base + len).unwrap();
                let free = owner[cells.clone()].iter().all(Option::is_none);
                let tag = tag.wrapping_mul(23);
                prop_assert_eq!(bus.insert(base, len, Probe::new(tag)).is_ok(), free);
                if free {
                    for (at, cell) in (0u8..).zip(&mut owner[cells]) {
                        *cell = Some(tag.wrapping_add(at));
                    }
                }
            }
            for (address, len) in accesses {
                let mut data = vec![0; len];
                bus.read(address, &mut data);
                let at = usize::try_from(address).unwrap();
                let expected: Vec<u8> =
                    owner[at..at + len].iter().map(|cell| cell.unwrap_or(0xff)).collect();
                prop_assert_eq!(data, expected);
            }
        }
    }
}
