//! What the clients felt of a round.

use std::time::{Duration, Instant};

use super::history::{Kind, Operation};

/// How long clients waited for their answers, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Latency {
    pub p50_us: u64,
    pub p99_us: u64,
}

/// When what happened to the pair.
#[derive(Clone, Copy, Debug)]
pub struct Moments {
    /// The end of the time without protection, where there was one.
    pub bare_until: Option<Instant>,
    /// From when on the VM was protected.
    pub protected_from: Instant,
    pub blow: Instant,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Operations that were answered, and how many of them were writes.
    pub answered: usize,
    pub writes: usize,
    /// The longest that any client waited for an answer, microseconds.
    pub silence_us: u64,
    /// Of operations that lie between protection and the blow.
    pub protected: Latency,
    /// Of operations that lie before the protection was begun.
    pub bare: Option<Latency>,
}

impl Figures {
    #[must_use]
    pub fn of(operations: &[Operation], moments: Moments) -> Self {
        let mut figures = Self::default();
        let (mut protected, mut bare) = (Vec::new(), Vec::new());
        for operation in operations {
            let Some(returned) = operation.returned else { continue };
            let (from, to) = (operation.invoked.at, returned.event.at);
            let took_us = micros(to.duration_since(from));
            figures.answered += 1;
            figures.writes += usize::from(operation.kind != Kind::Get);
            figures.silence_us = figures.silence_us.max(took_us);
            if from >= moments.protected_from && to < moments.blow {
                protected.push(took_us);
            }
            if moments.bare_until.is_some_and(|until| to < until) {
                bare.push(took_us);
            }
        }
        figures.protected = Latency::of(protected);
        figures.bare = moments.bare_until.map(|_| Latency::of(bare));
        figures
    }
}

impl Latency {
    fn of(mut times_us: Vec<u64>) -> Self {
        times_us.sort_unstable();
        Self { p50_us: quantile(&times_us, 50), p99_us: quantile(&times_us, 99) }
    }
}

/// The nearest rank of sorted figures; zero of none.
fn quantile(sorted: &[u64], percent: usize) -> u64 {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(0)
}

pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::super::history::{Event, Returned};
    use super::*;

    #[test]
    fn latency_is_of_its_time_and_silence_of_all() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let event = |ms| Event { sequence: ms, at: at(ms) };
        let operation = |from, to| Operation {
            client: 0,
            id: from,
            key: 1,
            kind: if from % 2 == 0 { Kind::Get } else { Kind::Put(from) },
            invoked: event(from),
            returned: Some(Returned { event: event(to), value: 0 }),
        };
        let mut operations: Vec<_> = (0..100).map(|n| operation(n, 2 * n + 1)).collect();
        operations.push(operation(100, 900));
        operations.push(Operation { returned: None, ..operation(7, 8) });
        let all = Moments { bare_until: None, protected_from: start, blow: at(500) };
        let figures = Figures::of(&operations, all);
        assert_eq!((figures.answered, figures.writes), (101, 50));
        assert_eq!(figures.protected, Latency { p50_us: 50_000, p99_us: 99_000 });
        assert_eq!((figures.silence_us, figures.bare), (800_000, None));
        // Operations 0 to 9 are back before 20 ms, 50 to 99 begin at 50 ms or later.
        let halves = Moments { bare_until: Some(at(20)), protected_from: at(50), blow: at(500) };
        let figures = Figures::of(&operations, halves);
        assert_eq!(figures.bare, Some(Latency { p50_us: 5_000, p99_us: 10_000 }));
        assert_eq!(figures.protected, Latency { p50_us: 75_000, p99_us: 100_000 });
        assert_eq!(Figures::of(&[], all), Figures::default());
    }
}
