//! Keeps a guest protected: one session after the other, with the same backup.
//!
//! ```text
//!   Calling --accepted--> a session (the engine) --alone--> Waiting --timer--> Calling
//!      | first call fails       | stopped, gone, failed        | stopped
//!      v                        v                              v
//!    ended                    ended                          ended
//! ```
//!
//! Enters: a guest, options, what a person asks meanwhile. Leaves: sessions, and between them an
//! attempt after each wait. Always holds: a person is heard in every one of these, since what may
//! block (the arbiter's storage, the peer, a device) is done by a thread of its own; a VM that was
//! never protected is not called for again, and neither is a backup whose refusal is one that time
//! does not change, unless it refuses TCP in place of RDMA.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use api::replication::{ReplicateData, ReplicationState};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, unbounded};

use super::engine::{Ask, Begin, Called, Ended, Engine, Input, call};
use super::options::Checked;
use super::rest::Rest;
use super::session;
use crate::engine::spawn;
use crate::engine::status::Status;
use crate::error::Error;
use crate::guest::Guest;
use crate::log::Log;
use crate::observer::{Event, Observer};
use crate::ownership::{HostIdentity, Seen};
use crate::transport::rdma;

/// First wait before an attempt; doubles up to the last.
const WAIT_MS_FIRST: u64 = 100;
const WAIT_MS_LAST: u64 = 5000;
/// How often the device that has the guest's memory is looked at while a call goes on.
const LOOKS: Duration = Duration::from_secs(5);
/// First wait where the peer is well and about to listen.
const WAIT_MS_SOON: u64 = 5;

/// How long a backup may refuse a call by TCP because it has not noticed the end of the one by RDMA, in
/// peer timeouts, and at least: its device may hang.
const FALLBACK_TIMEOUTS: u32 = 4;
const FALLBACK_MIN: Duration = Duration::from_secs(5);

/// Where a person's requests go: to whoever reads the present queue.
#[derive(Clone)]
pub(super) struct Mailbox(Arc<Mutex<Sender<Input>>>);

impl Mailbox {
    pub(super) fn new() -> (Self, Receiver<Input>) {
        let (inputs, queue) = unbounded();
        (Self(Arc::new(Mutex::new(inputs))), queue)
    }

    /// Whether somebody will read it.
    pub(super) fn send(&self, input: Input) -> bool {
        self.lock().send(input).is_ok()
    }

