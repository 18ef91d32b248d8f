//! The world: two hosts, a connection, an arbiter, and what may happen next.

use std::collections::VecDeque;

use replication::VmId;
use replication::ownership::{HostId, HostIdentity, Record};
use replication::protocol::backup::State as BackupState;
use replication::protocol::ownership::{self as claim};
use replication::protocol::primary::State as PrimaryState;
use stateright::{Model, Property};
use uuid::Uuid;

use super::config::Config;
use super::progress::Progress;
use super::properties;
use crate::arbiter::{Arbiter, Fate};
use crate::ghost::Ghost;
use crate::guest::{Guest, Position};
use crate::host::{Around, Effect, Host, Message, Role, backup, primary};

/// One of the two hosts.
pub type At = usize;

const VM: VmId = VmId(Uuid::from_u128(0xace));

/// The connection between the hosts, of the present session. What is in a queue was sent and not
/// yet read: it arrives late, or never if the reader closes first. TCP neither reorders nor
/// duplicates within a session, and of another session nothing is taken.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Link {
    /// To each host.
    pub queues: [VecDeque<Message<Position>>; 2],
    /// Whether a host's end is open.
    pub open: [bool; 2],
}

/// A host's calls to the arbiter, one at a time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Calls {
    pub queue: VecDeque<(u64, claim::Action)>,
    /// The first has taken effect, or not, and this is on its way to the asker.
    pub answer: Option<claim::Event>,
}

/// What is left of each thing that may happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Budget {
    pub sessions: u8,
    pub crashes: u8,
    pub arbiter_faults: u8,
    pub asks: u8,
    pub too_large: u8,
    pub give_ups: u8,
    pub image_failures: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    pub hosts: [Host<Guest>; 2],
    pub link: Link,
    pub arbiter: Arbiter,
    pub calls: [Calls; 2],
    /// Calls of engines that have ended, and late ones: they may still take effect.
    pub strays: Vec<claim::Action>,
    pub budget: Budget,
    pub ghost: Ghost,
}

/// What happens next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Act {
    Connect(At),
    /// The next message is read.
    Deliver(At),
    /// The pages of the epoch that is due have arrived.
    Pages(At),
    /// The peer was silent for too long, or the connection ended.
    Suspect(At),
    Copied(At),
    Seal(At),
    TooLarge(At),
    GiveUp(At),
    ImageFails(At),
    /// The same, found out when all of it has to be there.
    Spoils(At),
    /// A machine that will not start.
    Dooms(At),
    /// A host that lacks what the machine would need.
    Lacks(At),
    Stop(At),
    Failover(At),
    Force(At),
    /// The first of a host's calls reaches the arbiter, or not.
    Call(At, Fate),
    /// The answer reaches the host.
    Answer(At),
    Timer(At),
    /// A call from before arrives.
    Stray(usize),
    Crash(At),
    /// The new primary of a reversed pair reaches its old host.
    Reach(At),
    /// A process that has nothing listens for a primary.
    Listen(At),
}

/// Explores one configuration.
#[derive(Debug)]
pub struct Protocol {
    pub config: Config,
    pub progress: Progress,
}

impl Protocol {
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self { config, progress: Progress::default() }
    }
}

fn identity(process: u128) -> HostIdentity {
    HostIdentity { host: HostId(Uuid::from_u128(process)), vm: VM }
}

impl Model for Protocol {
    type State = World;
    type Action = Act;

    fn init_states(&self) -> Vec<World> {
        let config = &self.config;
        let mut world = World {
            hosts: [
                Host::running(identity(1), Guest::new()),
                Host::listening(identity(2), config.arbiter),
            ],
            link: Link::default(),
            arbiter: Arbiter::default(),
            calls: [Calls::default(), Calls::default()],
            strays: vec![],
            budget: Budget {
                sessions: config.sessions,
                crashes: config.crashes,
                arbiter_faults: config.arbiter_faults,
                asks: config.asks,
                too_large: config.too_large,
                give_ups: config.give_ups,
                image_failures: config.image_failures,
            },
            ghost: Ghost::default(),
        };
        world.observe(0);
        world.act(Act::Connect(0), config);
        vec![world]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Act>) {
        for at in [0, 1] {
            world.ordinary(at, &self.config, actions);
            world.faults(at, &self.config, actions);
            world.asks(at, &self.config, actions);
        }
        actions.extend((0..world.strays.len()).map(Act::Stray));
    }

