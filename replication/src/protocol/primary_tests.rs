use uuid::Uuid;

use super::*;
use crate::ownership::{HostId, HostIdentity, Record, Standing, VmId};

const G1: Generation = Generation(1);
const E1: EpochId = EpochId(1);

fn theirs() -> Verdict {
    let owner = HostId(Uuid::from_u128(7));
    let vm = VmId(Uuid::from_u128(8));
    let generation = Generation(2);
    Verdict::Lost(Record { generation, vm, standing: Standing::Solo { owner } })
}

fn ack(epoch: u64) -> Event {
    Event::Acked { epoch: EpochId(epoch), generation: G1 }
}

fn paired() -> Primary {
    let mut primary = Primary::new(true, Generation(0));
    assert_eq!(primary.step(Event::Synced), [Action::Pair { expected: Generation(0) }]);
    let begun = primary.step(Event::Verdict(Verdict::Owned(G1)));
    assert_eq!(begun, [Action::Hold, Action::TellPaired(G1), Action::BeginEpochs]);
    primary
}

fn protected() -> Primary {
    let mut primary = paired();
    assert_eq!(primary.step(Event::Sealed(E1)), []);
    let synced = Action::Report(Report::Synced);
    assert_eq!(primary.step(ack(1)), [Action::Commit(E1), Action::Regain, synced]);
    primary
}

#[test]
fn nothing_leaves_between_a_seal_and_its_ack() {
    let mut primary = protected();
    assert_eq!(primary.step(Event::Sealed(EpochId(2))), []);
    assert_eq!(primary.committed(), E1);
    assert_eq!(primary.step(ack(2)), [Action::Commit(EpochId(2))]);
}

#[test]
fn an_ack_of_what_was_not_sent_is_suspicion() {
    for event in [ack(1), ack(3), Event::Acked { epoch: EpochId(2), generation: Generation(2) }] {
        let mut primary = protected();
        primary.step(Event::Sealed(EpochId(2)));
        let actions = primary.step(event);
        let claim = [Action::EndEpochs, Action::Close, Action::Claim { expected: G1 }];
        assert_eq!(actions, claim);
    }
}

#[test]
fn epochs_in_flight_are_acknowledged_in_their_order() {
    let mut primary = protected();
    primary.step(Event::Sealed(EpochId(2)));
    primary.step(Event::Sealed(EpochId(3)));
    assert_eq!(primary.in_flight(), IN_FLIGHT_MAX);
    assert_eq!(primary.step(ack(2)), [Action::Commit(EpochId(2))]);
    primary.step(Event::Sealed(EpochId(4)));
    assert_eq!(primary.step(ack(3)), [Action::Commit(EpochId(3))]);
    assert_eq!(primary.step(ack(4)), [Action::Commit(EpochId(4))]);
    assert_eq!(primary.in_flight(), 0);
    primary.step(Event::Sealed(EpochId(5)));
    primary.step(Event::Sealed(EpochId(6)));
    for epoch in [6, 4, 7, u64::MAX] {
        let mut primary = primary.clone();
        let actions = primary.step(ack(epoch));
        assert_eq!(actions.last(), Some(&Action::Claim { expected: G1 }), "{epoch}");
        assert_eq!(primary.committed(), EpochId(4));
    }
}

#[test]
fn a_won_claim_passes_and_a_lost_one_destroys() {
    let mut primary = protected();
    primary.step(Event::PeerLost("gone".into()));
    let won = primary.step(Event::Verdict(Verdict::Owned(Generation(2))));
    let degraded = Action::Report(Report::Degraded("gone".into()));
    assert_eq!(won, [Action::Close, Action::Degrade, Action::Pass, degraded]);
    let mut primary = protected();
    primary.step(Event::PeerLost("gone".into()));
    let lost = primary.step(Event::Verdict(theirs()));
    assert_eq!(lost, [Action::Destroy, Action::Close, Action::Report(Report::Lost(theirs()))]);
}

#[test]
fn an_ack_from_before_the_suspicion_still_commits() {
    let mut primary = protected();
    primary.step(Event::Sealed(EpochId(2)));
    primary.step(Event::PeerLost("silent".into()));
    assert_eq!(primary.step(ack(2)), [Action::Commit(EpochId(2))]);
    primary.step(Event::Verdict(theirs()));
    assert_eq!(primary.step(ack(3)), []);
}

