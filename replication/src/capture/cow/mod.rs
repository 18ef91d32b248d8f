//! The bytes of an epoch's pages as they were at the seal, while the guest runs.
//!
//! ```text
//!   ahead: set so far ──> Freezer              (guest runs)
//!                    │ copies; what is written after that is late
//!   seal:  set ──> Freezer ──> Frozen          (guest stands still)
//!                    │ of what is late or new: copies what is cheaper copied, protects the rest
//!   then:  Frozen ──> senders, each its share  (guest runs)
//!                    │ a page that is written before it was taken is copied aside first
//! ```
//!
//! Enters, during the pause: memory and the set to send. Leaves, while the guest runs: batches to
//! the sender threads, each page once. Always holds: the bytes handed out for a page are its bytes
//! at the seal.
//!
//! - [`buffer`]: pages copied aside during a pause, and [`rooms`], where such are between epochs;
//! - [`copy`]: copies all;
//! - [`table`]: which pages are protected, and what becomes of each;
//! - [`protect`]: protects all (the fine-grained copy-on-write of Gerofi & Ishikawa, CLUSTER 2011),
//!   or what is cheaper protected;
//! - [`cost`]: what is cheaper;
//! - [`handler`]: the thread that serves faults;
//! - [`loan`]: pages that a device reads where they are.

mod buffer;
pub mod copy;
mod cost;
mod handler;
mod loan;
pub mod protect;
mod rooms;
mod table;
#[cfg(test)]
mod tests;

use std::sync::Arc;

pub use loan::Loan;
use thiserror::Error;
use userfault::UserfaultError;

use crate::ids::{PAGE_SIZE, PageIndex};
use crate::page_set::bits;
use crate::ram::{PageSet, Ram};

/// Why pages could not be kept.
#[derive(Debug, Error)]
pub enum CowError {
    #[error("Page {0} lies outside the memory")]
    Outside(PageIndex),
    #[error("{pages} pages do not fit the {capacity} that are set aside")]
    Full { pages: u64, capacity: u64 },
    #[error("Pages cannot be protected")]
    Protect(#[source] UserfaultError),
    #[error("The costs of protecting and copying cannot be measured")]
    Measure(#[source] std::io::Error),
    #[error("The thread that serves faults cannot be started")]
    Thread(#[source] std::io::Error),
}

impl CowError {
    /// Whether somebody else still protects this memory, and may end that.
    pub(crate) fn is_busy(&self) -> bool {
        let Self::Protect(UserfaultError::Register { source, .. }) = self else { return false };
        source.kind() == std::io::ErrorKind::ResourceBusy
    }
}

/// One sender's part of a set: every aligned group of 64 pages belongs to one share, so that
/// copies of a page from different epochs travel in order on one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    pub index: usize,
    pub of: usize,
}

impl Share {
    /// Whether a group belongs to this share.
    #[must_use]
    pub fn has(self, group: usize) -> bool {
        group % self.of == self.index
    }

    /// Whether `count` pages from `first` on, one at least, are all of this share.
    #[must_use]
    pub fn has_run(self, first: PageIndex, count: u64) -> bool {
        let group = |page: u64| page / GROUP_PAGES as u64;
        let (start, end) = (group(first.0), group(first.0.saturating_add(count - 1)));
        // Of two groups in a row at least one is another's.
        self.of == 1 || start == end && start % self.of as u64 == self.index as u64
    }

    /// Number of pages in this share of a memory that has `pages`.
    #[must_use]
    pub fn pages_of(self, pages: u64) -> u64 {
        let (index, of, group) = (self.index as u64, self.of as u64, GROUP_PAGES as u64);
        // Whole rounds of one group for each share, and what the last round has for this one.
        let (rounds, rest) = (pages / (of * group), pages % (of * group));
        rounds * group + rest.saturating_sub(index * group).min(group)
    }

    /// Number of pages of `set` in this share.
    #[must_use]
    pub fn count(self, set: &PageSet) -> u64 {
        let groups = set.groups().filter(|(group, _)| self.has(*group));
        groups.map(|(_, word)| u64::from(word.count_ones())).sum()
    }

    /// The groups of `set` in this share that have pages, ascending.
    pub fn groups(self, set: &PageSet) -> impl Iterator<Item = Group> + '_ {
        let groups = set.groups().filter(move |(group, _)| self.has(*group));
        groups.map(|(group, pages)| Group { number: group, pages })
    }

    /// The pages of `set` in this share, ascending.
    pub fn pages(self, set: &PageSet) -> impl Iterator<Item = PageIndex> + '_ {
        let groups = set.groups().filter(move |(group, _)| self.has(*group));
        groups.flat_map(|(group, word)| bits(word).map(move |bit| page(group, bit)))
    }
}