    fn next_state(&self, world: &World, act: Act) -> Option<World> {
        let mut next = world.clone();
        next.act(act, &self.config);
        (next != *world).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        properties::all(&self.config)
    }
}

impl World {
    /// What goes on without any fault.
    pub fn ordinary(&self, at: At, config: &Config, acts: &mut Vec<Act>) {
        let host = &self.hosts[at];
        if !host.alive {
            return;
        }
        if self.calls[at].answer.is_some() {
            acts.push(Act::Answer(at));
        } else if !self.calls[at].queue.is_empty() {
            acts.push(Act::Call(at, Fate::Well));
        }
        if !self.link.queues[at].is_empty() {
            acts.push(Act::Deliver(at));
        }
        if host.waits() {
            acts.push(Act::Timer(at));
        }
        if self.reaches(at) {
            acts.push(Act::Reach(at));
        }
        if let Some(backup) = host.backup()
            && (backup.awaits_pages() || config.broken.is_some())
        {
            acts.push(Act::Pages(at));
        }
        if let Some(primary) = host.primary() {
            if primary.is_copying() {
                acts.push(Act::Copied(at));
            }
            let open = host.vm.as_ref().map_or(0, |vm| vm.open);
            if primary.may_seal() && open <= config.epochs {
                acts.push(Act::Seal(at));
            }
        }
    }

    fn faults(&self, at: At, config: &Config, acts: &mut Vec<Act>) {
        let host = &self.hosts[at];
        let budget = &self.budget;
        if !host.alive {
            return;
        }
        if host.is_connected() || host.awaits() {
            acts.push(Act::Suspect(at));
        }
        if budget.crashes > 0 {
            acts.push(Act::Crash(at));
        }
        if budget.arbiter_faults > 0
            && self.calls[at].answer.is_none()
            && let Some((_, action)) = self.calls[at].queue.front()
        {
            let fates = [Fate::AnswerLost, Fate::CallLost];
            acts.extend(fates.map(|fate| Act::Call(at, fate)));
            if matches!(action, claim::Action::Swap { .. }) {
                acts.push(Act::Call(at, Fate::Late));
            }
            let records = self.arbiter.history().len();
            acts.extend((0..records).map(|seen| Act::Call(at, Fate::Stale(seen))));
        }
        if let Some(primary) = host.primary() {
            let open = host.vm.as_ref().map_or(0, |vm| vm.open);
            if budget.too_large > 0 && primary.may_be_too_large() && open <= config.epochs {
                acts.push(Act::TooLarge(at));
            }
            if budget.give_ups > 0 {
                acts.push(Act::GiveUp(at));
            }
        }
        // Once a claim is under way all of the images was settled: see the engine's claim.
        if budget.image_failures > 0
            && let Some(backup) = host.backup()
            && (backup.is_receiving() || backup.machine.state() == BackupState::Orphan)
        {
            acts.extend([Act::ImageFails(at), Act::Spoils(at), Act::Dooms(at), Act::Lacks(at)]);
        }
    }

