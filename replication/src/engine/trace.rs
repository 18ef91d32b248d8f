//! Which transitions the machines make, for a simulator that counts them.

use std::cell::RefCell;

use crate::protocol::asking::{Asking, Next};
use crate::protocol::ownership::{self as claim, Claim};
use crate::protocol::{backup, primary};

/// A machine went from a state to another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    Primary(primary::State, primary::State),
    Backup(backup::State, backup::State),
    Claim(claim::State, claim::State),
}

thread_local! {
    static STEPS: RefCell<Vec<Step>> = const { RefCell::new(vec![]) };
}

/// Only where a simulator takes them away.
fn note(step: Step) {
    if super::clock::simulated::is_set() {
        STEPS.with_borrow_mut(|steps| steps.push(step));
    }
}

/// All that were made by this thread since it was asked last.
pub fn take() -> Vec<Step> {
    STEPS.take()
}

pub(crate) fn primary(before: primary::State, after: primary::State) {
    if before != after {
        note(Step::Primary(before, after));
    }
}

/// An event may make two transitions: the first epoch may be the last one of a switch-over.
pub(crate) fn backup(before: backup::State, after: backup::State) {
    use backup::State::Replica;
    if before == after {
    } else if backup::is_transition_valid(before, after) {
        note(Step::Backup(before, after));
    } else {
        note(Step::Backup(before, Replica));
        note(Step::Backup(Replica, after));
    }
}

pub(crate) fn claim(before: Option<claim::State>, asking: &Asking, next: &Next) {
    let after = match next {
        Next::Decided(_) => Some(claim::State::Decided),
        _ => asking.claim().map(Claim::state),
    };
    if let (Some(before), Some(after)) = (before, after)
        && before != after
        && claim::is_transition_valid(before, after)
    {
        note(Step::Claim(before, after));
    }
}
