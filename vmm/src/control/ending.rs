//! Ending the VM: its protection first, so that the backup learns that this is no failure.
//!
//! ```text
//!   shutdown, delete, power-off, broken vCPU
//!        │ begin_end                       beside the loop: may ask the peer and the arbiter
//!        ▼                                  │
//!   winding down ──────────────────────────▶ Notice::ProtectionEnded ──▶ ended: the VM is gone
//! ```
//!
//! While it winds down the VM can be looked at and not changed. A client's order is refused where the VM is
//! not this host's to end: a switch-over is under way, or is over. A protection that does not end in order
//! within its limit is given up: what is here of the VM is gone all the same, and the log, and the answer to
//! a client, say that the backup may run it.

use std::sync::Arc;

use api::replication::ReplicationState;
use crossbeam_channel::Sender;

use replication::primary::PrimaryHandle;
use replication::{Error as ReplicationError, ErrorKind};

use super::protection::{Protection, failure, no_order, stop_primary};
use super::{Answer, Controller, Ending, Notice};
use crate::device_manager::taps::TapDescriptors;
use crate::request::{Failure, FailureKind, Reply, Request};

/// What is to be done once the protection has ended.
pub enum After {
    Shutdown(Sender<Answer>),
    Delete(Sender<Answer>),
    /// The guest shut itself down.
    PowerOff,
    /// The machine cannot go on.
    Failed(String),
}

/// How a protection ended that had to end before its VM.
pub enum Parting {
    InOrder,
    /// The VM is not this host's to end.
    Elsewhere(Failure),
    /// Nobody knows: the backup may come to own it.
    Undecided(Failure),
}

impl Parting {
    fn of(handle: &PrimaryHandle, stopped: Result<(), ReplicationError>) -> Self {
        let Err(error) = stopped else { return Self::InOrder };
        tracing::warn!("replication did not end in order: {}", error.chain());
        use ReplicationState::{Degraded, Lost, Stopped};
        match (handle.info().state, error.kind()) {
            // It ended by itself in the same moment.
            (Stopped | Degraded, _) => Self::InOrder,
            (Lost, _) | (_, ErrorKind::Conflict) => Self::Elsewhere(failure(&error)),
            _ => Self::Undecided(failure(&error)),
        }
    }
}

impl Controller {
    /// Ends the protection beside the loop, and then the VM.
    pub(super) fn begin_end(&mut self, after: After) {
        let notices = self.notices.clone();
        let wind_down: Box<dyn FnOnce() -> Parting + Send> = match &self.protection {
            // Whoever connects finds that the VM is gone, and ends.
            Protection::None | Protection::Connecting { .. } => return self.ended(after),
            Protection::Backup { handle, .. } if handle.is_finished() => return self.ended(after),
            Protection::Primary { handle, .. } => {
                let handle = Arc::clone(handle);
                Box::new(move || Parting::of(&handle, stop_primary(&handle)))
            }
            Protection::Backup { handle, .. } => {
                let handle = Arc::clone(handle);
                Box::new(move || {
                    no_order(handle.stop());
                    Parting::InOrder
                })
            }
        };
        self.winding_down = true;
        let (give, take) = crossbeam_channel::bounded(1);
        let started = std::thread::Builder::new().name("end-replica".into()).spawn(move || {
            let parting = wind_down();
            if let Ok(after) = take.recv() {
                // A closed channel means that the VMM is on its way out.
                let _ = notices.send(Notice::ProtectionEnded(after, parting));
            }
        });
        match started {
            Ok(_) => drop(give.send(after)),
            Err(error) => {
                tracing::error!(%error, "cannot start a thread: the protection ends without order");
                self.ended(after);
            }
        }
    }

    /// The protection has ended, one way or the other, or goes on.
    pub(super) fn parted(&mut self, after: After, parting: Parting) {
        self.winding_down = false;
        match (after, parting) {
            (After::Shutdown(reply) | After::Delete(reply), Parting::Elsewhere(failure)) => {
                let _ = reply.send(Err(failure));
            }
            (after @ (After::Shutdown(_) | After::Delete(_)), Parting::Undecided(failure)) => {
                let what =
                    "What is here of the VM was ended, and its backup may run it: look there";
                let chain = [vec![what.to_owned()], failure.chain].concat();
                self.ended_with(after, Err(Failure { chain, ..failure }));
            }
            (after, _) => self.ended(after),
        }
    }

