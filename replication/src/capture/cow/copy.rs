//! Copies every page aside during the pause, as Remus does.

use std::sync::{Arc, Mutex, PoisonError};

use super::buffer::Buffer;
use super::rooms::{Rooms, Use};
use super::{CowError, Cursor, Freezer, Frozen, Kept, Page, PageIndex, Piece, Share, bits};
use crate::ram::{PageSet, Ram};

/// Pages for which there is room from the start.
const START_PAGES: usize = 8192;

/// Keeps by copying, into buffers that are made before and reused.
#[derive(Debug)]
pub struct CopyFreezer {
    capacity: u64,
    kept: Kept,
    idle: Arc<Idle>,
}

/// What no epoch uses at the moment.
#[derive(Debug)]
struct Idle {
    rooms: Rooms,
    entries: Mutex<Vec<Vec<Entry>>>,
}

/// A group of 64 pages of which some are kept.
#[derive(Clone, Copy, Debug)]
struct Entry {
    group: usize,
    word: u64,
    /// Place of its first page.
    at: usize,
}

#[derive(Debug)]
struct Copies {
    entries: Vec<Entry>,
    buffer: Buffer,
    idle: Arc<Idle>,
}

impl CopyFreezer {
    /// Keeps up to `capacity` pages an epoch.
    ///
    /// # Errors
    /// [`CowError::Thread`].
    pub fn new(capacity: u64) -> Result<Self, CowError> {
        let start = usize::try_from(capacity).unwrap_or(usize::MAX).min(START_PAGES);
        let idle = Idle { rooms: Rooms::start(start, 0)?, entries: Mutex::default() };
        Ok(Self { capacity, kept: Kept::default(), idle: Arc::new(idle) })
    }
}

impl Idle {
    fn copies(self: &Arc<Self>) -> Copies {
        let mut entries = self.entries().pop().unwrap_or_default();
        entries.clear();
        Copies { entries, buffer: self.rooms.take(Use::Pause), idle: Arc::clone(self) }
    }

    fn entries(&self) -> std::sync::MutexGuard<'_, Vec<Vec<Entry>>> {
        // Nothing is half done under this lock.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        self.idle.rooms.give(Use::Pause, std::mem::take(&mut self.buffer));
        self.idle.entries().push(std::mem::take(&mut self.entries));
    }
}

impl Freezer for CopyFreezer {
    fn freeze(
        &mut self,
        ram: &Ram,
        pages: &Arc<PageSet>,
        _late: &PageSet,
    ) -> Result<Arc<dyn Frozen>, CowError> {
        let mut kept = self.idle.copies();
        for (group, word) in pages.groups() {
            kept.entries.push(Entry { group, word, at: kept.buffer.len() });
            let before = kept.buffer.len() as u64;
            if before + u64::from(word.count_ones()) > self.capacity {
                return Err(CowError::Full { pages: pages.len(), capacity: self.capacity });
            }
            copy_group(ram, group, word, &mut kept.buffer)?;
        }
        self.idle.rooms.copied(Use::Pause, kept.buffer.len());
        self.kept.copied += kept.buffer.len() as u64;
        Ok(Arc::new(kept))
    }

    fn kept(&self) -> Kept {
        self.kept
    }

    fn prepare(&mut self) {
        self.idle.rooms.prepare();
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
