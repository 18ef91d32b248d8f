//! The guest, its clients, what goes wrong, and what people do.

use rand::Rng;

use replication::backup::simulated::Word as BackupWord;
use replication::primary::simulated::Word;
use replication::wire::SessionId;

use super::super::host::Backup;
use super::connection::Item;
use super::{
    BackupState, Event, Host, Kind, Known, MS, PrimaryState, Role, Run, Standing, Told, Vm,
    identity,
};

impl Run {
    pub(super) fn client(&mut self, client: usize) -> Result<(), String> {
        let of = &self.oracle.clients[client];
        let request =
            if of.request == of.answered { self.oracle.begins(client) } else { of.request };
        for at in [0, 1] {
            if self.beside[at].asleep_us > self.now_us {
                continue;
            }
            let Some(vm) = &mut self.hosts[at].vm else { continue };
            // A host that was replaced and does not know it may be behind: what it says is held.
            if !vm.serve(client, request) && vm.is_free() {
                return Err(format!("client {client}: an answer before {request} is forgotten"));
            }
            self.outside(at)?;
        }
        let again_us = self.about(20 * MS);
        self.after(again_us, Event::Client(client));
        Ok(())
    }

    pub(super) fn compute(&mut self) -> Result<(), String> {
        let (page, value) = (self.rng.random_range(0..64), self.rng.random());
        let line = self.rng.random_ratio(1, 3);
        for at in [0, 1] {
            if self.beside[at].asleep_us > self.now_us {
                continue;
            }
            if let Some(vm) = &mut self.hosts[at].vm {
                vm.compute(page, value);
                if line {
                    vm.line();
                }
                self.outside(at)?;
            }
        }
        let next_us = self.about(5 * MS);
        self.after(next_us, Event::Compute);
        Ok(())
    }

    pub(super) fn fault(&mut self) -> Result<(), String> {
        if self.are_faults_over() {
            for to in [0, 1] {
                self.heal(to);
                self.beside[to].arbiter_cut = false;
                self.beside[to].is_unmounted = false;
            }
            return Ok(());
        }
        self.mishap()?;
        let next_us = self.about(self.plan.fault_every_us);
        self.after(next_us, Event::Fault);
        Ok(())
    }

    pub(super) fn mishap(&mut self) -> Result<(), String> {
        if self.are_faults_over() {
            return Ok(());
        }
        let at = self.rng.random_range(0..2);
        let long_us = self.about(2 * self.plan.timeout_us);
        match self.rng.random_range(0..14) {
            0 | 1 => self.crash(at),
            2 | 3 => {
                // What waits for its waking would come after what comes later, if it woke earlier.
                let asleep_us = &mut self.beside[at].asleep_us;
                *asleep_us = (*asleep_us).max(self.now_us + long_us);
            }
            4 => self.cut(at, long_us),
            5 => {
                self.cut(0, long_us);
                self.cut(1, long_us);
            }
            6 => self.breaks(),
            // A data connection ended, say: what the other one brought is still dealt with.
            7 => self.loses(at)?,
            8 => {
                match self.rng.random_range(0..3) {
                    0 => self.beside[at].is_unmounted = true,
                    1 if self.plan.kind == Kind::Files => self.power_cut(),
                    _ => self.beside[at].arbiter_cut = true,
                }
                self.after(2 * long_us, Event::ArbiterHeals(at));
            }
            9 | 10 => {
                self.floods(at);
                self.and_more(at);
            }
            11 => {
                self.tell(at, Told::GiveUp)?;
                self.and_more(at);
            }
            // What no checksum of the network's finds.
            12 => self.beside[at].garbles = true,
            _ => self.image_fails(at),
        }
        Ok(())
    }

    /// What is begun is often disturbed, soon.
    pub(super) fn and_more(&mut self, at: usize) {
        let while_asked_us = self.up_to(2 * self.plan.arbiter_us_max + 4 * self.plan.delay_us_max);
        let on_its_way_us = self.up_to(3 * self.plan.delay_us_max);
        match self.rng.random_range(0..7) {
            0 => self.after(while_asked_us, Event::Mishap),
            1 => self.after(while_asked_us, Event::StopSoon(at)),
            2 => self.after(on_its_way_us, Event::LostSoon(at)),
            3 => self.after(on_its_way_us, Event::LostSoon(1 - at)),
            4 => self.after(on_its_way_us, Event::CrashSoon(1 - at)),
            5 => self.after(on_its_way_us, Event::FailoverSoon(1 - at)),
            _ => self.after(on_its_way_us, Event::FailoverSoon(at)),
        }
    }

