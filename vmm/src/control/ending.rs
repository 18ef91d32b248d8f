//! Ending the VM: its protection first, so that the backup learns that this is no failure.
//!
//! ```text
//!   shutdown, delete, power-off, broken vCPU
//!        │ begin_end                       beside the loop: may ask the peer and the arbiter
//!        ▼                                  │
//!   winding down ──────────────────────────▶ Notice::ProtectionEnded ──▶ ended: the VM is gone
//! ```
//!
//! While it winds down the VM can be looked at and not changed. A protection that does not end in
//! order within its limit is given up: the VM is gone all the same, and the log says so.

use std::sync::Arc;

use crossbeam_channel::Sender;

use super::protection::{Protection, no_order, stop_primary};
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

impl Controller {
    /// Ends the protection beside the loop, and then the VM.
    pub(super) fn begin_end(&mut self, after: After) {
        let notices = self.notices.clone();
        let wind_down: Box<dyn FnOnce() + Send> = match &self.protection {
            // Whoever connects finds that the VM is gone, and ends.
            Protection::None | Protection::Connecting { .. } => return self.ended(after),
            Protection::Backup { handle, .. } if handle.is_finished() => return self.ended(after),
            Protection::Primary { handle, .. } => {
                let handle = Arc::clone(handle);
                Box::new(move || stop_primary(&handle))
            }
            Protection::Backup { handle, .. } => {
                let handle = Arc::clone(handle);
                Box::new(move || no_order(handle.stop()))
            }
        };
        self.winding_down = true;
        let (give, take) = crossbeam_channel::bounded(1);
        let started = std::thread::Builder::new().name("end-replica".into()).spawn(move || {
            wind_down();
            if let Ok(after) = take.recv() {
                // A closed channel means that the VMM is on its way out.
                let _ = notices.send(Notice::ProtectionEnded(after));
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

    /// The protection has ended, one way or the other.
    pub(super) fn ended(&mut self, after: After) {
        self.winding_down = false;
        self.protection = Protection::None;
        match after {
            After::Shutdown(reply) => {
                self.destroy();
                self.guest_is_down = false;
                self.monitor.emit("vm", "shutdown", None);
                let _ = reply.send(Ok(Reply::Empty));
            }
            After::Delete(reply) => {
                self.forget();
                let _ = reply.send(Ok(Reply::Empty));
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
            Protection::Primary { handle, .. } => stop_primary(handle),
            Protection::Backup { handle, .. } => no_order(handle.stop()),
        }
        self.protection = Protection::None;
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
