//! The backup's engine: carries out what [`crate::protocol::backup`] decides.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use api::replication::{ReceiveReplicaData, ReplicateData, TakeoverTimes};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};

use super::accept::{Arrival, Place};
use super::commit::{CommitError, Epoch, Gather};
use super::disks::{DiskConnection, DiskPart, Images};
use super::receive::{DataConnection, OnItsWay, ReceiveError, Shared};
use super::staging::Part;
use crate::checking::{Equality, reach};
use crate::engine::arbiter::{Asker, Next, Report as Asked};
use crate::engine::control::{Control, Credit};
use crate::engine::status::Status;
use crate::error::{Error, chain};
use crate::guest::{Replica, ReplicaBuilder};
use crate::handover::{Legacy, WayBack};
use crate::ids::{EpochId, Generation};
use crate::log::Log;
use crate::observer::{Event as Told, Observer};
use crate::ownership::{Arbiter, HostId, HostIdentity, Record, Standing, VmId};
use crate::protocol::backup::{Backup, Event, Handover, State};
use crate::protocol::window::OUT_OF_TURN;
use crate::transport::{Stream, rdma};
use crate::wire::{Grant, Message, SessionId, WireError};
use arrivals::Caller;
use opening::{Opening, Registered};

mod actions;
mod arrivals;
mod opening;
mod switch;

/// What a person asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    Stop,
    Failover { force: bool },
}

/// Everything that reaches the engine. Sessions are numbered so that what an old one still says
/// is told apart.
pub(super) enum Input {
    /// The place goes back to the acceptor once the arrival was dealt with.
    Arrival(Arrival, Place),
    /// The credit goes back to the reader once the message was dealt with.
    Message(u64, Message, Credit),
    Lost(u64, WireError),
    Part(u64, usize, Part, OnItsWay),
    DiskPart(u64, DiskPart, OnItsWay),
    DataLost(u64, ReceiveError),
    /// Some more of a session's image is registered for the primary's WRITEs; all of it is, or is not; it is given back,
    /// or is not.
    Widened(u64, Vec<Grant>),
    Opened(u64, Registered),
    Closed(u64, Result<(), String>),
    /// The images of a replica have taken an epoch, or cannot.
    Images(u64, Result<(), String>),
    /// The primary's bell rang: its process died.
    Bell(u64),
    Arbiter(Asked),
    Ask(Ask, Sender<Result<(), Error>>),
}

/// Memory that a lost claim left behind, for its primary to go on from. Without a machine state:
/// nobody can start it.
struct Base<R> {
    replica: R,
    primary: HostId,
    vm: VmId,
    session: SessionId,
    generation: Generation,
    committed: EpochId,
    description: Vec<u8>,
}

/// Whose replica it is.
struct Built {
    primary: HostId,
    vm: VmId,
    session: SessionId,
    description: Vec<u8>,
}

/// A primary's session.
struct Session {
    number: u64,
    id: SessionId,
    primary: HostId,
    control: Control,
    data: Vec<Option<DataConnection>>,
    disks: Option<DiskConnection>,
    /// Another handle to the bell's connection, to end it with.
    bell: Option<Box<dyn Stream>>,
    shared: Shared,
    /// Of the image, to the primary's WRITEs.
    opening: Opening,
    gather: Gather,
    timeout: Duration,
    /// Something was told that must still reach the primary when the session ends.
    last_word: bool,
}

pub(super) struct Engine<B: ReplicaBuilder> {
    builder: B,
    options: ReceiveReplicaData,
    /// Where data comes by RDMA.
    rdma: Option<rdma::Asked>,
    identity: Arc<Mutex<HostIdentity>>,
    machine: Backup,
    observer: Arc<dyn Observer>,
    status: Status,
    inputs: Sender<Input>,
    queue: Receiver<Input>,
    asker: Asker,
    session: Option<Session>,
    sessions: u64,
    replica: Option<B::Replica>,
    /// What the replica was built of, and for which session.
    built: Option<Built>,
    base: Option<Base<B::Replica>>,
    /// Of the replica, with its number; none where it has no disks.
    images: Option<(u64, Images)>,
    /// The last acknowledged machine state.
    state: Option<<B::Replica as Replica>::State>,
    /// Checked, waiting for its acknowledgement's side effects: what is applied next.
    verified: Option<Epoch>,
    /// The generation whose record is being looked at.
    pairing: Option<Generation>,
    retry_at: Option<Instant>,
    undecided_told: bool,
    /// Why a take-over began, or would.
    reason: String,
    times: TakeoverTimes,
    /// How the VM is to be protected once it was handed over, and where that is left.
    way_back: Option<ReplicateData>,
    handed_back: Arc<Mutex<Option<WayBack>>>,
    /// Whether what the replica writes once it runs is noted.
    is_tracked: bool,
    /// Until when a new primary, of a reversed pair, may call.
    heir_until: Option<Instant>,
    /// The session that its first one goes on from, whichever has called in vain since.
    heir_session: Option<SessionId>,
    /// The only VM that is received here; whichever comes where there is none.
    only: Option<VmId>,
    /// Why nobody can connect any more.
    deaf: Option<String>,
    /// What was told of who is no primary, and of primaries that were refused.
    strangers: Log,
    refused: Log,
    /// A primary that came before the session before was over, and until when it waits for that.
    waiting: Option<(Box<Caller>, Instant)>,
    failover_answer: Vec<Sender<Result<(), Error>>>,
    /// For tests: compares all of memory.
    equality: Option<Equality>,
}

