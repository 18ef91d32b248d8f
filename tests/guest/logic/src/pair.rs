//! Pages that two processors share: one counts up in it, the other looks on.
//!
//! The writer writes `head`, then `tail`; the reader reads `tail`, then `head`, and answers with
//! `echo`. In any state that the machine can really be in
//!
//! ```text
//! echo <= head seen by the reader <= head <= the writer's own count,  tail <= head
//! ```
//!
//! A machine put together from processors and pages of different moments breaks one of these:
//! each processor keeps its own side of the comparison in its own memory.

use core::sync::atomic::{AtomicU64, Ordering};

/// A page that one processor writes and another reads.
#[repr(C, align(4096))]
pub struct PairPage {
    head: AtomicU64,
    unused_low: [u64; 255],
    echo: AtomicU64,
    unused_high: [u64; 254],
    tail: AtomicU64,
}

/// What cannot be: the value expected at least or at most, and the one found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PairFault {
    pub expected: u64,
    pub found: u64,
}

impl PairPage {
    #[must_use]
    pub const fn new() -> Self {
        Self {
            head: AtomicU64::new(0),
            unused_low: [0; 255],
            echo: AtomicU64::new(0),
            unused_high: [0; 254],
            tail: AtomicU64::new(0),
        }
    }

    /// The writer's turn: counts up from `sequence`, which it keeps elsewhere.
    pub fn publish(&self, sequence: &mut u64) -> Result<(), PairFault> {
        let echo = self.echo.load(Ordering::Acquire);
        let head = self.head.load(Ordering::Acquire);
        let known = *sequence;
        *sequence = known.max(head) + 1;
        self.head.store(*sequence, Ordering::Release);
        self.tail.store(*sequence, Ordering::Release);
        if echo > known {
            return Err(PairFault { expected: known, found: echo });
        }
        if head != known {
            return Err(PairFault { expected: known, found: head });
        }
        Ok(())
    }

    /// The reader's turn: `seen` is the last value that it knows.
    pub fn observe(&self, seen: &mut u64) -> Result<(), PairFault> {
        let tail = self.tail.load(Ordering::Acquire);
        let head = self.head.load(Ordering::Acquire);
        let known = *seen;
        *seen = head;
        self.echo.store(head, Ordering::Release);
        if head < known {
            return Err(PairFault { expected: known, found: head });
        }
        if tail > head {
            return Err(PairFault { expected: head, found: tail });
        }
        Ok(())
    }
}

impl Default for PairPage {
    fn default() -> Self {
        Self::new()
    }
}

/// A processor's partners: the next ones in a ring, at most `PARTNERS_MAX`.
pub const PARTNERS_MAX: u32 = 15;

/// How many processors each one writes to.
#[must_use]
pub fn partners(vcpus: u32) -> u32 {
    vcpus.saturating_sub(1).min(PARTNERS_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_one_page() {
        assert_eq!(size_of::<PairPage>(), 4096);
        assert_eq!(std::mem::offset_of!(PairPage, tail), 4088);
    }

    #[test]
    fn two_threads_find_no_fault() {
        let page = PairPage::new();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut sequence = 0;
                (0..100_000).for_each(|_| page.publish(&mut sequence).unwrap());
            });
            scope.spawn(|| {
                let mut seen = 0;
                (0..100_000).for_each(|_| page.observe(&mut seen).unwrap());
            });
        });
    }

    #[test]
    fn a_page_behind_its_reader_is_seen() {
        let page = PairPage::new();
        let (mut sequence, mut seen) = (0, 0);
        (0..5).for_each(|_| page.publish(&mut sequence).unwrap());
        page.observe(&mut seen).unwrap();
        page.head.store(3, Ordering::Relaxed);
        page.tail.store(3, Ordering::Relaxed);
        assert_eq!(page.observe(&mut seen), Err(PairFault { expected: 5, found: 3 }));
    }

    #[test]
    fn a_writer_behind_its_reader_is_seen() {
        let page = PairPage::new();
        let (mut sequence, mut seen) = (0, 0);
        (0..5).for_each(|_| page.publish(&mut sequence).unwrap());
        page.observe(&mut seen).unwrap();
        let mut stale_sequence = 4;
        assert!(page.publish(&mut stale_sequence).is_err());
    }

    #[test]
    fn a_torn_page_is_seen() {
        let page = PairPage::new();
        let (mut sequence, mut seen) = (0, 0);
        page.publish(&mut sequence).unwrap();
        page.tail.store(2, Ordering::Relaxed);
        assert_eq!(page.observe(&mut seen), Err(PairFault { expected: 1, found: 2 }));
    }
}
