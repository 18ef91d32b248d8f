//! Ports and addresses that the guest and the VMM agree on.

/// The first serial port's data register; the others follow it.
pub const SERIAL_PORT: u16 = 0x3f8;

/// ACPI's sleep control register of a reduced-hardware machine.
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// Sleep type 5 and the enable bit: the machine powers itself off (ACPI 6.5, 4.8.3.7).
pub const POWER_OFF: u8 = (5 << 2) | (1 << 5);

/// ACPI's reset register.
pub const RESET_PORT: u16 = 0x601;
/// What is written there to reset.
pub const RESET: u8 = 1;

/// PCI's configuration mechanism 1: the address register, and the data register.
pub const PCI_ADDRESS_PORT: u16 = 0xcf8;
pub const PCI_DATA_PORT: u16 = 0xcfc;

/// Where the local APIC is, unless software has moved it, which nobody does.
pub const LAPIC_ADDRESS: u32 = 0xfee0_0000;

/// Processors that the guest can start: the local APIC's eight bits name no more.
pub const VCPUS_MAX: u32 = 254;

pub const PAGE_SIZE: u64 = 4096;
