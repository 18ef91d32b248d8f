//! Who may speak for a VM: the arbiter keeps one record, changed only by compare-and-swap.
//!
//! Enters: a wish to own, with the generation that the asker believes in. Leaves: won, or lost
//! together with the record that stands. Always holds: of all who ask with one generation at most
//! one wins, so at most one host per generation ever releases output. Nothing here rests on a
//! clock or a lease.

pub mod etcd;
mod file;
mod folder;
mod known;
mod record;

use std::io;
use std::path::{Path, PathBuf};

use api::endpoint::ArbiterUrl;
use thiserror::Error;

pub use etcd::{EtcdArbiter, EtcdError};
pub use file::FileArbiter;
pub use folder::{Directory, Folder, Place};
pub use known::{Known, Seen};
pub use record::{HostId, HostIdentity, Record, Standing, VmId};

use crate::error::chain;
use crate::ids::Generation;
use crate::protocol::ownership::{Action, Event};

/// Why the arbiter gave no answer. Whether a swap took place is unknown after any of these.
#[derive(Debug, Error)]
pub enum ArbiterError {
    #[error("Option '{option}' is invalid: {reason}")]
    Option { option: &'static str, reason: String },
    #[error("Cannot read the arbiter's directory {0}")]
    List(PathBuf, #[source] io::Error),
    #[error("Cannot read the ownership record {0}")]
    Read(PathBuf, #[source] io::Error),
    #[error("The ownership record {path} is damaged: {reason}")]
    Damaged { path: PathBuf, reason: String },
    #[error("Cannot write the ownership record {0}")]
    Write(PathBuf, #[source] io::Error),
    #[error(
        "The arbiter holds no record where generation {0} was: is its storage mounted, its cluster the same?"
    )]
    Vanished(Generation),
    #[error(
        "The arbiter holds the record of another VM ({0}): is the right storage mounted? Each VM has a directory, \
         or a key, of its own"
    )]
    OtherVm(Record),
    #[error(transparent)]
    Etcd(#[from] EtcdError),
}

/// How a compare-and-swap ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The record is the caller's.
    Won,
    /// The record that stands instead, of a later generation.
    Lost(Option<Record>),
}

/// Keeps the record. Calls may block as long as the storage does: never on the data path.
pub trait Arbiter: Send {
    /// A session begins, in which nothing was heard yet: which cluster the servers are of, and what its time is, is
    /// learnt anew. What must outlive a session is the generation (see [`Known`]).
    fn begin_anew(&self) {}

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

/// Makes a call that a claim asks for, or that a look at the record is. What a claim does by itself (waits,
/// verdicts) is no call: it has no answer.
///
/// # Errors
/// [`ArbiterError`]: whether a swap took place is unknown.
pub fn carry_out(arbiter: &dyn Arbiter, action: &Action) -> Result<Event, ArbiterError> {
    match action {
        Action::Read { expected } => {
            let record = arbiter.read()?;
            let found = record.map_or(Generation(0), |record| record.generation);
            // Records are never deleted: nothing is mounted there, or this is an old view.
            if found < *expected {
                return Err(ArbiterError::Vanished(*expected));
            }
            Ok(Event::Read(record))
        }
        Action::Swap { expected, next } => {
            arbiter.compare_and_swap(*expected, next).map(Event::Swapped)
        }
        Action::Wait { .. } | Action::Decide(_) => Ok(Event::Failed),
    }
}

/// Opens the arbiter of an option value; `tls_dir` and `credentials` are for `etcd:` only. No
/// storage and no server is asked.
///
/// # Errors
/// [`ArbiterError::Option`].
pub fn open(
    url: &str,
    tls_dir: Option<&Path>,
    credentials: Option<&Path>,
) -> Result<Box<dyn Arbiter>, ArbiterError> {
    let invalid = |option, reason| Err(ArbiterError::Option { option, reason });
    let url = match url.parse() {
        Ok(url) => url,
        Err(error) => return invalid("arbiter", chain(&error)),
    };
    match url {
        ArbiterUrl::File(dir) => {
            for (option, path) in
                [("arbiter_tls_dir", tls_dir), ("arbiter_credentials", credentials)]
            {
                if path.is_some() {
                    return invalid(option, "it is for etcd:<url> only".to_owned());
                }
            }
            Ok(Box::new(FileArbiter::new(dir)))
        }
        ArbiterUrl::Etcd(cluster) => {
            let [tls_dir, credentials] =
                [tls_dir, credentials].map(|path| path.map(Path::to_owned));
            let access = etcd::Access { tls_dir, credentials };
            match EtcdArbiter::new(cluster, access) {
                Ok(arbiter) => Ok(Box::new(arbiter)),
                Err((option, error)) => invalid(option, error.to_string()),
            }
        }
    }
}
