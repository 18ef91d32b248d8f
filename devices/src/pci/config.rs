//! Configuration space of a function with a type 0 header (PCI 3.0, 6.1): what is there, and which
//! bits of it a guest may write.
//!
//! What always holds: a write changes writable bits only, so that sizing a BAR, and whatever else
//! a guest tries, needs no special case. The extended space past 256 bytes reads as zero, which
//! says that there are no extended capabilities.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Bytes that registers stand behind.
pub const CONFIG_BYTES: usize = 256;

const VENDOR: usize = 0x00;
const DEVICE: usize = 0x02;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const CLASS: usize = 0x09;
const CACHE_LINE: usize = 0x0c;
const LATENCY: usize = 0x0d;
const BAR: usize = 0x10;
const SUBSYSTEM_VENDOR: usize = 0x2c;
const SUBSYSTEM: usize = 0x2e;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const HEADER_END: usize = 0x40;

const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_MASTER: u16 = 1 << 2;
const COMMAND_NO_INTX: u16 = 1 << 10;
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Memory, 64 bits, not prefetchable (PCI 3.0, 6.2.5.1): reads may have effects.
const BAR_MEMORY_64: u64 = 0b0100;
const BAR_FLAGS: u64 = 0b1111;

/// What a function is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    pub vendor: u16,
    pub device: u16,
    pub revision: u8,
    /// Base class, sub-class, programming interface: the lower 24 bits.
    pub class: u32,
    pub subsystem_vendor: u16,
    pub subsystem: u16,
}

/// A saved configuration space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigState {
    /// The 64 registers of 32 bits.
    pub registers: Vec<u32>,
}

/// A saved configuration space is not usable.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    #[error("The configuration space has {0} registers instead of 64")]
    Length(usize),
    #[error("The configuration space is that of another function: it differs at {0:#x}")]
    Identity(usize),
}

/// The registers.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; CONFIG_BYTES],
    writable: [u8; CONFIG_BYTES],
    bar_len: u64,
    /// Where the next capability goes, and which byte points to it.
    end: usize,
    link: usize,
}

impl ConfigSpace {
    #[must_use]
    pub fn new(identity: &Identity) -> Self {
        let mut this = Self {
            bytes: [0; CONFIG_BYTES],
            writable: [0; CONFIG_BYTES],
            bar_len: 0,
            end: HEADER_END,
            link: CAPABILITIES,
        };
        this.put(VENDOR, &identity.vendor.to_le_bytes());
        this.put(DEVICE, &identity.device.to_le_bytes());
        this.put(REVISION, &[identity.revision]);
        this.put(CLASS, &identity.class.to_le_bytes()[..3]);
        this.put(SUBSYSTEM_VENDOR, &identity.subsystem_vendor.to_le_bytes());
        this.put(SUBSYSTEM, &identity.subsystem.to_le_bytes());
        let command = COMMAND_MEMORY | COMMAND_MASTER | COMMAND_NO_INTX;
        this.allow(COMMAND, &command.to_le_bytes());
        // Scratch registers, in which drivers and firmware leave notes.
        this.allow(CACHE_LINE, &[0xff]);
        this.allow(LATENCY, &[0xff]);
        this.allow(INTERRUPT_LINE, &[0xff]);
        this
    }

    /// Gives the function one 64-bit memory BAR, number 0, of `len` bytes at `base`.
    /// `len` is a power of two from 16 on, `base` a multiple of it.
    pub fn set_memory_bar(&mut self, base: u64, len: u64) {
        assert!(len.is_power_of_two() && len > BAR_FLAGS && base.is_multiple_of(len));
        self.bar_len = len;
        self.put(BAR, &(base | BAR_MEMORY_64).to_le_bytes());
        self.allow(BAR, &(!(len - 1)).to_le_bytes());
    }

    /// Appends a capability: its id, then `body`, whose bits in `writable` a guest may change.
    /// Returns where it starts.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.end;
        assert!(at + 2 + body.len() <= CONFIG_BYTES && body.len() == writable.len());
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.allow(at + 2, writable);
        let link = self.link;
        self.put(link, &[u8::try_from(at).unwrap_or(0)]);
        self.put(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        self.link = at + 1;
        self.end = (at + 2 + body.len()).next_multiple_of(4);
        at
    }

