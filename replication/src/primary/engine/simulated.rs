//! The engine without threads, step by step: for a simulator, which has its own clock, network and arbiter.
//!
//! What is decided and done in a step is what ships: [`Engine`] with its cadence, its patience, its brake and its
//! timers, [`Sealer`](crate::primary::seal::Sealer), [`OneSender`], and what they stand on. The simulator says when a
//! step comes, which is when the engine's thread would get to it, and carries what it says, sends and asks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use api::replication::{Compression, ReplicateData};
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

use super::{Around, Ask, Asked, Begin, Crew, Engine, Held, Input};
use crate::capture::cow::Share;
use crate::encode::Encoder;
use crate::encode::choose::Choice;
use crate::engine::arbiter::Asker;
use crate::engine::clock::simulated as clock;
use crate::engine::control::{Control, Credit};
use crate::engine::heard::Heard;
use crate::engine::status::Status;
pub use crate::engine::trace::{Step, take as take_steps};
use crate::error::Error;
use crate::guest::Guest;
use crate::handover::Legacy;
use crate::ids::{EpochId, Generation};
use crate::ownership::{HostId, HostIdentity, Record, Seen};
use crate::primary::disk::DiskError;
use crate::primary::rest;
use crate::primary::send::{Job, OneSender, Senders};
use crate::primary::session;
use crate::protocol::ownership::{Action, Event};
use crate::protocol::primary::{Primary, State};
use crate::ram::{PageBuffer, PageSet};
use crate::testing::Tape;
use crate::transport::Stream;
use crate::wire::{Base, FrameWriter, Hello, Message, Offer, SessionId, Welcome, WireError};

/// Which session it is, and by how many data connections.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    pub session: SessionId,
    pub connections: u32,
}

impl Terms {
    fn count(&self) -> usize {
        usize::try_from(self.connections).unwrap_or(usize::MAX)
    }

    /// How each of its connections greets; 0 is the one for control.
    #[must_use]
    pub fn hello(&self, identity: HostIdentity, connection: u32) -> Message {
        let HostIdentity { host, vm } = identity;
        let connections = self.connections;
        Message::Hello(Hello { vm: vm.0, host: host.0, connection, connections })
    }
}

/// What the backup may have of a session that has ended.
pub struct Rest(rest::Rest);

impl Rest {
    /// What a backup is asked for.
    #[must_use]
    pub fn base(&self) -> Base {
        self.0.base()
    }

    /// Of a machine that was handed over, and whose writes were noted from its first instruction on.
    #[must_use]
    pub fn handed(base: Base, pages: u64) -> Self {
        let Base { session, generation, committed, sealed } = base;
        let session = SessionId(session);
        Self(rest::Rest { session, generation, committed, sealed, pages: PageSet::new(pages) })
    }
}

/// What a simulator breaks on purpose.
#[derive(Clone, Copy, Debug, Default)]
pub struct Broken {
    /// What is remembered of pages outlives a copy anew.
    pub stale_deltas: bool,
    /// Epochs that nobody acknowledged are not in the rest.
    pub forgets: bool,
}

/// Which session of the VM it is.
#[derive(Debug)]
pub enum Start {
    First,
    /// It was protected before, and is alone.
    Again,
    /// It was handed over to this host by its backup since.
    Reversed(Primary),
}

/// Whom a session is of.
#[derive(Clone, Debug)]
pub struct Between {
    pub identity: HostIdentity,
    pub arbiter: bool,
    /// What this process knows of the record.
    pub seen: Seen,
    /// What the backup answered.
    pub welcome: Welcome,
}

/// What comes to an engine.
#[derive(Debug)]
pub enum Word {
    Message(Message),
    /// The control connection ended.
    Lost,
    /// A data connection ended.
    DataLost,
    /// What it needs on this host fails.
    Fails,
    Answer(u64, Event),
    Stop,
    Failover {
        reverses: bool,
    },
}

/// A connection: what sends, where that goes, and what is to be sent.
struct Connection {
    sender: OneSender,
    tape: Tape,
    jobs: Receiver<Job>,
}

/// The time of this thread's engines.
pub fn set_time(since: Duration) {
    clock::set(since);
}

/// The generation to go on from, if `seen` and the record allow this host a session.
#[must_use]
pub fn admit(seen: &Seen, record: Option<Record>, identity: HostIdentity) -> Option<Generation> {
    seen.admit(record, identity).ok()
}

/// What a backup is offered.
///
/// # Panics
/// If `guest` cannot be described, or `options` are none.
#[must_use]
pub fn offer(
    guest: &mut impl Guest,
    options: &ReplicateData,
    arbiter: bool,
    base: Option<Base>,
    is_reversed: bool,
) -> Message {
    let offer = session::offer(guest, options, (false, None), base, is_reversed);
    let offer = offer.expect("a simulated machine can be described");
    Message::Offer(Offer { arbiter, ..offer })
}

