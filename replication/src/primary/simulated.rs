//! The memory's way out of a primary, step by step and without threads: for a simulator, which has its own
//! engine, clock and network.
//!
//! What is done in a step is what the product does: [`Sealer`] harvests, keeps and seals, [`OneSender`]
//! encodes and writes frames, [`InFlights`] and [`Rest`] know what the backup may lack. Only when a step
//! comes, and what carries the bytes, is the simulator's.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use api::replication::{Compression, Cow};

use super::in_flight::{InFlight, InFlights};
use super::rest;
use super::seal::{Pause, Room, Sealer};
use super::send::{Job, OneSender, Source};
use crate::capture::cow::Share;
use crate::encode::Encoder;
use crate::encode::choose::Choice;
use crate::guest::{Guest, MachineState};
use crate::ids::{EpochId, Generation, PAGE_SIZE};
use crate::protocol::backup::Handover;
use crate::protocol::primary::Primary;
use crate::ram::{PageBuffer, PageSet};
use crate::testing::Tape;
use crate::wire::{Base, FrameWriter, Seal, SessionId};

/// What both sides have agreed upon.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    pub session: SessionId,
    pub connections: usize,
    pub staging_bytes: u64,
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

/// A connection: what sends, where that goes, and what is to be sent.
struct Connection {
    sender: OneSender,
    tape: Tape,
    jobs: VecDeque<Job>,
}

/// The primary's side of a session.
pub struct Sending {
    terms: Terms,
    sealer: Sealer,
    connections: Vec<Connection>,
    scratch: PageBuffer,
    in_flight: InFlights,
    jobs: u64,
    fresh: bool,
    paired: Generation,
    sealed: EpochId,
    broken: Broken,
}

impl Sending {
    /// Begins a session. With a rest the tracking of pages went on; `has_base`: the backup has what that is
    /// the difference to.
    ///
    /// # Panics
    /// If no thread can be started: one that has buffers ready.
    #[must_use]
    pub fn open<G: Guest>(
        guest: &mut G,
        terms: Terms,
        sealed: EpochId,
        rest: Option<Rest>,
        has_base: bool,
        broken: Broken,
    ) -> Self {
        let ram = guest.ram();
        let patience = Duration::from_secs(1);
        let most = terms.staging_bytes / PAGE_SIZE as u64;
        let mut sealer = Sealer::new(ram.clone(), Cow::Copy, most, patience).expect("a freezer");
        if rest.is_none() {
            guest.start_tracking().expect("a simulated machine tracks");
        }
        let rest = rest.map(|rest| rest.0);
        let has_base = rest::go_on(rest, has_base, &mut sealer.dirty);
        let of = terms.connections;
        let connect = |index| {
            let tape = Tape::default();
            let writer = FrameWriter::new(Box::new(tape.clone()) as _, terms.session);
            let share = Share { index, of };
            let sender = OneSender::new(share, &ram, writer, Compression::None, &Arc::default());
            Connection { sender, tape, jobs: VecDeque::new() }
        };
        Self {
            connections: (0..of).map(connect).collect(),
            in_flight: InFlights::new(ram.pages()),
            terms,
            sealer,
            scratch: OneSender::scratch(),
            jobs: 0,
            fresh: !has_base,
            paired: Generation(0),
            sealed,
            broken,
        }
    }

    #[must_use]
    pub fn terms(&self) -> Terms {
        self.terms
    }

    /// Whether nothing was sent to this backup that it could have kept.
    #[must_use]
    pub fn is_fresh(&self) -> bool {
        self.fresh
    }

    /// What senders do with pages from here on, as `compression=auto` may say at any time.
    pub fn choose(&mut self, delta: bool, lz4: bool) {
        let choice = Choice { delta, lz4 };
        self.connections.iter_mut().for_each(|of| of.sender.encoder.choose(choice));
    }

    fn give(&mut self, epoch: EpochId, source: &Source) {
        self.jobs += 1;
        for of in &mut self.connections {
            of.jobs.push_back(Job { number: self.jobs, epoch, source: source.clone() });
        }
    }

    /// Has a pass of a copy sent: what was written until now, as it is when it is sent.
    ///
    /// # Panics
    /// If the guest fails.
    pub fn copy<G: Guest>(&mut self, guest: &mut G) {
        self.sealer.harvest(guest).expect("a simulated machine harvests");
        if std::mem::take(&mut self.fresh) {
            self.sealer.dirty.drop_untouched(guest);
        }
        let set = self.sealer.take();
        self.give(EpochId(0), &Source::Live(set));
    }