impl<B: ReplicaBuilder> Engine<B> {
    pub(super) fn new(
        builder: B,
        (options, rdma): (ReceiveReplicaData, Option<rdma::Asked>),
        arbiter: Option<Box<dyn Arbiter>>,
        (identity, handed_back): (Arc<Mutex<HostIdentity>>, Arc<Mutex<Option<WayBack>>>),
        observer: Arc<dyn Observer>,
        (inputs, queue): (Sender<Input>, Receiver<Input>),
        status: Status,
    ) -> Result<Self, Error> {
        let deliver = inputs.clone();
        let asker =
            Asker::start(arbiter, move |report| deliver.send(Input::Arbiter(report)).is_ok())?;
        Ok(Self {
            builder,
            options,
            rdma,
            identity,
            machine: Backup::new(asker.exists()),
            observer,
            status,
            inputs,
            queue,
            asker,
            session: None,
            sessions: 0,
            replica: None,
            built: None,
            base: None,
            images: None,
            equality: Equality::from_environment(),
            state: None,
            verified: None,
            pairing: None,
            retry_at: None,
            undecided_told: false,
            reason: String::new(),
            times: TakeoverTimes::default(),
            way_back: None,
            handed_back,
            is_tracked: false,
            heir_until: None,
            heir_session: None,
            only: None,
            deaf: None,
            strangers: Log::default(),
            refused: Log::default(),
            waiting: None,
            failover_answer: vec![],
        })
    }

    /// Receives this VM, and no other, where there is one.
    pub(super) fn only(self, only: Option<VmId>) -> Self {
        Self { only, ..self }
    }

