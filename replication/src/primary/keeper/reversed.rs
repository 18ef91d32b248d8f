//! The first session of a VM whose pair was reversed: its old host is its backup already, and is called.
//!
//! ```text
//!   Calling --reached--> a session (the engine), as any other
//!      | not reached within the time-out, refused, stopped
//!      v
//!   the arbiter is asked for SOLO --owned--> Waiting (alone), or ended by a person
//!      | lost
//!      v
//!    the guest is destroyed
//! ```
//!
//! Enters: a guest that runs with its output held, and the machine that says why. Leaves: a session, or a
//! guest that is alone, or none. Always holds: nothing of the guest leaves in here but after a won claim.
//! Should the old host take the VM over meanwhile, it goes on from the last epoch of the switch-over, and
//! nobody has heard what happened since.

use std::time::{Duration, Instant};

use api::replication::{Degrade, ReplicationState};
use crossbeam_channel::{Receiver, Sender};

use super::{Ask, Begin, Called, Checked, Engine, Error, Event, Guest, Input, Keeper, Waits, Word};
use crate::engine::arbiter::{Asker, Next};
use crate::ids::Generation;
use crate::ownership::{Arbiter, Record, Standing};
use crate::protocol::ownership::{Claim, Verdict};
use crate::protocol::primary::{Action, Event as Step, Primary, Report, State};

/// Longest wait between two calls: output waits for the answer.
const WAIT_MAX: Duration = Duration::from_millis(20);

/// Why the calling has ended without a session.
enum Unreached {
    /// A person ended the protection.
    Stopped(Sender<Result<(), Error>>),
    Lost(String),
}

impl<G: Guest> Keeper<G> {
    /// Works until the protection has ended for good.
    pub(in crate::primary) fn run_reversed(mut self, machine: Primary, queue: Receiver<Input>) {
        // It was won in place of a pair that both sides had seen.
        self.seen.raise(machine.generation());
        let (unreached, queue) = match self.reach(&machine, queue) {
            Ok((called, queue)) => match self.reversed_session(called, &machine, &queue) {
                Ok(goes_on) => return self.keep_if(goes_on.then_some(queue)),
                Err(error) => (Unreached::Lost(error.chain()), queue),
            },
            Err((unreached, queue)) => (unreached, queue),
        };
        let goes_on = self.decide(machine, unreached, &queue);
        self.keep_if(goes_on.then_some(queue));
    }

    /// Goes on as any VM that has lost its backup, or ends.
    fn keep_if(mut self, queue: Option<Receiver<Input>>) {
        match queue {
            Some(queue) => self.keep(queue, Waits::new()),
            None => self.end_tracking(),
        }
    }

    /// Calls the old host until it answers, or for the time-out.
    fn reach(
        &mut self,
        machine: &Primary,
        mut queue: Receiver<Input>,
    ) -> Result<(Called, Receiver<Input>), (Unreached, Receiver<Input>)> {
        let until = Instant::now() + Duration::from_millis(self.options.timeout_ms);
        let mut waits = Waits::soon();
        loop {
            queue = self.mailbox.renew(&queue);
            let begun = Checked::new(self.options.clone(), None)
                .and_then(|checked| self.begin_call(checked, true));
            let answer = match begun {
                Ok(()) => self.wait(&queue, Some(until)),
                Err(error) => Word::Called(Box::new(Err(error))),
            };
            let error = match answer {
                Word::Stop(answer) => return Err((Unreached::Stopped(answer), queue)),
                Word::Timer => self.silent(),
                Word::Called(called) => match *called {
                    Ok(called)
                        if called.generation == machine.generation() && called.has_base() =>
                    {
                        return Ok((called, queue));
                    }
                    Ok(_) => Error::Conflict("The record, or the backup, is another one".into()),
                    Err(error) => error,
                },
            };
            // A host that answers and is not the heir will not become it. Whatever else there is may
            // pass, an old view of the record among it, or an earlier call that has not ended there.
            let is_final = matches!(error, Error::Unfit(_));
            let next = Instant::now() + waits.next().min(WAIT_MAX);
            if is_final || next >= until {
                let reason = format!("The VM's old host is not its backup: {}", error.chain());
                return Err((Unreached::Lost(reason), queue));
            }
            tracing::debug!("the VM's old host is called again: {}", error.chain());
            if let Word::Stop(answer) = self.wait(&queue, Some(next)) {
                return Err((Unreached::Stopped(answer), queue));
            }
        }
    }

