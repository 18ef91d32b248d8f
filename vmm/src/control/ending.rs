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
//! a client, say that the backup may run it. It cannot be booted again: it may be the backup's by then. Where
//! a cut switch-over left to a person whose the VM is, the end of the process says nothing about it.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use api::replication::ReplicationState;
use crossbeam_channel::Sender;

use replication::primary::PrimaryHandle;
use replication::{Error as ReplicationError, ErrorKind};

use super::leaving::{Leaving, Told};
use super::lifecycle::{has_gone, snapshot_under_way};
use super::protection::{Protection, failure, is_cut, no_order, stop_primary};
use super::{Answer, Controller, Ending, Notice};
use crate::device_manager::taps::TapDescriptors;
use crate::machine::Machine;
use crate::request::{Failure, FailureKind, Reply, Request};

/// What is to be done once the protection has ended.
pub enum After {
    Shutdown(Sender<Answer>),
    /// As a shutdown: a client's reset has failed, which is the answer, and left nothing to run.
    Unbootable(Sender<Answer>, Failure),
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
    pub(super) fn of(handle: &PrimaryHandle, stopped: Result<(), ReplicationError>) -> Self {
        use ReplicationState::{Degraded, Lost, Stopped};
        let state = handle.info().state;
        let error = match stopped {
            // It was over because the backup took the VM.
            Ok(()) if state == Lost => return Self::Elsewhere(has_gone()),
            Ok(()) => return Self::InOrder,
            Err(error) => error,
        };
        tracing::warn!("replication did not end in order: {}", error.chain());
        match (state, error.kind()) {
            // It ended by itself in the same moment.
            (Stopped | Degraded, _) => Self::InOrder,
            (Lost, _) | (_, ErrorKind::Conflict) => Self::Elsewhere(failure(&error)),
            _ => Self::Undecided(failure(&error)),
        }
    }
}

fn is_same(protected: &Weak<Machine>, ours: &Arc<Machine>) -> bool {
    std::ptr::eq(protected.as_ptr(), Arc::as_ptr(ours))
}

