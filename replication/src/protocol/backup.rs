//! The backup of a pair.
//!
//! ```text
//!   Idle --accepted--> Syncing --verified(first)--> Replica ---+ verified, verified, ...
//!    ^ ^                 |  ^                        | |  ^----+
//!    | +--lost, stopped--+  +--resync----------------+ |
//!    |                                                 | lost, bad, failover, handover
//!    |   record is another's                           v
//!    +---------------------------------------------- Claiming    (arbiter)
//!    |                                                 | owned
//!    +--accepted again-- Orphan (no arbiter) --force-- Starting --started--> TakenOver
//! ```
//!
//! A switch-over may make a pair of both hosts with reversed roles, in one swap ([`Handover::Reverse`]): this
//! side then claims that pair instead of SOLO, and starts the VM with its output held. The old primary is a
//! backup of that pair from its first moment on, without a session, from [`Backup::heir`]:
//!
//! ```text
//!   Heir --accepted, paired--> Heir --verified--> Replica
//!    ^ | lost: nobody called, or the session of the pair ended
//!    | v
//!    | Claiming
//!    +-- lost or bad before the pair was told: the new primary lives, and may call again
//! ```
//!
//! An image of a disk that cannot be written ends what there is in each of these: such a backup
//! listens again, and never starts what it has. Found out while it claims, the claim is not made.
//!
//! A host that lacks what it would need to run the VM refuses the last epoch of a switch-over instead of
//! acknowledging it, and is the backup that it was: the primary, which lives, claims the VM and goes on. Should
//! that be lost meanwhile, this side takes over as from any.
//!
//! The memory of a replica whose claim is lost may be kept ([`Action::Keep`]): nothing that runs, only
//! what its primary may go on from, in a session that begins in Syncing like any other.
//!
//! From Claiming and Orphan on nothing is acknowledged any more, for good: a session that brings
//! more is a new one, from Syncing.

use crate::ids::{EpochId, Generation};
use crate::protocol::ownership::Verdict;

/// Where the backup stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Listening, nothing here.
    Idle,
    /// Pages go straight into the image; there is nothing to start from.
    Syncing,
    /// An epoch is committed: there is something to start from.
    Replica,
    /// As Replica: what was committed is the last epoch of a switch-over away from this host, which keeps
    /// it as its own machine's. The new primary has committed nothing here yet.
    Heir,
    /// The arbiter is asked for SOLO.
    Claiming,
    /// The primary is lost and no arbiter can say who owns the VM: a person decides.
    Orphan,
    /// The VM is being started.
    Starting,
    TakenOver,
    /// Ended by a person or by an error that leaves nothing to wait for.
    Stopped,
}

/// Whether an epoch is the last of a switch-over, and what is to become of the old host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Handover {
    /// It is not.
    #[default]
    No,
    /// The new host owns the VM alone.
    Leave,
    /// The old host is the new one's backup in the same swap: it keeps the machine as it is at this
    /// epoch.
    Reverse,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A primary was accepted and the machine was built.
    Accepted,
    Paired(Generation),
    /// The pair that the primary told is not in the record as this side sees it.
    Unpaired(String),
    /// A whole epoch is staged and checked.
    Verified {
        epoch: EpochId,
        generation: Generation,
        handover: Handover,
    },
    /// The connection ended or was silent too long.
    Lost(String),
    /// The peer sent what it must not.
    Bad(String),
    /// The image of a disk cannot be written: what is here is worthless.
    ImageFailed(String),
    /// The last epoch of a switch-over is whole, and this host could not run the VM now.
    Unready(String),
    /// The primary ends the protection.
    StopTold,
    /// The primary copies anew.
    ResyncTold,
    Verdict(Verdict),
    FailoverAsked {
        force: bool,
    },
    StopAsked,
    Started,
    StartFailed(String),
}

/// What the engine does, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    Ack {
        epoch: EpochId,
        generation: Generation,
    },
    /// Bring the staged epoch into the image.
    Apply(EpochId),
    /// Forget what is staged and not acknowledged.
    DropStaging,
    TellAbort(String),
    /// Tell the primary that the pair, or the last epoch of a switch-over, is not acknowledged, nor will be.
    TellRefused(String),
    TellStopDone,
    TellResyncReady,
    TellHandedOver {
        generation: Generation,
        reversed: bool,
    },
    Close,
    /// Ask the arbiter for SOLO in place of `expected`.
    Claim {
        expected: Generation,
    },
    /// Ask the arbiter for the pair in which this side is the primary and its primary the backup, in
    /// place of `expected`.
    ClaimReversed {
        expected: Generation,
    },
    /// Destroy the replica, and what was kept of an earlier one.
    Discard,
    /// Give the replica up as one that could run, and keep its memory: it is that of this epoch, and
    /// its primary may go on from there instead of from nothing.
    Keep {
        generation: Generation,
        committed: EpochId,
    },
    /// Load the last acknowledged state and run.
    Start,
    /// The same, with output held from the first instant.
    StartHeld,
    /// Answer a person's request.
    Refuse(String),
    Report(Report),
}

