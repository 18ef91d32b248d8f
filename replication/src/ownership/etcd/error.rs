//! Why etcd gave no answer: what failed, at which server, and what to do.

use std::io;
use std::path::PathBuf;

use api::endpoint::EtcdServer;
use thiserror::Error;

/// Why an operation has no outcome.
#[derive(Debug, Error)]
pub enum EtcdError {
    #[error(
        "No etcd server answered; are they up, do enough of them see each other, do certificates and \
         credentials fit? {}",
        lines(.0)
    )]
    NoAnswer(Vec<(EtcdServer, CallError)>),
    #[error("{0} did not say whether the record was written; it is read again")]
    Unknown(EtcdServer, #[source] CallError),
    #[error(
        "The etcd key {key:?} holds no record of an owner ({reason}): use a key of its own for each VM"
    )]
    Damaged { key: String, reason: String },
    #[error("The etcd key {0:?} was written meanwhile without a new generation; it is read again")]
    Rewritten(String),
    #[error("The etcd key {key:?} holds the record of another VM ({record})")]
    OtherVm { key: String, record: String },
}

/// Why one server gave no usable answer.
#[derive(Debug, Error)]
pub enum CallError {
    /// Name, connection, handshake, time limits, size of the answer.
    #[error("{0}")]
    Http(Box<ureq::Error>),
    #[error("Status {status}: {reason}")]
    Status { status: u16, reason: String },
    #[error("No answer of etcd: {0}")]
    Malformed(#[from] Malformed),
    #[error("User and password were not accepted: {0}")]
    Login(Box<CallError>),
    #[error(
        "It belongs to cluster {found:x}, and the record was in cluster {known:x}: name the servers of \
         one cluster"
    )]
    OtherCluster { known: u64, found: u64 },
    #[error(
        "It is at revision {found}, and the cluster was at {known} before: was it restored from a \
         backup, which may lack the record that counts?"
    )]
    WentBack { known: i64, found: i64 },
    #[error(transparent)]
    File(#[from] FileError),
}

/// An answer that is none of etcd's.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct Malformed(pub(super) String);

/// Why a file of `arbiter_tls_dir` or `arbiter_credentials` cannot be used.
#[derive(Debug, Error)]
pub enum FileError {
    #[error("Cannot read {}: {}", .0.display(), .1)]
    Read(PathBuf, io::Error),
    #[error("{} is longer than {max} bytes", .path.display())]
    TooLong { path: PathBuf, max: u64 },
    #[error("{} {reason}", .path.display())]
    Unusable { path: PathBuf, reason: String },
    #[error("This host has no root certificates: install ca-certificates, or give ca-cert.pem")]
    NoRoots,
}

impl From<ureq::Error> for CallError {
    fn from(error: ureq::Error) -> Self {
        Self::Http(Box::new(error))
    }
}

fn lines(failures: &[(EtcdServer, CallError)]) -> String {
    let lines: Vec<String> =
        failures.iter().map(|(server, error)| format!("{server}: {error}")).collect();
    lines.join("; ")
}
