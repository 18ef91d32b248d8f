//! The replication surface: bodies of `vm.replicate`, `vm.receive-replica`, `vm.failover`, and
//! the answer of `vm.replication-info`.
//!
//! These settings never become a part of `VmConfig`: it travels to the backup, and a backup must
//! not replicate to itself.

mod host;
mod validate;

use serde::{Deserialize, Serialize};

pub use host::{ReplicaCard, ReplicaDisk};
pub use validate::{
    CONNECTIONS, EPOCH_MS, HEARTBEAT_MS, RDMA_DEPTH, RDMA_DEVICE_BYTES_MAX, RDMA_GID_INDEX,
    RDMA_PORT, STAGING_SIZE, TIMEOUT_MS_MAX,
};

use crate::config::ConsoleConfig;

/// Longest time between two seals unless told otherwise, in milliseconds.
pub const EPOCH_MS_DEFAULT: u64 = 25;
/// Shortest time between two seals unless told otherwise, in milliseconds.
pub const EPOCH_MIN_MS_DEFAULT: u64 = 1;
/// Time between two heartbeats unless told otherwise, in milliseconds.
pub const HEARTBEAT_MS_DEFAULT: u64 = 100;
/// Silence after which a side suspects its peer unless told otherwise, in milliseconds.
pub const TIMEOUT_MS_DEFAULT: u64 = 1000;
/// Bytes of one uncommitted epoch that a backup holds unless told otherwise.
pub const STAGING_SIZE_DEFAULT: u64 = 256 << 20;

/// Chunks under way on a data connection by RDMA unless told otherwise.
pub const RDMA_DEPTH_DEFAULT: u32 = 64;

/// How the pages of an epoch are kept as they were at the seal while the guest runs on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cow {
    /// Pages that the guest is likely to write soon, and single ones, are copied during the pause;
    /// the others are protected. Where userfaultfd is not to be had, all are copied.
    #[default]
    Hybrid,
    /// Every page is write-protected during the pause, and copied only if the guest writes it before
    /// it was sent. Needs userfaultfd.
    Protect,
    /// Every page is copied aside during the pause.
    Copy,
    /// The guest stands still until the epoch is sent.
    Off,
}

/// How page contents are encoded on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// What pays, by what the link and the encodings are seen to take.
    #[default]
    Auto,
    /// Zero pages are named, all others go as they are.
    None,
    /// Of a page that was sent before, what changed in it; others as they are.
    Delta,
    /// LZ4 blocks, one for each page; a page that hardly shrinks goes as it is.
    Lz4,
}

/// What a primary does that has won ownership but has no backup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Degrade {
    /// The guest runs on without protection.
    #[default]
    Unprotected,
    /// The guest stays paused until a person resumes it or it is protected again.
    Pause,
}

/// Where disk writes live.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskMode {
    /// Each host has an image of its own; writes travel in the epoch.
    #[default]
    Replicated,
    /// One image that both hosts see; writes are held until commit.
    Shared,
}

/// Whether serial and console output waits for the commit of its epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConsoleOutput {
    /// Held until the backup owns the state that produced it.
    #[default]
    Hold,
    /// Leaves at once: for debugging, since it may show what a take-over takes back.
    Pass,
}

/// Body of `vm.replicate` and value of `--replicate`: protect this VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReplicateData {
    /// The backup: `tcp:<host>:<port>`, `unix:<path>` or `rdma:<host>:<port>`.
    pub destination_url: String,
    /// Longest epoch in milliseconds, 1 to 10,000, where somebody may wait for what it says.
    #[serde(default = "epoch_ms_default")]
    pub epoch_ms: u64,
    /// Shortest epoch in milliseconds, at most `epoch_ms`.
    #[serde(default = "epoch_min_ms_default")]
    pub epoch_min_ms: u64,
    /// Longest epoch in milliseconds of a guest that computes, writes little and has said nothing of
    /// late: `epoch_ms` to 10,000. By default eight times `epoch_ms`, up to 250 ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch_max_ms: Option<u64>,
    #[serde(default)]
    pub cow: Cow,
    /// Data connections beside the control connection, 1 to 128.
    #[serde(default = "connections_default")]
    pub connections: u32,
    #[serde(default)]
    pub compression: Compression,
    /// Milliseconds between heartbeats, 10 to 60,000.
    #[serde(default = "heartbeat_ms_default")]
    pub heartbeat_ms: u64,
    /// Milliseconds of silence until the peer is suspected, at least twice `heartbeat_ms`.
    #[serde(default = "timeout_ms_default")]
    pub timeout_ms: u64,
    /// `file:<dir>` or `etcd:<url>[,<url>]`; without one nobody takes over by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arbiter: Option<String>,
    /// With `etcd:`, a directory on this host with `ca-cert.pem`, without which the system's roots
    /// count, and `client-cert.pem` with `client-key.pem`, where the servers ask for them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arbiter_tls_dir: Option<String>,
    /// With `etcd:`, a file on this host whose one line is `<user>:<password>`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arbiter_credentials: Option<String>,
    #[serde(default)]
    pub degrade: Degrade,
    /// Whether a primary that lost its backup calls the same one again, with the same options, until
    /// the VM is protected again or a person ends it.
    #[serde(default = "reconnect_default")]
    pub reconnect: bool,
    /// Where this host listens after a planned switch-over, to be the VM's backup from then on: an
    /// address at which the present backup reaches it, of the same kinds as `destination_url`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub return_url: Option<String>,
    /// Directory with `ca-cert.pem`, `client-cert.pem` and `client-key.pem`: all connections but RDMA's own
    /// go by TLS 1.3, and both sides show certificates of that authority. Not for `unix:`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_dir: Option<String>,
    #[serde(default)]
    pub disk_mode: DiskMode,
    #[serde(default)]
    pub console_output: ConsoleOutput,
    /// With `rdma:`, the device to use; by default the one that has the address towards the peer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rdma_device: Option<String>,
    /// With `rdma:`, the device's port, 1 to 254.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rdma_port: Option<u32>,
    /// With `rdma:`, the index of the port's GID, 0 to 255; by default that of the address towards the
    /// peer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rdma_gid_index: Option<u32>,
    /// With `rdma:`, chunks under way on each data connection, 4 to 1024; the smaller one of both
    /// sides' counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rdma_depth: Option<u32>,
    /// With `rdma:`, whether guest memory is registered with the device; by default `auto`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rdma_pin: Option<RdmaPin>,
    /// With `rdma:`, whether data goes by TCP where it cannot go by RDMA, or fails to in a session. Both sides
    /// have to allow it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub fallback: bool,
}