    /// Works until the VM was taken over or the reception is stopped. `legacy`: the VM was this host's,
    /// and was handed over.
    pub(super) fn run(mut self, legacy: Option<Legacy>) {
        if let Some(legacy) = legacy {
            self.inherit(legacy);
        }
        while !matches!(self.machine.state(), State::TakenOver | State::Stopped) {
            match self.queue.recv_deadline(self.deadline()) {
                Ok(input) => self.input(input),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    unreachable!("the engine holds a sender itself")
                }
            }
            self.timers();
        }
        self.close();
    }

    fn identity(&self) -> HostIdentity {
        *self.identity.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn deadline(&self) -> Instant {
        let far = Instant::now() + Duration::from_secs(3600);
        let session = self.session.as_ref().filter(|_| self.is_receiving());
        let silence = session.map(|s| s.shared.heard.deadline(s.timeout));
        let called = self.heir_until.filter(|_| self.is_awaiting()).unwrap_or(far);
        let waits = self.waiting.as_ref().map_or(far, |(_, until)| *until);
        silence.unwrap_or(far).min(self.retry_at.unwrap_or(far)).min(called).min(waits)
    }

    /// Whether the new primary of a reversed pair has not called yet.
    fn is_awaiting(&self) -> bool {
        self.machine.state() == State::Heir && self.session.is_none()
    }

    fn timers(&mut self) {
        // While the arbiter is asked, or the VM starts, nothing depends on the peer's life.
        if self.is_receiving()
            && let Some(session) = &self.session
            && session.shared.heard.is_silent(session.timeout, session.timeout / 2)
        {
            let silent_ms = u64::try_from(session.timeout.as_millis()).unwrap_or(u64::MAX);
            self.step(Event::Lost(Error::Silent { silent_ms }.chain()));
        }
        if self.is_awaiting() && self.heir_until.is_some_and(|until| until <= Instant::now()) {
            self.step(Event::Lost("The VM's new primary did not call".to_owned()));
        }
        if self.retry_at.is_some_and(|at| at <= Instant::now()) {
            self.retry_at = None;
            let next = self.asker.timer();
            self.claim_went(next);
        }
        self.stop_if_deaf();
        let is_idle = self.machine.state() == State::Idle;
        if self.waiting.as_ref().is_some_and(|(_, until)| is_idle || *until <= Instant::now()) {
            self.admit_waiting();
        }
    }

    fn is_current(&self, number: u64) -> bool {
        self.session.as_ref().is_some_and(|session| session.number == number)
    }

    fn is_receiving(&self) -> bool {
        matches!(self.machine.state(), State::Syncing | State::Replica | State::Heir)
    }

    fn input(&mut self, input: Input) {
        match input {
            Input::Arrival(arrival, _place) => self.arrival(arrival),
            Input::Message(number, message, _credit) if self.is_current(number) => {
                self.message(message);
            }
            Input::Lost(number, error) if self.is_current(number) => self.lost(error),
            Input::Part(number, index, part, taken) => {
                drop(taken);
                if self.is_current(number) && self.is_receiving() {
                    self.part(index, part);
                }
            }
            Input::DiskPart(number, part, taken) => {
                drop(taken);
                if self.is_current(number) && self.is_receiving() {
                    let due = self.machine.expected();
                    let Some(session) = &mut self.session else { return };
                    let gathered = session.gather.disk_part(part, due);
                    self.gathered(gathered);
                }
            }
            Input::Widened(number, grants) if self.is_current(number) => {
                self.window_widened(grants);
            }
            Input::Opened(number, registered) if self.is_current(number) => {
                self.window_opened(registered);
            }
            Input::Closed(number, closed) if self.is_current(number) => {
                self.window_closed(closed);
            }
            Input::Images(number, done) => {
                if self.images.as_ref().is_some_and(|(of, _)| *of == number) {
                    match done {
                        Ok(()) => self.go_on(),
                        Err(error) => self.image_failed(error),
                    }
                }
            }
            Input::DataLost(number, error @ ReceiveError::Image(_)) if self.is_current(number) => {
                self.image_failed(chain(&error));
            }
            Input::DataLost(number, error) if self.is_current(number) => {
                tracing::info!("a data connection ended: {}", chain(&error));
                if !error.is_loss() {
                    self.step(Event::Bad(chain(&error)));
                }
                // An abort or a stop that ended the session may be right behind on the control
                // connection; a primary that lives on closes that too, a dead one surely has.
            }
            Input::Bell(number) if self.is_current(number) => {
                self.step(Event::Lost("The primary's process ended".to_owned()));
            }
            Input::Message(..) | Input::Lost(..) | Input::DataLost(..) | Input::Bell(_) => {}
            // Of a session that is gone: what was open is closed as it is dropped.
            Input::Widened(..) | Input::Opened(..) | Input::Closed(..) => {}
            Input::Arbiter(report) => self.arbiter(&report),
            Input::Ask(ask, answer) => self.asked(ask, answer),
        }
    }

    fn lost(&mut self, error: WireError) {
        match error {
            WireError::Closed => {
                self.step(Event::Lost("The primary closed the connection".to_owned()));
            }
            error if error.is_loss() => self.step(Event::Lost(Error::Wire(error).chain())),
            error => self.step(Event::Bad(Error::Wire(error).chain())),
        }
    }

    fn message(&mut self, message: Message) {
        match message {
            Message::Paired(generation) => self.paired(generation),
            // Nothing is acknowledged any more, so nothing is gathered either.
            Message::Seal(_) if !self.is_receiving() => {}
            Message::Seal(seal) => {
                self.status.lock().info.epoch_sealed = seal.epoch.0;
                let due = self.machine.expected();
                let gathered = match &mut self.session {
                    Some(session) => session.gather.seal(seal, due),
                    None => return,
                };
                self.gathered(gathered);
            }
            Message::Resync if !self.is_shut() => self.step(Event::Bad(OUT_OF_TURN.to_owned())),
            Message::Resync => {
                if let Some(session) = &mut self.session {
                    session.opening.begins_anew();
                }
                self.step(Event::ResyncTold);
            }
            Message::WindowAsk(number) => self.window_asked(number),
            Message::WindowEnd(number) => self.window_ended(number),
            Message::Stop => self.step(Event::StopTold),
            Message::Abort(reason) => {
                self.step(Event::Lost(Error::PeerAborted(reason).chain()));
            }
            other => {
                let found = other.kind();
                let error = WireError::Unexpected { found, expected: "a seal" };
                self.step(Event::Bad(Error::Wire(error).chain()));
            }
        }
    }

    /// The primary says that the record says PAIR: seen from here too, or the two sides look at
    /// different arbiters and both could win.
    fn paired(&mut self, generation: Generation) {
        let may_pair =
            matches!(self.machine.state(), State::Syncing | State::Heir) && self.is_shut();
        if !may_pair || self.pairing.is_some() {
            // Not read: a claim may be under way, and is not to be forgotten for this.
            self.step(Event::Bad("The primary paired out of turn".to_owned()));
        } else if self.asker.exists() {
            self.pairing = Some(generation);
            self.asker.read();
        } else {
            self.step(Event::Paired(generation));
        }
    }

    fn record(&mut self, record: Option<Record>) {
        let Some(generation) = self.pairing.take() else { return };
        let Some(session) = &self.session else { return };
        let HostIdentity { host: backup, vm } = self.identity();
        let standing = Standing::Pair { primary: session.primary, backup };
        let expected = Record { generation, vm, standing };
        if record != Some(expected) {
            let found = record.map_or("nothing".to_owned(), |record| record.to_string());
            let reason = format!("The arbiter seen from the backup says {found}, not {expected}");
            return self.step(Event::Unpaired(reason));
        }
        reach("paired");
        self.step(Event::Paired(generation));
        self.go_on();
    }

    /// Whether a whole epoch has to wait before it is looked at. None is acknowledged while somebody else may
    /// write the image.
    fn is_busy(&self) -> bool {
        !self.is_shut()
            || self.pairing.is_some()
            || self.images.as_ref().is_some_and(|(_, images)| images.is_behind())
    }

    /// Looks at the epochs that are whole.
    fn go_on(&mut self) {
        while !self.is_busy() && self.is_receiving() {
            let Some(session) = &mut self.session else { return };
            match session.gather.whole() {
                Ok(None) => return,
                Ok(Some(epoch)) => self.verify(epoch),
                Err(error) => return self.step(Event::Bad(error.to_string())),
            }
        }
    }

    fn image_failed(&mut self, error: String) {
        self.status.failed(&error);
        self.step(Event::ImageFailed(error));
    }

    fn part(&mut self, index: usize, part: Part) {
        let due = self.machine.expected();
        let Some(session) = &mut self.session else { return };
        let gathered = session.gather.part(index, part, due);
        self.gathered(gathered);
    }

    fn gathered(&mut self, gathered: Result<(), CommitError>) {
        match gathered {
            Ok(()) => self.go_on(),
            Err(error) => self.step(Event::Bad(error.to_string())),
        }
    }

    /// The epoch is whole; its state must be one that this host can load.
    fn verify(&mut self, epoch: Epoch) {
        let Some(replica) = &mut self.replica else { return };
        match replica.parse(&epoch.seal.state) {
            Ok(state) => {
                // Nothing of a switch-over may be found out only after the claim.
                let is_last = epoch.seal.handover != Handover::No;
                if is_last && let Some(lacks) = self.lacks() {
                    return self.step(Event::Unready(lacks));
                }
                let seal = &epoch.seal;
                let (id, generation) = (seal.epoch, seal.generation);
                let before = self.machine.committed();
                if let Some(session) = &self.session {
                    session.shared.budget.give_back(epoch.cost_bytes());
                }
                let handover = self.handover(epoch.seal.handover);
                self.verified = Some(epoch);
                let parsed = self.state.replace(state);
                reach("verified");
                self.step(Event::Verified { epoch: id, generation, handover });
                if self.machine.committed() == before {
                    // Refused: what was committed before is still what a take-over loads.
                    self.state = parsed;
                    self.verified = None;
                }
            }
            Err(source) => {
                let error = Error::Guest { what: "load the machine state", source };
                self.step(Event::Bad(error.chain()));
            }
        }
    }

    fn arbiter(&mut self, report: &Asked) {
        if let Some(error) = &report.error {
            self.status.failed(error);
            // A look that fails ends its session, and is told as that.
            if self.pairing.is_none() && !std::mem::replace(&mut self.undecided_told, true) {
                self.observer.event(Told::Undecided { error: error.clone() });
            }
        }
        match self.asker.report(report) {
            Next::Record(record) => self.record(record),
            Next::ReadFailed => {
                // A session that has ended asks no more.
                if self.pairing.take().is_some() {
                    let error = report.error.clone().unwrap_or_default();
                    self.step(Event::Unpaired(error));
                }
            }
            next => self.claim_went(next),
        }
    }

    fn claim_went(&mut self, next: Next) {
        match next {
            Next::Call(..) | Next::Nothing | Next::Record(_) | Next::ReadFailed => {}
            Next::Wait { ms } => self.retry_at = Some(Instant::now() + Duration::from_millis(ms)),
            Next::Decided(verdict) => {
                self.undecided_told = false;
                self.step(Event::Verdict(verdict));
            }
        }
    }

    fn session_failed(&mut self, error: &str) {
        self.status.failed(error);
        self.observer.event(Told::ReceiveFailed { error: error.to_owned() });
    }
}
