//! A page as what changed in it: ranges with their new bytes.
//!
//! ```text
//! delta:   | range ... |                          at most 2048 bytes, no range: nothing changed
//! range:   | skip | len | len new bytes |         `skip` bytes after the end of the range before
//! number:  | 0vvvvvvv |                           0 to 127
//!          | 1vvvvvvv | 0vvvvvvv |                128 to 16383, low bits first
//! ```
//!
//! Enters: the page as the peer has it, and as it is; or bytes of a peer. Leaves: a delta; or its
//! ranges. Always holds: ranges ascend, have a byte between them and end within the page. That two
//! overlap or come out of order cannot be written down.
//!
//! New bytes and no XOR: a range has as many of either, but new bytes are applied without reading
//! the page, and applying them twice is applying them once.

use super::malformed;
use crate::capture::cow::Page;
use crate::ids::PAGE_SIZE;
use crate::wire::WireError;

/// Most bytes of a delta. Of half a page on, a delta costs the backup more (a copy from staging for
/// each range) and saves little on the wire.
pub const DELTA_BYTES_MAX: usize = PAGE_SIZE / 2;
/// Equal bytes between two changes that go along: a range of its own costs two bytes, and its own
/// step when it is applied.
const BRIDGE_BYTES: usize = 4;
const NUMBER_BYTES_MAX: usize = 2;
/// Bytes that are compared at a time.
const CHUNK_BYTES: usize = 64;
const WORD_BYTES: usize = size_of::<u64>();
const CHUNK_WORDS: usize = CHUNK_BYTES / WORD_BYTES;

/// Appends what makes `new` of `old` to `out`, and makes `old` equal to `new`. `false`, with
/// nothing appended, if that is longer than [`DELTA_BYTES_MAX`].
pub fn diff(old: &mut Page, new: &Page, out: &mut Vec<u8>) -> bool {
    let from = out.len();
    out.reserve(DELTA_BYTES_MAX + 2 * NUMBER_BYTES_MAX);
    let mut ranges = Ranges { old, new, out, limit: from + DELTA_BYTES_MAX, at: 0, open: None };
    let fits = ranges.compare();
    if !fits {
        old.copy_from_slice(new);
        out.truncate(from);
    }
    fits
}

/// A delta that is being made.
struct Ranges<'a> {
    old: &'a mut Page,
    new: &'a Page,
    out: &'a mut Vec<u8>,
    /// Where `out` may end.
    limit: usize,
    /// End of the last range that was written.
    at: usize,
    /// The range that may still grow.
    open: Option<(usize, usize)>,
}

impl Ranges<'_> {
    fn compare(&mut self) -> bool {
        let new = self.new;
        for (chunk, now) in new.as_chunks::<CHUNK_BYTES>().0.iter().enumerate() {
            let from = chunk * CHUNK_BYTES;
            let before = &self.old.as_chunks::<CHUNK_BYTES>().0[chunk];
            let differs = differences(before, now);
            if differs.iter().fold(0, |any, word| any | word) == 0 {
                continue;
            }
            for (word, differs) in differs.into_iter().enumerate() {
                if differs != 0 && !self.change(from + word * WORD_BYTES, differs) {
                    return false;
                }
            }
        }
        self.close()
    }

    /// The bytes of the word at `word` that are set in `differs` have changed.
    fn change(&mut self, word: usize, differs: u64) -> bool {
        let first = word + differs.trailing_zeros() as usize / 8;
        let end = word + WORD_BYTES - differs.leading_zeros() as usize / 8;
        if let Some((from, open)) = &mut self.open
            && first - *open <= BRIDGE_BYTES
        {
            *open = end;
            // Given up as soon as it is too long.
            return self.out.len() + (end - *from) <= self.limit;
        }
        let fits = self.close();
        self.open = Some((first, end));
        fits
    }

    /// Writes the open range.
    fn close(&mut self) -> bool {
        let Some((first, end)) = self.open.take() else { return true };
        let new = &self.new[first..end];
        push_number(first - self.at, self.out);
        push_number(new.len(), self.out);
        self.out.extend_from_slice(new);
        self.old[first..end].copy_from_slice(new);
        self.at = end;
        self.out.len() <= self.limit
    }
}

