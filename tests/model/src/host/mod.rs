//! A host: a machine, and the engine of a role around the shipped state machines.
//!
//! Enters: inputs, one at a time. Leaves: effects, which the world carries out. The engines here
//! do what `primary/engine.rs` and `backup/engine.rs` of the replication crate do, without threads,
//! sockets, pages and clocks; what decides is [`replication::protocol`] itself. The simulator has those
//! that ship, but for what calls the old host of a reversed pair.

pub mod backup;
pub mod primary;

use replication::ids::{EpochId, Generation};
use replication::ownership::{HostId, HostIdentity};
use replication::primary::simulated::Step;
use replication::protocol::asking::{Asking, Next};
use replication::protocol::backup::Handover;
use replication::protocol::ownership::{self as claim, Verdict};

use crate::broken::Broken;
use crate::vm::{Replicated, Vm};

/// An epoch's seal. Its pages travel beside it; that they are here is an input of its own.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Seal<C> {
    pub epoch: EpochId,
    pub generation: Generation,
    pub handover: Handover,
    pub content: C,
}

/// What hosts say to each other.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Message<C> {
    Pages(C),
    Paired(Generation),
    Seal(Seal<C>),
    Resync,
    Stop,
    Abort,
    Refuse,
    Ack { epoch: EpochId, generation: Generation },
    ResyncReady,
    StopDone,
    HandedOver { generation: Generation, reversed: bool },
}

/// What a host does to the world.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Effect<C> {
    Send(Message<C>),
    /// The arbiter is called, by a thread that makes one call after the other.
    Call(u64, claim::Action),
    /// The timer of a claim, in milliseconds.
    Wait(u64),
    /// The connection is closed; what was sent before may still arrive.
    Close,
    /// The backup starts the machine: from this epoch, the last one of a switch-over or not.
    Started {
        epoch: EpochId,
        handover: bool,
    },
    /// It cannot: the machine is lost, since the record says that it is this host's.
    StartFailed,
    /// A machine went from a state to another one.
    Went(Step),
}

/// What an engine has at hand while it deals with an input.
pub struct Around<'a, V: Vm> {
    pub vm: &'a mut Option<V>,
    pub effects: &'a mut Vec<Effect<V::Content>>,
    pub broken: Option<Broken>,
}

impl<V: Vm> Around<'_, V> {
    fn send(&mut self, message: Message<V::Content>) {
        self.effects.push(Effect::Send(message));
    }

    fn vm(&mut self, act: impl FnOnce(&mut V)) {
        if let Some(vm) = self.vm {
            act(vm);
        }
    }
}

/// What runs on a host beside the machine.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Role<V: Replicated> {
    /// Nothing: there is a machine that is not protected, or not even that.
    None,
    Primary(primary::Engine),
    Backup(backup::Engine<V>),
}

/// A process.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Host<V: Replicated> {
    pub alive: bool,
    pub identity: HostIdentity,
    pub vm: Option<V>,
    pub role: Role<V>,
}

impl<V: Replicated> Host<V> {
    /// A process that runs a machine.
    #[must_use]
    pub fn running(identity: HostIdentity, vm: V) -> Self {
        Self { alive: true, identity, vm: Some(vm), role: Role::None }
    }

    /// A process that listens for a primary.
    #[must_use]
    pub fn listening(identity: HostIdentity, arbiter: bool) -> Self {
        let role = Role::Backup(backup::Engine::new(identity.host, arbiter));
        Self { alive: true, identity, vm: None, role }
    }

    /// The process is killed, and all that it knew is gone.
    pub fn crash(&mut self) {
        self.alive = false;
        self.vm = None;
        self.role = Role::None;
    }

    /// Runs, with output that leaves at once.
    #[must_use]
    pub fn is_free(&self) -> bool {
        self.vm.as_ref().is_some_and(Vm::is_free)
    }

