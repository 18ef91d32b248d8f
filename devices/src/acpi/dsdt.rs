//! The DSDT: what a guest cannot find out by probing. In ASL:
//!
//! ```text
//! Scope (\_SB)
//! {
//!     Device (COM1) { _HID PNP0501, ports 0x3f8 to 0x3ff, interrupt 4 }     when there is one
//!     Device (RTC)  { _HID PNP0B00, ports 0x70 and 0x71 }
//!     Device (PWRB) { _HID PNP0C0C }                                        power button
//!     Device (GED)  { _HID ACPI0013, interrupt 5; _EVT reads the event port
//!                     and notifies PWRB }
//!     Device (PCI0) { _HID PNP0A08, _CID PNP0A03, bus 0; its windows; no _PRT: functions
//!                     interrupt by messages only }                          when there is one
//!     Device (ECAM) { _HID PNP0C02, keeps configuration space reserved }
//!     Device (Cnnn) { _HID ACPI0007, _UID nnn }                             a vCPU each
//! }
//! Name (\_S5, Package () { 5, 5, 0, 0 })
//! ```

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Device, EISAName, Field, FieldAccessType, FieldEntry,
    FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, Name, Notify,
    OpRegion, OpRegionSpace, Package, Path, ResourceTemplate, Scope, Store, ZERO,
};
use acpi_tables::sdt::Sdt;

use super::pm;
use super::tables::{AcpiConfig, AcpiPci, OEM_ID, OEM_REVISION, OEM_TABLE_ID, bytes_of};
use crate::pci::access::{CONFIG_PORTS_BASE, CONFIG_PORTS_LEN, ECAM_BYTES};
use crate::serial::SERIAL_GSI;

const HEADER_BYTES: u32 = 36;
/// From revision 2 on integers have 64 bits.
const REVISION: u8 = 6;
const COM1_PORT: u16 = 0x3f8;
const COM1_PORTS: u8 = 8;
const CMOS_PORT: u16 = 0x70;
const CMOS_PORTS: u8 = 2;
/// Notify value: the button was pressed (ACPI 6.5, 5.6.6).
const NOTIFY_PRESSED: u8 = 0x80;

pub(super) fn build(config: &AcpiConfig) -> Vec<u8> {
    let mut devices = Vec::new();
    if config.serial {
        devices.extend(serial());
    }
    devices.extend(clock());
    devices.extend(power_button());
    devices.extend(event_device());
    if let Some(pci) = &config.pci {
        devices.extend(pci_bus(pci));
        devices.extend(ecam(pci));
    }
    for id in 0..config.vcpus {
        devices.extend(processor(id));
    }
    let mut dsdt = Sdt::new(*b"DSDT", HEADER_BYTES, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&Scope::raw(Path::new("\\_SB_"), devices));
    let (s5, zero) = (pm::SLEEP_TYPE_S5, 0u8);
    let off = Package::new(vec![&s5, &s5, &zero, &zero]);
    dsdt.append_slice(&bytes_of(&Name::new(Path::new("\\_S5_"), &off)));
    bytes_of(&dsdt)
}