/// The primary's side of a session.
pub struct Session<G: Guest> {
    engine: Engine<'static, G>,
    terms: Terms,
    inputs: Sender<Input>,
    heard: Heard,
    done: Arc<AtomicU64>,
    said: Receiver<Message>,
    calls: Receiver<(u64, Action)>,
    connections: Vec<Connection>,
    scratch: PageBuffer,
    /// Of what people asked.
    answers: Vec<Receiver<Result<(), Error>>>,
    broken: Broken,
}

impl<G: Guest> Session<G> {
    /// Begins a session with what its backup has accepted. With a rest the tracking of pages went on.
    ///
    /// # Panics
    /// If no thread can be started: one that has buffers ready.
    #[must_use]
    pub fn open(
        guest: G,
        options: ReplicateData,
        between: Between,
        (start, generation): (Start, Generation),
        terms: Terms,
        rest: Option<Rest>,
        broken: Broken,
    ) -> Self {
        let Between { identity, arbiter, seen, welcome } = between;
        let ram = guest.ram();
        let status = Status::default();
        let (inputs, queue) = unbounded();
        let (asker, calls) = Asker::simulated(arbiter);
        let (control, said) = Control::simulated(Box::new(Tape::default()));
        let of = terms.count();
        let (senders, jobs) = Senders::simulated(of);
        let connect = |(number, (index, jobs))| {
            let tape = Tape::default();
            let mut writer =
                FrameWriter::new(Box::new(tape.clone()) as Box<dyn Stream>, terms.session);
            terms.hello(identity, number).send(&mut writer).expect("a tape takes all");
            let (share, counters) = (Share { index, of }, &status.counters);
            let sender = OneSender::new(share, &ram, writer, Compression::None, counters);
            Connection { sender, tape, jobs }
        };
        let connections = (1..).zip(jobs.into_iter().enumerate()).map(connect).collect();
        let (heard, done) = (Heard::new(), Arc::<AtomicU64>::default());
        let crew = Crew {
            id: terms.session,
            queue,
            inputs: inputs.clone(),
            asker,
            control,
            senders,
            heard: heard.clone(),
            done: Arc::clone(&done),
            lender: None,
        };
        let begin = match start {
            Start::First => Begin::First,
            Start::Again => Begin::Again,
            Start::Reversed(machine) => Begin::Reversed(machine),
        };
        let backup = HostId(welcome.host);
        let observer = Arc::new(());
        let mut rest = rest.map(|rest| rest.0);
        let engine = Engine::around(
            Held::Owned(Box::new(guest)),
            options,
            (begin.machine(arbiter, generation), &mut rest),
            &welcome,
            Around { identity, backup, observer, status, seen },
            crew,
            None,
        );
        Self {
            engine: engine.expect("nothing of a simulated session fails"),
            terms,
            inputs,
            heard,
            done,
            said,
            calls,
            connections,
            scratch: OneSender::scratch(),
            answers: vec![],
            broken,
        }
    }

    /// What an engine does first.
    pub fn begin(&mut self) {
        self.engine.begin();
    }

    /// Puts a word into the engine's queue.
    pub fn put(&mut self, word: Word) {
        let closed = || WireError::Closed;
        let input = match word {
            Word::Message(message) => Input::Message(message, Credit::unlimited()),
            Word::Lost => Input::Lost(closed()),
            Word::DataLost => Input::Sent(Err(closed())),
            Word::Fails => {
                let source = std::io::ErrorKind::Other.into();
                Input::Disk(Err(DiskError::Read { disk: 0, offset: 0, source }))
            }
            Word::Answer(claim, event) => {
                let error = matches!(event, Event::Failed).then(|| "it failed".to_owned());
                Input::Arbiter(Asked { claim, event, error, is_gone: false })
            }
            Word::Stop => {
                // As whoever asks sees it.
                let decides = self.engine.machine.state() == State::Undecided;
                self.ask(Ask::Stop { decides })
            }
            Word::Failover { reverses } => self.ask(Ask::Failover { reverses }),
        };
        self.deliver(input);
    }

    fn ask(&mut self, ask: Ask) -> Input {
        let (answer, answers) = bounded(1);
        self.answers.push(answers);
        Input::Ask(ask, answer)
    }

    fn deliver(&self, input: Input) {
        // The engine holds the other end.
        let _ = self.inputs.send(input);
    }

    /// The other side was heard.
    pub fn heard(&self) {
        self.heard.now();
    }

