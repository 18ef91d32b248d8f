//! How guests reach the bus: ECAM, the ports of configuration mechanism 1, and memory windows.
//!
//! | | Where | Reaches |
//! |---|---|---|
//! | [`Ecam`] (PCI Express 5.0, 7.2.2) | 1 MiB of memory: bus 0 | all 4096 bytes of a function |
//! | [`ConfigPorts`] (PCI 3.0, 3.2.2.3.2) | 0xcf8 address, 0xcfc data | the first 256 |
//! | [`Window`] | a window of memory | BARs |

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::root::{ConfigAddress, PciRoot};
use crate::bus::BusDevice;

/// Bytes of configuration space per function.
const FUNCTION_BYTES: u64 = 4096;
/// Bytes of ECAM for one bus.
pub const ECAM_BYTES: u64 = FUNCTION_BYTES << 8;
/// First port.
pub const CONFIG_PORTS_BASE: u64 = 0xcf8;
/// Ports.
pub const CONFIG_PORTS_LEN: u64 = 8;

const DATA: u64 = 4;
const ENABLE: u32 = 1 << 31;

/// The memory window of configuration space.
pub struct Ecam {
    root: Arc<PciRoot>,
}

impl Ecam {
    #[must_use]
    pub fn new(root: Arc<PciRoot>) -> Self {
        Self { root }
    }

    /// `None` for an access that is not within one function.
    fn address(offset: u64, len: usize) -> Option<ConfigAddress> {
        let [low, high, bus, ..] = offset.to_le_bytes();
        let device = u16::from_le_bytes([high, bus]) >> 4;
        let [function, bus] = device.to_le_bytes();
        let offset = u16::from_le_bytes([low, high & 0xf]);
        within(offset, len).then_some(ConfigAddress {
            bus,
            slot: function >> 3,
            function: function & 7,
            offset,
        })
    }
}

