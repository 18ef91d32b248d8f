//! What the engine does when its machine says so.

use std::sync::atomic::Ordering;

use api::replication::ReplicationState;

use super::{
    Ask, Base, Built, Engine, Error, Event, Message, Replica, ReplicaBuilder, Sender, State, Told,
};
use crate::backup::apply::apply;
use crate::backup::disks::DiskConnection;
use crate::backup::receive::DataConnection;
use crate::checking::reach;
use crate::engine::now_us;
use crate::ids::{EpochId, Generation};
use crate::ownership::{Record, Standing};
use crate::protocol::backup::{Action, Handover, Report};
use crate::protocol::ownership::{Claim, Verdict};

impl<B: ReplicaBuilder> Engine<B> {
    /// Lets the machine decide and carries it out.
    pub(super) fn step(&mut self, event: Event) {
        self.note_reason(&event);
        #[cfg(any(test, feature = "testing"))]
        let before = self.machine.state();
        let actions = self.machine.step(event);
        #[cfg(any(test, feature = "testing"))]
        crate::engine::trace::backup(before, self.machine.state());
        // An end is shown only once all that it says is so.
        if !matches!(self.machine.state(), State::Idle | State::TakenOver | State::Stopped) {
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

    /// Why a take-over may follow.
    fn note_reason(&mut self, event: &Event) {
        match event {
            Event::Lost(reason) | Event::Bad(reason) => {
                self.status.failed(reason);
                if matches!(self.machine.state(), State::Replica | State::Heir) {
                    let generation = self.machine.generation();
                    tracing::warn!("the primary of generation {generation} is given up: {reason}");
                }
                self.reason.clone_from(reason);
            }
            Event::Unpaired(reason) => self.status.failed(reason),
            Event::FailoverAsked { force } => {
                let insists = if *force { " and insists" } else { "" };
                self.reason = format!("A person asks for it{insists}");
            }
            Event::Verified { handover, .. } if *handover != Handover::No => {
                "The primary hands the VM over".clone_into(&mut self.reason);
            }
            _ => {}
        }
    }

    pub(super) fn tell(&self, message: Message) {
        if let Some(session) = &self.session {
            session.control.send(message);
        }
    }

    /// Tells something that must arrive although the session ends.
    fn tell_last(&mut self, message: Message) {
        self.tell(message);
        if let Some(session) = &mut self.session {
            session.last_word = true;
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Ack { epoch, generation } => {
                self.tell(Message::Ack { epoch, generation });
                reach("acked");
            }
            Action::Apply(epoch) => self.apply(epoch),
            Action::DropStaging => self.drop_staging(),
            Action::TellAbort(reason) => self.tell_last(Message::Abort(reason)),
            Action::TellRefused(reason) => self.tell_last(Message::Refuse(reason)),
            Action::TellStopDone => self.tell_last(Message::StopDone),
            Action::TellHandedOver { generation, reversed } => {
                // Before anybody is told that it is over.
                self.leave_way_back(generation, reversed);
                self.tell_last(Message::HandedOver { generation, reversed });
            }
            Action::TellResyncReady => {
                // What was committed is in the images before a copy goes over it.
                if let Err(error) = self.settle_images() {
                    return self.image_failed(error);
                }
                if let Some(session) = &self.session {
                    session.shared.round.fetch_add(1, Ordering::AcqRel);
                }
                let counters = &self.status.counters;
                counters.synced_pages.store(0, Ordering::Relaxed);
                counters.synced_disk_bytes.store(0, Ordering::Relaxed);
                self.tell(Message::ResyncReady);
            }
            Action::Close => self.close(),
            Action::Claim { expected } => {
                reach("claim");
                // Whoever claims can run: a primary that lives must not lose its VM to an image
                // that is not whole.
                if let Err(error) = self.settle_images() {
                    return self.image_failed(error);
                }
                self.claim(expected, Standing::Solo { owner: self.identity().host });
            }
            Action::ClaimReversed { expected } => {
                reach("claim");
                let Some(session) = &self.session else {
                    // Nobody knows whom to make a pair with. The claim is not made, and the primary goes on.
                    return self.image_failed("The switch-over's session has ended".to_owned());
                };
                let (primary, backup) = (self.identity().host, session.primary);
                self.claim(expected, Standing::Pair { primary, backup });
            }
            Action::Discard => {
                // The images first: they are the replica's, and free once it is gone.
                self.images = None;
                self.replica = None;
                self.state = None;
                self.built = None;
                self.base = None;
            }
            Action::Keep { generation, committed } => self.keep(generation, committed),
            Action::Start => self.start(false),
            Action::StartHeld => self.start(true),
            Action::Refuse(reason) => {
                if let Some(answer) = self.failover_answer.pop() {
                    // A caller that stopped waiting needs no answer.
                    let _ = answer.send(Err(Error::Conflict(reason)));
                }
            }
            Action::Report(report) => self.report(report),
        }
    }

    fn claim(&mut self, expected: Generation, standing: Standing) {
        let next = Record { generation: expected.next(), vm: self.identity().vm, standing };
        let (claim, first) = Claim::new(expected, next);
        let next = self.asker.begin(claim, first);
        self.claim_went(next);
    }

    /// What was committed stays in memory, with nothing to start it from.
    fn keep(&mut self, generation: Generation, committed: EpochId) {
        self.images = None;
        self.state = None;
        let (Some(replica), Some(built)) = (self.replica.take(), self.built.take()) else { return };
        let Built { primary, vm, session, description } = built;
        tracing::info!("the memory of epoch {committed} is kept for its primary to go on from");
        self.base =
            Some(Base { replica, primary, vm, session, generation, committed, description });
    }

    fn apply(&mut self, epoch: EpochId) {
        let Some(verified) = self.verified.take() else { return };
        assert_eq!(verified.seal.epoch, epoch, "what was verified is what is applied");
        if let Some((_, images)) = &self.images {
            images.apply(verified.disks.changes);
        }
        let Some(session) = &self.session else { return };
        for (part, connection) in verified.parts.into_iter().zip(&session.data) {
            apply(&session.shared.ram, &part.runs, &part.bytes)
                .expect("every run was checked against the memory when it arrived");
            if let Some(connection) = connection {
                // Full or gone: the buffer is simply freed.
                let _ = connection.spare.try_send(part);
            }
        }
        reach("applied");
        if let Some(equality) = &self.equality {
            equality.applied(&session.shared.ram, epoch.0);
        }
    }

    fn drop_staging(&mut self) {
        self.verified = None;
        self.pairing = None;
        if let Some(session) = &mut self.session {
            // What receivers are still filling keeps its place: a peer that asks for this again and
            // again must not get more than all of it.
            let cost_bytes = session.gather.clear();
            session.shared.budget.give_back(cost_bytes);
        }
    }

    /// Ends the session; what was told last still reaches the primary.
    pub(super) fn close(&mut self) {
        let Some(mut session) = self.session.take() else { return };
        // What is known to be gone is closed at once; threads end by themselves.
        if session.last_word {
            drop(session.control.finish());
        } else {
            drop(session.control.close());
        }
        if let Some(bell) = &session.bell {
            bell.close();
        }
        end_data(session.data.drain(..).flatten(), session.disks.take());
        // Of a copy, should it have been one, nothing is to be shown.
        let counters = &self.status.counters;
        counters.to_sync_pages.store(0, Ordering::Relaxed);
        counters.to_sync_disk_bytes.store(0, Ordering::Relaxed);
    }

    /// Waits for the images: everything committed is in them, durably, or they are of no use.
    fn settle_images(&self) -> Result<(), String> {
        self.images.as_ref().map_or(Ok(()), |(_, images)| images.settle())
    }

    fn start(&mut self, is_held: bool) {
        self.times.owned_us = now_us();
        let (Some(replica), Some(state)) = (self.replica.take(), self.state.take()) else {
            unreachable!("the machine starts only what was committed");
        };
        // Nothing is committed before it is shut, and nothing opens it once something is.
        assert!(self.is_shut(), "an image that the primary may write is started");
        if let Err(error) = self.settle_images() {
            self.images = None;
            return self.step(Event::StartFailed(error));
        }
        // The machine's own threads write memory and images from here on. Of a session that is kept, to
        // tell the primary that it was handed over, the control connection is enough.
        if let Some(session) = &mut self.session {
            end_data(session.data.iter_mut().filter_map(Option::take), session.disks.take());
        }
        self.images = None;
        let held = self.way_back.clone().filter(|_| is_held);
        if is_held {
            if held.is_none() {
                let error = "Nothing says how the old host is called: its output would leave";
                return self.step(Event::StartFailed(error.to_owned()));
            }
            // Before the machine is anybody's: whoever has one whose output is held can call the old host.
            self.leave_way_back(self.machine.generation(), true);
        }
        reach("start");
        match replica.start(state, held.as_ref()) {
            Ok(()) => {
                reach("started");
                self.times.resumed_us = now_us();
                self.status.lock().info.takeover = Some(self.times);
                self.step(Event::Started);
            }
            Err(source) => {
                let error = Error::Guest { what: "start the replica", source };
                self.step(Event::StartFailed(error.chain()));
            }
        }
    }

    pub(super) fn asked(&mut self, ask: Ask, answer: Sender<Result<(), Error>>) {
        match ask {
            Ask::Failover { force } => {
                self.failover_answer.push(answer);
                self.step(Event::FailoverAsked { force });
            }
            Ask::Stop => {
                if !matches!(self.machine.state(), State::Claiming | State::Starting) {
                    self.step(Event::StopAsked);
                }
                let why = match self.machine.state() {
                    State::Stopped => None,
                    State::TakenOver => Some("this host has taken the VM over (TakenOver)"),
                    _ => Some("a take-over is under way (TakingOver): wait for its end"),
                };
                let refused = |why| format!("The reception cannot be ended: {why}");
                let result = why.map_or(Ok(()), |why| Err(Error::Conflict(refused(why))));
                // A caller that stopped waiting needs no answer.
                let _ = answer.send(result);
            }
        }
    }

    fn answer_failover(&mut self, result: impl Fn() -> Result<(), Error>) {
        for answer in self.failover_answer.drain(..) {
            // A caller that stopped waiting needs no answer.
            let _ = answer.send(result());
        }
    }

    fn report(&mut self, report: Report) {
        let event = match report {
            Report::SessionFailed(error) => Told::ReceiveFailed { error },
            Report::Released | Report::Stopped => Told::Stopped,
            Report::FailoverStarted => {
                self.times.detected_us = now_us();
                let reason = self.reason.clone();
                Told::FailoverStarted { reason, generation: self.machine.generation() }
            }
            Report::FailoverFinished => {
                let generation = self.machine.generation();
                // First: whoever asked looks at what was told when it has its answer.
                self.observer.event(Told::FailoverFinished { generation });
                return self.answer_failover(|| Ok(()));
            }
            Report::FailoverFailed(error) => {
                self.status.failed(&error);
                self.answer_failover(|| Err(Error::Failed(error.clone())));
                Told::FailoverFailed { error }
            }
            Report::Lost(verdict) => {
                let owner = match verdict {
                    Verdict::Lost(record) => record.to_string(),
                    Verdict::Owned(generation) => format!("generation {generation}, this host"),
                };
                let error = format!("Another host owns the VM: {owner}");
                self.status.failed(&error);
                self.answer_failover(|| Err(Error::Conflict(error.clone())));
                Told::OwnershipLost { owner }
            }
        };
        self.observer.event(event);
    }

    /// Shows the machine's state to clients.
    pub(super) fn show(&self) {
        let mut gathered = self.status.lock();
        let committed = self.machine.committed();
        gathered.info.epoch_committed = committed.unwrap_or_default().0;
        gathered.info.sync_progress = if committed.is_some() { 1.0 } else { 0.0 };
        if self.machine.state() == State::Idle {
            gathered.info.epoch_sealed = 0;
        }
        gathered.info.generation = self.machine.generation().0;
        gathered.info.state = match self.machine.state() {
            State::Idle => ReplicationState::Disconnected,
            State::Syncing => ReplicationState::Syncing,
            State::Replica | State::Heir => ReplicationState::Protected,
            State::Claiming | State::Starting => ReplicationState::TakingOver,
            State::Orphan => ReplicationState::Suspended,
            State::TakenOver => ReplicationState::TakenOver,
            State::Stopped => ReplicationState::Stopped,
        };
    }
}

/// Ends data connections and waits for their threads: they hold the replica's memory, which must be
/// nobody else's before it runs or another is built.
fn end_data(data: impl Iterator<Item = DataConnection>, disks: Option<DiskConnection>) {
    let mut threads: Vec<_> = data.filter_map(DataConnection::close).collect();
    threads.extend(disks.map(DiskConnection::close));
    for thread in threads {
        if thread.join().is_err() {
            tracing::error!("A receiver panicked");
        }
    }
}
