//! What the engine does when its machine says so.

use super::{
    Action, Degrade, Engine, Error, Event, Guest, Message, Report, Standing, State, Told, Work,
};
use crate::checking::reach;
use crate::protocol::ownership::Verdict;
use crate::protocol::primary::Purpose;
use api::replication::ReplicationState;

impl<G: Guest> Engine<G> {
    /// Lets the machine decide and carries it out.
    pub(super) fn step(&mut self, event: Event) {
        let actions = self.machine.step(event);
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
                self.disks_copy = false;
                self.disk_job += 1;
                self.call_off_log();
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
            Action::Destroy => self.guest.destroy(),
            Action::Close => self.close(),
            Action::Report(report) => self.report(report),
        }
    }

    fn release(&mut self) {
        if let Err(error) = self.sealer.release(&mut self.guest) {
            let line = error.chain();
            self.status.failed(&line);
            tracing::error!("{line}");
        }
    }

    fn degrade(&mut self) {
        self.handover = false;
        self.in_flight.clear();
        if self.options.degrade == Degrade::Pause
            && let Err(source) = self.guest.suspend()
        {
            let line = Error::Guest { what: "keep the guest paused", source }.chain();
            self.status.failed(&line);
            tracing::error!("{line}");
        }
        self.release();
    }

    /// Ends the session at once.
    fn close(&mut self) {
        if let Some(control) = self.control.take() {
            drop(control.close());
        }
        if let Some(senders) = self.senders.take() {
            drop(senders.close());
        }
        if let Some(disks) = &self.disks {
            disks.close();
        }
        self.disks_copy = false;
        self.disk_job += 1;
        // What the senders still report belongs to nothing any more.
        self.job += 1;
        self.unsent = 0;
        self.in_flight.clear();
    }

    fn report(&mut self, report: Report) {
        let event = match report {
            Report::Synced => {
                self.status.lock().info.sync_progress = 1.0;
                Told::Synced
            }
            Report::Resynced => {
                self.status.lock().info.sync_progress = 1.0;
                Told::Resynced
            }
            Report::Degraded(reason) => {
                self.status.failed(&reason);
                self.answer_failover(Err(Error::Failed(reason.clone())));
                Told::Degraded { reason }
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
            Report::FailoverStarted => Told::FailoverStarted,
            Report::FailoverFinished => {
                self.answer_failover(Ok(()));
                Told::FailoverFinished
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
    fn show(&self) {
        let state = match self.machine.state() {
            State::Syncing | State::Pairing => ReplicationState::Syncing,
            State::Protected if !self.machine.is_protected() => ReplicationState::Syncing,
            State::Protected | State::HandingOver => ReplicationState::Protected,
            State::Claiming(Purpose::Stop) => ReplicationState::Suspended,
            State::Claiming(_) | State::Undecided => ReplicationState::Suspended,
            State::Alone => ReplicationState::Degraded,
            State::Gone => ReplicationState::Lost,
            State::Stopped | State::Failed => ReplicationState::Stopped,
        };
        let held = self.guest.output_held_bytes();
        let mut gathered = self.status.lock();
        gathered.info.state = state;
        gathered.info.generation = self.machine.generation().0;
        gathered.info.output_held_bytes = held;
    }

    /// The last things to do, in whatever state it ended.
    pub(super) fn end(mut self) {
        let state = self.machine.state();
        if let Some(disks) = &self.disks {
            disks.detach();
        }
        if state != State::Gone
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
                State::Gone => Err(Error::Conflict("The backup owns the VM".to_owned())),
                _ => Ok(()),
            };
            // A caller that stopped waiting needs no answer.
            let _ = answer.send(result);
        }
        self.answer_failover(Err(Error::Conflict("Replication has ended".to_owned())));
    }
}
