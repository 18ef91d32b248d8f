//! Who may speak for a VM: the arbiter keeps one record, changed only by compare-and-swap.
//!
//! Enters: a wish to own, with the generation that the asker believes in. Leaves: won, or lost
//! together with the record that stands. Always holds: of all who ask with one generation at most
//! one wins, so at most one host per generation ever releases output. Nothing here rests on a
//! clock or a lease.

mod file;
mod record;

use std::io;
use std::path::PathBuf;

use api::endpoint::ArbiterUrl;
use thiserror::Error;

pub use file::FileArbiter;
pub use record::{HostId, HostIdentity, Record, Standing, VmId};

use crate::ids::Generation;

/// Why the arbiter gave no answer. Whether a swap took place is unknown after any of these.
#[derive(Debug, Error)]
pub enum ArbiterError {
    #[error("Arbiter '{0}' is not supported: expected file:<dir>")]
    Unsupported(String),
    #[error("Cannot read the arbiter's directory {0}")]
    List(PathBuf, #[source] io::Error),
    #[error("Cannot read the ownership record {0}")]
    Read(PathBuf, #[source] io::Error),
    #[error("The ownership record {path} is damaged: {reason}")]
    Damaged { path: PathBuf, reason: String },
    #[error("Cannot write the ownership record {0}")]
    Write(PathBuf, #[source] io::Error),
    #[error("The arbiter holds no record where generation {0} was: is its storage mounted?")]
    Vanished(Generation),
}

/// How a compare-and-swap ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The record is the caller's.
    Won,
    /// The record that stands instead, of a later generation.
    Lost(Option<Record>),
}

/// Keeps the record. Calls may block as long as the storage does: never on the data path.
pub trait Arbiter: Send {
    /// The record that stands.
    ///
    /// # Errors
    /// [`ArbiterError`].
    fn read(&self) -> Result<Option<Record>, ArbiterError>;

    /// Puts `next` in place of the record of generation `expected` (0: of none).
    /// `next.generation` must be `expected + 1`. If `next` stands already, this makes sure that it
    /// survives a crash, and is won.
    ///
    /// # Errors
    /// [`ArbiterError`]: the outcome is unknown, read again. [`ArbiterError::Vanished`] if an older
    /// record stands than `expected`, or none: generations never go back.
    fn compare_and_swap(
        &self,
        expected: Generation,
        next: &Record,
    ) -> Result<Outcome, ArbiterError>;
}

/// Opens the arbiter of an option value.
///
/// # Errors
/// [`ArbiterError::Unsupported`].
pub fn open(url: &str) -> Result<Box<dyn Arbiter>, ArbiterError> {
    match url.parse() {
        Ok(ArbiterUrl::File(dir)) => Ok(Box::new(FileArbiter::new(dir))),
        _ => Err(ArbiterError::Unsupported(url.to_owned())),
    }
}
