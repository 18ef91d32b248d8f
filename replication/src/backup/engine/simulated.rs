//! The engine without threads, step by step: for a simulator, which has its own clock, network and arbiter.
//!
//! What is decided and done in a step is what ships: [`Engine`] with whom it serves, its timers and its claims,
//! [`Receiving`], the greeting, and what they stand on. The simulator says when a step comes, which is when the
//! engine's thread would get to it, brings bytes, and carries what is said and asked. What reads a connection
//! does so at once, as a thread of its own does.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use api::replication::ReceiveReplicaData;
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

use super::{Ask, Asked, Asker, Crew, Engine, Images, Input, State, chain};
use crate::backup::accept::{Arrival, Place, receive_greeting};
use crate::backup::apply::apply;
use crate::backup::receive::{Delivery, ReceiveError, Receiving};
use crate::engine::clock::simulated as clock;
use crate::engine::control::{Control, Credit, Greeted, hear, listening};
use crate::engine::heard::{Heard, Listening};
use crate::engine::status::Status;
use crate::error::Error;
use crate::guest::{Replica, ReplicaBuilder};
use crate::handover::{Legacy, WayBack};
use crate::ownership::{HostId, HostIdentity};
use crate::protocol::backup::Backup;
use crate::protocol::ownership::{Action, Event};
use crate::testing::Tape;
use crate::transport::Stream;
use crate::wire::{Base, FrameReader, FrameWriter, Message, SessionId, WireError};

/// The number of what a simulator says of images, where a session's begin with 1.
const IMAGES: u64 = 0;
/// Whoever connects.
const PEER: &str = "10.0.0.1:40000";

/// What a simulator breaks on purpose.
#[derive(Clone, Copy, Debug, Default)]
pub struct Broken {
    /// A part goes into the image as it comes, before its epoch is whole.
    pub applies_early: bool,
    /// What is staged of an epoch and was not acknowledged is what a lost primary leaves behind.
    pub keeps_staged: bool,
}

/// What comes to an engine beside bytes.
#[derive(Debug)]
pub enum Word {
    /// The control connection ended.
    Lost,
    /// A data connection ended.
    DataLost(usize),
    /// The primary's process ended.
    Bell,
    /// An image of the replica cannot be written.
    ImageFails,
    Answer(u64, Event),
    Stop,
    Failover {
        force: bool,
    },
}

/// How a VM that was taken over is to be protected.
#[derive(Clone, Copy, Debug)]
pub struct Back {
    /// What its old host has; `None` if nobody noted what was written since.
    pub base: Option<Base>,
    /// The pair of both hosts stands already.
    pub is_reversed: bool,
}

type Hears = Box<dyn FnMut(Result<Message, WireError>, Credit) -> bool + Send>;
type Takes = Box<dyn FnMut(Delivery) -> bool + Send>;

/// A connection that the engine would have a thread read.
pub(super) enum Hand {
    Control(Line),
    Data(usize, Receiving, Takes),
}

/// A control connection that the engine has accepted.
pub(super) struct Line {
    reader: FrameReader<Listening<Box<dyn Stream>>>,
    writer: FrameWriter<Box<dyn Stream>>,
    said: Receiver<Message>,
    deliver: Hears,
}

impl Line {
    pub(super) fn new(
        greeted: Greeted,
        heard: Heard,
        deliver: impl FnMut(Result<Message, WireError>, Credit) -> bool + Send + 'static,
    ) -> (Control, Self) {
        let Greeted { reader, writer } = greeted;
        let closer = writer.get_ref().duplicate().expect("a tape has as many handles as one likes");
        let (control, said) = Control::simulated(closer);
        let (reader, deliver) = (listening(reader, heard), Box::new(deliver));
        (control, Self { reader, writer, said, deliver })
    }
}

/// A primary's control connection.
struct Call {
    into: Tape,
    out: Tape,
    /// Until it has greeted.
    greeting: Option<FrameReader<Box<dyn Stream>>>,
    line: Option<Line>,
    has_ended: bool,
}

/// One of its data connections.
struct Connection {
    into: Tape,
    stage: Stage,
}

enum Stage {
    /// It has not greeted.
    New(FrameReader<Box<dyn Stream>>),
    /// The engine has not taken it.
    Greeted,
    Read(Receiving, Takes),
    Ended,
}

