//! The replication requests, and what replication tells in return.
//!
//! ```text
//!          vm.replicate                    vm.receive-replica
//!   None -> Connecting -> Primary    None --------------------> Backup --take-over--> (a VM)
//!    ^--- vm.stop-replication ---'     ^--- vm.stop-replication ---'
//! ```

use std::sync::{Arc, Weak};

use api::replication::{
    ConsoleOutput, DiskMode, ReceiveReplicaData, ReplicateData, ReplicationInfo, ReplicationState,
    Role,
};
use crossbeam_channel::Sender;
use replication::backup::{self, BackupHandle};
use replication::primary::{self, PrimaryHandle};
use replication::{Error as ReplicationError, ErrorKind, Event, Observer};
use serde_json::{Value, json};

use super::{Answer, Controller, Ending, Notice};
use crate::device_manager::Holds;
use crate::device_manager::taps::TapDescriptors;
use crate::ha::{Overrides, ProtectedVm, ReplicaVms};
use crate::machine::Machine;
use crate::request::{Failure, FailureKind, Reply};

/// The one replication that this VMM takes part in.
pub(super) enum Protection {
    None,
    /// A backup was called for this machine and has not answered yet.
    Connecting {
        machine: Arc<Machine>,
        shares_disks: bool,
    },
    Primary {
        handle: Arc<PrimaryHandle>,
        /// The image of a disk that the guest writes is one that both hosts see.
        shares_disks: bool,
    },
    Backup {
        handle: Arc<BackupHandle>,
        /// Owned by the backup's engine.
        replica: Option<Weak<Machine>>,
    },
}

impl Protection {
    pub(super) fn info(&self) -> Option<ReplicationInfo> {
        match self {
            Self::None => None,
            Self::Connecting { .. } => Some(ReplicationInfo {
                role: Role::Primary,
                state: ReplicationState::Disconnected,
                ..ReplicationInfo::default()
            }),
            Self::Primary { handle, .. } => Some(handle.info()),
            Self::Backup { handle, .. } => Some(handle.info()),
        }
    }

    /// The machine that waits for its take-over.
    pub(super) fn replica(&self) -> Option<Arc<Machine>> {
        match self {
            Self::Backup { replica, .. } => replica.as_ref()?.upgrade(),
            _ => None,
        }
    }

    pub(super) fn waits_in(&mut self, machine: Weak<Machine>) {
        if let Self::Backup { replica, .. } = self {
            *replica = Some(machine);
        }
    }

    /// Whether a new replication may take this one's place.
    pub(super) fn is_over(&self) -> bool {
        match self {
            Self::None => true,
            Self::Connecting { .. } => false,
            // Its engine may still be closing: whoever comes next waits for that, see `protect`.
            Self::Primary { handle, .. } => has_ended(handle),
            Self::Backup { handle, .. } => handle.is_finished(),
        }
    }
}

/// Passes replication's events to the control loop.
struct Forward {
    notices: Sender<Notice>,
    protection: u64,
}

impl Observer for Forward {
    fn event(&self, event: Event) {
        // A closed channel means that the VMM is on its way out.
        let protection = self.protection;
        let _ = self.notices.send(Notice::Replication { protection, event });
    }
}

fn failure(error: &ReplicationError) -> Failure {
    let kind = match error.kind() {
        ErrorKind::Invalid => FailureKind::BadRequest,
        ErrorKind::Conflict => FailureKind::Conflict,
        ErrorKind::Other => FailureKind::Internal,
    };
    Failure::from_error(kind, error)
}

fn conflict(message: &str) -> Failure {
    Failure::new(FailureKind::Conflict, message)
}

fn no_replication() -> Failure {
    Failure::new(FailureKind::NotFound, "This VMM takes part in no replication")
}

/// Ends a protection in order, its last words to the backup included.
pub(super) fn stop_primary(handle: &PrimaryHandle) {
    let stopped = if has_ended(handle) { Ok(()) } else { handle.stop() };
    if stopped.is_ok() {
        handle.join();
    }
    no_order(stopped);
}

/// Whether a primary's engine does nothing more for its VM. It may still be closing.
fn has_ended(handle: &PrimaryHandle) -> bool {
    use ReplicationState::{Degraded, Lost, Stopped};
    matches!(handle.info().state, Degraded | Lost | Stopped)
}

/// Says that a protection did not end as it should.
pub(super) fn no_order(ended: Result<(), ReplicationError>) {
    if let Err(error) = ended {
        tracing::warn!("replication did not end in order: {}", error.chain());
    }
}

fn connecting() -> Failure {
    conflict("The backup was called and has not answered yet: try again")
}

/// The primary keeps the image's lock until its VM is gone, which is when the backup's runs, which
/// waits for the lock.
fn cannot_hand_over_shared_disks() -> Failure {
    conflict(
        "A VM whose disks are shared cannot be handed over yet: its image stays locked until this \
         process ends. End the process, and the backup takes over",
    )
}

