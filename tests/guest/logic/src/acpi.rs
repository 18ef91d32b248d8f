//! The ACPI tables, as far as a list of processors needs them: RSDP → XSDT (or the RSDT
//! of old firmware) → MADT (ACPI 6.5,
//! 5.2.5, 5.2.8 and 5.2.12).

use crate::machine::VCPUS_MAX;
use crate::physical::Physical;

const TABLES_MAX: u64 = 64;
const MADT_LENGTH_MAX: u64 = 64 * 1024;
const KIND_LAPIC: u8 = 0;
const KIND_X2APIC: u8 = 9;
const ENABLED: u32 = 1;

/// The processors that the MADT lists, by local APIC id.
#[derive(Clone, Debug)]
pub struct Processors {
    ids: [u8; VCPUS_MAX as usize],
    count: usize,
}

impl Processors {
    /// Processors `0..count`, for a machine without tables.
    #[must_use]
    pub fn numbered(count: u32) -> Self {
        let mut processors = Self::none();
        for id in 0..count.min(VCPUS_MAX) {
            processors.push(id);
        }
        processors
    }

    #[must_use]
    pub fn ids(&self) -> &[u8] {
        self.ids.get(..self.count).unwrap_or_default()
    }

    fn none() -> Self {
        Self { ids: [0; VCPUS_MAX as usize], count: 0 }
    }

    fn push(&mut self, id: u32) {
        // Ids above eight bits cannot be reached through the xAPIC's interrupt command.
        let Ok(id) = u8::try_from(id) else { return };
        if let Some(place) = self.ids.get_mut(self.count) {
            *place = id;
            self.count += 1;
        }
    }

    /// None where a table is missing or ends early.
    pub fn read(memory: &impl Physical, rsdp: u64) -> Option<Self> {
        let mut signature = [0; 8];
        if rsdp == 0 || !memory.read(rsdp, &mut signature) || &signature != b"RSD PTR " {
            return None;
        }
        let old = memory.read_u8(rsdp + 15)? < 2;
        let madt = if old {
            find_table::<4>(memory, u64::from(memory.read_u32(rsdp + 16)?))?
        } else {
            find_table::<8>(memory, memory.read_u64(rsdp + 24)?)?
        };
        let length = u64::from(memory.read_u32(madt + 4)?).min(MADT_LENGTH_MAX);
        let mut processors = Self::none();
        let mut offset = 44;
        while offset + 2 <= length {
            let kind = memory.read_u8(madt + offset)?;
            let size = u64::from(memory.read_u8(madt + offset + 1)?);
            if size < 2 {
                return None;
            }
            processors.entry(memory, madt + offset, kind)?;
            offset += size;
        }
        (processors.count > 0).then_some(processors)
    }

    fn entry(&mut self, memory: &impl Physical, address: u64, kind: u8) -> Option<()> {
        let (id, flags) = match kind {
            KIND_LAPIC => (u32::from(memory.read_u8(address + 3)?), memory.read_u32(address + 4)?),
            KIND_X2APIC => (memory.read_u32(address + 4)?, memory.read_u32(address + 8)?),
            _ => return Some(()),
        };
        if flags & ENABLED != 0 {
            self.push(id);
        }
        Some(())
    }
}

/// The MADT's address, out of a table of addresses of `SIZE` bytes each.
fn find_table<const SIZE: usize>(memory: &impl Physical, list: u64) -> Option<u64> {
    let length = u64::from(memory.read_u32(list.checked_add(4)?)?);
    let count = (length.checked_sub(36)? / SIZE as u64).min(TABLES_MAX);
    for index in 0..count {
        let mut bytes = [0; 8];
        if !memory.read(list + 36 + index * SIZE as u64, bytes.get_mut(..SIZE)?) {
            return None;
        }
        let table = u64::from_le_bytes(bytes);
        let mut signature = [0; 4];
        if memory.read(table, &mut signature) && &signature == b"APIC" {
            return Some(table);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::physical::tests::Image;

    /// RSDP at 0, XSDT at 64, MADT at 128, processors with the ids given.
    fn image(ids: &[(u8, u32)]) -> Image {
        let mut bytes = vec![0; 256];
        bytes[..8].copy_from_slice(b"RSD PTR ");
        bytes[15] = 2;
        bytes[24..32].copy_from_slice(&64_u64.to_le_bytes());
        bytes[68..72].copy_from_slice(&44_u32.to_le_bytes());
        bytes[100..108].copy_from_slice(&128_u64.to_le_bytes());
        bytes.truncate(128);
        bytes.extend(b"APIC");
        let length = 44 + ids.len() * 8 + 12;
        bytes.extend(u32::try_from(length).unwrap().to_le_bytes());
        bytes.resize(128 + 36, 0);
        bytes.extend(0xfee0_0000_u32.to_le_bytes());
        bytes.resize(128 + 44, 0);
        bytes.extend([1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
        for (id, flags) in ids {
            bytes.extend([0, 8, *id, *id]);
            bytes.extend(flags.to_le_bytes());
        }
        // The parser treats address 0 as "no table", so the image begins elsewhere.
        let mut moved = Image { start: 0x1000, bytes };
        moved.bytes[24..32].copy_from_slice(&(0x1000_u64 + 64).to_le_bytes());
        moved.bytes[100..108].copy_from_slice(&(0x1000_u64 + 128).to_le_bytes());
        moved
    }

    #[test]
    fn enabled_processors_are_listed() {
        let memory = image(&[(0, 1), (1, 1), (2, 0), (5, 1)]);
        let processors = Processors::read(&memory, 0x1000).unwrap();
        assert_eq!(processors.ids(), [0, 1, 5]);
    }

    #[test]
    fn old_firmware_has_an_rsdt() {
        let mut memory = image(&[(0, 1), (3, 1)]);
        memory.bytes[15] = 0;
        memory.bytes[16..20].copy_from_slice(&(0x1000_u32 + 64).to_le_bytes());
        memory.bytes[24..32].fill(0xff);
        memory.bytes[68..72].copy_from_slice(&40_u32.to_le_bytes());
        memory.bytes[104..108].fill(0xff);
        assert_eq!(Processors::read(&memory, 0x1000).unwrap().ids(), [0, 3]);
    }

    #[test]
    fn an_entry_without_length_is_no_endless_loop() {
        let mut memory = image(&[(0, 1)]);
        memory.bytes[128 + 44 + 1] = 0;
        assert!(Processors::read(&memory, 0x1000).is_none());
    }

    #[test]
    fn no_tables_no_processors() {
        assert!(Processors::read(&image(&[]), 0).is_none());
        assert!(Processors::read(&image(&[]), 0x1000).is_none());
        assert_eq!(Processors::numbered(3).ids(), [0, 1, 2]);
        assert_eq!(Processors::numbered(1000).ids().len(), VCPUS_MAX as usize);
    }
}