    /// What people ask for. Where there is no arbiter they are asked themselves, and are right: they
    /// let a host go on only if the other one is dead.
    fn asks(&self, at: At, config: &Config, acts: &mut Vec<Act>) {
        let (host, other) = (&self.hosts[at], &self.hosts[1 - at]);
        if self.budget.sessions > 0 && host.vm.is_none() && matches!(host.role, Role::None) {
            acts.push(Act::Listen(at));
        }
        if !host.alive {
            return;
        }
        let welcome = other.backup().is_some_and(|backup| backup.welcomes(VM)) && other.alive;
        if self.budget.sessions > 0
            && host.vm.is_some()
            && matches!(host.role, Role::None)
            && welcome
        {
            acts.push(Act::Connect(at));
        }
        if self.budget.asks == 0 {
            return;
        }
        if let Some(primary) = host.primary() {
            let undecided = primary.machine.state() == PrimaryState::Undecided;
            let goes_on = host.vm.as_ref().is_some_and(|vm| self.ghost.is_continued(vm));
            if !undecided || !other.alive && !goes_on {
                acts.push(Act::Stop(at));
            }
            if primary.machine.state() == PrimaryState::Protected {
                acts.push(Act::Failover(at));
            }
        }
        if let Some(backup) = host.backup() {
            let state = backup.machine.state();
            if state == BackupState::Replica && config.arbiter {
                acts.push(Act::Failover(at));
            }
            if state == BackupState::Orphan && !other.alive {
                acts.push(Act::Force(at));
            }
            if backup.is_receiving() || state == BackupState::Orphan {
                acts.push(Act::Stop(at));
            }
        }
    }

    pub fn act(&mut self, act: Act, config: &Config) {
        let budget = &mut self.budget;
        match act {
            Act::Connect(_) => budget.sessions -= 1,
            Act::Crash(_) => budget.crashes -= 1,
            Act::TooLarge(_) => budget.too_large -= 1,
            Act::GiveUp(_) => budget.give_ups -= 1,
            Act::ImageFails(_) | Act::Spoils(_) | Act::Dooms(_) | Act::Lacks(_) => {
                budget.image_failures -= 1
            }
            Act::Stop(_) | Act::Failover(_) | Act::Force(_) => budget.asks -= 1,
            Act::Call(_, fate) if fate != Fate::Well => budget.arbiter_faults -= 1,
            _ => {}
        }
        match act {
            Act::Connect(at) => self.connect(at, config),
            Act::Deliver(at) => {
                if let Some(message) = self.link.queues[at].pop_front() {
                    self.input(
                        at,
                        config,
                        || primary::Input::Message(message.clone()),
                        || backup::Input::Message(message.clone()),
                    );
                }
            }
            Act::Pages(at) => self.tell_backup(at, config, backup::Input::Whole),
            Act::Suspect(at) => {
                self.input(at, config, || primary::Input::Lost, || backup::Input::Lost);
            }
            Act::Copied(at) => self.tell_primary(at, config, primary::Input::Copied),
            Act::Seal(at) => self.tell_primary(at, config, primary::Input::Due),
            Act::TooLarge(at) => self.tell_primary(at, config, primary::Input::TooLarge),
            Act::GiveUp(at) => self.tell_primary(at, config, primary::Input::GiveUp),
            Act::ImageFails(at) => {
                self.ghost.gives_up(at);
                self.tell_backup(at, config, backup::Input::ImageFailed);
            }
            Act::Spoils(at) => {
                self.ghost.gives_up(at);
                self.tell_backup(at, config, backup::Input::Spoiled);
            }
            Act::Dooms(at) => {
                self.ghost.gives_up(at);
                self.tell_backup(at, config, backup::Input::Doomed);
            }
            // Who lacks it refuses a switch-over, and takes over all the same where it has to.
            Act::Lacks(at) => self.tell_backup(at, config, backup::Input::Lacking),
            Act::Stop(at) => {
                self.ghost.gives_up(at);
                self.input(at, config, || primary::Input::Stop, || backup::Input::Stop);
            }
            Act::Failover(at) => {
                let backup = || backup::Input::Failover { force: false };
                self.input(at, config, || primary::Input::Failover, backup);
            }
            Act::Force(at) => self.tell_backup(at, config, backup::Input::Failover { force: true }),
            Act::Call(at, fate) => self.call(at, fate),
            Act::Answer(at) => self.answer(at, config),
            Act::Timer(at) => {
                self.input(at, config, || primary::Input::Timer, || backup::Input::Timer);
            }
            Act::Stray(index) => {
                let action = self.strays.remove(index);
                self.arbiter.call(&action, Fate::Well);
            }
            Act::Crash(at) => self.crash(at),
            Act::Reach(at) => self.reach(at, config),
            Act::Listen(at) => self.listen(at, config),
        }
        let standing = self.arbiter.generation();
        self.strays.retain(|action| match action {
            claim::Action::Swap { expected, .. } => *expected >= standing,
            _ => false,
        });
        self.strays.sort_by_key(|action| match action {
            claim::Action::Swap { next, .. } => (next.generation.0, next.runs_on().0.as_u128()),
            _ => (0, 0),
        });
        self.strays.dedup();
    }

