//! The arbiter: one record, changed by compare-and-swap, as `replication::ownership::Arbiter` says.
//!
//! What it can do to an asker: answer late, not at all, or with a record that has gone (a listing of
//! a shared directory may be old); carry out a swap and lose the answer; carry out a swap long
//! after the asker was told that its call failed. What it cannot do: forget a record, or let two
//! swaps of one generation win.

use replication::ids::Generation;
use replication::ownership::{Outcome, Record};
use replication::protocol::ownership::{Action, Event};

/// All records that ever stood, the present one last.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Arbiter {
    history: Vec<Record>,
}

/// How a call goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fate {
    Well,
    /// It takes effect, and the answer is lost.
    AnswerLost,
    /// It never arrives.
    CallLost,
    /// The asker hears of a failure, and the call arrives later.
    Late,
    /// What is read is what stood when there were so many records.
    Stale(usize),
}

impl Arbiter {
    #[must_use]
    pub fn standing(&self) -> Option<Record> {
        self.history.last().copied()
    }

    #[must_use]
    pub fn history(&self) -> &[Record] {
        &self.history
    }

    #[must_use]
    pub fn generation(&self) -> Generation {
        self.standing().map_or(Generation(0), |record| record.generation)
    }

    /// Carries out a call; the answer, if the asker gets one.
    pub fn call(&mut self, action: &Action, fate: Fate) -> Event {
        let well = match fate {
            Fate::CallLost | Fate::Late => return Event::Failed,
            Fate::Well | Fate::AnswerLost => self.carry_out(action, self.history.len()),
            Fate::Stale(records) => self.carry_out(action, records.min(self.history.len())),
        };
        if fate == Fate::AnswerLost { Event::Failed } else { well }
    }

    /// `seen`: how many of the records the first look at them shows.
    fn carry_out(&mut self, action: &Action, seen: usize) -> Event {
        let found = self.history[..seen].last().copied();
        let generation = found.map_or(Generation(0), |record| record.generation);
        match *action {
            Action::Read { expected } if generation < expected => Event::Failed,
            Action::Read { .. } => Event::Read(found),
            Action::Swap { expected, .. } if generation < expected => Event::Failed,
            Action::Swap { next, .. } if found == Some(next) => Event::Swapped(Outcome::Won),
            Action::Swap { expected, .. } if generation > expected => {
                Event::Swapped(Outcome::Lost(found))
            }
            Action::Swap { next, .. } => self.link(next),
            Action::Wait { .. } | Action::Decide(_) => Event::Failed,
        }
    }

    /// What a swap does in the end: no look at what stood before matters to it.
    fn link(&mut self, next: Record) -> Event {
        let first = self.history.iter().find(|record| record.generation == next.generation);
        match first.copied() {
            None => {
                self.history.push(next);
                Event::Swapped(Outcome::Won)
            }
            Some(standing) if standing == next => Event::Swapped(Outcome::Won),
            standing => Event::Swapped(Outcome::Lost(standing)),
        }
    }
}