/// What a person is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// The session failed; the backup listens or waits as its state says.
    SessionFailed(String),
    /// The primary ended the protection; the backup listens again.
    Released,
    FailoverStarted,
    FailoverFinished,
    FailoverFailed(String),
    Lost(Verdict),
    Stopped,
}

/// The machine.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Backup {
    state: State,
    arbiter: bool,
    generation: Option<Generation>,
    committed: Option<EpochId>,
    next: EpochId,
    handover: Handover,
    /// Whether the pair of this session was told, and seen in the record.
    paired: bool,
    /// Of an heir: whether its new primary is here.
    called: bool,
}

impl Backup {
    #[must_use]
    pub fn new(arbiter: bool) -> Self {
        Self {
            state: State::Idle,
            arbiter,
            generation: None,
            committed: None,
            next: EpochId(1),
            handover: Handover::No,
            paired: false,
            called: false,
        }
    }

    /// The backup of a pair that a switch-over away from this host has reversed: the record says so
    /// with `generation`, and what is here is the machine at `epoch`.
    #[must_use]
    pub fn heir(generation: Generation, epoch: EpochId) -> Self {
        Self {
            state: State::Heir,
            generation: Some(generation),
            committed: Some(epoch),
            next: epoch.next(),
            ..Self::new(true)
        }
    }

