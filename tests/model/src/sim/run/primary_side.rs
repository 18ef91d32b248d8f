//! A primary: the engine that ships, its turns, and what carries out what it wants.

use rand::Rng;
use replication::ids::{Generation, PAGE_SIZE};
use replication::ownership::{HostId, Outcome, Record, Seen, Standing};
use replication::primary::simulated::{
    Between, Broken as SessionBroken, Session, Start, Step as Shipped, Terms, Word, admit,
    take_steps,
};
use replication::protocol::backup::Handover;
use replication::protocol::primary::{Primary, Purpose};
use replication::wire::{self, SessionId};
use uuid::Uuid;

use super::super::driver::Driver;
use super::super::image::State;
use super::super::machine::{Handle, Machine};
use super::control;
use super::{
    Around, Broken, Content, Effect, Event, Kind, MS, PrimaryState, Protects, Role, Run, SEALS_MAX,
    Step, VM, backup, claim, primary,
};

/// What a primary's options are, as a plan has them.
fn options(run: &Run) -> api::replication::ReplicateData {
    let text = serde_json::json!({
        "destination_url": "tcp:10.0.0.2:7000",
        "epoch_ms": run.plan.epoch_us.div_ceil(MS),
        "epoch_min_ms": run.plan.epoch_min_ms.min(run.plan.epoch_us.div_ceil(MS)),
        "heartbeat_ms": run.plan.heartbeat_us / MS,
        "timeout_ms": run.plan.timeout_us / MS,
        "cow": "copy",
        "connections": run.plan.connections,
        "return_url": run.plan.reverses.then_some("tcp:10.0.0.1:7000"),
    });
    serde_json::from_value(text).expect("options that any client may send")
}

impl Run {
    pub(super) fn session(&mut self, at: usize) -> Option<&mut Session<Handle>> {
        match &mut self.hosts[at].role {
            Role::Primary(Driver::Works(session)) => Some(session),
            _ => None,
        }
    }

    pub(super) fn tell_primary(
        &mut self,
        at: usize,
        input: primary::Input<Content>,
    ) -> Result<(), String> {
        let mut effects = vec![];
        let host = &mut self.hosts[at];
        let mut around = Around { vm: &mut host.vm, effects: &mut effects, broken: self.broken };
        match &mut host.role {
            Role::Primary(Driver::Calls(engine)) => engine.input(input, &mut around),
            Role::Primary(Driver::Works(_)) => {
                if let Some(word) = self.word(input) {
                    self.put(at, word);
                }
                return Ok(());
            }
            Role::Backup(_) | Role::None => {}
        }
        self.carry_out(at, effects)
    }

    /// What the engine that ships is told for what the model's is.
    fn word(&self, input: primary::Input<Content>) -> Option<Word> {
        use primary::Input;
        Some(match input {
            Input::Message(message) => Word::Message(control::of(message)?),
            Input::Lost => Word::Lost,
            Input::GiveUp => Word::Fails,
            Input::Stop => Word::Stop,
            Input::Failover => Word::Failover { reverses: self.plan.reverses },
            Input::Answer(number, event) => Word::Answer(number, event),
            // It copies, seals and waits by itself.
            Input::Copied | Input::Due | Input::TooLarge | Input::Reached | Input::Timer => {
                return None;
            }
        })
    }

    fn put(&mut self, at: usize, word: Word) {
        if let Some(session) = self.session(at) {
            session.put(word);
        }
        self.stirs(at);
    }

    /// The engine has something to do: its thread gets to it soon.
    pub(super) fn stirs(&mut self, at: usize) {
        let Some(session) = self.session(at) else { return };
        let (is_wanted, due_us) = (session.is_wanted(), session.due().as_micros());
        let due_us = u64::try_from(due_us).unwrap_or(u64::MAX).max(self.now_us);
        let busy_us = if self.rng.random_ratio(1, 16) { 5 * MS } else { MS / 5 };
        let soon_us = self.now_us + self.up_to(busy_us);
        // A thread that waits for a time is up a little after it.
        let next_us = if is_wanted { soon_us } else { due_us + (soon_us - self.now_us) };
        if self.beside[at].turn_us.is_none_or(|turn_us| next_us < turn_us) {
            self.beside[at].turn_us = Some(next_us);
            self.at(next_us, Event::Turn(at, self.beside[at].life));
        }
    }

    /// The engine's thread has a turn.
    pub(super) fn turns(&mut self, at: usize) -> Result<(), String> {
        if self.beside[at].turn_us.is_none_or(|turn_us| turn_us > self.now_us) {
            // An earlier one has dealt with it.
            return Ok(());
        }
        self.beside[at].turn_us = None;
        let Some(session) = self.session(at) else { return Ok(()) };
        session.turn();
        self.has_done(at)?;
        let Some(session) = self.session(at) else { return Ok(()) };
        session.timers();
        self.has_done(at)?;
        self.stirs(at);
        Ok(())
    }

