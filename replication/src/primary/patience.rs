//! How long a backup is waited for that lives: a pure rule over times that the engine gives.
//!
//! ```text
//!   taken or acknowledged    what only this side can see: all is well
//!   it says that it goes on  counts up with its heartbeats: it is slow, an image or a flush of one is
//!   neither                  STALL_TIMEOUTS, and it is given up
//! ```
//!
//! Always holds: a backup's word alone keeps it for a time that depends on what it has to do and not on
//! how often it says so.

use std::time::{Duration, Instant};

/// Peer timeouts without any progress after which a living backup is given up.
const STALL_TIMEOUTS: u32 = 4;
/// Peer timeouts for which its word counts, whatever it has to do: a flush of an image may wait for
/// much that was written before.
pub(super) const WORD_TIMEOUTS: u32 = 30;
/// The least that an image takes in a second; its word counts for so much longer.
const RATE_BYTES_S_MIN: u64 = 1 << 20;
/// Most seconds for bytes: what a guest discards or zeroes is large and soon done.
const BYTES_S_MAX: u64 = 3600;

/// Why a backup is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Waits,
    /// It does nothing, and says so.
    Stalled,
    /// It says that it goes on, and nothing comes of it.
    OnlyWords,
}

/// When something last went on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    timeout: Duration,
    /// What this side saw, and what the backup said.
    seen: u64,
    said: u64,
    seen_at: Instant,
    moved_at: Instant,
    /// Bytes that the backup has to do before it acknowledges.
    bytes: u64,
}

impl Patience {
    pub(super) fn new(timeout: Duration, now: Instant) -> Self {
        Self { timeout, seen: 0, said: 0, seen_at: now, moved_at: now, bytes: 0 }
    }

    /// The backup owes nothing.
    pub(super) fn nothing_due(&mut self, now: Instant) {
        (self.seen_at, self.moved_at) = (now, now);
    }

    /// `seen` changes with whatever is taken or acknowledged, `said` with what the backup says; up to
    /// `bytes` are to be done before it acknowledges.
    pub(super) fn look(&mut self, now: Instant, seen: u64, said: u64, bytes: u64) {
        if seen != self.seen {
            self.seen_at = now;
        }
        if seen != self.seen || said != self.said {
            self.moved_at = now;
        }
        (self.seen, self.said, self.bytes) = (seen, said, bytes);
    }

    /// How long its word counts.
    pub(super) fn word(&self) -> Duration {
        let seconds = (self.bytes / RATE_BYTES_S_MIN).min(BYTES_S_MAX);
        self.timeout * WORD_TIMEOUTS + Duration::from_secs(seconds)
    }

    /// When it is over unless something goes on.
    pub(super) fn deadline(&self) -> Instant {
        (self.moved_at + self.timeout * STALL_TIMEOUTS).min(self.seen_at + self.word())
    }

    pub(super) fn verdict(&self, now: Instant) -> Verdict {
        if now > self.moved_at + self.timeout * STALL_TIMEOUTS {
            Verdict::Stalled
        } else if now > self.seen_at + self.word() {
            Verdict::OnlyWords
        } else {
            Verdict::Waits
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);
    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn silence_is_four_timeouts() {
        let start = Instant::now();
        let mut patience = Patience::new(S, start);
        patience.look(start + S, 1, 0, 0);
        assert_eq!(patience.deadline(), start + 5 * S);
        assert_eq!(patience.verdict(start + 5 * S), Verdict::Waits);
        assert_eq!(patience.verdict(start + 5 * S + MS), Verdict::Stalled);
        patience.nothing_due(start + 60 * S);
        assert_eq!(patience.verdict(start + 64 * S), Verdict::Waits);
    }

    #[test]
    fn words_count_for_as_long_as_there_is_to_do() {
        for (bytes, limit_s) in [(0, 30), (100 << 20, 130), (u64::MAX, 3630)] {
            let start = Instant::now();
            let mut patience = Patience::new(S, start);
            let mut now = start;
            let mut said = 0;
            while patience.verdict(now) == Verdict::Waits {
                said += 1;
                patience.look(now, 0, said, bytes);
                now += S;
                assert!(now < start + 4000 * S, "never given up");
            }
            assert_eq!(patience.verdict(now), Verdict::OnlyWords);
            assert_eq!(now.duration_since(start).as_secs(), limit_s + 1);
        }
    }

    #[test]
    fn deeds_begin_it_anew() {
        let start = Instant::now();
        let mut patience = Patience::new(S, start);
        for turn in 1..1000 {
            patience.look(start + turn * S, u64::from(turn / 20), u64::from(turn), 0);
            assert_eq!(patience.verdict(start + turn * S), Verdict::Waits);
        }
        // An engine that looks late sees what happened meanwhile first.
        patience.look(start + 2000 * S, 7777, 7777, 0);
        assert_eq!(patience.verdict(start + 2000 * S), Verdict::Waits);
    }
}
