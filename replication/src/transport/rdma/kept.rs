//! Guest memory that stays registered from one session of a VM to the next: to register it again would keep a VM
//! that is alone from being protected for as long as that takes.
//!
//! ```text
//!   keeper ── Registered ──> the session's device, when it is opened ──> its connections ──> engine
//!     ^                                                                                        |
//!     +------- once the VM is alone, unless whose it is was open for long (or for TCP) <-------+
//! ```
//!
//! Enters: what a session has registered, all of it. Leaves: the same, for the next session, if that is by the same
//! device. Always holds: it has one place, so what fails on the way ends it; only its own device reads it, and for
//! this VM's requests only, since its keys give a peer no right; nobody asks a device on an engine's or the keeper's
//! thread: the pieces have the last hold of its domain, and end on a thread of their own.

use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use ::rdma::{Context, Library, ProtectionDomain};

use super::aside::aside;
use super::lock;
use super::pieces::Pieces;
use super::tell;
use crate::error::chain;
use crate::ram::Ram;

/// What a session leaves to the next.
#[derive(Clone)]
pub(crate) struct Kept {
    pub(super) pieces: Arc<Pieces>,
    pub(super) ram: Ram,
}

impl Kept {
    /// Whether it is all of this memory.
    pub(super) fn is_of(&self, ram: &Ram) -> bool {
        Arc::ptr_eq(self.ram.mapping(), ram.mapping())
    }

    /// Where it is registered.
    pub(super) fn domain(&self) -> Option<Arc<ProtectionDomain>> {
        self.pieces.domain().map(Arc::clone)
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

/// Where it is between two sessions. A VM's keeper has the only one.
#[derive(Default)]
pub(crate) struct Registered(Arc<Mutex<Option<Kept>>>);

/// Whoever opens a device looks there, unless the VM is not kept protected any more.
#[derive(Clone, Default)]
pub(crate) struct Finds(Weak<Mutex<Option<Kept>>>);

impl Finds {
    pub(super) fn take(&self) -> Option<Kept> {
        lock(&*self.0.upgrade()?).take()
    }
}

impl Registered {
    pub(crate) fn finds(&self) -> Finds {
        Finds(Arc::downgrade(&self.0))
    }

    /// What is there ends, and this takes its place.
    pub(crate) fn put(&self, kept: Option<Kept>) {
        let before = std::mem::replace(&mut *lock(&self.0), kept);
        drop(before);
    }

    /// Lets go of what a device should not have any longer: one that has failed, that has no port that is up, or that is
    /// about to be removed, which may wait for whoever has it open. `patience` is for one that hangs. `false` if
    /// that was so.
    pub(crate) fn look(&self, patience: Duration) -> bool {
        let domain = lock(&self.0).as_ref().and_then(Kept::domain);
        let Some(domain) = domain else { return true };
        let name = domain.context().name().to_owned();
        let looked = aside(patience, move || {
            let context = domain.context();
            Ok::<_, ::rdma::Error>(is_well(context)? && Library::load()?.is_up(context.name())?)
        });
        let reason = match looked {
            Ok(Ok(true)) => return true,
            Ok(Ok(false)) => "it failed, is down, or is being removed".to_owned(),
            Ok(Err(error)) => chain(&error),
            Err(error) => chain(&error),
        };
        tracing::info!(
            "guest memory does not stay registered with the RDMA device {name}: {reason}"
        );
        self.put(None);
        false
    }
}
