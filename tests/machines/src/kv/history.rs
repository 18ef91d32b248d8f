//! The operations of all clients, their invocations and returns in one order.
//!
//! What enters: a number taken before a request is sent, and one taken after its answer was read.
//! What always holds: if an operation returned before another was invoked, its number says so. So
//! the order of the numbers is a real-time order, whatever the clocks do.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Hands out the places in the order of events.
#[derive(Debug, Default)]
pub struct Sequence(AtomicU64);

impl Sequence {
    pub fn next(&self) -> u64 {
        self.0.fetch_add(1, Ordering::SeqCst)
    }

    #[must_use]
    pub fn current(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

/// What a client asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Get,
    /// The value is unique in its history, and never zero.
    Put(u64),
}

/// Where and when an event was.
#[derive(Clone, Copy, Debug)]
pub struct Event {
    pub sequence: u64,
    pub at: Instant,
}

impl Event {
    /// An event now.
    pub fn now(sequence: &Sequence) -> Self {
        Self { sequence: sequence.next(), at: Instant::now() }
    }
}

/// One operation as its client saw it.
#[derive(Clone, Copy, Debug)]
pub struct Operation {
    pub client: u32,
    pub id: u64,
    pub key: u32,
    pub kind: Kind,
    pub invoked: Event,
    /// None: the outcome is unknown. A write may have been done, at any time from then on.
    pub returned: Option<Returned>,
}

/// The answer of the server.
#[derive(Clone, Copy, Debug)]
pub struct Returned {
    pub event: Event,
    /// What was read, or the value written.
    pub value: u64,
}

impl Operation {
    /// Where the return is in the order; after everything where there is none.
    #[must_use]
    pub fn returned_at(&self) -> u64 {
        self.returned.map_or(u64::MAX, |returned| returned.event.sequence)
    }
}

impl std::fmt::Display for Operation {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "  client {:>3}, {:>8} ..", self.client, self.invoked.sequence)?;
        match self.returned {
            Some(returned) => write!(formatter, " {:<8}", returned.event.sequence)?,
            None => write!(formatter, " {:<8}", "?")?,
        }
        match (self.kind, self.returned) {
            (Kind::Put(value), _) => write!(formatter, " put {value:#018x}"),
            (Kind::Get, Some(returned)) => write!(formatter, " got {:#018x}", returned.value),
            (Kind::Get, None) => write!(formatter, " get"),
        }
    }
}
