//! The engine without threads, step by step: for a simulator, which has its own clock, network and arbiter.
//!
//! What is decided and done in a step is what ships: [`Engine`] with whom it serves, its timers and its claims,
//! [`Receiving`], the greeting, and what they stand on. The simulator says when a step comes, which is when the
//! engine's thread would get to it, brings bytes, and carries what is said and asked. What reads a connection
//! does so at once, as a thread of its own does.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use api::replication::ReceiveReplicaData;
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

pub(super) use self::link::{Hand, Line};
use self::link::{Link, Takes};
use super::{Ask, Asked, Asker, Crew, Engine, Images, Input, State, chain};
use crate::backup::accept::{Arrival, Place};
use crate::backup::apply::apply;
use crate::backup::receive::Receiving;
use crate::engine::clock::simulated as clock;
use crate::engine::status::Status;
use crate::error::Error;
use crate::guest::{Replica, ReplicaBuilder};
use crate::handover::{Legacy, WayBack};
use crate::ownership::{HostId, HostIdentity};
use crate::protocol::backup::Backup;
use crate::protocol::ownership::{Action, Event};
use crate::wire::{Base, Message, SessionId};

mod link;

/// The number of what a simulator says of images, where a session's begin with 1.
const IMAGES: u64 = 0;

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
    /// A session's control connection ended.
    Lost(SessionId),
    /// One of its data connections ended.
    DataLost(SessionId, usize),
    /// Its primary's process ended.
    Bell(SessionId),
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

/// A backup, from its first call to its end.
pub struct Reception<B: ReplicaBuilder> {
    engine: Engine<B>,
    inputs: Sender<Input>,
    hands: Receiver<Hand>,
    calls: Receiver<(u64, Action)>,
    way_back: Arc<Mutex<Option<WayBack>>>,
    is_heir: bool,
    /// The last is that of whoever called last; another one may be of a session that has not ended.
    links: Vec<Link>,
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
            links: vec![],
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

    /// A primary connects for a session, with so many connections beside that for control.
    pub fn connects(&mut self, session: SessionId, connections: usize) {
        let served = self.engine.session.as_ref().map(|session| session.id);
        self.links.retain(|link| Some(link.session) == served);
        self.links.push(Link::new(session, connections));
    }

    fn link(&mut self, session: SessionId) -> Option<&mut Link> {
        self.links.iter_mut().find(|link| link.session == session)
    }

    /// Whoever connected and did not greet has had the time for it.
    pub fn greeting_late(&mut self) {
        if let Some(stray) = self.links.last().and_then(Link::is_late) {
            self.links.pop();
            self.arrives(Some(stray));
        }
    }

    /// Bytes of a session's control connection.
    pub fn hears(&mut self, session: SessionId, bytes: &[u8]) {
        let arrival = self.link(session).and_then(|link| link.hears(bytes));
        self.arrives(arrival);
    }

    /// Bytes of one of its data connections.
    pub fn takes(&mut self, session: SessionId, connection: usize, bytes: &[u8]) {
        let Self { links, scratch, .. } = self;
        let link = links.iter_mut().find(|link| link.session == session);
        let arrival = link.and_then(|link| link.takes(connection, bytes, scratch));
        self.arrives(arrival);
    }

    fn arrives(&self, arrival: Option<Arrival>) {
        if let Some(arrival) = arrival {
            self.deliver(Input::Arrival(arrival, Place::unlimited()));
        }
    }

    /// Connections that the engine has taken since are read.
    fn looks(&mut self) {
        while let Ok(hand) = self.hands.try_recv() {
            match hand {
                Hand::Control(session, line) => {
                    if let Some(link) = self.link(session) {
                        link.is_accepted(line);
                    }
                }
                Hand::Data(session, index, receiving, takes) => {
                    let is_early = self.broken.applies_early;
                    let takes = if is_early { self.applies_early(takes) } else { takes };
                    let Self { links, scratch, .. } = self;
                    let link = links.iter_mut().find(|link| link.session == session);
                    if let Some(link) = link {
                        link.is_taken(index, receiving, takes, scratch);
                    }
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
            Word::Lost(session) => {
                if let Some(link) = self.link(session) {
                    link.ends();
                }
            }
            Word::DataLost(session, connection) => {
                if let Some(link) = self.link(session) {
                    link.ends_data(connection);
                }
            }
            Word::Bell(session) => {
                if let Some(served) = self.engine.session.as_ref().filter(|of| of.id == session) {
                    self.deliver(Input::Bell(served.number));
                }
            }
            Word::ImageFails => {
                self.spoils();
                self.deliver(Input::Images(IMAGES, Err("An image cannot be written".to_owned())));
            }
            Word::Answer(claim, event) => {
                let error = matches!(event, Event::Failed).then(|| "it failed".to_owned());
                self.deliver(Input::Arbiter(Asked { claim, event, error, is_gone: false }));
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

    /// What it said since it was asked last, and in which session.
    #[must_use]
    pub fn said(&self) -> Vec<(SessionId, Message)> {
        let of = |link: &Link| {
            let session = link.session;
            link.said().map(move |message| (session, message)).collect::<Vec<_>>()
        };
        self.links.iter().flat_map(of).collect()
    }

    /// The frame of what is said to whoever called last.
    pub fn writes(&mut self, message: &Message) -> Vec<u8> {
        self.links.last_mut().map_or_else(Vec::new, |link| link.writes(message))
    }

    /// The frame with which that one was refused, if it was.
    #[must_use]
    pub fn refused(&self) -> Option<Vec<u8>> {
        self.links.last().and_then(Link::refused)
    }

    /// What it wants to know of the arbiter.
    #[must_use]
    pub fn calls(&self) -> Vec<(u64, Action)> {
        self.calls.try_iter().collect()
    }

    /// Whether this side's end is open of the control connection of whoever called last.
    #[must_use]
    pub fn is_open(&self) -> bool {
        let served = self.engine.session.as_ref().map(|session| session.id);
        self.links.last().is_some_and(|link| {
            let is_over = link.is_accepted_by_now() && Some(link.session) != served;
            !is_over && !link.is_closed()
        })
    }

    /// Whether it was closed at once, with what was not written yet.
    #[must_use]
    pub fn is_cut(&self) -> bool {
        self.links.last().is_some_and(Link::is_cut)
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

impl<B: ReplicaBuilder> std::fmt::Debug for Reception<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reception")
            .field("machine", &self.engine.machine)
            .field("is_connected", &self.is_connected())
            .finish_non_exhaustive()
    }
}
