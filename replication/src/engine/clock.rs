//! The time that engines go by: the host's, unless a simulator says otherwise to its own thread.

use std::time::{Duration, Instant};

/// Now.
pub(crate) fn now() -> Instant {
    #[cfg(any(test, feature = "testing"))]
    if let Some(now) = simulated::now() {
        return now;
    }
    Instant::now()
}

/// How long ago `then` was.
pub(crate) fn since(then: Instant) -> Duration {
    now().saturating_duration_since(then)
}

/// Time that goes on when a simulator says so.
#[cfg(any(test, feature = "testing"))]
pub(crate) mod simulated {
    use std::cell::Cell;
    use std::time::{Duration, Instant};

    thread_local! {
        /// Its first moment, which is any, and how long ago that is.
        static NOW: Cell<Option<(Instant, Duration)>> = const { Cell::new(None) };
    }

    pub(super) fn now() -> Option<Instant> {
        NOW.get().map(|(start, since)| start + since)
    }

    /// Whether this thread's time is a simulator's.
    pub(crate) fn is_set() -> bool {
        NOW.get().is_some()
    }

    /// So much time has gone by since the first moment of this thread's simulated time.
    pub(crate) fn set(since: Duration) {
        let start = NOW.get().map_or_else(Instant::now, |(start, _)| start);
        NOW.set(Some((start, since)));
    }

    /// How long after the first moment `then` is.
    pub(crate) fn until(then: Instant) -> Duration {
        NOW.get().map_or(Duration::ZERO, |(start, _)| then.saturating_duration_since(start))
    }
}
