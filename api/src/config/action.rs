//! Bodies of single requests.

use serde::{Deserialize, Serialize};

/// Body of `vm.snapshot`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotConfig {
    /// The directory to write, as `file://<path>`.
    pub destination_url: String,
}

/// A network card of a snapshot and how many descriptors it is given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoredNet {
    pub id: String,
    #[serde(default)]
    pub num_fds: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fds: Option<Vec<i32>>,
}

/// Body of `vm.restore` and value of `--restore`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreConfig {
    /// The directory to read, as `file://<path>`.
    pub source_url: String,
    #[serde(default)]
    pub prefault: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net_fds: Option<Vec<RestoredNet>>,
    /// Run the VM at once; otherwise it stays paused until `vm.resume`.
    #[serde(default)]
    pub resume: bool,
}

/// Body of `vm.send-migration`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SendMigrationData {
    /// `unix:<path>` or `tcp:<host>:<port>`.
    pub destination_url: String,
    /// Hand the memory over as a descriptor, on the same host.
    #[serde(default)]
    pub local: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_s: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_dir: Option<String>,
}

/// Body of `vm.receive-migration`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiveMigrationData {
    /// `unix:<path>` or `tcp:<host>:<port>`.
    pub receiver_url: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_dir: Option<String>,
}

/// Body of `vm.remove-device`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoveDevice {
    pub id: String,
}

/// Body of `vm.resize`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ResizeConfig {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub desired_vcpus: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub desired_ram: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub desired_balloon: Option<u64>,
}
