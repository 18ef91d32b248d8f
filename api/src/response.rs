//! Answers of the interface, and the version that clients read from it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::VmConfig;

/// The level of Cloud Hypervisor's interface that we keep to.
///
/// Clients refuse anything older than what they were written for, and compare this number, not
/// ours, so it names the interface and not this program's own age.
pub const COMPAT_VERSION: &str = "53.0.0";

/// The version as `--version` and `vmm.ping` give it: the interface's level first, because
/// clients parse up to the first character that is no part of `v<major>.<minor>.<patch>`.
pub const BUILD_VERSION: &str = concat!("v53.0.0-understudy-", env!("CARGO_PKG_VERSION"));

/// Answer of `vmm.ping`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmPingResponse {
    #[serde(default)]
    pub build_version: String,
    pub version: String,
    #[serde(default)]
    pub pid: i64,
    #[serde(default)]
    pub features: Vec<String>,
}

impl VmmPingResponse {
    /// The answer of this build in the process `pid`.
    #[must_use]
    pub fn new(pid: u32, features: Vec<String>) -> Self {
        Self {
            build_version: BUILD_VERSION.to_owned(),
            version: COMPAT_VERSION.to_owned(),
            pid: i64::from(pid),
            features,
        }
    }
}

/// Where a VM is in its life. Clients have closed enums: no other value may ever appear.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    Created,
    Running,
    Shutdown,
    Paused,
}

/// A device and what stands below it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DeviceNode {
    pub id: String,
    pub resources: Vec<Value>,
    pub children: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pci_bdf: Option<String>,
}

/// Answer of `vm.info`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmInfo {
    pub config: VmConfig,
    pub state: VmState,
    /// Bytes of memory that the guest has now.
    #[serde(default)]
    pub memory_actual_size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_tree: Option<BTreeMap<String, DeviceNode>>,
}

/// Answer of `vm.add-disk` and its like when the VM is running.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciDeviceInfo {
    pub id: String,
    /// Segment, bus, device and function: `0000:00:05.0`.
    pub bdf: String,
}

/// Answer of `vm.counters`: device id, counter, value.
pub type VmCounters = BTreeMap<String, BTreeMap<String, u64>>;
