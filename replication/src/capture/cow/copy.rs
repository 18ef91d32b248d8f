//! Copies every page aside during the pause, as Remus does.

use std::sync::Arc;

use super::buffer::Buffer;
use super::{CowError, Cursor, Freezer, Frozen, Kept, Page, PageIndex, Piece, Share, bits};
use crate::ram::{PageSet, Ram};

/// Pages for which there is room from the start.
const START_PAGES: usize = 8192;

/// Keeps by copying, into buffers that are made before and reused.
#[derive(Debug)]
pub struct CopyFreezer {
    capacity: u64,
    /// Pages for which there shall be room.
    wanted: usize,
    kept: Kept,
    spare: Vec<Arc<Copies>>,
}

/// A group of 64 pages of which some are kept.
#[derive(Clone, Copy, Debug)]
struct Entry {
    group: usize,
    word: u64,
    /// Place of its first page.
    at: usize,
}

#[derive(Debug, Default)]
struct Copies {
    entries: Vec<Entry>,
    buffer: Buffer,
}

impl CopyFreezer {
    /// Keeps up to `capacity` pages an epoch.
    #[must_use]
    pub fn new(capacity: u64) -> Self {
        let wanted = usize::try_from(capacity).unwrap_or(usize::MAX).min(START_PAGES);
        Self { capacity, wanted, kept: Kept::default(), spare: Vec::new() }
    }

    /// A buffer that no sender holds any more.
    fn idle(&mut self) -> Arc<Copies> {
        // The one that was used last: it is nearest to the processor.
        match self.spare.iter().rposition(|copies| Arc::strong_count(copies) == 1) {
            Some(at) => self.spare.remove(at),
            None => Arc::default(),
        }
    }
}

impl Freezer for CopyFreezer {
    fn freeze(
        &mut self,
        ram: &Ram,
        pages: &Arc<PageSet>,
        _late: &PageSet,
    ) -> Result<Arc<dyn Frozen>, CowError> {
        let mut copies = self.idle();
        let kept = Arc::get_mut(&mut copies).expect("nobody else holds an idle buffer");
        kept.entries.clear();
        kept.buffer.clear();
        for (group, word) in pages.groups() {
            kept.entries.push(Entry { group, word, at: kept.buffer.len() });
            let before = kept.buffer.len() as u64;
            if before + u64::from(word.count_ones()) > self.capacity {
                return Err(CowError::Full { pages: pages.len(), capacity: self.capacity });
            }
            copy_group(ram, group, word, &mut kept.buffer)?;
        }
        self.wanted = self.wanted.max(kept.buffer.len());
        self.kept.copied += kept.buffer.len() as u64;
        self.spare.push(Arc::clone(&copies));
        Ok(copies)
    }

    fn kept(&self) -> Kept {
        self.kept
    }

    fn prepare(&mut self) {
        let mut copies = self.idle();
        if let Some(kept) = Arc::get_mut(&mut copies) {
            kept.buffer.reserve(self.wanted);
        }
        // Not before the one that was used last.
        self.spare.insert(0, copies);
    }
}

/// Copies the pages of one group, ascending.
pub(super) fn copy_group(
    ram: &Ram,
    group: usize,
    word: u64,
    buffer: &mut Buffer,
) -> Result<(), CowError> {
    for (first, count) in super::runs(word) {
        let (mut first, mut left) = (group as u64 * 64 + first, count);
        while left > 0 {
            // A group may reach over the border of a region.
            let part = left.min(ram.pages_left(PageIndex(first)));
            if part == 0 {
                return Err(CowError::Outside(PageIndex(first)));
            }
            buffer.copy(ram, PageIndex(first), part)?;
            (first, left) = (first + part, left - part);
        }
    }
    Ok(())
}

impl Frozen for Copies {
    fn next<'a>(
        &'a self,
        share: Share,
        cursor: &mut Cursor,
        _scratch: &'a mut [Page],
        batch: &mut Vec<Piece<'a>>,
    ) {
        while let Some(Entry { group, word, at }) = self.entries.get(cursor.0) {
            let mine = share.has(*group);
            if mine && batch.len() + word.count_ones() as usize > super::GROUP_PAGES {
                return;
            }
            cursor.0 += 1;
            if mine {
                let pages = bits(*word).map(|bit| super::page(*group, bit));
                batch.extend(pages.zip(*at..).map(|(page, at)| (page, self.buffer.page(at))));
            }
        }
    }
}
