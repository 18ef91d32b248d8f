//! Loads a payload into guest memory and says how the first vCPU must enter it.
//!
//! An ELF with a PVH note is entered by the PVH ABI (Xen `docs/misc/pvh.pandoc`), a bzImage by
//! the 64-bit boot protocol (Linux `Documentation/arch/x86/boot.rst`).
//!
//! ```text
//! 0x0500 GDT  0x6000 PVH start info  0x7000 zero page  0x9000 page tables
//! 0x20000 command line  0xe0000 ACPI tables  0xffff0 reset vector  1 MiB kernel ...
//! initramfs at the end of low RAM
//! ```

mod linux;
mod pvh;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use api::config::PayloadConfig;
use devices::pci::access::ECAM_BYTES;
use replication::ram::Mapping;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion};

use crate::memory::{ECAM_START, LOW_RAM_END};

/// Where the ACPI tables go.
pub const ACPI_START: u64 = 0xe_0000;
/// End of the area for ACPI tables.
pub const ACPI_END: u64 = RESET_VECTOR;
/// Where a PC's firmware starts in real mode. Linux on hardware-reduced ACPI without EFI reboots
/// by jumping here and by nothing else, so there must be something that resets.
const RESET_VECTOR: u64 = 0xf_fff0;
/// `mov al, 0xfe; out 0x64, al; hlt; jmp` to the hlt: the keyboard controller's reset pulse.
const RESET_STUB: [u8; 7] = [0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];
/// End of the first MiB, where the kernel may begin.
const FIRST_MIB_END: u64 = 0x10_0000;
/// First address that a kernel may use.
pub const KERNEL_START: u64 = FIRST_MIB_END;
/// End of the conventional memory below the EBDA.
const LOW_MEMORY_END: u64 = 0x9_fc00;
const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// Most bytes of a command line, the final NUL included.
const COMMAND_LINE_MAX: usize = 0x1_0000;
const INITRAMFS_ALIGNMENT: u64 = 4096;
/// Bytes of an ELF header up to `e_machine` (System V gABI, chapter 4).
const ELF_HEAD_BYTES: usize = 20;
/// `ELFCLASS64`, `ELFDATA2LSB`.
const ELF_64_LITTLE: [u8; 2] = [2, 1];
/// `EM_X86_64`.
const ELF_X86_64: [u8; 2] = [62, 0];

/// A payload could not be loaded.
#[derive(Debug, Error)]
pub enum BootError {
    #[error("The payload names no kernel")]
    NoKernel,
    #[error("Cannot read {what} {}", path.display())]
    Read { what: &'static str, path: PathBuf, source: io::Error },
    #[error("Kernel {} is neither an ELF image with a PVH entry nor a bzImage", .0.display())]
    NotAKernel(PathBuf),
    #[error("Kernel {} has no PVH entry point (built without CONFIG_PVH?)", .0.display())]
    NoPvhEntry(PathBuf),
    #[error("Kernel {} has no 64-bit entry point", .0.display())]
    No64BitEntry(PathBuf),
    #[error("Cannot load kernel {}", path.display())]
    Kernel { path: PathBuf, source: linux_loader::loader::Error },
    #[error("Initramfs {} of {size} bytes does not fit below {end:#x}", path.display())]
    InitramfsSize { path: PathBuf, size: u64, end: u64 },
    #[error(
        "Kernel {} unpacks itself up to {needed:#x}, beyond the end of low memory at {end:#x}",
        path.display()
    )]
    Unpacked { path: PathBuf, needed: u64, end: u64 },
    #[error("The command line has {length} bytes, more than the {max} that fit")]
    CommandLine { length: usize, max: usize },
    #[error("Cannot write {what} to guest memory")]
    Write { what: &'static str, source: GuestMemoryError },
    #[error("Cannot write boot parameters")]
    Parameters(#[source] linux_loader::configurator::Error),
}

/// How the first vCPU enters the payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 32-bit protected mode, `ebx` = start info.
    Pvh { entry: u64, start_info: u64 },
    /// 64-bit mode, `rsi` = zero page; GDT and page tables are in guest memory.
    Linux64 { entry: u64, boot_params: u64, gdt: u64, page_tables: u64 },
}

/// A module in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Placed {
    address: u64,
    size: u64,
}

/// A stretch of the memory map as firmware would describe it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct MapEntry {
    address: u64,
    size: u64,
    usable: bool,
}

/// A file of the payload, open.
#[derive(Debug)]
struct Part {
    path: PathBuf,
    file: File,
}

impl Part {
    fn open(what: &'static str, path: &Path) -> Result<Self, BootError> {
        let file = File::open(path).map_err(|source| BootError::Read {
            what,
            path: path.into(),
            source,
        })?;
        Ok(Self { path: path.into(), file })
    }
}

/// A payload whose files are there: what can be known before memory is touched.
#[derive(Debug)]
pub struct Payload {
    kernel: Part,
    is_elf: bool,
    initramfs: Option<Part>,
    command_line: String,
}