    /// The protection is over, or there was none.
    fn ended(&mut self, after: After) {
        self.ended_with(after, Ok(Reply::Empty));
    }

    /// The VM ends; `answer` is for the client who asked for it.
    fn ended_with(&mut self, after: After, answer: Answer) {
        self.winding_down = false;
        self.unprotect();
        match after {
            After::Shutdown(reply) => {
                self.destroy();
                self.guest_is_down = false;
                self.monitor.emit("vm", "shutdown", None);
                let _ = reply.send(answer);
            }
            After::Delete(reply) => {
                self.forget();
                let _ = reply.send(answer);
            }
            After::PowerOff => {
                self.monitor.emit("vm", "shutdown", None);
                self.guest_is_down = true;
                if !self.no_shutdown {
                    self.ending = Some(Ending::Clean);
                }
            }
            After::Failed(what) => self.ending = Some(Ending::Failed(what)),
        }
    }

    /// Ends the VM, waiting for its protection: for a process that ends as well.
    pub(super) fn take_down(&mut self) {
        match &self.protection {
            Protection::None | Protection::Connecting { .. } => {}
            Protection::Backup { handle, .. } if handle.is_finished() => {}
            Protection::Primary { handle, .. } => no_order(stop_primary(handle)),
            Protection::Backup { handle, .. } => no_order(handle.stop()),
        }
        self.unprotect();
        self.winding_down = false;
        self.forget();
    }

    /// The VM and its configuration are gone.
    pub(super) fn forget(&mut self) {
        let was_down = std::mem::take(&mut self.guest_is_down);
        if self.destroy() && !was_down {
            self.monitor.emit("vm", "shutdown", None);
        }
        self.taps = TapDescriptors::default();
        if self.config.take().is_some() {
            self.monitor.emit("vm", "deleted", None);
        }
    }

    /// Ends the machine. A replication thread may hold it a little longer: it must not run on.
    fn destroy(&mut self) -> bool {
        let Some(machine) = self.machine.take() else { return false };
        self.resetting = false;
        machine.destroy();
        // Not left to the last holder of the machine, which may be cut off by the process' end.
        machine.devices().finish();
        true
    }

    /// Why `request` has to wait: the state that goes on elsewhere may have been sealed already, and what is
    /// done to the VM here is not in it.
    pub(super) fn refuse_while_handing_over(&self, request: &Request) -> Result<(), Failure> {
        let changes = matches!(
            request,
            Request::VmPause
                | Request::VmResume
                | Request::VmReboot
                | Request::VmPowerButton
                | Request::VmSnapshot(_)
                | Request::VmShutdown
                | Request::VmDelete
        );
        if changes { self.stays_here() } else { Ok(()) }
    }

    /// The VM is not being handed over, as far as this host knows.
    pub(super) fn stays_here(&self) -> Result<(), Failure> {
        match &self.protection {
            Protection::Primary { handle, .. } if handle.is_handing_over() => {
                let what = match handle.info().state {
                    ReplicationState::Suspended => {
                        "A switch-over was cut, and nobody but a person can say which host runs the VM: if \
                         it is this one, say vm.stop-replication here first"
                    }
                    _ => {
                        "The VM is being handed over to its backup: wait for the end of that, and ask the \
                         host that has it then"
                    }
                };
                Err(Failure::new(FailureKind::Conflict, what))
            }
            _ => Ok(()),
        }
    }

    /// Why `request` has to wait: the VM is on its way out.
    pub(super) fn refuse_while_ending(&self, request: &Request) -> Result<(), Failure> {
        let looks_only = matches!(
            request,
            Request::VmmPing
                | Request::VmmShutdown
                | Request::VmInfo
                | Request::VmCounters
                | Request::VmReplicationInfo
        );
        if self.winding_down && !looks_only {
            let what = "The VM is being ended, its protection first: try again";
            return Err(Failure::new(FailureKind::Internal, what));
        }
        Ok(())
    }
}