#[test]
fn a_loss_during_the_first_copy_touches_no_output() {
    let mut primary = Primary::new(true, Generation(0));
    let failed = primary.step(Event::PeerLost("cut".into()));
    assert_eq!(failed, [Action::Close, Action::Report(Report::Failed("cut".into()))]);
}

#[test]
fn a_stop_passes_only_after_the_claim() {
    let mut primary = protected();
    let claim = [Action::EndEpochs, Action::Claim { expected: G1 }];
    assert_eq!(primary.step(Event::StopAsked), claim);
    let won = primary.step(Event::Verdict(Verdict::Owned(Generation(2))));
    let report = Action::Report(Report::Stopped);
    assert_eq!(won, [Action::Pass, Action::Release, Action::TellStop, report]);
}

#[test]
fn a_switch_over_destroys_only_on_the_backup_s_word() {
    let mut primary = protected();
    let started = Action::Report(Report::FailoverStarted);
    assert_eq!(
        primary.step(Event::FailoverAsked { reversal: None }),
        [started, Action::SealHandover]
    );
    primary.step(Event::Sealed(EpochId(2)));
    assert_eq!(primary.step(ack(2)), [Action::Handed(EpochId(2))]);
    let over = primary.step(Event::HandedOver { generation: Generation(2), reversed: false });
    let report = Action::Report(Report::FailoverFinished);
    assert_eq!(over, [Action::Destroy, Action::Close, report]);
}

#[test]
fn a_late_ack_of_the_last_epoch_of_a_switch_over_lets_nothing_out_that_is_in_its_state() {
    for arbiter in [true, false] {
        let mut primary = handing_over(arbiter);
        primary.step(Event::Sealed(EpochId(2)));
        primary.step(Event::PeerLost("silent".into()));
        let late = primary.step(ack(2));
        assert_eq!(late, [Action::Handed(EpochId(2))], "in {:?}", primary.state());
    }
    // Of the epoch before it nothing is in that state: it leaves here.
    let mut primary = protected();
    primary.step(Event::Sealed(EpochId(2)));
    primary.step(Event::FailoverAsked { reversal: None });
    primary.step(Event::PeerLost("silent".into()));
    assert_eq!(primary.step(ack(2)), [Action::Commit(EpochId(2))]);
}

fn handing_over(arbiter: bool) -> Primary {
    let mut primary = Primary::new(arbiter, Generation(0));
    primary.step(Event::Synced);
    primary.step(Event::Verdict(Verdict::Owned(G1)));
    primary.step(Event::Sealed(E1));
    primary.step(ack(1));
    primary.step(Event::FailoverAsked { reversal: None });
    primary
}

#[test]
fn a_switch_over_without_arbiter_that_is_cut_is_for_a_person() {
    for reason in [Event::PeerLost("cut".into()), Event::GiveUp("cut".into())] {
        let mut primary = handing_over(false);
        primary.step(Event::Sealed(EpochId(2)));
        let cut = primary.step(reason);
        let report = Action::Report(Report::Undecided("cut".into()));
        assert_eq!(cut, [Action::EndEpochs, Action::Close, report]);
        let stop = primary.step(Event::StopAsked);
        assert_eq!(
            stop,
            [Action::Close, Action::Pass, Action::Release, Action::Report(Report::Stopped)]
        );
    }
}

#[test]
fn a_refused_switch_over_reverses_no_later_one() {
    let mut primary = paired();
    let refused = primary.step(Event::FailoverAsked { reversal: Some(reversal()) });
    assert!(matches!(refused[..], [Action::Refuse(_)]), "{refused:?}");
    assert!(!primary.reverses());
    let mut alone = protected();
    alone.step(Event::FailoverAsked { reversal: None });
    // Another one, while that waits for its last epoch.
    let refused = alone.step(Event::FailoverAsked { reversal: Some(reversal()) });
    assert!(matches!(refused[..], [Action::Refuse(_)]), "{refused:?}");
    assert!(!alone.reverses() && reversing().reverses());
}

/// One whose last epoch the backup has.
fn acknowledged(arbiter: bool) -> Primary {
    let mut primary = handing_over(arbiter);
    primary.step(Event::Sealed(EpochId(2)));
    primary.step(ack(2));
    primary
}

