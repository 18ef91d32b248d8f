//! What protects a simulated machine: the engine that ships; or, while a new host calls the old one of a reversed
//! pair, the model's, after `primary/keeper/reversed.rs`.

use replication::ids::{EpochId, Generation};
use replication::ownership::{HostId, HostIdentity};
use replication::primary::simulated::Session;
use replication::protocol::primary::Primary;

use super::machine::{Handle, Machine};
use crate::host::Protects;
use crate::host::primary::Engine;

#[derive(Debug)]
pub enum Driver {
    Calls(Box<Engine>),
    Works(Box<Session<Handle>>),
}

impl Driver {
    /// It is over.
    pub fn ends(self, vm: Option<&mut Machine>) {
        let Self::Works(session) = self else { return };
        let (rest, again) = session.end();
        if let Some(vm) = vm {
            (vm.rest, vm.again) = (rest, again);
        }
    }
}

impl Protects for Driver {
    fn reversed(
        identity: HostIdentity,
        backup: HostId,
        generation: Generation,
        epoch: EpochId,
    ) -> Self {
        Self::Calls(Box::new(Engine::reversed(identity, backup, generation, epoch)))
    }

    fn machine(&self) -> &Primary {
        match self {
            Self::Calls(engine) => engine.machine(),
            Self::Works(session) => session.machine(),
        }
    }

    fn backup(&self) -> HostId {
        match self {
            Self::Calls(engine) => engine.backup(),
            Self::Works(session) => session.backup(),
        }
    }

    fn sealed(&self) -> EpochId {
        match self {
            Self::Calls(engine) => engine.sealed(),
            Self::Works(session) => session.sealed(),
        }
    }

    fn is_connected(&self) -> bool {
        match self {
            Self::Calls(engine) => engine.is_connected(),
            Self::Works(session) => session.is_connected(),
        }
    }

    fn waits(&self) -> bool {
        match self {
            Self::Calls(engine) => engine.waits(),
            // It has a timer of its own.
            Self::Works(_) => false,
        }
    }
}
