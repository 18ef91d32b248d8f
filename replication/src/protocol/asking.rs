//! One asker of the arbiter: which claim is the present one, and what its answers lead to.
//!
//! Enters: claims, and what the arbiter answered to a call. Leaves: calls, waits, verdicts. Always
//! holds: an answer to a call of a claim that was forgotten changes nothing.

use crate::ids::Generation;
use crate::ownership::Record;
use crate::protocol::ownership::{Action, Claim, Event, Verdict};

/// What the engine has to do after a step of the claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Make this call for the claim of this number; its answer goes to [`Asking::answered`].
    Call(u64, Action),
    /// Call [`Asking::timer`] after this long.
    Wait {
        ms: u64,
    },
    Decided(Verdict),
    /// What [`Asking::read`] found.
    Record(Option<Record>),
    ReadFailed,
    Nothing,
}

/// The present claim, or the read, if there is one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Asking {
    claim: Option<Claim>,
    number: u64,
}

impl Asking {
    /// The claim under way.
    #[must_use]
    pub fn claim(&self) -> Option<&Claim> {
        self.claim.as_ref()
    }

    /// Begins a claim; an older one is forgotten.
    pub fn begin(&mut self, claim: Claim, first: Action) -> Next {
        self.number += 1;
        self.claim = Some(claim);
        self.carry_out(first)
    }

    /// Asks for the record; a claim under way is forgotten.
    pub fn read(&mut self) -> Next {
        self.number += 1;
        self.claim = None;
        self.carry_out(Action::Read { expected: Generation(0) })
    }

    /// Goes on after the answer to a call of the claim `number`.
    pub fn answered(&mut self, number: u64, event: Event) -> Next {
        if number != self.number {
            return Next::Nothing;
        }
        if self.claim.is_some() {
            return self.step(event);
        }
        match event {
            Event::Read(record) => Next::Record(record),
            Event::Failed => Next::ReadFailed,
            Event::Swapped(_) | Event::Timer => Next::Nothing,
        }
    }

    /// Goes on after a wait.
    pub fn timer(&mut self) -> Next {
        self.step(Event::Timer)
    }

    fn step(&mut self, event: Event) -> Next {
        match self.claim.as_mut().and_then(|claim| claim.step(event)) {
            Some(action) => self.carry_out(action),
            None => Next::Nothing,
        }
    }

    fn carry_out(&mut self, action: Action) -> Next {
        match action {
            Action::Wait { ms } => Next::Wait { ms },
            Action::Decide(verdict) => {
                self.claim = None;
                Next::Decided(verdict)
            }
            Action::Read { .. } | Action::Swap { .. } => Next::Call(self.number, action),
        }
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::ownership::{HostId, Outcome, Standing, VmId};

    fn claim(expected: u64) -> (Claim, Action) {
        let standing = Standing::Solo { owner: HostId(Uuid::from_u128(5)) };
        let vm = VmId(Uuid::from_u128(1));
        let next = Record { generation: Generation(expected + 1), vm, standing };
        Claim::new(Generation(expected), next)
    }

    #[test]
    fn an_answer_to_a_forgotten_call_changes_nothing() {
        let won = || Event::Swapped(Outcome::Won);
        let mut asking = Asking::default();
        let (first, swap) = claim(1);
        let Next::Call(old, _) = asking.begin(first, swap) else { panic!() };
        let Next::Call(read, Action::Read { .. }) = asking.read() else { panic!() };
        assert_eq!(asking.answered(old, won()), Next::Nothing);
        assert_eq!(asking.timer(), Next::Nothing, "its wait means nothing either");
        assert_eq!(asking.answered(read, Event::Read(None)), Next::Record(None));
        let (second, swap) = claim(2);
        let Next::Call(new, _) = asking.begin(second, swap) else { panic!() };
        assert_eq!(asking.answered(old, won()), Next::Nothing);
        let owned = Next::Decided(Verdict::Owned(Generation(3)));
        assert_eq!(asking.answered(new, won()), owned);
        assert_eq!(asking.answered(new, won()), Next::Nothing, "a verdict is given once");
    }
}
