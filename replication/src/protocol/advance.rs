//! How a copy goes on that may go straight into the backup's memory, while both sides still register theirs.
//!
//! ```text
//!   pages   0 ...                                        ... all
//!   here    ═══════════════════════╗                            registered on this side
//!   there   ═══════════════╗                                    open on the backup
//!   sent    ═══════╗                                            in passes that have completed
//!                  |───────|                                    next
//!
//!   Wait ──both have more──> Straight ──completed──> Wait ... Straight, the last ──> whole passes
//!    │  └─one has no more, nothing was sent──> Rings
//!    └────one has no more, something was sent──> Close ──closed──> Rings
//! ```
//!
//! Enters: how far each side is, and whether it comes further. Leaves: what is next. Always holds: what is sent straight
//! is registered on both sides; each page is in one of these parts at most, so it is the first time that it is sent;
//! nothing goes through the rings into a memory that was written straight before that is closed.

/// How far a side is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Side {
    /// From the first page on, without a gap.
    pub pages: u64,
    /// No more will come.
    pub is_over: bool,
}

/// What a copy does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    Wait,
    /// The pages of this range go straight.
    Straight {
        first: u64,
        pages: u64,
    },
    /// All goes through the rings: nothing went straight.
    Rings,
    /// The window is closed, and then the rest goes through the rings.
    Close,
}

/// What is next for a memory of `all` pages, of which `sent` went straight.
///
/// # Panics
/// If more was sent than there is.
#[must_use]
pub fn next(here: Side, there: Side, sent: u64, all: u64) -> Next {
    let ready = here.pages.min(there.pages).min(all);
    assert!(sent <= ready, "sent before it was registered");
    let comes_short = |side: Side| side.is_over && side.pages < all;
    match (comes_short(here) || comes_short(there), sent) {
        // Not what is ready, too: it would only be longer until the copy is another.
        (true, 0) => Next::Rings,
        (true, _) => Next::Close,
        (false, _) if ready > sent => Next::Straight { first: sent, pages: ready - sent },
        (false, _) => Next::Wait,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_goes_as_far_as_both_sides_are() {
        let side = |pages| Side { pages, is_over: pages == 10 };
        let straight = |first, pages| Next::Straight { first, pages };
        for (here, there, sent, expected) in [
            (0, 0, 0, Next::Wait),
            (10, 0, 0, Next::Wait),
            (0, 10, 0, Next::Wait),
            (3, 5, 0, straight(0, 3)),
            (10, 5, 3, straight(3, 2)),
            (5, 10, 5, Next::Wait),
            (10, 10, 5, straight(5, 5)),
        ] {
            assert_eq!(next(side(here), side(there), sent, 10), expected, "{here} {there} {sent}");
        }
    }

    #[test]
    fn a_side_that_comes_short_ends_it() {
        let (short, all) = (Side { pages: 7, is_over: true }, Side { pages: 10, is_over: true });
        let (nothing, coming) = (Side { pages: 0, ..short }, Side { pages: 8, is_over: false });
        for other in [short, all, coming] {
            for (here, there) in [(short, other), (other, short)] {
                assert_eq!(next(here, there, 0, 10), Next::Rings);
                assert_eq!(next(here, there, 5, 10), Next::Close);
                assert_eq!(next(here, there, 7, 10), Next::Close);
            }
            assert_eq!(next(nothing, other, 0, 10), Next::Rings);
            assert_eq!(next(other, nothing, 0, 10), Next::Rings);
        }
    }
}