impl Controller {
    /// Ends the protection beside the loop, and then the VM.
    pub(super) fn begin_end(&mut self, after: After) {
        let after = match after {
            // Whoever says so is on the way here, and needs what is left for the way back.
            After::Shutdown(reply) | After::Unbootable(reply, _) | After::Delete(reply)
                if self.has_gone() =>
            {
                return drop(reply.send(Err(has_gone())));
            }
            after => after,
        };
        let notices = self.notices.clone();
        let wind_down: Box<dyn FnOnce() -> Parting + Send> = match &self.protection {
            // Whoever connects finds that the VM is gone, and ends.
            Protection::None | Protection::Connecting { .. } => return self.ended(after),
            Protection::Backup { handle, .. } if handle.is_finished() => return self.ended(after),
            Protection::Primary { handle, machine, .. } => {
                let handle = Arc::clone(handle);
                let is_of_ours = self.machine.as_ref().is_some_and(|ours| is_same(machine, ours));
                Box::new(move || {
                    let stopped = stop_primary(&handle);
                    if is_of_ours {
                        return Parting::of(&handle, stopped);
                    }
                    no_order(stopped);
                    Parting::InOrder
                })
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
        let doubt = |failure: Failure| {
            let what = "What is here of the VM was ended, and its backup may run it: look there";
            let chain = [vec![what.to_owned()], failure.chain].concat();
            Failure { chain, ..failure }
        };
        match (after, parting) {
            (after, Parting::InOrder) => self.ended(after),
            (After::Shutdown(reply) | After::Delete(reply), Parting::Elsewhere(failure))
            | (After::Unbootable(reply, failure), Parting::Elsewhere(_)) => {
                let _ = reply.send(Err(failure));
                self.look_at_wish();
            }
            (After::Shutdown(reply) | After::Delete(reply), Parting::Undecided(failure))
            | (After::Unbootable(reply, failure), Parting::Undecided(_)) => {
                self.abandon(Some((reply, Err(doubt(failure)))));
            }
            (After::PowerOff, Parting::Elsewhere(_) | Parting::Undecided(_)) => {
                self.abandon(None);
                self.guest_has_ended();
            }
            (after @ After::Failed(_), _) => self.ended(after),
        }
    }

    /// What is here of a VM that its backup has, or may come to have, is gone: it must not be booted a second
    /// time.
    fn abandon(&mut self, told: Told) {
        self.unprotect();
        self.forget_and_tell(told);
    }

    /// The protection is over, or there was none: the VM ends.
    fn ended(&mut self, after: After) {
        self.winding_down = false;
        self.unprotect();
        match after {
            After::Shutdown(reply) => self.switch_off(reply, Ok(Reply::Empty)),
            After::Unbootable(reply, failure) => self.switch_off(reply, Err(failure)),
            After::Delete(reply) => self.forget_and_tell(Some((reply, Ok(Reply::Empty)))),
            After::PowerOff => {
                self.monitor.emit("vm", "shutdown", None);
                self.guest_is_down = true;
                self.guest_has_ended();
            }
            After::Failed(what) => self.ending = Some(Ending::Failed(what)),
        }
    }

    /// The VM can be booted again.
    fn switch_off(&mut self, reply: Sender<Answer>, answer: Answer) {
        let machine = self.destroy();
        self.guest_is_down = false;
        self.monitor.emit("vm", "shutdown", None);
        self.let_go(machine, Some((reply, answer)));
    }

    fn guest_has_ended(&mut self) {
        if !self.no_shutdown {
            self.ending = Some(Ending::Clean);
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
        // Not beside the loop: sockets are to be gone as the process ends.
        drop(self.forget());
        self.leaving.join();
    }

    /// The VM and its configuration are gone; what is left of its machine.
    #[must_use]
    fn forget(&mut self) -> Option<Arc<Machine>> {
        let was_down = std::mem::take(&mut self.guest_is_down);
        let machine = self.destroy();
        if machine.is_some() && !was_down {
            self.monitor.emit("vm", "shutdown", None);
        }
        self.taps = TapDescriptors::default();
        if self.config.take().is_some() {
            self.monitor.emit("vm", "deleted", None);
        }
        machine
    }

    /// The VM and its configuration are gone, which a client may wait for.
    pub(super) fn forget_and_tell(&mut self, told: Told) {
        let machine = self.forget();
        self.let_go(machine, told);
    }

    /// Ends the machine. A replication thread may hold it a little longer: it must not run on.
    fn destroy(&mut self) -> Option<Arc<Machine>> {
        let machine = self.machine.take()?;
        self.resetting = false;
        machine.destroy();
        // Not left to the last holder of the machine, which may be cut off by the process' end.
        machine.devices().finish();
        Some(machine)
    }

    /// Lets go of what is left of a machine beside the loop, and tells a client then, if one waits.
    pub(super) fn let_go(&mut self, machine: Option<Arc<Machine>>, told: Told) {
        match machine {
            Some(machine) => self.leaving = Leaving::begin(machine, told),
            // A client that went away has no use for its answer.
            None => drop(told.map(|(reply, answer)| reply.send(answer))),
        }
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

    /// The VM is not being handed over, and was not, as far as this host knows.
    pub(super) fn stays_here(&self) -> Result<(), Failure> {
        match &self.protection {
            Protection::Primary { handle, .. } if handle.is_handing_over() => {
                let what = match is_cut(handle) {
                    true => {
                        "A switch-over was cut, and nobody but a person can say which host runs the VM: if \
                         it is this one, say vm.stop-replication here first"
                    }
                    false => {
                        "The VM is being handed over to its backup: wait for the end of that, and ask the \
                         host that has it then"
                    }
                };
                Err(Failure::new(FailureKind::Conflict, what))
            }
            _ if self.has_gone() => Err(has_gone()),
            _ => Ok(()),
        }
    }

    /// The VM is its backup's, and the loop has yet to hear of that.
    pub(super) fn has_gone(&self) -> bool {
        match (&self.protection, &self.machine) {
            (Protection::Primary { handle, machine, .. }, Some(ours)) => {
                is_same(machine, ours) && handle.info().state == ReplicationState::Lost
            }
            _ => false,
        }
    }

    /// Whether what the guest asks is looked at now. Else it waits: its VM winds down, which may come to nothing
    /// yet, or is not this host's for certain.
    pub(super) fn hears_guest(&self) -> bool {
        let is_cut =
            matches!(&self.protection, Protection::Primary { handle, .. } if is_cut(handle));
        !self.winding_down && !is_cut && !self.has_gone()
    }

    /// Why `request` has to wait: what is written of the VM must stay as it is.
    pub(super) fn refuse_while_saving(&self, request: &Request) -> Result<(), Failure> {
        let changes = matches!(
            request,
            Request::VmResume
                | Request::VmReboot
                | Request::VmPowerButton
                | Request::VmBoot
                | Request::VmShutdown
                | Request::VmDelete
        );
        let is_saving = self.snapshots.load(Ordering::Acquire);
        if changes && is_saving { Err(snapshot_under_way()) } else { Ok(()) }
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
