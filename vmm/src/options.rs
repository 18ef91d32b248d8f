//! What the command line asks of the VMM.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use api::config::{RestoreConfig, VmConfig};
use api::replication::{ReceiveReplicaData, ReplicateData};

use crate::event::EventMonitor;

/// Where the REST interface listens.
#[derive(Debug)]
pub enum ApiSocket {
    /// A socket to make.
    Path(PathBuf),
    /// A listening socket that the parent process made.
    Descriptor(OwnedFd),
}

/// Everything that the VMM is started with. Without a VM of its own it waits for `vm.create`.
#[derive(Debug, Default)]
pub struct Options {
    pub api_socket: Option<ApiSocket>,
    pub event_monitor: EventMonitor,
    /// A VM to create and boot at once.
    pub config: Option<VmConfig>,
    /// Descriptors for those cards of `config` that say how many they have, in their order.
    pub tap_fds: Vec<OwnedFd>,
    /// A VM to take from a snapshot at once.
    pub restore: Option<RestoreConfig>,
    /// Descriptors for the `net_fds` of `restore`, in their order.
    pub restore_fds: Vec<OwnedFd>,
    /// Protect the VM from its boot on.
    pub replicate: Option<ReplicateData>,
    /// Be the backup.
    pub receive_replica: Option<ReceiveReplicaData>,
    /// Outlive the guest: its shutdown does not end the process.
    pub no_shutdown: bool,
}
