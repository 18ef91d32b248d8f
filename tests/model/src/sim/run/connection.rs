//! The connection between the hosts.

use rand::Rng;
use replication::backup::simulated::Reception;
use replication::ids::{EpochId, PAGE_SIZE};
use replication::primary::simulated::Terms;
use replication::wire::{self, SessionId};

use super::control::{self, Control};
use super::{
    Around, Content, Event, Item, MS, Machine, Message, Role, Run, SEALS_MAX, STALL_TIMEOUTS, VM,
    Way, backup, primary,
};
use crate::broken::Broken;
use crate::host::Seal;
use crate::vm::Vm;

impl Run {
    pub(super) fn send(&mut self, from: usize, item: Item) {
        let to = 1 - from;
        if !self.ways[from].open {
            return;
        }
        if self.ways[to].cut {
            self.ways[to].waiting.push(item);
            return;
        }
        let way_us = self.up_to(self.plan.delay_us_max);
        let way = &mut self.ways[to];
        let last = match item {
            Item::Data(connection, _) => &mut way.data_us[connection],
            Item::Control(_) | Item::End => &mut way.last_us,
        };
        *last = (*last).max(self.now_us + way_us);
        let at_us = *last;
        self.at(at_us, Event::Arrives(to, self.session, item));
    }

    /// Something is said by the control connection.
    pub(super) fn speaks(&mut self, from: usize, message: &wire::Message) {
        if self.ways[from].open
            && let Some(control) = &mut self.beside[from].control
        {
            let frame = control.write(message);
            self.send(from, Item::Control(frame));
        }
    }

    pub(super) fn heal(&mut self, to: usize) {
        self.ways[to].cut = false;
        for item in std::mem::take(&mut self.ways[to].waiting) {
            self.send(1 - to, item);
        }
    }

    pub(super) fn arrives(&mut self, to: usize, session: u64, item: Item) -> Result<(), String> {
        let way = &self.ways[to];
        let closed = !way.open && self.now_us > way.grace_us;
        let dead = way.dead_us.is_some_and(|dead_us| self.now_us > dead_us);
        if session != self.session || !self.hosts[to].alive || closed {
            return Ok(());
        }
        if dead && !matches!(item, Item::End) {
            return Ok(());
        }
        self.beside[to].heard_us = self.now_us;
        match item {
            Item::End => self.input(to, || primary::Input::Lost, || backup::Input::Lost),
            Item::Data(connection, bytes) => self.takes(to, connection, bytes),
            Item::Control(frame) => self.hears(to, &frame),
        }
    }

    fn hears(&mut self, to: usize, frame: &[u8]) -> Result<(), String> {
        let Some(control) = &mut self.beside[to].control else { return Ok(()) };
        // Nothing garbles this connection.
        let Some(message) = control::heard(control.read(frame)?)? else { return Ok(()) };
        match &message {
            Message::Ack { .. } => self.beside[to].progress_us = self.now_us,
            Message::Seal(seal) => {
                if let Some(reason) = self.gathers(to, seal) {
                    return self.tell_backup(to, backup::Input::Bad(reason));
                }
            }
            _ => {}
        }
        self.input(
            to,
            || primary::Input::Message(message.clone()),
            || backup::Input::Message(message.clone()),
        )?;
        self.look(to)
    }

    /// A seal is staged beside its pages; why it cannot be.
    fn gathers(&mut self, to: usize, seal: &Seal<Content>) -> Option<String> {
        let late = self.broken == Some(Broken::AckAfterSuspecting);
        let backup = self.hosts[to].backup().filter(|backup| backup.is_receiving() || late)?;
        let Seal { epoch, generation, handover, content } = seal.clone();
        let Content { pages, state } = content;
        let seal = wire::Seal { epoch, generation, handover, pages, changes: 0, state };
        let due = backup.machine.expected();
        let image = backup.image()?;
        image.with(|reception| reception.sealed(seal, due))?.err()
    }

