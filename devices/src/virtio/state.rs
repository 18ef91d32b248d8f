//! The saved form of a virtio device, without its transport. Snapshots and epochs carry the same.

use serde::{Deserialize, Serialize};

use super::blk::BlkState;
use super::device::StateError;

/// The state of one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// A device that has none beside its queues.
    Stateless,
    /// A disk.
    Block(BlkState),
    /// A network card.
    Net(super::net::state::NetState),
    /// A console.
    Console(super::console::state::ConsoleState),
}

impl DeviceState {
    /// What can be said without the device that is to load this.
    pub fn validate(&self) -> Result<(), StateError> {
        match self {
            Self::Console(console) => console.validate(),
            Self::Stateless | Self::Block(_) | Self::Net(_) => Ok(()),
        }
    }
}
