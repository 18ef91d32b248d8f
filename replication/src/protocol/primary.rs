//! The primary of a pair.
//!
//! ```text
//!               synced         owned (PAIR)            ack, ack, ...
//!   Syncing ------------> Pairing ----------> Protected ----+
//!     ^  | peer lost, stop   | peer lost, stop,  |    ^-----+
//!     |  v                   v lost              | peer lost | stop | too large | failover
//!     |  Failed / Stopped   Failed / Stopped     v   peer lost, refused, late,  v
//!     |  or Alone           or Alone          Claiming <-- stop, too large -- HandingOver
//!     |       owned, to copy anew                | |                         |       |
//!     +------------------------------------------+ |    peer lost, sealed,   |       | handed
//!                       owned |          lost      |    no arbiter           v       | over
//!                             v                    v                     Undecided   |
//!                      Alone / Stopped            Gone <-- handed over ------|-------+
//!                                 ^----------------------- stop -------------+
//! ```
//!
//! Output is free in Syncing and Pairing, held in all states between, and free again in Alone and
//! Stopped. HandingOver without an arbiter that loses its peer after the last epoch was sealed is
//! Undecided: the backup may run the VM, and only a person knows, unless the backup's word was
//! only late.
//!
//! A backup that does not see the pair in the record refuses it before it acknowledges anything, and has
//! nothing to start from: Protected then ends Alone, without a claim.
//!
//! A claim that finds a later record of this very host is made again from there, in whatever way that
//! came to be: nobody else owns the VM by it.
//!
//! A switch-over may be one that reverses the roles ([`Event::FailoverAsked`] with the record that does so):
//! then the backup's claim makes a pair of it and this side, and where it is won this side ends as its
//! Heir instead of Gone. It keeps its memory and the last epoch's state, lets out nothing more, and goes on
//! from there only by a claim of its own, as the backup that it is. The machine of the new primary begins in
//! Calling ([`Primary::reversed`]):
//!
//! ```text
//!   Calling --reached--> Protected             HandingOver, Claiming --the pair is reversed--> Heir
//!      | peer lost, stop
//!      v
//!   Claiming
//! ```
//!
//! A machine is a session's. A VM that was protected before and lost its backup is copied anew in a
//! session of [`Primary::again`]: a peer that is lost in Syncing or Pairing leaves it Alone, as it
//! was, and not Failed. Whoever runs the machine may begin another such session as long as
//! [`Primary::may_go_on`] says so. A first copy that fails for what carries the data, and not for the peer,
//! leaves it Alone as well.

use crate::ids::{EpochId, Generation};
use crate::ownership::{HostIdentity, Record};
use crate::protocol::ownership::Verdict;

/// Most epochs that are sealed and not acknowledged. Both sides count on it.
pub const IN_FLIGHT_MAX: u64 = 2;

/// Where the primary stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// The record says PAIR with a backup that has the last epoch of a switch-over as this side has it,
    /// and is not connected yet. Output is held.
    Calling,
    /// Pages go straight to the backup's image.
    Syncing,
    /// The arbiter is asked for PAIR.
    Pairing,
    /// Epochs are sealed, sent, acknowledged, committed.
    Protected,
    /// The last epoch of a planned switch-over is under way.
    HandingOver,
    /// The arbiter is asked for SOLO.
    Claiming(Purpose),
    /// Without an arbiter: the backup may run the VM.
    Undecided,
    /// Owns the VM without a backup.
    Alone,
    /// The backup owns the VM.
    Gone,
    /// The backup owns the VM, and this side is its backup, with the last epoch of the switch-over.
    Heir,
    /// Ended by a person.
    Stopped,
    /// Ended by an error before the VM was protected.
    Failed,
}

