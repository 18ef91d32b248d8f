use uuid::Uuid;

use super::*;
use crate::ownership::{HostId, Record, Standing, VmId};

const G1: Generation = Generation(1);

fn verified(epoch: u64) -> Event {
    Event::Verified { epoch: EpochId(epoch), generation: G1, handover: Handover::No }
}

fn replica(arbiter: bool) -> Backup {
    let mut backup = Backup::new(arbiter);
    assert_eq!(backup.step(Event::Accepted), []);
    assert_eq!(backup.step(Event::Paired(G1)), []);
    let epoch = EpochId(1);
    let acked = [Action::Ack { epoch, generation: G1 }, Action::Apply(epoch)];
    assert_eq!(backup.step(verified(1)), acked);
    backup
}

#[test]
fn nothing_is_acknowledged_after_a_claim() {
    let mut backup = replica(true);
    let claim = backup.step(Event::Lost("cut".into()));
    assert_eq!(claim.last(), Some(&Action::Claim { expected: G1 }));
    assert_eq!(backup.step(verified(2)), []);
    let owned = Verdict::Owned(Generation(2));
    assert_eq!(backup.step(Event::Verdict(owned)), [Action::Close, Action::Start]);
    assert_eq!(backup.step(verified(2)), []);
    assert_eq!(backup.committed(), Some(EpochId(1)));
}

#[test]
fn a_lost_claim_discards_and_listens() {
    let mut backup = replica(true);
    backup.step(Event::Lost("cut".into()));
    let vm = VmId(Uuid::from_u128(8));
    let standing = Standing::Solo { owner: HostId(Uuid::from_u128(7)) };
    let theirs = Verdict::Lost(Record { generation: Generation(2), vm, standing });
    let lost = backup.step(Event::Verdict(theirs));
    let report = Action::Report(Report::Lost(theirs));
    let keep = Action::Keep { generation: G1, committed: EpochId(1) };
    assert_eq!(lost, [Action::Close, keep, report]);
    assert_eq!(backup.state(), State::Idle);
    // Nothing of it can be started, and what comes next begins from nothing as far as this can tell.
    let asked = backup.step(Event::FailoverAsked { force: true });
    assert!(matches!(asked[..], [Action::Refuse(_)]));
    assert_eq!(backup.step(Event::Accepted), []);
    assert_eq!(backup.step(Event::Lost("cut".into()))[2], Action::Discard);
}

#[test]
fn an_orphan_whose_primary_is_back_is_kept_for_its_memory_only() {
    let mut backup = replica(false);
    backup.step(Event::Lost("cut".into()));
    let keep = Action::Keep { generation: G1, committed: EpochId(1) };
    assert_eq!(backup.step(Event::Accepted), [keep]);
    assert_eq!(backup.committed(), None);
    let forced = backup.step(Event::FailoverAsked { force: true });
    assert!(matches!(forced[..], [Action::Refuse(_)]));
}

#[test]
fn without_an_arbiter_nothing_starts_by_itself() {
    let mut backup = replica(false);
    let lost = backup.step(Event::Lost("cut".into()));
    assert!(!lost.contains(&Action::Start));
    let asked = backup.step(Event::FailoverAsked { force: false });
    assert!(matches!(asked[..], [Action::Refuse(_)]));
    let forced = backup.step(Event::FailoverAsked { force: true });
    assert_eq!(forced, [Action::Report(Report::FailoverStarted), Action::Start]);
}

#[test]
fn an_epoch_out_of_turn_or_of_another_generation_is_bad() {
    let foreign = Event::Verified { epoch: EpochId(2), generation: Generation(9), handover: Handover::No };
    for event in [verified(1), verified(3), foreign] {
        let mut backup = replica(true);
        let actions = backup.step(event);
        assert!(matches!(actions[0], Action::TellAbort(_)), "{actions:?}");
        assert_eq!(actions.last(), Some(&Action::Claim { expected: G1 }));
    }
}

#[test]
fn a_loss_before_the_first_commit_leaves_nothing() {
    let mut backup = Backup::new(true);
    backup.step(Event::Accepted);
    backup.step(Event::Paired(G1));
    let lost = backup.step(Event::Lost("cut".into()));
    let report = Action::Report(Report::SessionFailed("cut".into()));
    assert_eq!(lost, [Action::Close, Action::DropStaging, Action::Discard, report]);
}

#[test]
fn after_a_copy_anew_has_begun_there_is_nothing_to_start_from() {
    let mut backup = replica(true);
    let told = backup.step(Event::ResyncTold);
    assert_eq!(told, [Action::DropStaging, Action::TellResyncReady]);
    let lost = backup.step(Event::Lost("cut".into()));
    assert!(lost.contains(&Action::Discard) && !lost.contains(&Action::Start));
}

#[test]
fn the_last_generation_is_refused() {
    let mut backup = Backup::new(false);
    backup.step(Event::Accepted);
    let actions = backup.step(Event::Paired(Generation(u64::MAX)));
    let Action::TellAbort(reason) = &actions[0] else { panic!("{actions:?}") };
    assert!(reason.contains("last generation"), "{reason}");
    assert_eq!(backup.state(), State::Idle);
}

#[test]
fn a_refusal_names_the_state() {
    let states = [
        (Backup::new(true), "Disconnected"),
        (replica(false), "Protected"),
        (
            {
                let mut backup = Backup::new(true);
                backup.step(Event::Accepted);
                backup
            },
            "Syncing",
        ),
        (
            {
                let mut backup = replica(true);
                backup.step(Event::Lost("cut".into()));
                backup
            },
            "TakingOver",
        ),
        (
            {
                let mut backup = replica(false);
                backup.step(Event::Lost("cut".into()));
                backup
            },
            "Suspended",
        ),
        (
            {
                let mut backup = replica(true);
                backup.step(Event::StopAsked);
                backup
            },
            "Stopped",
        ),
    ];
    for (mut backup, name) in states {
        let refused = backup.step(Event::FailoverAsked { force: false });
        let [Action::Refuse(reason)] = &refused[..] else { panic!("{name}: {refused:?}") };
        assert!(reason.contains(name), "{name}: {reason}");
    }
}
