//! The VM's configuration as clients write it: snake_case fields, PascalCase enums, sizes in
//! bytes, absent optionals left out.
//!
//! What enters is JSON of any client that speaks Cloud Hypervisor's interface: fields that we do
//! not know are passed over, fields that are missing have the documented defaults. What leaves
//! (`vm.info`, `config.json`) names every field that has a value, and no other.
//!
//! | module | holds |
//! |---|---|
//! | `action` | bodies of single requests: snapshot, restore, migration, resize … |
//! | `console` | serial ports and consoles |
//! | `device` | disks, network cards and the small virtio devices |
//! | `machine` | payload, vCPUs, memory, platform |
//! | `unsupported` | what this VMM cannot honour |
//! | `validate` | what is right in itself |

mod action;
mod console;
mod device;
mod machine;
#[cfg(test)]
mod tests;
mod unsupported;
pub(crate) mod validate;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use action::{
    ReceiveMigrationData, RemoveDevice, ResizeConfig, RestoreConfig, RestoredNet,
    SendMigrationData, SnapshotConfig,
};
pub use console::{ConsoleConfig, ConsoleOutputMode, DebugConsoleConfig, DebugConsoleMode};
pub use device::{
    BalloonConfig, DiskConfig, NetConfig, QueueAffinity, RateLimitGroup, RateLimiterConfig,
    RngConfig, TokenBucket, VhostMode, VsockConfig,
};
pub use validate::{MEMORY_SIZE_MAX, MEMORY_SIZE_MIN, VCPUS_MAX};

pub use machine::{
    CpuAffinity, CpuFeatures, CpuTopology, CpusConfig, HotplugMethod, MemoryConfig,
    MemoryZoneConfig, PayloadConfig, PlatformConfig,
};

/// A whole VM. It travels to a backup and into `config.json`, so nothing of it may depend on
/// the process that runs it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VmConfig {
    pub cpus: CpusConfig,
    pub memory: MemoryConfig,
    pub payload: PayloadConfig,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limit_groups: Option<Vec<RateLimitGroup>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<DiskConfig>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub net: Option<Vec<NetConfig>>,
    pub rng: RngConfig,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonConfig>,
    /// The 16550.
    pub serial: ConsoleConfig,
    /// The virtio console.
    pub console: ConsoleConfig,
    /// The port that firmware writes its messages to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub debug_console: Option<DebugConsoleConfig>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    pub watchdog: bool,
    pub pvpanic: bool,
    pub iommu: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub platform: Option<PlatformConfig>,
    pub landlock_enable: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub landlock_rules: Option<Vec<Value>>,
    // Kinds of device that we know by name only, so that asking for one can be refused by name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fs: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generic_vhost_user: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pmem: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub devices: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_devices: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vdpa: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ivshmem: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sgx_epc: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub numa: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tpm: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pci_segments: Option<Value>,
}

impl Default for VmConfig {
    fn default() -> Self {
        Self {
            cpus: CpusConfig::default(),
            memory: MemoryConfig::default(),
            payload: PayloadConfig::default(),
            rate_limit_groups: None,
            disks: None,
            net: None,
            rng: RngConfig::default(),
            balloon: None,
            serial: ConsoleConfig::new(ConsoleOutputMode::Null),
            console: ConsoleConfig::new(ConsoleOutputMode::Tty),
            debug_console: None,
            vsock: None,
            watchdog: false,
            pvpanic: false,
            iommu: false,
            platform: None,
            landlock_enable: false,
            landlock_rules: None,
            fs: None,
            generic_vhost_user: None,
            pmem: None,
            devices: None,
            user_devices: None,
            vdpa: None,
            ivshmem: None,
            sgx_epc: None,
            numa: None,
            tpm: None,
            pci_segments: None,
        }
    }
}
