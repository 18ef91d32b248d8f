//! Calls: a primary connects, greets, and waits for the backup's word.

use replication::ids::Generation;
use replication::ownership::Seen;
use replication::primary::simulated::{
    Between, Broken as SessionBroken, Rest, Session, Start, Terms, admit, offer,
};
use replication::protocol::primary::Primary;
use replication::wire::{Message, SessionId, Welcome};

use rand::Rng;

use super::super::driver::Driver;
use super::super::host::Backup;
use super::connection::Item;
use super::primary_side::options;
use super::{Broken, Event, Kind, MS, Role, Run, SEALS_MAX, Told, VM};

/// Shortest wait for a sign of the backup.
const SIGN_US_MIN: u64 = 1_000 * MS;

/// A call that is not answered yet.
#[derive(Debug)]
pub(super) struct Call {
    start: Start,
    generation: Generation,
}

impl Run {
    pub(super) fn connect(&mut self, at: usize) -> Result<(), String> {
        let me = self.hosts[at].identity;
        let idle =
            self.hosts[at].vm.as_ref().is_some_and(|vm| vm.inside().history.open < SEALS_MAX);
        let is_free = matches!(self.hosts[at].role, Role::None) && self.beside[at].call.is_none();
        if !idle || !is_free || !self.is_listened_to(1 - at) {
            return Ok(());
        }
        // Nothing may be mounted where the arbiter's directory is to be.
        let is_away = self.plan.kind == Kind::Files && self.beside[at].is_unmounted;
        let record = if is_away { None } else { self.record() };
        let seen = self.seen(at);
        let Some(generation) = admit(&seen, record.filter(|_| self.plan.arbiter), me) else {
            return Ok(());
        };
        let again = self.hosts[at].vm.as_ref().is_some_and(|vm| vm.again);
        let start = if again { Start::Again } else { Start::First };
        self.call(at, Call { start, generation });
        Ok(())
    }

    /// Whether a connection to this host is taken: the only one there, or one beside that of a session which its
    /// primary has left.
    fn is_listened_to(&self, at: usize) -> bool {
        let host = &self.hosts[at];
        let is_listening = |backup: &Backup| {
            let has_served = backup.reception.is_connected();
            !backup.reception.is_open() || has_served && self.beside[at].older.is_none()
        };
        host.alive && host.backup().is_some_and(is_listening)
    }

    /// What this process knows of the record.
    pub(super) fn seen(&self, at: usize) -> Seen {
        self.beside[at].known.of(VM, self.plan.arbiter.then_some("arbiter"))
    }

    fn terms(&self) -> Terms {
        let connections = u32::try_from(self.plan.connections).expect("a few");
        Terms { session: SessionId(self.session), connections }
    }

    fn call(&mut self, at: usize, call: Call) {
        self.link(at);
        let (terms, me) = (self.terms(), self.hosts[at].identity);
        let options = options(self);
        let Some(vm) = &self.hosts[at].vm else { return };
        let base = vm.rest.as_ref().map(Rest::base);
        let is_reversed = matches!(call.start, Start::Reversed(_));
        let mut guest = vm.handle(self.broken);
        let offer = offer(&mut guest, &options, self.plan.arbiter, base, is_reversed);
        self.beside[at].call = Some(call);
        let (session, connections) = (terms.session, self.plan.connections);
        if let Some(backup) = self.backup(1 - at) {
            backup.reception.connects(session, connections);
        }
        let Some(control) = &mut self.beside[at].control else { return };
        let greeting = [terms.hello(me, 0), offer].map(|message| control.write(&message)).concat();
        self.send(at, Item::Control(greeting, None));
        let patience_us = self.plan.timeout_us.max(SIGN_US_MIN);
        self.after(patience_us, Event::CallLate(at, self.session));
    }

    /// Nothing was heard of the backup, or that has heard nothing.
    pub(super) fn call_late(&mut self, at: usize, session: u64) {
        if session != self.session {
            return;
        }
        if let Some(backup) = self.backup(1 - at) {
            backup.reception.greeting_late();
        }
        self.stirs(1 - at);
        if self.beside[at].call.is_some() {
            self.hangs_up(at);
            self.reaches_again(at);
        }
    }

    /// The caller has given up, or is not what it was.
    pub(super) fn hangs_up(&mut self, at: usize) {
        if self.beside[at].call.take().is_some() {
            self.send(at, Item::End);
            self.ways[at].open = false;
        }
    }

    /// The backup has closed the connection.
    pub(super) fn is_not_answered(&mut self, at: usize) -> Result<(), String> {
        self.hangs_up(at);
        self.reaches_again(at);
        Ok(())
    }

