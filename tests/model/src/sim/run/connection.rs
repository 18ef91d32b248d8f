//! The connection between the hosts.

use super::{
    Around, Event, Item, MS, Message, Role, Run, SEALS_MAX, STALL_TIMEOUTS, VM, Way, backup,
    primary,
};
use crate::broken::Broken;

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
        let is_pages = matches!(item, Item::Pages);
        let last = if is_pages { &mut way.pages_us } else { &mut way.last_us };
        *last = (*last).max(self.now_us + way_us);
        let at_us = *last;
        self.at(at_us, Event::Arrives(to, self.session, item));
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
            Item::Heartbeat => Ok(()),
            Item::End => self.input(to, || primary::Input::Lost, || backup::Input::Lost),
            Item::Pages => {
                self.beside[to].pages += 1;
                self.look(to)
            }
            Item::Message(message) => {
                if matches!(message, Message::Ack { .. }) {
                    self.beside[to].progress_us = self.now_us;
                }
                self.input(
                    to,
                    || primary::Input::Message(message.clone()),
                    || backup::Input::Message(message.clone()),
                )?;
                self.look(to)
            }
        }
    }

    /// Epochs whose seal and pages are both here.
    pub(super) fn look(&mut self, at: usize) -> Result<(), String> {
        let late = self.broken == Some(Broken::AckAfterSuspecting);
        while self.beside[at].pages > 0
            && self.hosts[at].backup().is_some_and(|backup| backup.awaits_pages() || late)
        {
            self.beside[at].pages -= 1;
            self.tell_backup(at, backup::Input::Whole)?;
        }
        Ok(())
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
        } else if primary.may_seal() {
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
        let idle = self.hosts[at].vm.as_ref().is_some_and(|vm| vm.history.open < SEALS_MAX);
        if !welcome || !idle || !matches!(self.hosts[at].role, Role::None) {
            return Ok(());
        }
        let backup = self.hosts[other].identity.host;
        let record = self.arbiter.standing();
        let (arbiter, reverses) = (self.plan.arbiter, self.plan.reverses);
        let Some(engine) = primary::Engine::open(me, backup, arbiter, reverses, record) else {
            return Ok(());
        };
        self.link();
        self.hosts[at].role = Role::Primary(engine);
        self.ghost.accepts(other);
        self.tell_backup(other, backup::Input::Arrival(me))?;
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
            beside.pages = 0;
        }
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
        let stands = self.arbiter.generation() == primary.machine.generation();
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
        self.tell_backup(1 - at, backup::Input::Arrival(me))?;
        self.tell_primary(at, primary::Input::Reached)?;
        self.beats(at);
        Ok(())
    }
}