/// A backup, from its first call to its end.
pub struct Reception<B: ReplicaBuilder> {
    engine: Engine<B>,
    inputs: Sender<Input>,
    hands: Receiver<Hand>,
    calls: Receiver<(u64, Action)>,
    way_back: Arc<Mutex<Option<WayBack>>>,
    is_heir: bool,
    call: Option<Call>,
    connections: Vec<Connection>,
    scratch: Vec<u8>,
    /// Of what people asked.
    answers: Vec<Receiver<Result<(), Error>>>,
    broken: Broken,
}

impl<B: ReplicaBuilder> Reception<B> {
    /// A backup that has nothing.
    #[must_use]
    pub fn new(
        builder: B,
        options: ReceiveReplicaData,
        identity: HostIdentity,
        arbiter: bool,
        broken: Broken,
    ) -> Self {
        let (inputs, queue) = unbounded();
        let (hand, hands) = unbounded();
        let (asker, calls) = Asker::simulated(arbiter);
        let way_back = Arc::default();
        let engine = Engine::around(
            builder,
            (options, None),
            (asker, Crew::Simulated(hand)),
            (Arc::new(Mutex::new(identity)), Arc::clone(&way_back)),
            Arc::new(()),
            (inputs.clone(), queue),
            Status::default(),
        );
        Self {
            engine,
            inputs,
            hands,
            calls,
            way_back,
            is_heir: false,
            call: None,
            connections: vec![],
            scratch: Receiving::scratch(),
            answers: vec![],
            broken,
        }
    }

    /// The host that a VM was handed over from, with what it has of it.
    #[must_use]
    pub fn inherits(
        builder: B,
        options: ReceiveReplicaData,
        legacy: Legacy,
        arbiter: bool,
        broken: Broken,
    ) -> Self {
        let identity = legacy.identity;
        let mut reception = Self::new(builder, options, identity, arbiter, broken);
        reception.engine = reception.engine.only(Some(identity.vm));
        reception.is_heir = legacy.is_heir();
        reception.engine.inherit(legacy);
        reception
    }

    /// A primary connects, with so many connections beside that for control.
    pub fn connects(&mut self, connections: usize) {
        let open = |tape: &Tape| FrameReader::new(Box::new(tape.clone()) as Box<dyn Stream>, None);
        let (into, out) = (Tape::default(), Tape::default());
        let greeting = Some(open(&into));
        self.call = Some(Call { into, out, greeting, line: None, has_ended: false });
        let connect = |_| {
            let into = Tape::default();
            let stage = Stage::New(open(&into));
            Connection { into, stage }
        };
        self.connections = (0..connections).map(connect).collect();
    }

    /// Whoever connected and did not greet has had the time for it.
    pub fn greeting_late(&mut self) {
        if self.call.take_if(|call| call.greeting.is_some()).is_some() {
            let (peer, error) = (PEER.to_owned(), "no greeting came in time".to_owned());
            self.deliver(Input::Arrival(Arrival::Stray { peer, error }, Place::unlimited()));
        }
    }

    /// Bytes of the control connection.
    pub fn hears(&mut self, bytes: &[u8]) {
        if let Some(call) = &self.call {
            call.into.put(bytes);
        }
        self.reads_control();
    }

    /// Bytes of a data connection.
    pub fn takes(&mut self, connection: usize, bytes: &[u8]) {
        if let Some(of) = self.connections.get(connection) {
            of.into.put(bytes);
        }
        self.reads_data(connection);
    }

    fn reads_control(&mut self) {
        let Some(call) = &mut self.call else { return };
        // A greeting, and the offer that follows it.
        if call.into.has_frames(2)
            && let Some(reader) = call.greeting.take()
        {
            let arrival = greet(reader, call.out.clone());
            self.deliver(Input::Arrival(arrival, Place::unlimited()));
            return;
        }
        let Some(line) = &mut call.line else { return };
        while call.into.has_frame() {
            let word = hear(&mut line.reader, &mut Vec::new(), &AtomicU64::default());
            let Some(word) = word else { continue };
            let is_over = word.is_err();
            (line.deliver)(word, Credit::unlimited());
            if is_over {
                return;
            }
        }
        if std::mem::take(&mut call.has_ended) {
            (line.deliver)(Err(WireError::Closed), Credit::unlimited());
        }
    }