    fn silent(&self) -> Error {
        Error::Silent { silent_ms: self.options.timeout_ms }
    }

    /// The session that goes on from the switch-over; whether another may follow it.
    fn reversed_session(
        &mut self,
        called: Called,
        machine: &Primary,
        queue: &Receiver<Input>,
    ) -> Result<bool, Error> {
        let engine = Engine::open(
            &mut self.guest,
            called,
            self.identity,
            (std::sync::Arc::clone(&self.observer), self.status.clone()),
            (self.mailbox.inputs(), queue.clone()),
            Begin::Reversed(machine.clone()),
            (&mut self.rest, self.seen.clone()),
        )?;
        match engine.run() {
            Some(ended) => {
                self.goes_on_from(ended);
                Ok(true)
            }
            None => Ok(false),
        }
    }

    /// Asks the arbiter for the VM, alone; whether it is this host's and a backup is called again.
    fn decide(&mut self, machine: Primary, why: Unreached, queue: &Receiver<Input>) -> bool {
        let mut deciding = Deciding { machine, asker: None, retry_at: None, stops: vec![] };
        let event = match why {
            Unreached::Stopped(answer) => {
                deciding.stops.push(answer);
                Step::StopAsked
            }
            Unreached::Lost(reason) => {
                self.status.failed(&reason);
                Step::PeerLost(reason)
            }
        };
        self.step(&mut deciding, event);
        while matches!(deciding.machine.state(), State::Claiming(_)) {
            self.claim_on(&mut deciding, queue);
        }
        self.seen.raise(deciding.machine.generation());
        let state = deciding.machine.state();
        for answer in deciding.stops {
            let answered = match state {
                State::Stopped => Ok(()),
                _ => Err(Error::Conflict("The backup owns the VM".to_owned())),
            };
            // A caller that stopped waiting needs no answer.
            let _ = answer.send(answered);
        }
        state == State::Alone && self.options.reconnect && deciding.machine.may_go_on()
    }

    /// One more thing that happens while the arbiter is asked.
    fn claim_on(&mut self, deciding: &mut Deciding, queue: &Receiver<Input>) {
        let far = Instant::now() + Duration::from_secs(3600);
        match queue.recv_deadline(deciding.retry_at.unwrap_or(far)) {
            Ok(Input::Arbiter(report)) => {
                if let Some(error) = &report.error {
                    self.undecided(error);
                }
                let next = deciding.asker.as_mut().map(|asker| asker.report(&report));
                self.claim_went(deciding, next);
            }
            Ok(Input::Ask(Ask::Stop { .. }, answer)) => {
                deciding.stops.push(answer);
                self.step(deciding, Step::StopAsked);
            }
            Ok(Input::Ask(Ask::Failover { .. }, answer)) => {
                let actions = deciding.machine.step(Step::FailoverAsked { reversal: None });
                let Some(Action::Refuse(reason)) = actions.into_iter().next() else { return };
                let _ = answer.send(Err(Error::Conflict(reason)));
            }
            // Of a call that was given up.
            Ok(_) => {}
            Err(_) => {
                deciding.retry_at = None;
                let next = match &mut deciding.asker {
                    Some(asker) => Some(asker.timer()),
                    None => self.begin_claim(deciding),
                };
                self.claim_went(deciding, next);
            }
        }
    }

