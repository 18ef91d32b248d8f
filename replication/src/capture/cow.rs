//! The bytes of an epoch's pages as they were at the seal, while the guest runs on.
//!
//! Enters, during the pause: memory and the set to send. Leaves, while the guest runs: batches to
//! the sender threads, each page once. Always holds: the bytes handed out for a page are its bytes
//! at the seal. A way to keep them is a [`Freezer`]; what it kept of one epoch is a [`Frozen`],
//! which senders share and tell when a batch is out, so that protection can be lifted in runs.

use std::sync::Arc;

use thiserror::Error;
use vm_memory::Bytes;

use crate::ids::{PAGE_SIZE, PageIndex};
use crate::ram::{PageSet, Ram};

/// Why pages could not be kept.
#[derive(Debug, Error)]
pub enum CowError {
    #[error("Page {0} lies outside the memory")]
    Outside(PageIndex),
    #[error("{pages} pages do not fit the {capacity} that are set aside")]
    Full { pages: u64, capacity: u64 },
}

/// One sender's part of a set: every aligned group of 64 pages belongs to one share, so that
/// copies of a page from different epochs travel in order on one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    pub index: usize,
    pub of: usize,
}

impl Share {
    /// Whether a page belongs to this share.
    #[must_use]
    pub fn has(self, page: PageIndex) -> bool {
        (page.0 / 64) % self.of as u64 == self.index as u64
    }

    /// Number of pages of `set` in this share.
    #[must_use]
    pub fn count(self, set: &PageSet) -> u64 {
        let words = set.words().iter().skip(self.index).step_by(self.of);
        words.map(|word| u64::from(word.count_ones())).sum()
    }

    /// The pages of `set` in this share, ascending.
    pub fn pages(self, set: &PageSet) -> impl Iterator<Item = PageIndex> + '_ {
        let words = set.words().iter().enumerate().skip(self.index).step_by(self.of);
        words.flat_map(|(at, word)| {
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

/// Where a sender is in a [`Frozen`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Cursor(usize);

/// A page with its bytes at the seal.
pub type Piece<'a> = (PageIndex, &'a [u8; PAGE_SIZE]);

/// Keeps pages during the pause.
pub trait Freezer: Send {
    /// Keeps the bytes of `pages`. Only while nobody writes `ram`.
    ///
    /// # Errors
    /// [`CowError`].
    fn freeze(&mut self, ram: &Ram, pages: &PageSet) -> Result<Arc<dyn Frozen>, CowError>;
}

/// The pages of one epoch.
pub trait Frozen: Send + Sync {
    /// Replaces `batch` by the next pages of `share`, `most` at most; none left: an empty batch.
    fn next<'a>(
        &'a self,
        share: Share,
        cursor: &mut Cursor,
        most: usize,
        batch: &mut Vec<Piece<'a>>,
    );

    /// The batch is out: its pages need to be kept no longer.
    fn done(&self, share: Share, batch: &[Piece<'_>]);
}

/// Copies every page aside during the pause, into buffers that are made once and reused.
#[derive(Debug)]
pub struct CopyFreezer {
    capacity: u64,
    spare: Vec<Arc<Copies>>,
}

/// Pages copied aside, ascending.
#[derive(Debug, Default)]
struct Copies {
    pages: Vec<PageIndex>,
    bytes: Vec<[u8; PAGE_SIZE]>,
}

impl CopyFreezer {
    /// Keeps up to `capacity` pages an epoch.
    #[must_use]
    pub fn new(capacity: u64) -> Self {
        Self { capacity, spare: Vec::new() }
    }

    /// A buffer that no sender holds any more.
    fn idle(&mut self) -> Arc<Copies> {
        match self.spare.iter().position(|copies| Arc::strong_count(copies) == 1) {
            Some(at) => self.spare.swap_remove(at),
            None => Arc::default(),
        }
    }
}

impl Freezer for CopyFreezer {
    fn freeze(&mut self, ram: &Ram, pages: &PageSet) -> Result<Arc<dyn Frozen>, CowError> {
        let count = pages.len();
        if count > self.capacity {
            return Err(CowError::Full { pages: count, capacity: self.capacity });
        }
        let mut copies = self.idle();
        let kept = Arc::get_mut(&mut copies).expect("nobody else holds an idle buffer");
        kept.pages.clear();
        kept.pages.extend(pages.iter());
        if kept.bytes.len() < kept.pages.len() {
            kept.bytes.resize(kept.pages.len(), [0; PAGE_SIZE]);
        }
        let mut at = 0;
        while at < kept.pages.len() {
            let run = run_length(ram, &kept.pages[at..]);
            let address = ram.address(kept.pages[at]).ok_or(CowError::Outside(kept.pages[at]))?;
            let bytes = kept.bytes[at..at + run].as_flattened_mut();
            let read = ram.mapping().read_slice(bytes, address);
            read.map_err(|_| CowError::Outside(kept.pages[at]))?;
            at += run;
        }
        self.spare.push(Arc::clone(&copies));
        Ok(copies)
    }
}

/// How many pages from the first on follow each other in one region.
fn run_length(ram: &Ram, pages: &[PageIndex]) -> usize {
    let first = pages[0];
    let after = ram.regions().partition_point(|region| region.first <= first);
    let end = after.checked_sub(1).and_then(|at| ram.regions().get(at));
    let end = end.map_or(first.0 + 1, |region| region.first.0 + region.pages);
    let mut run = 1;
    while pages.get(run).is_some_and(|page| page.0 == first.0 + run as u64 && page.0 < end) {
        run += 1;
    }
    run
}

impl Frozen for Copies {
    fn next<'a>(
        &'a self,
        share: Share,
        cursor: &mut Cursor,
        most: usize,
        batch: &mut Vec<Piece<'a>>,
    ) {
        batch.clear();
        while batch.len() < most
            && let Some(page) = self.pages.get(cursor.0)
        {
            if share.has(*page) {
                batch.push((*page, &self.bytes[cursor.0]));
            }
            cursor.0 += 1;
        }
    }

    fn done(&self, _share: Share, _batch: &[Piece<'_>]) {}
}