    fn reads_data(&mut self, connection: usize) {
        let Some(Connection { into, stage }) = self.connections.get_mut(connection) else { return };
        match stage {
            Stage::New(_) if into.has_frame() => {
                let Stage::New(reader) = std::mem::replace(stage, Stage::Greeted) else { return };
                let arrival = greet(reader, Tape::default());
                self.deliver(Input::Arrival(arrival, Place::unlimited()));
            }
            Stage::Read(receiving, deliver) => {
                // One that the engine has closed is nobody's to read: the memory is another's by now.
                let mut goes_on = !into.is_closed();
                while goes_on && into.has_frame() {
                    goes_on = receiving.step(&mut self.scratch, &mut *deliver);
                }
                if !goes_on {
                    *stage = Stage::Ended;
                }
            }
            Stage::New(_) | Stage::Greeted | Stage::Ended => {}
        }
    }

    /// Connections that the engine has taken since are read.
    fn looks(&mut self) {
        while let Ok(hand) = self.hands.try_recv() {
            match hand {
                Hand::Control(line) => {
                    if let Some(call) = &mut self.call {
                        call.line = Some(line);
                    }
                    self.reads_control();
                }
                Hand::Data(index, receiving, deliver) => {
                    let deliver = if self.broken.applies_early {
                        self.applies_early(deliver)
                    } else {
                        deliver
                    };
                    if let Some(of) = self.connections.get_mut(index) {
                        of.stage = Stage::Read(receiving, deliver);
                    }
                    self.reads_data(index);
                }
            }
        }
    }

    fn applies_early(&self, mut deliver: Takes) -> Takes {
        let Some(session) = &self.engine.session else { return deliver };
        let ram = session.shared.ram.clone();
        Box::new(move |delivery| {
            deliver(delivery.map(|(mut part, taken)| {
                let _ = apply(&ram, &part.runs, &part.bytes);
                part.runs.clear();
                part.bytes.clear();
                (part, taken)
            }))
        })
    }

    /// Puts a word into the engine's queue.
    pub fn put(&mut self, word: Word) {
        match word {
            Word::Lost => {
                if let Some(call) = &mut self.call {
                    call.has_ended = true;
                }
                self.reads_control();
            }
            Word::DataLost(connection) => {
                let Some(of) = self.connections.get_mut(connection) else { return };
                if let Stage::Read(_, deliver) = &mut of.stage {
                    deliver(Err(ReceiveError::Wire(WireError::Closed)));
                    of.stage = Stage::Ended;
                }
            }
            Word::Bell => {
                if let Some(session) = &self.engine.session {
                    self.deliver(Input::Bell(session.number));
                }
            }
            Word::ImageFails => {
                self.spoils();
                self.deliver(Input::Images(IMAGES, Err("An image cannot be written".to_owned())));
            }
            Word::Answer(claim, event) => {
                let error = matches!(event, Event::Failed).then(|| "it failed".to_owned());
                self.deliver(Input::Arbiter(Asked { claim, event, error }));
            }
            Word::Stop => self.ask(Ask::Stop),
            Word::Failover { force } => self.ask(Ask::Failover { force }),
        }
    }

    fn ask(&mut self, ask: Ask) {
        let (answer, answers) = bounded(1);
        self.answers.push(answers);
        self.deliver(Input::Ask(ask, answer));
    }

    fn deliver(&self, input: Input) {
        // The engine holds the other end.
        let _ = self.inputs.send(input);
    }

    /// The replica gets images that cannot be written, as is found out when all of them has to be there.
    pub fn spoils(&mut self) {
        self.engine.images = Some((IMAGES, Images::lost()));
    }

