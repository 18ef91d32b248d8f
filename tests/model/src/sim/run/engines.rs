//! Inputs of the engines, and what they do to the world.

use rand::Rng;
use replication::backup::simulated::Reception;

use super::control;
use super::{
    Around, Broken, Content, Effect, Event, Fate, Item, Kind, MS, Message, Protects, Role, Run,
    Step, backup, claim, mix, primary,
};

impl Run {
    pub(super) fn input(
        &mut self,
        at: usize,
        primary: impl FnOnce() -> primary::Input<Content>,
        backup: impl FnOnce() -> backup::Input<Content>,
    ) -> Result<(), String> {
        match self.hosts[at].role {
            Role::Primary(_) => self.tell_primary(at, primary()),
            Role::Backup(_) => self.tell_backup(at, backup()),
            Role::None => Ok(()),
        }
    }

    pub(super) fn tell_backup(
        &mut self,
        at: usize,
        input: backup::Input<Content>,
    ) -> Result<(), String> {
        let mut effects = vec![];
        let host = &mut self.hosts[at];
        let mut around = Around { vm: &mut host.vm, effects: &mut effects, broken: self.broken };
        if let Role::Backup(engine) = &mut host.role {
            engine.input(input, &mut around);
        }
        self.carry_out(at, effects)
    }

    pub(super) fn carry_out(
        &mut self,
        at: usize,
        effects: Vec<Effect<Content>>,
    ) -> Result<(), String> {
        for effect in effects {
            match effect {
                Effect::Send(message) => self.says(at, message)?,
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
                Effect::Started { epoch, handover } => {
                    if let Some(vm) = &self.hosts[at].vm {
                        let ram = vm.ram();
                        let from = vm.inside().history.from;
                        self.oracle.is_as_sealed(from, &ram)?;
                        let generation = self.hosts[at].generation();
                        generation.into_iter().for_each(|of| self.seen(at).raise(of));
                        self.ghost.starts(at, &mut vm.inside().history, epoch, handover);
                    }
                }
                Effect::StartFailed => self.ghost.is_start_lost = true,
                Effect::Went(step) => {
                    self.summary.coverage.note(step);
                    if self.tracing {
                        self.went(at, step);
                    }
                }
            }
        }
        self.outside(at)?;
        self.settle(at);
        self.pump(at);
        Ok(())
    }

    pub(super) fn went(&mut self, at: usize, step: Step) {
        let line = format!("          host {at} went {step:?}");
        self.summary.hash = mix(self.summary.hash, line.as_bytes());
        self.summary.trace.push(line);
    }

    pub(super) fn says(&mut self, at: usize, message: Message<Content>) -> Result<(), String> {
        match &message {
            Message::Ack { epoch, .. } => {
                self.ghost.acknowledges(at, *epoch);
                let host = &self.hosts[at];
                let image = host.backup().and_then(backup::Engine::image);
                let early = self.broken == Some(Broken::AckBeforeWhole)
                    || self.broken == Some(Broken::AckAfterSuspecting);
                if let Some((image, state)) = image.and_then(|of| Some((of, of.state.as_ref()?)))
                    && !early
                {
                    self.oracle.committed(state.position, &image.ram())?;
                }
            }
            Message::ResyncReady => {
                let image = self.hosts[at].backup().and_then(backup::Engine::image);
                image.and_then(|image| image.with(Reception::begin_anew));
            }
            _ => {}
        }
        if let Some(message) = control::of(message) {
            self.speaks(at, &message);
        }
        Ok(())
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

    /// An engine that has ended leaves its connection and its calls behind.
    pub(super) fn settle(&mut self, at: usize) {
        if self.hosts[at].settle() {
            self.abandon(at, true);
            self.inherits(at);
        }
    }

    /// Where a pair was reversed the new primary calls its old host, which waits for that.
    fn inherits(&mut self, at: usize) {
        let life = self.beside[at].life;
        if self.hosts[at].primary().is_some_and(Protects::is_calling) {
            let soon_us = self.up_to(20 * MS);
            self.after(soon_us, Event::Reach(at, life));
            self.after(self.plan.timeout_us, Event::Forsaken(at, life));
            self.disturbs(at);
        }
        let Some(backup) = self.hosts[at].backup() else { return };
        let (Some(primary), Some(epoch)) = (backup.awaits(), backup.machine.committed()) else {
            return;
        };
        self.ghost.accepts(at);
        self.ghost.acknowledges(at, epoch);
        let other = &self.hosts[1 - at];
        if !(other.alive && other.identity.host == primary) {
            self.ghost.owes = Some(at);
        }
        self.after(2 * self.plan.timeout_us, Event::Forsaken(at, life));
    }

    /// What befalls a pair that was reversed before it is connected.
    fn disturbs(&mut self, at: usize) {
        if self.are_faults_over() {
            return;
        }
        let soon_us = self.up_to(10 * MS);
        match self.rng.random_range(0..16) {
            0 | 1 => self.after(0, Event::LargeSoon(at)),
            2 => self.after(soon_us, Event::StopSoon(at)),
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
        self.input(
            at,
            || primary::Input::Answer(number, event.clone()),
            || backup::Input::Answer(number, event.clone()),
        )?;
        self.next_call(at);
        self.look(at)
    }
}
