//! The backup's image, opened to the WRITEs of the primary's device for the time of a copy.
//!
//! Enters: the replica's memory, while nobody could start it. Leaves: what the primary has to know to write
//! there, piece by piece. Always holds: what was opened is closed again, or known not to be, before an epoch is
//! acknowledged: that is up to the engine, which has [`Opened::close`]'s word for it.

use std::sync::atomic::AtomicBool;

use super::pieces::{Filled, LendError, Piece, Pieces, Purpose};
use super::setup::Adapter;
use crate::ram::Ram;
use crate::transport::TransportError;
use crate::wire::Grant;

/// An image that a peer may write, or as much of it as could be opened. One that is dropped is closed by a thread of
/// its own, which holds the memory until then; whoever has to know calls [`Opened::close`].
pub(crate) struct Opened(Pieces);

/// Why an image is not open, or not all of it.
pub(crate) struct NotOpened {
    pub(crate) error: LendError,
    /// What the peer was told of, and may be at.
    pub(crate) rest: Option<Opened>,
}

impl From<LendError> for Box<NotOpened> {
    fn from(error: LendError) -> Self {
        Self::new(NotOpened { error, rest: None })
    }
}

impl Opened {
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
    /// Opens all of `ram`, piece by piece, `done` bytes so far, and what the peer has to know of the next pieces;
    /// unless `ended` is raised meanwhile: the peer is done. Asks the device, so not for an engine's thread. For a
    /// session whose data connections were made.
    ///
    /// # Errors
    /// [`NotOpened`]; but for its rest nothing stays open, except with [`LendError::Kept`].
    pub(crate) fn open(
        &self,
        ram: &Ram,
        ended: &AtomicBool,
        mut done: impl FnMut(u64, Vec<Grant>) + Send,
    ) -> Result<Opened, Box<NotOpened>> {
        let registrar = self.registrar().map_err(LendError::Device)?;
        let pieces = Pieces::new(ram, &registrar);
        let registered = pieces.register(ram, &registrar, Purpose::Opened, ended, |step| {
            done(step.bytes, step.ready.iter().filter_map(Piece::grant).collect());
        });
        match pieces.opened(registered) {
            Filled::All(pieces) => Ok(Opened(pieces)),
            Filled::Short(pieces, error) => {
                Err(Box::new(NotOpened { error, rest: Some(Opened(pieces)) }))
            }
            Filled::Nothing(error) => Err(error.into()),
        }
    }
}