    /// The other side was heard, and says that it has done so much.
    pub fn progress(&self, bytes: u64) {
        self.done.store(bytes, Ordering::Relaxed);
    }

    /// Whether something is in the engine's queue.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        !self.engine.queue.is_empty()
    }

    /// When the engine does something by itself.
    #[must_use]
    pub fn due(&self) -> Duration {
        clock::until(self.engine.deadline())
    }

    /// Deals with what is first in the queue, if anything is.
    pub fn turn(&mut self) {
        if let Ok(input) = self.engine.queue.try_recv() {
            self.engine.input(input);
        }
    }

    /// Does what is due after that.
    pub fn timers(&mut self) {
        if !self.engine.is_over() {
            self.engine.timers();
        }
    }

    /// What it said since it was asked last.
    #[must_use]
    pub fn said(&self) -> Vec<Message> {
        self.said.try_iter().collect()
    }

    /// What it wants to know of the arbiter.
    #[must_use]
    pub fn calls(&self) -> Vec<(u64, Action)> {
        self.calls.try_iter().collect()
    }

    #[must_use]
    pub fn machine(&self) -> &Primary {
        &self.engine.machine
    }

    #[must_use]
    pub fn identity(&self) -> HostIdentity {
        self.engine.identity
    }

    #[must_use]
    pub fn backup(&self) -> HostId {
        self.engine.backup
    }

    /// The last epoch that was sealed.
    #[must_use]
    pub fn sealed(&self) -> EpochId {
        self.engine.sealed
    }

    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.engine.control.is_some()
    }

    #[must_use]
    pub fn is_over(&self) -> bool {
        self.engine.is_over()
    }

    /// What senders do with pages from here on, as `compression=auto` may say at any time.
    pub fn choose(&mut self, delta: bool, lz4: bool) {
        let choice = Choice { delta, lz4 };
        self.connections.iter_mut().for_each(|of| of.sender.encoder.choose(choice));
    }

    /// How a data connection greets.
    #[must_use]
    pub fn greets(&self, connection: usize) -> Vec<u8> {
        self.connections.get(connection).map_or_else(Vec::new, |of| of.tape.take())
    }

    /// Whether what is left of the machine is to be a backup's.
    #[must_use]
    pub fn has_legacy(&self) -> bool {
        self.engine.status.lock().legacy.is_some()
    }

    /// Whether a connection has something to send.
    #[must_use]
    pub fn is_unsent(&self, connection: usize) -> bool {
        let of = self.connections.get(connection).filter(|_| self.is_connected());
        of.is_some_and(|of| !of.jobs.is_empty())
    }

    /// Sends what is next on a connection: its bytes.
    ///
    /// # Panics
    /// Never: nothing fails that ends nowhere.
    pub fn send(&mut self, connection: usize) -> Vec<u8> {
        let Self { connections, scratch, broken, terms, .. } = self;
        let Some(of) = connections.get_mut(connection) else { return vec![] };
        let Ok(job) = of.jobs.try_recv() else { return vec![] };
        let stale = (broken.stale_deltas && job.epoch == EpochId(0)).then(|| {
            let fresh = Encoder::new(Compression::None, terms.count());
            std::mem::replace(&mut of.sender.encoder, fresh)
        });
        let number = of.sender.send(job, scratch).expect("a tape takes all");
        if let Some(stale) = stale {
            of.sender.encoder = stale;
        }
        let bytes = of.tape.take();
        self.deliver(Input::Sent(Ok(number)));
        bytes
    }

    /// The session is over: what the next one has of it, whether there may be one, and what a machine leaves here
    /// that was handed over.
    ///
    /// # Panics
    /// If somebody who asked for something was not answered.
    #[must_use]
    pub fn end(self) -> (Option<Rest>, bool, Option<Legacy>) {
        let Self { engine, answers, broken, .. } = self;
        let dirty = broken.forgets.then(|| {
            let mut pages = PageSet::new(engine.sealer.dirty.pages().universe());
            pages.union(engine.sealer.dirty.pages());
            pages
        });
        let queue = engine.queue.clone();
        let legacy = engine.status.lock().legacy.take();
        let ended = engine.ended();
        // What came too late for this session is the next one's.
        let late = queue.try_iter().filter(|input| matches!(input, Input::Ask(..))).count();
        let told = answers.iter().filter(|answer| answer.try_recv().is_ok()).count();
        assert_eq!(told + late, answers.len(), "all who ask are answered");
        let goes_on = ended.is_some();
        let rest = ended.and_then(|ended| ended.rest).map(|mut rest| {
            if let Some(dirty) = dirty {
                rest.pages = dirty;
            }
            Rest(rest)
        });
        (rest, goes_on, legacy)
    }
}