    #[must_use]
    pub fn is_spoiled(&self) -> bool {
        self.engine.images.is_some()
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
            if self.broken.keeps_staged && matches!(input, Input::Lost(..) | Input::Bell(_)) {
                self.keeps_staged();
            }
            self.engine.input(input);
        }
        self.looks();
    }

    /// Does what is due after that.
    pub fn timers(&mut self) {
        if !self.engine.is_over() {
            self.engine.timers();
        }
        self.looks();
    }

    fn keeps_staged(&mut self) {
        let Engine { machine, session, replica, state, .. } = &mut self.engine;
        let (Some(session), Some(replica)) = (session, replica) else { return };
        if machine.state() == State::Replica
            && let Some((seal, parts)) = session.gather.take_staged()
        {
            for part in parts {
                let _ = apply(&session.shared.ram, &part.runs, &part.bytes);
            }
            *state = replica.parse(&seal.state).ok();
        }
    }

    /// What it said since it was asked last.
    #[must_use]
    pub fn said(&self) -> Vec<Message> {
        let line = self.call.as_ref().and_then(|call| call.line.as_ref());
        line.map_or_else(Vec::new, |line| line.said.try_iter().collect())
    }

    /// The frame of what is said by the control connection.
    ///
    /// # Panics
    /// Never: nothing fails that ends nowhere.
    pub fn writes(&mut self, message: &Message) -> Vec<u8> {
        let Some(call) = &mut self.call else { return vec![] };
        let Some(line) = &mut call.line else { return vec![] };
        message.send(&mut line.writer).expect("a tape takes all");
        call.out.take()
    }

    /// The frame with which a primary was refused, if one was.
    #[must_use]
    pub fn refused(&self) -> Option<Vec<u8>> {
        let call = self.call.as_ref().filter(|call| call.line.is_none())?;
        Some(call.out.take()).filter(|frame| !frame.is_empty())
    }

    /// What it wants to know of the arbiter.
    #[must_use]
    pub fn calls(&self) -> Vec<(u64, Action)> {
        self.calls.try_iter().collect()
    }

    /// Whether this side's end of the control connection is open.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.call.as_ref().is_some_and(|call| {
            let is_over = call.line.is_some() && self.engine.session.is_none();
            !is_over && !call.out.is_closed() && !call.out.is_finished()
        })
    }

    /// Whether it was closed at once, with what was not written yet.
    #[must_use]
    pub fn is_cut(&self) -> bool {
        self.call.as_ref().is_some_and(|call| call.out.is_closed())
    }

    /// Whether a primary is served.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.engine.session.is_some()
    }

    /// What it has done for its primaries so far, as its heartbeats say.
    #[must_use]
    pub fn done(&self) -> u64 {
        self.engine.status.counters.done()
    }

    #[must_use]
    pub fn machine(&self) -> &Backup {
        &self.engine.machine
    }

    /// Whose machine it has, or had.
    #[must_use]
    pub fn primary(&self) -> Option<HostId> {
        self.engine.built.as_ref().map(|built| built.primary)
    }

    /// The last acknowledged machine state.
    #[must_use]
    pub fn state(&self) -> Option<&<B::Replica as Replica>::State> {
        self.engine.state.as_ref()
    }

    /// Whether it takes what a primary sends.
    #[must_use]
    pub fn is_receiving(&self) -> bool {
        self.engine.is_receiving()
    }

    /// Whether it began as the backup of a reversed pair, and whether its primary has not called yet.
    #[must_use]
    pub fn is_heir(&self) -> bool {
        self.is_heir
    }

    #[must_use]
    pub fn is_awaiting(&self) -> bool {
        self.engine.is_awaiting()
    }

    #[must_use]
    pub fn is_over(&self) -> bool {
        self.engine.is_over()
    }

    /// It is over: how the VM is to be protected that it runs, if it does and somebody is to.
    ///
    /// # Panics
    /// If somebody who asked for something was not answered.
    #[must_use]
    pub fn end(self) -> Option<Back> {
        let Self { mut engine, answers, way_back, .. } = self;
        let is_taken_over = engine.machine.state() == State::TakenOver;
        engine.close();
        // What came too late hears that it is over.
        let late = engine.queue.try_iter().filter(|input| matches!(input, Input::Ask(..))).count();
        let told = answers.iter().filter(|answer| answer.try_recv().is_ok()).count();
        assert_eq!(told + late, answers.len(), "all who ask are answered");
        let left = way_back.lock().unwrap_or_else(PoisonError::into_inner).take();
        let back = |left: WayBack| Back { base: left.base, is_reversed: left.reversed };
        left.filter(|_| is_taken_over).map(back)
    }
}

/// What the acceptor makes of a connection whose greeting is here.
fn greet(mut reader: FrameReader<Box<dyn Stream>>, out: Tape) -> Arrival {
    let peer = PEER.to_owned();
    let greeting = receive_greeting(&mut reader);
    let session = reader.session().unwrap_or(SessionId(0));
    match greeting {
        Ok((hello, Some(offer))) => {
            let writer = FrameWriter::new(Box::new(out) as Box<dyn Stream>, session);
            let greeted = Box::new(Greeted { reader, writer });
            Arrival::Control { greeted, hello, offer: Box::new(offer), peer }
        }
        Ok((hello, None)) => Arrival::Data { reader, hello },
        Err(error) => Arrival::Stray { peer, error: chain(&error) },
    }
}

impl<B: ReplicaBuilder> std::fmt::Debug for Reception<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reception")
            .field("machine", &self.engine.machine)
            .field("is_connected", &self.is_connected())
            .finish_non_exhaustive()
    }
}
