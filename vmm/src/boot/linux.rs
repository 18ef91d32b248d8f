//! bzImage: the 64-bit boot protocol, which enters the compressed kernel's own head.

use hypervisor::boot::{gdt, identity_page_tables};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::{BzImage, Error as LoaderError, KernelLoader};
use replication::ram::Mapping;
use vm_memory::GuestAddress;

use super::{BootError, Entry, KERNEL_START, Payload};

const GDT: u64 = 0x500;
const ZERO_PAGE: u64 = 0x7000;
const PAGE_TABLES: u64 = 0x9000;
/// `LOADED_HIGH | CAN_USE_HEAP` are the image's business; a loader without a registered id says so.
const LOADER_UNDEFINED: u8 = 0xff;
/// `XLF_KERNEL_64`: the image has a 64-bit entry point at 0x200.
const XLF_KERNEL_64: u16 = 1;
/// Offset of the 64-bit entry from the load address.
const ENTRY_64: u64 = 0x200;
/// Lowest boot protocol with `xloadflags`.
const PROTOCOL_2_12: u16 = 0x020c;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

pub(super) fn load(memory: &Mapping, payload: &mut Payload, rsdp: u64) -> Result<Entry, BootError> {
    let Payload { kernel, initramfs, command_line, .. } = payload;
    let path = &kernel.path;
    let start = Some(GuestAddress(KERNEL_START));
    let loaded =
        BzImage::load(memory, None, &mut kernel.file, start).map_err(|source| match source {
            LoaderError::Bzimage(linux_loader::loader::bzimage::Error::InvalidBzImage) => {
                BootError::NotAKernel(path.clone())
            }
            source => BootError::Kernel { path: path.clone(), source },
        })?;
    let mut header = loaded.setup_header.ok_or_else(|| BootError::NotAKernel(path.clone()))?;
    if header.version < PROTOCOL_2_12 || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BootError::No64BitEntry(path.clone()));
    }
    let unpacked_end = unpacked_end(&header, loaded.kernel_load.0);
    let low_end = super::low_ram_end(memory);
    if unpacked_end > low_end {
        let (path, needed) = (path.clone(), unpacked_end);
        return Err(BootError::Unpacked { path, needed, end: low_end });
    }
    let command_line_max = usize::try_from(header.cmdline_size).unwrap_or(usize::MAX);
    let command_line =
        super::put_command_line(memory, command_line, command_line_max.saturating_add(1))?;
    header.type_of_loader = LOADER_UNDEFINED;
    header.cmd_line_ptr = below_4g(command_line);
    if let Some(part) = initramfs {
        let end = u64::from(header.initrd_addr_max) + 1;
        let placed = super::put_initramfs(memory, part, unpacked_end, end)?;
        header.ramdisk_image = below_4g(placed.address);
        header.ramdisk_size = below_4g(placed.size);
    }
    let mut parameters = boot_params { hdr: header, acpi_rsdp_addr: rsdp, ..Default::default() };
    for (slot, entry) in parameters.e820_table.iter_mut().zip(super::memory_map(memory)) {
        *slot = boot_e820_entry {
            addr: entry.address,
            size: entry.size,
            r#type: if entry.usable { E820_RAM } else { E820_RESERVED },
        };
        parameters.e820_entries += 1;
    }
    super::put(memory, "the zero page", parameters, ZERO_PAGE)?;
    super::put_bytes(memory, "the GDT", &gdt(true), GDT)?;
    super::put_bytes(memory, "page tables", &identity_page_tables(PAGE_TABLES), PAGE_TABLES)?;
    let entry = loaded.kernel_load.0 + ENTRY_64;
    Ok(Entry::Linux64 { entry, boot_params: ZERO_PAGE, gdt: GDT, page_tables: PAGE_TABLES })
}

/// Where the kernel's own work area ends. A relocatable kernel moves up to its preferred address if
/// it was loaded below, aligns that, and unpacks itself over `init_size` bytes from there (boot
/// protocol, `pref_address` and `init_size`).
fn unpacked_end(header: &setup_header, loaded_at: u64) -> u64 {
    let alignment = u64::from(header.kernel_alignment).max(1);
    let start = loaded_at.max(header.pref_address);
    let start = start.checked_next_multiple_of(alignment).unwrap_or(u64::MAX);
    start.saturating_add(header.init_size.into())
}

/// Everything that is placed here lies below the 32-bit hole.
fn below_4g(value: u64) -> u32 {
    u32::try_from(value).expect("placed below the 32-bit hole")
}