impl<G: Guest> std::fmt::Debug for Session<G> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state: State = self.engine.machine.state();
        f.debug_struct("Session")
            .field("terms", &self.terms)
            .field("state", &state)
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Rest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Rest").field(&self.base()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ownership::VmId;
    use crate::testing::{Machine, MemoryDisks, MemoryGuest, memory};

    /// Whoever asks for a stop while the VM is handed over does not say that the backup has not got it.
    #[test]
    fn a_stop_that_was_asked_for_before_decides_nothing() {
        set_time(Duration::ZERO);
        let guest = MemoryGuest(Machine::new(memory(&[(0, 16)])));
        let [vm, host, backup] = [1, 2, 3].map(uuid::Uuid::from_u128);
        let identity = HostIdentity { host: HostId(host), vm: VmId(vm) };
        let welcome = Welcome {
            host: backup,
            staging_bytes: 1 << 20,
            heartbeat_ms: 100,
            timeout_ms: 1000,
            has_base: false,
        };
        let between = Between { identity, arbiter: false, seen: Seen::default(), welcome };
        let (start, terms) = (Start::First, Terms { session: SessionId(1), connections: 1 });
        let options = crate::tests::replicate("tcp:127.0.0.1:1", None);
        let breaks = Broken::default();
        let mut session =
            Session::open(guest, options, between, (start, Generation(0)), terms, None, breaks);
        session.begin();
        let turns = |session: &mut Session<MemoryGuest>, word: Option<Word>| {
            word.into_iter().for_each(|word| session.put(word));
            while session.is_wanted() || session.is_unsent(0) {
                session.turn();
                session.timers();
                drop(session.send(0));
            }
            session.said().into_iter().find_map(|message| match message {
                Message::Seal(seal) => Some((seal.epoch, seal.generation)),
                _ => None,
            })
        };
        let (epoch, generation) = turns(&mut session, None).unwrap();
        let ack = |epoch, generation| Some(Word::Message(Message::Ack { epoch, generation }));
        assert_eq!(turns(&mut session, ack(epoch, generation)), None);
        let over = Some(Word::Failover { reverses: false });
        let (last, generation) = turns(&mut session, over).unwrap();
        assert_eq!(turns(&mut session, ack(last, generation)), None);
        assert_eq!(session.machine().state(), State::HandingOver);
        session.put(Word::Lost);
        turns(&mut session, Some(Word::Stop));
        assert_eq!(session.machine().state(), State::Undecided);
        turns(&mut session, Some(Word::Stop));
        assert_eq!(session.machine().state(), State::Stopped);
    }

    /// Who calls next goes on from it, or ends the tracking that it says is on.
    #[test]
    fn what_may_differ_outlives_a_session_that_does_not_begin() {
        let guest = MemoryGuest(Machine::new(memory(&[(0, 16)])));
        let (inputs, queue) = unbounded();
        let (control, _said) = Control::simulated(Box::<Tape>::default());
        let crew = Crew {
            id: SessionId(2),
            queue,
            inputs,
            asker: Asker::simulated(false).0,
            control,
            senders: Senders::simulated(1).0,
            heard: Heard::new(),
            done: Arc::default(),
            lender: None,
        };
        let (status, seen, observer) = (Status::default(), Seen::default(), Arc::new(()));
        let [vm, host, backup] = [1, 2, 3].map(uuid::Uuid::from_u128);
        let identity = HostIdentity { host: HostId(host), vm: VmId(vm) };
        let around = Around { identity, backup: HostId(backup), observer, status, seen };
        let pages = PageSet::new(16);
        let epoch = EpochId(1);
        let generation = Generation(0);
        let session = SessionId(1);
        let mut rest =
            Some(rest::Rest { session, generation, committed: epoch, sealed: epoch, pages });
        // Too little for what disks log.
        let (staging_bytes, heartbeat_ms, timeout_ms) = (1 << 20, 100, 1000);
        let welcome =
            Welcome { host: backup, staging_bytes, heartbeat_ms, timeout_ms, has_base: true };
        let writer = FrameWriter::new(Box::<Tape>::default() as Box<dyn Stream>, SessionId(2));
        let disks: Arc<dyn crate::disk::Disks> = MemoryDisks::new(vec![vec![0; 4096]]);
        let opened = Engine::around(
            Held::Owned(Box::new(guest)),
            crate::tests::replicate("tcp:127.0.0.1:1", None),
            (Primary::again(false, generation), &mut rest),
            &welcome,
            around,
            crew,
            Some((disks, writer)),
        );
        assert!(matches!(opened, Err(Error::Unfit(_))));
        assert!(rest.is_some());
    }
}
