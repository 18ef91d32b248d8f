//! The VM's life: create, boot, pause, resume, reboot, shutdown, delete, snapshot, restore.

use std::sync::Arc;

use api::config::{RestoreConfig, SnapshotConfig, VmConfig};
use crossbeam_channel::Sender;
use replication::HostIdentity;
use serde_json::json;

use super::protection::Protection;
use super::{Answer, Controller, Ending};
use crate::cpu::MachineEvent;
use crate::machine::{Machine, MachineError};
use crate::request::{Failure, FailureKind, Reply};
use crate::snapshot::{self, SnapshotError};

pub(super) fn no_vm() -> Failure {
    Failure::new(FailureKind::NotFound, "No VM has been created")
}

fn wrong_state(message: &str) -> Failure {
    Failure::new(FailureKind::Internal, message)
}

fn internal(error: &dyn std::error::Error) -> Failure {
    Failure::from_error(FailureKind::Internal, error)
}

/// Everything that can be said against a configuration without building it.
pub fn check_config(config: &VmConfig) -> Result<(), Failure> {
    let mut complaints = config.validate();
    complaints.extend(config.unsupported());
    Failure::from_complaints("The VM configuration is not usable", &complaints)
}

impl Controller {
    pub(super) fn create(&mut self, config: VmConfig) -> Answer {
        self.room_for_a_vm()?;
        check_config(&config)?;
        self.begin(config);
        Ok(Reply::Empty)
    }

    /// This VMM's VM is another one than before: it must not pass for that in an arbiter's record.
    fn begin(&mut self, config: VmConfig) {
        self.config = Some(config);
        self.identity = HostIdentity { host: self.identity.host, ..HostIdentity::random() };
    }

    /// A VMM has one VM at most, and a backup's is to be its primary's.
    fn room_for_a_vm(&self) -> Result<(), Failure> {
        if self.config.is_some() || self.machine.is_some() {
            return Err(wrong_state("A VM has already been created"));
        }
        if matches!(self.protection, Protection::Backup { .. }) && !self.protection.is_over() {
            return Err(wrong_state("This VMM is a backup: vm.stop-replication ends that"));
        }
        Ok(())
    }

    pub(super) fn boot(&mut self) -> Answer {
        let config = self.config.clone().ok_or_else(no_vm)?;
        if self.machine.is_some() && !self.guest_is_down {
            return Err(wrong_state("The VM is already booted"));
        }
        self.machine = None;
        self.guest_is_down = false;
        self.monitor.emit("vm", "booting", None);
        let machine = Machine::build(&self.hypervisor, config, &self.events)
            .and_then(|machine| machine.boot().map(|()| machine))
            .map_err(|error| Failure::from_error(boot_failure_kind(&error), &error))?;
        self.machine = Some(Arc::new(machine));
        self.monitor.emit("vm", "booted", None);
        Ok(Reply::Empty)
    }

    /// The VM that runs or is paused.
    pub(super) fn running(&self) -> Result<&Arc<Machine>, Failure> {
        match &self.machine {
            Some(machine) if !self.guest_is_down => Ok(machine),
            _ if self.config.is_some() => Err(wrong_state("The VM is not running")),
            _ => Err(no_vm()),
        }
    }

    pub(super) fn pause(&mut self) -> Answer {
        let machine = Arc::clone(self.running()?);
        if machine.is_paused() {
            return Err(wrong_state("The VM is already paused"));
        }
        self.monitor.emit("vm", "pausing", None);
        machine.pause().map_err(|error| internal(&error))?;
        self.monitor.emit("vm", "paused", None);
        Ok(Reply::Empty)
    }

    pub(super) fn resume(&mut self) -> Answer {
        let machine = Arc::clone(self.running()?);
        if !machine.is_paused() {
            return Err(wrong_state("The VM is not paused"));
        }
        self.monitor.emit("vm", "resuming", None);
        machine.resume().map_err(|error| internal(&error))?;
        self.monitor.emit("vm", "resumed", None);
        Ok(Reply::Empty)
    }

    pub(super) fn reboot(&mut self) -> Answer {
        let machine = Arc::clone(self.running()?);
        self.monitor.emit("vm", "rebooting", None);
        machine.reset().map_err(|error| internal(&error))?;
        if machine.is_paused() {
            machine.resume().map_err(|error| internal(&error))?;
        }
        self.monitor.emit("vm", "rebooted", None);
        Ok(Reply::Empty)
    }

