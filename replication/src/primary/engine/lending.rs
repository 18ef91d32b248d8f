//! Registering guest memory with the RDMA device, beside the first copy, which has each piece as soon as it is there.
//! The sessions after that find it registered.
//!
//! Nothing is protected before it is done, or failed: a page that is protected when its place is looked up
//! may be taken for written. Where it fails pages are copied to be sent, unless the options want
//! otherwise.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use api::replication::{Cow, RdmaPin};

use super::{Engine, Error, Event, Guest, Input, Work, rdma};
use crate::engine::{clock, spawn};
use crate::error::chain;
use crate::ids::PAGE_SIZE;

/// The log tells each time that so many parts of all are done.
const TOLD_PARTS: u64 = 10;

impl<G: Guest> Engine<'_, G> {
    /// Begins it, where there is a device.
    pub(super) fn lend(&mut self) {
        let Some(lender) = self.lender.take() else { return };
        // With cow=copy all that is sent is a copy already.
        if self.options.rdma_pin == Some(RdmaPin::Off) || self.options.cow == Cow::Copy {
            tracing::info!("guest memory is not registered: pages are copied to be sent");
            return;
        }
        let (ram, status, inputs) =
            (self.sealer.ram.clone(), self.status.clone(), self.inputs.clone());
        let body = move || {
            let all = ram.pages() * PAGE_SIZE as u64;
            if lender.lend_again(&ram) {
                if let Some(path) = &mut status.lock().info.rdma {
                    path.registered_bytes = all;
                }
                let mib = all >> 20;
                tracing::info!("{mib} MiB of guest memory are registered since an earlier session");
                let _ = inputs.send(Input::Lent(Ok(())));
                return;
            }
            tracing::info!("registering {} MiB of guest memory with the RDMA device", all >> 20);
            let (began, told) = (Instant::now(), AtomicU64::new(0));
            let pieces = inputs.clone();
            let lent = lender.lend(&ram, move |bytes| {
                if let Some(path) = &mut status.lock().info.rdma {
                    path.registered_bytes = bytes;
                }
                let part = bytes.saturating_mul(TOLD_PARTS) / all.max(1);
                if told.swap(part, Ordering::Relaxed) < part {
                    tracing::info!("registered {} of {} MiB", bytes >> 20, all >> 20);
                }
                let _ = pieces.send(Input::Lending);
            });
            if lent.is_ok() {
                tracing::info!("guest memory is registered, after {:?}", began.elapsed());
            }
            // An engine that has ended needs no word.
            let _ = inputs.send(Input::Lent(lent));
        };
        match spawn("repl-pin", None, body) {
            Ok(_) => self.lending = true,
            Err(error) => self.not_lent(&error.chain()),
        }
    }

    /// It is over.
    pub(super) fn was_lent(&mut self, lent: Result<(), rdma::LendError>) {
        self.lending = false;
        if self.lent.is_none() {
            // The session ended meanwhile, and why is known.
            return;
        }
        match lent {
            Ok(()) | Err(rdma::LendError::Ended) => {}
            Err(error) => self.not_lent(&chain(&error)),
        }
        if self.is_over() {
            return;
        }
        if self.straight.is_none() {
            self.unlend();
        }
        match self.work {
            Work::Opening => self.approached(),
            Work::AwaitingRest if !self.disks_copy => self.copy(1),
            _ => {}
        }
    }

    /// Nothing is lent any more. What is registered is the next session's, if that comes soon.
    pub(super) fn end_lent(&mut self) {
        let Some(lent) = self.lent.take() else { return };
        self.registered = lent.end().map(|kept| (kept, clock::now() + self.timeout()));
    }

    /// Whose the VM is has been open for long, and nobody hears its device meanwhile.
    pub(super) fn unregister_late(&mut self, now: Instant) {
        if self.registered.take_if(|(_, until)| *until <= now).is_some() {
            tracing::info!("guest memory does not stay registered: whose the VM is is not decided");
        }
    }

    /// Where not all could be registered what is has no use. No WRITE is under way that reads it.
    pub(super) fn unlend(&mut self) {
        if let Some(lent) = self.lent.as_ref().filter(|lent| !self.lending && !lent.is_ready()) {
            lent.give_up();
        }
    }

    fn not_lent(&mut self, reason: &str) {
        if let Some(path) = &mut self.status.lock().info.rdma {
            path.registered_bytes = 0;
        }
        let line = format!("Guest memory cannot be registered with the RDMA device: {reason}");
        if self.options.rdma_pin == Some(RdmaPin::On) {
            let error = Error::Option { option: "rdma_pin", reason: line };
            return self.step(Event::GiveUp(error.chain()));
        }
        tracing::warn!("{line}; pages are copied to be sent");
        self.status.failed(&line);
    }
}
