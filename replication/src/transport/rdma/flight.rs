//! What is posted and has not completed, and who waits for it: pure.
//!
//! ```text
//!   post ──> [chunk, its leases] ──> complete: the leases that no other chunk has end
//! ```
//!
//! A chunk is one completion: that of its last request, which comes when all of its requests are done.
//! Completions may come in any order. Always holds: a lease ends when every chunk that it was posted with
//! has completed, and not before, unless all of this is dropped.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::transport::Lease;

/// What several chunks have in common: each reads some of it.
pub(super) type Leases = Option<Arc<Vec<Lease>>>;

#[derive(Default)]
pub(super) struct Flight {
    /// In the order in which they were posted; `None`: it completed, and an earlier one has not.
    chunks: VecDeque<Option<Chunk>>,
    /// The number of the first.
    first: u64,
    requests: usize,
    bytes: usize,
}

struct Chunk {
    requests: usize,
    bytes: usize,
    _leases: Leases,
}

impl Flight {
    /// A chunk of so many requests and bytes is posted; its number is what its completion names.
    pub(super) fn post(&mut self, requests: usize, bytes: usize, leases: Leases) -> u64 {
        let number = self.first + self.chunks.len() as u64;
        self.requests += requests;
        self.bytes += bytes;
        self.chunks.push_back(Some(Chunk { requests, bytes, _leases: leases }));
        number
    }

    /// The number that [`Flight::post`] gives next.
    pub(super) fn next(&self) -> u64 {
        self.first + self.chunks.len() as u64
    }

    /// A chunk completed; `false` if there is none of this number under way.
    pub(super) fn complete(&mut self, number: u64) -> bool {
        let at = number.checked_sub(self.first).and_then(|at| usize::try_from(at).ok());
        let chunk = at.and_then(|at| self.chunks.get_mut(at)).and_then(Option::take);
        while let Some(None) = self.chunks.front() {
            self.chunks.pop_front();
            self.first += 1;
        }
        if let Some(chunk) = &chunk {
            self.requests -= chunk.requests;
            self.bytes -= chunk.bytes;
        }
        chunk.is_some()
    }

    /// Requests under way.
    pub(super) fn requests(&self) -> usize {
        self.requests
    }

    /// Bytes under way.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use proptest::prelude::*;

    use super::*;

    /// Counts the leases that have ended.
    struct Counted(Arc<AtomicUsize>);

    impl Drop for Counted {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn leases(count: usize) -> (Leases, Arc<AtomicUsize>) {
        let ended = Arc::<AtomicUsize>::default();
        let lease = |_| Box::new(Counted(Arc::clone(&ended))) as Lease;
        (Some(Arc::new((0..count).map(lease).collect())), ended)
    }

    #[test]
    fn leases_end_with_the_last_of_their_chunks() {
        let mut flight = Flight::default();
        let (both, ended) = leases(3);
        let first = flight.post(2, 200, both.clone());
        let plain = flight.post(1, 10, None);
        let last = flight.post(3, 3, both);
        assert_eq!((flight.requests(), flight.next()), (6, 3));
        assert_eq!(flight.bytes(), 213);
        assert!(flight.complete(last));
        assert_eq!((flight.requests(), ended.load(Ordering::Relaxed)), (3, 0));
        assert!(!flight.complete(last), "it completed already");
        assert!(flight.complete(plain) && !flight.complete(77));
        assert_eq!(ended.load(Ordering::Relaxed), 0);
        assert!(flight.complete(first));
        assert_eq!((flight.requests(), ended.load(Ordering::Relaxed)), (0, 3));
        assert_eq!(flight.bytes(), 0);
        assert_eq!((flight.requests(), flight.bytes()), (0, 0));
        assert_eq!(flight.post(1, 10, None), 3);
    }

    /// A connection that failed: nothing completes any more.
    #[test]
    fn what_never_completes_ends_with_the_flight() {
        let mut flight = Flight::default();
        let (some, ended) = leases(2);
        flight.post(1, 10, some);
        assert!(!flight.complete(1) && ended.load(Ordering::Relaxed) == 0);
        drop(flight);
        assert_eq!(ended.load(Ordering::Relaxed), 2);
    }

    proptest! {
        /// Frames of several chunks each, which complete in any order.
        #[test]
        fn a_lease_ends_exactly_when_all_of_its_chunks_have_completed(
            frames in prop::collection::vec((1usize..4, 1usize..9), 1..20),
            picks in prop::collection::vec(any::<prop::sample::Index>(), 0..80),
        ) {
            let mut flight = Flight::default();
            let mut open: Vec<(u64, usize)> = vec![];
            let mut counts = vec![];
            let mut requests = 0;
            for (frame, (chunks, each)) in frames.iter().enumerate() {
                let (some, ended) = leases(1);
                for _ in 0..*chunks {
                    open.push((flight.post(*each, 10, some.clone()), frame));
                    requests += each;
                }
                counts.push(ended);
            }
            for pick in picks {
                if open.is_empty() {
                    break;
                }
                let (number, frame) = open.swap_remove(pick.index(open.len()));
                prop_assert!(flight.complete(number) && !flight.complete(number));
                requests -= frames[frame].1;
                prop_assert_eq!(flight.requests(), requests);
                let still: HashSet<usize> = open.iter().map(|(_, frame)| *frame).collect();
                for (frame, ended) in counts.iter().enumerate() {
                    let expected = usize::from(!still.contains(&frame));
                    prop_assert_eq!(ended.load(Ordering::Relaxed), expected);
                }
            }
        }
    }
}
