use uuid::Uuid;

use super::*;
use crate::ownership::{HostId, Standing, VmId};

fn record(generation: u64, owner: u128) -> Record {
    let standing = Standing::Solo { owner: HostId(Uuid::from_u128(owner)) };
    Record { generation: Generation(generation), vm: VmId(Uuid::from_u128(1)), standing }
}

const READ: Action = Action::Read { expected: Generation(1) };

#[test]
fn an_unknown_outcome_is_read_again_before_anything_is_decided() {
    let ours = record(2, 5);
    let (mut claim, first) = Claim::new(Generation(1), ours);
    let swap = Action::Swap { expected: Generation(1), next: ours };
    assert_eq!(first, swap);
    assert_eq!(claim.step(Event::Failed), Some(Action::Wait { ms: 100 }));
    assert_eq!(claim.step(Event::Swapped(Outcome::Won)), None);
    assert_eq!(claim.step(Event::Timer), Some(READ));
    assert_eq!(claim.step(Event::Failed), Some(Action::Wait { ms: 200 }));
    assert_eq!(claim.step(Event::Timer), Some(READ));
    // It had not taken effect: try again. Then it had.
    let mut again = claim.clone();
    assert_eq!(again.step(Event::Read(Some(record(1, 9)))), Some(swap.clone()));
    // A read does not say whether it would survive a crash: the swap does.
    assert_eq!(claim.step(Event::Read(Some(ours))), Some(swap));
    let owned = Action::Decide(Verdict::Owned(Generation(2)));
    assert_eq!(claim.step(Event::Swapped(Outcome::Won)), Some(owned));
}

#[test]
fn another_record_is_a_loss() {
    let other = record(2, 6);
    let (mut claim, _) = Claim::new(Generation(1), record(2, 5));
    let lost = Action::Decide(Verdict::Lost(other));
    assert_eq!(claim.step(Event::Swapped(Outcome::Lost(Some(other)))), Some(lost));
    assert_eq!(claim.step(Event::Timer), None);
}

#[test]
fn generations_never_go_back() {
    for stale in [None, Some(record(1, 9))] {
        let (mut claim, _) = Claim::new(Generation(2), record(3, 5));
        let refused = claim.step(Event::Swapped(Outcome::Lost(stale)));
        assert_eq!(refused, Some(Action::Wait { ms: 100 }), "{stale:?}");
        let read = Action::Read { expected: Generation(2) };
        assert_eq!(claim.step(Event::Timer), Some(read));
        assert_eq!(claim.step(Event::Read(stale)), Some(Action::Wait { ms: 200 }));
        claim.step(Event::Timer);
        let swap = Action::Swap { expected: Generation(2), next: record(3, 5) };
        assert_eq!(claim.step(Event::Read(Some(record(2, 6)))), Some(swap));
    }
}

#[test]
fn a_swap_refused_without_a_reason_waits() {
    let stale = [(1, Some(record(1, 9))), (0, None)];
    for (expected, standing) in stale {
        let (mut claim, _) = Claim::new(Generation(expected), record(expected + 1, 5));
        let refused = claim.step(Event::Swapped(Outcome::Lost(standing)));
        assert_eq!(refused, Some(Action::Wait { ms: 100 }));
    }
}

/// Other storage is mounted where this VM's record was: that says nothing of who owns it.
#[test]
fn a_record_of_another_vm_is_no_answer_where_one_of_this_vm_stood() {
    let other = Record { vm: VmId(Uuid::from_u128(2)), ..record(7, 9) };
    let (mut claim, _) = Claim::new(Generation(1), record(2, 5));
    let refused = claim.step(Event::Swapped(Outcome::Lost(Some(other))));
    assert_eq!(refused, Some(Action::Wait { ms: 100 }));
    assert_eq!(claim.step(Event::Timer), Some(READ));
    assert_eq!(claim.step(Event::Read(Some(other))), Some(Action::Wait { ms: 200 }));
    assert_eq!(claim.step(Event::Timer), Some(READ));
    let same = Record { generation: Generation(1), ..other };
    assert_eq!(claim.step(Event::Read(Some(same))), Some(Action::Wait { ms: 400 }));
    // Where none stood the place is taken.
    let (mut claim, _) = Claim::new(Generation(0), record(1, 5));
    let lost = Action::Decide(Verdict::Lost(other));
    assert_eq!(claim.step(Event::Swapped(Outcome::Lost(Some(other)))), Some(lost));
}
