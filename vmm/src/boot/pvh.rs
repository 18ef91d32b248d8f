//! PVH: an ELF image whose note names a 32-bit entry point.

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::{Elf, KernelLoader};
use replication::ram::Mapping;
use vm_memory::GuestAddress;

use super::{BootError, COMMAND_LINE_MAX, Entry, KERNEL_START, Payload};

const START_INFO: u64 = 0x6000;
const MODULE_LIST: u64 = 0x6100;
const MEMORY_MAP: u64 = 0x6200;
/// `XEN_HVM_START_MAGIC_VALUE`.
const START_INFO_MAGIC: u32 = 0x336e_c578;
/// Memory map types as in E820.
const TYPE_RAM: u32 = 1;
const TYPE_RESERVED: u32 = 2;

pub(super) fn load(memory: &Mapping, payload: &mut Payload, rsdp: u64) -> Result<Entry, BootError> {
    let Payload { kernel, initramfs, command_line, .. } = payload;
    let loaded = Elf::load(memory, None, &mut kernel.file, Some(GuestAddress(KERNEL_START)))
        .map_err(|source| BootError::Kernel { path: kernel.path.clone(), source })?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(BootError::NoPvhEntry(kernel.path.clone()));
    };
    let mut start_info = hvm_start_info {
        magic: START_INFO_MAGIC,
        version: 1,
        cmdline_paddr: super::put_command_line(memory, command_line, COMMAND_LINE_MAX)?,
        rsdp_paddr: rsdp,
        memmap_paddr: MEMORY_MAP,
        ..Default::default()
    };
    let map: Vec<hvm_memmap_table_entry> = super::memory_map(memory)
        .into_iter()
        .map(|entry| hvm_memmap_table_entry {
            addr: entry.address,
            size: entry.size,
            type_: if entry.usable { TYPE_RAM } else { TYPE_RESERVED },
            reserved: 0,
        })
        .collect();
    start_info.memmap_entries = u32::try_from(map.len()).unwrap_or(u32::MAX);
    let mut modules = Vec::new();
    if let Some(part) = initramfs {
        let placed = super::put_initramfs(memory, part, loaded.kernel_end, u64::MAX)?;
        modules.push(hvm_modlist_entry {
            paddr: placed.address,
            size: placed.size,
            ..Default::default()
        });
        start_info.nr_modules = 1;
        start_info.modlist_paddr = MODULE_LIST;
    }
    let mut parameters = BootParams::new(&start_info, GuestAddress(START_INFO));
    parameters.set_sections(&map, GuestAddress(MEMORY_MAP));
    if !modules.is_empty() {
        parameters.set_modules(&modules, GuestAddress(MODULE_LIST));
    }
    PvhBootConfigurator::write_bootparams(&parameters, memory).map_err(BootError::Parameters)?;
    Ok(Entry::Pvh { entry: entry.0, start_info: START_INFO })
}
