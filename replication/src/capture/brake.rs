//! Slows a guest that writes faster than a copy of its memory gets on: a pure rule over counts and
//! times that the engine gives.
//!
//! In each pass after the first the guest may write half as many pages as the pass has sent so far,
//! and a few more to begin with. So a pass leaves half of what the one before did, and what is left in
//! the end fits an epoch, however fast the guest writes; one that writes slower than half the link's
//! rate never stands. It stands in small turns: it is looked at whenever it may have written a few
//! pages more, by the rate at which it wrote while it ran.

use std::time::Duration;

/// Between two looks at a guest that runs.
const LOOK_MIN: Duration = Duration::from_millis(1);
const LOOK_MAX: Duration = Duration::from_millis(25);
/// Between two looks at what was sent, while the guest stands.
const STANDS: Duration = Duration::from_millis(1);
/// Of the rest that a copy may leave: what the guest may write at once.
const FREE_PARTS: u64 = 4;
const GRAIN_PARTS: u64 = 16;

/// The rule for one pass, and how fast the guest writes.
#[derive(Clone, Debug)]
pub struct Brake {
    free: u64,
    grain: u64,
    look: Duration,
    /// Pages that were written when the guest was looked at last.
    seen: u64,
    stands: bool,
}

impl Brake {
    /// For a copy that may leave `rest` pages.
    #[must_use]
    pub fn new(rest: u64) -> Self {
        Self {
            free: rest / FREE_PARTS,
            grain: (rest / GRAIN_PARTS).max(1),
            look: LOOK_MIN,
            seen: 0,
            stands: false,
        }
    }

    /// Until when not to look again.
    #[must_use]
    pub fn look(&self) -> Duration {
        if self.stands { STANDS } else { self.look }
    }

    /// Whether the guest is to stand from here on, now that the pass has sent `sent` pages and the guest
    /// wrote `written` in it. It `ran` since the last look, if it did.
    pub fn is_held(&mut self, sent: u64, written: u64, ran: Option<Duration>) -> bool {
        if let Some(ran) = ran {
            let more = written.saturating_sub(self.seen).max(1);
            let micros = u64::try_from(ran.as_micros()).unwrap_or(u64::MAX);
            let next = Duration::from_micros(micros.saturating_mul(self.grain) / more);
            self.look = next.clamp(LOOK_MIN, LOOK_MAX);
            self.seen = written;
        }
        self.stands = written > self.free + sent / 2;
        self.stands
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// Passes over a memory of `pages` by a link of `link` pages a millisecond, beside a guest that
    /// writes `rate` others in each in which it runs. What each pass left, how long the guest stood at
    /// a stretch at most, and its share of the time.
    fn passes(pages: u64, link: u64, rate: u64, rest: u64) -> (Vec<u64>, u32, f64) {
        let (mut left, mut set, mut longest, mut ran_ms, mut all_ms) = (vec![], pages, 0, 0, 0);
        while set > rest && left.len() < 16 {
            let (mut brake, mut written, mut sent, mut held) = (Brake::new(rest), 0, 0, false);
            let (mut since, mut stood) = (Duration::ZERO, 0);
            while sent < set {
                sent += link;
                all_ms += 1;
                if held {
                    stood += 1;
                    longest = longest.max(stood);
                } else {
                    (written, ran_ms, stood) = (written + rate, ran_ms + 1, 0);
                }
                since += MS;
                if since >= brake.look() {
                    held = brake.is_held(sent, written.min(pages), (!held).then_some(since));
                    since = Duration::ZERO;
                }
            }
            set = written.min(pages);
            left.push(set);
        }
        (left, longest, f64::from(ran_ms) / f64::from(all_ms.max(1)))
    }

    #[test]
    fn a_guest_that_writes_faster_than_the_link_is_caught_up_with() {
        for rate in [15, 50, 200, 1000] {
            let (left, longest, _) = passes(1 << 20, 12, rate, 1024);
            // Or as many as it writes between two looks.
            let small = 1024.max(2 * rate);
            assert!(left.last().is_some_and(|last| *last <= small), "{rate}: {left:?}");
            // Half as fast as the link, in turns of a look: not one long stand.
            let look = u32::try_from(rate.max(64) / 6).unwrap() + 25;
            assert!(longest <= look, "{rate} pages a ms: stood for {longest} ms");
        }
    }

    #[test]
    fn a_guest_that_is_slower_never_stands() {
        for rate in [0, 1, 5] {
            let (left, longest, share) = passes(1 << 18, 12, rate, 1024);
            assert_eq!((longest, share), (0, 1.0), "{rate} pages a ms: {left:?}");
        }
    }

    #[test]
    fn a_guest_that_stood_is_not_looked_at_more_often_for_it() {
        let mut brake = Brake::new(1600);
        assert!(!brake.is_held(0, 100, Some(MS)));
        assert_eq!(brake.look(), MS);
        // 10 pages a millisecond: ten of them for a grain of a hundred.
        assert!(!brake.is_held(0, 200, Some(10 * MS)));
        assert_eq!(brake.look(), 10 * MS);
        assert!(brake.is_held(0, 500, Some(30 * MS)) && brake.look() == STANDS);
        assert!(brake.is_held(100, 500, None));
        assert!(!brake.is_held(300, 500, None));
        assert_eq!(brake.look(), 10 * MS);
    }
}
