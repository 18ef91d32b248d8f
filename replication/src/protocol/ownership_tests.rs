use uuid::Uuid;

use super::*;
use crate::ownership::{HostId, Standing, VmId};

fn record(generation: u64, owner: u128) -> Record {
    let standing = Standing::Solo { owner: HostId(Uuid::from_u128(owner)) };
    Record { generation: Generation(generation), vm: VmId(Uuid::from_u128(1)), standing }
}

#[test]
fn an_unknown_outcome_is_read_again_before_anything_is_decided() {
    let ours = record(2, 5);
    let (mut claim, first) = Claim::new(Generation(1), ours);
    let swap = Action::Swap { expected: Generation(1), next: ours };
    assert_eq!(first, swap);
    assert_eq!(claim.step(Event::Failed), Some(Action::Wait { ms: 100 }));
    assert_eq!(claim.step(Event::Swapped(Outcome::Won)), None);
    assert_eq!(claim.step(Event::Timer), Some(Action::Read));
    assert_eq!(claim.step(Event::Failed), Some(Action::Wait { ms: 200 }));
    assert_eq!(claim.step(Event::Timer), Some(Action::Read));
    // It had not taken effect: try again. Then it had.
    let mut again = claim.clone();
    assert_eq!(again.step(Event::Read(Some(record(1, 9)))), Some(swap));
    let owned = Action::Decide(Verdict::Owned(Generation(2)));
    assert_eq!(claim.step(Event::Read(Some(ours))), Some(owned));
}

#[test]
fn another_record_is_a_loss() {
    let other = record(2, 6);
    let (mut claim, _) = Claim::new(Generation(1), record(2, 5));
    let lost = Action::Decide(Verdict::Lost(Some(other)));
    assert_eq!(claim.step(Event::Swapped(Outcome::Lost(Some(other)))), Some(lost));
    assert_eq!(claim.step(Event::Timer), None);
}
