//! How bytes from many places become WRITEs that lie side by side in the peer's ring: pure.
//!
//! ```text
//!   parts    | header | page 7 | page 8 | page 3 | lengths, deltas | page 4 ...
//!   segments | ring   | memory 7, 8     | memory 3 | ring          | memory 4 ...
//!   writes   |<------- at most so many segments ------>|<---- the next ...
//! ```
//!
//! Enters: the parts of a frame, the place in the ring, what there is room for. Leaves: one chunk, which
//! may end anywhere in a part; what is left goes in the next. Always holds: the segments of a chunk are
//! its bytes in their order; no WRITE wraps around the ring's end or has more segments than the device
//! takes; pages share a segment only where they lie side by side for the device.

use std::ops::Range;

use crate::ids::{PAGE_SIZE, PageIndex};
use crate::transport::Part;

/// Where a segment's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In this side's ring, at the place where they arrive in the peer's.
    Ring { at: usize },
    /// In guest memory, from this byte of this page on.
    Memory { page: PageIndex, offset: usize },
}

/// A piece of a WRITE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) place: Place,
    pub(super) len: usize,
}

/// One WRITE.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct WriteTo {
    /// In the peer's ring.
    pub(super) at: usize,
    /// Of the chunk's segments.
    pub(super) segments: Range<usize>,
}

/// What one chunk may have.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// 1 at least.
    pub(super) bytes: usize,
    /// 1 at least.
    pub(super) writes: usize,
    /// Of a WRITE, 1 at least.
    pub(super) segments: usize,
    /// Bytes of the ring.
    pub(super) ring: usize,
}

/// What is written together, and announced by its last WRITE.
#[derive(Debug, Default)]
pub(super) struct Chunk<'a> {
    pub(super) writes: Vec<WriteTo>,
    pub(super) segments: Vec<Segment>,
    /// What is to be copied into this side's ring first, and where to.
    pub(super) copies: Vec<(usize, &'a [u8])>,
    pub(super) len: usize,
}

/// The parts that are not in a chunk yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rest<'a, 'b> {
    parts: &'b [Part<'a>],
    /// Bytes of the first that are.
    skip: usize,
}

impl<'a, 'b> Rest<'a, 'b> {
    pub(super) fn new(parts: &'b [Part<'a>]) -> Self {
        let mut rest = Self { parts, skip: 0 };
        rest.advance(0);
        rest
    }

    pub(super) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    fn advance(&mut self, bytes: usize) {
        self.skip += bytes;
        while let Some((first, rest)) = self.parts.split_first()
            && self.skip >= first.bytes.len()
        {
            self.skip -= first.bytes.len();
            self.parts = rest;
        }
    }

    /// Takes the next chunk, which begins `at` this byte of the ring. `follows` says whether the page
    /// after one lies behind it for the device, too.
    pub(super) fn chunk(
        &mut self,
        mut at: usize,
        limits: &Limits,
        follows: impl Fn(PageIndex) -> bool,
    ) -> Chunk<'a> {
        let mut chunk = Chunk::default();
        let mut begins_write = true;
        while let Some(part) = self.parts.first()
            && chunk.len < limits.bytes
        {
            let bytes = &part.bytes[self.skip..];
            let len = bytes.len().min(limits.bytes - chunk.len).min(limits.ring - at);
            let place = match part.page {
                Some(page) => Place::Memory { page, offset: self.skip },
                None => Place::Ring { at },
            };
            let segment = Segment { place, len };
            if !chunk.add(segment, at, begins_write, limits, &follows) {
                break;
            }
            if part.page.is_none() {
                chunk.copies.push((at, &bytes[..len]));
            }
            chunk.len += len;
            self.advance(len);
            at += len;
            begins_write = at == limits.ring;
            if begins_write {
                at = 0;
            }
        }
        chunk
    }
}

impl Chunk<'_> {
    /// Whether some of it is read in guest memory.
    pub(super) fn reads_memory(&self) -> bool {
        self.segments.iter().any(|segment| matches!(segment.place, Place::Memory { .. }))
    }

    /// Adds a segment; `false` if there is no room for it.
    fn add(
        &mut self,
        segment: Segment,
        at: usize,
        begins_write: bool,
        limits: &Limits,
        follows: impl Fn(PageIndex) -> bool,
    ) -> bool {
        if let Some(write) = self.writes.last_mut().filter(|_| !begins_write) {
            if let Some(last) = self.segments.last_mut()
                && last.goes_on(&segment, follows)
            {
                last.len += segment.len;
                return true;
            }
            if write.segments.len() < limits.segments {
                self.segments.push(segment);
                write.segments.end += 1;
                return true;
            }
        }
        if self.writes.len() == limits.writes {
            return false;
        }
        let first = self.segments.len();
        self.segments.push(segment);
        self.writes.push(WriteTo { at, segments: first..first + 1 });
        true
    }
}