    /// What the engine has done is carried out.
    fn has_done(&mut self, at: usize) -> Result<(), String> {
        for step in take_steps() {
            let step = match step {
                Shipped::Primary(from, to) => Step::Primary(from, to),
                Shipped::Claim(from, to) => Step::Claim(from, to),
            };
            self.summary.coverage.note(step);
            if self.tracing {
                self.went(at, step);
            }
        }
        let Some(session) = self.session(at) else { return Ok(()) };
        let (said, calls, is_open) = (session.said(), session.calls(), session.is_connected());
        // What waits to be written as the connection is closed may be lost.
        let is_lost = !is_open && self.rng.random_ratio(1, 4);
        for message in said {
            if let wire::Message::Seal(seal) = &message {
                self.sealed(at, seal)?;
            }
            if !is_lost {
                self.speaks(at, &message);
            }
        }
        let mut effects = vec![];
        for (number, action) in calls {
            match self.broken_call(at, &action) {
                Some(event) => self.put(at, Word::Answer(number, event)),
                None => effects.push(Effect::Call(number, action)),
            }
        }
        if !is_open && self.ways[at].open {
            effects.push(Effect::Close);
        }
        let is_destroyed = self.hosts[at].vm.as_ref().is_some_and(|vm| vm.inside().is_destroyed);
        if is_destroyed && !self.hosts[at].primary().is_some_and(Protects::is_heir) {
            self.hosts[at].vm = None;
        }
        self.carry_out(at, effects)
    }

    /// The machine stood for this seal a moment ago, and nothing has written its memory since.
    fn sealed(&mut self, at: usize, seal: &wire::Seal) -> Result<(), String> {
        let state = State::parse(&seal.state, seal.epoch, seal.generation)?;
        let terms = self.terms();
        if let Some(vm) = &mut self.hosts[at].vm {
            self.oracle.sealed(state.position, &vm.ram());
            if seal.handover != Handover::No {
                vm.last = Some((state, terms));
            }
        }
        Ok(())
    }

    /// What a primary with a broken rule makes of a call that it is to make.
    fn broken_call(&mut self, at: usize, action: &claim::Action) -> Option<claim::Event> {
        let claim::Action::Swap { next, .. } = action else { return None };
        let me = self.hosts[at].identity.host;
        let state = self.hosts[at].primary().map(|primary| primary.machine().state());
        let misreads = std::mem::take(&mut self.beside[at].misreads);
        match self.broken {
            Some(Broken::ReleaseOnClaim) if next.standing == (Standing::Solo { owner: me }) => {
                if let Some(vm) = &self.hosts[at].vm {
                    vm.inside().pass();
                }
                None
            }
            Some(Broken::ResyncWithoutClaim)
                if state == Some(PrimaryState::Claiming(Purpose::Resync)) =>
            {
                Some(claim::Event::Swapped(Outcome::Won))
            }
            Some(Broken::ReadIsWon) if misreads => Some(claim::Event::Swapped(Outcome::Won)),
            _ => None,
        }
    }

    /// What a primary with a broken rule makes of an answer of the arbiter.
    pub(super) fn misread(
        &mut self,
        at: usize,
        action: &claim::Action,
        event: claim::Event,
    ) -> claim::Event {
        if self.session(at).is_none() {
            return event;
        }
        match (self.broken, action, &event) {
            (Some(Broken::UnknownIsWon), claim::Action::Swap { .. }, claim::Event::Failed) => {
                claim::Event::Swapped(Outcome::Won)
            }
            (
                Some(Broken::UnknownIsLost),
                claim::Action::Swap { next, .. },
                claim::Event::Failed,
            ) => {
                let standing = Standing::Solo { owner: HostId(Uuid::nil()) };
                claim::Event::Swapped(Outcome::Lost(Some(Record { standing, ..*next })))
            }
            (Some(Broken::ReadIsWon), claim::Action::Read { .. }, claim::Event::Read(Some(_))) => {
                self.beside[at].misreads = true;
                event
            }
            _ => event,
        }
    }

    /// The machine writes more than most backups have room for.
    pub(super) fn floods(&mut self, at: usize) -> Result<(), String> {
        let value = self.rng.random();
        if let Some(vm) = &mut self.hosts[at].vm {
            vm.floods(value);
        }
        match &self.hosts[at].role {
            Role::Primary(Driver::Calls(_)) => self.tell_primary(at, primary::Input::TooLarge),
            _ => Ok(()),
        }
    }

    /// A connection ends for this host alone.
    pub(super) fn loses(&mut self, at: usize) -> Result<(), String> {
        if self.session(at).is_some() && self.rng.random_ratio(1, 2) {
            self.put(at, Word::DataLost);
            return Ok(());
        }
        self.input(at, || primary::Input::Lost, || backup::Input::Lost)
    }

    /// A data connection sends what is next.
    pub(super) fn sends(&mut self, at: usize, connection: usize) -> Result<(), String> {
        self.beside[at].sends[connection] = false;
        let Some(session) = self.session(at) else { return Ok(()) };
        if !session.is_unsent(connection) {
            return Ok(());
        }
        let bytes = session.send(connection);
        self.summary.wire_bytes += bytes.len() as u64;
        // A stream knows no frames.
        let cut = self.rng.random_range(0..=bytes.len());
        for part in [&bytes[..cut], &bytes[cut..]] {
            self.send(at, super::Item::Data(connection, part.to_vec()));
        }
        self.stirs(at);
        self.pump(at);
        Ok(())
    }

