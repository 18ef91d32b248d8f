//! Guest memory that stays registered from one session of a VM to the next: to register it again would keep a VM
//! that is alone from being protected for as long as that takes.
//!
//! Enters: what a session has registered, all of it. Leaves: the same, for the next session, if that is by the same
//! device. Always holds: only its own device reads it, and for this VM's requests only, since its keys give a peer no
//! right; a device that has failed, has no port that is up, or is about to be removed, which may wait for whoever has it
//! open, has nothing of a VM that is alone.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use ::rdma::{Context, Library, ProtectionDomain};

use super::aside::aside;
use super::lock;
use super::pieces::Pieces;
use super::registrar::Registrar;
use super::tell;
use crate::error::chain;
use crate::ram::Ram;

/// What a session leaves to the next. Dropping it asks no device: a thread of its own does.
pub(super) struct Kept {
    /// Before the pieces, which hold the same domain: its end is theirs.
    pub(super) registrar: Registrar,
    pub(super) pieces: Arc<Pieces>,
    pub(super) ram: Ram,
}

impl Kept {
    /// Whether it is all of this memory.
    pub(super) fn is_of(&self, ram: &Ram) -> bool {
        Arc::ptr_eq(self.ram.mapping(), ram.mapping())
    }

    pub(super) fn domain(&self) -> Option<&Arc<ProtectionDomain>> {
        match &self.registrar {
            Registrar::Device(domain) => Some(domain),
            #[cfg(test)]
            Registrar::Fake(_) => None,
        }
    }

    /// Whether a session may use it, as far as its device has said.
    pub(super) fn is_usable(&self) -> bool {
        self.domain().is_none_or(|domain| matches!(is_well(domain.context()), Ok(true)))
    }
}

/// Takes what a device reports while no session is there to hear it; whether it has not failed by then.
fn is_well(context: &Context) -> Result<bool, ::rdma::Error> {
    while let Some(event) = context.next_event()? {
        tell(context.name(), event);
    }
    Ok(!context.has_failed())
}

/// A VM's, for all of its sessions.
#[derive(Clone, Default)]
pub(crate) struct Registered(Arc<Mutex<Option<Kept>>>);

impl Registered {
    pub(super) fn keep(&self, kept: Kept) {
        let before = lock(&self.0).replace(kept);
        drop(before);
    }

    pub(super) fn take(&self) -> Option<Kept> {
        lock(&self.0).take()
    }

    /// Nothing stays registered.
    pub(crate) fn let_go(&self) {
        drop(self.take());
    }

    /// Lets go of what a device should not have any longer. For a VM that is alone; `patience` is for a device that
    /// hangs.
    pub(crate) fn look(&self, patience: Duration) {
        let domain = lock(&self.0).as_ref().and_then(|kept| kept.domain().map(Arc::clone));
        let Some(domain) = domain else { return };
        let name = domain.context().name().to_owned();
        let looked = aside(patience, move || {
            let context = domain.context();
            Ok::<_, ::rdma::Error>(is_well(context)? && Library::load()?.is_up(context.name())?)
        });
        let reason = match looked {
            Ok(Ok(true)) => return,
            Ok(Ok(false)) => "it failed, is down, or is being removed".to_owned(),
            Ok(Err(error)) => chain(&error),
            Err(error) => chain(&error),
        };
        tracing::info!(
            "guest memory does not stay registered with the RDMA device {name}: {reason}"
        );
        self.let_go();
    }
}
