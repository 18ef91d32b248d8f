//! What protects a simulated machine: the engine that ships; or, while a new host calls the old one of a reversed
//! pair, the model's, after `primary/keeper/reversed.rs`.

use replication::ids::EpochId;
use replication::ownership::HostId;
use replication::primary::simulated::Session;
use replication::protocol::primary::{Primary, State};

use super::machine::Handle;
use crate::host::primary::Engine;

#[derive(Debug)]
pub enum Driver {
    Calls(Box<Engine>),
    Works(Box<Session<Handle>>),
}

impl Driver {
    #[must_use]
    pub fn machine(&self) -> &Primary {
        match self {
            Self::Calls(engine) => &engine.machine,
            Self::Works(session) => session.machine(),
        }
    }

    #[must_use]
    pub fn backup(&self) -> HostId {
        match self {
            Self::Calls(engine) => engine.backup(),
            Self::Works(session) => session.backup(),
        }
    }

    /// The last epoch that was sealed.
    #[must_use]
    pub fn sealed(&self) -> EpochId {
        match self {
            Self::Calls(engine) => engine.sealed(),
            Self::Works(session) => session.sealed(),
        }
    }

    #[must_use]
    pub fn is_connected(&self) -> bool {
        match self {
            Self::Calls(engine) => engine.is_connected(),
            Self::Works(session) => session.is_connected(),
        }
    }

    #[must_use]
    pub fn is_over(&self) -> bool {
        match self {
            Self::Calls(engine) => engine.is_over(),
            Self::Works(session) => session.is_over(),
        }
    }

    /// Whether the old host of a switch-over has not answered yet.
    #[must_use]
    pub fn is_calling(&self) -> bool {
        self.machine().state() == State::Calling
    }
}
