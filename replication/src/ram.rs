//! Guest memory as replication sees it: pages with dense numbers over one or more regions, and
//! sets of such pages.
//!
//! A [`PageIndex`] counts pages through the regions in the order of their guest addresses, holes
//! left out, so a set over all pages is a plain array of words.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::ids::{PAGE_SIZE, PageIndex};

/// The mapping type that the VMM uses: its bitmap sees every write that the VMM itself makes.
pub type Mapping = GuestMemoryMmap<AtomicBitmap>;

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
        Self { mapping, regions, preservers: Arc::default() }
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

/// A set of pages: one bit each, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    pages: u64,
}

impl PageSet {
    /// The empty set over `pages` pages.
    ///
    /// # Panics
    /// If the host cannot address that many pages.
    #[must_use]
    pub fn new(pages: u64) -> Self {
        let words = usize::try_from(pages.div_ceil(64)).expect("pages fit the address space");
        Self { words: vec![0; words], pages }
    }

    /// Number of pages that the set is over, in it or not.
    #[must_use]
    pub fn universe(&self) -> u64 {
        self.pages
    }

    /// The words, lowest page in the lowest bit; bits past the universe stay zero.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Number of pages in the set.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Adds a page.
    ///
    /// # Panics
    /// If the page lies past the universe.
    pub fn insert(&mut self, page: PageIndex) {
        assert!(page.0 < self.pages, "page {page} of {}", self.pages);
        let word = usize::try_from(page.0 / 64).expect("checked against the universe");
        self.words[word] |= 1 << (page.0 % 64);
    }

    #[must_use]
    pub fn contains(&self, page: PageIndex) -> bool {
        page.0 < self.pages
            && usize::try_from(page.0 / 64)
                .ok()
                .and_then(|word| self.words.get(word))
                .is_some_and(|word| word & (1 << (page.0 % 64)) != 0)
    }

    /// Adds the pages of a region's bitmap, whose bit 0 is the page `first`.
    ///
    /// # Panics
    /// If a set bit lies past the universe.
    pub fn insert_bitmap(&mut self, first: PageIndex, bitmap: &[u64]) {
        if first.0.is_multiple_of(64) {
            let start = usize::try_from(first.0 / 64).expect("checked below");
            for (offset, bits) in bitmap.iter().enumerate().filter(|(_, bits)| **bits != 0) {
                self.words[start + offset] |= bits;
            }
            return;
        }
        for (offset, bits) in bitmap.iter().enumerate() {
            let mut bits = *bits;
            while bits != 0 {
                let bit = u64::from(bits.trailing_zeros());
                self.insert(PageIndex(first.0 + offset as u64 * 64 + bit));
                bits &= bits - 1;
            }
        }
    }

    /// Adds every page of `other`.
    ///
    /// # Panics
    /// If the universes differ.
    pub fn union(&mut self, other: &Self) {
        assert_eq!(self.pages, other.pages, "sets over different memories");
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine |= theirs;
        }
    }

    /// Adds its pages to each of `others`, and empties it.
    ///
    /// # Panics
    /// If the universes differ.
    pub fn drain_into(&mut self, others: [&mut Self; 2]) {
        let [first, second] = others;
        let universes = [first.pages, second.pages];
        assert_eq!(universes, [self.pages; 2], "sets over different memories");
        for (at, word) in self.words.iter_mut().enumerate().filter(|(_, word)| **word != 0) {
            first.words[at] |= *word;
            second.words[at] |= *word;
            *word = 0;
        }
    }

    /// Removes every page that is not in `other`.
    ///
    /// # Panics
    /// If the universes differ.
    pub fn intersect(&mut self, other: &Self) {
        assert_eq!(self.pages, other.pages, "sets over different memories");
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine &= theirs;
        }
    }

    /// Adds `count` pages from `first` on.
    ///
    /// # Panics
    /// If a page lies past the universe.
    pub fn insert_range(&mut self, first: PageIndex, count: u64) {
        let end = first.0.checked_add(count).filter(|end| *end <= self.pages);
        let end = end.expect("pages of this memory");
        let mut at = first.0;
        while at < end {
            let part = (64 - at % 64).min(end - at);
            let word = usize::try_from(at / 64).expect("checked against the universe");
            self.words[word] |= (u64::MAX >> (64 - part)) << (at % 64);
            at += part;
        }
    }

    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// The pages in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = PageIndex> + '_ {
        self.words.iter().enumerate().flat_map(|(at, word)| {
            let mut rest = *word;
            std::iter::from_fn(move || {
                (rest != 0).then(|| {
                    let bit = u64::from(rest.trailing_zeros());
                    rest &= rest - 1;
                    PageIndex(at as u64 * 64 + bit)
                })
            })
        })
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

    #[test]
    fn ranges_are_inserted_and_intersected() {
        for (first, count) in
            [(0, 0), (0, 1), (5, 59), (5, 60), (0, 64), (63, 2), (60, 200), (0, 300)]
        {
            let mut set = PageSet::new(300);
            set.insert_range(PageIndex(first), count);
            let pages: Vec<_> = set.iter().map(|page| page.0).collect();
            assert_eq!(pages, (first..first + count).collect::<Vec<_>>());
            let mut other = PageSet::new(300);
            other.insert_range(PageIndex(62), 10);
            set.intersect(&other);
            assert!(set.iter().all(|page| (62..72).contains(&page.0) && page.0 >= first));
        }
    }
}
