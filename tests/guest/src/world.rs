//! What is settled before the processors begin: the command line, the memory, the clock.

use core::fmt;
use core::ptr::with_exposed_provenance_mut;
use core::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

use guest_logic::acpi::Processors;
use guest_logic::cmdline::{CmdlineError, Config};
use guest_logic::free::{Area, Free};
use guest_logic::machine::{LAPIC_ADDRESS, PAGE_SIZE};
use guest_logic::pair;
use guest_logic::physical::Physical;
use guest_logic::start_info::StartInfo;

use crate::clock::Clock;
use crate::map::{LOW_END, Map, Mapped};
use crate::workload::kv;
use crate::{boot, lapic, pci, smp};

pub const COMMAND_LINE_MAX: usize = 2048;
const MIB: u64 = 1 << 20;
const PAGES_PER_MIB: u64 = MIB / PAGE_SIZE;
/// The area of `dirty` beside `verify`, unless the command line gives it.
const DIRTY_MIB_BESIDE_VERIFY: u64 = 64;

/// The machine as all processors see it.
pub struct World {
    pub config: Config,
    pub clock: Clock,
    pub processors: Processors,
    pub vcpus: u32,
    /// Processors that take part in the workload: the first `participants`.
    pub participants: u32,
    pub memory_mib: u64,
    /// `smp::PAGES_PER_CPU` pages for each AP.
    pub cpu_memory: u64,
    pub verify: Area,
    /// The tables of generations: eight bytes a page of `verify`, in whole pages a processor.
    pub tables: u64,
    pub table_pages: u64,
    /// A page for each pair.
    pub pairs: u64,
    pub dirty: Area,
    /// `kv::PAGES` pages where that workload runs.
    pub kv_memory: u64,
    /// Where the end has got to, set by the first processor only.
    pub phase: AtomicU32,
    pub avx2: bool,
}

#[derive(Debug)]
pub enum WorldError<'a> {
    StartInfo(u64),
    CommandLineLong,
    CommandLineText,
    CommandLine(CmdlineError<'a>),
    Processors { wanted: u32, found: usize },
    NoMemory { what: &'static str },
}

impl fmt::Display for WorldError<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::StartInfo(address) => write!(formatter, "No PVH start info at {address:#x}"),
            Self::CommandLineLong => {
                write!(formatter, "Command line is longer than {COMMAND_LINE_MAX} bytes")
            }
            Self::CommandLineText => formatter.write_str("Command line is not UTF-8"),
            Self::CommandLine(error) => write!(formatter, "{error}"),
            Self::Processors { wanted, found } => {
                write!(formatter, "vcpus={wanted}, but the MADT lists {found}")
            }
            Self::NoMemory { what } => write!(formatter, "No memory for {what}"),
        }
    }
}

static WORLD: AtomicPtr<World> = AtomicPtr::new(core::ptr::null_mut());

/// The world, once it is built.
pub fn get() -> &'static World {
    let world = WORLD.load(Ordering::Acquire);
    assert!(!world.is_null(), "a processor runs before the world is built");
    // SAFETY: `build` wrote it whole before it published the pointer, and never touches it again.
    unsafe { &*world }
}

/// Called once, by the first processor; `text` is room for the command line.
pub fn build(text: &mut [u8; COMMAND_LINE_MAX]) -> Result<&'static World, WorldError<'_>> {
    let memory = Mapped::new(Map::new());
    let no_start_info = WorldError::StartInfo(boot::start_info());
    let info = StartInfo::read(&memory, boot::start_info()).ok_or(no_start_info)?;
    let config = Config::parse(command_line(&memory, info.command_line, text)?)
        .map_err(WorldError::CommandLine)?;
    let processors = processors(&memory, info, &config)?;
    let (free, memory_mib) = map_memory(memory, info, config.workloads.kv)?;
    lapic::enable();
    let tsc_khz = config.tsc_khz.or_else(boot::cpuid_tsc_khz);
    let clock = Clock::new(tsc_khz.unwrap_or_else(lapic::calibrate_tsc_khz));
    let world = lay_out(config, clock, processors, free, memory_mib)?;
    WORLD.store(core::ptr::from_mut(world), Ordering::Release);
    Ok(get())
}

fn command_line<'a>(
    memory: &Mapped,
    mut address: u64,
    text: &'a mut [u8; COMMAND_LINE_MAX],
) -> Result<&'a str, WorldError<'a>> {
    let mut length = 0;
    while address != 0 {
        let byte = memory.read_u8(address).unwrap_or(0);
        if byte == 0 {
            break;
        }
        *text.get_mut(length).ok_or(WorldError::CommandLineLong)? = byte;
        length += 1;
        address += 1;
    }
    core::str::from_utf8(text.get(..length).unwrap_or_default())
        .map_err(|_| WorldError::CommandLineText)
}