impl Segment {
    /// Whether `next` lies behind it.
    fn goes_on(&self, next: &Self, follows: impl Fn(PageIndex) -> bool) -> bool {
        match (self.place, next.place) {
            (Place::Ring { at }, Place::Ring { at: next }) => at + self.len == next,
            (Place::Memory { page, offset }, Place::Memory { page: next, offset: from }) => {
                let end = offset + self.len;
                let at = PageIndex(page.0 + (end / PAGE_SIZE) as u64);
                let is_next = at == next && end % PAGE_SIZE == from;
                // A page that is begun goes on; a new one is where the device has it.
                is_next && (from > 0 || next.0.checked_sub(1).map(PageIndex).is_some_and(follows))
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RING: usize = 10 * PAGE_SIZE;
    /// Pages from this one on lie elsewhere for the device.
    const BORDER: u64 = 4;

    fn follows(page: PageIndex) -> bool {
        page.0 + 1 != BORDER
    }

    fn page(number: u64) -> Vec<u8> {
        let number = usize::try_from(number).unwrap();
        (0..PAGE_SIZE).map(|at| u8::try_from((at + 31 * number) % 251).unwrap()).collect()
    }

    fn limits(bytes: usize, writes: usize, segments: usize) -> Limits {
        Limits { bytes, writes, segments, ring: RING }
    }

    #[test]
    fn pages_side_by_side_are_one_segment() {
        let pages: Vec<_> = (0..6).map(page).collect();
        let lent = |number: u64| Part {
            bytes: &pages[usize::try_from(number).unwrap()],
            page: Some(PageIndex(number)),
        };
        let parts = [Part::from(&b"head"[..]), lent(1), lent(2), lent(3), lent(4), lent(2)];
        let mut rest = Rest::new(&parts);
        let chunk = rest.chunk(0, &limits(RING, 9, 16), follows);
        assert!(rest.is_empty() && chunk.reads_memory());
        let at = |page: u64| Place::Memory { page: PageIndex(page), offset: 0 };
        let found: Vec<_> = chunk.segments.iter().map(|found| (found.place, found.len)).collect();
        let expected = [
            (Place::Ring { at: 0 }, 4),
            (at(1), 3 * PAGE_SIZE),
            (at(4), PAGE_SIZE),
            (at(2), PAGE_SIZE),
        ];
        assert_eq!(found, expected);
        assert_eq!(chunk.writes, [WriteTo { at: 0, segments: 0..4 }]);
        assert_eq!(chunk.copies, [(0, &b"head"[..])]);
    }

    /// A device that takes one segment, and a queue that holds few requests.
    #[test]
    fn each_segment_may_be_a_write_of_its_own() {
        let pages: Vec<_> = (0..4).map(page).collect();
        let numbers = [0, 2, 1, 3];
        let parts: Vec<_> = numbers
            .iter()
            .map(|at| Part { bytes: &pages[*at][..], page: Some(PageIndex(*at as u64)) })
            .collect();
        let mut rest = Rest::new(&parts);
        let chunk = rest.chunk(0, &limits(RING, 3, 1), follows);
        let places: Vec<_> = chunk.writes.iter().map(|write| write.at).collect();
        assert_eq!(places, [0, PAGE_SIZE, 2 * PAGE_SIZE]);
        assert_eq!(chunk.len, 3 * PAGE_SIZE);
        let chunk = rest.chunk(3 * PAGE_SIZE, &limits(RING, 3, 1), follows);
        assert_eq!((chunk.writes.len(), chunk.len), (1, PAGE_SIZE));
        assert!(rest.is_empty());
    }

    fn any_part() -> impl Strategy<Value = (Option<u64>, usize)> {
        prop_oneof![
            (0u64..8).prop_map(|page| (Some(page), PAGE_SIZE)),
            (0usize..9000).prop_map(|len| (None, len))
        ]
    }

    proptest! {
        /// What a device would write, whatever the limits are: the bytes in their order, in the ring.
        #[test]
        fn a_device_writes_what_was_given(
            parts in prop::collection::vec(any_part(), 1..40),
            start in 0usize..RING,
            bytes in 1usize..RING,
            writes in 1usize..6,
            segments in 1usize..6,
        ) {
            let memory: Vec<_> = (0..8).map(page).collect();
            let plain: Vec<u8> = (0..9000).map(|at| u8::try_from(at % 241).unwrap()).collect();
            let parts: Vec<_> = parts
                .iter()
                .map(|(page, len)| match page {
                    Some(page) => Part {
                        bytes: &memory[usize::try_from(*page).unwrap()][..],
                        page: Some(PageIndex(*page)),
                    },
                    None => Part::from(&plain[..*len]),
                })
                .collect();
            let expected = parts.iter().flat_map(|part| part.bytes).copied().collect::<Vec<u8>>();
            let mut rest = Rest::new(&parts);
            let (mut at, mut found) = (start, vec![]);
            let limits = limits(bytes, writes, segments);
            while !rest.is_empty() {
                let chunk = rest.chunk(at, &limits, follows);
                prop_assert!(chunk.len > 0 && chunk.len <= bytes, "it goes on");
                prop_assert!(chunk.writes.len() <= writes);
                let (mut local, mut remote) = (vec![0; RING], vec![0; RING]);
                for (at, bytes) in &chunk.copies {
                    local[*at..at + bytes.len()].copy_from_slice(bytes);
                }
                let mut expected_at = at;
                for write in &chunk.writes {
                    prop_assert!(!write.segments.is_empty() && write.segments.len() <= segments);
                    prop_assert_eq!(write.at, expected_at);
                    let mut to = write.at;
                    for Segment { place, len } in &chunk.segments[write.segments.clone()] {
                        let into = &mut remote[to..to + len];
                        match *place {
                            Place::Ring { at } => into.copy_from_slice(&local[at..at + len]),
                            Place::Memory { page, offset } => {
                                let first = page.0 * PAGE_SIZE as u64 + offset as u64;
                                let border = BORDER * PAGE_SIZE as u64;
                                let end = first + *len as u64;
                                prop_assert!(first >= border || end <= border, "over a border");
                                let bytes = memory.concat();
                                let first = usize::try_from(first).unwrap();
                                into.copy_from_slice(&bytes[first..first + len]);
                            }
                        }
                        to += len;
                    }
                    expected_at = to % RING;
                }
                for offset in 0..chunk.len {
                    found.push(remote[(at + offset) % RING]);
                }
                at = (at + chunk.len) % RING;
                prop_assert_eq!(at, expected_at);
            }
            prop_assert_eq!(found, expected);
        }
    }
}
