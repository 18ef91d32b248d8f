//! PCI functions with a virtio device, found by configuration mechanism 1: its ports need no
//! table that says where they are.

use core::ptr::with_exposed_provenance_mut;

use guest_logic::machine::{PCI_ADDRESS_PORT, PCI_DATA_PORT};
use virtio_drivers::transport::DeviceType;
use virtio_drivers::transport::pci::bus::{
    BarInfo, Command, ConfigurationAccess, DeviceFunction, PCI_CAP_ID_VNDR, PciRoot,
};
use virtio_drivers::transport::pci::{
    PciTransport, VIRTIO_PCI_CAP_COMMON_CFG, VIRTIO_PCI_CAP_NOTIFY_CFG, virtio_device_type,
};

use crate::map::{Map, NotMapped};
use crate::port;
use crate::virtio::Memory;

const ENABLE: u32 = 1 << 31;
const BARS: u8 = 6;

/// Fields of `struct virtio_pci_cap` (virtio 1.2, 4.1.4) and of what follows it for notifications.
const CAP_BAR: u8 = 4;
const CAP_OFFSET: u8 = 8;
const CAP_MULTIPLIER: u8 = 16;
/// Fields of the common configuration (virtio 1.2, 4.1.4.3).
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_NOTIFY_OFF: u64 = 0x1e;

struct Ports;

impl Ports {
    fn select(function: DeviceFunction, register: u8) {
        let DeviceFunction { bus, device, function } = function;
        let place = u32::from_be_bytes([0, bus, device << 3 | function, register & 0xfc]);
        port::output_u32(PCI_ADDRESS_PORT, ENABLE | place);
    }
}

impl ConfigurationAccess for Ports {
    fn read_word(&self, function: DeviceFunction, register: u8) -> u32 {
        Self::select(function, register);
        port::input_u32(PCI_DATA_PORT)
    }

    fn write_word(&mut self, function: DeviceFunction, register: u8, data: u32) {
        Self::select(function, register);
        port::output_u32(PCI_DATA_PORT, data);
    }

    unsafe fn unsafe_clone(&self) -> Self {
        Self
    }
}

/// The first function with a device of this kind.
fn find(root: &PciRoot<Ports>, kind: DeviceType) -> Option<DeviceFunction> {
    let mut all = root.enumerate_bus(0);
    all.find(|(_, info)| virtio_device_type(info) == Some(kind)).map(|(function, _)| function)
}

/// Maps the registers of all virtio functions, whose BARs the VMM has placed.
pub fn map(map: &mut Map) -> Result<(), NotMapped> {
    let mut root = PciRoot::new(Ports);
    for (function, info) in root.enumerate_bus(0) {
        if virtio_device_type(&info).is_none() {
            continue;
        }
        for bar in root.bars(function).map_err(|_| NotMapped)?.into_iter().flatten() {
            if let BarInfo::Memory { address, size, .. } = bar {
                map.add_devices(address, size)?;
            }
        }
    }
    Ok(())
}

/// A function that a driver may take.
pub struct Function {
    pub transport: PciTransport,
    common: u64,
    notify: u64,
    multiplier: u32,
}

/// Where a queue's notifications go. The transport's own way reads registers every time, each an
/// exit to the VMM; this one writes just the doorbell, which the host's kernel takes.
pub struct Doorbell {
    register: *mut u16,
    queue: u16,
}

impl Function {
    /// The first function with a device of this kind; the outer None if there is none.
    pub fn open(kind: DeviceType) -> Option<Result<Self, &'static str>> {
        let mut root = PciRoot::new(Ports);
        let function = find(&root, kind)?;
        let (_, command) = root.get_status_command(function);
        root.set_command(function, command | Command::MEMORY_SPACE | Command::BUS_MASTER);
        Some(Self::at(&mut root, function).ok_or("is not a modern virtio device"))
    }

    fn at(root: &mut PciRoot<Ports>, function: DeviceFunction) -> Option<Self> {
        let transport = PciTransport::new::<Memory, _>(root, function).ok()?;
        let (common, _) = structure(root, function, VIRTIO_PCI_CAP_COMMON_CFG)?;
        let (notify, capability) = structure(root, function, VIRTIO_PCI_CAP_NOTIFY_CFG)?;
        let multiplier = Ports.read_word(function, capability + CAP_MULTIPLIER);
        Some(Self { transport, common, notify, multiplier })
    }

    pub fn doorbell(&mut self, queue: u16) -> Doorbell {
        let at = |address: u64| {
            with_exposed_provenance_mut::<u16>(usize::try_from(address).unwrap_or(0))
        };
        // SAFETY: both registers lie in the common configuration, which `map` has mapped; they
        // are no memory that Rust knows of.
        let offset = unsafe {
            at(self.common + QUEUE_SELECT).write_volatile(queue);
            at(self.common + QUEUE_NOTIFY_OFF).read_volatile()
        };
        let register = at(self.notify + u64::from(offset) * u64::from(self.multiplier));
        Doorbell { register, queue }
    }
}

impl Doorbell {
    pub fn ring(&self) {
        // SAFETY: the register lies in the notification structure, which `map` has mapped; it is
        // no memory that Rust knows of.
        unsafe { self.register.write_volatile(self.queue) };
    }
}

/// The address of a virtio structure, and the capability that names it.
fn structure(root: &mut PciRoot<Ports>, function: DeviceFunction, kind: u8) -> Option<(u64, u8)> {
    let is_it = |header: u16| header.to_le_bytes()[1] == kind;
    let capability = root
        .capabilities(function)
        .find(|found| found.id == PCI_CAP_ID_VNDR && is_it(found.private_header))?
        .offset;
    let bar = Ports.read_word(function, capability + CAP_BAR).to_le_bytes()[0];
    let offset = Ports.read_word(function, capability + CAP_OFFSET);
    if bar >= BARS {
        return None;
    }
    let (address, _) = root.bar_info(function, bar).ok()??.memory_address_size()?;
    Some((address + u64::from(offset), capability))
}
