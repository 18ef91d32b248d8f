//! One claim on the arbiter's record, from the wish to the verdict.
//!
//! ```text
//!            swap done: won, or our own record stands
//!  Swapping ------------------------------------------> owned
//!    |  ^  \--- another record stands -----------------> lost
//!    |  |
//!    |  | read done: the expected generation stands
//!    v  |
//!  Waiting --(timer)--> Reading --- our record stands --> owned
//!    ^                    |  \----- another ------------> lost
//!    +---- failed --------+
//! ```
//!
//! Always holds: a failed call says nothing about its outcome, so it is followed by a read, and no
//! verdict is given without an answer.

use crate::ids::Generation;
use crate::ownership::{Outcome, Record};

/// First wait after a failed call, in milliseconds; doubles up to the last.
const RETRY_MS_FIRST: u64 = 100;
const RETRY_MS_LAST: u64 = 5000;

/// What the arbiter or the clock says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    Swapped(Outcome),
    Read(Option<Record>),
    /// The call failed; whether it took effect is unknown.
    Failed,
    /// The wait is over.
    Timer,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    Read,
    Swap { expected: Generation, next: Record },
    Wait { ms: u64 },
    Decide(Verdict),
}

/// How a claim ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The record is ours, with this generation.
    Owned(Generation),
    /// This record stands instead; `None` if the arbiter has none at all.
    Lost(Option<Record>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Swapping,
    Waiting,
    Reading,
    Decided,
}

/// A claim under way.
#[derive(Clone, Debug)]
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

    /// The next action; `None` for an event that means nothing now.
    pub fn step(&mut self, event: Event) -> Option<Action> {
        match (self.state, event) {
            (State::Swapping, Event::Swapped(Outcome::Won)) => Some(self.owned()),
            (State::Swapping, Event::Swapped(Outcome::Lost(standing))) => {
                Some(self.judge(standing))
            }
            (State::Reading, Event::Read(standing)) => Some(self.judge(standing)),
            (State::Swapping | State::Reading, Event::Failed) => {
                self.state = State::Waiting;
                let ms = self.retry_ms;
                self.retry_ms = (ms * 2).min(RETRY_MS_LAST);
                Some(Action::Wait { ms })
            }
            (State::Waiting, Event::Timer) => {
                self.state = State::Reading;
                Some(Action::Read)
            }
            _ => None,
        }
    }

    fn owned(&mut self) -> Action {
        self.state = State::Decided;
        Action::Decide(Verdict::Owned(self.next.generation))
    }

    fn judge(&mut self, standing: Option<Record>) -> Action {
        match standing {
            Some(record) if record == self.next => self.owned(),
            Some(record) if record.generation == self.expected => {
                self.state = State::Swapping;
                Action::Swap { expected: self.expected, next: self.next }
            }
            None if self.expected == Generation(0) => {
                self.state = State::Swapping;
                Action::Swap { expected: self.expected, next: self.next }
            }
            other => {
                self.state = State::Decided;
                Action::Decide(Verdict::Lost(other))
            }
        }
    }
}

#[cfg(test)]
#[path = "ownership_tests.rs"]
mod tests;