#[test]
fn a_switch_over_that_is_late_waits_for_the_backup_s_word_where_nobody_else_has_one() {
    let late = || Event::HandoverLate("late".into());
    let word = Event::HandedOver { generation: Generation(2), reversed: false };
    let mut primary = acknowledged(false);
    let report = Action::Report(Report::Undecided("late".into()));
    assert_eq!(primary.step(late()), [Action::EndEpochs, report]);
    assert_eq!(primary.step(word)[0], Action::Destroy);
    assert_eq!(primary.state(), State::Gone);

    let mut cut = acknowledged(false);
    cut.step(late());
    assert_eq!(cut.step(Event::PeerLost("cut".into())), [Action::Close]);
    assert_eq!(cut.state(), State::Undecided);
    assert_eq!(cut.step(Event::StopAsked)[0], Action::Close);
    assert_eq!(cut.state(), State::Stopped);

    let mut decided = acknowledged(true);
    assert!(decided.step(late()).contains(&Action::Claim { expected: Generation(1) }));
}

#[test]
fn a_switch_over_whose_last_epoch_was_not_sealed_stays_here() {
    for arbiter in [true, false] {
        let mut primary = handing_over(arbiter);
        let cut = primary.step(Event::PeerLost("cut".into()));
        let failed = Action::Report(Report::FailoverFailed("cut".into()));
        let claim = Action::Claim { expected: G1 };
        assert_eq!(cut, [failed, Action::EndEpochs, Action::Close, claim]);
        primary.step(Event::Verdict(Verdict::Owned(Generation(2))));
        assert_eq!(primary.state(), State::Alone);
    }
}

#[test]
fn a_late_word_of_a_switch_over_decides() {
    let mut primary = handing_over(false);
    primary.step(Event::Sealed(EpochId(2)));
    primary.step(Event::PeerLost("silent".into()));
    assert_eq!(
        primary.step(Event::HandedOver { generation: Generation(2), reversed: false }),
        [],
        "not acknowledged"
    );
    primary.step(ack(2));
    assert_eq!(
        primary.step(Event::HandedOver { generation: Generation(3), reversed: false }),
        [],
        "not asked for"
    );
    let over = primary.step(Event::HandedOver { generation: Generation(2), reversed: false });
    let report = Action::Report(Report::FailoverFinished);
    assert_eq!(over, [Action::Destroy, Action::Close, report]);
    assert_eq!(primary.state(), State::Gone);
}

#[test]
fn a_record_of_another_stops_no_vm_that_was_never_protected() {
    let mut primary = Primary::new(true, Generation(0));
    primary.step(Event::Synced);
    let actions = primary.step(Event::Verdict(theirs()));
    let [Action::TellStop, Action::Report(Report::Failed(reason))] = &actions[..] else {
        panic!("{actions:?}");
    };
    let Verdict::Lost(record) = theirs() else { panic!() };
    assert!(reason.contains(&record.to_string()), "{reason}");
    assert_eq!(primary.state(), State::Failed);
}

#[test]
fn a_peer_that_is_lost_during_a_stop_is_let_go() {
    let mut primary = protected();
    primary.step(Event::StopAsked);
    assert_eq!(primary.step(Event::PeerLost("silent".into())), [Action::Close]);
    primary.step(Event::Verdict(Verdict::Owned(Generation(2))));
    assert_eq!(primary.state(), State::Stopped);
}

#[test]
fn a_copy_anew_begins_once_and_only_when_told() {
    let mut primary = Primary::new(true, Generation(0));
    let lost = |actions: &[Action]| matches!(actions.last(), Some(Action::Report(_)));
    assert!(lost(&primary.step(Event::ResyncReady)));
    for state in [State::Pairing, State::Protected] {
        let mut primary = if state == State::Pairing {
            let mut primary = Primary::new(true, Generation(0));
            primary.step(Event::Synced);
            primary
        } else {
            protected()
        };
        assert_eq!(primary.state(), state);
        let actions = primary.step(Event::ResyncReady);
        assert!(actions.contains(&Action::Close) && !actions.contains(&Action::Copy));
    }
    let mut primary = protected();
    primary.step(Event::TooLarge("big".into()));
    primary.step(Event::Verdict(Verdict::Owned(Generation(2))));
    assert_eq!(primary.step(Event::ResyncReady), [Action::Copy]);
    assert!(lost(&primary.step(Event::ResyncReady)), "a second time");
}

