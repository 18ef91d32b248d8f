//! Guest memory: one memfd, mapped once, around the 32-bit hole.
//!
//! Enters: the configuration's `memory`. Leaves: a [`Memory`] whose [`Ram`] every reader and
//! writer shares. Always holds: the VMM writes guest memory only through this one mapping, whose
//! bitmap sees the write (a second mapping, or `pwrite` on the memfd, would escape both the dirty
//! tracking and copy-on-write protection).
//!
//! ```text
//! 0            3 GiB        4 GiB
//! |  low RAM   |  MMIO hole  |  high RAM ...      PCI's upper window past it
//! ```

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use api::config::MemoryConfig;
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::{Whence, lseek};
use replication::ids::{PAGE_SIZE, PageIndex};
use replication::ram::{Mapping, PageSet, Ram};
use thiserror::Error;
use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::FromRangesError;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

/// First address of the hole below 4 GiB in which MMIO lives.
pub const LOW_RAM_END: u64 = 3 << 30;
/// First address of PCI configuration space, in the hole.
pub const ECAM_START: u32 = 0xe000_0000;
/// First address of the RAM above the hole.
pub const HIGH_RAM_START: u64 = 4 << 30;
/// Smallest memory that a payload can be loaded into.
pub const SIZE_MIN: u64 = 4 << 20;

/// Guest memory could not be had.
#[derive(Debug, Error)]
pub enum MemoryError {
    #[error("Memory size {size} is not usable: a multiple of {granule} from {SIZE_MIN} is")]
    Size { size: u64, granule: u64 },
    #[error("Huge page size {0} is not usable: a power of two from 2 MiB to 1 GiB is")]
    HugePageSize(u64),
    #[error("Cannot create {size} bytes of guest memory")]
    Create { size: u64, source: io::Error },
    #[error("Cannot map guest memory")]
    Map(#[source] FromRangesError),
    #[error("Cannot populate {size} bytes of guest memory (hugepages reserved? enough free?)")]
    Populate { size: u64, source: io::Error },
    #[error("A memory of {size} bytes does not fit this host, which has {available} available")]
    DoesNotFit { size: u64, available: u64 },
    #[error("Cannot empty guest memory for a reset")]
    Reset(#[source] io::Error),
}

/// One KVM memory slot's worth of guest memory.
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    pub id: u32,
    pub guest_address: u64,
    pub size: u64,
    pub host_address: u64,
}

/// The memory of one VM. Clones are of the same memory, which lives as long as any.
#[derive(Clone, Debug)]
pub struct Memory {
    ram: Ram,
    file: Arc<File>,
    size: u64,
}

impl Memory {
    /// Allocates and maps what the configuration asks for.
    pub fn new(config: &MemoryConfig) -> Result<Self, MemoryError> {
        let granule = granule(config)?;
        let size = config.size;
        if size < SIZE_MIN || !size.is_multiple_of(granule) {
            return Err(MemoryError::Size { size, granule });
        }
        let file = Arc::new(memfd(config, granule, size)?);
        let mapping = map(&file, size)?;
        let memory = Self { ram: Ram::new(Arc::new(mapping)), file, size };
        if config.thp && !config.hugepages {
            // A hint: a kernel without shmem huge pages refuses it and loses nothing.
            let _ = memory.advise(libc::MADV_HUGEPAGE);
        }
        if config.prefault {
            memory
                .advise(libc::MADV_POPULATE_WRITE)
                .map_err(|source| MemoryError::Populate { size, source })?;
        }
        Ok(memory)
    }

    /// Fails if the host has less memory available than `config` would take when it is full: a
    /// backup must be able to hold every page of its primary.
    pub fn check_fits(config: &MemoryConfig) -> Result<(), MemoryError> {
        let available = if config.hugepages { None } else { available_bytes() };
        match available {
            Some(available) if available < config.size => {
                Err(MemoryError::DoesNotFit { size: config.size, available })
            }
            _ => Ok(()),
        }
    }

    /// The pages, for readers and writers.
    #[must_use]
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    #[must_use]
    pub fn mapping(&self) -> &Arc<Mapping> {
        self.ram.mapping()
    }

    /// Bytes of memory.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// First address past all RAM.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.slots().iter().map(|slot| slot.guest_address + slot.size).max().unwrap_or(0)
    }

    /// What KVM is to be told.
    #[must_use]
    pub fn slots(&self) -> Vec<Slot> {
        (0..)
            .zip(self.mapping().iter())
            .map(|(id, region)| Slot {
                id,
                guest_address: region.start_addr().0,
                size: region.len(),
                host_address: region.as_ptr() as u64,
            })
            .collect()
    }

