//! PVH's start info (`struct hvm_start_info` and its memory map, Xen's `start_info.h`).

use crate::physical::Physical;

const MAGIC: u32 = 0x336e_c578;
const TYPE_RAM: u32 = 1;
const ENTRY_SIZE: u64 = 24;

/// Entries of the memory map that are looked at; the bound keeps a damaged map from being endless.
const ENTRIES_MAX: u32 = 1024;

/// Where the boot protocol put things.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StartInfo {
    pub command_line: u64,
    pub rsdp: u64,
    memory_map: u64,
    entries: u32,
}

impl StartInfo {
    /// None where this is not version 1 or later of the structure: the memory map came with it.
    pub fn read(memory: &impl Physical, address: u64) -> Option<Self> {
        if memory.read_u32(address)? != MAGIC || memory.read_u32(address + 4)? < 1 {
            return None;
        }
        Some(Self {
            command_line: memory.read_u64(address + 24)?,
            rsdp: memory.read_u64(address + 32)?,
            memory_map: memory.read_u64(address + 40)?,
            entries: memory.read_u32(address + 48)?.min(ENTRIES_MAX),
        })
    }

    /// Start and length of the `index`-th entry if it is RAM; the outer None ends the map.
    pub fn ram(&self, memory: &impl Physical, index: u32) -> Option<Option<(u64, u64)>> {
        if index >= self.entries {
            return None;
        }
        let entry = self.memory_map.checked_add(u64::from(index) * ENTRY_SIZE)?;
        let start = memory.read_u64(entry)?;
        let length = memory.read_u64(entry + 8)?;
        let ram = memory.read_u32(entry + 16)? == TYPE_RAM;
        Some((ram && start.checked_add(length).is_some()).then_some((start, length)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::physical::tests::Image;

    fn image(magic: u32) -> Image {
        let mut bytes = Vec::new();
        for word in [magic, 1, 0, 0] {
            bytes.extend(u32::to_le_bytes(word));
        }
        for field in [0_u64, 0x2_0000, 0xe_0000, 0x1000 + 56] {
            bytes.extend(field.to_le_bytes());
        }
        bytes.extend(2_u32.to_le_bytes());
        bytes.extend(0_u32.to_le_bytes());
        for (start, length, kind) in [(0_u64, 0xa_0000_u64, 1_u32), (0xe_0000, 0x2_0000, 2)] {
            bytes.extend(start.to_le_bytes());
            bytes.extend(length.to_le_bytes());
            bytes.extend(kind.to_le_bytes());
            bytes.extend(0_u32.to_le_bytes());
        }
        Image { start: 0x1000, bytes }
    }

    #[test]
    fn ram_and_places_are_found() {
        let memory = image(MAGIC);
        let info = StartInfo::read(&memory, 0x1000).unwrap();
        assert_eq!((info.command_line, info.rsdp), (0x2_0000, 0xe_0000));
        assert_eq!(info.ram(&memory, 0), Some(Some((0, 0xa_0000))));
        assert_eq!(info.ram(&memory, 1), Some(None));
        assert_eq!(info.ram(&memory, 2), None);
    }

    #[test]
    fn another_magic_is_refused() {
        assert_eq!(StartInfo::read(&image(1), 0x1000), None);
    }

    #[test]
    fn a_cut_structure_is_refused() {
        let mut memory = image(MAGIC);
        memory.bytes.truncate(40);
        assert_eq!(StartInfo::read(&memory, 0x1000), None);
    }
}
