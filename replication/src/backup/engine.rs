//! The backup's engine: carries out what [`crate::protocol::backup`] decides.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use api::replication::{ReceiveReplicaData, TakeoverTimes};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};

use super::accept::{Arrival, Place};
use super::commit::{CommitError, Epoch, Gather};
use super::disks::{DiskConnection, DiskDelivery, DiskPart, Images};
use super::receive::{DataConnection, OnItsWay, ReceiveError, Shared};
use super::staging::{Budget, Part};
use crate::checking::Equality;
use crate::engine::arbiter::{Asker, Next, Report as Asked};
use crate::engine::control::{Control, Credit, Greeted, Pace, Progress};
use crate::engine::heard::Heard;
use crate::engine::spawn;
use crate::engine::status::Status;
use crate::error::{Error, chain};
use crate::guest::{Replica, ReplicaBuilder};
use crate::ids::{Generation, PAGE_SIZE};
use crate::observer::{Event as Told, Observer};
use crate::ownership::{Arbiter, HostId, HostIdentity, Record, Standing, VmId};
use crate::primary::{layout, validate_paces};
use crate::protocol::backup::{Backup, Event, State};
use crate::transport::Stream;
use crate::wire::{FrameReader, FrameWriter, Hello, Message, Offer, SessionId, Welcome, WireError};

mod actions;

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
    /// The images of a replica have taken an epoch, or cannot.
    Images(u64, Result<(), String>),
    /// The primary's bell rang: its process died.
    Bell(u64),
    Arbiter(Asked),
    Ask(Ask, Sender<Result<(), Error>>),
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
    gather: Gather,
    timeout: Duration,
    /// Something was told that must still reach the primary when the session ends.
    last_word: bool,
}

pub(super) struct Engine<B: ReplicaBuilder> {
    builder: B,
    options: ReceiveReplicaData,
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
    times: TakeoverTimes,
    failover_answer: Vec<Sender<Result<(), Error>>>,
    /// For tests: compares all of memory.
    equality: Option<Equality>,
}