    /// Adds the pages that the VMM itself wrote since the last call.
    pub fn harvest_own_writes(&self, dirty: &mut PageSet) {
        self.ram.drain_written(dirty);
    }

    /// How many pages the VMM itself wrote since the last harvest.
    #[must_use]
    pub fn own_writes(&self) -> u64 {
        self.ram.written()
    }

    /// The first page from `page` on that has ever been touched; `None` if there is none. Reading
    /// a page that was not would make the host allocate it.
    #[must_use]
    pub fn next_populated(&self, page: PageIndex) -> Option<PageIndex> {
        let at = i64::try_from(page.0 * PAGE_SIZE as u64).ok()?;
        match lseek(&*self.file, at, Whence::SeekData) {
            Ok(data) => Some(PageIndex(u64::try_from(data).ok()? / PAGE_SIZE as u64)),
            Err(Errno::ENXIO) => None,
            // A backing without SEEK_DATA: every page may be there.
            Err(_) => (page.0 < self.ram.pages()).then_some(page),
        }
    }

    /// Removes from `pages` those that were never touched.
    pub fn drop_unpopulated(&self, pages: &mut PageSet) {
        let mut populated = PageSet::new(pages.universe());
        let mut next = PageIndex(0);
        while let Some(first) = self.next_populated(next) {
            let end = self.next_hole(first);
            populated.insert_range(first, end.0 - first.0);
            next = end;
        }
        pages.intersect(&populated);
    }

    /// The first page after `page`, which is populated, that is not; the end if there is none.
    fn next_hole(&self, page: PageIndex) -> PageIndex {
        let hole = i64::try_from(page.0 * PAGE_SIZE as u64)
            .ok()
            .and_then(|at| lseek(&*self.file, at, Whence::SeekHole).ok())
            .and_then(|hole| u64::try_from(hole).ok());
        let end = hole.map_or(self.ram.pages(), |hole| hole / PAGE_SIZE as u64);
        // It may have been given back in between.
        PageIndex(end.clamp(page.0 + 1, self.ram.pages()))
    }

    /// Gives all pages back to the host, so that they read as zero, and marks them all written. Where a
    /// device has them, they stay, and zeroes are written.
    pub fn reset(&self) -> Result<(), MemoryError> {
        // A hole takes pages away without a fault.
        self.ram.preserve();
        self.ram.exchange(|pinned| {
            if pinned {
                self.ram.clear();
                return Ok(());
            }
            self.give_back()
        })?;
        self.mark_all_written();
        Ok(())
    }

    fn give_back(&self) -> Result<(), MemoryError> {
        let length = i64::try_from(self.size)
            .map_err(|_| MemoryError::Size { size: self.size, granule: PAGE_SIZE as u64 })?;
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: punching a hole has no effect on the mapping itself, only on its contents, and
        // every reader copes with any content.
        let result = unsafe { libc::fallocate(self.file.as_raw_fd(), mode, 0, length) };
        if result != 0 {
            return Err(MemoryError::Reset(io::Error::last_os_error()));
        }
        Ok(())
    }

    /// Every page is in the next harvest.
    pub fn mark_all_written(&self) {
        for region in self.mapping().iter() {
            region.bitmap().mark_dirty(0, region.size());
        }
    }

    fn advise(&self, advice: i32) -> io::Result<()> {
        for region in self.mapping().iter() {
            // SAFETY: the range is exactly one live mapping, and neither advice that is used
            // here changes the content of a page.
            let result = unsafe { libc::madvise(region.as_ptr().cast(), region.size(), advice) };
            if result != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }
}

fn granule(config: &MemoryConfig) -> Result<u64, MemoryError> {
    if !config.hugepages {
        return Ok(PAGE_SIZE as u64);
    }
    let size = config.hugepage_size.unwrap_or(2 << 20);
    if !size.is_power_of_two() || !(2 << 20..=1 << 30).contains(&size) {
        return Err(MemoryError::HugePageSize(size));
    }
    Ok(size)
}

fn memfd(config: &MemoryConfig, granule: u64, size: u64) -> Result<File, MemoryError> {
    let create = |source| MemoryError::Create { size, source };
    let mut flags = MFdFlags::MFD_CLOEXEC;
    if config.hugepages {
        flags |= MFdFlags::MFD_HUGETLB;
        // The kernel takes the logarithm of the page size in the flags (memfd_create(2)).
        flags |= MFdFlags::from_bits_retain(granule.trailing_zeros() << libc::MFD_HUGE_SHIFT);
    }
    let fd = memfd_create(c"guest-ram", flags).map_err(|errno| create(errno.into()))?;
    let file = File::from(fd);
    file.set_len(size).map_err(create)?;
    Ok(file)
}

fn map(file: &Arc<File>, size: u64) -> Result<Mapping, MemoryError> {
    let low = size.min(LOW_RAM_END);
    let mut ranges = vec![(GuestAddress(0), low, 0)];
    if size > low {
        ranges.push((GuestAddress(HIGH_RAM_START), size - low, low));
    }
    let mut regions = Vec::with_capacity(ranges.len());
    for (start, length, offset) in ranges {
        let length = usize::try_from(length)
            .map_err(|_| MemoryError::Size { size, granule: PAGE_SIZE as u64 })?;
        let backing = FileOffset::from_arc(Arc::clone(file), offset);
        let region = GuestRegionMmap::from_range(start, length, Some(backing));
        regions.push(region.map_err(MemoryError::Map)?);
    }
    Mapping::from_regions(regions).map_err(|error| MemoryError::Map(error.into()))
}

/// `MemAvailable` of the host in bytes, where it can be read.
fn available_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    fn config(size: u64) -> MemoryConfig {
        MemoryConfig { size, ..Default::default() }
    }