impl Controller {
    /// Connects to the backup beside the loop: an unreachable one may take its time-out.
    pub(super) fn replicate(&mut self, data: ReplicateData, reply: Sender<Answer>) {
        match self.protected_vm(&data) {
            Ok(machine) => self.protect(machine, data, reply),
            Err(failure) => drop(reply.send(Err(failure))),
        }
    }

    fn protected_vm(&self, data: &ReplicateData) -> Result<Arc<Machine>, Failure> {
        Failure::from_complaints("The replication options are not usable", &data.validate())?;
        let machine = Arc::clone(self.running()?);
        if !self.protection.is_over() {
            return Err(conflict("The VM is already replicated: vm.stop-replication ends that"));
        }
        Ok(machine)
    }

    fn protect(&mut self, machine: Arc<Machine>, data: ReplicateData, reply: Sender<Answer>) {
        let holds = Holds {
            console: data.console_output == ConsoleOutput::Hold,
            disks: data.disk_mode == DiskMode::Shared,
        };
        let guest = ProtectedVm::new(Arc::clone(&machine), holds);
        let shares_disks = holds.disks && !machine.devices().writable_disks().is_empty();
        let called_for = Arc::clone(&machine);
        let before = match std::mem::replace(&mut self.protection, Protection::None) {
            Protection::Primary { handle, .. } => Some(handle),
            _ => None,
        };
        let identity = self.identity;
        let observer = self.observer();
        let notices = self.notices.clone();
        let lost = reply.clone();
        let started = std::thread::Builder::new().name("repl-connect".into()).spawn(move || {
            if let Some(before) = before {
                // The engine that is over turns the tracking off as its last act.
                before.join();
            }
            let result = primary::protect(guest, data, identity, observer);
            let handle = result.map(Arc::new).map_err(|error| failure(&error));
            // A closed channel means that the VMM is on its way out.
            let _ = notices.send(Notice::Protected { machine: called_for, handle, reply });
        });
        match started {
            Ok(_) => self.protection = Protection::Connecting { machine, shares_disks },
            Err(error) => {
                let failure = Failure::from_error(FailureKind::Internal, &error);
                let _ = lost.send(Err(failure));
            }
        }
    }

    /// For a protection that begins.
    fn observer(&mut self) -> Arc<Forward> {
        self.protections += 1;
        Arc::new(Forward { notices: self.notices.clone(), protection: self.protections })
    }

    /// The backup accepted the VM, or did not.
    pub(super) fn protected(
        &mut self,
        machine: &Arc<Machine>,
        handle: Result<Arc<PrimaryHandle>, Failure>,
        reply: Sender<Answer>,
    ) {
        let shares_disks = match &self.protection {
            Protection::Connecting { machine: waits, shares_disks }
                if Arc::ptr_eq(waits, machine) =>
            {
                Some(*shares_disks)
            }
            _ => None,
        };
        let called_for_it = shares_disks.is_some();
        let answer = match handle {
            Ok(handle) => {
                if let Some(shares_disks) = shares_disks {
                    self.protection = Protection::Primary { handle, shares_disks };
                    return drop(reply.send(Ok(Reply::Empty)));
                }
                // The VM was ended in the meantime, and another one may have come after.
                let stop = move || {
                    no_order(handle.stop());
                    Err(conflict("The VM was ended before it was protected"))
                };
                return Self::beside("stop-replica", reply, stop);
            }
            Err(failure) => {
                if called_for_it {
                    self.protection = Protection::None;
                }
                Err(failure)
            }
        };
        let _ = reply.send(answer);
    }

    pub(super) fn receive_replica(&mut self, data: ReceiveReplicaData) -> Answer {
        Failure::from_complaints("The replication options are not usable", &data.validate())?;
        if self.config.is_some() || self.machine.is_some() {
            return Err(conflict("This VMM has a VM of its own: a backup must have none"));
        }
        if !self.protection.is_over() {
            return Err(conflict("This VMM is a backup already: vm.stop-replication ends that"));
        }
        let overrides = Overrides::from(&data);
        let builder =
            ReplicaVms::new(Arc::clone(&self.hypervisor), overrides, self.notices.clone());
        let observer = self.observer();
        let handle = backup::receive(builder, data, observer).map_err(|error| failure(&error))?;
        self.protection = Protection::Backup { handle: Arc::new(handle), replica: None };
        Ok(Reply::Empty)
    }

    pub(super) fn stop_replication(&mut self, reply: Sender<Answer>) {
        let stopped = |result: Result<(), ReplicationError>| {
            result.map(|()| Reply::Empty).map_err(|error| failure(&error))
        };
        match &self.protection {
            Protection::None => drop(reply.send(Err(no_replication()))),
            Protection::Connecting { .. } => drop(reply.send(Err(connecting()))),
            // The VM runs on without protection, as it does already.
            ended if ended.is_over() => {
                self.protection = Protection::None;
                let _ = reply.send(Ok(Reply::Empty));
            }
            Protection::Primary { handle, .. } => {
                let handle = Arc::clone(handle);
                Self::beside("stop-replica", reply, move || stopped(handle.stop()));
            }
            Protection::Backup { handle, .. } => {
                let handle = Arc::clone(handle);
                Self::beside("stop-replica", reply, move || stopped(handle.stop()));
            }
        }
    }