/// Why ownership alone is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    PeerLost,
    Stop,
    /// An epoch did not fit the backup's staging: copy anew, unprotected.
    Resync,
    /// This side cannot go on, with a backup that is well.
    GiveUp,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The rest of the first copy is small enough for an epoch.
    Synced,
    /// The verdict on the claim that was asked for last.
    Verdict(Verdict),
    /// The claim that was asked for last found this later record, which says that this host runs the VM.
    Overtaken(Record),
    /// An epoch was sealed and is on its way.
    Sealed(EpochId),
    /// The backup's software has the whole epoch.
    Acked {
        epoch: EpochId,
        generation: Generation,
    },
    /// The connection ended, was silent too long, or brought what it must not.
    PeerLost(String),
    /// The backup does not see the pair in the record, or does not take the VM over in a planned switch-over:
    /// it has not acknowledged the epoch that waits for that, and will not.
    Refused(String),
    /// The peer lives, and does not end the switch-over in time.
    HandoverLate(String),
    /// Nothing comes to the peer any more, which may be well: there is another way to it.
    DataLost(String),
    /// The epoch to be sealed does not fit the backup's staging.
    TooLarge(String),
    /// The guest cannot be captured, or never fits.
    GiveUp(String),
    StopAsked,
    FailoverAsked {
        /// The record with which the backup makes this side its backup in the same swap; `None` if it
        /// is to own the VM alone.
        reversal: Option<Record>,
    },
    /// The backup that was lost in Calling's time is connected, and still has that epoch.
    Reached,
    /// The backup runs the VM: alone, or with this side as its backup.
    HandedOver {
        generation: Generation,
        reversed: bool,
    },
    /// The backup is ready for a copy anew.
    ResyncReady,
}

impl Event {
    /// How a claim of the host `me` ended. A record of its own, of another attempt or in other storage, is
    /// not a loss.
    #[must_use]
    pub fn of(verdict: Verdict, me: HostIdentity) -> Self {
        match verdict {
            Verdict::Lost(record) if record.is_of(me) => Self::Overtaken(record),
            verdict => Self::Verdict(verdict),
        }
    }
}

/// What the engine does, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Ask the arbiter for PAIR in place of `expected`.
    Pair {
        expected: Generation,
    },
    /// Ask the arbiter for SOLO in place of `expected`.
    Claim {
        expected: Generation,
    },
    TellPaired(Generation),
    TellStop,
    /// Tell the backup that its replica is worthless; the copy begins when it is ready.
    TellResync,
    /// Copy all of memory while the guest runs.
    Copy,
    /// Hold output from here on.
    Hold,
    /// Seal epochs as the cadence says, beginning now.
    BeginEpochs,
    /// Seal no more.
    EndEpochs,
    /// Quiesce for good and seal the last epoch.
    SealHandover,
    Commit(EpochId),
    /// The backup has the last epoch of a switch-over. Output that travelled in its state stays
    /// held: it leaves there, or, should the VM stay here after all, by [`Action::Pass`].
    Handed(EpochId),
    Pass,
    /// Let the guest run if it stands still for a seal.
    Release,
    /// As the degrade option says: run on or stay paused.
    Degrade,
    /// End a pause that [`Action::Degrade`] began: there is a backup again.
    Regain,
    Destroy,
    /// The guest is at its end here, as with [`Action::Destroy`]: nothing that is held leaves. Its memory
    /// and the state of the last epoch are kept for the backup that this host is from now on.
    Keep,
    /// End the session.
    Close,
    /// Answer a person's request.
    Refuse(String),
    Report(Report),
}

/// What a person is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    Synced,
    Resynced,
    /// The pair with reversed roles has its connection.
    Reversed,
    Degraded(String),
    /// An attempt to be protected again ended: all is as it was before.
    StillAlone(String),
    Stopped,
    Failed(String),
    Lost(Verdict),
    FailoverStarted,
    FailoverFinished,
    FailoverFailed(String),
    Undecided(String),
}

/// The machine.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Primary {
    state: State,
    arbiter: bool,
    generation: Generation,
    /// The last epoch that was sealed, and how many up to it wait for their acknowledgement.
    sealed: EpochId,
    in_flight: u64,
    committed: EpochId,
    /// Whether an epoch was committed since the last copy.
    protected: bool,
    /// Whether the VM was protected before the present copy.
    resync: bool,
    /// Whether the backup was told of a copy anew and has not said that it is ready.
    awaits_ready: bool,
    /// Whether the last epoch of a switch-over was sealed: the backup may have it and start.
    handed: bool,
    /// With this record the backup makes this side its own, if it is asked for a switch-over that does so.
    reversal: Option<Record>,
    /// Whether this side could not go on although the backup is well.
    gave_up: bool,
    reason: String,
}