    fn inputs(&self) -> Sender<Input> {
        self.lock().clone()
    }

    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.lock().len()
    }

    /// A new queue, in which nothing is of an older session but what a person asked.
    fn renew(&self, old: &Receiver<Input>) -> Receiver<Input> {
        let mut inputs = self.lock();
        let queue;
        (*inputs, queue) = unbounded();
        for input in old.try_iter() {
            if matches!(input, Input::Ask(..)) {
                // Its receiver is here.
                let _ = inputs.send(input);
            }
        }
        queue
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Sender<Input>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The waits between attempts.
#[derive(Debug)]
struct Waits {
    next_ms: u64,
}

impl Waits {
    fn new() -> Self {
        Self { next_ms: WAIT_MS_FIRST }
    }

    /// For a peer that is about to listen.
    fn soon() -> Self {
        Self { next_ms: WAIT_MS_SOON }
    }

    fn next(&mut self) -> Duration {
        let ms = self.next_ms;
        self.next_ms = (ms * 2).min(WAIT_MS_LAST);
        Duration::from_millis(ms)
    }
}

/// What ends a wait.
enum Word {
    Timer,
    Called(Box<Result<Called, Error>>),
    Stop(Sender<Result<(), Error>>),
}

pub(super) struct Keeper<G: Guest> {
    pub(super) guest: G,
    pub(super) options: ReplicateData,
    pub(super) identity: HostIdentity,
    /// What this process knows of the VM's record, whichever session learnt it.
    pub(super) seen: Seen,
    pub(super) observer: Arc<dyn Observer>,
    pub(super) status: Status,
    pub(super) mailbox: Mailbox,
    /// What the backup may still have; with it the tracking of dirty pages is on.
    pub(super) rest: Option<Rest>,
    /// Why data goes by TCP in the next session although the URL is `rdma:`. The one after that tries RDMA
    /// again.
    pub(super) fell_back: Option<String>,
    pub(super) falls: Log,
    /// The guest's memory, as one session by RDMA leaves it to the next.
    pub(super) registered: rdma::Registered,
}

impl<G: Guest> Keeper<G> {
    /// Works until the protection has ended for good. `verdict` is told how the first call went.
    pub(super) fn run(
        mut self,
        checked: Checked,
        queue: Receiver<Input>,
        verdict: &Sender<Result<(), Error>>,
    ) {
        let (called, queue) = self.called(checked, &queue);
        let first = match called {
            Ok(Some(called)) => self.session(called, queue, Some(verdict)),
            Ok(None) => {
                let _ = verdict.send(Err(Error::Conflict("The replication was ended".to_owned())));
                None
            }
            Err(error) => {
                self.failed(error, Some(verdict));
                None
            }
        };
        if let Some(queue) = first {
            self.keep(queue, Waits::new());
        }
    }

    /// As [`Keeper::run`], for a VM that is alone and whose backup is about to listen.
    pub(super) fn run_alone(mut self, queue: Receiver<Input>) {
        self.keep(queue, Waits::soon());
    }

    /// One session after the other, until there is none any more.
    fn keep(&mut self, mut queue: Receiver<Input>, mut waits: Waits) {
        while let Some(next) = self.again(queue, waits) {
            (queue, waits) = (next, Waits::new());
        }
        self.end_tracking();
    }

    fn end_tracking(&mut self) {
        if self.rest.take().is_some()
            && let Err(source) = self.guest.stop_tracking()
        {
            self.status.failed(&Error::Guest { what: "end the tracking", source }.chain());
        }
    }

    /// Tries until there is a session, and works in that; `None` once it is over for good.
    fn again(&mut self, mut queue: Receiver<Input>, mut waits: Waits) -> Option<Receiver<Input>> {
        let mut log = Log::default();
        loop {
            match self.wait(&queue, Some(Instant::now() + waits.next())) {
                Word::Stop(answer) => return self.stopped(&answer),
                Word::Timer | Word::Called(_) => {}
            }
            self.status.lock().info.reconnect_attempts += 1;
            self.look_at_device();
            // They were good before: a certificate is being renewed, or its storage is away.
            let checked = match Checked::new(self.options.clone(), self.fell_back.as_deref()) {
                Ok(checked) => checked,
                Err(error) => {
                    let line = error.chain();
                    self.status.failed(&line);
                    tell(&mut log, &line);
                    continue;
                }
            };
            let (called, next) = self.called(checked, &queue);
            queue = next;
            let error = match called {
                Ok(Some(called)) => {
                    queue = self.session(called, queue, None)?;
                    if self.status.lock().info.reconnect_attempts == 0 {
                        // It was protected in between: what failed now is another story.
                        return Some(queue);
                    }
                    let said = self.status.lock().info.last_error.clone();
                    tell(&mut log, &said.unwrap_or_default());
                    continue;
                }
                Ok(None) => return None,
                Err(error) => error,
            };
            if !error.may_pass() && !self.is_for_tcp_only(&error) {
                self.failed(error, None);
                return None;
            }
            let line = error.chain();
            self.status.failed(&line);
            tell(&mut log, &line);
        }
    }

    /// Calls the backup beside this thread, with a queue of its own; `None` if a person ended that.
    fn called(
        &mut self,
        checked: Checked,
        queue: &Receiver<Input>,
    ) -> (Result<Option<Called>, Error>, Receiver<Input>) {
        let queue = self.mailbox.renew(queue);
        let called = self.call(checked, &queue);
        match called {
            Err(Error::NoRdma(why)) => {
                self.fall_back(&why.chain());
                self.called_by_tcp(queue)
            }
            called => (called, queue),
        }
    }

    /// Calls the backup at once, which may still be busy with what did not come about.
    fn called_by_tcp(
        &mut self,
        mut queue: Receiver<Input>,
    ) -> (Result<Option<Called>, Error>, Receiver<Input>) {
        let patience = FALLBACK_TIMEOUTS * Duration::from_millis(self.options.timeout_ms);
        let until = Instant::now() + patience.max(FALLBACK_MIN);
        let mut waits = Waits::new();
        loop {
            let checked = Checked::new(self.options.clone(), self.fell_back.as_deref());
            queue = self.mailbox.renew(&queue);
            let error = match checked {
                Ok(checked) => match self.call(checked, &queue) {
                    Err(error @ Error::Refused(_)) => error,
                    called => return (called, queue),
                },
                // They were good before, see `again`: it passes, as a refusal does.
                Err(error) => {
                    let line = error.chain();
                    self.status.failed(&line);
                    Error::Failed(line)
                }
            };
            if Instant::now() >= until {
                return (Err(error), queue);
            }
            if let Word::Stop(answer) = self.wait(&queue, Some(Instant::now() + waits.next())) {
                self.stopped(&answer);
                return (Ok(None), queue);
            }
        }
    }

    /// Whether it is a call by TCP in place of RDMA that was refused for good: the next one is by RDMA, and
    /// may do better. This backup may not allow TCP, and it had the VM by RDMA before.
    fn is_for_tcp_only(&mut self, error: &Error) -> bool {
        matches!(error, Error::Unfit(_)) && self.fell_back.take().is_some()
    }

    /// TCP takes over, for this reason.
    fn fall_back(&mut self, reason: &str) {
        if self.fell_back.as_deref() != Some(reason) && self.falls.is_news(reason, Instant::now()) {
            tracing::warn!("data goes by TCP, not by RDMA: {reason}");
        }
        self.fell_back = Some(reason.to_owned());
        // Nobody hears what the device says meanwhile.
        self.registered.put(None);
    }

    /// Whether the device may keep the guest's memory, while no session hears it.
    fn look_at_device(&self) {
        if !self.registered.look(rdma::CHECK_PATIENCE)
            && let Some(path) = &mut self.status.lock().info.rdma
        {
            path.registered_bytes = 0;
        }
    }

    /// What carries the data of the next session, and why it is not what the URL says.
    fn show_transport(&self, transport: &str) {
        let mut gathered = self.status.lock();
        gathered.info.transport = Some(transport.to_owned());
        gathered.info.fallback_reason.clone_from(&self.fell_back);
        if self.fell_back.is_some() {
            gathered.info.rdma = None;
        }
    }

    /// Has a thread call the backup; its answer goes into the present queue.
    fn begin_call(&mut self, checked: Checked, reversed: bool) -> Result<(), Error> {
        let base = self.rest.as_ref().map(Rest::base);
        if let Some(reason) = &checked.fell_back {
            self.fall_back(reason);
        }
        self.show_transport(checked.transport());
        let way = (checked.rdma.is_some(), checked.fell_back.as_deref());
        let offer = session::offer(&mut self.guest, &checked.options, way, base, reversed)?;
        let (identity, status, inputs) =
            (self.identity, self.status.clone(), self.mailbox.inputs());
        let (seen, finds) = (self.seen.clone(), self.registered.finds());
        spawn("repl-call", None, move || {
            let called = call(checked, offer, identity, status, (&seen, finds));
            // Nobody listens: what was made ends here.
            let _ = inputs.send(Input::Called(Box::new(called)));
        })?;
        Ok(())
    }

    fn call(&mut self, checked: Checked, queue: &Receiver<Input>) -> Result<Option<Called>, Error> {
        self.begin_call(checked, false)?;
        match self.wait(queue, None) {
            Word::Called(called) => called.map(Some),
            Word::Stop(answer) => {
                self.stopped(&answer);
                Ok(None)
            }
            Word::Timer => unreachable!("there is none"),
        }
    }

    /// Waits for the answer to a call, or for a moment, and serves people meanwhile.
    fn wait(&self, queue: &Receiver<Input>, until: Option<Instant>) -> Word {
        loop {
            match queue.recv_deadline(until.unwrap_or_else(|| Instant::now() + LOOKS)) {
                Ok(Input::Called(called)) => return Word::Called(called),
                Ok(Input::Ask(Ask::Stop { .. }, answer)) => return Word::Stop(answer),
                Ok(Input::Ask(Ask::Failover { .. }, answer)) => {
                    let what = match self.status.lock().alone {
                        true => "this host runs it without a backup, which is called (Degraded)",
                        false => "the backup was called and has not answered yet (Disconnected)",
                    };
                    let error = Error::Conflict(format!("The VM cannot be handed over: {what}"));
                    // A caller that stopped waiting needs no answer.
                    let _ = answer.send(Err(error));
                }
                // Of a session that has ended.
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) if until.is_none() => self.look_at_device(),
                Err(RecvTimeoutError::Timeout) => return Word::Timer,
                Err(RecvTimeoutError::Disconnected) => {
                    unreachable!("the mailbox holds a sender")
                }
            }
        }
    }

    /// One session, to its end; `None` if that was the last one. `verdict`: it is the first.
    fn session(
        &mut self,
        called: Called,
        queue: Receiver<Input>,
        verdict: Option<&Sender<Result<(), Error>>>,
    ) -> Option<Receiver<Input>> {
        let inputs = self.mailbox.inputs();
        let opened = Engine::open(
            &mut self.guest,
            called,
            self.identity,
            (Arc::clone(&self.observer), self.status.clone()),
            (inputs, queue.clone()),
            if verdict.is_none() { Begin::Again } else { Begin::First },
            (&mut self.rest, self.seen.clone()),
        );
        let engine = match opened {
            Ok(engine) => engine,
            // The VM is alone as before: there may be threads and descriptors again next time.
            Err(error) if verdict.is_none() && error.may_pass() => {
                self.status.failed(&error.chain());
                self.status.lock().info.state = ReplicationState::Degraded;
                return Some(queue);
            }
            Err(error) => {
                self.failed(error, verdict);
                return None;
            }
        };
        if let Some(verdict) = verdict {
            let peer = self.options.destination_url.clone();
            self.observer.event(Event::ReplicationStarted { peer });
            // The caller may have stopped waiting.
            let _ = verdict.send(Ok(()));
        }
        let ended = engine.run()?;
        self.goes_on_from(ended);
        Some(queue)
    }

    /// What the next session has of the one before.
    fn goes_on_from(&mut self, ended: Ended) {
        self.rest = ended.rest;
        self.registered.put(ended.registered);
        self.fell_back = None;
        if let Some(reason) = ended.no_rdma {
            self.fall_back(&reason);
        }
    }

    /// It has ended for good. Told once: to the caller, if it still waits, or as an event.
    fn failed(&self, error: Error, verdict: Option<&Sender<Result<(), Error>>>) {
        let line = error.chain();
        {
            let mut gathered = self.status.lock();
            gathered.info.state = ReplicationState::Stopped;
            gathered.info.last_error = Some(line.clone());
        }
        if verdict.is_none_or(|verdict| verdict.send(Err(error)).is_err()) {
            self.observer.event(Event::Failed { error: line });
        }
    }

    /// A person ended it while there was no session.
    fn stopped(&self, answer: &Sender<Result<(), Error>>) -> Option<Receiver<Input>> {
        self.status.lock().info.state = ReplicationState::Stopped;
        self.observer.event(Event::Stopped);
        // A caller that stopped waiting needs no answer.
        let _ = answer.send(Ok(()));
        None
    }
}

fn tell(log: &mut Log, reason: &str) {
    if log.is_news(reason, Instant::now()) {
        tracing::info!("still without a backup, attempts go on: {reason}");
    } else {
        tracing::debug!("still without a backup: {reason}");
    }
}

mod reversed;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_last() {
        let mut waits = Waits::new();
        let all: Vec<u128> = (0..8).map(|_| waits.next().as_millis()).collect();
        assert_eq!(all, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
    }

    #[test]
    fn what_a_person_asks_outlives_a_queue() {
        let (mailbox, queue) = Mailbox::new();
        let (answer, _answers) = crossbeam_channel::bounded(1);
        assert!(mailbox.send(Input::Output));
        assert!(mailbox.send(Input::Ask(Ask::Stop { decides: false }, answer)));
        let next = mailbox.renew(&queue);
        assert!(matches!(next.try_recv(), Ok(Input::Ask(Ask::Stop { .. }, _))));
        assert!(next.try_recv().is_err(), "of the older session");
        assert!(mailbox.send(Input::Output) && next.try_recv().is_ok());
        drop(next);
        assert!(!mailbox.send(Input::Output));
    }
}