fn again() -> Primary {
    Primary::again(true, Generation(2))
}

#[test]
fn a_vm_that_is_copied_anew_stays_alone_when_that_ends() {
    let still = [Action::Close, Action::Report(Report::StillAlone("cut".into()))];
    let mut primary = again();
    assert_eq!(primary.step(Event::PeerLost("cut".into())), still);
    assert!(primary.state() == State::Alone && primary.may_go_on());
    let mut primary = again();
    assert_eq!(primary.step(Event::Synced), [Action::Pair { expected: Generation(2) }]);
    assert_eq!(primary.step(Event::PeerLost("cut".into())), still);
    // Nothing was told the backup, so a verdict that comes late changes nothing.
    assert_eq!(primary.step(Event::Verdict(Verdict::Owned(Generation(3)))), []);
    assert_eq!(primary.state(), State::Alone);
}

#[test]
fn a_first_commit_ends_what_the_lack_of_a_backup_began() {
    let mut primary = again();
    primary.step(Event::Synced);
    primary.step(Event::Verdict(Verdict::Owned(Generation(3))));
    primary.step(Event::Sealed(E1));
    let acked = primary.step(Event::Acked { epoch: E1, generation: Generation(3) });
    let report = Action::Report(Report::Resynced);
    assert_eq!(acked, [Action::Commit(E1), Action::Regain, report]);
}

#[test]
fn a_copy_anew_in_a_session_that_ends_is_told() {
    let mut primary = protected();
    primary.step(Event::TooLarge("big".into()));
    primary.step(Event::Verdict(Verdict::Owned(Generation(2))));
    let cut = primary.step(Event::PeerLost("cut".into()));
    let told = Action::Report(Report::Degraded("cut".into()));
    assert_eq!(cut, [Action::Close, Action::Degrade, told]);
    assert!(primary.may_go_on());
}

/// Only what waits for the backup's word: from the word that it is told to its answer.
#[test]
fn a_backup_that_was_told_of_a_copy_anew_owes_an_answer() {
    let mut primary = protected();
    primary.step(Event::TooLarge("big".into()));
    assert!(!primary.awaits_ready());
    primary.step(Event::Verdict(Verdict::Owned(Generation(2))));
    assert!(primary.awaits_ready());
    assert_eq!(primary.step(Event::ResyncReady), [Action::Copy]);
    assert!(!primary.awaits_ready());
}

#[test]
fn a_switch_over_that_is_given_up_is_called_off() {
    let failed = || Action::Report(Report::FailoverFailed("no state".into()));
    let claim = [failed(), Action::EndEpochs, Action::Claim { expected: G1 }];
    let (unsealed, mut sealed) = (handing_over(true), handing_over(true));
    sealed.step(Event::Sealed(EpochId(2)));
    assert_eq!([unsealed.is_handed(), sealed.is_handed()], [false, true]);
    // Without an arbiter only before the backup can have the last epoch.
    for mut primary in [unsealed, sealed, handing_over(false)] {
        assert_eq!(primary.step(Event::GiveUp("no state".into())), claim);
        assert_eq!(primary.state(), State::Claiming(Purpose::GiveUp));
        primary.step(Event::Verdict(Verdict::Owned(Generation(2))));
        assert!(primary.state() == State::Alone && !primary.may_go_on());
    }
}

#[test]
fn who_gave_up_does_not_go_on_though_the_peer_is_lost_as_well() {
    let mut primary = protected();
    primary.step(Event::GiveUp("no state".into()));
    assert_eq!(primary.step(Event::PeerLost("cut".into())), [Action::Close]);
    primary.step(Event::Verdict(Verdict::Owned(Generation(2))));
    // The pages that were taken for the epoch that failed are in none.
    assert!(primary.state() == State::Alone && !primary.may_go_on());
}

#[test]
fn an_attempt_that_ends_before_its_first_commit_pauses_nobody_again() {
    let mut primary = again();
    primary.step(Event::Synced);
    primary.step(Event::Verdict(Verdict::Owned(Generation(3))));
    primary.step(Event::Sealed(E1));
    primary.step(Event::PeerLost("cut".into()));
    let won = primary.step(Event::Verdict(Verdict::Owned(Generation(4))));
    let still = Action::Report(Report::StillAlone("cut".into()));
    assert_eq!(won, [Action::Close, Action::Release, Action::Pass, still]);
}