impl Primary {
    /// A primary that begins to copy; `generation` is that of the record that stands.
    #[must_use]
    pub fn new(arbiter: bool, generation: Generation) -> Self {
        Self {
            state: State::Syncing,
            arbiter,
            generation,
            sealed: EpochId(0),
            in_flight: 0,
            committed: EpochId(0),
            protected: false,
            resync: false,
            awaits_ready: false,
            handed: false,
            reversal: None,
            gave_up: false,
            reason: String::new(),
        }
    }

    /// A primary whose VM was protected before, and which owns it alone.
    #[must_use]
    pub fn again(arbiter: bool, generation: Generation) -> Self {
        Self { resync: true, ..Self::new(arbiter, generation) }
    }

    /// The primary of a pair that a switch-over reversed: the record says so with `generation`, and
    /// the backup has the machine as it was at `epoch`. Output is held already.
    #[must_use]
    pub fn reversed(generation: Generation, epoch: EpochId) -> Self {
        Self {
            state: State::Calling,
            sealed: epoch,
            committed: epoch,
            protected: true,
            ..Self::new(true, generation)
        }
    }

    #[must_use]
    pub fn state(&self) -> State {
        self.state
    }

    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// The last epoch whose output may leave.
    #[must_use]
    pub fn committed(&self) -> EpochId {
        self.committed
    }

