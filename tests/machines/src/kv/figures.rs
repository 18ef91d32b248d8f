//! What the clients felt of a round.

use std::time::{Duration, Instant};

use super::history::{Kind, Operation};

/// Times in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Operations that were answered, and how many of them were writes.
    pub answered: usize,
    pub writes: usize,
    /// The longest that any client waited for an answer.
    pub silence_us: u64,
    /// Of the operations that were answered before the blow.
    pub p50_us: u64,
    pub p99_us: u64,
}

impl Figures {
    #[must_use]
    pub fn of(operations: &[Operation], blow: Instant) -> Self {
        let mut figures = Self::default();
        let mut before = Vec::new();
        for operation in operations {
            let Some(returned) = operation.returned else { continue };
            let took_us = micros(returned.event.at.duration_since(operation.invoked.at));
            figures.answered += 1;
            figures.writes += usize::from(operation.kind != Kind::Get);
            figures.silence_us = figures.silence_us.max(took_us);
            if returned.event.at < blow {
                before.push(took_us);
            }
        }
        before.sort_unstable();
        figures.p50_us = quantile(&before, 50);
        figures.p99_us = quantile(&before, 99);
        figures
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
    fn latency_is_of_before_and_silence_of_all() {
        let start = Instant::now();
        let event = |ms| Event { sequence: ms, at: start + Duration::from_millis(ms) };
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
        let figures = Figures::of(&operations, start + Duration::from_millis(500));
        assert_eq!((figures.answered, figures.writes), (101, 50));
        assert_eq!((figures.p50_us, figures.p99_us), (50_000, 99_000));
        assert_eq!(figures.silence_us, 800_000);
        assert_eq!(Figures::of(&[], start), Figures::default());
    }
}
