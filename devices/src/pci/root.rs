//! The root of the one bus: finds the function that an access is for.
//!
//! What enters: configuration accesses by slot, memory accesses by address; what leaves: calls of
//! functions. What always holds: see [`super`]; the routes are what the functions' registers say,
//! computed anew whenever one of them may have changed.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use thiserror::Error;

use super::{PciFunction, Region, SLOTS};

/// Errors of filling slots.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum RootError {
    #[error("There is no PCI slot {0}")]
    NoSlot(u8),
    #[error("PCI slot {0} is taken")]
    Taken(u8),
}

/// Where functions may place their memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Below 4 GiB.
    pub low: Region,
    /// Above RAM.
    pub high: Region,
}

impl Windows {
    fn allow(&self, region: Region) -> bool {
        self.low.contains(region) || self.high.contains(region)
    }
}

#[derive(Clone)]
struct Route {
    slot: u8,
    region: Region,
    function: Arc<dyn PciFunction>,
}

/// The bus.
pub struct PciRoot {
    windows: Windows,
    slots: RwLock<[Option<Arc<dyn PciFunction>>; SLOTS as usize]>,
    routes: RwLock<Vec<Route>>,
    /// One re-computation at a time, so that the newest registers have the last word.
    placing: Mutex<()>,
}

impl PciRoot {
    #[must_use]
    pub fn new(windows: Windows) -> Self {
        Self {
            windows,
            slots: RwLock::default(),
            routes: RwLock::default(),
            placing: Mutex::default(),
        }
    }

    #[must_use]
    pub fn windows(&self) -> Windows {
        self.windows
    }

    /// Puts a function into a slot.
    pub fn insert(&self, slot: u8, function: Arc<dyn PciFunction>) -> Result<(), RootError> {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let place = slots.get_mut(usize::from(slot)).ok_or(RootError::NoSlot(slot))?;
        if place.is_some() {
            return Err(RootError::Taken(slot));
        }
        *place = Some(function);
        drop(slots);
        self.place();
        Ok(())
    }

    /// The lowest free slot.
    #[must_use]
    pub fn free_slot(&self) -> Option<u8> {
        let slots = self.slots();
        (0..SLOTS).find(|slot| slots[usize::from(*slot)].is_none())
    }