    fn claim_went(&mut self, deciding: &mut Deciding, next: Option<Next>) {
        match next {
            Some(Next::Wait { ms }) => {
                deciding.retry_at = Some(Instant::now() + Duration::from_millis(ms));
            }
            Some(Next::Decided(verdict)) => self.step(deciding, Step::of(verdict, self.identity)),
            Some(Next::Call(..) | Next::Nothing | Next::Record(_) | Next::ReadFailed) | None => {}
        }
    }

    /// An arbiter that cannot be had yet is asked for again.
    fn begin_claim(&mut self, deciding: &mut Deciding) -> Option<Next> {
        let expected = deciding.machine.generation();
        match self.asker() {
            Ok(asker) => {
                let asker = deciding.asker.insert(asker);
                let generation = expected.next();
                let standing = Standing::Solo { owner: self.identity.host };
                let next = Record { generation, vm: self.identity.vm, standing };
                let (claim, first) = Claim::new(expected, next);
                Some(asker.begin(claim, first))
            }
            Err(error) => {
                self.undecided(&error.chain());
                Some(Next::Wait { ms: super::WAIT_MS_LAST })
            }
        }
    }

    fn asker(&self) -> Result<Asker, Error> {
        let arbiter: Option<Box<dyn Arbiter>> = Checked::new(self.options.clone(), None)?.arbiter;
        let inputs = self.mailbox.inputs();
        Asker::start(arbiter, move |report| inputs.send(Input::Arbiter(report)).is_ok())
    }

    fn undecided(&self, error: &str) {
        let is_news = self.status.lock().info.last_error.as_deref() != Some(error);
        self.status.failed(error);
        if is_news {
            self.observer.event(Event::Undecided { error: error.to_owned() });
        }
    }

    /// Lets the machine decide and carries it out.
    fn step(&mut self, deciding: &mut Deciding, event: Step) {
        let actions = deciding.machine.step(event);
        self.show(&deciding.machine);
        for action in actions {
            match action {
                Action::Claim { .. } => {
                    let next = self.begin_claim(deciding);
                    self.claim_went(deciding, next);
                }
                Action::Pass => self.guest.pass_output(),
                Action::Degrade => self.degrade(),
                Action::Destroy => self.guest.destroy(),
                Action::Report(report) => self.report(report),
                // There is no session, and the guest stands for nothing.
                _ => {}
            }
        }
    }

    fn degrade(&mut self) {
        if self.options.degrade == Degrade::Pause
            && let Err(source) = self.guest.suspend()
        {
            let line = Error::Guest { what: "keep the guest paused", source }.chain();
            self.status.failed(&line);
            tracing::error!("{line}");
        }
    }

    fn show(&self, machine: &Primary) {
        let mut gathered = self.status.lock();
        gathered.info.generation = machine.generation().0;
        gathered.info.state = match machine.state() {
            State::Alone => ReplicationState::Degraded,
            State::Gone => ReplicationState::Lost,
            State::Stopped => ReplicationState::Stopped,
            _ => ReplicationState::Suspended,
        };
        if machine.state() == State::Alone {
            gathered.alone = true;
            gathered.reconnects &= machine.may_go_on();
        }
    }

    fn report(&self, report: Report) {
        let event = match report {
            Report::Degraded(reason) => {
                self.status.failed(&reason);
                let generation = Generation(self.status.lock().info.generation);
                Event::Degraded { reason, generation }
            }
            Report::Lost(verdict) => {
                let owner = match verdict {
                    Verdict::Lost(record) => record.to_string(),
                    Verdict::Owned(Generation(generation)) => format!("generation {generation}"),
                };
                self.status.failed(&format!("Another host owns the VM: {owner}"));
                Event::OwnershipLost { owner }
            }
            Report::Stopped => Event::Stopped,
            other => return tracing::debug!("{other:?}"),
        };
        self.observer.event(event);
    }
}

/// A claim under way without a session.
struct Deciding {
    machine: Primary,
    /// `None` until an arbiter is there to be asked.
    asker: Option<Asker>,
    retry_at: Option<Instant>,
    /// People who ended the protection meanwhile.
    stops: Vec<Sender<Result<(), Error>>>,
}