    /// An engine that is over is gone; its machine stays, if it has not destroyed it. Where a switch-over
    /// reversed the pair, another role follows at once. Whether an engine has ended.
    pub fn settle(&mut self) -> bool {
        let (next, over) = match &self.role {
            Role::Primary(engine) => {
                let vm = self.vm.as_ref().filter(|_| engine.is_heir());
                let me = self.identity;
                let heir = vm.map(|vm| Role::Backup(backup::Engine::heir(me, engine, vm.kept())));
                (heir, engine.is_over())
            }
            Role::Backup(engine) => {
                let reversed = engine.reversed().map(|(backup, generation, epoch)| {
                    primary::Engine::reversed(self.identity, backup, generation, epoch)
                });
                (reversed.map(Role::Primary).filter(|_| self.vm.is_some()), engine.is_over())
            }
            Role::None => (None, false),
        };
        if over {
            let inherits = matches!(next, Some(Role::Backup(_)));
            self.role = next.unwrap_or(Role::None);
            if inherits {
                self.vm = None;
            }
        }
        over
    }

    /// Whether this host has a role in a reversed pair, and is not connected to the other one yet.
    #[must_use]
    pub fn awaits(&self) -> bool {
        match &self.role {
            Role::Primary(engine) => engine.is_calling(),
            Role::Backup(engine) => engine.awaits().is_some(),
            Role::None => false,
        }
    }

    #[must_use]
    pub fn primary(&self) -> Option<&primary::Engine> {
        match &self.role {
            Role::Primary(engine) => Some(engine),
            _ => None,
        }
    }

    #[must_use]
    pub fn backup(&self) -> Option<&backup::Engine<V>> {
        match &self.role {
            Role::Backup(engine) => Some(engine),
            _ => None,
        }
    }

    /// Whether this host's end of the connection is open.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        match &self.role {
            Role::Primary(engine) => engine.is_connected(),
            Role::Backup(engine) => engine.primary().is_some(),
            Role::None => false,
        }
    }

    /// Whether a claim waits for its timer.
    #[must_use]
    pub fn waits(&self) -> bool {
        match &self.role {
            Role::Primary(engine) => engine.waits,
            Role::Backup(engine) => engine.waits,
            Role::None => false,
        }
    }

    /// The generation that this host believes in.
    #[must_use]
    pub fn generation(&self) -> Option<Generation> {
        match &self.role {
            Role::Primary(engine) => Some(engine.machine.generation()),
            Role::Backup(engine) => Some(engine.machine.generation()),
            Role::None => None,
        }
    }
}

/// The arbiter's side of an engine: [`Asking`], with the calls as effects.
fn asked<C>(
    asking: &mut Asking,
    effects: &mut Vec<Effect<C>>,
    step: impl FnOnce(&mut Asking) -> Next,
) -> Next {
    let before = asking.claim().map(claim::Claim::state);
    let next = step(asking);
    let after = match next {
        Next::Decided(_) => Some(claim::State::Decided),
        _ => asking.claim().map(claim::Claim::state),
    };
    if let (Some(before), Some(after)) = (before, after)
        && before != after
        && claim::is_transition_valid(before, after)
    {
        effects.push(Effect::Went(Step::Claim(before, after)));
    }
    next
}

/// What an engine with a broken rule makes of the arbiter's answer.
fn misread(
    broken: Option<Broken>,
    asking: &Asking,
    event: &claim::Event,
    ours: Generation,
    me: HostId,
) -> Option<Verdict> {
    asking.claim()?;
    let lost = || {
        let standing = replication::ownership::Standing::Solo { owner: me };
        let vm = replication::VmId(uuid::Uuid::nil());
        Verdict::Lost(replication::ownership::Record { generation: ours, vm, standing })
    };
    match (broken, event) {
        (Some(Broken::UnknownIsWon), claim::Event::Failed) => Some(Verdict::Owned(ours)),
        (Some(Broken::UnknownIsLost), claim::Event::Failed) => Some(lost()),
        (Some(Broken::ReadIsWon), claim::Event::Read(Some(record)))
            if record.generation.next() == ours =>
        {
            Some(Verdict::Owned(ours))
        }
        _ => None,
    }
}