impl<B: ReplicaBuilder> Engine<B> {
    pub(super) fn new(
        builder: B,
        options: ReceiveReplicaData,
        arbiter: Option<Box<dyn Arbiter>>,
        identity: Arc<Mutex<HostIdentity>>,
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
            images: None,
            equality: Equality::from_environment(),
            state: None,
            verified: None,
            pairing: None,
            retry_at: None,
            undecided_told: false,
            times: TakeoverTimes::default(),
            failover_answer: vec![],
        })
    }

    /// Works until the VM was taken over or the reception is stopped.
    pub(super) fn run(mut self) {
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
        silence.unwrap_or(far).min(self.retry_at.unwrap_or(far))
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
        if self.retry_at.is_some_and(|at| at <= Instant::now()) {
            self.retry_at = None;
            let next = self.asker.timer();
            self.claim_went(next);
        }
    }

    fn is_current(&self, number: u64) -> bool {
        self.session.as_ref().is_some_and(|session| session.number == number)
    }

    fn is_receiving(&self) -> bool {
        matches!(self.machine.state(), State::Syncing | State::Replica)
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
            Input::Arbiter(report) => self.arbiter(&report),
            Input::Ask(ask, answer) => self.asked(ask, answer),
        }
    }

    fn arrival(&mut self, arrival: Arrival) {
        match arrival {
            Arrival::Control { greeted, hello, offer, peer } => {
                self.control(*greeted, hello, *offer, peer);
            }
            Arrival::Data { reader, hello } => self.data(reader, hello),
            Arrival::Stray { peer, error } => {
                let error = format!("A connection from {peer} was refused: {error}");
                self.session_failed(&error);
            }
            Arrival::Broken(error) => {
                self.session_failed(&error);
                if self.machine.state() == State::Idle {
                    self.step(Event::StopAsked);
                }
            }
        }
    }

    /// Why this primary cannot be served; `None` if it can.
    fn refusal(&self, hello: &Hello, offer: &Offer) -> Option<String> {
        let vm = self.identity().vm;
        match self.machine.state() {
            State::Idle => {}
            State::Orphan if VmId(hello.vm) == vm => {}
            State::Orphan => {
                return Some(format!("This host holds the replica of VM {vm}: stop it first"));
            }
            _ => return Some(format!("This host serves another primary (VM {vm})")),
        }
        if offer.page_bytes as usize != PAGE_SIZE {
            return Some(format!("Pages of {} bytes are not supported", offer.page_bytes));
        }
        if let Err(error) = validate_paces(offer.heartbeat_ms.into(), offer.timeout_ms.into()) {
            return Some(error.to_string());
        }
        if offer.arbiter != self.asker.exists() {
            let (here, there) = if offer.arbiter { ("no", "an") } else { ("an", "no") };
            return Some(format!("This side has {here} arbiter, the primary has {there} arbiter"));
        }
        None
    }

    fn control(&mut self, greeted: Greeted, hello: Hello, offer: Offer, peer: String) {
        let Greeted { reader, writer } = greeted;
        if let Some(reason) = self.refusal(&hello, &offer) {
            refuse(writer, &reason);
            let error = format!("A primary at {peer} was refused: {reason}");
            return self.session_failed(&error);
        }
        self.step(Event::Accepted);
        self.identity.lock().unwrap_or_else(PoisonError::into_inner).vm = VmId(hello.vm);
        let id = reader.session().unwrap_or(SessionId(0));
        let heartbeat_ms = self.options.heartbeat_ms.min(offer.heartbeat_ms.into());
        // The more patient side sets the pace: it knows how its network behaves.
        let timeout_ms = self.options.timeout_ms.max(offer.timeout_ms.into());
        let timeout = Duration::from_millis(timeout_ms);
        let pace = Pace { heartbeat: Duration::from_millis(heartbeat_ms), linger: timeout };
        let heard = Heard::new();
        self.sessions += 1;
        let number = self.sessions;
        let control = match self.listen(Greeted { reader, writer }, pace, &heard) {
            Ok(control) => control,
            Err(error) => return self.step(Event::Lost(error.chain())),
        };
        self.observer.event(Told::ReceiveStarted { peer: peer.clone() });
        let ram = match self.build(&offer) {
            Ok(ram) => ram,
            Err(error) => {
                control.send(Message::Abort(error.chain()));
                drop(control.finish());
                return self.step(Event::Lost(error.chain()));
            }
        };
        control.send(Message::Welcome(Welcome {
            host: self.identity().host.0,
            staging_bytes: self.options.staging_size,
            heartbeat_ms: u32::try_from(heartbeat_ms).unwrap_or(u32::MAX),
            timeout_ms: u32::try_from(timeout_ms).unwrap_or(u32::MAX),
        }));
        // Building may have taken longer than the timeout.
        heard.now();
        let connections = usize::try_from(hello.connections).unwrap_or(0);
        self.session = Some(Session {
            number,
            id,
            primary: HostId(hello.host),
            control,
            data: (0..connections).map(|_| None).collect(),
            disks: None,
            bell: None,
            shared: self.share(ram, heard),
            gather: Gather::new(connections, !offer.disks.is_empty()),
            timeout,
            last_word: false,
        });
        let mut gathered = self.status.lock();
        gathered.info.peer = Some(peer);
        gathered.info.last_error = None;
    }

    /// Starts the threads of the present session's control connection.
    fn listen(&self, greeted: Greeted, pace: Pace, heard: &Heard) -> Result<Control, Error> {
        let (number, deliver) = (self.sessions, self.inputs.clone());
        let counters = Arc::clone(&self.status.counters);
        let progress =
            Progress { ours: Some(Arc::new(move || counters.done())), ..Progress::default() };
        Control::start(greeted, pace, heard.clone(), progress, move |word, credit| {
            let input = match word {
                Ok(message) => Input::Message(number, message, credit),
                Err(error) => Input::Lost(number, error),
            };
            deliver.send(input).is_ok()
        })
    }

    fn share(&self, ram: crate::ram::Ram, heard: Heard) -> Shared {
        Shared {
            ram,
            budget: Budget::new(self.options.staging_size),
            round: Arc::new(AtomicU64::new(0)),
            heard,
            counters: Arc::clone(&self.status.counters),
        }
    }

    fn build(&mut self, offer: &Offer) -> Result<crate::ram::Ram, Error> {
        let built = self.builder.build(&offer.description);
        let mut replica =
            built.map_err(|source| Error::Guest { what: "build the replica", source })?;
        let ram = replica.ram();
        if layout(&ram) != offer.regions {
            let pages =
                offer.regions.iter().fold(0, |sum: u64, region| sum.saturating_add(region.pages));
            let found = ram.pages();
            return Err(Error::Memory(format!(
                "the primary has {pages} pages in {} regions, the replica {found} in {}",
                offer.regions.len(),
                ram.regions().len()
            )));
        }
        self.open_images(&mut replica, &offer.disks)?;
        let pages = ram.pages().max(1);
        let counters = &self.status.counters;
        counters.synced_pages.store(0, Ordering::Relaxed);
        counters.to_sync_pages.store(pages, Ordering::Relaxed);
        counters.synced_disk_bytes.store(0, Ordering::Relaxed);
        counters.to_sync_disk_bytes.store(offer.disks.iter().sum(), Ordering::Relaxed);
        self.replica = Some(replica);
        Ok(ram)
    }

    /// Disks of other sizes than the primary's are refused before a byte of them is written.
    fn open_images(&mut self, replica: &mut B::Replica, sizes: &[u64]) -> Result<(), Error> {
        if sizes.is_empty() {
            return Ok(());
        }
        let opened = replica.open_disks();
        let disks = opened.map_err(|source| Error::Guest { what: "open the images", source })?;
        if disks.len() != sizes.len() {
            let (theirs, ours) = (sizes.len(), disks.len());
            let what = format!("The primary replicates {theirs} disks, the replica has {ours}");
            return Err(Error::Failed(what));
        }
        for (at, (disk, theirs)) in disks.iter().zip(sizes).enumerate() {
            let ours = disk.size_bytes();
            if ours != *theirs {
                return Err(Error::Failed(format!(
                    "Disk {at} has {theirs} bytes at the primary and its image here has {ours}: \
                     they must be of the same size"
                )));
            }
        }
        let (number, deliver) = (self.sessions, self.inputs.clone());
        let tell = move |done| {
            // An engine that has ended has let go of the images.
            let _ = deliver.send(Input::Images(number, done));
        };
        let limit = self.options.staging_size / 4;
        self.images = Some((number, Images::start(disks, limit, &self.status.counters, tell)?));
        Ok(())
    }

    fn data(&mut self, reader: FrameReader<Box<dyn Stream>>, hello: Hello) {
        let vm = self.identity().vm;
        let Some(session) = &mut self.session else { return };
        let index = usize::try_from(hello.connection).unwrap_or(0).wrapping_sub(1);
        let known = reader.session() == Some(session.id)
            && VmId(hello.vm) == vm
            && HostId(hello.host) == session.primary;
        if known && index == session.data.len() && session.bell.is_none() {
            return self.hang_bell(reader);
        }
        if known && index == session.data.len() + 1 && session.disks.is_none() {
            return self.disk_data(reader);
        }
        if !known || !matches!(session.data.get(index), Some(None)) {
            // Of an older session, or a stranger: its stream closes with the reader.
            return;
        }
        let (number, deliver) = (session.number, self.inputs.clone());
        let started = DataConnection::start(index, reader, session.shared.clone(), move |part| {
            let input = match part {
                Ok((part, taken)) => Input::Part(number, index, part, taken),
                Err(error) => Input::DataLost(number, error),
            };
            deliver.send(input).is_ok()
        });
        match started {
            Ok(connection) => session.data[index] = Some(connection),
            Err(error) => self.step(Event::Bad(error.chain())),
        }
    }

    /// The disks' connection, where there are disks.
    fn disk_data(&mut self, reader: FrameReader<Box<dyn Stream>>) {
        let (Some(session), Some((_, images))) = (&mut self.session, &self.images) else { return };
        let (number, deliver) = (session.number, self.inputs.clone());
        let (disks, shared) = (images.disks().to_vec(), session.shared.clone());
        let started = DiskConnection::start(reader, disks, shared, move |part: DiskDelivery| {
            let input = match part {
                Ok((part, taken)) => Input::DiskPart(number, part, taken),
                Err(error) => Input::DataLost(number, error),
            };
            deliver.send(input).is_ok()
        });
        match started {
            Ok(connection) => session.disks = Some(connection),
            Err(error) => self.step(Event::Bad(error.chain())),
        }
    }

    /// Waits beside the engine for the end of the primary's process.
    fn hang_bell(&mut self, mut reader: FrameReader<Box<dyn Stream>>) {
        let Some(session) = &mut self.session else { return };
        let stream = reader.get_mut();
        // No bell is no harm: the other connections end too, only later.
        let Ok(handle) = stream.set_read_timeout(None).and_then(|()| stream.duplicate()) else {
            return;
        };
        let (number, deliver) = (session.number, self.inputs.clone());
        let body = move || {
            let mut nothing = [0; 64];
            while matches!(reader.get_mut().read(&mut nothing), Ok(1..)) {}
            // An engine that has ended wants no news.
            let _ = deliver.send(Input::Bell(number));
        };
        match spawn("repl-bell", None, body) {
            Ok(_) => session.bell = Some(handle),
            Err(error) => tracing::debug!("no bell: {}", error.chain()),
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
            Message::Resync => self.step(Event::ResyncTold),
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
        if self.machine.state() != State::Syncing || self.pairing.is_some() {
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
            return self.step(Event::Bad(reason));
        }
        self.step(Event::Paired(generation));
        self.go_on();
    }

    /// Whether a whole epoch has to wait before it is looked at.
    fn is_busy(&self) -> bool {
        self.pairing.is_some() || self.images.as_ref().is_some_and(|(_, images)| images.is_behind())
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
                let seal = &epoch.seal;
                let (id, generation, handover) = (seal.epoch, seal.generation, seal.handover);
                let before = self.machine.committed();
                if let Some(session) = &self.session {
                    session.shared.budget.give_back(epoch.cost_bytes());
                }
                self.verified = Some(epoch);
                let parsed = self.state.replace(state);
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
            if !std::mem::replace(&mut self.undecided_told, true) && self.pairing.is_none() {
                self.observer.event(Told::Undecided { error: error.clone() });
            }
        }
        match self.asker.report(report) {
            Next::Record(record) => self.record(record),
            Next::ReadFailed => {
                // A session that has ended asks no more.
                if self.pairing.take().is_some() {
                    let error = report.error.clone().unwrap_or_default();
                    self.step(Event::Bad(error));
                }
            }
            next => self.claim_went(next),
        }
    }

    fn claim_went(&mut self, next: Next) {
        match next {
            Next::Asked | Next::Nothing | Next::Record(_) | Next::ReadFailed => {}
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

/// Tells a primary why it is not served, without waiting for it.
fn refuse(mut writer: FrameWriter<Box<dyn Stream>>, reason: &str) {
    // A primary that does not read its refusal has lost the connection: it learns that instead.
    let _ = Message::Abort(reason.to_owned()).send(&mut writer);
    writer.get_ref().finish();
}
