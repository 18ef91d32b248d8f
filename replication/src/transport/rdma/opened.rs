//! The backup's image, opened to the WRITEs of the primary's device for the time of a copy.
//!
//! Enters: the replica's memory, while nobody could start it. Leaves: what the primary has to know to write
//! there. Always holds: what was opened is closed again, or known not to be, before an epoch is acknowledged:
//! that is up to the engine, which has [`Opened::close`]'s word for it.

use std::sync::atomic::AtomicBool;

use super::pieces::{LendError, Pieces, Purpose};
use super::setup::Adapter;
use crate::ram::Ram;
use crate::transport::TransportError;
use crate::wire::Grant;

/// A whole image that a peer may write. One that is dropped is closed by a thread of its own, which holds
/// the memory until then; whoever has to know calls [`Opened::close`].
pub(crate) struct Opened(Pieces);

impl Opened {
    /// What a peer has to know to write it.
    pub(crate) fn grants(&self) -> Vec<Grant> {
        self.0.grants()
    }

    /// Closes it: when this returns well, no key of it is good for anything and the device is done with the
    /// memory. Asks the device, so not for an engine's thread. `done` is told how many bytes each piece had.
    ///
    /// # Errors
    /// The device keeps some of it: such an image must never run.
    pub(crate) fn close(self, done: impl FnMut(u64)) -> Result<(), TransportError> {
        self.0.end(done)
    }
}

impl Adapter {
    /// Opens all of `ram`, piece by piece, `done` bytes so far, unless `ended` is raised meanwhile. Asks the
    /// device, so not for an engine's thread. For a session whose data connections were made.
    ///
    /// # Errors
    /// [`LendError`]; then nothing of it stays open, but with [`LendError::Kept`].
    pub(crate) fn open(
        &self,
        ram: &Ram,
        ended: &AtomicBool,
        done: impl FnMut(u64),
    ) -> Result<Opened, LendError> {
        let domain = self.domain()?;
        Pieces::register(ram, &domain, Purpose::Opened, ended, done).map(Opened)
    }
}