    /// Reads configuration space: a device of bus 0 is a slot, and only function 0 is there.
    pub fn read_config(&self, address: ConfigAddress, data: &mut [u8]) {
        match self.function(address) {
            Some(function) => function.read_config(address.offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes configuration space.
    pub fn write_config(&self, address: ConfigAddress, data: &[u8]) {
        if let Some(function) = self.function(address) {
            function.write_config(address.offset, data);
            self.place();
        }
    }

    /// Reads memory of whoever is at `address`.
    pub fn read_memory(&self, address: u64, data: &mut [u8]) {
        match self.route(address, data.len()) {
            Some(route) => route.function.read_memory(address - route.region.base, data),
            None => data.fill(0xff),
        }
    }

    /// Writes memory of whoever is at `address`.
    pub fn write_memory(&self, address: u64, data: &[u8]) {
        if let Some(route) = self.route(address, data.len()) {
            route.function.write_memory(address - route.region.base, data);
        }
    }

    /// Makes the routes what the functions' registers say; for whoever changed registers past
    /// [`PciRoot::write_config`].
    pub fn place(&self) {
        let _placing = self.placing();
        let functions: Vec<_> =
            (0..SLOTS).zip(self.slots().iter().cloned()).filter_map(pair).collect();
        let mut routes: Vec<Route> = Vec::new();
        for (slot, function) in functions {
            let Some(region) = function.region().filter(|region| self.windows.allow(*region))
            else {
                continue;
            };
            if routes.iter().all(|route| !route.region.overlaps(region)) {
                routes.push(Route { slot, region, function });
            }
        }
        let mut current = self.routes.write().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut *current, routes.clone());
        drop(current);
        let same =
            |one: &Route, other: &Route| one.slot == other.slot && one.region == other.region;
        // All that go, before any that come: two may have changed places.
        for gone in old.iter().filter(|old| !routes.iter().any(|new| same(old, new))) {
            gone.function.placed(None);
        }
        for new in routes.iter().filter(|new| !old.iter().any(|old| same(old, new))) {
            new.function.placed(Some(new.region.base));
        }
    }

    fn function(&self, address: ConfigAddress) -> Option<Arc<dyn PciFunction>> {
        if address.bus != 0 || address.function != 0 {
            return None;
        }
        self.slots().get(usize::from(address.slot))?.clone()
    }

    fn route(&self, address: u64, len: usize) -> Option<Route> {
        let access = Region { base: address, len: u64::try_from(len).ok()? };
        let routes = self.routes.read().unwrap_or_else(PoisonError::into_inner);
        routes.iter().find(|route| route.region.contains(access)).cloned()
    }

    fn slots(&self) -> RwLockReadGuard<'_, [Option<Arc<dyn PciFunction>>; SLOTS as usize]> {
        self.slots.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn placing(&self) -> MutexGuard<'_, ()> {
        self.placing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn pair<T>((slot, function): (u8, Option<T>)) -> Option<(u8, T)> {
    function.map(|function| (slot, function))
}

/// A place in configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfigAddress {
    pub bus: u8,
    /// Below 32.
    pub slot: u8,
    /// Below 8.
    pub function: u8,
    /// Below 4096, the access's end included.
    pub offset: u16,
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOW: Region = Region { base: 0xc000_0000, len: 0x1000_0000 };
    const HIGH: Region = Region { base: 1 << 36, len: 1 << 32 };

    #[derive(Default)]
    struct Probe {
        region: Mutex<Option<Region>>,
        placed: Mutex<Vec<Option<u64>>>,
        written: Mutex<Vec<(u64, usize)>>,
    }

    impl PciFunction for Probe {
        fn read_config(&self, _offset: u16, data: &mut [u8]) {
            data.fill(0x11);
        }

        fn write_config(&self, _offset: u16, data: &[u8]) {
            if let Ok(base) = data.try_into().map(u64::from_le_bytes) {
                let region = Region { base, len: 0x1000 };
                *self.region.lock().unwrap() = (base != 0).then_some(region);
            }
        }

        fn region(&self) -> Option<Region> {
            *self.region.lock().unwrap()
        }

        fn placed(&self, base: Option<u64>) {
            self.placed.lock().unwrap().push(base);
        }

        fn write_memory(&self, offset: u64, data: &[u8]) {
            self.written.lock().unwrap().push((offset, data.len()));
        }
    }

    fn at(slot: u8) -> ConfigAddress {
        ConfigAddress { bus: 0, slot, function: 0, offset: 0 }
    }

    #[test]
    fn memory_outside_the_windows_is_never_decoded() {
        let root = PciRoot::new(Windows { low: LOW, high: HIGH });
        let probe = Arc::new(Probe::default());
        root.insert(3, probe.clone()).unwrap();
        for base in [0x1000, 0xfee0_0000, 0xcfff_f001, u64::MAX - 0xfff, HIGH.base - 0x1000] {
            root.write_config(at(3), &u64::to_le_bytes(base));
            root.write_memory(base, &[0; 4]);
        }
        assert!(probe.placed.lock().unwrap().is_empty());
        assert!(probe.written.lock().unwrap().is_empty());
        root.write_config(at(3), &HIGH.base.to_le_bytes());
        root.write_memory(HIGH.base + 8, &[0; 4]);
        root.write_memory(HIGH.base + 0xffe, &[0; 4]);
        assert_eq!(*probe.placed.lock().unwrap(), [Some(HIGH.base)]);
        assert_eq!(*probe.written.lock().unwrap(), [(8, 4)]);
    }

    #[test]
    fn the_lower_slot_has_the_addresses_that_two_want() {
        let root = PciRoot::new(Windows { low: LOW, high: HIGH });
        let (one, two) = (Arc::new(Probe::default()), Arc::new(Probe::default()));
        root.insert(1, one.clone()).unwrap();
        root.insert(2, two.clone()).unwrap();
        assert_eq!(root.insert(2, one.clone()), Err(RootError::Taken(2)));
        assert_eq!(root.insert(32, one.clone()), Err(RootError::NoSlot(32)));
        assert_eq!(root.free_slot(), Some(0));
        root.write_config(at(2), &LOW.base.to_le_bytes());
        root.write_config(at(1), &(LOW.base + 0x800).to_le_bytes());
        root.write_config(at(1), &0u64.to_le_bytes());
        assert_eq!(*two.placed.lock().unwrap(), [Some(LOW.base), None, Some(LOW.base)]);
        assert_eq!(*one.placed.lock().unwrap(), [Some(LOW.base + 0x800), None]);
    }

    #[test]
    fn nobody_reads_as_ones() {
        let root = PciRoot::new(Windows { low: LOW, high: HIGH });
        root.insert(0, Arc::new(Probe::default())).unwrap();
        let mut data = [0; 4];
        root.read_config(at(0), &mut data);
        assert_eq!(data, [0x11; 4]);
        for address in [
            at(1),
            ConfigAddress { bus: 1, ..at(0) },
            ConfigAddress { function: 1, ..at(0) },
            ConfigAddress { slot: 200, ..at(0) },
        ] {
            let mut data = [0; 4];
            root.read_config(address, &mut data);
            assert_eq!(data, [0xff; 4]);
        }
        root.read_memory(LOW.base, &mut data);
        assert_eq!(data, [0xff; 4]);
    }
}