#[test]
fn who_gave_up_or_was_told_to_stop_does_not_go_on() {
    let mut primary = protected();
    primary.step(Event::GiveUp("never fits".into()));
    primary.step(Event::Verdict(Verdict::Owned(Generation(2))));
    assert!(primary.state() == State::Alone && !primary.may_go_on());
    let mut primary = again();
    primary.step(Event::StopAsked);
    assert!(primary.state() == State::Stopped && !primary.may_go_on());
    let mut primary = again();
    primary.step(Event::GiveUp("no state".into()));
    assert!(primary.state() == State::Failed && !primary.may_go_on());
}

/// Each state in which a switch-over or a stop is refused, and what the refusal names.
#[test]
fn a_refusal_names_the_state_and_the_reason() {
    let reached = |events: &[Event]| {
        let mut primary = Primary::new(false, Generation(0));
        events.iter().for_each(|event| drop(primary.step(event.clone())));
        primary
    };
    let to_protected =
        [Event::Synced, Event::Verdict(Verdict::Owned(G1)), Event::Sealed(E1), ack(1)];
    let after = |more: &[Event]| reached(&[&to_protected[..], more].concat());
    let lost = || Event::PeerLost("cut".into());
    let handing = [Event::FailoverAsked { reversal: None }, Event::Sealed(EpochId(2))];
    let states = [
        (reached(&[]), State::Syncing, "Syncing", true),
        (reached(&to_protected[..1]), State::Pairing, "Syncing", true),
        (reached(&to_protected[..3]), State::Protected, "Syncing", true),
        (after(&handing), State::HandingOver, "a switch-over is under way", false),
        (after(&[lost()]), State::Claiming(Purpose::PeerLost), "Suspended", true),
        (after(&[Event::StopAsked]), State::Claiming(Purpose::Stop), "being ended", true),
        (after(&[Event::TooLarge("x".into())]), State::Claiming(Purpose::Resync), "broke", true),
        (after(&[Event::GiveUp("x".into())]), State::Claiming(Purpose::GiveUp), "broke", true),
        (after(&[&handing[..], &[lost()]].concat()), State::Undecided, "cut off", true),
        (
            after(&[lost(), Event::Verdict(Verdict::Owned(Generation(2)))]),
            State::Alone,
            "Degraded",
            true,
        ),
        (after(&[lost(), Event::Verdict(theirs())]), State::Gone, "(Lost)", false),
        (reached(&[Event::StopAsked]), State::Stopped, "(Stopped)", false),
        (reached(&[lost()]), State::Failed, "(Stopped)", false),
    ];
    for (primary, state, text, may_stop) in states {
        assert_eq!(primary.state(), state);
        let refused = primary.clone().step(Event::FailoverAsked { reversal: None });
        let [Action::Refuse(reason)] = &refused[..] else { panic!("{state:?}: {refused:?}") };
        assert!(reason.contains(text), "{state:?}: {reason}");
        let stopped = primary.clone().step(Event::StopAsked);
        let is_refused = matches!(&stopped[..], [Action::Refuse(why)] if why.contains(text));
        assert_eq!(is_refused, !may_stop, "{state:?}: {stopped:?}");
    }
}

/// There is another way to a backup that may be well: a first copy is begun again, and nothing else changes.
#[test]
fn data_that_does_not_come_leaves_a_vm_alone_that_may_be_copied_again() {
    let alone = [Action::Close, Action::Report(Report::StillAlone("link".into()))];
    let mut primary = Primary::new(true, Generation(0));
    assert_eq!(primary.step(Event::DataLost("link".into())), alone);
    assert!(primary.state() == State::Alone && primary.may_go_on());
    let mut primary = Primary::new(true, Generation(0));
    primary.step(Event::Synced);
    assert_eq!(primary.step(Event::DataLost("link".into())), alone);
    // The verdict on the record comes late, and is no news.
    assert_eq!(primary.step(Event::Verdict(Verdict::Owned(G1))), []);
    // Claimed while the backup, which may be well, still hears this side: it has no reason to claim.
    for (mut primary, is_committed) in [(protected(), true), (paired(), false)] {
        let claim = [Action::EndEpochs, Action::Claim { expected: G1 }];
        assert_eq!(primary.step(Event::DataLost("link".into())), claim);
        let mut silent = primary.clone();
        assert_eq!(silent.step(Event::PeerLost("silent".into())), [Action::Close]);
        let owned = primary.step(Event::Verdict(Verdict::Owned(Generation(2))));
        let report = Action::Report(Report::Degraded("link".into()));
        assert_eq!(owned, [Action::Close, Action::Degrade, Action::Pass, report]);
        assert!(primary.may_go_on() && primary.is_protected() == is_committed);
        assert_eq!(silent.step(Event::Verdict(Verdict::Owned(Generation(2)))), owned);
    }
}

