//! A machine that waits for its take-over.

use std::sync::Arc;

use api::config::{ConsoleConfig, VmConfig};
use crossbeam_channel::Sender;
use hypervisor::Hypervisor;
use replication::guest::{GuestError, Replica, ReplicaBuilder};
use replication::ram::Ram;
use thiserror::Error;

use super::codec::{self, Captured};
use crate::control::Notice;
use crate::cpu::MachineEvent;
use crate::machine::Machine;
use crate::memory::Memory;

/// A primary's description cannot be built on this host.
#[derive(Debug, Error)]
pub enum ReplicaError {
    #[error("The primary's description is not a VM configuration")]
    Description(#[source] serde_json::Error),
    #[error("The primary's VM cannot run here: {0}")]
    Unusable(String),
    #[error("The machine state has {found} vCPUs, this VM {expected}")]
    Vcpus { found: usize, expected: u32 },
}

/// What this host does otherwise than the primary's configuration says.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    pub serial: Option<ConsoleConfig>,
    pub console: Option<ConsoleConfig>,
}

/// Builds machines after primaries' descriptions.
pub struct ReplicaVms {
    hypervisor: Arc<Hypervisor>,
    overrides: Overrides,
    events: Sender<MachineEvent>,
    notices: Sender<Notice>,
}

impl ReplicaVms {
    #[must_use]
    pub fn new(
        hypervisor: Arc<Hypervisor>,
        overrides: Overrides,
        events: Sender<MachineEvent>,
        notices: Sender<Notice>,
    ) -> Self {
        Self { hypervisor, overrides, events, notices }
    }
}

impl ReplicaBuilder for ReplicaVms {
    type Replica = ReplicaVm;

    fn build(&mut self, description: &[u8]) -> Result<ReplicaVm, GuestError> {
        let mut config: VmConfig =
            serde_json::from_slice(description).map_err(ReplicaError::Description)?;
        if let Some(serial) = &self.overrides.serial {
            config.serial = serial.clone();
        }
        if let Some(console) = &self.overrides.console {
            config.console = console.clone();
        }
        crate::control::check_config(&config)
            .map_err(|failure| ReplicaError::Unusable(failure.chain.join(": ")))?;
        Memory::check_fits(&config.memory)?;
        let machine = Arc::new(Machine::build(&self.hypervisor, config, &self.events)?);
        // A closed channel means that the VMM is on its way out.
        let _ = self.notices.send(Notice::ReplicaBuilt(Arc::clone(&machine)));
        Ok(ReplicaVm { machine, notices: self.notices.clone() })
    }
}

/// A machine that does not run yet.
pub struct ReplicaVm {
    machine: Arc<Machine>,
    notices: Sender<Notice>,
}

impl Replica for ReplicaVm {
    type State = Captured;

    fn ram(&self) -> Ram {
        self.machine.memory().ram().clone()
    }

    fn parse(&mut self, state: &[u8]) -> Result<Captured, GuestError> {
        let captured = codec::decode(state)?;
        let (found, expected) =
            (captured.machine.vcpus.len(), self.machine.config().cpus.boot_vcpus);
        if u32::try_from(found) != Ok(expected) {
            return Err(ReplicaError::Vcpus { found, expected }.into());
        }
        self.machine.check(&captured.machine)?;
        Ok(captured)
    }

    fn start(self, state: Captured) -> Result<(), GuestError> {
        self.machine.restore(state.machine)?;
        if !state.paused {
            self.machine.resume()?;
        }
        self.machine.devices().announce();
        let _ = self.notices.send(Notice::TookOver(Arc::clone(&self.machine)));
        Ok(())
    }
}
