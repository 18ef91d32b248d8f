//! Guest memory as replication sees it: pages with dense numbers over one or more regions, and
//! sets of such pages.
//!
//! A [`PageIndex`] counts pages through the regions in the order of their guest addresses, holes
//! left out, so a set over all pages is a plain array of words.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

pub use guest_memory::{Mapping, Slice};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::ids::{PAGE_SIZE, PageIndex};
pub use crate::page_set::PageSet;

/// A stretch of guest memory without a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Guest physical address of the first byte.
    pub start: GuestAddress,
    /// Number of pages.
    pub pages: u64,
    /// Dense number of the first page.
    pub first: PageIndex,
}

/// Who still needs bytes of a memory that a writer's page fault would save for it.
pub trait Preserve: Send + Sync {
    /// Returns once it needs the memory no longer as it is. Nobody writes memory meanwhile, and no
    /// epoch is sealed.
    fn preserve(&self);
}

/// Guest memory with densely numbered pages. Cheap to clone; all clones see the same memory.
#[derive(Clone)]
pub struct Ram {
    mapping: Arc<Mapping>,
    regions: Arc<[Region]>,
    preservers: Arc<Mutex<Vec<Weak<dyn Preserve>>>>,
    /// How many want the very pages that are there now, whatever is in them.
    pins: Arc<Mutex<usize>>,
}

/// Somebody else than the mapping has pages of a memory: a device reads them where they are. As long as
/// this lives, they must not be exchanged for others.
#[derive(Debug)]
pub struct Pin(Arc<Mutex<usize>>);

fn count(pins: &Mutex<usize>) -> MutexGuard<'_, usize> {
    pins.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Pin {
    fn drop(&mut self) {
        *count(&self.0) -= 1;
    }
}

impl std::fmt::Debug for Ram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ram").field("regions", &self.regions).finish_non_exhaustive()
    }
}

impl Ram {
    /// Numbers the pages of `mapping`.
    ///
    /// # Panics
    /// If a region is not a whole number of pages: the VMM lays out its memory in pages.
    #[must_use]
    pub fn new(mapping: Arc<Mapping>) -> Self {
        let mut next = 0;
        let regions = mapping
            .iter()
            .map(|region| {
                assert_eq!(region.len() % PAGE_SIZE as u64, 0, "region is not whole pages");
                let pages = region.len() / PAGE_SIZE as u64;
                let first = PageIndex(next);
                next += pages;
                Region { start: region.start_addr(), pages, first }
            })
            .collect();
        Self { mapping, regions, preservers: Arc::default(), pins: Arc::default() }
    }

    fn preservers(&self) -> MutexGuard<'_, Vec<Weak<dyn Preserve>>> {
        self.preservers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be asked by [`Ram::preserve`] for as long as it lives.
    pub fn preserve_by(&self, preserver: Weak<dyn Preserve>) {
        let mut preservers = self.preservers();
        preservers.retain(|old| old.strong_count() > 0);
        preservers.push(preserver);
    }

    /// To be called before memory changes in any way but by writes through the mapping (its pages
    /// are given back to the host, say): returns once nobody needs its present bytes. Only while
    /// nobody writes it and no epoch is sealed.
    pub fn preserve(&self) {
        let preservers: Vec<_> = self.preservers().iter().filter_map(Weak::upgrade).collect();
        preservers.iter().for_each(|preserver| preserver.preserve());
    }

    /// Keeps the pages of this memory where they are. Waits for who is just exchanging them.
    #[must_use]
    pub fn pin(&self) -> Pin {
        *count(&self.pins) += 1;
        Pin(Arc::clone(&self.pins))
    }

    /// Calls `change`, which may exchange pages for others, unless it is told that somebody has them
    /// pinned. Nobody pins them meanwhile.
    pub fn exchange<R>(&self, change: impl FnOnce(bool) -> R) -> R {
        let pins = count(&self.pins);
        change(*pins > 0)
    }

    /// Writes zeroes over all of it, through the mapping.
    pub fn clear(&self) {
        let zero = [0; PAGE_SIZE];
        for page in 0..self.pages() {
            // There is such a page.
            let _ = self.write_page(PageIndex(page), &zero);
        }
    }

    /// Adds the pages that were written through the mapping since the last call.
    pub fn drain_written(&self, dirty: &mut PageSet) {
        for (region, place) in self.mapping.iter().zip(self.regions()) {
            let mut insert = |first: u64, word| {
                dirty.insert_word(PageIndex(place.first.0 + first), word);
            };
            region.get_mmap().bitmap().drain(&mut insert);
        }
    }

