//! A simulated process: a machine, and the engine that ships of the role that it has.

use replication::backup::simulated::{Broken as ReceptionBroken, Reception};
use replication::handover::Legacy;
use replication::ids::{Generation, PAGE_SIZE};
use replication::ownership::HostIdentity;
use replication::protocol::backup::State as BackupState;
use replication::ram::Ram;

use super::driver::Driver;
use super::machine::Machine;
use super::plan::Plan;
use super::replica::{Builder, Shared};
use crate::broken::Broken;
use crate::vm::Vm;

/// A backup, and what it has.
#[derive(Debug)]
pub struct Backup {
    pub reception: Reception<Builder>,
    pub site: Shared,
}

/// What a backup's options are, as a plan has them.
fn options(plan: &Plan) -> api::replication::ReceiveReplicaData {
    let text = serde_json::json!({
        "receiver_url": "tcp:10.0.0.2:7000",
        "staging_size": plan.staging_pages * PAGE_SIZE as u64,
        "heartbeat_ms": plan.heartbeat_us / 1000,
        "timeout_ms": plan.timeout_us / 1000,
    });
    serde_json::from_value(text).expect("options that any client may send")
}

fn breaks(broken: Option<Broken>) -> ReceptionBroken {
    ReceptionBroken {
        applies_early: broken == Some(Broken::AppliedBeforeItsEnd),
        keeps_staged: broken == Some(Broken::StartUnacknowledged),
    }
}

impl Backup {
    /// One that has nothing.
    #[must_use]
    pub fn new(identity: HostIdentity, plan: &Plan, broken: Option<Broken>) -> Self {
        let site = Shared::new(None, broken);
        let (builder, arbiter) = (Builder(site.clone()), plan.arbiter);
        let breaks = breaks(broken);
        let reception = Reception::new(builder, options(plan), identity, arbiter, breaks);
        Self { reception, site }
    }

    /// One that had the machine itself.
    #[must_use]
    pub fn inherits(legacy: Legacy, kept: Ram, plan: &Plan, broken: Option<Broken>) -> Self {
        let site = Shared::new(Some(kept), broken);
        let (builder, arbiter) = (Builder(site.clone()), plan.arbiter);
        let breaks = breaks(broken);
        let reception = Reception::inherits(builder, options(plan), legacy, arbiter, breaks);
        Self { reception, site }
    }

    #[must_use]
    pub fn state(&self) -> BackupState {
        self.reception.machine().state()
    }

    /// Whether what it has can be started.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        !self.reception.is_spoiled() && !self.site.lock().is_doomed
    }
}

#[derive(Debug)]
pub enum Role {
    /// Nothing: there is a machine that is not protected, or not even that.
    None,
    Primary(Driver),
    Backup(Box<Backup>),
}

#[derive(Debug)]
pub struct Host {
    pub alive: bool,
    pub identity: HostIdentity,
    pub vm: Option<Machine>,
    pub role: Role,
}

impl Host {
    /// A process that runs a machine.
    #[must_use]
    pub fn running(identity: HostIdentity, vm: Machine) -> Self {
        Self { alive: true, identity, vm: Some(vm), role: Role::None }
    }

    /// A process that listens for a primary.
    #[must_use]
    pub fn listening(identity: HostIdentity, plan: &Plan, broken: Option<Broken>) -> Self {
        let role = Role::Backup(Box::new(Backup::new(identity, plan, broken)));
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

    #[must_use]
    pub fn primary(&self) -> Option<&Driver> {
        match &self.role {
            Role::Primary(driver) => Some(driver),
            _ => None,
        }
    }

    #[must_use]
    pub fn backup(&self) -> Option<&Backup> {
        match &self.role {
            Role::Backup(backup) => Some(backup),
            _ => None,
        }
    }

    /// Whether a session has this host's end of the connection.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        match &self.role {
            Role::Primary(driver) => driver.is_connected(),
            Role::Backup(backup) => backup.reception.is_connected(),
            Role::None => false,
        }
    }

    /// The generation that this host believes in.
    #[must_use]
    pub fn generation(&self) -> Option<Generation> {
        match &self.role {
            Role::Primary(driver) => Some(driver.machine().generation()),
            Role::Backup(backup) => Some(backup.reception.machine().generation()),
            Role::None => None,
        }
    }
}