/// Whether a primary registers guest memory with its RDMA device, which then reads pages where they are.
/// All of the memory is locked for that: it is resident from then on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RdmaPin {
    /// Yes; where that fails, pages are copied to be sent, and a warning says why.
    #[default]
    Auto,
    /// Yes; where that fails, so does the protection.
    On,
    /// No: pages are copied to be sent.
    Off,
}

/// Body of `vm.receive-replica` and value of `--receive-replica`: be the backup.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReceiveReplicaData {
    /// Where to listen: `tcp:<host>:<port>`, `unix:<path>` or `rdma:<host>:<port>`.
    pub receiver_url: String,
    /// Most bytes of an epoch that is not yet committed, 1 MiB to 1 TiB.
    #[serde(default = "staging_size_default")]
    pub staging_size: u64,
    #[serde(default = "heartbeat_ms_default")]
    pub heartbeat_ms: u64,
    #[serde(default = "timeout_ms_default")]
    pub timeout_ms: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arbiter: Option<String>,
    /// With `etcd:`, a directory on this host with `ca-cert.pem`, without which the system's roots
    /// count, and `client-cert.pem` with `client-key.pem`, where the servers ask for them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arbiter_tls_dir: Option<String>,
    /// With `etcd:`, a file on this host whose one line is `<user>:<password>`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arbiter_credentials: Option<String>,
    /// As for a primary, with `server-cert.pem` and `server-key.pem`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_dir: Option<String>,
    /// This host's serial port for the VM, instead of the one in the primary's configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<ConsoleConfig>,
    /// This host's console for the VM, instead of the one in the primary's configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<ConsoleConfig>,
    /// This host's images of the VM's disks, where they are not at the primary's paths.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<ReplicaDisk>,
    /// This host's taps for the VM's cards, where they have not the primary's names.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub net: Vec<ReplicaCard>,
    /// With `rdma:`, the device to use; by default the one that has the address towards the peer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rdma_device: Option<String>,
    /// With `rdma:`, the device's port, 1 to 254.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rdma_port: Option<u32>,
    /// With `rdma:`, the index of the port's GID, 0 to 255; by default that of the address towards the
    /// peer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rdma_gid_index: Option<u32>,
    /// With `rdma:`, chunks under way on each data connection, 4 to 1024; the smaller one of both
    /// sides' counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rdma_depth: Option<u32>,
    /// With `rdma:`, whether a primary is served whose data comes by TCP because it cannot come by RDMA.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub fallback: bool,
}

/// Body of `vm.failover`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FailoverData {
    /// On a backup without an arbiter: a person vouches that the primary is gone.
    #[serde(default)]
    pub force: bool,
}

/// Which side of a pair this process is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    #[default]
    None,
    Primary,
    Backup,
}

/// Where the pair stands, seen from this side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReplicationState {
    /// No peer.
    #[default]
    Disconnected,
    /// The first copy is under way; the VM is not protected yet.
    Syncing,
    /// Every committed epoch is on both sides.
    Protected,
    /// The primary owns the VM alone and runs unprotected.
    Degraded,
    /// Output is held and the ownership is being decided.
    Suspended,
    /// The backup has won or is asking for the ownership.
    TakingOver,
    /// The backup took over; this VM is now an ordinary one.
    TakenOver,
    /// The peer owns the VM; this side's was destroyed.
    Lost,
    /// Ended by a person or by an error, see `last_error`.
    Stopped,
}

