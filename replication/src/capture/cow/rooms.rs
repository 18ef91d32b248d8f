//! Buffers between two epochs.
//!
//! Enters: buffers that an epoch is done with, and how many pages each pause copied. Leaves: the largest
//! buffer that is idle, at once. Always holds: memory is asked of the host, touched and given back by a
//! thread of its own, never under the lock that a pause takes; of each use at most the buffers of the
//! epochs in flight and one more exist, and none is much larger than what recent epochs needed.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossbeam_channel::{Sender, bounded};

use super::CowError;
use super::buffer::{Buffer, CHUNK_PAGES, Chunk};

/// What a buffer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// Pages copied in the pause.
    Pause,
    /// Pages copied ahead of it.
    Ahead,
}

const USES: [Use; 2] = [Use::Pause, Use::Ahead];
/// Part of what was wanted that is forgotten with each epoch: half of it after some 700.
const FORGOTTEN: usize = 1024;

/// The idle buffers of one use.
#[derive(Debug, Default)]
struct Pool {
    idle: Vec<Buffer>,
    /// Pages that the next buffer shall have room for; never less than `least`.
    wanted: usize,
    least: usize,
    /// Pieces that were made in the middle of copying.
    grown: usize,
}

impl Pool {
    /// Place of the largest, of several the one that was used last: it is nearest to the processor.
    fn largest(&self) -> Option<usize> {
        (0..self.idle.len()).max_by_key(|at| self.idle[*at].room())
    }

    fn lacks_room(&self) -> bool {
        self.largest().map_or(0, |at| self.idle[at].room()) < self.wanted
    }

    fn add(&mut self, chunk: Chunk) {
        let at = self.largest().unwrap_or_else(|| {
            self.idle.push(Buffer::default());
            0
        });
        self.idle[at].add(chunk);
    }

    /// What idle buffers have beyond need.
    fn surplus(&mut self) -> Vec<Chunk> {
        let most = self.wanted + self.wanted / 2 + CHUNK_PAGES;
        self.idle.iter_mut().flat_map(|buffer| buffer.shrink(most)).collect()
    }
}

/// Buffers for the pages of epochs, see the module.
#[derive(Debug)]
pub(super) struct Rooms {
    shared: Arc<Shared>,
    /// Wakes the thread; its end ends it.
    bell: Sender<()>,
}

#[derive(Debug, Default)]
struct Shared([Mutex<Pool>; USES.len()]);

impl Shared {
    fn pool(&self, of: Use) -> MutexGuard<'_, Pool> {
        // Nothing is half done under this lock.
        self.0[of as usize].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes what is wanted, a piece at a time, and gives back what is not.
    fn make(&self) {
        for of in USES {
            while self.pool(of).lacks_room() {
                let chunk = Chunk::touched(CHUNK_PAGES);
                self.pool(of).add(chunk);
            }
            let surplus = self.pool(of).surplus();
            drop(surplus);
        }
    }
}

impl Rooms {
    /// Begins to make room for so many pages in a pause, and ahead of it.
    ///
    /// # Errors
    /// [`CowError::Thread`].
    pub(super) fn start(pause_pages: usize, ahead_pages: usize) -> Result<Self, CowError> {
        let shared = Arc::new(Shared::default());
        for (of, least) in [(Use::Pause, pause_pages), (Use::Ahead, ahead_pages)] {
            let mut pool = shared.pool(of);
            (pool.wanted, pool.least) = (least, least);
        }
        let (bell, rings) = bounded(1);
        let makes = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("repl-room".to_owned())
            .spawn(move || rings.iter().for_each(|()| makes.make()))
            .map_err(CowError::Thread)?;
        let rooms = Self { shared, bell };
        rooms.prepare();
        Ok(rooms)
    }

    /// The largest buffer that is idle, empty.
    pub(super) fn take(&self, of: Use) -> Buffer {
        let mut pool = self.shared.pool(of);
        let mut buffer =
            pool.largest().map_or_else(Buffer::default, |at| pool.idle.swap_remove(at));
        drop(pool);
        buffer.clear();
        buffer
    }

    /// An epoch is done with it.
    pub(super) fn give(&self, of: Use, mut buffer: Buffer) {
        let mut pool = self.shared.pool(of);
        pool.grown += buffer.take_grown();
        pool.idle.push(buffer);
    }

    /// An epoch copied so many pages.
    pub(super) fn copied(&self, of: Use, pages: usize) {
        let mut pool = self.shared.pool(of);
        let rest = pool.wanted - pool.wanted.div_ceil(FORGOTTEN);
        pool.wanted = rest.max(pages).max(pool.least);
    }

    /// Has the thread make ready for the next pause.
    pub(super) fn prepare(&self) {
        // It has been told already, and looks at what is wanted by then.
        let _ = self.bell.try_send(());
    }

    /// Waits until the thread has made what is wanted.
    #[cfg(test)]
    pub(super) fn settle(&self) {
        self.prepare();
        while USES.iter().any(|of| self.shared.pool(*of).lacks_room()) {
            std::thread::yield_now();
        }
    }

    /// Pieces that were made while pages were copied, and pages that all idle buffers hold.
    #[cfg(test)]
    pub(super) fn figures(&self, of: Use) -> (usize, usize) {
        let pool = self.shared.pool(of);
        (pool.grown, pool.idle.iter().map(Buffer::room).sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::PageIndex;
    use crate::testing::memory;

    const PAGES: u64 = 2000;
    const ROOM: usize = 2000;

    /// An epoch that copies so many pages, by the book.
    fn epoch(rooms: &Rooms, pages: u64) -> Buffer {
        let ram = memory(&[(0, PAGES)]);
        let mut buffer = rooms.take(Use::Pause);
        buffer.copy(&ram, PageIndex(0), pages).unwrap();
        rooms.copied(Use::Pause, buffer.len());
        rooms.settle();
        buffer
    }

    #[test]
    fn a_pause_that_copies_as_much_as_one_before_finds_the_room() {
        let rooms = Rooms::start(100, 0).unwrap();
        rooms.settle();
        // Two are in flight when the third is sealed.
        let first = epoch(&rooms, PAGES);
        let grown = ROOM / CHUNK_PAGES;
        let second = epoch(&rooms, PAGES);
        rooms.give(Use::Pause, first);
        assert_eq!(rooms.figures(Use::Pause).0, grown, "the first one had to grow");
        let third = epoch(&rooms, PAGES);
        for buffer in [second, third] {
            rooms.give(Use::Pause, buffer);
        }
        assert_eq!(rooms.figures(Use::Pause).0, grown, "and no other");
    }

    #[test]
    fn what_is_not_needed_any_more_is_given_back() {
        let rooms = Rooms::start(CHUNK_PAGES, 0).unwrap();
        let buffer = epoch(&rooms, PAGES);
        rooms.give(Use::Pause, buffer);
        assert!(rooms.figures(Use::Pause).1 >= 2 * ROOM);
        for _ in 0..10 * FORGOTTEN {
            rooms.copied(Use::Pause, 10);
        }
        rooms.prepare();
        // Two buffers, each with what there was from the start and half of that.
        while rooms.figures(Use::Pause).1 > 6 * CHUNK_PAGES {
            std::thread::yield_now();
        }
        assert!(rooms.figures(Use::Pause).1 >= CHUNK_PAGES);
    }
}
