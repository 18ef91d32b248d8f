//! What was done to the disks of a guest, for a copy of their images elsewhere.
//!
//! ```text
//!   Map ──begin_log──▶ Closing ──(what is reserved fits)──▶ Log
//!    ▲                    │                                   │
//!    └─────stop_log───────┴───────────────────────────────────┘
//! ```
//!
//! - Map: a change marks the blocks that it touched. Nothing grows, nobody waits.
//! - Closing: as Map, but no more is reserved than the log will hold.
//! - Log: a change is kept with its data, in the order in which changes ended, over all disks. What
//!   is kept and what is reserved is at most the limit: a disk that gets no room waits, and so its
//!   guest, until the next seal.
//!
//! A change enters one of the two and never neither: whoever records holds the lock, and so does
//! whoever changes the phase. `stop_log` turns the log back into marks, so nothing is forgotten.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::blocks::BlockMap;
use super::{CHANGE_BYTES_MAX, Change, Operation};
use crate::guest::Waker;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Map,
    Closing,
    Log,
}

#[derive(Debug)]
struct Inner {
    phase: Phase,
    blocks: Vec<BlockMap>,
    /// What was ever changed since the journal began.
    touched: Vec<BlockMap>,
    open: Vec<Change>,
    open_bytes: u64,
    /// For changes that the host was given and that have not ended.
    reserved_bytes: u64,
    limit_bytes: u64,
    /// Somebody was refused.
    starved: bool,
    /// An early seal was asked for since the last one.
    asked: bool,
}

/// See the module's documentation.
pub struct Journal {
    inner: Mutex<Inner>,
    changed: Condvar,
    /// As the phase: whether it is worth copying data before the lock is taken.
    logs: AtomicBool,
    on_full: Waker,
    on_room: Waker,
}

/// What was done between two seals, in order.
#[derive(Debug, Default)]
pub struct Log {
    pub changes: Vec<Change>,
    /// Their costs.
    pub bytes: u64,
}

/// A change as a disk tells it.
#[derive(Clone, Copy, Debug)]
pub struct Told<'a> {
    pub disk: u32,
    pub operation: Operation,
    pub offset: u64,
    pub len: u64,
    /// For a write.
    pub data: &'a [u8],
}

impl Told<'_> {
    fn keep(&self) -> Change {
        let Self { disk, operation, offset, len, data } = *self;
        Change { disk, operation, offset, len, data: data.to_vec() }
    }
}