/// A distribution in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Percentiles {
    pub last: u64,
    pub p50: u64,
    pub p99: u64,
    pub max: u64,
}

/// A distribution of a count of pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageCounts {
    pub last: u64,
    pub p50: u64,
    pub p99: u64,
}

/// Answer of `vm.replication-info`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ReplicationInfo {
    pub role: Role,
    pub state: ReplicationState,
    pub generation: u64,
    pub epoch_sealed: u64,
    pub epoch_committed: u64,
    /// From one seal to the next if no output waits: `epoch_ms`, less where the guest writes more than
    /// staging or link bear, more up to `epoch_max_ms` where it only computes.
    #[serde(default)]
    pub epoch_interval_us: u64,
    /// How long the guest stood still for a seal.
    pub pause_us: Percentiles,
    /// Of what the pauses consist: the median of each step.
    #[serde(default)]
    pub pause_steps_us: PauseSteps,
    /// From seal to the backup's acknowledgement.
    pub commit_latency_us: Percentiles,
    pub dirty_pages: PageCounts,
    /// How often the guest, or a device, waited because it wrote a page that was protected.
    pub cow_faults: u64,
    /// Pages that were copied ahead of pauses, and not written again before them.
    #[serde(default)]
    pub cow_ahead: u64,
    /// Pages that were copied in pauses.
    #[serde(default)]
    pub cow_copied: u64,
    /// Pages that were protected in pauses.
    #[serde(default)]
    pub cow_protected: u64,
    /// How long the guest stood, in all, because the link or the backup did not keep up.
    #[serde(default)]
    pub throttled_us: u64,
    /// Bytes that went to the peer (on a backup: came from it).
    pub bytes_sent: u64,
    /// Bytes of pages and state before encoding.
    pub bytes_raw: u64,
    pub output_held_bytes: u64,
    /// Share of the first copy that is done, 0 to 1.
    pub sync_progress: f64,
    /// On a primary that lost its backup, how often that was called since: 0 once it is `Protected`
    /// again. Why the last attempt failed is in `last_error`.
    #[serde(default)]
    pub reconnect_attempts: u64,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub peer: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub transport: Option<String>,
    /// Why data goes by TCP although the URL is `rdma:`, with `fallback=on`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub fallback_reason: Option<String>,
    /// What carries the data, with `rdma:` and once the first data connection stands.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub rdma: Option<RdmaPath>,
    /// How the pages that the guest writes are found: `bitmap` or `ring`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub dirty_log: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub last_error: Option<String>,
    /// Take-over steps in microseconds since the UNIX epoch, on the side that took over.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub takeover: Option<TakeoverTimes>,
}

/// What this side's data connections by RDMA use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RdmaPath {
    pub device: String,
    pub port: u8,
    pub gid_index: u8,
    /// As an IPv6 address.
    pub gid: String,
    /// Payload of a packet in bytes: the smaller one of both ports'.
    pub mtu_bytes: u16,
    /// Chunks under way on each data connection: the smaller one of both sides' `rdma_depth`.
    pub depth: u32,
    /// Bytes of guest memory that the device can read so far; pages are read there once all of it is.
    /// 0 where they are copied to be sent. On a backup: those that the primary may write, in a copy.
    #[serde(default)]
    pub registered_bytes: u64,
    /// Bytes of pages that were read there, of all that were sent.
    #[serde(default)]
    pub from_memory_bytes: u64,
    /// Of these, bytes that went straight into the backup's memory, in a copy.
    #[serde(default)]
    pub straight_bytes: u64,
}

/// The steps of a pause in microseconds, in their order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PauseSteps {
    /// Until the last vCPU has left the guest, and the devices are parked. From there on each saves its state,
    /// beside the next two steps.
    pub stop: u64,
    /// Reading the dirty pages and re-arming their tracking.
    pub harvest: u64,
    /// Copying or protecting them.
    pub keep: u64,
    /// Reading the devices' state, waiting for what is left of the vCPUs', tagging the output.
    pub capture: u64,
    /// Until the vCPUs were told to run.
    pub release: u64,
}

/// When the steps of a take-over happened: microseconds since the UNIX epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TakeoverTimes {
    /// The primary was suspected.
    pub detected_us: u64,
    /// The arbiter (or a person) gave the ownership.
    pub owned_us: u64,
    /// The vCPUs run.
    pub resumed_us: u64,
}

fn epoch_ms_default() -> u64 {
    EPOCH_MS_DEFAULT
}
fn epoch_min_ms_default() -> u64 {
    EPOCH_MIN_MS_DEFAULT
}
fn reconnect_default() -> bool {
    true
}
fn connections_default() -> u32 {
    1
}
fn heartbeat_ms_default() -> u64 {
    HEARTBEAT_MS_DEFAULT
}
fn timeout_ms_default() -> u64 {
    TIMEOUT_MS_DEFAULT
}
fn staging_size_default() -> u64 {
    STAGING_SIZE_DEFAULT
}