    #[test]
    fn memory_above_the_hole_is_a_second_region() {
        let memory = Memory::new(&config((3 << 30) + (8 << 20))).unwrap();
        let slots = memory.slots();
        assert_eq!(slots.len(), 2);
        assert_eq!((slots[1].guest_address, slots[1].size), (HIGH_RAM_START, 8 << 20));
        assert_eq!(memory.ram().address(PageIndex(3 << 18)), Some(GuestAddress(HIGH_RAM_START)));
    }

    #[test]
    fn own_writes_are_seen_once() {
        let memory = Memory::new(&config(8 << 20)).unwrap();
        let mut dirty = PageSet::new(memory.ram().pages());
        memory.mapping().write_obj(7_u64, GuestAddress(5 * 4096 + 4092)).unwrap();
        memory.harvest_own_writes(&mut dirty);
        assert_eq!(dirty.iter().collect::<Vec<_>>(), [PageIndex(5), PageIndex(6)]);
        dirty.clear();
        memory.harvest_own_writes(&mut dirty);
        assert!(dirty.is_empty());
    }

    #[test]
    fn pages_that_were_never_touched_are_known() {
        let memory = Memory::new(&config(8 << 20)).unwrap();
        let pages = memory.ram().pages();
        for page in [3, 4, 70, pages - 1] {
            memory.mapping().write_obj(7_u64, GuestAddress(page * 4096)).unwrap();
        }
        let mut set = PageSet::new(pages);
        set.insert_range(PageIndex(4), pages - 4);
        memory.drop_unpopulated(&mut set);
        let left: Vec<_> = set.iter().map(|page| page.0).collect();
        assert_eq!(left, [4, 70, pages - 1]);
    }

    #[test]
    fn a_reset_zeroes_and_marks_everything() {
        let memory = Memory::new(&config(8 << 20)).unwrap();
        memory.mapping().write_obj(7_u64, GuestAddress(4096)).unwrap();
        memory.reset().unwrap();
        assert_eq!(memory.mapping().read_obj::<u64>(GuestAddress(4096)).unwrap(), 0);
        let mut dirty = PageSet::new(memory.ram().pages());
        memory.harvest_own_writes(&mut dirty);
        assert_eq!(dirty.len(), memory.ram().pages());
    }

    /// A device that has them would go on reading the pages that a hole takes away.
    #[test]
    fn a_reset_exchanges_no_page_that_is_pinned() {
        let memory = Memory::new(&config(8 << 20)).unwrap();
        let last = memory.ram().pages() - 1;
        let touch = || {
            for page in [1, last] {
                memory.mapping().write_obj(7_u64, GuestAddress(page * 4096)).unwrap();
            }
        };
        touch();
        let pin = memory.ram().pin();
        memory.reset().unwrap();
        assert_eq!(memory.next_populated(PageIndex(1)), Some(PageIndex(1)), "it is still there");
        for page in [1, last] {
            assert_eq!(memory.mapping().read_obj::<u64>(GuestAddress(page * 4096)).unwrap(), 0);
        }
        touch();
        drop(pin);
        memory.reset().unwrap();
        assert_eq!(memory.next_populated(PageIndex(0)), None, "it was given back");
    }

    #[test]
    fn odd_sizes_are_refused() {
        for size in [0, 4095, (64 << 20) + 1] {
            assert!(matches!(Memory::new(&config(size)), Err(MemoryError::Size { .. })));
        }
    }
}