    fn input(
        &mut self,
        at: At,
        config: &Config,
        primary: impl FnOnce() -> primary::Input<Position>,
        backup: impl FnOnce() -> backup::Input<Position>,
    ) {
        match self.hosts[at].role {
            Role::Primary(_) => self.tell_primary(at, config, primary()),
            Role::Backup(_) => self.tell_backup(at, config, backup()),
            Role::None => {}
        }
    }

    fn tell_primary(&mut self, at: At, config: &Config, input: primary::Input<Position>) {
        let mut effects = vec![];
        let host = &mut self.hosts[at];
        let mut around = Around { vm: &mut host.vm, effects: &mut effects, broken: config.broken };
        if let Role::Primary(engine) = &mut host.role {
            engine.input(input, &mut around);
        }
        self.carry_out(at, effects);
    }

    fn tell_backup(&mut self, at: At, config: &Config, input: backup::Input<Position>) {
        let mut effects = vec![];
        let host = &mut self.hosts[at];
        let mut around = Around { vm: &mut host.vm, effects: &mut effects, broken: config.broken };
        if let Role::Backup(engine) = &mut host.role {
            engine.input(input, &mut around);
        }
        self.carry_out(at, effects);
    }

    fn connect(&mut self, at: At, config: &Config) {
        let record = self.arbiter.standing();
        let (me, backup) = (self.hosts[at].identity, self.hosts[1 - at].identity.host);
        let (arbiter, reverses) = (config.arbiter, config.reverses);
        let Some(engine) = primary::Engine::open(me, backup, arbiter, reverses, record, false)
        else {
            return;
        };
        self.link = Link { open: [true; 2], ..Link::default() };
        self.hosts[at].role = Role::Primary(engine);
        self.ghost.accepts(1 - at);
        self.tell_backup(1 - at, config, backup::Input::Arrival(me));
        let mut effects = vec![];
        let host = &mut self.hosts[at];
        let mut around = Around { vm: &mut host.vm, effects: &mut effects, broken: config.broken };
        if let Role::Primary(engine) = &mut host.role {
            engine.begin(&mut around);
        }
        self.carry_out(at, effects);
    }

    /// Whether this host is the new primary of a reversed pair, and its old one would take its call.
    pub fn reaches(&self, at: At) -> bool {
        let (host, other) = (&self.hosts[at], &self.hosts[1 - at]);
        let calls = host.primary().filter(|primary| primary.is_calling());
        let stands =
            calls.is_some_and(|primary| self.arbiter.generation() == primary.machine.generation());
        let awaited = other.backup().and_then(backup::Engine::awaits);
        host.alive && other.alive && stands && awaited == Some(host.identity.host)
    }

    fn reach(&mut self, at: At, config: &Config) {
        self.link = Link { open: [true; 2], ..Link::default() };
        let me = self.hosts[at].identity;
        self.tell_backup(1 - at, config, backup::Input::Arrival(me));
        self.tell_primary(at, config, primary::Input::Reached);
    }

    fn carry_out(&mut self, at: At, effects: Vec<Effect<Position>>) {
        for effect in effects {
            match effect {
                Effect::Send(message) => {
                    if let Message::Ack { epoch, .. } = message {
                        self.ghost.acknowledges(at, epoch);
                    }
                    if self.link.open[at] && self.link.open[1 - at] {
                        self.link.queues[1 - at].push_back(message);
                    }
                }
                Effect::Call(number, action) => self.calls[at].queue.push_back((number, action)),
                Effect::Close => self.link.open[at] = false,
                Effect::Started { epoch, handover } => {
                    if let Some(vm) = &mut self.hosts[at].vm {
                        self.ghost.starts(at, vm, epoch, handover);
                    }
                }
                Effect::StartFailed => self.ghost.is_start_lost = true,
                Effect::Wait(_) | Effect::Went(_) => {}
            }
        }
        self.observe(at);
        self.settle(at);
    }

