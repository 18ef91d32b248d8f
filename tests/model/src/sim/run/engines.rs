//! What engines are told, and what they do to the world.

use rand::Rng;
use replication::backup::simulated::Word as BackupWord;
use replication::primary::simulated::{Step, Word, take_steps};
use replication::wire::SessionId;

use super::super::driver::Driver;
use super::super::host::Backup;
use super::{Around, Broken, Effect, Event, Fate, Item, Kind, MS, Role, Run, claim, mix, primary};

/// What an engine is told, whichever it is.
#[derive(Clone, Debug)]
pub(super) enum Told {
    /// The connection ended.
    Lost,
    /// The peer's process ended.
    Bell,
    /// What a primary needs on its host fails.
    GiveUp,
    Stop,
    Failover,
    Answer(u64, claim::Event),
}

impl Run {
    pub(super) fn backup(&mut self, at: usize) -> Option<&mut Backup> {
        match &mut self.hosts[at].role {
            Role::Backup(backup) => Some(backup),
            _ => None,
        }
    }

    pub(super) fn tell(&mut self, at: usize, told: Told) -> Result<(), String> {
        match &self.hosts[at].role {
            Role::None => {}
            Role::Primary(Driver::Calls(_)) => {
                if let Some(input) = of_caller(told) {
                    return self.tell_caller(at, input);
                }
            }
            Role::Primary(Driver::Works(_)) => {
                if let Some(word) = self.of_primary(told) {
                    self.put(at, word);
                }
            }
            Role::Backup(_) => {
                if let Some(word) = self.of_backup(told) {
                    self.put_backup(at, word);
                }
            }
        }
        Ok(())
    }

    fn of_primary(&self, told: Told) -> Option<Word> {
        Some(match told {
            Told::Lost => Word::Lost,
            Told::Bell => return None,
            Told::GiveUp => Word::Fails,
            Told::Stop => Word::Stop,
            Told::Failover => Word::Failover { reverses: self.plan.reverses },
            Told::Answer(number, event) => Word::Answer(number, event),
        })
    }

    fn of_backup(&self, told: Told) -> Option<BackupWord> {
        let session = SessionId(self.session);
        Some(match told {
            Told::Lost => BackupWord::Lost(session),
            Told::Bell => BackupWord::Bell(session),
            Told::GiveUp => return None,
            Told::Stop => BackupWord::Stop,
            Told::Failover => BackupWord::Failover { force: false },
            Told::Answer(number, event) => BackupWord::Answer(number, event),
        })
    }

    /// What calls the old host of a switch-over is told something.
    pub(super) fn tell_caller(
        &mut self,
        at: usize,
        input: primary::Input<()>,
    ) -> Result<(), String> {
        let mut effects = vec![];
        let host = &mut self.hosts[at];
        let mut around = Around { vm: &mut host.vm, effects: &mut effects, broken: self.broken };
        if let Role::Primary(Driver::Calls(engine)) = &mut host.role {
            engine.input(input, &mut around);
        }
        self.carry_out(at, effects)
    }

    /// The engine has something to do: its thread gets to it soon.
    pub(super) fn stirs(&mut self, at: usize) {
        let (is_wanted, due) = match &self.hosts[at].role {
            Role::Primary(Driver::Works(session)) => (session.is_wanted(), session.due()),
            Role::Backup(backup) => (backup.reception.is_wanted(), backup.reception.due()),
            Role::Primary(Driver::Calls(_)) | Role::None => return,
        };
        let due_us = u64::try_from(due.as_micros()).unwrap_or(u64::MAX).max(self.now_us);
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
        match &self.hosts[at].role {
            Role::Primary(_) => self.primary_turns(at)?,
            Role::Backup(_) => self.backup_turns(at)?,
            Role::None => {}
        }
        self.stirs(at);
        Ok(())
    }

    /// Which transitions were made since.
    pub(super) fn steps(&mut self, at: usize) -> Vec<Step> {
        let steps = take_steps();
        for step in &steps {
            self.went(at, *step);
        }
        steps
    }