    pub(super) fn failover(&mut self, force: bool, reply: Sender<Answer>) {
        match &self.protection {
            Protection::None => drop(reply.send(Err(no_replication()))),
            Protection::Connecting { .. } => drop(reply.send(Err(connecting()))),
            Protection::Primary { shares_disks: true, .. } => {
                drop(reply.send(Err(cannot_hand_over_shared_disks())));
            }
            Protection::Primary { handle, .. } => {
                let handle = Arc::clone(handle);
                Self::beside("failover", reply, move || {
                    handle.failover(force).map(|()| Reply::Empty).map_err(|error| failure(&error))
                });
            }
            Protection::Backup { handle, .. } => {
                let handle = Arc::clone(handle);
                Self::beside("failover", reply, move || {
                    handle.failover(force).map(|()| Reply::Empty).map_err(|error| failure(&error))
                });
            }
        }
    }

    pub(super) fn replication_info(&self) -> Answer {
        super::report::json(&self.protection.info().unwrap_or_default())
    }

    /// A replica runs: it is this VMM's VM.
    pub(super) fn adopt(&mut self, machine: Arc<Machine>) {
        self.config = Some(machine.config().clone());
        self.machine = Some(machine);
        self.taps = TapDescriptors::default();
        self.guest_is_down = false;
        if let Protection::Backup { handle, replica } = &mut self.protection {
            *replica = None;
            // A later protection of this VM goes under the names that the record knows.
            self.identity = handle.identity();
        }
        self.monitor.emit("vm", "resumed", None);
    }

    pub(super) fn replication_event(&mut self, protection: u64, event: Event) {
        let (name, properties) = describe(&event);
        match &properties {
            Some(properties) => tracing::info!("{name}: {properties}"),
            None => tracing::info!("{name}"),
        }
        self.monitor.emit("vm", name, properties);
        if protection != self.protections {
            // Of a VM that this process does not have any more.
            return;
        }
        match event {
            Event::OwnershipLost { owner } => self.ownership_lost(&owner),
            Event::FailoverFinished if matches!(self.protection, Protection::Primary { .. }) => {
                self.ownership_lost("the backup");
            }
            Event::ReceiveFailed { .. } | Event::Stopped => self.replica_gone(),
            _ => {}
        }
    }

    /// The peer runs the VM: this side's is destroyed already, and must not be started again.
    fn ownership_lost(&mut self, owner: &str) {
        self.replica_gone();
        if self.machine.take().is_some() {
            self.config = None;
            // They may be of the very tap that this host needs when it is a backup.
            self.taps = TapDescriptors::default();
            self.monitor.emit("vm", "deleted", None);
            if !self.has_api {
                let what = format!("The VM goes on at its backup: {owner} owns it");
                self.ending = Some(Ending::Failed(what));
            }
        }
    }

    /// Lets go of a replica that waits for nothing any more. A stranger that was refused leaves it
    /// where it is, and so does a lost primary where there is no arbiter.
    fn replica_gone(&mut self) {
        if let Protection::Backup { handle, replica } = &mut self.protection
            && matches!(
                handle.info().state,
                ReplicationState::Disconnected | ReplicationState::Stopped
            )
        {
            *replica = None;
        }
    }
}

/// The event's name and properties as the event monitor shows them.
fn describe(event: &Event) -> (&'static str, Option<Value>) {
    match event {
        Event::ReplicationStarted { peer } => ("replication-started", Some(json!({"peer": peer}))),
        Event::Synced => ("replication-synced", None),
        Event::Resynced => ("replication-resynced", None),
        Event::Degraded { reason } => ("replication-degraded", Some(json!({"reason": reason}))),
        Event::Stopped => ("replication-stopped", None),
        Event::Failed { error } => ("replication-failed", Some(json!({"error": error}))),
        Event::Undecided { error } => ("replication-undecided", Some(json!({"error": error}))),
        Event::OwnershipLost { owner } => ("replication-lost", Some(json!({"owner": owner}))),
        Event::ReceiveReady { address } => {
            ("replica-receive-ready", Some(json!({"address": address})))
        }
        Event::ReceiveStarted { peer } => ("replica-receive-started", Some(json!({"peer": peer}))),
        Event::ReceiveFailed { error } => ("replica-receive-failed", Some(json!({"error": error}))),
        Event::FailoverStarted => ("failover-started", None),
        Event::FailoverFinished => ("failover-finished", None),
        Event::FailoverFailed { error } => ("failover-failed", Some(json!({"error": error}))),
    }
}
