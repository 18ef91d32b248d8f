//! A backup: the engine that ships, its turns, and what carries out what it wants.

use std::collections::VecDeque;

use rand::Rng;
use replication::backup::simulated::{Back, Word};
use replication::ids::{EpochId, Generation};
use replication::primary::simulated::{Rest, Step};
use replication::wire::{Message, SessionId};

use super::super::driver::Driver;
use super::super::host::Backup;
use super::super::machine::Machine;
use super::super::memory::PAGES;
use super::connection::Item;
use super::engines::won;
use super::{BackupState, Broken, Effect, Event, MS, Role, Run, claim, primary};

impl Run {
    pub(super) fn put_backup(&mut self, at: usize, word: Word) {
        if let Some(backup) = self.backup(at) {
            backup.reception.put(word);
        }
        self.stirs(at);
    }

    pub(super) fn backup_turns(&mut self, at: usize) -> Result<(), String> {
        let Some(backup) = self.backup(at) else { return Ok(()) };
        backup.site.lock().turns();
        backup.reception.turn();
        self.backup_has_done(at)?;
        let Some(backup) = self.backup(at) else { return Ok(()) };
        backup.site.lock().turns();
        backup.reception.timers();
        self.backup_has_done(at)
    }

    /// What the engine has done is carried out.
    fn backup_has_done(&mut self, at: usize) -> Result<(), String> {
        let steps = self.steps(at);
        let Some(backup) = self.backup(at) else { return Ok(()) };
        let (said, calls) = (backup.reception.said(), backup.reception.calls());
        let refused = backup.reception.refused();
        let (started, is_idle) = (backup.site.lock().started(), !backup.reception.is_wanted());
        let (is_open, is_cut) = (backup.reception.is_open(), backup.reception.is_cut());
        let state = backup.state();
        if is_idle {
            self.beside[at].gives_up = false;
        }
        // What waits to be written as the connection is closed may be lost.
        let is_lost = is_cut && self.rng.random_ratio(1, 4);
        self.are_acknowledged(at, &said)?;
        for (session, message) in said {
            if session.0 != self.session {
                // Whom it says that to has left.
                continue;
            }
            if let Message::Welcome(welcome) = &message {
                self.has_accepted(at, welcome.has_base);
            }
            if !is_lost && !self.was_said_early(at, &message) {
                self.says(at, &message);
            }
        }
        if let Some(frame) = refused {
            self.send(at, Item::Control(frame, None));
        }
        if let Some(machine) = started {
            self.has_started(at, machine)?;
        }
        if steps.contains(&Step::Backup(BackupState::Starting, BackupState::Stopped)) {
            self.ghost.is_start_lost = true;
        }
        let mut effects = vec![];
        for (number, action) in calls {
            match self.breaks_at_call(at, &action) {
                Some(event) => self.put_backup(at, Word::Answer(number, event)),
                None => effects.push(Effect::Call(number, action)),
            }
        }
        if !is_open && self.ways[at].open && !self.breaks_at_close(at, state) {
            effects.push(Effect::Close);
        }
        let is_orphan = |step: &Step| matches!(step, Step::Backup(_, BackupState::Orphan));
        if self.broken == Some(Broken::OrphanStarts) && steps.iter().any(is_orphan) {
            self.put_backup(at, Word::Failover { force: true });
        }
        self.carry_out(at, effects)
    }

    /// A backup says something.
    pub(super) fn says(&mut self, at: usize, message: &Message) {
        if let Some(backup) = self.backup(at) {
            let frame = backup.reception.writes(message);
            self.send(at, Item::Control(frame, None));
        }
    }

    /// What was acknowledged is in the image, page by page.
    fn are_acknowledged(&mut self, at: usize, said: &[(SessionId, Message)]) -> Result<(), String> {
        let Some(backup) = self.backup(at) else { return Ok(()) };
        let (looked, ram) = {
            let mut site = backup.site.lock();
            (site.looked(), site.ram())
        };
        let mut looked_at = looked.all();
        let is_early =
            matches!(self.broken, Some(Broken::AckBeforeWhole | Broken::AckAfterSuspecting));
        for (_, message) in said {
            let Message::Ack { epoch, .. } = message else { continue };
            self.ghost.acknowledges(at, *epoch);
            self.committed_us = self.now_us;
            self.beside[at].seals.retain(|(sealed, _)| sealed > epoch);
            if is_early {
                continue;
            }
            let (Some((position, passed)), Some(ram)) = (looked_at.next(), &ram) else {
                return Err(format!("epoch {epoch} was acknowledged and not looked at"));
            };
            self.oracle.committed(position, passed, ram)?;
        }
        Ok(())
    }

    fn has_accepted(&mut self, at: usize, has_base: bool) {
        if self.hosts[at].backup().map(Backup::state) == Some(BackupState::Syncing) {
            self.ghost.accepts(at);
            self.summary.bases += u64::from(has_base);
        }
        self.beats(at);
    }