/// What a backup makes of the pair that is asked to reverse it.
fn reversal() -> Record {
    let (primary, backup) = (HostId(Uuid::from_u128(7)), HostId(Uuid::from_u128(5)));
    let standing = Standing::Pair { primary, backup };
    Record { generation: Generation(2), vm: VmId(Uuid::from_u128(8)), standing }
}

fn reversing() -> Primary {
    let mut primary = protected();
    primary.step(Event::FailoverAsked { reversal: Some(reversal()) });
    primary.step(Event::Sealed(EpochId(2)));
    primary
}

const WORD: Event = Event::HandedOver { generation: Generation(2), reversed: true };

#[test]
fn an_old_primary_of_a_reversed_pair_keeps_what_it_has_and_lets_nothing_out() {
    let inherits = [Action::Keep, Action::Close, Action::Report(Report::FailoverFinished)];
    let mut told = reversing();
    assert_eq!(told.step(ack(2)), [Action::Handed(EpochId(2))]);
    assert_eq!(told.step(WORD), inherits);
    assert_eq!((told.state(), told.generation()), (State::Heir, Generation(2)));
    // The same by the record, whoever asked for the claim.
    let causes = [Event::PeerLost("cut".into()), Event::GiveUp("no state".into())];
    for (cause, stops) in causes.iter().flat_map(|cause| [(cause, false), (cause, true)]) {
        let mut cut = reversing();
        cut.step(cause.clone());
        if stops {
            cut.step(Event::StopAsked);
        }
        assert_eq!(cut.step(Event::Verdict(Verdict::Lost(reversal()))), inherits, "{cause:?}");
        assert_eq!(cut.state(), State::Heir);
        assert!(matches!(cut.step(Event::StopAsked)[..], [Action::Refuse(_)]));
    }
}

#[test]
fn only_the_pair_that_was_asked_for_is_inherited() {
    // It was not asked for.
    let mut primary = protected();
    primary.step(Event::FailoverAsked { reversal: None });
    primary.step(Event::Sealed(EpochId(2)));
    primary.step(ack(2));
    assert!(!primary.step(WORD).contains(&Action::Keep));
    // It is another one, or of an epoch that was not sealed yet.
    let other = Record { generation: Generation(3), ..reversal() };
    for (sealed, record) in [(true, other), (false, reversal())] {
        let mut primary = protected();
        primary.step(Event::FailoverAsked { reversal: Some(reversal()) });
        if sealed {
            primary.step(Event::Sealed(EpochId(2)));
        }
        primary.step(Event::PeerLost("cut".into()));
        let lost = primary.step(Event::Verdict(Verdict::Lost(record)));
        assert_eq!(lost[0], Action::Destroy);
    }
    // The backup could not: it owns the VM alone.
    let mut primary = reversing();
    primary.step(ack(2));
    let word = Event::HandedOver { generation: Generation(2), reversed: false };
    assert_eq!(primary.step(word)[0], Action::Destroy);
    // There is nobody to say so.
    let mut primary = Primary::new(false, Generation(0));
    let events = [
        Event::Synced,
        Event::Verdict(Verdict::Owned(G1)),
        Event::Sealed(E1),
        ack(1),
        Event::FailoverAsked { reversal: Some(reversal()) },
        Event::Sealed(EpochId(2)),
        ack(2),
    ];
    events.into_iter().for_each(|event| drop(primary.step(event)));
    assert!(!primary.step(WORD).contains(&Action::Keep));
}

