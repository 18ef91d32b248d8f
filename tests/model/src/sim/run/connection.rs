//! The connection between the hosts.

use rand::Rng;
use replication::backup::simulated::Word as BackupWord;
use replication::ids::{EpochId, Generation};
use replication::primary::simulated::Word;
use replication::wire::{Message, SessionId};

use super::super::driver::Driver;
use super::control::Control;
use super::{Event, Role, Run, Told, Way};

/// What reaches a host, by the connection.
#[derive(Clone, Debug)]
pub(super) enum Item {
    /// Of the control connection: frames, and which epoch's seal they are, for whoever breaks a rule.
    Control(Vec<u8>, Option<(EpochId, Generation)>),
    /// Of a data connection: any part of what was written.
    Data(usize, Vec<u8>),
    /// The connection that tells of a process's end.
    Bell,
    End,
}

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
            Item::Bell => &mut way.bell_us,
            Item::Control(..) | Item::End => &mut way.last_us,
        };
        *last = (*last).max(self.now_us + way_us);
        let at_us = *last;
        self.at(at_us, Event::Arrives(to, self.session, item));
    }

    /// A primary says something.
    pub(super) fn speaks(&mut self, from: usize, message: &Message) {
        if self.ways[from].open
            && let Some(control) = &mut self.beside[from].control
        {
            let frame = control.write(message);
            let seal = match message {
                Message::Seal(seal) => Some((seal.epoch, seal.generation)),
                _ => None,
            };
            self.send(from, Item::Control(frame, seal));
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
        if session != self.session {
            self.arrives_late(to, session, item);
            return Ok(());
        }
        if !self.hosts[to].alive || closed {
            return Ok(());
        }
        if dead && !matches!(item, Item::End) {
            return Ok(());
        }
        if let Some(session) = self.session(to) {
            session.heard();
        }
        match item {
            Item::End if self.beside[to].call.is_some() => self.is_not_answered(to),
            Item::End => self.tell(to, Told::Lost),
            Item::Bell => self.tell(to, Told::Bell),
            Item::Data(connection, bytes) => {
                self.takes(to, connection, bytes);
                Ok(())
            }
            Item::Control(frames, seal) => self.hears(to, &frames, seal),
        }
    }

    /// Something arrives of a session that its primary has left, where the backup has not noticed.
    fn arrives_late(&mut self, to: usize, session: u64, item: Item) {
        if self.beside[to].older != Some(session) || self.hosts[to].primary().is_some() {
            return;
        }
        let id = SessionId(session);
        if let Some(backup) = self.backup(to) {
            match item {
                Item::Control(frames, _) => backup.reception.hears(id, &frames),
                Item::Data(connection, bytes) => backup.reception.takes(id, connection, &bytes),
                Item::Bell => backup.reception.put(BackupWord::Bell(id)),
                Item::End => backup.reception.put(BackupWord::Lost(id)),
            }
        }
        self.stirs(to);
    }

    fn hears(
        &mut self,
        to: usize,
        frames: &[u8],
        seal: Option<(EpochId, Generation)>,
    ) -> Result<(), String> {
        let id = SessionId(self.session);
        if let Some(backup) = self.backup(to) {
            backup.reception.hears(id, frames);
            if let Some((epoch, generation)) = seal {
                self.breaks_at_seal(to, epoch, generation);
            }
            self.stirs(to);
            return Ok(());
        }
        let Some(control) = &mut self.beside[to].control else { return Ok(()) };
        // Nothing garbles this connection.
        let message = control.read(frames)?;
        if self.beside[to].call.is_some() {
            return self.is_answered(to, message);
        }
        match message {
            Message::Heartbeat => {}
            Message::Progress(bytes) => {
                if let Some(session) = self.session(to) {
                    session.progress(bytes);
                }
            }
            message => self.put(to, Word::Message(message)),
        }
        Ok(())
    }

    /// Bytes of a data connection.
    fn takes(&mut self, to: usize, connection: usize, mut bytes: Vec<u8>) {
        if self.backup(to).is_none() {
            return;
        }
        if !bytes.is_empty() && std::mem::take(&mut self.beside[to].garbles) {
            let bit = self.rng.random_range(0..bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            self.summary.garbled += 1;
        }
        let id = SessionId(self.session);
        if let Some(backup) = self.backup(to) {
            backup.reception.takes(id, connection, &bytes);
        }
        self.stirs(to);
    }

    /// A new connection, from the caller `at`.
    pub(super) fn link(&mut self, at: usize) {
        let is_behind = self.hosts[1 - at].backup().is_some_and(|of| of.reception.is_connected());
        self.beside[1 - at].older = is_behind.then_some(self.session);
        self.session += 1;
        for host in [0, 1] {
            let cut = self.ways[host].cut;
            self.ways[host] = Way { open: true, cut, ..Way::default() };
            let beside = &mut self.beside[host];
            beside.sends = [false; 2];
            beside.garbles = false;
            beside.control = None;
            beside.seals.clear();
            beside.early = None;
        }
        self.beside[at].control = Some(Control::new(SessionId(self.session)));
    }

    /// What a session's heart does by itself.
    pub(super) fn beats(&mut self, at: usize) {
        self.after(self.plan.heartbeat_us, Event::Beat(at, self.session));
    }

    pub(super) fn beat(&mut self, at: usize, session: u64) {
        if session != self.session || !self.hosts[at].is_connected() {
            return;
        }
        match &mut self.hosts[at].role {
            Role::Primary(Driver::Works(_)) => self.speaks(at, &Message::Heartbeat),
            Role::Backup(backup) => {
                let done = Message::Progress(backup.reception.done());
                self.says(at, &done);
            }
            Role::Primary(Driver::Calls(_)) | Role::None => return,
        }
        self.beats(at);
    }
}