    pub(super) fn cut(&mut self, to: usize, long_us: u64) {
        self.ways[to].cut = true;
        self.after(long_us, Event::Heal(to));
    }

    /// The connection breaks: each side is told at its own time, what is on the way may be lost.
    pub(super) fn breaks(&mut self) {
        for to in [0, 1] {
            let dead_us = self.now_us + self.up_to(5 * MS);
            self.ways[to].dead_us = Some(dead_us);
            let told_us = dead_us + self.up_to(50 * MS);
            self.at(told_us, Event::Arrives(to, self.session, Item::End));
        }
    }

    /// A connection ends for this host alone.
    pub(super) fn loses(&mut self, at: usize) -> Result<(), String> {
        if self.rng.random_ratio(1, 2) {
            return self.tell(at, Told::Lost);
        }
        if self.session(at).is_some() {
            self.put(at, Word::DataLost);
        }
        let connection = self.rng.random_range(0..self.plan.connections);
        self.put_backup(at, BackupWord::DataLost(SessionId(self.session), connection));
        Ok(())
    }

    pub(super) fn image_fails(&mut self, at: usize) {
        let fails = self.hosts[at].backup().is_some_and(|backup| {
            backup.reception.is_receiving() || backup.state() == BackupState::Orphan
        });
        if !fails {
            return;
        }
        let kind = self.rng.random_range(0..7);
        if kind == 6 {
            // Who lacks something takes over all the same where it has to.
            if let Some(backup) = self.backup(at) {
                backup.site.lock().is_lacking = true;
            }
            return;
        }
        self.ghost.gives_up(at);
        let Some(backup) = self.backup(at) else { return };
        match kind {
            0 => backup.site.lock().is_doomed = true,
            1..3 => backup.reception.spoils(),
            _ => {
                self.beside[at].gives_up = true;
                self.put_backup(at, BackupWord::ImageFails);
            }
        }
    }

    pub(super) fn crash(&mut self, at: usize) {
        if !self.hosts[at].alive {
            return;
        }
        let protected = self.hosts[at].primary().is_some_and(|primary| {
            use PrimaryState::{Calling, HandingOver, Protected};
            matches!(primary.machine().state(), Calling | Protected | HandingOver)
        });
        let pair = !self.plan.arbiter
            || self.record().is_some_and(|record| {
                let runs = record.runs_on() == self.hosts[at].identity.host;
                runs && matches!(record.standing, Standing::Pair { .. })
            });
        let replica = self.hosts[1 - at].backup().is_some_and(|backup| {
            let sound = backup.is_sound() && !self.beside[1 - at].gives_up;
            sound
                && matches!(
                    backup.state(),
                    BackupState::Replica
                        | BackupState::Heir
                        | BackupState::Claiming
                        | BackupState::Orphan
                )
        });
        // It has handed the machine over, and the record says that it is the backup.
        let inherits = self.hosts[1 - at].primary().is_some_and(|primary| {
            let backup = self.hosts[1 - at].identity.host;
            let standing = Standing::Pair { primary: primary.backup(), backup };
            self.record().is_some_and(|record| record.standing == standing)
        });
        let replica = replica || inherits;
        self.ghost.gives_up(at);
        let runs = self.record();
        if runs.is_none_or(|record| record.runs_on() == self.hosts[at].identity.host) {
            let owes = pair && replica && (protected || self.plan.arbiter);
            self.ghost.owes = owes.then_some(1 - at);
        }
        // A process that is killed closes what it had; a host without power does not.
        let closes = self.rng.random_ratio(1, 2);
        if closes && self.session(at).is_some() {
            self.send(at, Item::Bell);
        }
        self.hosts[at].crash();
        self.beside[at].known = Known::default();
        self.beside[at].asleep_us = 0;
        self.abandon(at, closes);
    }

