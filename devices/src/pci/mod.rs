//! PCI (PCI Local Bus 3.0, PCI Express Base 5.0 for ECAM): bus 0 with a host bridge and 31 slots.
//!
//! ```text
//!   ports 0xcf8-0xcff ─▶ ConfigPorts ─┐                       ┌─▶ host bridge   00:00.0
//!   ECAM window ───────▶ Ecam ────────┼─▶ PciRoot ─ by slot ──┼─▶ virtio-pci    00:01.0
//!   memory windows ────▶ Window ──────┘     └────── by address┘   ...           00:1f.0
//!
//!   interrupts:  function ─▶ Msix ─▶ MessageSink (an MSI write, delivered when the call returns)
//! ```
//!
//! What always holds:
//!
//! - An access of any size at any place is answered; what nobody is there for reads as ones.
//! - A BAR is decoded only where it lies within one of the two windows, whatever a guest writes
//!   to it; of two that overlap the lower slot has the addresses. So no guest moves a function
//!   over RAM, an interrupt controller or another device.
//! - Functions never call into the root, so its locks are taken before theirs.

/// ECAM and the ports of configuration mechanism 1.
pub mod access;
/// The host bridge.
pub mod bridge;
/// Configuration space: registers, write masks, the BAR, capabilities.
pub mod config;
/// MSI-X.
pub mod msix;
/// Which function answers.
pub mod root;
/// The virtio transport.
pub mod virtio;

/// Slots of a bus.
pub const SLOTS: u8 = 32;

/// Takes interrupt messages (MSI writes).
///
/// Delivery is synchronous: when `send` returns, the interrupt is in the state of its local APIC.
/// A device that interrupts under a pass therefore has its interrupt in whatever is captured
/// after the device was parked. See `docs/design/0009-interrupts-as-messages.md`.
pub trait MessageSink: Send + Sync {
    /// Writes `data` to `address`; a message that nobody takes is lost, as on a bus.
    fn send(&self, address: u64, data: u32);
}

/// A single function in a slot. All calls come from vCPU threads, several at once.
pub trait PciFunction: Send + Sync {
    /// Fills `data` from configuration space; `offset` and length lie within its 4096 bytes.
    fn read_config(&self, offset: u16, data: &mut [u8]);
    /// Takes what is written there. The root asks for [`PciFunction::region`] afterwards.
    fn write_config(&self, offset: u16, data: &[u8]);
    /// The memory that the function decodes now.
    fn region(&self) -> Option<Region> {
        None
    }
    /// Where the function's memory really is from now on: where [`PciFunction::region`] wanted
    /// it, or nowhere.
    fn placed(&self, base: Option<u64>) {
        let _ = base;
    }
    /// Fills `data` from the function's memory; the access lies within it.
    fn read_memory(&self, offset: u64, data: &mut [u8]) {
        let _ = offset;
        data.fill(0xff);
    }
    /// Takes what is written there.
    fn write_memory(&self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }
}

/// A stretch of guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    pub base: u64,
    /// Bytes; not zero.
    pub len: u64,
}

impl Region {
    /// The last address; `None` if there is no such region.
    #[must_use]
    pub fn last(self) -> Option<u64> {
        self.base.checked_add(self.len.checked_sub(1)?)
    }

    /// Whether `other` lies within.
    #[must_use]
    pub fn contains(self, other: Self) -> bool {
        matches!((self.last(), other.last()), (Some(last), Some(other_last))
            if self.base <= other.base && other_last <= last)
    }

    /// Whether the two have an address in common.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        matches!((self.last(), other.last()), (Some(last), Some(other_last))
            if self.base <= other_last && other.base <= last)
    }
}