/// An edge-triggered, active-high interrupt of the device's own: what an irqfd makes.
fn interrupt(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

fn name(path: &str, value: &dyn Aml) -> Name {
    Name::new(Path::new(path), value)
}

fn serial() -> Vec<u8> {
    let ports = IO::new(COM1_PORT, COM1_PORT, 0, COM1_PORTS);
    let irq = interrupt(SERIAL_GSI);
    bytes_of(&Device::new(
        Path::new("COM1"),
        vec![
            &name("_HID", &EISAName::new("PNP0501")),
            &name("_UID", &ZERO),
            &name("_DDN", &"COM1"),
            &name("_CRS", &ResourceTemplate::new(vec![&irq, &ports])),
        ],
    ))
}

fn clock() -> Vec<u8> {
    let ports = IO::new(CMOS_PORT, CMOS_PORT, 0, CMOS_PORTS);
    bytes_of(&Device::new(
        Path::new("RTC_"),
        vec![
            &name("_HID", &EISAName::new("PNP0B00")),
            &name("_CRS", &ResourceTemplate::new(vec![&ports])),
        ],
    ))
}

fn power_button() -> Vec<u8> {
    bytes_of(&Device::new(
        Path::new("PWRB"),
        vec![&name("_HID", &EISAName::new("PNP0C0C")), &name("_UID", &ZERO)],
    ))
}

/// ACPI 6.5, 5.6.9: the interrupt calls `_EVT`, which asks the event port what happened.
fn event_device() -> Vec<u8> {
    let irq = interrupt(pm::EVENT_GSI);
    let region_len = 1u8;
    let region =
        OpRegion::new(Path::new("EREG"), OpRegionSpace::SystemIO, &pm::EVENT_PORT, &region_len);
    let field = Field::new(
        Path::new("EREG"),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(*b"EVTS", 8)],
    );
    let (events, source) = (Local(0), Path::new("EVTS"));
    let (button, pressed) = (Path::new("\\_SB_.PWRB"), NOTIFY_PRESSED);
    let pick = And::new(&ZERO, &events, &pm::EVENT_POWER_BUTTON);
    let notify = Notify::new(&button, &pressed);
    let (read, act) = (Store::new(&events, &source), If::new(&pick, vec![&notify]));
    let method = Method::new(Path::new("_EVT"), 1, true, vec![&read, &act]);
    bytes_of(&Device::new(
        Path::new("GED_"),
        vec![
            &name("_HID", &"ACPI0013"),
            &name("_UID", &ZERO),
            &name("_CRS", &ResourceTemplate::new(vec![&irq])),
            &region,
            &field,
            &method,
        ],
    ))
}

/// PCI Firmware 3.3, 4.1 and 4.3: what the bus decodes. No function has ports, so the bus has none
/// to give but those of its configuration, which are its own.
fn pci_bus(pci: &AcpiPci) -> Vec<u8> {
    let bus = AddressSpace::new_bus_number(0u16, 0u16);
    let port = u16::try_from(CONFIG_PORTS_BASE).unwrap_or(0);
    let ports = IO::new(port, port, 1, u8::try_from(CONFIG_PORTS_LEN).unwrap_or(0));
    let uncached = AddressSpaceCacheable::NotCacheable;
    let (low, high) = (pci.windows.low, pci.windows.high);
    let low_last = low.last().unwrap_or(low.base);
    let low =
        AddressSpace::new_memory(uncached, true, address_32(low.base), address_32(low_last), None);
    let uncached = AddressSpaceCacheable::NotCacheable;
    let high_last = high.last().unwrap_or(high.base);
    let high = AddressSpace::new_memory(uncached, true, high.base, high_last, None);
    bytes_of(&Device::new(
        Path::new("PCI0"),
        vec![
            &name("_HID", &EISAName::new("PNP0A08")),
            &name("_CID", &EISAName::new("PNP0A03")),
            &name("_UID", &ZERO),
            &name("_SEG", &ZERO),
            &name("_BBN", &ZERO),
            &name("_CRS", &ResourceTemplate::new(vec![&bus, &ports, &low, &high])),
        ],
    ))
}

/// PCI Firmware 3.3, 4.1.2: configuration space is reserved by a motherboard resource.
fn ecam(pci: &AcpiPci) -> Vec<u8> {
    let space = Memory32Fixed::new(true, pci.ecam, address_32(ECAM_BYTES));
    bytes_of(&Device::new(
        Path::new("ECAM"),
        vec![
            &name("_HID", &EISAName::new("PNP0C02")),
            &name("_UID", &ZERO),
            &name("_CRS", &ResourceTemplate::new(vec![&space])),
        ],
    ))
}

/// What lies below 4 GiB.
fn address_32(address: u64) -> u32 {
    u32::try_from(address).unwrap_or(u32::MAX)
}

fn processor(id: u32) -> Vec<u8> {
    bytes_of(&Device::new(
        Path::new(&format!("C{id:03X}")),
        vec![&name("_HID", &"ACPI0007"), &name("_UID", &id)],
    ))
}
