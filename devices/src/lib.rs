//! Device models and, beside each, its state.
//!
//! A device knows no KVM: it is reached through a [`bus::Bus`] and interrupts through an
//! [`irq::IrqLine`], an eventfd that the VMM registers as irqfd. All devices use interior
//! mutability, so vCPU threads share them; every byte a guest writes is accepted and none panics.

// Allowed for the calls of the kernel that have no safe wrapper: `virtio::net::tap::ioctl`,
// `console::window`.
#![deny(unsafe_code)]

/// ACPI: power management registers, power button, tables.
pub mod acpi;
/// Port and memory-mapped buses.
pub mod bus;
/// The host's side of serial ports and consoles.
pub mod console;
/// What `vm.counters` shows.
pub mod counters;
/// Interrupt lines over eventfds.
pub mod irq;
/// Small PC devices that kernels expect: keyboard controller reset, CMOS clock, POST port.
pub mod legacy;
/// Holds output until the epoch that produced it is committed.
pub mod output_gate;
/// PCI: configuration, MSI-X, the virtio transport.
pub mod pci;
/// 16550 serial port.
pub mod serial;
/// Virtio devices without their transport, which is in [`pci::virtio`].
pub mod virtio;
