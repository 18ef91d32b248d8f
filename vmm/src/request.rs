//! What clients ask of the control loop, and what it answers.
//!
//! The HTTP server, signals and the guest itself all end as a [`Call`] in one channel, so the
//! machine has one owner and needs no lock.

use std::os::fd::OwnedFd;

use api::config::{
    DiskConfig, NetConfig, ReceiveMigrationData, RestoreConfig, SendMigrationData, SnapshotConfig,
    VmConfig,
};
use api::invalid::Invalid;
use api::replication::{FailoverData, ReceiveReplicaData, ReplicateData};
use crossbeam_channel::Sender;

/// An action of the REST interface.
#[derive(Debug)]
pub enum Request {
    VmmPing,
    VmmShutdown,
    VmCreate(Box<VmConfig>),
    VmDelete,
    VmBoot,
    VmPause,
    VmResume,
    VmShutdown,
    VmReboot,
    VmPowerButton,
    VmInfo,
    VmCounters,
    VmAddDisk(Box<DiskConfig>),
    VmAddNet(Box<NetConfig>),
    VmSnapshot(SnapshotConfig),
    VmRestore(RestoreConfig),
    VmSendMigration(SendMigrationData),
    VmReceiveMigration(ReceiveMigrationData),
    VmReplicate(Box<ReplicateData>),
    VmReceiveReplica(Box<ReceiveReplicaData>),
    VmStopReplication,
    VmFailover(FailoverData),
    VmReplicationInfo,
}

/// A successful answer.
#[derive(Clone, Debug)]
pub enum Reply {
    /// 204, or 200 with an empty body where clients expect that.
    Empty,
    /// 200 with this JSON text.
    Json(String),
}

/// Which status code a failure has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    BadRequest,
    NotFound,
    Conflict,
    Internal,
}

/// A failure with its chain of causes, outermost first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub kind: FailureKind,
    pub chain: Vec<String>,
}

impl Failure {
    /// A failure without a deeper cause.
    #[must_use]
    pub fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self { kind, chain: vec![message.into()] }
    }

    /// An error with all its sources.
    #[must_use]
    pub fn from_error(kind: FailureKind, error: &dyn std::error::Error) -> Self {
        let mut chain = vec![error.to_string()];
        let mut next = error.source();
        while let Some(source) = next {
            chain.push(source.to_string());
            next = source.source();
        }
        Self { kind, chain }
    }

    /// All that is wrong with a configuration, on the first complaint's kind; `Ok` if nothing is.
    pub fn from_complaints(what: &str, complaints: &[Invalid]) -> Result<(), Self> {
        if complaints.is_empty() {
            return Ok(());
        }
        let kind = if complaints.iter().all(Invalid::is_conflict) {
            FailureKind::Conflict
        } else {
            FailureKind::BadRequest
        };
        let mut chain = vec![what.to_owned()];
        chain.extend(complaints.iter().map(Invalid::line));
        Err(Self { kind, chain })
    }
}

/// A request on its way to the control loop.
#[derive(Debug)]
pub struct Call {
    pub request: Request,
    /// Descriptors that came with the request by SCM_RIGHTS.
    pub fds: Vec<OwnedFd>,
    pub reply: Sender<Result<Reply, Failure>>,
}
