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
    let foreign =
        Event::Verified { epoch: EpochId(2), generation: Generation(9), handover: Handover::No };
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

const G2: Generation = Generation(2);

fn last(handover: Handover) -> Event {
    Event::Verified { epoch: EpochId(2), generation: G1, handover }
}

#[test]
fn a_pair_is_reversed_in_one_claim_and_its_output_is_held() {
    let mut backup = replica(true);
    let taken = backup.step(last(Handover::Reverse));
    assert_eq!(taken.last(), Some(&Action::ClaimReversed { expected: G1 }));
    assert_eq!(backup.step(verified(3)), []);
    assert_eq!(backup.step(Event::Verdict(Verdict::Owned(G2))), [Action::StartHeld]);
    let told = Action::TellHandedOver { generation: G2, reversed: true };
    let finished = Action::Report(Report::FailoverFinished);
    assert_eq!(backup.step(Event::Started), [told, Action::Close, finished]);
    // Without an arbiter there is no record to reverse.
    let mut backup = replica(false);
    assert_eq!(backup.step(last(Handover::Reverse)).last(), Some(&Action::Start));
    let told = Action::TellHandedOver { generation: G2, reversed: false };
    assert_eq!(backup.step(Event::Started)[0], told);
}

fn heir() -> Backup {
    Backup::heir(G2, EpochId(7))
}

fn next(epoch: u64) -> Event {
    Event::Verified { epoch: EpochId(epoch), generation: G2, handover: Handover::No }
}

#[test]
fn an_heir_that_is_lost_from_sight_claims_before_it_starts() {
    // Nobody called; or somebody did, the pair was seen, and nothing was committed.
    for called in [false, true] {
        let mut heir = heir();
        if called {
            assert_eq!(heir.step(Event::Accepted), []);
            assert_eq!(heir.step(Event::Paired(G2)), []);
        }
        assert_eq!(heir.committed(), Some(EpochId(7)));
        let claims = heir.step(Event::Lost("silent".into()));
        assert_eq!(claims.last(), Some(&Action::Claim { expected: G2 }));
        assert!(!claims.contains(&Action::Start));
        assert_eq!(heir.step(next(8)), []);
        let owned = heir.step(Event::Verdict(Verdict::Owned(Generation(3))));
        assert_eq!(owned, [Action::Close, Action::Start]);
    }
}

#[test]
fn an_heir_acknowledges_the_next_epoch_of_its_pair_and_only_once_that_was_seen() {
    let mut early = heir();
    early.step(Event::Accepted);
    let bad = early.step(next(8));
    assert!(matches!(bad[0], Action::TellAbort(_)), "{bad:?}");
    let mut heir = heir();
    heir.step(Event::Accepted);
    heir.step(Event::Paired(G2));
    let (epoch, generation) = (EpochId(8), G2);
    assert_eq!(heir.step(next(8)), [Action::Ack { epoch, generation }, Action::Apply(epoch)]);
    assert_eq!(heir.state(), State::Replica);
    for wrong in [Event::Paired(Generation(3)), Event::Paired(G1)] {
        let mut heir = self::heir();
        heir.step(Event::Accepted);
        assert!(matches!(heir.step(wrong)[0], Action::TellAbort(_)));
        assert_eq!(heir.state(), State::Heir);
    }
}

#[test]
fn an_heir_whose_session_ends_before_the_pair_was_seen_waits_for_the_next_one() {
    for ends in [Event::Lost("closed".into()), Event::Bad("an old record".into())] {
        let mut heir = heir();
        heir.step(Event::Accepted);
        let ended = heir.step(ends);
        assert!(ended.ends_with(&[Action::Close, Action::DropStaging]), "{ended:?}");
        assert_eq!((heir.state(), heir.committed()), (State::Heir, Some(EpochId(7))));
        // It is called again, and all goes on.
        let mut again = heir.clone();
        again.step(Event::Accepted);
        assert_eq!(again.step(Event::Paired(G2)), []);
        let (epoch, generation) = (EpochId(8), G2);
        assert_eq!(again.step(next(8)), [Action::Ack { epoch, generation }, Action::Apply(epoch)]);
        // Or it is not.
        let claims = heir.step(Event::Lost("nobody called".into()));
        assert_eq!(claims.last(), Some(&Action::Claim { expected: G2 }));
    }
}

#[test]
fn an_heir_whose_claim_is_lost_keeps_its_memory_for_a_copy() {
    let mut heir = heir();
    heir.step(Event::Lost("silent".into()));
    let vm = VmId(Uuid::from_u128(8));
    let standing = Standing::Solo { owner: HostId(Uuid::from_u128(7)) };
    let theirs = Verdict::Lost(Record { generation: Generation(3), vm, standing });
    let keep = Action::Keep { generation: G2, committed: EpochId(7) };
    assert_eq!(heir.step(Event::Verdict(theirs))[1], keep);
    assert_eq!(heir.state(), State::Idle);
}

#[test]
fn a_host_that_could_not_run_the_vm_refuses_it_and_stays_its_backup() {
    let unready = || Event::Unready("no tap".into());
    let refused = [
        Action::TellRefused("no tap".into()),
        Action::DropStaging,
        Action::Report(Report::FailoverFailed("no tap".into())),
    ];
    for arbiter in [true, false] {
        let mut backup = replica(arbiter);
        assert_eq!(backup.step(unready()), refused);
        assert_eq!((backup.state(), backup.committed()), (State::Replica, Some(EpochId(1))));
        // The primary that is lost meanwhile is taken over from, if anybody can say so.
        let lost = backup.step(Event::Lost("cut".into()));
        assert_eq!(lost.contains(&Action::Claim { expected: G1 }), arbiter);
    }
    // Of a pair that is not told yet nothing is believed.
    let mut early = heir();
    early.step(Event::Accepted);
    assert_eq!(early.step(unready())[0], Action::TellAbort("no tap".into()));
    let mut told = heir();
    told.step(Event::Accepted);
    told.step(Event::Paired(told.generation()));
    assert_eq!(told.step(unready()), refused);
    assert_eq!(told.state(), State::Heir);
}

#[test]
fn a_pair_that_is_not_in_the_record_leaves_nothing_to_claim_by() {
    let mut backup = Backup::new(true);
    backup.step(Event::Accepted);
    let refused = backup.step(Event::Unpaired("nothing".into()));
    let report = Action::Report(Report::SessionFailed("nothing".into()));
    let tell = Action::TellRefused("nothing".into());
    assert_eq!(refused, [tell, Action::Close, Action::DropStaging, Action::Discard, report]);
    assert_eq!(backup.state(), State::Idle);
    // An heir has something, and it is a pair that does stand.
    let mut heir = heir();
    heir.step(Event::Accepted);
    assert_eq!(heir.step(Event::Unpaired("old".into()))[0], Action::TellAbort("old".into()));
    assert_eq!(heir.state(), State::Heir);
}