    /// Connections that have something to send do so soon.
    pub(super) fn pump(&mut self, at: usize) {
        for connection in 0..self.plan.connections {
            let Some(session) = self.session(at) else { return };
            let copies = session.machine().state() == PrimaryState::Syncing;
            let has_more = session.is_unsent(connection);
            if has_more && !std::mem::replace(&mut self.beside[at].sends[connection], true) {
                let soon_us = self.up_to(if copies { 30 * MS } else { self.plan.delay_us_max / 2 });
                self.after(soon_us, Event::Sends(at, self.beside[at].life, connection));
            }
        }
    }

    pub(super) fn connect(&mut self, at: usize) -> Result<(), String> {
        let other = 1 - at;
        let me = self.hosts[at].identity;
        let welcome = self.hosts[other].backup().is_some_and(|backup| backup.welcomes(VM));
        let idle =
            self.hosts[at].vm.as_ref().is_some_and(|vm| vm.inside().history.open < SEALS_MAX);
        if !welcome || !idle || !matches!(self.hosts[at].role, Role::None) {
            return Ok(());
        }
        // Nothing may be mounted where the arbiter's directory is to be.
        let is_away = self.plan.kind == Kind::Files && self.beside[at].is_unmounted;
        let record = if is_away { None } else { self.record() };
        let seen = self.seen(at);
        let Some(generation) = admit(&seen, record.filter(|_| self.plan.arbiter), me) else {
            return Ok(());
        };
        let (base, again) = self.hosts[at].vm.as_ref().map_or((None, false), Machine::calls);
        self.link();
        self.ghost.accepts(other);
        self.tell_backup(other, backup::Input::Arrival(me, base))?;
        let has_base = self.hosts[other].backup().is_some_and(backup::Engine::has_base);
        self.summary.bases += u64::from(has_base);
        let start = if again { Start::Again } else { Start::First };
        self.opens(at, (start, generation), has_base, false)
    }

    /// What this process knows of the record.
    pub(super) fn seen(&self, at: usize) -> Seen {
        self.beside[at].known.of(VM, self.plan.arbiter.then_some("arbiter"))
    }

    fn terms(&self) -> Terms {
        Terms {
            session: SessionId(self.session),
            connections: self.plan.connections,
            staging_bytes: self.plan.staging_pages * PAGE_SIZE as u64,
        }
    }

    /// A session begins; `is_whole`: the backup has a committed epoch.
    fn opens(
        &mut self,
        at: usize,
        start: (Start, Generation),
        has_base: bool,
        is_whole: bool,
    ) -> Result<(), String> {
        let terms = self.terms();
        let image = self.hosts[1 - at].backup().and_then(backup::Engine::image);
        if let Some(image) = image {
            image.open(terms, is_whole, self.broken);
        }
        let between = Between {
            identity: self.hosts[at].identity,
            backup: self.hosts[1 - at].identity.host,
            arbiter: self.plan.arbiter,
            seen: self.seen(at),
        };
        let breaks = SessionBroken {
            stale_deltas: self.broken == Some(Broken::DeltaOfAnother),
            forgets: self.broken == Some(Broken::RestForgets),
        };
        let (delta, lz4) = (self.rng.random(), self.rng.random());
        let options = options(self);
        let Some(vm) = &mut self.hosts[at].vm else { return Ok(()) };
        let (guest, rest) = (vm.handle(self.broken), vm.rest.take());
        let mut session =
            Session::open(guest, options, between, start, terms, (rest, has_base), breaks);
        session.choose(delta, lz4);
        session.begin();
        self.hosts[at].role = Role::Primary(Driver::Works(Box::new(session)));
        self.beats();
        self.has_done(at)?;
        self.stirs(at);
        Ok(())
    }

    /// The new primary of a reversed pair calls its old host, until that answers or the time is over.
    pub(super) fn reach(&mut self, at: usize) -> Result<(), String> {
        let (host, other) = (&self.hosts[at], &self.hosts[1 - at]);
        let Some(primary) = host.primary().filter(|primary| primary.is_calling()) else {
            return Ok(());
        };
        let machine: Primary = primary.machine().clone();
        let generation = machine.generation();
        let stands = self.generation() == generation;
        let awaited = other.backup().and_then(backup::Engine::awaits) == Some(host.identity.host);
        let is_cut = self.ways.iter().any(|way| way.cut);
        let sleeps = self.beside[1 - at].asleep_us > self.now_us;
        if !(stands && awaited && other.alive) || is_cut || sleeps {
            let again_us = self.about(20 * MS);
            self.after(again_us, Event::Reach(at, self.beside[at].life));
            return Ok(());
        }
        let me = host.identity;
        self.link();
        self.tell_backup(1 - at, backup::Input::Arrival(me, None))?;
        self.opens(at, (Start::Reversed(machine), generation), true, true)
    }
}