    pub(super) fn power_button(&mut self) -> Answer {
        self.running()?.devices().power_button().map_err(|error| internal(&error))?;
        Ok(Reply::Empty)
    }

    pub(super) fn shutdown(&mut self) -> Answer {
        if self.machine.is_none() {
            self.config.as_ref().ok_or_else(no_vm)?;
            return Err(wrong_state("The VM is not running"));
        }
        self.take_down();
        self.monitor.emit("vm", "shutdown", None);
        Ok(Reply::Empty)
    }

    pub(super) fn delete(&mut self) -> Answer {
        if self.machine.is_some() {
            self.take_down();
            self.monitor.emit("vm", "shutdown", None);
        }
        if self.config.take().is_some() {
            self.monitor.emit("vm", "deleted", None);
        }
        Ok(Reply::Empty)
    }

    pub(super) fn snapshot(&mut self, config: SnapshotConfig, reply: Sender<Answer>) {
        let machine = match self.running() {
            Ok(machine) if machine.is_paused() => Arc::clone(machine),
            Ok(_) => {
                let _ = reply.send(Err(wrong_state("A snapshot needs a paused VM")));
                return;
            }
            Err(failure) => {
                let _ = reply.send(Err(failure));
                return;
            }
        };
        let monitor = self.monitor.clone();
        Self::beside("snapshot", reply, move || {
            monitor.emit("vm", "snapshotting", None);
            snapshot::save(&machine, &config.destination_url)
                .map_err(|error| Failure::from_error(snapshot_failure_kind(&error), &error))?;
            monitor.emit("vm", "snapshotted", None);
            Ok(Reply::Empty)
        });
    }

    pub(super) fn restore(&mut self, config: &RestoreConfig) -> Answer {
        self.room_for_a_vm()?;
        self.monitor.emit("vm", "restoring", None);
        let machine =
            snapshot::restore(&self.hypervisor, &config.source_url, config.prefault, &self.events)
                .map_err(|error| Failure::from_error(snapshot_failure_kind(&error), &error))?;
        if config.resume {
            machine.resume().map_err(|error| internal(&error))?;
        }
        self.begin(machine.config().clone());
        self.machine = Some(Arc::new(machine));
        self.guest_is_down = false;
        self.monitor.emit("vm", "restored", None);
        Ok(Reply::Empty)
    }

    /// Ends the VM, its protection first: the backup must learn that this is no failure.
    pub(super) fn take_down(&mut self) {
        self.end_protection();
        self.machine = None;
        self.guest_is_down = false;
    }

    pub(super) fn machine_event(&mut self, event: MachineEvent) {
        if self.machine.is_none() || self.guest_is_down {
            // Of a VM that a client ended in the meantime.
            return;
        }
        match event {
            MachineEvent::PowerOff => {
                tracing::info!("the guest shut down");
                self.guest_ended();
            }
            MachineEvent::Reset => {
                tracing::info!("the guest asked for a reset");
                if let Err(failure) = self.reboot() {
                    self.ending = Some(Ending::Failed(failure.chain.join(": ")));
                }
            }
            MachineEvent::Virtio { id, what } => {
                self.monitor.emit("virtio-device", what, Some(json!({ "id": id })));
            }
            MachineEvent::Failed(what) => {
                tracing::error!("{what}");
                self.end_protection();
                self.ending = Some(Ending::Failed(what));
            }
        }
    }

    fn guest_ended(&mut self) {
        if let Some(machine) = &self.machine {
            // The guest may still be running past its power-off.
            if let Err(error) = machine.pause() {
                tracing::error!(%error, "the vCPUs could not be parked");
            }
        }
        self.end_protection();
        self.monitor.emit("vm", "shutdown", None);
        if self.no_shutdown {
            self.guest_is_down = true;
        } else {
            self.ending = Some(Ending::Clean);
        }
    }
}

/// A payload that does not exist or is none is the client's mistake.
fn boot_failure_kind(error: &MachineError) -> FailureKind {
    match error {
        MachineError::Boot(_) | MachineError::TooManyVcpus { .. } => FailureKind::BadRequest,
        _ => FailureKind::Internal,
    }
}

fn snapshot_failure_kind(error: &SnapshotError) -> FailureKind {
    match error {
        SnapshotError::Url(_) => FailureKind::BadRequest,
        _ => FailureKind::Internal,
    }
}