    /// How many pages were written through the mapping since they were drained last.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.mapping.iter().map(|region| region.get_mmap().bitmap().count()).sum()
    }

    /// The regions in the order of their addresses.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The mapping below.
    #[must_use]
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// Number of pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.regions.iter().map(|region| region.pages).sum()
    }

    /// Bytes of all of them.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.pages() * PAGE_SIZE as u64
    }

    /// Guest physical address of a page; `None` past the end.
    #[must_use]
    pub fn address(&self, page: PageIndex) -> Option<GuestAddress> {
        let after = self.regions.partition_point(|region| region.first <= page);
        let region = self.regions.get(after.checked_sub(1)?)?;
        let offset = page.0 - region.first.0;
        (offset < region.pages).then(|| GuestAddress(region.start.0 + offset * PAGE_SIZE as u64))
    }

    /// Number of pages of a page's region from this one on; 0 past the end.
    #[must_use]
    pub fn pages_left(&self, page: PageIndex) -> u64 {
        let after = self.regions.partition_point(|region| region.first <= page);
        let region = after.checked_sub(1).and_then(|at| self.regions.get(at));
        region.map_or(0, |region| (region.first.0 + region.pages).saturating_sub(page.0))
    }

    /// Makes `count` pages from `first` on ready to be written, in as few calls as there are regions
    /// in them: a fault for each is most of what it costs to fill a memory that was never touched.
    /// Where the host cannot, their first writes do; past the end there are none.
    pub fn populate(&self, first: PageIndex, count: u64) {
        let (mut page, mut left) = (first, count);
        while let Some(address) = self.address(page).filter(|_| left > 0) {
            let part = left.min(self.pages_left(page));
            let bytes = usize::try_from(part).unwrap_or(0) * PAGE_SIZE;
            if let Ok(memory) = self.mapping.get_slice(address, bytes)
                && let Err(error) = userfault::populate(&memory)
            {
                tracing::trace!("{part} pages from {page} are made one by one: {error}");
            }
            (page, left) = (PageIndex(page.0 + part), left - part);
        }
    }

    /// Copies a page out. `false` if there is no such page.
    #[must_use]
    pub fn read_page(&self, page: PageIndex, into: &mut [u8; PAGE_SIZE]) -> bool {
        self.address(page).is_some_and(|at| self.mapping.read_slice(into, at).is_ok())
    }

    /// Copies a page in. `false` if there is no such page.
    #[must_use]
    pub fn write_page(&self, page: PageIndex, from: &[u8; PAGE_SIZE]) -> bool {
        self.address(page).is_some_and(|at| self.mapping.write_slice(from, at).is_ok())
    }
}

/// Room for pages, each at an address that is a multiple of the page size.
///
/// Copying from guest memory into room that lies a few bytes off takes twice as long on some
/// processors (AMD's `rep movsb` takes source and destination for overlapping where their offsets in
/// a page are nearly equal; glibc bug 30994).
#[derive(Debug, Default)]
pub struct PageBuffer {
    bytes: Vec<u8>,
    start: usize,
}

impl PageBuffer {
    /// Room for `pages` pages, with memory behind it.
    #[must_use]
    pub fn touched(pages: usize) -> Self {
        let mut bytes = vec![0; (pages + 1) * PAGE_SIZE];
        let start = bytes.as_ptr().align_offset(PAGE_SIZE);
        // An address that cannot be aligned costs time only.
        let start = if start < PAGE_SIZE { start } else { 0 };
        bytes.iter_mut().step_by(PAGE_SIZE).for_each(|byte| *byte = 1);
        Self { bytes, start }
    }

    /// The page at a place.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn page(&self, at: usize) -> &[u8; PAGE_SIZE] {
        let from = self.start + at * PAGE_SIZE;
        self.bytes[from..].first_chunk().expect("a page of the buffer")
    }

    /// All pages.
    #[must_use]
    pub fn all_mut(&mut self) -> &mut [[u8; PAGE_SIZE]] {
        let (pages, _) = self.bytes[self.start..].as_chunks_mut();
        pages
    }

    /// `count` pages from a place on.
    ///
    /// # Panics
    /// If there are not so many.
    #[must_use]
    pub fn pages_mut(&mut self, at: usize, count: usize) -> &mut [u8] {
        let from = self.start + at * PAGE_SIZE;
        &mut self.bytes[from..][..count * PAGE_SIZE]
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use nix::sys::memfd::{MFdFlags, memfd_create};
    use nix::unistd::{Whence, lseek};
    use vm_memory::{FileOffset, GuestRegionMmap};

    use super::*;

    /// Two regions of 100 pages, not side by side, in one file.
    fn memfd() -> (File, Ram) {
        let size = 100 * PAGE_SIZE;
        let file = File::from(memfd_create(c"populated", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(2 * size as u64).unwrap();
        let region = |at: u64| {
            let offset = FileOffset::new(file.try_clone().unwrap(), at * size as u64);
            let start = GuestAddress(at * 0x1000_0000);
            GuestRegionMmap::from_range(start, size, Some(offset)).unwrap()
        };
        let mapping = Mapping::from_regions(vec![region(0), region(1)]).unwrap();
        (file, Ram::new(Arc::new(mapping)))
    }

    /// The runs of pages that the file has memory for.
    fn populated(file: &File) -> Vec<(i64, i64)> {
        let page = i64::try_from(PAGE_SIZE).unwrap();
        let (mut runs, mut at) = (vec![], 0);
        while let Ok(data) = lseek(file, at, Whence::SeekData) {
            at = lseek(file, data, Whence::SeekHole).unwrap();
            runs.push((data / page, at / page));
        }
        runs
    }

    #[test]
    fn exactly_what_was_named_is_populated() {
        let (file, ram) = memfd();
        assert_eq!(populated(&file), []);
        ram.populate(PageIndex(10), 5);
        assert_eq!(populated(&file), [(10, 15)]);
        ram.populate(PageIndex(90), 30);
        ram.populate(PageIndex(60), 0);
        ram.populate(PageIndex(198), u64::MAX);
        ram.populate(PageIndex(200), 1);
        assert_eq!(populated(&file), [(10, 15), (90, 120), (198, 200)]);
    }

    #[test]
    fn what_is_populated_reads_as_before() {
        let (file, ram) = memfd();
        file.write_all_at(&[7; PAGE_SIZE], 11 * PAGE_SIZE as u64).unwrap();
        ram.populate(PageIndex(10), 3);
        let mut page = [1; PAGE_SIZE];
        for (at, expected) in [(10, 0), (11, 7), (12, 0)] {
            assert!(ram.read_page(PageIndex(at), &mut page));
            assert_eq!(page, [expected; PAGE_SIZE]);
        }
    }
}
