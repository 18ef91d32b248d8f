//! The connection between the hosts.

use rand::Rng;
use replication::backup::simulated::Reception;
use replication::wire::{self, SessionId};

use super::super::driver::Driver;
use super::control::{self, Control};
use super::{Content, Event, Item, Message, Role, Run, Way, backup, primary};
use crate::broken::Broken;
use crate::host::Seal;

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
        if let Role::Primary(Driver::Works(session)) = &self.hosts[to].role {
            session.heard();
        }
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
        if let Message::Seal(seal) = &message
            && let Some(reason) = self.gathers(to, seal)
        {
            return self.tell_backup(to, backup::Input::Bad(reason));
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

    pub(super) fn check(&mut self, at: usize, life: u64) -> Result<(), String> {
        // The engine of a primary has a clock of its own.
        if !self.is_current(at, life) || self.hosts[at].primary().is_some() {
            return Ok(());
        }
        if !self.hosts[at].is_connected() {
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

    /// A new session's connection.
    pub(super) fn link(&mut self) {
        self.session += 1;
        for host in [0, 1] {
            let cut = self.ways[host].cut;
            self.ways[host] = Way { open: true, cut, ..Way::default() };
            let beside = &mut self.beside[host];
            beside.heard_us = self.now_us;
            beside.sends = [false; 2];
            beside.garbles = false;
            beside.control = Some(Control::new(SessionId(self.session)));
        }
    }

    /// What goes on by itself in a session of this primary.
    pub(super) fn beats(&mut self) {
        for host in [0, 1] {
            let life = self.beside[host].life;
            self.after(self.plan.heartbeat_us, Event::Beat(host, life));
            self.after(self.plan.timeout_us, Event::Check(host, life));
        }
    }
}