    fn observe(&mut self, at: At) {
        let generation = self.hosts[at].generation();
        if let Some(vm) = &self.hosts[at].vm {
            self.ghost.observe(at, generation, vm);
        }
    }

    /// An engine that has ended leaves its connection and its calls behind.
    fn settle(&mut self, at: At) {
        if self.hosts[at].settle() || matches!(self.hosts[at].role, Role::None) {
            self.abandon(at);
            self.inherits(at);
        }
        if !self.hosts[at].is_connected() && matches!(self.hosts[at].role, Role::Backup(_)) {
            // A backup takes nothing of a session that it has left.
            self.link.queues[at].clear();
        }
    }

    /// What has become the backup of a reversed pair has its last epoch, and has to go on from there if
    /// its new primary is dead.
    fn inherits(&mut self, at: At) {
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
    }

    fn abandon(&mut self, at: At) {
        self.link.open[at] = false;
        self.link.queues[at].clear();
        let calls = std::mem::take(&mut self.calls[at]);
        let done = usize::from(calls.answer.is_some());
        self.strays.extend(calls.queue.into_iter().skip(done).map(|(_, action)| action));
    }

    fn call(&mut self, at: At, fate: Fate) {
        let Some((_, action)) = self.calls[at].queue.front().cloned() else { return };
        self.calls[at].answer = Some(self.arbiter.call(&action, fate));
        if fate == Fate::Late {
            self.strays.push(action);
        }
    }

    fn answer(&mut self, at: At, config: &Config) {
        let Some(event) = self.calls[at].answer.take() else { return };
        let Some((number, _)) = self.calls[at].queue.pop_front() else { return };
        self.input(
            at,
            config,
            || primary::Input::Answer(number, event.clone()),
            || backup::Input::Answer(number, event.clone()),
        );
    }

    fn crash(&mut self, at: At) {
        let other = &self.hosts[1 - at];
        if self.arbiter.standing().is_none_or(|record| self.runs(at, record)) {
            let owes = other.alive && self.hosts[at].vm.is_some() && self.can_take_over(1 - at);
            self.ghost.owes = owes.then_some(1 - at);
        }
        self.ghost.gives_up(at);
        self.hosts[at].crash();
        self.abandon(at);
    }

    fn runs(&self, at: At, record: Record) -> bool {
        record.runs_on() == self.hosts[at].identity.host
    }

    /// Whether this backup has what it needs and nobody else may go on.
    fn can_take_over(&self, at: At) -> bool {
        let pair = self.arbiter.standing().is_some_and(|record| {
            matches!(record.standing, replication::ownership::Standing::Pair { .. })
        });
        let state = self.hosts[at].backup().map(|backup| backup.machine.state());
        // It has handed the machine over, and the record says that it is the backup.
        let inherits = self.hosts[at].primary().is_some_and(|primary| {
            let me = self.hosts[at].identity.host;
            self.arbiter.standing().is_some_and(|record| {
                let standing = replication::ownership::Standing::Pair {
                    primary: primary.backup(),
                    backup: me,
                };
                record.standing == standing
            })
        });
        if inherits {
            return true;
        }
        let sound = self.hosts[at].backup().is_some_and(backup::Engine::is_sound);
        use BackupState::{Claiming, Heir, Replica};
        pair && sound && matches!(state, Some(Replica | Heir | Claiming))
    }

    fn listen(&mut self, at: At, config: &Config) {
        // A process that was killed is followed by another one; one that lost its machine is the same.
        let host = &self.hosts[at];
        let process = host.identity.host.0.as_u128() + if host.alive { 0 } else { 2 };
        self.hosts[at] = Host::listening(identity(process), config.arbiter);
    }
}