    /// The backup's first word.
    pub(super) fn is_answered(&mut self, at: usize, message: Message) -> Result<(), String> {
        match message {
            Message::Heartbeat | Message::Progress(_) => Ok(()),
            Message::Welcome(welcome) => self.is_welcome(at, welcome),
            // A host that answers and is not the heir will not become it.
            Message::Refuse(_) => {
                self.hangs_up(at);
                self.summary.refused += 1;
                match self.is_reaching(at) {
                    true => self.tell(at, Told::Lost),
                    false => Ok(()),
                }
            }
            Message::Abort(_) => {
                self.summary.refused += 1;
                self.is_not_answered(at)
            }
            other => Err(format!("a call was answered with a frame of kind {:?}", other.kind())),
        }
    }

    fn is_welcome(&mut self, at: usize, welcome: Welcome) -> Result<(), String> {
        let Some(Call { start, generation }) = self.beside[at].call.take() else { return Ok(()) };
        let goes_on = match &start {
            Start::Reversed(_) => self.is_reaching(at) && welcome.has_base,
            Start::First | Start::Again => matches!(self.hosts[at].role, Role::None),
        };
        if !goes_on || self.hosts[at].vm.is_none() {
            self.beside[at].call = Some(Call { start, generation });
            return self.is_not_answered(at);
        }
        self.opens(at, (start, generation), welcome)
    }

    /// A session begins.
    fn opens(
        &mut self,
        at: usize,
        start: (Start, Generation),
        welcome: Welcome,
    ) -> Result<(), String> {
        let between = Between {
            identity: self.hosts[at].identity,
            arbiter: self.plan.arbiter,
            seen: self.seen(at),
            welcome,
        };
        let breaks = SessionBroken {
            stale_deltas: self.broken == Some(Broken::DeltaOfAnother),
            forgets: self.broken == Some(Broken::RestForgets),
        };
        let (delta, lz4) = (self.rng.random(), self.rng.random());
        let (options, terms) = (options(self), self.terms());
        let Some(vm) = &mut self.hosts[at].vm else { return Ok(()) };
        let (guest, rest) = (vm.handle(self.broken), vm.rest.take());
        let mut session = Session::open(guest, options, between, start, terms, rest, breaks);
        session.choose(delta, lz4);
        for connection in 0..self.plan.connections {
            self.send(at, Item::Data(connection, session.greets(connection)));
        }
        session.begin();
        self.hosts[at].role = Role::Primary(Driver::Works(Box::new(session)));
        self.beats(at);
        self.has_done(at)?;
        self.stirs(at);
        Ok(())
    }

    /// Whether this host is the new primary of a reversed pair, whose old host has not answered.
    fn is_reaching(&self, at: usize) -> bool {
        self.hosts[at].primary().is_some_and(Driver::is_calling)
    }

    fn reaches_again(&mut self, at: usize) {
        if self.is_reaching(at) {
            let again_us = self.about(20 * MS);
            self.after(again_us, Event::Reach(at, self.beside[at].life));
        }
    }

    /// Where a pair was reversed the new primary calls its old host.
    pub(super) fn calls_back(&mut self, at: usize) {
        if self.is_reaching(at) {
            let life = self.beside[at].life;
            let soon_us = self.up_to(20 * MS);
            self.after(soon_us, Event::Reach(at, life));
            self.after(self.plan.timeout_us, Event::Forsaken(at, life));
            self.disturbs(at);
        }
    }

    /// The new primary of a reversed pair calls its old host, until that answers or the time is over.
    pub(super) fn reach(&mut self, at: usize) -> Result<(), String> {
        let Some(primary) = self.hosts[at].primary().filter(|primary| primary.is_calling()) else {
            return Ok(());
        };
        let machine: Primary = primary.machine().clone();
        let generation = machine.generation();
        let stands = self.generation() == generation;
        let is_cut = self.ways.iter().any(|way| way.cut);
        if !stands || is_cut || !self.is_listened_to(1 - at) || self.beside[at].call.is_some() {
            self.reaches_again(at);
            return Ok(());
        }
        self.call(at, Call { start: Start::Reversed(machine), generation });
        Ok(())
    }

    /// The new primary has waited for its old host long enough, if it still waits.
    pub(super) fn forsaken(&mut self, at: usize) -> Result<(), String> {
        if !self.is_reaching(at) {
            return Ok(());
        }
        self.hangs_up(at);
        self.tell(at, Told::Lost)
    }
}
