//! The error that leaves this crate: what failed, and which kind of answer a client gets.

use thiserror::Error;

use crate::guest::GuestError;
use crate::ownership::ArbiterError;
use crate::transport::TransportError;
use crate::wire::WireError;

/// The class of an error, for the status that an API answers with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The request contradicts itself or asks for what this build lacks (400).
    Invalid,
    /// Wrong role, wrong moment, or the ownership is held by somebody else (409).
    Conflict,
    /// Everything else (500).
    Other,
}

/// Why replication could not start, go on, or do what it was asked.
#[derive(Debug, Error)]
pub enum Error {
    #[error("Option '{option}' is invalid: {reason}")]
    Option { option: &'static str, reason: String },
    #[error("{0}")]
    Conflict(String),
    #[error("The backup refused the replica: {0}")]
    Refused(String),
    /// As [`Error::Refused`], and it would be again: nothing that passes by itself is the reason.
    #[error("The backup refused the replica: {0}")]
    Unfit(String),
    /// The peer is there, and with `fallback=on` data goes to it by TCP.
    #[error("Data cannot go by RDMA")]
    NoRdma(#[source] Box<Error>),
    #[error("The peer gave up: {0}")]
    PeerAborted(String),
    #[error("The connection to the peer failed")]
    Transport(#[source] TransportError),
    #[error("The peer's stream is unusable")]
    Wire(#[source] WireError),
    #[error("The ownership record is unusable")]
    Arbiter(#[source] ArbiterError),
    #[error("The VMM could not {what}")]
    Guest { what: &'static str, source: GuestError },
    #[error("The peer was silent for {silent_ms} ms")]
    Silent { silent_ms: u64 },
    #[error("A page set covers no page of the memory: {0}")]
    Memory(String),
    #[error("Thread '{0}' could not be started")]
    Thread(&'static str, #[source] std::io::Error),
    #[error("{0}")]
    Failed(String),
}

impl Error {
    /// The class of this error.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Option { .. } => ErrorKind::Invalid,
            Self::Conflict(_) => ErrorKind::Conflict,
            _ => ErrorKind::Other,
        }
    }

    /// Whether the same call may do better later, without anybody's doing.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        match self {
            Self::NoRdma(why) => why.may_pass(),
            error => !matches!(error, Self::Option { .. } | Self::Conflict(_) | Self::Unfit(_)),
        }
    }

    /// The whole chain in one line, outermost first.
    #[must_use]
    pub fn chain(&self) -> String {
        chain(self)
    }
}

/// An error and all its causes in one line.
#[must_use]
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        line.push_str(": ");
        line.push_str(&cause.to_string());
        next = cause.source();
    }
    line
}