impl Payload {
    /// Opens the files and looks at the kernel's head.
    ///
    /// # Errors
    /// A file that cannot be read, or a kernel that is none.
    pub fn open(config: &PayloadConfig) -> Result<Self, BootError> {
        let path = config.kernel.as_deref().ok_or(BootError::NoKernel)?;
        let read = |source| BootError::Read { what: "kernel", path: path.into(), source };
        let mut kernel = Part::open("kernel", path)?;
        let mut head = [0; ELF_HEAD_BYTES];
        let is_elf = match kernel.file.read_exact(&mut head) {
            Ok(()) => head.starts_with(b"\x7fELF"),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(BootError::NotAKernel(path.into()));
            }
            Err(error) => return Err(read(error)),
        };
        // The loader takes any ELF image for one of this kind.
        if is_elf && (head[4..6] != ELF_64_LITTLE || head[18..20] != ELF_X86_64) {
            return Err(BootError::NotAKernel(path.into()));
        }
        kernel.file.seek(SeekFrom::Start(0)).map_err(read)?;
        let initramfs = config.initramfs.as_deref();
        let initramfs = initramfs.map(|path| Part::open("initramfs", path)).transpose()?;
        let command_line = config.cmdline.clone().unwrap_or_default();
        Ok(Self { kernel, is_elf, initramfs, command_line })
    }

    /// Loads kernel, initramfs and command line; `rsdp` is where the ACPI tables start.
    ///
    /// # Errors
    /// What does not fit, or is no kernel after all. Memory is in no usable state then.
    pub fn load(mut self, memory: &Mapping, rsdp: u64) -> Result<Entry, BootError> {
        put_bytes(memory, "the reset vector", &RESET_STUB, RESET_VECTOR)?;
        let load = if self.is_elf { pvh::load } else { linux::load };
        load(memory, &mut self, rsdp)
    }
}

fn put<T: vm_memory::ByteValued>(
    memory: &Mapping,
    what: &'static str,
    value: T,
    at: u64,
) -> Result<(), BootError> {
    memory.write_obj(value, GuestAddress(at)).map_err(|source| BootError::Write { what, source })
}

fn put_bytes(memory: &Mapping, what: &'static str, bytes: &[u8], at: u64) -> Result<(), BootError> {
    memory.write_slice(bytes, GuestAddress(at)).map_err(|source| BootError::Write { what, source })
}

/// Writes the command line with its NUL and returns its address.
fn put_command_line(memory: &Mapping, text: &str, max: usize) -> Result<u64, BootError> {
    let max = max.min(COMMAND_LINE_MAX);
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    if bytes.len() > max || text.contains('\0') {
        return Err(BootError::CommandLine { length: text.len(), max: max - 1 });
    }
    memory
        .write_slice(&bytes, COMMAND_LINE)
        .map_err(|source| BootError::Write { what: "the command line", source })?;
    Ok(COMMAND_LINE.0)
}

/// Places an initramfs as high as `end` and the low RAM allow, above `floor`.
fn put_initramfs(
    memory: &Mapping,
    part: &mut Part,
    floor: u64,
    end: u64,
) -> Result<Placed, BootError> {
    let Part { path, file } = part;
    let read = |source| BootError::Read { what: "initramfs", path: path.clone(), source };
    let size = file.metadata().map_err(read)?.len();
    let end = end.min(low_ram_end(memory));
    let too_large = || BootError::InitramfsSize { path: path.clone(), size, end };
    let address = end.checked_sub(size).ok_or_else(too_large)? & !(INITRAMFS_ALIGNMENT - 1);
    if address < floor {
        return Err(too_large());
    }
    let length = usize::try_from(size).map_err(|_| too_large())?;
    memory
        .read_exact_volatile_from(GuestAddress(address), file, length)
        .map_err(|source| BootError::Write { what: "the initramfs", source })?;
    Ok(Placed { address, size })
}

fn low_ram_end(memory: &Mapping) -> u64 {
    memory.iter().next().map_or(0, GuestMemoryRegion::len).min(LOW_RAM_END)
}

fn memory_map(memory: &Mapping) -> Vec<MapEntry> {
    let mut map = vec![
        MapEntry { address: 0, size: LOW_MEMORY_END, usable: true },
        MapEntry { address: ACPI_START, size: FIRST_MIB_END - ACPI_START, usable: false },
    ];
    map.extend(memory.iter().map(|region| {
        let start = region.start_addr().0.max(KERNEL_START);
        MapEntry {
            address: start,
            size: region.start_addr().0 + region.len() - start,
            usable: true,
        }
    }));
    // Kernels believe in memory-mapped configuration space only where it is reserved.
    map.push(MapEntry { address: ECAM_START.into(), size: ECAM_BYTES, usable: false });
    map.sort_unstable_by_key(|entry| entry.address);
    map
}