#[test]
fn a_new_primary_of_a_reversed_pair_holds_until_it_is_acknowledged_or_owns_the_vm() {
    let reversed = || Primary::reversed(Generation(2), EpochId(9));
    assert!(reversed().is_protected());
    let mut called = reversed();
    let report = Action::Report(Report::Reversed);
    let reached = [Action::TellPaired(Generation(2)), report, Action::BeginEpochs];
    assert_eq!(called.step(Event::Reached), reached);
    called.step(Event::Sealed(EpochId(10)));
    let acked = Event::Acked { epoch: EpochId(10), generation: Generation(2) };
    assert_eq!(called.step(acked), [Action::Commit(EpochId(10))]);
    for cause in [Event::PeerLost("silent".into()), Event::StopAsked] {
        let mut alone = reversed();
        let claims = alone.step(cause.clone());
        assert!(claims.contains(&Action::Claim { expected: Generation(2) }), "{claims:?}");
        assert!(!claims.contains(&Action::Pass), "{claims:?}");
        assert_eq!(alone.step(Event::Reached), [], "it is too late");
        let owned = alone.step(Event::Verdict(Verdict::Owned(Generation(3))));
        assert!(owned.contains(&Action::Pass), "{owned:?}");
    }
    let mut replaced = reversed();
    replaced.step(Event::PeerLost("silent".into()));
    assert_eq!(replaced.step(Event::Verdict(theirs()))[0], Action::Destroy);
    let refused = reversed().step(Event::FailoverAsked { reversal: None });
    let [Action::Refuse(reason)] = &refused[..] else { panic!("{refused:?}") };
    assert!(reason.contains("the old host"), "{reason}");
}

/// Of this side, which runs the VM by it.
fn own(generation: u64, is_pair: bool) -> (HostIdentity, Record) {
    let [owner, backup] = [5, 7].map(|n| HostId(Uuid::from_u128(n)));
    let me = HostIdentity { host: owner, vm: VmId(Uuid::from_u128(8)) };
    let standing = match is_pair {
        true => Standing::Pair { primary: owner, backup },
        false => Standing::Solo { owner },
    };
    (me, Record { generation: Generation(generation), vm: me.vm, standing })
}

#[test]
fn a_later_record_of_its_own_is_claimed_from_whatever_the_claim_is_for() {
    let causes = [
        Event::PeerLost("cut".into()),
        Event::StopAsked,
        Event::TooLarge("big".into()),
        Event::GiveUp("no state".into()),
    ];
    for (cause, is_pair) in causes.iter().flat_map(|cause| [(cause, true), (cause, false)]) {
        let mut primary = protected();
        primary.step(cause.clone());
        let claiming = primary.state();
        let (me, record) = own(4, is_pair);
        let event = Event::of(Verdict::Lost(record), me);
        let again = [Action::Claim { expected: Generation(4) }];
        assert_eq!(primary.step(event), again, "{cause:?}");
        assert_eq!(primary.state(), claiming);
        // From there it is as any claim: another's is a loss.
        let mut lost = primary.clone();
        assert_eq!(lost.step(Event::of(theirs(), me))[0], Action::Destroy);
        let owned = primary.step(Event::of(Verdict::Owned(Generation(5)), me));
        assert!(owned.contains(&Action::Pass), "{owned:?}");
        assert_eq!(primary.generation(), Generation(5));
    }
}

#[test]
fn a_record_of_its_own_that_came_late_ends_an_attempt_and_nothing_else() {
    let (me, record) = own(3, true);
    let event = || Event::of(Verdict::Lost(record), me);
    let mut primary = again();
    primary.step(Event::Synced);
    let ended = primary.step(event());
    assert_eq!(ended[0], Action::Close);
    assert!(primary.state() == State::Alone && primary.may_go_on());
    assert_eq!(primary.step(event()), [], "it is no news");
}

