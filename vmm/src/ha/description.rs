//! What a primary tells its backup of the machine: the configuration, and the CPUID that the guest has seen.

use api::config::VmConfig;
use hypervisor::cpuid::base::{self, Leaf};
use serde::{Deserialize, Serialize};

use crate::machine::Machine;

#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Description {
    pub(super) config: VmConfig,
    pub(super) cpuid: Vec<Leaf>,
}

impl Description {
    pub(super) fn of(machine: &Machine) -> Self {
        Self { config: machine.config().clone(), cpuid: base::to_leaves(machine.cpuid()) }
    }

    pub(super) fn encode(&self) -> serde_json::Result<Vec<u8>> {
        serde_json::to_vec(self)
    }

    /// # Errors
    /// It is none.
    pub(super) fn decode(bytes: &[u8]) -> serde_json::Result<Self> {
        serde_json::from_slice(bytes)
    }
}