    pub(super) fn carry_out(&mut self, at: usize, effects: Vec<Effect<()>>) -> Result<(), String> {
        for effect in effects {
            match effect {
                Effect::Call(number, action) => {
                    self.beside[at].calls.push_back((number, action));
                    self.next_call(at);
                }
                Effect::Wait(ms) => self.after(ms * MS, Event::Timer(at, self.beside[at].life)),
                Effect::Close => {
                    self.send(at, Item::End);
                    self.ways[at].open = false;
                    // What was read before: more of it where the engine was busy.
                    let busy_us = if self.rng.random_ratio(1, 4) { 50 * MS } else { 5 * MS };
                    self.ways[at].grace_us = self.now_us + self.up_to(busy_us);
                }
                Effect::Went(step) => self.went(at, step),
                // What calls has nobody yet to say something to, and starts nothing.
                Effect::Send(_) | Effect::Started { .. } | Effect::StartFailed => {}
            }
        }
        self.outside(at)?;
        self.settle(at);
        self.pump(at);
        Ok(())
    }

    fn went(&mut self, at: usize, step: Step) {
        self.summary.coverage.note(step);
        if self.tracing {
            let line = format!("          host {at} went {step:?}");
            self.summary.hash = mix(self.summary.hash, line.as_bytes());
            self.summary.trace.push(line);
        }
    }

    /// What the world outside hears of this host.
    pub(super) fn outside(&mut self, at: usize) -> Result<(), String> {
        let generation = self.hosts[at].generation();
        let Some(vm) = &mut self.hosts[at].vm else { return Ok(()) };
        self.ghost.observe(at, generation, &vm.inside().history);
        for output in vm.leaves(false) {
            self.oracle.left(output)?;
        }
        Ok(())
    }

    /// The console's writer has its turn.
    pub(super) fn prints(&mut self, at: usize) -> Result<(), String> {
        let Some(vm) = &mut self.hosts[at].vm else { return Ok(()) };
        for output in vm.leaves(true) {
            self.oracle.left(output)?;
        }
        Ok(())
    }

    /// An engine that has ended leaves its connection and its calls behind, and what follows it begins.
    fn settle(&mut self, at: usize) {
        let next = match std::mem::replace(&mut self.hosts[at].role, Role::None) {
            Role::Primary(driver) if driver.is_over() => self.primary_ends(at, driver),
            Role::Backup(backup) if backup.reception.is_over() => self.backup_ends(at, *backup),
            role => {
                self.hosts[at].role = role;
                return;
            }
        };
        self.hosts[at].role = next;
        self.abandon(at, true);
        self.calls_back(at);
        self.awaits(at);
        self.stirs(at);
    }

    /// What befalls a pair that was reversed before it is connected.
    pub(super) fn disturbs(&mut self, at: usize) {
        if self.are_faults_over() {
            return;
        }
        let soon_us = self.up_to(10 * MS);
        match self.rng.random_range(0..12) {
            0 => self.after(0, Event::LargeSoon(at)),
            1 | 2 => self.after(soon_us, Event::StopSoon(at)),
            3 => self.after(soon_us, Event::GiveUpSoon(at)),
            4 => self.after(soon_us, Event::CrashSoon(at)),
            5 => self.after(soon_us, Event::CrashSoon(1 - at)),
            6 => self.after(soon_us, Event::StopSoon(1 - at)),
            7 => self.after(soon_us, Event::ImageSoon(1 - at)),
            _ => {}
        }
    }

    /// What this host's engine was about is nobody's any more.
    pub(super) fn abandon(&mut self, at: usize, ends: bool) {
        if ends {
            self.send(at, Item::End);
        }
        self.ways[at].open = false;
        self.ways[at].grace_us = 0;
        let beside = &mut self.beside[at];
        beside.life += 1;
        (beside.calling, beside.sends) = (false, [false; 2]);
        (beside.turn_us, beside.misreads) = (None, false);
        (beside.call, beside.older, beside.gives_up) = (None, None, false);
        let (life, alive) = (beside.life - 1, self.hosts[at].alive);
        let calls = std::mem::take(&mut beside.calls);
        if self.plan.kind != Kind::Any {
            // The arbiter's thread goes on with what it was asked, for nobody.
            for (_, action) in calls.into_iter().skip(1).filter(|_| alive) {
                self.begins_client(at, life, action);
            }
            return;
        }
        for (_, action) in calls {
            if self.rng.random_ratio(2, 3) {
                let later_us = self.up_to(2_000 * MS);
                self.after(later_us, Event::Stray(action));
            }
        }
    }