    /// How many epochs wait for their acknowledgement.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.in_flight
    }

    /// Whether an epoch of the present copy was committed.
    #[must_use]
    pub fn is_protected(&self) -> bool {
        self.protected
    }

    /// Whether the VM, which ran out of backups, may be copied to one again without a person's
    /// word: it is this side's, and nothing of this side was in the way.
    #[must_use]
    pub fn may_go_on(&self) -> bool {
        self.state == State::Alone && !self.gave_up
    }

    /// Whether the backup was told of a copy anew, and has not said that it is ready for that.
    #[must_use]
    pub fn awaits_ready(&self) -> bool {
        self.awaits_ready
    }

    /// Whether the last epoch of a switch-over was sealed: the backup may have it.
    #[must_use]
    pub fn is_handed(&self) -> bool {
        self.handed
    }

    /// Whether the switch-over that was asked for is to reverse the pair.
    #[must_use]
    pub fn reverses(&self) -> bool {
        self.reversal.is_some()
    }

    /// What to do about `event`.
    pub fn step(&mut self, event: Event) -> Vec<Action> {
        match event {
            Event::Synced => self.synced(),
            Event::Verdict(verdict) => self.verdict(verdict),
            Event::Overtaken(record) => self.overtaken(&record),
            Event::Sealed(epoch) => self.sealed(epoch),
            Event::Acked { epoch, generation } => self.acked(epoch, generation),
            Event::PeerLost(reason) => self.peer_lost(reason),
            Event::Refused(reason) => self.refused(reason),
            Event::HandoverLate(reason) => self.handover_late(reason),
            Event::DataLost(reason) => self.data_lost(reason),
            Event::TooLarge(reason) => self.too_large(reason),
            Event::GiveUp(reason) => self.give_up(reason),
            Event::StopAsked => self.stop_asked(),
            Event::FailoverAsked { reversal } => self.failover_asked(reversal),
            Event::Reached => self.reached(),
            Event::HandedOver { generation, reversed } => self.handed_over(generation, reversed),
            Event::ResyncReady => self.resync_ready(),
        }
    }

    fn synced(&mut self) -> Vec<Action> {
        assert_eq!(self.state, State::Syncing, "a copy ends where one was made");
        self.go(State::Pairing);
        vec![Action::Pair { expected: self.generation }]
    }

    fn verdict(&mut self, verdict: Verdict) -> Vec<Action> {
        match (self.state, verdict) {
            (State::Pairing, Verdict::Owned(generation)) => {
                self.generation = generation;
                self.go(State::Protected);
                vec![Action::Hold, Action::TellPaired(generation), Action::BeginEpochs]
            }
            // Nobody else can run this VM: nothing of it was ever committed anywhere, or this side
            // owned it alone until now. The record is of another VM, or of an older attempt.
            (State::Pairing, Verdict::Lost(record)) => {
                self.go(State::Failed);
                let reason = format!(
                    "The arbiter holds another record ({record}): use an empty directory, or a \
                     key of its own, for each VM"
                );
                vec![Action::TellStop, Action::Report(Report::Failed(reason))]
            }
            (State::Claiming(purpose), Verdict::Owned(generation)) => {
                self.generation = generation;
                self.in_flight = 0;
                self.owned(purpose)
            }
            // The backup's claim was first, and made this side its backup.
            (State::Claiming(_), Verdict::Lost(record)) if self.is_reversal(&record) => {
                self.inherit(record.generation)
            }
            (State::Claiming(_), Verdict::Lost(_)) => {
                self.go(State::Gone);
                vec![Action::Destroy, Action::Close, Action::Report(Report::Lost(verdict))]
            }
            // Asked for in a state that was left since: it changes nothing any more.
            _ => vec![],
        }
    }

    fn overtaken(&mut self, record: &Record) -> Vec<Action> {
        match self.state {
            State::Pairing => {
                self.peer_lost(format!("An earlier attempt's record came late: {record}"))
            }
            // Whoever wins from there owns the VM, and it is this side that still has it.
            State::Claiming(_) => {
                self.generation = record.generation;
                vec![Action::Claim { expected: record.generation }]
            }
            _ => vec![],
        }
    }

    fn owned(&mut self, purpose: Purpose) -> Vec<Action> {
        let reason = std::mem::take(&mut self.reason);
        match purpose {
            Purpose::PeerLost => {
                self.go(State::Alone);
                let end = if self.was_protected() { Action::Degrade } else { Action::Release };
                vec![Action::Close, end, Action::Pass, self.alone(reason)]
            }
            Purpose::GiveUp => {
                self.go(State::Alone);
                let report = Action::Report(Report::Degraded(reason));
                vec![Action::TellStop, Action::Degrade, Action::Pass, report]
            }
            Purpose::Stop => {
                self.go(State::Stopped);
                let report = Action::Report(Report::Stopped);
                vec![Action::Pass, Action::Release, Action::TellStop, report]
            }
            Purpose::Resync => {
                self.go(State::Syncing);
                self.protected = false;
                self.resync = true;
                self.awaits_ready = true;
                let report = Action::Report(Report::Degraded(reason));
                vec![Action::Pass, Action::Release, Action::TellResync, report]
            }
        }
    }

    /// Whether the VM had a backup in this session, or none was ever lost: an attempt that ends before
    /// its first commit leaves all as it was, a pause that a person ended among it.
    fn was_protected(&self) -> bool {
        !self.resync || self.committed != EpochId(0)
    }

    fn alone(&self, reason: String) -> Action {
        Action::Report(match self.was_protected() {
            true => Report::Degraded(reason),
            false => Report::StillAlone(reason),
        })
    }

    fn sealed(&mut self, epoch: EpochId) -> Vec<Action> {
        assert!(matches!(self.state, State::Protected | State::HandingOver));
        assert!(self.in_flight < IN_FLIGHT_MAX, "too many epochs are in flight");
        assert!(self.in_flight == 0 || epoch == self.sealed.next(), "epochs follow each other");
        self.in_flight += 1;
        self.sealed = epoch;
        self.handed = self.state == State::HandingOver;
        vec![]
    }

    fn acked(&mut self, epoch: EpochId, generation: Generation) -> Vec<Action> {
        let waits = matches!(
            self.state,
            State::Protected | State::HandingOver | State::Claiming(_) | State::Undecided
        );
        if !waits {
            return vec![];
        }
        // They are acknowledged in their order.
        let last = epoch.0.checked_add(self.in_flight).and_then(|after| after.checked_sub(1));
        let is_due = self.in_flight > 0 && last == Some(self.sealed.0);
        if !is_due || generation != self.generation {
            let reason = format!("The backup acknowledged epoch {epoch}, which was not sent");
            return self.peer_lost(reason);
        }
        self.in_flight -= 1;
        self.committed = epoch;
        // What the last epoch of a switch-over said is in its machine state: the backup says it, also
        // if its acknowledgement is heard only after the backup was suspected.
        let handed = self.handed && epoch == self.sealed;
        let mut actions = vec![if handed { Action::Handed(epoch) } else { Action::Commit(epoch) }];
        if !self.protected {
            self.protected = true;
            // Also where another backup was lost, and the pause is of that time.
            actions.push(Action::Regain);
            let report = if self.resync { Report::Resynced } else { Report::Synced };
            actions.push(Action::Report(report));
        }
        actions
    }

    fn data_lost(&mut self, reason: String) -> Vec<Action> {
        match self.state {
            // The first copy, or the record of it, is begun again: nothing was held yet.
            State::Syncing | State::Pairing if !self.resync => {
                self.go(State::Alone);
                vec![Action::Close, Action::Report(Report::StillAlone(reason))]
            }
            // A backup that hears this heart does not claim meanwhile: it is closed once the VM is owned.
            State::Protected => {
                let mut actions = self.claim(Purpose::PeerLost, reason);
                actions.retain(|action| *action != Action::Close);
                actions
            }
            _ => self.peer_lost(reason),
        }
    }

    fn peer_lost(&mut self, reason: String) -> Vec<Action> {
        match self.state {
            // Nothing is held, and the backup has nothing to start from.
            State::Syncing | State::Pairing if self.resync => {
                self.go(State::Alone);
                let mut actions = vec![Action::Close];
                if self.was_protected() {
                    actions.push(Action::Degrade);
                }
                actions.push(self.alone(reason));
                actions
            }
            State::Syncing | State::Pairing => {
                self.go(State::Failed);
                vec![Action::Close, Action::Report(Report::Failed(reason))]
            }
            State::Protected | State::Calling => self.claim(Purpose::PeerLost, reason),
            State::HandingOver if self.handed && !self.arbiter => self.undecided(reason),
            State::HandingOver => self.call_off(Purpose::PeerLost, reason),
            // The claim goes on without anybody to tell how it ends.
            State::Claiming(Purpose::Stop | Purpose::PeerLost) => vec![Action::Close],
            State::Claiming(Purpose::Resync | Purpose::GiveUp) => {
                // There is nobody left to copy to.
                self.reason = reason;
                self.go(State::Claiming(Purpose::PeerLost));
                vec![Action::Close]
            }
            State::Undecided => vec![Action::Close],
            _ => vec![],
        }
    }

    /// Without an arbiter its word is all that can still say whose the VM is: it is waited for.
    fn handover_late(&mut self, reason: String) -> Vec<Action> {
        if self.state != State::HandingOver || !self.handed || self.arbiter {
            return self.peer_lost(reason);
        }
        let mut actions = self.undecided(reason);
        actions.retain(|action| *action != Action::Close);
        actions
    }

    /// The switch-over comes to nothing, unless the record says otherwise.
    fn call_off(&mut self, purpose: Purpose, reason: String) -> Vec<Action> {
        let mut actions = vec![Action::Report(Report::FailoverFailed(reason.clone()))];
        actions.extend(self.claim(purpose, reason));
        actions
    }

    fn refused(&mut self, reason: String) -> Vec<Action> {
        match self.state {
            // It has not acknowledged the last epoch, so it does not start, with an arbiter or without. It is
            // closed once the VM is owned: what it hears keeps it from claiming a VM that it could not run.
            State::HandingOver if self.handed && self.in_flight > 0 => {
                let mut actions = self.call_off(Purpose::PeerLost, reason);
                actions.retain(|action| *action != Action::Close);
                actions
            }
            // Nobody can claim by this pair: what is asked for in its place might be asked of other storage
            // than the pair is in.
            State::Protected if !self.protected => {
                self.reason = reason;
                let mut actions = vec![Action::EndEpochs];
                actions.extend(self.owned(Purpose::PeerLost));
                actions
            }
            _ => self.peer_lost(reason),
        }
    }

    /// The backup may have the last epoch, and nobody can be asked whether it started.
    fn undecided(&mut self, reason: String) -> Vec<Action> {
        self.go(State::Undecided);
        vec![Action::EndEpochs, Action::Close, Action::Report(Report::Undecided(reason))]
    }

    fn claim(&mut self, purpose: Purpose, reason: String) -> Vec<Action> {
        self.reason = reason;
        self.go(State::Claiming(purpose));
        let mut actions = vec![Action::EndEpochs];
        if purpose == Purpose::PeerLost {
            actions.push(Action::Close);
        }
        actions.push(Action::Claim { expected: self.generation });
        actions
    }

    fn too_large(&mut self, reason: String) -> Vec<Action> {
        match self.state {
            State::Protected => self.claim(Purpose::Resync, reason),
            // The last epoch of a switch-over is as any other until it is sealed.
            State::HandingOver if !self.handed => self.call_off(Purpose::Resync, reason),
            _ => vec![],
        }
    }

    fn give_up(&mut self, reason: String) -> Vec<Action> {
        match self.state {
            State::Syncing | State::Pairing => {
                self.go(State::Failed);
                vec![Action::TellStop, Action::Release, Action::Report(Report::Failed(reason))]
            }
            State::HandingOver if self.handed && !self.arbiter => self.undecided(reason),
            State::Protected | State::HandingOver | State::Calling => {
                // Whatever becomes of the claim and of the peer: it may be that pages were taken for
                // an epoch that is none.
                self.gave_up = true;
                match self.state {
                    State::HandingOver => self.call_off(Purpose::GiveUp, reason),
                    _ => self.claim(Purpose::GiveUp, reason),
                }
            }
            _ => vec![],
        }
    }

    fn stop_asked(&mut self) -> Vec<Action> {
        match self.state {
            State::Syncing | State::Pairing => {
                self.go(State::Stopped);
                vec![Action::TellStop, Action::Report(Report::Stopped)]
            }
            State::Protected | State::Calling => self.claim(Purpose::Stop, String::new()),
            // Without an arbiter the backup may run the VM once it has the last epoch.
            State::HandingOver if self.arbiter || !self.handed => {
                let reason = "The switch-over was ended by a person";
                self.call_off(Purpose::Stop, reason.to_owned())
            }
            State::Claiming(Purpose::PeerLost | Purpose::Resync | Purpose::GiveUp) => {
                self.go(State::Claiming(Purpose::Stop));
                vec![]
            }
            // Whoever asked first is answered at the same time.
            State::Claiming(Purpose::Stop) => vec![],
            State::Undecided => {
                self.go(State::Stopped);
                vec![Action::Close, Action::Pass, Action::Release, Action::Report(Report::Stopped)]
            }
            State::Alone => {
                self.go(State::Stopped);
                vec![Action::Report(Report::Stopped)]
            }
            State::HandingOver | State::Gone | State::Heir | State::Stopped | State::Failed => {
                vec![Action::Refuse(self.cannot("The protection cannot be ended"))]
            }
        }
    }

    fn failover_asked(&mut self, reversal: Option<Record>) -> Vec<Action> {
        match self.state {
            State::Protected if self.protected => {
                // Without an arbiter nobody can say whether the pair was reversed.
                self.reversal = reversal.filter(|_| self.arbiter);
                self.go(State::HandingOver);
                vec![Action::Report(Report::FailoverStarted), Action::SealHandover]
            }
            _ => vec![Action::Refuse(self.cannot("The VM cannot be handed over"))],
        }
    }

    /// Why what was asked for cannot be done now: names the state, and what to wait for or to do.
    fn cannot(&self, what: &str) -> String {
        let why = match self.state {
            State::Calling => {
                "it was handed over to this host, whose backup, the old host, is called: wait until it \
                 has answered"
            }
            State::Syncing | State::Pairing | State::Protected => {
                "the copy to the backup is under way (Syncing): wait until it is Protected"
            }
            State::HandingOver => "a switch-over is under way: wait for its end",
            State::Claiming(Purpose::PeerLost) => {
                "the backup was lost and the arbiter is asked who owns the VM (Suspended): wait for \
                 its answer"
            }
            State::Claiming(Purpose::Stop) => {
                "the protection is being ended and the arbiter is asked (Suspended): wait for its \
                 answer"
            }
            State::Claiming(Purpose::Resync | Purpose::GiveUp) => {
                "the protection broke on this side and the arbiter is asked (Suspended): wait for \
                 its answer"
            }
            State::Undecided => {
                "a switch-over was cut off and nobody but a person can say which host runs the VM \
                 (Suspended): if it is this one, stop the replication here"
            }
            State::Alone => "this host runs it without a backup (Degraded)",
            State::Gone | State::Heir => "the backup owns the VM (Lost)",
            State::Stopped | State::Failed => "the protection has ended (Stopped)",
        };
        format!("{what}: {why}")
    }

    fn handed_over(&mut self, generation: Generation, reversed: bool) -> Vec<Action> {
        // Only what was asked for is believed.
        let asked = self.handed
            && self.in_flight == 0
            && generation.0.checked_sub(1) == Some(self.generation.0)
            && (!reversed || self.reversal.is_some());
        match self.state {
            State::HandingOver if asked && reversed => self.inherit(generation),
            State::HandingOver | State::Undecided if asked => {
                self.generation = generation;
                self.go(State::Gone);
                let report = Action::Report(Report::FailoverFinished);
                vec![Action::Destroy, Action::Close, report]
            }
            // An arbiter's word counts in Claiming.
            State::Claiming(_) | State::Undecided => vec![],
            _ => self.peer_lost("The backup claims to run the VM, unasked".to_owned()),
        }
    }

    /// Whether `record` is what the backup was asked to make of the pair. It can be only once it has the
    /// last epoch.
    fn is_reversal(&self, record: &Record) -> bool {
        self.handed && self.reversal.as_ref() == Some(record)
    }

    /// The backup owns the VM, and this side is its backup.
    fn inherit(&mut self, generation: Generation) -> Vec<Action> {
        self.generation = generation;
        self.go(State::Heir);
        vec![Action::Keep, Action::Close, Action::Report(Report::FailoverFinished)]
    }

    fn reached(&mut self) -> Vec<Action> {
        if self.state != State::Calling {
            return vec![];
        }
        self.go(State::Protected);
        vec![
            Action::TellPaired(self.generation),
            Action::Report(Report::Reversed),
            Action::BeginEpochs,
        ]
    }

    fn resync_ready(&mut self) -> Vec<Action> {
        if self.state == State::Syncing && std::mem::take(&mut self.awaits_ready) {
            return vec![Action::Copy];
        }
        self.peer_lost("The backup is ready for a copy that it was not told of".to_owned())
    }

    fn go(&mut self, next: State) {
        assert!(is_transition_valid(self.state, next), "{:?} to {next:?}", self.state);
        self.state = next;
    }
}

