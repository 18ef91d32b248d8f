//! What the engine does when its machine says so.

use super::{
    Action, Degrade, Engine, Error, Event, Guest, HANDOVER_TIMEOUTS, Input, Message, Report,
    Standing, State, Told, Work,
};
use crate::checking::reach;
use crate::engine::clock;
use crate::handover::Legacy;
use crate::primary::rest::Rest;
use crate::protocol::ownership::Verdict;
use crate::protocol::primary::Purpose;
use api::replication::{Cow, ReplicationState};

impl<G: Guest> Engine<'_, G> {
    /// Lets the machine decide and carries it out.
    pub(super) fn step(&mut self, event: Event) {
        if let (Event::PeerLost(reason), true) = (&event, self.has_peer()) {
            let generation = self.machine.generation();
            tracing::warn!("the backup of generation {generation} is given up: {reason}");
        }
        #[cfg(any(test, feature = "testing"))]
        let before = self.machine.state();
        let actions = self.machine.step(event);
        #[cfg(any(test, feature = "testing"))]
        crate::engine::trace::primary(before, self.machine.state());
        // An end is shown only once all that it says is so.
        if !self.is_over() {
            self.show();
        }
        for action in actions {
            if matches!(action, Action::Report(_)) {
                self.show();
            }
            self.act(action);
        }
        if self.machine.is_protected() {
            // The backup has seen the pair in the record, too, or what this side won in its place.
            self.seen.raise(self.machine.generation());
        }
        self.show();
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Pair { expected } => {
                let primary = self.identity.host;
                self.claim(expected, Standing::Pair { primary, backup: self.backup });
            }
            Action::Claim { expected } => {
                reach("claim");
                self.claim(expected, Standing::Solo { owner: self.identity.host });
            }
            Action::TellPaired(generation) => {
                reach("paired");
                self.paired = generation;
                self.tell(Message::Paired(generation));
            }
            Action::TellStop => self.tell(Message::Stop),
            Action::TellResync => {
                self.first = true;
                self.tell(Message::Resync);
            }
            Action::Copy => self.begin_copy(),
            // With disks to settle first this takes its time, see `seal_first`.
            Action::Hold if self.disks.is_some() => {}
            Action::Hold => self.guest.hold_output(),
            Action::BeginEpochs => self.begin_epochs(),
            Action::EndEpochs => {
                self.work = Work::Nothing;
                self.end_brake();
                self.disks_copy = false;
                self.disk_job += 1;
                self.call_off_log();
                self.go_on_in_doubt();
            }
            Action::SealHandover => {
                reach("handover");
                self.handover = true;
                if self.in_flight.is_empty() {
                    self.seal();
                }
            }
            Action::Handed(epoch) => {
                self.guest.hand_over_output(epoch);
                self.handover_due = Some(clock::now() + self.timeout() * HANDOVER_TIMEOUTS);
                reach("handed");
                self.status.lock().info.epoch_committed = epoch.0;
            }
            Action::Commit(epoch) => {
                self.guest.commit_output(epoch);
                self.status.lock().info.epoch_committed = epoch.0;
            }
            Action::Pass => self.guest.pass_output(),
            Action::Release => self.release(),
            Action::Degrade => self.degrade(),
            Action::Regain => self.regain(),
            Action::Refuse(reason) => self.refuse(reason),
            Action::Destroy => self.guest.destroy(),
            Action::Keep => {
                // What runs here is at its end in either case: what is kept is its memory.
                self.guest.destroy();
            }
            Action::Close => self.close(),
            Action::Report(report) => self.report(report),
        }
    }

    /// Whether the VM has a backup that may come to own it.
    fn has_peer(&self) -> bool {
        matches!(self.machine.state(), State::Protected | State::HandingOver | State::Calling)
    }

    pub(super) fn release(&mut self) {
        if let Err(error) = self.sealer.release(&mut *self.guest) {
            let line = error.chain();
            self.status.failed(&line);
            tracing::error!("{line}");
        }
    }

    /// Who owns the VM is to be found out, which may take for ever: a guest that stood for room, or for
    /// an epoch that is not sealed, runs meanwhile, unheard. Not one whose memory is being sent as it is
    /// (see [`Engine::end_senders`]), nor one whose last epoch the backup may have.
    pub(super) fn go_on_in_doubt(&mut self) {
        let is_handed = self.handover && self.machine.is_handed();
        if !is_handed && (self.options.cow != Cow::Off || self.unsent == 0) {
            self.release();
        }
    }

    /// What stays here of a VM that was handed over, for whoever wants it back.
    fn leave_legacy(&mut self) {
        if self.options.return_url.is_none() {
            return;
        }
        let is_heir = self.machine.state() == State::Heir;
        let state = self.last_state.take().filter(|_| is_heir);
        let description = match self.guest.describe() {
            Ok(description) => description,
            Err(source) => {
                let error = Error::Guest { what: "describe the VM", source };
                return tracing::warn!("nothing is kept of the VM: {}", error.chain());
            }
        };
        // Pages that are still protected would keep the memory from its next reader.
        self.sealer.let_go();
        self.status.lock().legacy = Some(Legacy {
            identity: self.identity,
            primary: self.backup,
            session: self.id,
            epoch: self.sealed,
            generation: if is_heir { self.machine.generation() } else { self.paired },
            description,
            state,
        });
    }

    fn degrade(&mut self) {
        self.handover = false;
        self.last_state = None;
        self.in_flight.forget();
        if self.options.degrade == Degrade::Pause
            && let Err(source) = self.guest.suspend()
        {
            let line = Error::Guest { what: "keep the guest paused", source }.chain();
            self.status.failed(&line);
            tracing::error!("{line}");
        }
        self.release();
    }

    fn regain(&mut self) {
        if let Err(source) = self.guest.regain() {
            let line = Error::Guest { what: "end the guest's pause", source }.chain();
            self.status.failed(&line);
            tracing::error!("{line}");
        }
    }

    /// Ends the session at once.
    fn close(&mut self) {
        self.end_brake();
        if let Some(control) = self.control.take() {
            drop(control.close());
        }
        self.end_senders();
        if let Some(disks) = &self.disks {
            disks.close();
        }
        self.end_lent();
        self.disks_copy = false;
        self.disk_job += 1;
        self.in_flight.forget();
    }

    /// Ends the data connections. With `cow=off` they may be at the memory of a guest that stands, and an epoch
    /// that they send to its end is one that the backup may go on from: until they are back, as until all is
    /// sent, the guest does not run.
    pub(super) fn end_senders(&mut self) {
        let Some(senders) = self.senders.take() else { return };
        // What they still report belongs to nothing any more.
        self.job += 1;
        let is_read = self.options.cow == Cow::Off && self.work == Work::Nothing && self.unsent > 0;
        self.unsent = usize::from(is_read);
        if !is_read {
            drop(senders.close());
            return;
        }
        let (number, inputs) = (self.job, self.inputs.clone());
        let back = move || {
            // An engine that has ended has let the guest go.
            let _ = inputs.send(Input::Sent(Ok(number)));
        };
        senders.close_and(back);
    }

    /// What the backup may have of this session, for a copy that goes on from there.
    fn rest(&mut self) -> Option<Rest> {
        let (last, dirty) = (self.sealer.sealed(), self.sealer.dirty.pages());
        self.in_flight.rest(&self.machine, self.id, self.paired, self.sealed, (last, dirty))
    }

    fn report(&mut self, report: Report) {
        let event = match report {
            Report::Synced => Told::Synced,
            Report::Resynced => Told::Resynced,
            Report::Reversed => Told::Reversed,
            Report::StillAlone(reason) => return self.status.failed(&reason),
            Report::Degraded(reason) => {
                // Also where a copy anew begins at once.
                self.status.lock().alone = true;
                self.status.failed(&reason);
                self.answer_failover(Err(Error::Failed(reason.clone())));
                Told::Degraded { reason, generation: self.machine.generation() }
            }
            Report::Stopped => Told::Stopped,
            Report::Failed(error) => {
                self.status.failed(&error);
                Told::Failed { error }
            }
            Report::Lost(verdict) => {
                let owner = match verdict {
                    Verdict::Lost(record) => record.to_string(),
                    Verdict::Owned(generation) => format!("generation {generation}, this host"),
                };
                self.status.failed(&format!("Another host owns the VM: {owner}"));
                Told::OwnershipLost { owner }
            }
            Report::FailoverStarted => Told::FailoverStarted {
                reason: "A person hands the VM over".to_owned(),
                generation: self.machine.generation(),
            },
            Report::FailoverFinished => {
                self.leave_legacy();
                let generation = self.machine.generation();
                // First: whoever asked looks at what was told when it has its answer.
                self.observer.event(Told::FailoverFinished { generation });
                return self.answer_failover(Ok(()));
            }
            Report::FailoverFailed(error) => {
                self.status.failed(&error);
                self.answer_failover(Err(Error::Failed(error.clone())));
                Told::FailoverFailed { error }
            }
            Report::Undecided(error) => {
                self.status.failed(&error);
                self.answer_failover(Err(Error::Failed(error.clone())));
                Told::Undecided { error }
            }
        };
        self.observer.event(event);
    }

    fn answer_failover(&mut self, result: Result<(), Error>) {
        let mut result = Some(result);
        for answer in self.failover_answer.drain(..) {
            let again = || Err(Error::Failed("The switch-over has ended".to_owned()));
            // A caller that stopped waiting needs no answer.
            let _ = answer.send(result.take().unwrap_or_else(again));
        }
    }

    /// Shows the machine's state to clients.
    pub(super) fn show(&self) {
        let state = match self.machine.state() {
            State::Syncing | State::Pairing => ReplicationState::Syncing,
            State::Protected if !self.machine.is_protected() => ReplicationState::Syncing,
            State::Calling | State::Protected | State::HandingOver => ReplicationState::Protected,
            State::Claiming(Purpose::Stop) => ReplicationState::Suspended,
            State::Claiming(_) | State::Undecided => ReplicationState::Suspended,
            State::Alone => ReplicationState::Degraded,
            State::Gone | State::Heir => ReplicationState::Lost,
            State::Stopped | State::Failed => ReplicationState::Stopped,
        };
        let held = self.guest.output_held_bytes();
        let mut gathered = self.status.lock();
        if self.machine.state() == State::Alone {
            gathered.alone = true;
            gathered.reconnects &= self.machine.may_go_on();
        }
        // In one breath with the state: who sees it protected sees no attempts to get there.
        if state == ReplicationState::Protected {
            gathered.alone = false;
            gathered.info.sync_progress = 1.0;
            gathered.info.reconnect_attempts = 0;
        }
        gathered.hands_over = matches!(self.machine.state(), State::HandingOver | State::Undecided);
        gathered.info.state = state;
        gathered.info.generation = self.machine.generation().0;
        gathered.info.output_held_bytes = held;
    }

    /// The last things to do, in whatever state it ended.
    pub(super) fn end(mut self, goes_on: bool) -> Option<Rest> {
        let state = self.machine.state();
        if !matches!(state, State::Gone | State::Heir) {
            // For a copy, an epoch or room it stood in this session only.
            self.release();
        }
        let rest = if goes_on { self.rest() } else { None };
        if let Some(disks) = &self.disks {
            disks.detach();
        }
        if !matches!(state, State::Gone | State::Heir)
            && rest.is_none()
            && let Err(source) = self.guest.stop_tracking()
        {
            let line = Error::Guest { what: "end the tracking", source }.chain();
            self.status.failed(&line);
        }
        if let Some(control) = self.control.take() {
            // What was queued, a stop among it, has reached the backup before anybody is told
            // that this is over and lets the process end: a bell that rings without a stop before
            // it is a death.
            control.finish_within(self.timeout());
        }
        if let Some(senders) = self.senders.take() {
            drop(senders.close());
        }
        let patience = self.timeout();
        if let Some(disks) = self.disks.take() {
            disks.end(patience);
        }
        for answer in self.stop_answer.drain(..) {
            let result = match state {
                State::Gone | State::Heir => {
                    Err(Error::Conflict("The backup owns the VM".to_owned()))
                }
                _ => Ok(()),
            };
            // A caller that stopped waiting needs no answer.
            let _ = answer.send(result);
        }
        self.answer_failover(Err(Error::Conflict("Replication has ended".to_owned())));
        rest
    }
}