impl Journal {
    /// A journal in which all blocks of images of these sizes are marked. `on_full` is called when
    /// a seal is due for the log's sake; `on_room` when one that was refused room may ask again.
    /// Both are called on a disk's thread and may only signal.
    #[must_use]
    pub fn new(sizes_bytes: &[u64], on_full: Waker, on_room: Waker) -> Self {
        Self {
            inner: Mutex::new(Inner {
                phase: Phase::Map,
                blocks: sizes_bytes.iter().map(|size| BlockMap::full(*size)).collect(),
                touched: sizes_bytes.iter().map(|size| BlockMap::empty(*size)).collect(),
                open: Vec::new(),
                open_bytes: 0,
                reserved_bytes: 0,
                limit_bytes: u64::MAX,
                starved: false,
                asked: false,
            }),
            changed: Condvar::new(),
            logs: AtomicBool::new(false),
            on_full,
            on_room,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets room aside for a change that costs `bytes`; `false` if there is none until `on_room`.
    /// Never waits.
    #[must_use]
    pub fn reserve(&self, bytes: u64) -> bool {
        let mut inner = self.lock();
        let all = inner.open_bytes.saturating_add(inner.reserved_bytes).saturating_add(bytes);
        if inner.phase != Phase::Map && all > inner.limit_bytes {
            inner.starved = true;
            // What is in the way may be all reserved, and no record may follow that asks.
            let ask = inner.phase == Phase::Log && !std::mem::replace(&mut inner.asked, true);
            drop(inner);
            if ask {
                self.on_full.wake();
            }
            return false;
        }
        inner.reserved_bytes += bytes;
        true
    }

    /// Gives back what was reserved, after the change was recorded or has failed.
    pub fn release(&self, bytes: u64) {
        let mut inner = self.lock();
        inner.reserved_bytes = inner.reserved_bytes.saturating_sub(bytes);
        self.close_over(&mut inner);
        let room = std::mem::take(&mut inner.starved);
        drop(inner);
        if room {
            self.on_room.wake();
        }
    }

    /// Takes a change that the host has carried out, before the guest hears of it. Never waits.
    ///
    /// # Panics
    /// If a write has more than [`CHANGE_BYTES_MAX`]: disks cut what they do into pieces.
    pub fn record(&self, told: Told<'_>) {
        assert!(told.data.len() <= CHANGE_BYTES_MAX, "a change of {} bytes", told.data.len());
        // Copied without the lock, if it will be needed.
        let kept = self.logs.load(Ordering::Acquire).then(|| told.keep());
        let mut inner = self.lock();
        if let Some(touched) = inner.touched.get_mut(told.disk as usize) {
            touched.mark(told.offset..told.offset + told.len);
        }
        if inner.phase != Phase::Log {
            if let Some(blocks) = inner.blocks.get_mut(told.disk as usize) {
                blocks.mark(told.offset..told.offset + told.len);
            }
            return;
        }
        let change = kept.unwrap_or_else(|| told.keep());
        inner.open_bytes += change.cost_bytes();
        inner.open.push(change);
        let half = inner.open_bytes >= inner.limit_bytes / 2;
        let ask = half && !std::mem::replace(&mut inner.asked, true);
        drop(inner);
        if ask {
            self.on_full.wake();
        }
    }

    /// From now on changes are to be logged, as soon as all that is under way fits `limit_bytes`.
    pub fn begin_log(&self, limit_bytes: u64) {
        let mut inner = self.lock();
        inner.limit_bytes = limit_bytes;
        inner.phase = Phase::Closing;
        self.close_over(&mut inner);
    }

    fn close_over(&self, inner: &mut Inner) {
        if inner.phase == Phase::Closing && inner.reserved_bytes <= inner.limit_bytes {
            inner.phase = Phase::Log;
            self.logs.store(true, Ordering::Release);
            self.changed.notify_all();
        }
    }

    /// Waits until changes are logged; `false` if they will not be.
    #[must_use]
    pub fn wait_log(&self) -> bool {
        let closing = |inner: &mut Inner| inner.phase == Phase::Closing;
        let inner = self.changed.wait_while(self.lock(), closing);
        inner.unwrap_or_else(PoisonError::into_inner).phase == Phase::Log
    }

    /// From now on changes are marked, those of the open log too. Nobody waits for room.
    pub fn stop_log(&self) {
        let mut inner = self.lock();
        inner.phase = Phase::Map;
        inner.limit_bytes = u64::MAX;
        self.logs.store(false, Ordering::Release);
        inner.open_bytes = 0;
        for change in std::mem::take(&mut inner.open) {
            if let Some(blocks) = inner.blocks.get_mut(change.disk as usize) {
                blocks.mark(change.offset..change.offset + change.len);
            }
        }
        inner.asked = false;
        inner.starved = false;
        drop(inner);
        self.changed.notify_all();
        self.on_room.wake();
    }

    /// Ends the open log. Only while nobody records.
    #[must_use]
    pub fn seal(&self) -> Log {
        let mut inner = self.lock();
        let log = Log {
            bytes: std::mem::take(&mut inner.open_bytes),
            changes: std::mem::take(&mut inner.open),
        };
        inner.asked = false;
        let room = std::mem::take(&mut inner.starved);
        drop(inner);
        if room {
            self.on_room.wake();
        }
        log
    }

    /// What the open log costs.
    #[must_use]
    pub fn open_bytes(&self) -> u64 {
        self.lock().open_bytes
    }

    /// Takes marked blocks at or after `from`, at most `most` bytes that follow each other. What is
    /// read of them afterwards has every change that was recorded before.
    #[must_use]
    pub fn next_marked(&self, disk: usize, from: u64, most: u64) -> Option<Range<u64>> {
        self.lock().blocks.get_mut(disk)?.take(from, most)
    }

    /// Whether a change of the range was recorded since the journal began. One that is under way and
    /// is recorded later marks its blocks or is logged: it is seen in time.
    #[must_use]
    pub fn is_touched(&self, disk: usize, range: &Range<u64>) -> bool {
        self.lock().touched.get(disk).is_some_and(|touched| touched.has_any(range))
    }

    /// Bytes of the blocks that are marked.
    #[must_use]
    pub fn marked_bytes(&self) -> u64 {
        self.lock().blocks.iter().map(BlockMap::bytes).sum()
    }
}

#[cfg(test)]
#[path = "journal_tests.rs"]
mod tests;