/// The bits that differ, by words.
fn differences(before: &[u8; CHUNK_BYTES], now: &[u8; CHUNK_BYTES]) -> [u64; CHUNK_WORDS] {
    let (before, now) = (before.as_chunks::<WORD_BYTES>().0, now.as_chunks::<WORD_BYTES>().0);
    std::array::from_fn(|at| u64::from_le_bytes(before[at]) ^ u64::from_le_bytes(now[at]))
}

/// Numbers of a page have 13 bits at most.
fn push_number(number: usize, out: &mut Vec<u8>) {
    let low = u8::try_from(number & 0x7F).expect("7 bits");
    match u8::try_from(number >> 7).expect("less than a page") {
        0 => out.push(low),
        high => out.extend([low | 0x80, high]),
    }
}

/// Whether `delta`, bytes of a peer, can be applied to a page.
///
/// # Errors
/// [`WireError::Malformed`] with what is wrong with it.
pub fn check(delta: &[u8]) -> Result<(), WireError> {
    if delta.len() > DELTA_BYTES_MAX {
        return malformed("a delta that is too long");
    }
    ranges(delta).try_for_each(|range| range.map(drop))
}

/// The ranges of a delta, ascending: where each begins in the page, and its new bytes, one at
/// least, all within the page. An error is the last item.
pub fn ranges(delta: &[u8]) -> impl Iterator<Item = Result<(usize, &[u8]), WireError>> {
    let (mut rest, mut end) = (delta, 0);
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let range = next(&mut rest, end);
        match &range {
            Ok((first, new)) => end = first + new.len(),
            Err(_) => rest = &[],
        }
        Some(range)
    })
}

/// Takes a range off `rest`, where the one before ended at `end`.
fn next<'a>(rest: &mut &'a [u8], end: usize) -> Result<(usize, &'a [u8]), WireError> {
    let skip = take_number(rest)?;
    let len = take_number(rest)?;
    if len == 0 {
        return malformed("a delta with a range of no bytes");
    }
    if skip == 0 && end > 0 {
        return malformed("a delta with two ranges for one");
    }
    let first = end + skip;
    if first + len > PAGE_SIZE {
        return malformed("a delta that ends outside of its page");
    }
    let Some((new, after)) = rest.split_at_checked(len) else {
        return malformed("a delta without the bytes of a range");
    };
    *rest = after;
    Ok((first, new))
}

