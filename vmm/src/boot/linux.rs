//! bzImage: the 64-bit boot protocol, which enters the compressed kernel's own head.

use std::fs::File;
use std::path::Path;

use hypervisor::boot::{gdt, identity_page_tables};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::{BzImage, Error as LoaderError, KernelLoader};
use replication::ram::Mapping;
use vm_memory::GuestAddress;

use super::{BootError, Entry, KERNEL_START};

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

pub(super) fn load(
    memory: &Mapping,
    kernel: &mut File,
    path: &Path,
    initramfs: Option<&Path>,
    command_line: &str,
    rsdp: u64,
) -> Result<Entry, BootError> {
    let loaded = BzImage::load(memory, None, kernel, Some(GuestAddress(KERNEL_START))).map_err(
        |source| match source {
            LoaderError::Bzimage(linux_loader::loader::bzimage::Error::InvalidBzImage) => {
                BootError::NotAKernel(path.into())
            }
            source => BootError::Kernel { path: path.into(), source },
        },
    )?;
    let mut header = loaded.setup_header.ok_or_else(|| BootError::NotAKernel(path.into()))?;
    if header.version < PROTOCOL_2_12 || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BootError::No64BitEntry(path.into()));
    }
    let command_line_max = usize::try_from(header.cmdline_size).unwrap_or(usize::MAX);
    let command_line =
        super::put_command_line(memory, command_line, command_line_max.saturating_add(1))?;
    header.type_of_loader = LOADER_UNDEFINED;
    header.cmd_line_ptr = below_4g(command_line);
    if let Some(path) = initramfs {
        // The kernel unpacks itself over [load address, + init_size): stay above.
        let floor = loaded.kernel_load.0 + u64::from(header.init_size);
        let end = u64::from(header.initrd_addr_max) + 1;
        let placed = super::put_initramfs(memory, path, floor, end)?;
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

/// Everything that is placed here lies below the 32-bit hole.
fn below_4g(value: u64) -> u32 {
    u32::try_from(value).expect("placed below the 32-bit hole")
}