    pub(super) fn next_call(&mut self, at: usize) {
        if !self.beside[at].calling && !self.beside[at].calls.is_empty() {
            self.beside[at].calling = true;
            let way_us = self.up_to(self.plan.arbiter_us_max);
            self.after(way_us, Event::Call(at, self.beside[at].life));
        }
    }

    pub(super) fn calls(&mut self, at: usize) {
        let Some((_, action)) = self.beside[at].calls.front().cloned() else { return };
        if self.plan.kind != Kind::Any {
            return self.begins_client(at, self.beside[at].life, action);
        }
        let fate = self.fate(at);
        let answer = self.arbiter.call(&action, fate);
        if fate == Fate::Late {
            let later_us = self.up_to(1_000 * MS);
            self.after(later_us, Event::Stray(action));
        }
        let way_us = self.up_to(self.plan.arbiter_us_max);
        self.after(way_us, Event::Answer(at, self.beside[at].life, answer));
    }

    pub(super) fn fate(&mut self, at: usize) -> Fate {
        let wrong = self.rng.random_ratio(self.plan.arbiter_wrong, 1000);
        if self.are_faults_over() || !(wrong || self.beside[at].arbiter_cut) {
            return Fate::Well;
        }
        match self.rng.random_range(0..4) {
            0 if !self.beside[at].arbiter_cut => Fate::AnswerLost,
            1 => Fate::Late,
            2 if !self.beside[at].arbiter_cut => {
                Fate::Stale(self.rng.random_range(0..=self.arbiter.history().len()))
            }
            _ => Fate::CallLost,
        }
    }

    pub(super) fn answers(&mut self, at: usize, event: claim::Event) -> Result<(), String> {
        self.beside[at].calling = false;
        let Some((number, action)) = self.beside[at].calls.pop_front() else { return Ok(()) };
        let event = self.misread(at, &action, event);
        if self.discards_for(at, &event) {
            self.put_backup(at, BackupWord::ImageFails);
        } else {
            self.tell(at, Told::Answer(number, event))?;
        }
        self.next_call(at);
        Ok(())
    }

    /// What a host with a broken rule makes of an answer of the arbiter.
    fn misread(&mut self, at: usize, action: &claim::Action, event: claim::Event) -> claim::Event {
        match &self.hosts[at].role {
            Role::Primary(Driver::Works(_)) | Role::Backup(_) => {}
            // The model's has these rules itself.
            Role::Primary(Driver::Calls(_)) | Role::None => return event,
        }
        match (self.broken, action, &event) {
            (Some(Broken::UnknownIsWon), claim::Action::Swap { .. }, claim::Event::Failed) => won(),
            (
                Some(Broken::UnknownIsLost),
                claim::Action::Swap { next, .. },
                claim::Event::Failed,
            ) => lost_to_nobody(*next),
            (
                Some(Broken::ReadIsWon),
                claim::Action::Read { expected },
                claim::Event::Read(Some(_)),
            ) => {
                // A backup looks at the record as well when it is told of a pair, and expects nothing then.
                let is_claim = self.hosts[at].backup().is_none() || expected.0 > 0;
                self.beside[at].misreads |= is_claim;
                event
            }
            _ => event,
        }
    }
}

/// The answer to a swap that succeeded.
pub(super) fn won() -> claim::Event {
    claim::Event::Swapped(replication::ownership::Outcome::Won)
}

fn lost_to_nobody(next: replication::ownership::Record) -> claim::Event {
    use replication::ownership::{HostId, Outcome, Record, Standing};
    let standing = Standing::Solo { owner: HostId(uuid::Uuid::nil()) };
    claim::Event::Swapped(Outcome::Lost(Some(Record { standing, ..next })))
}

fn of_caller(told: Told) -> Option<primary::Input<()>> {
    Some(match told {
        Told::Lost => primary::Input::Lost,
        Told::Bell => return None,
        Told::GiveUp => primary::Input::GiveUp,
        Told::Stop => primary::Input::Stop,
        Told::Failover => primary::Input::Failover,
        Told::Answer(number, event) => primary::Input::Answer(number, event),
    })
}