#[test]
fn a_switch_over_is_ended_by_a_person_where_the_arbiter_can_say_who_has_the_vm() {
    let failed =
        Action::Report(Report::FailoverFailed("The switch-over was ended by a person".into()));
    for (arbiter, sealed) in [(true, false), (true, true), (false, false)] {
        let mut primary = handing_over(arbiter);
        if sealed {
            primary.step(Event::Sealed(EpochId(2)));
            primary.step(ack(2));
        }
        let claim = [failed.clone(), Action::EndEpochs, Action::Claim { expected: G1 }];
        assert_eq!(primary.step(Event::StopAsked), claim);
        let owned = primary.step(Event::Verdict(Verdict::Owned(Generation(2))));
        let report = Action::Report(Report::Stopped);
        assert_eq!(owned, [Action::Pass, Action::Release, Action::TellStop, report]);
    }
    let mut primary = handing_over(true);
    primary.step(Event::Sealed(EpochId(2)));
    primary.step(Event::StopAsked);
    assert_eq!(primary.step(Event::Verdict(theirs()))[0], Action::Destroy);
}

#[test]
fn a_last_epoch_that_does_not_fit_is_copied_anew_as_any_other() {
    for arbiter in [true, false] {
        let mut primary = handing_over(arbiter);
        let failed = Action::Report(Report::FailoverFailed("big".into()));
        let claim = [failed, Action::EndEpochs, Action::Claim { expected: G1 }];
        assert_eq!(primary.step(Event::TooLarge("big".into())), claim);
        let owned = primary.step(Event::Verdict(Verdict::Owned(Generation(2))));
        let report = Action::Report(Report::Degraded("big".into()));
        assert_eq!(owned, [Action::Pass, Action::Release, Action::TellResync, report]);
        assert_eq!(primary.step(Event::ResyncReady), [Action::Copy]);
        // It was not sealed: no record makes this side an heir.
        primary.step(Event::Synced);
        primary.step(Event::Verdict(Verdict::Owned(Generation(3))));
        assert_eq!(primary.state(), State::Protected);
    }
}

#[test]
fn a_refused_switch_over_stays_here_with_an_arbiter_or_without() {
    for arbiter in [true, false] {
        let mut primary = handing_over(arbiter);
        primary.step(Event::Sealed(EpochId(2)));
        let mut acknowledged = primary.clone();
        let failed = Action::Report(Report::FailoverFailed("no tap".into()));
        let claim = Action::Claim { expected: G1 };
        let refused = primary.step(Event::Refused("no tap".into()));
        assert_eq!(refused, [failed, Action::EndEpochs, claim]);
        let owned = primary.step(Event::Verdict(Verdict::Owned(Generation(2))));
        let degraded = Action::Report(Report::Degraded("no tap".into()));
        assert_eq!(owned, [Action::Close, Action::Degrade, Action::Pass, degraded]);
        assert!(primary.state() == State::Alone && primary.may_go_on());
        // Whoever has acknowledged it may run it, whatever it says.
        acknowledged.step(ack(2));
        acknowledged.step(Event::Refused("no tap".into()));
        let expected = match arbiter {
            true => State::Claiming(Purpose::PeerLost),
            false => State::Undecided,
        };
        assert_eq!(acknowledged.state(), expected);
    }
}

#[test]
fn a_pair_that_the_backup_does_not_see_is_nobody_s_to_claim() {
    let mut first = paired();
    first.step(Event::Sealed(E1));
    let alone = first.step(Event::Refused("nothing".into()));
    let report = Action::Report(Report::Degraded("nothing".into()));
    assert_eq!(alone, [Action::EndEpochs, Action::Close, Action::Degrade, Action::Pass, report]);
    assert!(first.state() == State::Alone && first.may_go_on());
    let mut attempt = again();
    attempt.step(Event::Synced);
    attempt.step(Event::Verdict(Verdict::Owned(Generation(3))));
    attempt.step(Event::Sealed(E1));
    let still = Action::Report(Report::StillAlone("nothing".into()));
    let alone = attempt.step(Event::Refused("nothing".into()));
    assert_eq!(alone, [Action::EndEpochs, Action::Close, Action::Release, Action::Pass, still]);
    // Once an epoch was acknowledged the backup has something to start from, whatever it says.
    let claim = [Action::EndEpochs, Action::Close, Action::Claim { expected: G1 }];
    assert_eq!(protected().step(Event::Refused("nothing".into())), claim);
    let mut reversed = Primary::reversed(Generation(2), EpochId(9));
    reversed.step(Event::Reached);
    let claims = reversed.step(Event::Refused("nothing".into()));
    assert!(claims.contains(&Action::Claim { expected: Generation(2) }), "{claims:?}");
}
