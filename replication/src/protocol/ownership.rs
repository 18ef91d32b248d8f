//! One claim on the arbiter's record, from the wish to the verdict.
//!
//! ```text
//!            swap done: won, or our own record stands
//!  Swapping ------------------------------------------> owned
//!    |  ^  \--- a later record stands -----------------> lost
//!    |  |
//!    |  | read done: the expected generation stands, or our own record
//!    v  |
//!  Waiting --(timer)--> Reading --- another later record --> lost
//!    ^                    |
//!    +-- failed, older ---+
//! ```
//!
//! Always holds: a failed call says nothing about its outcome, so it is followed by a read, and no
//! verdict is given without an answer. Generations never go back: no record where one stood, or an
//! older one, is storage that vanished or a stale listing, so it is no answer either. A read says
//! nothing about durability, so our own record is swapped once more before it counts.

use crate::ids::Generation;
use crate::ownership::{Outcome, Record};

/// First wait after a failed call, in milliseconds; doubles up to the last.
const RETRY_MS_FIRST: u64 = 100;
const RETRY_MS_LAST: u64 = 5000;

/// What the arbiter or the clock says.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    Swapped(Outcome),
    Read(Option<Record>),
    /// The call failed; whether it took effect is unknown.
    Failed,
    /// The wait is over.
    Timer,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Read the record; one older than `expected`, or none, is a failure.
    Read {
        expected: Generation,
    },
    Swap {
        expected: Generation,
        next: Record,
    },
    Wait {
        ms: u64,
    },
    Decide(Verdict),
}

/// How a claim ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// The record is ours, with this generation.
    Owned(Generation),
    /// This record stands instead.
    Lost(Record),
}

/// Where a claim stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// A swap was asked for.
    Swapping,
    /// A call failed: after a while the record is read.
    Waiting,
    /// A read was asked for.
    Reading,
    /// The verdict was given.
    Decided,
}

/// A claim under way.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Claim {
    expected: Generation,
    next: Record,
    state: State,
    retry_ms: u64,
}

impl Claim {
    /// Begins a claim that puts `next` in place of generation `expected`.
    #[must_use]
    pub fn new(expected: Generation, next: Record) -> (Self, Action) {
        let claim = Self { expected, next, state: State::Swapping, retry_ms: RETRY_MS_FIRST };
        (claim, Action::Swap { expected, next })
    }

    #[must_use]
    pub fn state(&self) -> State {
        self.state
    }

    /// The next action; `None` for an event that means nothing now.
    pub fn step(&mut self, event: Event) -> Option<Action> {
        match (self.state, event) {
            (State::Swapping, Event::Swapped(Outcome::Won)) => Some(self.owned()),
            (State::Swapping, Event::Swapped(Outcome::Lost(standing))) => {
                Some(self.refused(standing))
            }
            (State::Reading, Event::Read(standing)) => Some(self.found(standing)),
            (State::Swapping | State::Reading, Event::Failed) => Some(self.wait()),
            (State::Waiting, Event::Timer) => {
                self.go(State::Reading);
                Some(Action::Read { expected: self.expected })
            }
            _ => None,
        }
    }

    fn wait(&mut self) -> Action {
        self.go(State::Waiting);
        let ms = self.retry_ms;
        self.retry_ms = (ms * 2).min(RETRY_MS_LAST);
        Action::Wait { ms }
    }

    fn swap(&mut self) -> Action {
        self.go(State::Swapping);
        Action::Swap { expected: self.expected, next: self.next }
    }

    fn owned(&mut self) -> Action {
        self.go(State::Decided);
        Action::Decide(Verdict::Owned(self.next.generation))
    }

    /// A swap that did not take place says what stands.
    fn refused(&mut self, standing: Option<Record>) -> Action {
        match standing {
            Some(record) if record == self.next => self.owned(),
            Some(record) if self.is_later(&record) => self.lost(record),
            // No reason to refuse the swap: whoever says so looked at something stale.
            _ => self.wait(),
        }
    }

    fn found(&mut self, standing: Option<Record>) -> Action {
        let generation = standing.map_or(Generation(0), |record| record.generation);
        match standing {
            Some(record) if record != self.next && self.is_later(&record) => self.lost(record),
            Some(record) if self.is_of_another(&record) => self.wait(),
            _ if generation < self.expected => self.wait(),
            _ => self.swap(),
        }
    }

    /// Whether it stands in place of the record that was expected.
    fn is_later(&self, record: &Record) -> bool {
        record.generation > self.expected && !self.is_of_another(record)
    }

    /// Whether the record that is expected cannot have been where this one is: that says of another VM what
    /// became of it, and of this one nothing. Where none is expected the place is taken.
    fn is_of_another(&self, record: &Record) -> bool {
        record.vm != self.next.vm && self.expected > Generation(0)
    }

    fn lost(&mut self, record: Record) -> Action {
        self.go(State::Decided);
        Action::Decide(Verdict::Lost(record))
    }

    fn go(&mut self, next: State) {
        assert!(is_transition_valid(self.state, next), "{:?} to {next:?}", self.state);
        self.state = next;
    }
}

/// The arrows of the diagram.
#[must_use]
pub fn is_transition_valid(from: State, to: State) -> bool {
    use State::{Decided, Reading, Swapping, Waiting};
    match from {
        Swapping => matches!(to, Waiting | Decided),
        Waiting => matches!(to, Reading),
        Reading => matches!(to, Swapping | Waiting | Decided),
        Decided => false,
    }
}

#[cfg(test)]
#[path = "ownership_tests.rs"]
mod tests;
