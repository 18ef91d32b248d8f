//! A primary: the engine that ships, its turns, and what carries out what it wants.

use rand::Rng;
use replication::ownership::Standing;
use replication::primary::simulated::{Session, Step, Word};
use replication::protocol::primary::Purpose;
use replication::wire;

use super::super::driver::Driver;
use super::super::host::Backup;
use super::super::machine::Handle;
use super::super::state::State;
use super::connection::Item;
use super::engines::won;
use super::{Broken, Effect, Event, MS, PrimaryState, Role, Run, claim};

/// What a primary's options are, as a plan has them.
pub(super) fn options(run: &Run) -> api::replication::ReplicateData {
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

    pub(super) fn put(&mut self, at: usize, word: Word) {
        if let Some(session) = self.session(at) {
            session.put(word);
        }
        self.stirs(at);
    }

    pub(super) fn primary_turns(&mut self, at: usize) -> Result<(), String> {
        let Some(session) = self.session(at) else { return Ok(()) };
        session.turn();
        self.has_done(at)?;
        let Some(session) = self.session(at) else { return Ok(()) };
        session.timers();
        self.has_done(at)
    }

    /// What the engine has done is carried out.
    pub(super) fn has_done(&mut self, at: usize) -> Result<(), String> {
        let steps = self.steps(at);
        let resync = PrimaryState::Claiming(Purpose::Resync);
        let is_resync = |step: &Step| matches!(step, Step::Primary(_, to) if *to == resync);
        if steps.iter().any(is_resync) && !self.are_faults_over() && self.rng.random_ratio(1, 32) {
            // A person has the backup take over in the wrong moment.
            let soon_us = self.up_to(self.plan.arbiter_us_max / 2);
            self.after(soon_us, Event::FailoverSoon(1 - at));
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
        // What is to be a backup has its memory.
        let has_legacy = self.session(at).is_some_and(|session| session.has_legacy());
        if is_destroyed && !has_legacy {
            self.hosts[at].vm = None;
        }
        self.carry_out(at, effects)
    }

    /// The machine stood for this seal a moment ago, and nothing has written its memory since.
    fn sealed(&mut self, at: usize, seal: &wire::Seal) -> Result<(), String> {
        let state = State::parse(&seal.state)?;
        if let Some(vm) = &self.hosts[at].vm {
            self.oracle.sealed(state.position, seal.epoch, &vm.ram());
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
                Some(won())
            }
            Some(Broken::ReadIsWon) if misreads => Some(won()),
            _ => None,
        }
    }

    /// The machine writes more than most backups have room for.
    pub(super) fn floods(&mut self, at: usize) {
        let value = self.rng.random();
        if let Some(vm) = &mut self.hosts[at].vm {
            vm.floods(value);
        }
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
            self.send(at, Item::Data(connection, part.to_vec()));
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

    /// Its session is over: what follows it on this host.
    pub(super) fn primary_ends(&mut self, at: usize, driver: Driver) -> Role {
        let vm = &mut self.hosts[at].vm;
        match driver {
            Driver::Calls(engine) => {
                if let Some(vm) = vm {
                    vm.again = engine.machine.may_go_on();
                    vm.rest.take_if(|_| !vm.again);
                }
                Role::None
            }
            Driver::Works(session) => {
                let (rest, again, legacy) = session.end();
                let Some(machine) = vm else { return Role::None };
                if let Some(legacy) = legacy {
                    let kept = machine.ram();
                    *vm = None;
                    let backup = Backup::inherits(legacy, kept, &self.plan, self.broken);
                    return Role::Backup(Box::new(backup));
                }
                (machine.rest, machine.again) = (rest, again);
                Role::None
            }
        }
    }
}