/// The arrows of the diagram.
#[must_use]
pub fn is_transition_valid(from: State, to: State) -> bool {
    use State::{
        Alone, Calling, Claiming, Failed, Gone, HandingOver, Heir, Pairing, Protected, Stopped,
        Syncing, Undecided,
    };
    match from {
        Calling => {
            matches!(to, Protected | Claiming(Purpose::PeerLost | Purpose::Stop | Purpose::GiveUp))
        }
        Syncing => matches!(to, Pairing | Failed | Alone | Stopped),
        Pairing => matches!(to, Protected | Failed | Alone | Stopped),
        Protected => matches!(to, Claiming(_) | HandingOver | Alone),
        HandingOver => matches!(to, Claiming(_) | Gone | Heir | Undecided),
        Claiming(Purpose::Resync) => {
            matches!(to, Claiming(Purpose::Stop | Purpose::PeerLost) | Syncing | Gone)
        }
        Claiming(Purpose::GiveUp) => {
            matches!(to, Claiming(Purpose::Stop | Purpose::PeerLost) | Alone | Gone | Heir)
        }
        Claiming(Purpose::PeerLost) => matches!(to, Claiming(Purpose::Stop) | Alone | Gone | Heir),
        Claiming(Purpose::Stop) => matches!(to, Stopped | Gone | Heir),
        Undecided => matches!(to, Stopped | Gone),
        Alone => matches!(to, Stopped),
        Gone | Heir | Stopped | Failed => false,
    }
}

#[cfg(test)]
#[path = "primary_tests.rs"]
mod tests;