    #[must_use]
    pub fn state(&self) -> State {
        self.state
    }

    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation.unwrap_or_default()
    }

    /// The last epoch that was acknowledged in this session.
    #[must_use]
    pub fn committed(&self) -> Option<EpochId> {
        self.committed
    }

    /// The only epoch that may be staged at the moment.
    #[must_use]
    pub fn expected(&self) -> EpochId {
        self.next
    }

    /// What to do about `event`.
    pub fn step(&mut self, event: Event) -> Vec<Action> {
        match event {
            Event::Accepted => self.accepted(),
            Event::Paired(generation) => self.paired(generation),
            Event::Unpaired(reason) => self.unpaired(reason),
            Event::Verified { epoch, generation, handover } => {
                self.verified(epoch, generation, handover)
            }
            Event::Lost(reason) => self.lost(reason),
            Event::Bad(reason) => self.bad(reason),
            Event::ImageFailed(reason) => self.image_failed(reason),
            Event::Unready(reason) => self.unready(reason),
            Event::StopTold => self.stop_told(),
            Event::ResyncTold => self.resync_told(),
            Event::Verdict(verdict) => self.verdict(verdict),
            Event::FailoverAsked { force } => self.failover_asked(force),
            Event::StopAsked => self.stop_asked(),
            Event::Started => self.started(),
            Event::StartFailed(reason) => self.start_failed(reason),
        }
    }

    fn accepted(&mut self) -> Vec<Action> {
        if self.state == State::Heir {
            // Its new primary: nothing is copied, what is here is what it began with.
            self.paired = false;
            self.called = true;
            return vec![];
        }
        // The same VM's primary is back, alive: what is left here is older than what it runs.
        let actions = if self.state == State::Orphan { vec![self.keep()] } else { vec![] };
        self.forget();
        self.go(State::Syncing);
        actions
    }

    /// What becomes of a replica that its primary has left behind.
    fn keep(&self) -> Action {
        match (self.generation, self.committed) {
            (Some(generation), Some(committed)) => Action::Keep { generation, committed },
            _ => Action::Discard,
        }
    }

    fn paired(&mut self, generation: Generation) -> Vec<Action> {
        if self.state == State::Heir && self.generation == Some(generation) && !self.paired {
            self.paired = true;
            return vec![];
        }
        if self.state != State::Syncing || self.generation.is_some_and(|old| old >= generation) {
            return self.bad("The primary paired out of turn".to_owned());
        }
        if generation.0 == u64::MAX {
            // A take-over needs a generation after it.
            return self.bad("The primary paired under the last generation".to_owned());
        }
        self.generation = Some(generation);
        vec![]
    }

    /// Nothing of this pair will be acknowledged, and there is nothing to start from.
    fn unpaired(&mut self, reason: String) -> Vec<Action> {
        if self.state != State::Syncing {
            return self.bad(reason);
        }
        let mut actions = vec![Action::TellRefused(reason.clone())];
        actions.extend(self.lost(reason));
        actions
    }

    fn verified(
        &mut self,
        epoch: EpochId,
        generation: Generation,
        handover: Handover,
    ) -> Vec<Action> {
        if !matches!(self.state, State::Syncing | State::Replica | State::Heir) {
            return vec![];
        }
        if self.state == State::Heir && !self.paired {
            return self.bad(format!("Epoch {epoch} arrived before the pair was told"));
        }
        if epoch != self.next {
            return self.bad(format!("Epoch {epoch} arrived where {} was due", self.next));
        }
        if self.generation != Some(generation) {
            return self.bad(format!("Epoch {epoch} belongs to generation {generation}"));
        }
        if matches!(self.state, State::Syncing | State::Heir) {
            self.go(State::Replica);
        }
        self.committed = Some(epoch);
        self.next = epoch.next();
        let mut actions = vec![Action::Ack { epoch, generation }, Action::Apply(epoch)];
        // Without an arbiter there is no record to say who is the backup.
        self.handover = match handover {
            Handover::Reverse if !self.arbiter => Handover::Leave,
            handover => handover,
        };
        if self.handover != Handover::No {
            actions.push(Action::Report(Report::FailoverStarted));
            actions.extend(self.take(generation));
        }
        actions
    }

    /// Stops acknowledging for good and asks, or starts where there is nobody to ask.
    fn take(&mut self, generation: Generation) -> Vec<Action> {
        if self.arbiter {
            self.go(State::Claiming);
            match self.handover {
                Handover::Reverse => vec![Action::ClaimReversed { expected: generation }],
                Handover::No | Handover::Leave => vec![Action::Claim { expected: generation }],
            }
        } else {
            self.generation = Some(generation.next());
            self.go(State::Starting);
            vec![Action::Start]
        }
    }

    fn lost(&mut self, reason: String) -> Vec<Action> {
        match self.state {
            State::Syncing => {
                self.forget();
                self.go(State::Idle);
                let report = Action::Report(Report::SessionFailed(reason));
                vec![Action::Close, Action::DropStaging, Action::Discard, report]
            }
            State::Heir if self.called && !self.paired => {
                // Nothing of this session counts, and whoever called was alive just now. When it does
                // not come again is the engine's to say.
                self.called = false;
                vec![Action::Close, Action::DropStaging]
            }
            State::Replica | State::Heir => {
                let mut actions = vec![Action::Close, Action::DropStaging];
                if self.arbiter {
                    actions.push(Action::Report(Report::FailoverStarted));
                    actions.extend(self.take(self.generation()));
                } else {
                    self.go(State::Orphan);
                    actions.push(Action::Report(Report::SessionFailed(reason)));
                }
                actions
            }
            _ => vec![],
        }
    }

    fn bad(&mut self, reason: String) -> Vec<Action> {
        let mut actions = match self.state {
            State::Syncing | State::Replica | State::Heir => {
                vec![Action::TellAbort(reason.clone())]
            }
            _ => vec![],
        };
        actions.extend(self.lost(reason));
        actions
    }

    fn image_failed(&mut self, reason: String) -> Vec<Action> {
        let tell = Action::TellAbort(reason.clone());
        let report = match self.state {
            State::Syncing | State::Replica | State::Heir | State::Orphan => {
                Report::SessionFailed(reason)
            }
            State::Claiming => Report::FailoverFailed(reason),
            State::Starting => return self.start_failed(reason),
            State::Idle | State::TakenOver | State::Stopped => return vec![],
        };
        self.forget();
        self.go(State::Idle);
        let (close, staging) = (Action::Close, Action::DropStaging);
        vec![tell, close, staging, Action::Discard, Action::Report(report)]
    }

    fn unready(&mut self, reason: String) -> Vec<Action> {
        match self.state {
            State::Replica | State::Heir if self.state == State::Replica || self.paired => {
                let tell = Action::TellRefused(reason.clone());
                vec![tell, Action::DropStaging, Action::Report(Report::FailoverFailed(reason))]
            }
            // There is nothing yet that could be handed over.
            _ => self.bad(reason),
        }
    }

    fn stop_told(&mut self) -> Vec<Action> {
        match self.state {
            State::Syncing | State::Replica | State::Heir => {
                self.forget();
                self.go(State::Idle);
                let report = Action::Report(Report::Released);
                let tell = Action::TellStopDone;
                vec![tell, Action::Close, Action::DropStaging, Action::Discard, report]
            }
            _ => vec![],
        }
    }

    fn resync_told(&mut self) -> Vec<Action> {
        match self.state {
            State::Syncing | State::Replica | State::Heir => {
                if self.state != State::Syncing {
                    self.go(State::Syncing);
                }
                self.committed = None;
                vec![Action::DropStaging, Action::TellResyncReady]
            }
            _ => vec![],
        }
    }

    fn verdict(&mut self, verdict: Verdict) -> Vec<Action> {
        if self.state != State::Claiming {
            return vec![];
        }
        match verdict {
            Verdict::Owned(generation) => {
                self.generation = Some(generation);
                self.go(State::Starting);
                match self.handover {
                    Handover::No => vec![Action::Close, Action::Start],
                    Handover::Leave => vec![Action::Start],
                    Handover::Reverse => vec![Action::StartHeld],
                }
            }
            Verdict::Lost(_) => {
                let keep = self.keep();
                self.forget();
                self.go(State::Idle);
                vec![Action::Close, keep, Action::Report(Report::Lost(verdict))]
            }
        }
    }

    fn failover_asked(&mut self, force: bool) -> Vec<Action> {
        let refuse = |reason: &str| vec![Action::Refuse(reason.to_owned())];
        match self.state {
            State::Replica | State::Heir if self.arbiter => {
                // The session stays until the verdict: a primary that sees it close would ask the
                // arbiter too, and might win against the person.
                let started = Action::Report(Report::FailoverStarted);
                let mut actions = vec![Action::DropStaging, started];
                actions.extend(self.take(self.generation()));
                actions
            }
            State::Replica | State::Heir => refuse(
                "The primary is alive (Protected) and there is no arbiter: ask the primary to \
                     fail over",
            ),
            State::Orphan if force => {
                let mut actions = vec![Action::Report(Report::FailoverStarted)];
                self.generation = Some(self.generation().next());
                self.go(State::Starting);
                actions.push(Action::Start);
                actions
            }
            State::Orphan => refuse(
                "There is no arbiter to say whether the primary is gone (Suspended): 'force' says that \
                 it is",
            ),
            State::Idle => refuse(
                "There is no committed replica to start from: no primary is here (Disconnected)",
            ),
            State::Syncing => refuse(
                "There is no committed replica to start from: the copy is under way (Syncing)",
            ),
            State::Claiming | State::Starting => refuse("A take-over is under way (TakingOver)"),
            State::TakenOver => refuse("This host has taken the VM over already (TakenOver)"),
            State::Stopped => refuse("The backup was stopped (Stopped)"),
        }
    }

    fn stop_asked(&mut self) -> Vec<Action> {
        match self.state {
            State::Idle | State::Syncing | State::Replica | State::Heir | State::Orphan => {
                let told = matches!(self.state, State::Syncing | State::Replica | State::Heir);
                self.go(State::Stopped);
                let mut actions = vec![];
                if told {
                    let reason = "The backup was stopped by a person".to_owned();
                    actions.push(Action::TellAbort(reason));
                }
                actions.extend([Action::Close, Action::DropStaging, Action::Discard]);
                actions.push(Action::Report(Report::Stopped));
                actions
            }
            // What was claimed may be ours already: it cannot be taken back.
            State::Claiming | State::Starting | State::TakenOver | State::Stopped => vec![],
        }
    }

    fn started(&mut self) -> Vec<Action> {
        self.go(State::TakenOver);
        let mut actions = vec![];
        if self.handover != Handover::No {
            let reversed = self.handover == Handover::Reverse;
            actions.push(Action::TellHandedOver { generation: self.generation(), reversed });
        }
        actions.extend([Action::Close, Action::Report(Report::FailoverFinished)]);
        actions
    }

    fn start_failed(&mut self, reason: String) -> Vec<Action> {
        self.go(State::Stopped);
        let failed = Action::Report(Report::FailoverFailed(reason.clone()));
        vec![Action::TellAbort(reason), Action::Close, failed]
    }

    fn forget(&mut self) {
        self.generation = None;
        self.committed = None;
        self.next = EpochId(1);
        self.handover = Handover::No;
        self.paired = false;
        self.called = false;
    }

    fn go(&mut self, next: State) {
        assert!(is_transition_valid(self.state, next), "{:?} to {next:?}", self.state);
        self.state = next;
    }
}

/// The arrows of the diagram.
#[must_use]
pub fn is_transition_valid(from: State, to: State) -> bool {
    use State::{Claiming, Heir, Idle, Orphan, Replica, Starting, Stopped, Syncing, TakenOver};
    match from {
        Idle => matches!(to, Syncing | Stopped),
        Syncing => matches!(to, Replica | Idle | Stopped),
        Replica => matches!(to, Syncing | Idle | Claiming | Orphan | Starting | Stopped),
        Heir => matches!(to, Replica | Syncing | Idle | Claiming | Stopped),
        Claiming => matches!(to, Starting | Idle),
        Orphan => matches!(to, Starting | Syncing | Idle | Stopped),
        Starting => matches!(to, TakenOver | Stopped),
        TakenOver | Stopped => false,
    }
}

#[cfg(test)]
#[path = "backup_tests.rs"]
mod tests;