    pub(super) fn ask(&mut self) -> Result<(), String> {
        if self.are_faults_over() {
            return Ok(());
        }
        let protects = [0, 1].into_iter().find(|at| self.hosts[*at].primary().is_some());
        let any = self.rng.random_range(0..2);
        // What is asked of a primary is the richer.
        let at = protects.filter(|_| self.rng.random_ratio(1, 2)).unwrap_or(any);
        let undecided = self.hosts[at]
            .primary()
            .is_some_and(|primary| primary.machine().state() == PrimaryState::Undecided);
        match self.rng.random_range(0..8) {
            _ if undecided => self.stop(at)?,
            0 => self.stop(at)?,
            1..5 => {
                self.fail_over(at)?;
                if self.hosts[at].primary().is_some() {
                    self.and_more(at);
                }
                if self.rng.random_ratio(1, 3) {
                    // It is cut while the other asks the arbiter, and then a person ends it.
                    let cut_us = self.up_to(6 * self.plan.delay_us_max);
                    let stop_us = cut_us + self.up_to(self.plan.arbiter_us_max);
                    if self.rng.random_ratio(1, 2) {
                        self.after(cut_us, Event::GiveUpSoon(at));
                    } else {
                        self.after(cut_us, Event::LostSoon(at));
                        self.after(stop_us, Event::StopSoon(at));
                    }
                }
            }
            _ => self.force(at),
        }
        let next_us = self.about(self.plan.ask_every_us);
        self.after(next_us, Event::Ask);
        Ok(())
    }

    pub(super) fn fail_over(&mut self, at: usize) -> Result<(), String> {
        if self.hosts[at].backup().map(Backup::state) == Some(BackupState::Orphan) {
            return Ok(());
        }
        self.tell(at, Told::Failover)
    }

    /// Where there is no arbiter a person decides, and is right: only if the other host is dead.
    pub(super) fn stop(&mut self, at: usize) -> Result<(), String> {
        let undecided = self.hosts[at]
            .primary()
            .is_some_and(|primary| primary.machine().state() == PrimaryState::Undecided);
        let goes_on = self.hosts[at]
            .vm
            .as_ref()
            .is_some_and(|vm| self.ghost.is_continued(&vm.inside().history));
        if undecided && (self.hosts[1 - at].alive || goes_on) {
            return Ok(());
        }
        if self.hosts[at].backup().is_some() {
            self.ghost.gives_up(at);
            self.beside[at].gives_up = true;
        }
        self.tell(at, Told::Stop)
    }

    pub(super) fn force(&mut self, at: usize) {
        let orphan = self.hosts[at].backup().map(Backup::state) == Some(BackupState::Orphan);
        if orphan && !self.hosts[1 - at].alive && self.ghost.owes == Some(at) {
            self.put_backup(at, BackupWord::Failover { force: true });
        }
    }

    /// A primary gives up, and hears by the arbiter alone how a switch-over went, or not.
    pub(super) fn gives_up(&mut self, at: usize) -> Result<(), String> {
        if !self.are_faults_over() && self.rng.random_ratio(1, 2) {
            self.cut(at, self.plan.timeout_us);
        }
        self.tell(at, Told::GiveUp)
    }

    /// A machine that runs alone is protected again, by whatever host has none.
    pub(super) fn repair(&mut self) -> Result<(), String> {
        for at in [0, 1] {
            let (host, other) = (&self.hosts[at], &self.hosts[1 - at]);
            let alone = host.vm.is_some() && matches!(host.role, Role::None);
            if !alone || !self.rng.random_ratio(1, 2) {
                continue;
            }
            if other.vm.is_none() && matches!(other.role, Role::None) {
                let again = !other.alive;
                let beside = &mut self.beside[1 - at];
                beside.process += if again { 2 } else { 0 };
                let identity = identity(beside.process);
                self.hosts[1 - at] = Host::listening(identity, &self.plan, self.broken);
            }
            let soon_us = self.up_to(200 * MS);
            self.after(soon_us, Event::Connect(at));
        }
        self.after(500 * MS, Event::Repair);
        Ok(())
    }
}