fn take_number(rest: &mut &[u8]) -> Result<usize, WireError> {
    let (number, after) = match **rest {
        [low @ 0..0x80, ..] => (usize::from(low), 1),
        [low, high @ 1..0x80, ..] => (usize::from(low & 0x7F) | usize::from(high) << 7, 2),
        [_, _, ..] => return malformed("a delta with a number of another length"),
        _ => return malformed("a delta that ends within a number"),
    };
    *rest = &rest[after..];
    Ok(number)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn apply(page: &mut Page, delta: &[u8]) {
        for range in ranges(delta) {
            let (first, new) = range.unwrap();
            page[first..first + new.len()].copy_from_slice(new);
        }
    }

    fn refused(delta: &[u8]) -> &'static str {
        match check(delta) {
            Err(WireError::Malformed { what, .. }) => what,
            other => panic!("{other:?}"),
        }
    }

    proptest! {
        #[test]
        fn what_was_compared_is_what_is_made(
            seed in any::<u8>(),
            changes in prop::collection::vec((0..PAGE_SIZE, 1usize..40, any::<u8>()), 0..120),
        ) {
            let old: Page = std::array::from_fn(|at| seed.wrapping_mul(at.to_le_bytes()[0] | 1));
            let mut new = old;
            for (at, len, value) in changes {
                new[at..PAGE_SIZE.min(at + len)].fill(value);
            }
            let (mut known, mut out) = (old, vec![1, 2, 3]);
            let fits = diff(&mut known, &new, &mut out);
            prop_assert!(known == new, "the page that is remembered");
            prop_assert_eq!(&out[..3], [1, 2, 3]);
            prop_assert_eq!(fits || out.len() == 3, true);
            if fits {
                check(&out[3..]).unwrap();
                let mut made = old;
                apply(&mut made, &out[3..]);
                apply(&mut made, &out[3..]);
                prop_assert!(made == new);
            }
        }

        #[test]
        fn random_bytes_never_panic(delta in prop::collection::vec(any::<u8>(), 0..600)) {
            let mut last = 0;
            for (first, new) in ranges(&delta).map_while(Result::ok) {
                prop_assert!(first >= last && !new.is_empty());
                last = first + new.len();
                prop_assert!(last <= PAGE_SIZE);
            }
            prop_assert_eq!(check(&delta).is_ok(), ranges(&delta).all(|range| range.is_ok()));
        }
    }

    #[test]
    fn a_page_that_did_not_change_takes_nothing() {
        let mut old = [7; PAGE_SIZE];
        let mut out = vec![];
        assert!(diff(&mut old, &[7; PAGE_SIZE], &mut out) && out.is_empty());
        check(&out).unwrap();
    }

    /// The promise of the bench row, in its worst form: no two of the 64 bytes lie together.
    #[test]
    fn sixty_four_changed_bytes_take_a_tenth_of_a_page() {
        let old = [7; PAGE_SIZE];
        let mut new = old;
        new.iter_mut().step_by(64).for_each(|byte| *byte = 8);
        let mut out = vec![];
        assert!(diff(&mut old.clone(), &new, &mut out));
        assert_eq!(out.len(), 64 * 3);
    }

    #[test]
    fn small_gaps_are_bridged_and_larger_ones_are_not() {
        let old = [0; PAGE_SIZE];
        for (gap, bytes) in [(4, 2 + 6), (5, 3 + 3)] {
            let mut new = old;
            (new[100], new[100 + gap + 1]) = (1, 1);
            let mut out = vec![];
            assert!(diff(&mut old.clone(), &new, &mut out));
            assert_eq!(out.len(), bytes, "{out:?}");
        }
    }

    #[test]
    fn a_delta_of_half_a_page_is_the_last() {
        // A range of 2043 bytes has two numbers of two bytes but for its place.
        for (changed, fits) in [(2045, true), (2046, false)] {
            let (mut old, mut new) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
            new[..changed].fill(1);
            let mut out = vec![];
            assert_eq!(diff(&mut old, &new, &mut out), fits);
            assert_eq!(out.len(), if fits { DELTA_BYTES_MAX } else { 0 });
        }
    }

    #[test]
    fn each_fault_has_its_name() {
        let outside = "a delta that ends outside of its page";
        assert_eq!(refused(&[0xFF, 0x7F, 1, 9]), outside);
        // The last byte, and one past it.
        check(&[0xFF, 0x1F, 1, 9]).unwrap();
        assert_eq!(refused(&[0xFF, 0x1F, 2, 9, 9]), outside);
        assert_eq!(refused(&[0x80, 0x20, 1, 9]), outside);
        assert_eq!(refused(&[1, 1, 9, 0xFF, 0x1F, 1, 9]), outside);
        assert_eq!(refused(&[1, 0]), "a delta with a range of no bytes");
        assert_eq!(refused(&[0, 1, 9, 0, 1, 9]), "a delta with two ranges for one");
        assert_eq!(refused(&[1, 3, 9, 9]), "a delta without the bytes of a range");
        assert_eq!(refused(&[0x81, 0x80, 1]), "a delta with a number of another length");
        assert_eq!(refused(&[0x81, 0, 1, 9]), "a delta with a number of another length");
        for cut in [&[0x81][..], &[1], &[1, 0x81], &[1, 1, 9, 4]] {
            assert_eq!(refused(cut), "a delta that ends within a number", "{cut:?}");
        }
        let mut long = vec![0, 0x80 | 0x7F, 0x0F];
        long.resize(3 + 2047, 9);
        assert_eq!(refused(&long), "a delta that is too long");
    }
}