    /// Bytes of a data connection.
    fn takes(&mut self, to: usize, connection: usize, mut bytes: Vec<u8>) -> Result<(), String> {
        if !bytes.is_empty() && std::mem::take(&mut self.beside[to].garbles) {
            let bit = self.rng.random_range(0..bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            self.summary.garbled += 1;
        }
        let late = self.broken == Some(Broken::AckAfterSuspecting);
        let Some(backup) = self.hosts[to].backup().filter(|of| of.is_receiving() || late) else {
            return Ok(());
        };
        let due = backup.machine.expected();
        let image = backup.image();
        let staged = image.and_then(|image| image.with(|of| of.arrived(connection, &bytes, due)));
        match staged {
            Some(Err(reason)) => self.tell_backup(to, backup::Input::Bad(reason)),
            Some(Ok(())) => self.look(to),
            None => Ok(()),
        }
    }

    /// Epochs that are whole.
    pub(super) fn look(&mut self, at: usize) -> Result<(), String> {
        let late = self.broken == Some(Broken::AckAfterSuspecting);
        while let Some(backup) = self.hosts[at].backup().filter(|of| of.awaits_pages() || late) {
            let Some(image) = backup.image() else { return Ok(()) };
            match image.with(Reception::is_whole) {
                Some(Ok(true)) => self.tell_backup(at, backup::Input::Whole)?,
                Some(Ok(false)) | None => return Ok(()),
                Some(Err(reason)) => return self.tell_backup(at, backup::Input::Bad(reason)),
            }
        }
        Ok(())
    }

    /// A data connection of the primary sends what is next.
    pub(super) fn sends(&mut self, at: usize, connection: usize) -> Result<(), String> {
        self.beside[at].sends[connection] = false;
        let Some(sending) = self.hosts[at].vm.as_mut().and_then(Machine::sending) else {
            return Ok(());
        };
        if !sending.is_unsent(connection) {
            return Ok(());
        }
        let bytes = sending.send(connection);
        let is_over = !sending.is_sending();
        self.summary.wire_bytes += bytes.len() as u64;
        // A stream knows no frames.
        let cut = self.rng.random_range(0..=bytes.len());
        for part in [&bytes[..cut], &bytes[cut..]] {
            self.send(at, Item::Data(connection, part.to_vec()));
        }
        let copies = self.hosts[at].primary().is_some_and(primary::Engine::is_copying);
        if copies && is_over {
            // What was written meanwhile is copied in another pass, or is for the first epoch.
            if self.rng.random_ratio(1, 4)
                && let Some(vm) = &mut self.hosts[at].vm
            {
                vm.copy();
                self.pump(at);
                return Ok(());
            }
            return self.tell_primary(at, primary::Input::Copied);
        }
        self.pump(at);
        Ok(())
    }

    /// Connections that have something to send do so soon.
    pub(super) fn pump(&mut self, at: usize) {
        let copies = self.hosts[at].primary().is_some_and(primary::Engine::is_copying);
        for connection in 0..self.plan.connections {
            let sending = self.hosts[at].vm.as_mut().and_then(Machine::sending);
            let has_more = sending.is_some_and(|sending| sending.is_unsent(connection));
            if has_more && !std::mem::replace(&mut self.beside[at].sends[connection], true) {
                let soon_us = self.up_to(if copies { 30 * MS } else { self.plan.delay_us_max / 2 });
                self.after(soon_us, Event::Sends(at, self.beside[at].life, connection));
            }
        }
    }

    pub(super) fn check(&mut self, at: usize, life: u64) -> Result<(), String> {
        if !self.is_current(at, life) || !self.hosts[at].is_connected() {
            return Ok(());
        }
        let timeout_us = self.plan.timeout_us;
        let deadline_us = self.beside[at].heard_us + timeout_us;
        if self.now_us < deadline_us {
            self.at(deadline_us, Event::Check(at, life));
            return Ok(());
        }
        if self.now_us - deadline_us > timeout_us / 2 {
            // This process itself stood still: the peer gets another chance.
            self.beside[at].heard_us = self.now_us;
            self.after(timeout_us, Event::Check(at, life));
            return Ok(());
        }
        let receives = self.hosts[at].backup().is_none_or(|backup| backup.is_receiving());
        if receives {
            self.input(at, || primary::Input::Lost, || backup::Input::Lost)?;
        }
        if self.hosts[at].is_connected() {
            self.after(timeout_us, Event::Check(at, life));
        }
        Ok(())
    }

    pub(super) fn due(&mut self, at: usize, life: u64) -> Result<(), String> {
        if !self.is_current(at, life) {
            return Ok(());
        }
        let Some(primary) = self.hosts[at].primary() else { return Ok(()) };
        if !primary.has_in_flight() {
            self.beside[at].progress_us = self.now_us;
        }
        let stalled_us = STALL_TIMEOUTS * self.plan.timeout_us;
        if primary.is_connected() && self.now_us - self.beside[at].progress_us > stalled_us {
            self.tell_primary(at, primary::Input::Lost)?;
        } else if primary.may_seal() && !(primary.has_in_flight() && self.is_sending(at)) {
            self.tell_primary(at, primary::Input::Due)?;
        }
        let next_us = self.about(self.plan.epoch_us);
        self.after(next_us, Event::Due(at, life));
        Ok(())
    }

    pub(super) fn connect(&mut self, at: usize) -> Result<(), String> {
        let other = 1 - at;
        let me = self.hosts[at].identity;
        let welcome = self.hosts[other].backup().is_some_and(|backup| backup.welcomes(VM));
        let idle = self.hosts[at].vm.as_ref().is_some_and(|vm| vm.inside.history.open < SEALS_MAX);
        if !welcome || !idle || !matches!(self.hosts[at].role, Role::None) {
            return Ok(());
        }
        let backup = self.hosts[other].identity.host;
        let record = self.record();
        let (arbiter, reverses) = (self.plan.arbiter, self.plan.reverses);
        let (base, again) = self.hosts[at].vm.as_ref().map_or((None, false), Machine::calls);
        let opened = primary::Engine::open(me, backup, arbiter, reverses, record, again);
        let Some(engine) = opened else {
            return Ok(());
        };
        self.link();
        self.hosts[at].role = Role::Primary(engine);
        self.ghost.accepts(other);
        self.tell_backup(other, backup::Input::Arrival(me, base))?;
        let has_base = self.hosts[other].backup().is_some_and(backup::Engine::has_base);
        self.summary.bases += u64::from(has_base);
        self.agree(at, EpochId(0), has_base, false);
        let mut effects = vec![];
        let host = &mut self.hosts[at];
        let mut around = Around { vm: &mut host.vm, effects: &mut effects, broken: self.broken };
        if let Role::Primary(engine) = &mut host.role {
            engine.begin(&mut around);
        }
        self.carry_out(at, effects)?;
        self.beats(at);
        Ok(())
    }

    /// A new session's connection.
    fn link(&mut self) {
        self.session += 1;
        for host in [0, 1] {
            let cut = self.ways[host].cut;
            self.ways[host] = Way { open: true, cut, ..Way::default() };
            let beside = &mut self.beside[host];
            (beside.heard_us, beside.progress_us) = (self.now_us, self.now_us);
            beside.sends = [false; 2];
            beside.garbles = false;
            beside.control = Some(Control::new(SessionId(self.session)));
        }
    }

    /// Both sides of a session of this primary begin with the memory that they have.
    fn agree(&mut self, primary: usize, sealed: EpochId, has_base: bool, is_whole: bool) {
        let terms = Terms {
            session: SessionId(self.session),
            connections: self.plan.connections,
            staging_bytes: self.plan.staging_pages * PAGE_SIZE as u64,
        };
        let image = self.hosts[1 - primary].backup().and_then(backup::Engine::image);
        if let Some(image) = image {
            image.open(terms, is_whole, self.broken);
        }
        let choice = (self.rng.random(), self.rng.random());
        if let Some(vm) = &mut self.hosts[primary].vm {
            vm.open(terms, sealed, has_base, choice, self.broken);
        }
    }

    fn is_sending(&self, at: usize) -> bool {
        self.hosts[at].vm.as_ref().is_some_and(Machine::is_sending)
    }

    /// What goes on by itself in a session of this primary.
    fn beats(&mut self, primary: usize) {
        for host in [0, 1] {
            let life = self.beside[host].life;
            self.after(self.plan.heartbeat_us, Event::Beat(host, life));
            self.after(self.plan.timeout_us, Event::Check(host, life));
        }
        self.after(self.plan.epoch_us, Event::Due(primary, self.beside[primary].life));
    }

    /// The new primary of a reversed pair calls its old host, until that answers or the time is over.
    pub(super) fn reach(&mut self, at: usize) -> Result<(), String> {
        let (host, other) = (&self.hosts[at], &self.hosts[1 - at]);
        let Some(primary) = host.primary().filter(|primary| primary.is_calling()) else {
            return Ok(());
        };
        let stands = self.generation() == primary.machine.generation();
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
        let sealed = self.hosts[at].primary().map_or(EpochId(0), primary::Engine::sealed);
        self.tell_backup(1 - at, backup::Input::Arrival(me, None))?;
        self.agree(at, sealed, true, true);
        self.tell_primary(at, primary::Input::Reached)?;
        self.beats(at);
        Ok(())
    }
}