    /// Seals an epoch and has it sent. `None`: it is larger than what the backup can stage beside what is in
    /// flight, and the guest stands.
    ///
    /// # Panics
    /// If the guest fails.
    pub fn seal<G: Guest>(
        &mut self,
        guest: &mut G,
        epoch: EpochId,
        generation: Generation,
        handover: Handover,
    ) -> Option<Seal> {
        self.sealer.ahead(guest).expect("a simulated machine harvests");
        let most = self.terms.staging_bytes / PAGE_SIZE as u64;
        let room = Room { pages: most.saturating_sub(self.in_flight.pages()), log_bytes: 0 };
        let stay = handover != Handover::No;
        let pause = self.sealer.seal(guest, epoch, stay, &room, || {});
        let Pause::Sealed(sealed) = pause.expect("a simulated machine is sealed") else {
            return None;
        };
        let set = Arc::clone(self.sealer.sealed());
        let of = self.terms.connections;
        let pages = (0..of).map(|index| Share { index, of }.count(&set)).collect();
        self.give(epoch, &sealed.source);
        let mut state = Vec::new();
        sealed.state.encode(&mut state).expect("a simulated state is encoded");
        (self.sealed, self.paired) = (epoch, generation);
        self.in_flight.sealed(InFlight {
            sealed_at: Instant::now(),
            pages: set.len(),
            set,
            log_bytes: 0,
            touched_bytes: 0,
        });
        self.sealer.prepare();
        Some(Seal { epoch, generation, handover, pages, changes: 0, state })
    }

    /// Has the guest wait until there is room for what it writes.
    ///
    /// # Panics
    /// If the guest fails.
    pub fn hold_up<G: Guest>(&mut self, guest: &mut G) {
        self.sealer.hold_up(guest).expect("a simulated machine stands");
    }

    /// Lets the guest run, if it stands.
    ///
    /// # Panics
    /// If the guest fails.
    pub fn release<G: Guest>(&mut self, guest: &mut G) {
        self.sealer.release(guest).expect("a simulated machine runs");
    }

    /// Whether a connection has something to send.
    #[must_use]
    pub fn is_unsent(&self, connection: usize) -> bool {
        self.connections.get(connection).is_some_and(|of| !of.jobs.is_empty())
    }

    /// Whether any has.
    #[must_use]
    pub fn is_sending(&self) -> bool {
        self.connections.iter().any(|of| !of.jobs.is_empty())
    }

    /// Sends what is next on a connection: its bytes.
    ///
    /// # Panics
    /// Never: nothing fails that ends nowhere.
    pub fn send(&mut self, connection: usize) -> Vec<u8> {
        let Self { connections, scratch, broken, terms, .. } = self;
        let Some(of) = connections.get_mut(connection) else { return vec![] };
        let Some(job) = of.jobs.pop_front() else { return vec![] };
        let stale = (broken.stale_deltas && job.epoch == EpochId(0)).then(|| {
            let fresh = Encoder::new(Compression::None, terms.connections);
            std::mem::replace(&mut of.sender.encoder, fresh)
        });
        of.sender.send(job, scratch).expect("a tape takes all");
        if let Some(stale) = stale {
            of.sender.encoder = stale;
        }
        of.tape.take()
    }

    /// The oldest epoch in flight is acknowledged.
    pub fn acked(&mut self) {
        if let Some(epoch) = self.in_flight.acked() {
            self.sealer.recycle(epoch.set);
        }
    }

    /// The session's connections are closed: nothing more is sent or acknowledged.
    pub fn close(&mut self) {
        self.connections.iter_mut().for_each(|of| of.jobs.clear());
        self.forget();
    }

    /// Nobody will acknowledge what is in flight.
    pub fn forget(&mut self) {
        while self.broken.forgets && self.in_flight.acked().is_some() {}
        self.in_flight.forget();
    }

    /// What is known for the session after this one, whose machine is `machine`.
    pub fn rest(&mut self, machine: &Primary) -> Option<Rest> {
        self.forget();
        let none = PageSet::new(self.sealer.dirty.pages().universe());
        let last = if self.broken.forgets { &none } else { &**self.sealer.sealed() };
        let sets = (last, self.sealer.dirty.pages());
        self.in_flight.rest(machine, self.terms.session, self.paired, self.sealed, sets).map(Rest)
    }
}

impl std::fmt::Debug for Sending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sending").field("terms", &self.terms).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Rest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Rest").field(&self.base()).finish()
    }
}