    /// Fills `data` from `offset` on; zeroes where no register is.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.bytes.get(at).copied().unwrap_or(0);
        }
    }

    /// Takes the writable bits of `data`.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (at, byte) in (offset..).zip(data) {
            if let (Some(place), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *place = (*place & !mask) | (byte & mask);
            }
        }
    }

    /// Sets bytes whatever the mask says; `offset` must be that of a register.
    pub fn put(&mut self, offset: usize, data: &[u8]) {
        self.bytes[offset..offset + data.len()].copy_from_slice(data);
    }

    #[must_use]
    pub fn u8_at(&self, offset: usize) -> u8 {
        self.bytes.get(offset).copied().unwrap_or(0)
    }

    #[must_use]
    pub fn u16_at(&self, offset: usize) -> u16 {
        let mut bytes = [0; 2];
        self.read(offset, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    #[must_use]
    pub fn u32_at(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Where the BAR is, while memory is decoded.
    #[must_use]
    pub fn decoded(&self) -> Option<super::Region> {
        if self.bar_len == 0 || self.u16_at(COMMAND) & COMMAND_MEMORY == 0 {
            return None;
        }
        let mut bytes = [0; 8];
        self.read(BAR, &mut bytes);
        Some(super::Region { base: u64::from_le_bytes(bytes) & !BAR_FLAGS, len: self.bar_len })
    }

    #[must_use]
    pub fn save(&self) -> ConfigState {
        ConfigState { registers: (0..CONFIG_BYTES).step_by(4).map(|at| self.u32_at(at)).collect() }
    }

    /// Whether `state` is one of this very function.
    pub fn check(&self, state: &ConfigState) -> Result<(), ConfigError> {
        if state.registers.len() != CONFIG_BYTES / 4 {
            return Err(ConfigError::Length(state.registers.len()));
        }
        for (at, register) in (0..).step_by(4).zip(&state.registers) {
            let mut mask = [0; 4];
            mask.copy_from_slice(&self.writable[at..at + 4]);
            let fixed = !u32::from_le_bytes(mask);
            if (register ^ self.u32_at(at)) & fixed != 0 {
                return Err(ConfigError::Identity(at));
            }
        }
        Ok(())
    }

    /// Takes the writable bits of a state.
    pub fn restore(&mut self, state: &ConfigState) -> Result<(), ConfigError> {
        self.check(state)?;
        for (at, register) in (0..).step_by(4).zip(&state.registers) {
            self.write(at, &register.to_le_bytes());
        }
        Ok(())
    }

    fn allow(&mut self, offset: usize, mask: &[u8]) {
        self.writable[offset..offset + mask.len()].copy_from_slice(mask);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pci::Region;

    const BASE: u64 = 0x12_3456_8000;

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(&Identity {
            vendor: 0x1af4,
            device: 0x1044,
            revision: 1,
            class: 0x00_ff00,
            subsystem_vendor: 0x1af4,
            subsystem: 0x40,
        });
        space.set_memory_bar(BASE, 0x8000);
        space.add_capability(9, &[1, 2, 3], &[0, 0xff, 0]);
        space.add_capability(0x11, &[0; 10], &[0, 0xc0, 0, 0, 0, 0, 0, 0, 0, 0]);
        space
    }

    #[test]
    fn the_header_is_as_the_specification_has_it() {
        let space = space();
        assert_eq!(space.u32_at(0), 0x1044_1af4);
        assert_eq!(space.u32_at(4), 0x0010_0000);
        assert_eq!(space.u32_at(8), 0x00ff_0001);
        assert_eq!(space.u32_at(0x2c), 0x0040_1af4);
        assert_eq!(space.u8_at(0x3d), 0, "no interrupt pin");
        assert_eq!(space.u8_at(0x34), 0x40);
        assert_eq!((space.u8_at(0x40), space.u8_at(0x41)), (9, 0x48));
        assert_eq!((space.u8_at(0x48), space.u8_at(0x49)), (0x11, 0));
    }

    #[test]
    fn a_bar_is_sized_by_ones_and_decoded_when_told() {
        let mut space = space();
        assert_eq!(space.decoded(), None);
        space.write(0x10, &[0xff; 8]);
        assert_eq!((space.u32_at(0x10), space.u32_at(0x14)), (0xffff_8004, 0xffff_ffff));
        space.write(0x10, &BASE.to_le_bytes());
        space.write(4, &[2, 0]);
        assert_eq!(space.decoded(), Some(Region { base: BASE, len: 0x8000 }));
    }

    #[test]
    fn a_state_of_another_function_is_refused() {
        let mut space = space();
        let state = space.save();
        assert_eq!(space.restore(&state), Ok(()));
        let short = ConfigState { registers: vec![0; 63] };
        assert_eq!(space.restore(&short), Err(ConfigError::Length(63)));
        let mut other = state;
        other.registers[0] ^= 0x1_0000;
        assert_eq!(space.restore(&other), Err(ConfigError::Identity(0)));
    }

    proptest! {
        #[test]
        fn only_writable_bits_change(
            writes in prop::collection::vec(
                (0usize..300, prop::collection::vec(any::<u8>(), 0..9)), 0..60),
        ) {
            let fresh = space();
            let mut space = space();
            for (offset, data) in writes {
                space.write(offset, &data);
            }
            for at in 0..CONFIG_BYTES {
                let fixed = !fresh.writable[at];
                prop_assert_eq!(space.bytes[at] & fixed, fresh.bytes[at] & fixed);
            }
            let mut copy = fresh;
            copy.restore(&space.save()).unwrap();
            prop_assert_eq!(copy.bytes, space.bytes);
        }
    }
}