fn processors(
    memory: &Mapped,
    info: StartInfo,
    config: &Config,
) -> Result<Processors, WorldError<'static>> {
    let listed = Processors::read(memory, info.rsdp);
    let processors = listed.unwrap_or_else(|| Processors::numbered(config.vcpus.unwrap_or(1)));
    let found = processors.ids().len();
    match config.vcpus {
        Some(wanted) if wanted as usize > found => Err(WorldError::Processors { wanted, found }),
        _ => Ok(processors),
    }
}

/// Maps all RAM, and the devices if they are wanted; what of it is free, and how much there is in all.
fn map_memory(
    memory: Mapped,
    info: StartInfo,
    with_devices: bool,
) -> Result<(Free, u64), WorldError<'static>> {
    let mut ranges = [(0, 0); 32];
    let (mut count, mut total, mut index) = (0, 0_u64, 0);
    while let Some(entry) = info.ram(&memory, index) {
        index += 1;
        let (Some((start, length)), Some(place)) = (entry, ranges.get_mut(count)) else {
            continue;
        };
        *place = (start, length);
        count += 1;
        total = total.saturating_add(length);
    }
    let mut map = memory.into_map();
    let mut free = Free::new();
    for (start, length) in ranges.into_iter().take(count) {
        map.add(start, length).map_err(|_| WorldError::NoMemory { what: "page tables" })?;
        free.add(start, length, LOW_END);
    }
    map.add_device(u64::from(LAPIC_ADDRESS))
        .map_err(|_| WorldError::NoMemory { what: "the APIC's page" })?;
    if with_devices {
        pci::map(&mut map).map_err(|_| WorldError::NoMemory { what: "the devices' pages" })?;
    }
    Ok((free, total.div_ceil(MIB)))
}

/// Shares the free memory out.
fn lay_out(
    config: Config,
    clock: Clock,
    processors: Processors,
    mut free: Free,
    memory_mib: u64,
) -> Result<&'static mut World, WorldError<'static>> {
    let listed = u32::try_from(processors.ids().len()).unwrap_or(1);
    let vcpus = config.vcpus.unwrap_or(listed);
    let workloads = config.workloads;
    let participants = if workloads.need_all_vcpus() { vcpus } else { 1 };
    let mut take =
        |pages: u64, what: &'static str| free.take(pages).ok_or(WorldError::NoMemory { what });
    let place = take((size_of::<World>() as u64).div_ceil(PAGE_SIZE), "the world")?;
    let cpu_memory = take(u64::from(vcpus - 1) * smp::PAGES_PER_CPU, "the processors")?;
    let kv_memory = take(if workloads.kv { kv::PAGES } else { 0 }, "the server")?;
    let pair_pages = u64::from(participants) * u64::from(pair::partners(participants));
    let pair_pages = if workloads.verify { pair_pages } else { 0 };
    let pairs = take(pair_pages, "the pairs")?;
    clear(pairs, pair_pages);
    let verify_cap = config.verify_mib.map_or(u64::MAX, |mib| mib * PAGES_PER_MIB);
    let verify_cap = if workloads.verify { verify_cap } else { 0 };
    let table_pages = table_pages(free.pages().min(verify_cap), participants);
    let all_tables = table_pages * u64::from(participants);
    let tables = free.take(all_tables).ok_or(WorldError::NoMemory { what: "the tables" })?;

    let beside = workloads.verify.then_some(DIRTY_MIB_BESIDE_VERIFY);
    let dirty_cap = config.dirty_mib.or(beside).map_or(u64::MAX, |mib| mib * PAGES_PER_MIB);
    let dirty_pages = if workloads.dirty { dirty_cap.min(free.pages()) } else { 0 };
    let border = free.pages() - dirty_pages;
    let verify = Area::new(free.clone(), 0, border, verify_cap);
    let dirty = Area::new(free, border, dirty_pages, dirty_pages);
    let world = World {
        config,
        clock,
        processors,
        vcpus,
        participants,
        memory_mib,
        cpu_memory,
        verify,
        tables,
        table_pages,
        pairs,
        dirty,
        kv_memory,
        phase: AtomicU32::new(0),
        avx2: boot::has_avx2(),
    };
    let place = usize::try_from(place).map_err(|_| WorldError::NoMemory { what: "the world" })?;
    let place = with_exposed_provenance_mut::<World>(place);
    // SAFETY: the pages were taken for the world, are mapped, and nobody else knows of them.
    unsafe {
        place.write(world);
        Ok(&mut *place)
    }
}

/// After a reset, memory may hold what an earlier run left.
fn clear(start: u64, pages: u64) {
    let place = with_exposed_provenance_mut::<u8>(usize::try_from(start).unwrap_or(0));
    let size = usize::try_from(pages * PAGE_SIZE).unwrap_or(0);
    // SAFETY: the pages were taken out of the free memory just now, and are mapped.
    unsafe { place.write_bytes(0, size) };
}

/// Pages of one processor's table.
#[must_use]
fn table_pages(verify_pages: u64, participants: u32) -> u64 {
    (verify_pages.div_ceil(u64::from(participants)) * 8).div_ceil(PAGE_SIZE)
}