/// Pages of a set in one aligned group of 64.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    pub number: usize,
    /// The lowest bit is the first page.
    pub pages: u64,
}

impl Group {
    /// The runs of its pages: first and count, ascending.
    pub fn runs(self) -> impl Iterator<Item = (PageIndex, u64)> {
        let first = self.number as u64 * GROUP_PAGES as u64;
        runs(self.pages).map(move |(at, count)| (PageIndex(first + at), count))
    }

    /// Its pages, ascending.
    pub fn iter(self) -> impl Iterator<Item = PageIndex> {
        bits(self.pages).map(move |bit| page(self.number, bit))
    }

    /// Number of its pages.
    #[must_use]
    pub fn len(self) -> u64 {
        self.pages.count_ones().into()
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.pages == 0
    }
}

/// The page of a bit of a group.
fn page(group: usize, bit: usize) -> PageIndex {
    PageIndex((group * 64 + bit) as u64)
}

/// How many bits that are set lie below `bit`.
fn rank(word: u64, bit: usize) -> usize {
    (word & ((1 << bit) - 1)).count_ones() as usize
}

/// The runs of bits that are set, as first and count, ascending.
fn runs(word: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut rest = word;
    std::iter::from_fn(move || {
        (rest != 0).then(|| {
            let first = rest.trailing_zeros();
            let count = (rest >> first).trailing_ones();
            rest &= mask(first, count).map_or(0, |run| !run);
            (u64::from(first), u64::from(count))
        })
    })
}

/// `count` bits from `first` on; `None` for no bit at all.
fn mask(first: u32, count: u32) -> Option<u64> {
    Some(u64::MAX.checked_shr(64_u32.checked_sub(count)?)? << first)
}

/// The bytes of a page.
pub type Page = [u8; PAGE_SIZE];

/// A page with its bytes at the seal.
pub type Piece<'a> = (PageIndex, &'a Page);

/// Where a sender is in a [`Frozen`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Cursor(pub(crate) usize);

/// Pages of a group: the least that a sender has room for.
pub const GROUP_PAGES: usize = 64;

/// How pages were kept, in all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    /// Ahead of the pause, by copying, for those that were not written again until then.
    pub ahead: u64,
    /// In the pause, by copying.
    pub copied: u64,
    /// By protecting, gaps not counted.
    pub protected: u64,
    /// How often somebody waited to write a protected page.
    pub faults: u64,
}

/// Keeps pages during the pause.
pub trait Freezer: Send {
    /// Whether it pays to read the dirty log once more for [`Freezer::ahead`], before the seal that is
    /// due. Asked once for each. What was copied ahead before and no seal took is forgotten.
    fn wants_ahead(&mut self) -> bool {
        false
    }

    /// Copies pages ahead of the pause, while the guest runs. `pages` are those of the epoch so far,
    /// whose tracking was re-armed: one that is written from here on is `late`.
    ///
    /// # Errors
    /// [`CowError`]; then nothing was copied.
    fn ahead(&mut self, ram: &Ram, pages: &PageSet) -> Result<(), CowError> {
        let _ = (ram, pages);
        Ok(())
    }

    /// Keeps the bytes of `pages`. Only while nobody writes memory. `late` has every page that may
    /// have been written since [`Freezer::ahead`].
    ///
    /// # Errors
    /// [`CowError`]; then nothing is kept.
    fn freeze(
        &mut self,
        ram: &Ram,
        pages: &Arc<PageSet>,
        late: &PageSet,
    ) -> Result<Arc<dyn Frozen>, CowError>;

    /// Makes ready, outside of a pause, for what the last epochs would have needed.
    fn prepare(&mut self);

    /// What became of pages so far.
    fn kept(&self) -> Kept;
}

/// The pages of one epoch. What was not taken is let go when this is dropped.
pub trait Frozen: Send + Sync {
    /// Fills `batch` with the next pages of `share`, in ascending order; none left: it stays empty.
    /// At most [`GROUP_PAGES`], for which `scratch` has room: those that are copied only now.
    fn next<'a>(
        &'a self,
        share: Share,
        cursor: &mut Cursor,
        scratch: &'a mut [Page],
        batch: &mut Vec<Piece<'a>>,
    );

    /// As [`Frozen::next`]; of those that are copied only now, the pages of `loans` keep these bytes in
    /// memory, too, until their loan ends. Somebody may be waiting for that to write them.
    fn lend<'a>(
        &'a self,
        share: Share,
        cursor: &mut Cursor,
        scratch: &'a mut [Page],
        batch: &mut Vec<Piece<'a>>,
        loans: &mut Vec<Loan>,
    ) {
        let _ = loans;
        self.next(share, cursor, scratch, batch);
    }

    /// Whether loans ended that nobody had ended: what was sent of them may be newer than the seal.
    fn is_revoked(&self) -> bool {
        false
    }
}