fn within(offset: u16, len: usize) -> bool {
    u64::try_from(len).is_ok_and(|len| u64::from(offset) + len <= FUNCTION_BYTES)
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match Self::address(offset, data.len()) {
            Some(address) => self.root.read_config(address, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(address) = Self::address(offset, data.len()) {
            self.root.write_config(address, data);
        }
    }
}

/// The pair of ports.
pub struct ConfigPorts {
    root: Arc<PciRoot>,
    address: AtomicU32,
}

impl ConfigPorts {
    #[must_use]
    pub fn new(root: Arc<PciRoot>) -> Self {
        Self { root, address: AtomicU32::new(0) }
    }

    /// What was last written to the address port.
    #[must_use]
    pub fn save(&self) -> u32 {
        self.address.load(Ordering::Acquire)
    }

    /// Any value is one that a guest could have written.
    pub fn restore(&self, address: u32) {
        self.address.store(address, Ordering::Release);
    }

    fn target(&self, offset: u64) -> Option<ConfigAddress> {
        let address = self.save();
        let within_register = u8::try_from(offset.checked_sub(DATA)?).ok()?;
        let [register, device, bus, _] = address.to_le_bytes();
        (address & ENABLE != 0).then_some(ConfigAddress {
            bus,
            slot: device >> 3,
            function: device & 7,
            offset: u16::from((register & 0xfc) | (within_register & 3)),
        })
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match (self.target(offset), data.len()) {
            (Some(address), _) => self.root.read_config(address, data),
            (None, 4) if offset == 0 => data.copy_from_slice(&self.save().to_le_bytes()),
            _ => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // The address port is one register of 32 bits; narrower writes are other devices'.
        match (self.target(offset), <[u8; 4]>::try_from(data)) {
            (Some(address), _) => self.root.write_config(address, data),
            (None, Ok(address)) if offset == 0 => self.restore(u32::from_le_bytes(address)),
            _ => {}
        }
    }
}

/// A stretch of memory in which BARs may be.
pub struct Window {
    root: Arc<PciRoot>,
    base: u64,
}

impl Window {
    #[must_use]
    pub fn new(root: Arc<PciRoot>, base: u64) -> Self {
        Self { root, base }
    }
}

impl BusDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.root.read_memory(self.base.saturating_add(offset), data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.root.write_memory(self.base.saturating_add(offset), data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::Bus;
    use crate::pci::Region;
    use crate::pci::bridge::HostBridge;
    use crate::pci::root::Windows;
    use proptest::prelude::*;

    const ECAM: u64 = 0xe000_0000;

    fn buses() -> (Bus, Bus) {
        let low = Region { base: 0xc000_0000, len: 0x1000_0000 };
        let high = Region { base: 1 << 36, len: 1 << 32 };
        let root = Arc::new(PciRoot::new(Windows { low, high }));
        root.insert(0, Arc::new(HostBridge::default())).unwrap();
        let (port, mmio) = (Bus::pio(), Bus::mmio());
        let ports = Arc::new(ConfigPorts::new(Arc::clone(&root)));
        port.insert(CONFIG_PORTS_BASE, CONFIG_PORTS_LEN, ports).unwrap();
        mmio.insert(ECAM, ECAM_BYTES, Arc::new(Ecam::new(root))).unwrap();
        (port, mmio)
    }

    fn by_ports(port: &Bus, address: u32, at: u64, data: &mut [u8]) {
        port.write(0xcf8, &address.to_le_bytes());
        port.read(0xcfc + at, data);
    }

    #[test]
    fn both_ways_lead_to_the_same_registers() {
        let (port, mmio) = buses();
        let (mut one, mut other) = ([0; 4], [0; 4]);
        by_ports(&port, 0x8000_0000, 0, &mut one);
        mmio.read(ECAM, &mut other);
        assert_eq!(one, [0x36, 0x1b, 0x08, 0x00]);
        assert_eq!(one, other);
        by_ports(&port, 0x8000_0008, 2, &mut one[..2]);
        assert_eq!(one[..2], [0x00, 0x06], "the class of a host bridge");
        mmio.write(ECAM + 0x3c, &[0x5a]);
        by_ports(&port, 0x8000_003c, 0, &mut one[..1]);
        assert_eq!(one[0], 0x5a);
    }

    #[test]
    fn absent_functions_and_a_disabled_address_read_as_ones() {
        let (port, mmio) = buses();
        let mut data = [0; 4];
        for address in [0x8000_0800, 0x8001_0000, 0x8000_0100, 0x0000_0000] {
            by_ports(&port, address, 0, &mut data);
            assert_eq!(data, [0xff; 4], "{address:#x}");
            data = [0; 4];
        }
        port.read(0xcf8, &mut data);
        assert_eq!(data, [0; 4]);
        mmio.read(ECAM + 0x8000, &mut data);
        assert_eq!(data, [0xff; 4]);
        mmio.read(ECAM + 0xffe, &mut data);
        assert_eq!(data, [0xff; 4], "across two functions");
        mmio.read(ECAM + 0x100, &mut data);
        assert_eq!(data, [0; 4], "no extended capability");
    }

    proptest! {
        #[test]
        fn no_access_panics(
            accesses in prop::collection::vec(
                (any::<bool>(), any::<u32>(), prop::collection::vec(any::<u8>(), 1..9)), 1..60),
        ) {
            let (port, mmio) = buses();
            for (ports, address, mut data) in accesses {
                let (bus, address) = if ports {
                    (&port, 0xcf0 + u64::from(address % 0x20))
                } else {
                    (&mmio, ECAM + u64::from(address) % ECAM_BYTES)
                };
                bus.write(address, &data);
                bus.read(address, &mut data);
            }
            let mut data = [0; 4];
            mmio.read(ECAM, &mut data);
            prop_assert_eq!(data, [0x36, 0x1b, 0x08, 0x00]);
        }
    }
}