    fn has_started(&mut self, at: usize, machine: Machine) -> Result<(), String> {
        let from = machine.inside().history.from;
        let epoch = self.oracle.started(from, &machine.ram())?;
        let generation = self.hosts[at].generation();
        generation.into_iter().for_each(|of| self.seen(at).raise(of));
        self.ghost.starts(at, &mut machine.inside().history, epoch, from.handover);
        self.hosts[at].vm = Some(machine);
        Ok(())
    }

    /// It is over: what follows it on this host.
    pub(super) fn backup_ends(&mut self, at: usize, backup: Backup) -> Role {
        let old = backup.reception.primary();
        let back = backup.reception.end();
        let Some(vm) = &mut self.hosts[at].vm else { return Role::None };
        let Some(Back { base, is_reversed }) = back else { return Role::None };
        vm.rest = base.map(|base| Rest::handed(base, PAGES as u64));
        match (base, old) {
            (Some(base), Some(old)) if is_reversed => {
                let (me, generation, epoch) =
                    (self.hosts[at].identity, base.generation, base.committed);
                let engine = primary::Engine::reversed(me, old, generation, epoch);
                Role::Primary(Driver::Calls(Box::new(engine)))
            }
            _ => {
                vm.again = true;
                Role::None
            }
        }
    }

    /// What has become the backup of a reversed pair has its last epoch, and has to go on from there if its new
    /// primary is dead.
    pub(super) fn awaits(&mut self, at: usize) {
        let Some(backup) = self.hosts[at].backup().filter(|of| of.reception.is_awaiting()) else {
            return;
        };
        let (primary, epoch) = (backup.reception.primary(), backup.reception.machine().committed());
        let (Some(primary), Some(epoch)) = (primary, epoch) else { return };
        self.ghost.accepts(at);
        self.ghost.acknowledges(at, epoch);
        let other = &self.hosts[1 - at];
        if !(other.alive && other.identity.host == primary) {
            self.ghost.owes = Some(at);
        }
        if !self.are_faults_over() && self.rng.random_ratio(1, 16) {
            let soon_us = self.up_to(10 * MS);
            self.after(soon_us, Event::ImageSoon(at));
        }
    }

    /// What a backup with a broken rule makes of a call that it is to make.
    fn breaks_at_call(&mut self, at: usize, action: &claim::Action) -> Option<claim::Event> {
        let claim::Action::Swap { .. } = action else { return None };
        let is_heir = self.hosts[at].backup().is_some_and(|backup| backup.reception.is_heir());
        let misreads = std::mem::take(&mut self.beside[at].misreads);
        match self.broken {
            Some(Broken::TakeOverWithoutSwap) => Some(won()),
            Some(Broken::HeirStartsWithoutSwap) if is_heir => Some(won()),
            Some(Broken::ReadIsWon) if misreads => Some(won()),
            _ => None,
        }
    }

    /// Whether a backup with a broken rule forgets its replica when its call fails.
    pub(super) fn discards_for(&self, at: usize, event: &claim::Event) -> bool {
        self.broken == Some(Broken::FailedClaimDiscards)
            && *event == claim::Event::Failed
            && self.hosts[at].backup().map(Backup::state) == Some(BackupState::Claiming)
    }

    /// A seal arrives at a backup that may acknowledge it for no good reason.
    pub(super) fn breaks_at_seal(&mut self, at: usize, epoch: EpochId, generation: Generation) {
        let state = self.hosts[at].backup().map(Backup::state);
        match (self.broken, state) {
            (Some(Broken::AckAfterSuspecting), Some(BackupState::Claiming)) => {
                self.acknowledges(at, epoch, generation);
            }
            (Some(Broken::AckAfterSuspecting), _) => {
                self.beside[at].seals.push_back((epoch, generation));
            }
            (Some(Broken::AckBeforeWhole), Some(BackupState::Replica)) => {
                self.beside[at].early = Some(epoch);
                self.acknowledges(at, epoch, generation);
            }
            _ => {}
        }
    }

    /// Whether a backup that claims goes on acknowledging instead of closing the connection.
    fn breaks_at_close(&mut self, at: usize, state: BackupState) -> bool {
        let breaks = self.broken == Some(Broken::AckAfterSuspecting);
        if !breaks || state != BackupState::Claiming {
            return false;
        }
        let seals: VecDeque<_> = std::mem::take(&mut self.beside[at].seals);
        for (epoch, generation) in seals {
            self.acknowledges(at, epoch, generation);
        }
        true
    }

    fn acknowledges(&mut self, at: usize, epoch: EpochId, generation: Generation) {
        self.ghost.acknowledges(at, epoch);
        self.says(at, &Message::Ack { epoch, generation });
    }

    fn was_said_early(&self, at: usize, message: &Message) -> bool {
        let Message::Ack { epoch, .. } = message else { return false };
        self.beside[at].early.is_some_and(|early| *epoch <= early)
    }
}
