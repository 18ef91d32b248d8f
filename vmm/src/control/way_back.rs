//! How this host is the backup of a VM that it hands over.
//!
//! Enters: the primary's options, of which `return_url` says where that is. Leaves: what a reception begins
//! with, its address taken. Always holds: a pair is reversed only where this host was ready for it before
//! the last epoch was sealed.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use api::config::VmConfig;
use api::endpoint::Endpoint;
use api::replication::{ReceiveReplicaData, ReplicateData, ReplicationState, STAGING_SIZE_DEFAULT};
use replication::backup::{self, Prepared};
use replication::primary::PrimaryHandle;
use replication::{Error as ReplicationError, ErrorKind};
use serde_json::json;

use super::protection::failure;
use crate::event::EventMonitor;
use crate::ha::check_host;
use crate::request::{Failure, FailureKind};

/// How this host is the backup of a VM that it hands over.
#[derive(Clone)]
pub(super) struct Return {
    data: Box<ReceiveReplicaData>,
    prepared: Arc<Mutex<Option<Prepared>>>,
    /// Who prepares: that may take its time, and nobody else waits for it.
    turn: Arc<Mutex<()>>,
}

impl Return {
    /// `None` where nobody wants the VM back.
    pub(super) fn of(options: &ReplicateData) -> Option<Self> {
        let data = Box::new(self::options(options)?);
        Some(Self { data, prepared: Arc::default(), turn: Arc::default() })
    }

    /// Where this host listens then.
    pub(super) fn url(&self) -> &str {
        &self.data.receiver_url
    }

    /// Sees to it that this host can be the backup of a VM that is `config` here; whether it was not ready
    /// already.
    fn prepare(&self, config: &VmConfig) -> Result<bool, Failure> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        if self.lock().is_some() {
            return Ok(false);
        }
        Failure::from_complaints("The replication options are not usable", &self.data.validate())?;
        check_host(config)
            .map_err(|error| Failure::from_error(FailureKind::Internal, error.as_ref()))?;
        let prepared = self.prepare_now().map_err(|error| failure(&error))?;
        *self.lock() = Some(prepared);
        Ok(true)
    }

    /// Without what was prepared before.
    pub(super) fn prepare_now(&self) -> Result<Prepared, ReplicationError> {
        backup::prepare(*self.data.clone())
    }

    /// What was prepared; or lets go of it.
    pub(super) fn take(&self) -> Option<Prepared> {
        self.lock().take()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Prepared>> {
        self.prepared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// This host as the backup of a VM that it handed over: at the address that the other one was told,
/// with the images, taps and ports that the VM has here, see [`Overrides::of`].
fn options(data: &ReplicateData) -> Option<ReceiveReplicaData> {
    let receiver_url = data.return_url.clone()?;
    // The way back may be another one, and a receiver of `tcp:` takes no options of RDMA.
    let is_rdma = matches!(receiver_url.parse(), Ok(Endpoint::Rdma { .. }));
    Some(ReceiveReplicaData {
        receiver_url,
        staging_size: STAGING_SIZE_DEFAULT,
        heartbeat_ms: data.heartbeat_ms,
        timeout_ms: data.timeout_ms,
        arbiter: data.arbiter.clone(),
        arbiter_tls_dir: data.arbiter_tls_dir.clone(),
        arbiter_credentials: data.arbiter_credentials.clone(),
        tls_dir: data.tls_dir.clone(),
        serial: None,
        console: None,
        disks: vec![],
        net: vec![],
        rdma_device: data.rdma_device.clone().filter(|_| is_rdma),
        rdma_port: data.rdma_port.filter(|_| is_rdma),
        rdma_gid_index: data.rdma_gid_index.filter(|_| is_rdma),
        rdma_depth: data.rdma_depth.filter(|_| is_rdma),
        fallback: data.fallback && is_rdma,
    })
}

/// Hands the VM over; this host is its backup from then on, where that is wanted and can be. Whether it can
/// is found out before the last epoch is sealed: a record that names a backup which is none would say that
/// the VM is protected.
pub(super) fn hand_over(
    handle: &PrimaryHandle,
    way_back: Option<&Return>,
    config: Option<&VmConfig>,
    monitor: &EventMonitor,
) -> Result<(), ReplicationError> {
    let (Some(way_back), Some(config)) = (way_back, config) else {
        return handle.failover(false);
    };
    match way_back.prepare(config) {
        Ok(is_new) => {
            let handed = handle.failover(false);
            // Refused: the VM stays. What else went wrong may come to a reversed pair yet, and an event ends
            // this.
            let is_refused =
                handed.as_ref().is_err_and(|error| error.kind() == ErrorKind::Conflict);
            let may_come =
                handle.is_handing_over() || handle.info().state == ReplicationState::Lost;
            if is_new && is_refused && !may_come {
                drop(way_back.take());
            }
            handed
        }
        Err(failure) => {
            let (url, error) = (&way_back.data.receiver_url, failure.chain.join(": "));
            tracing::warn!(
                "the VM is unprotected where it goes, this host cannot be its backup at {url}: {error}"
            );
            monitor.emit("vm", "replica-receive-failed", Some(json!({"error": error})));
            handle.hand_over_alone()
        }
    }
}
