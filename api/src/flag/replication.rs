//! `--replicate` and `--receive-replica`, both ways: the keys are those of the JSON bodies.

use std::str::FromStr;

use super::device::word;
use crate::config::{ConsoleConfig, ConsoleOutputMode};
use crate::option::{OptionError, PairWriter, Pairs, bad};
use crate::replication::{
    Compression, ConsoleOutput, Cow, Degrade, DiskMode, EPOCH_MIN_MS_DEFAULT, EPOCH_MS_DEFAULT,
    HEARTBEAT_MS_DEFAULT, RdmaPin, ReceiveReplicaData, ReplicaCard, ReplicaDisk, ReplicateData,
    STAGING_SIZE_DEFAULT, TIMEOUT_MS_DEFAULT,
};

const COW: [(&str, Cow); 4] =
    [("hybrid", Cow::Hybrid), ("protect", Cow::Protect), ("copy", Cow::Copy), ("off", Cow::Off)];
const COMPRESSION: [(&str, Compression); 4] = [
    ("auto", Compression::Auto),
    ("none", Compression::None),
    ("delta", Compression::Delta),
    ("lz4", Compression::Lz4),
];
const DEGRADE: [(&str, Degrade); 2] =
    [("unprotected", Degrade::Unprotected), ("pause", Degrade::Pause)];
const DISK_MODE: [(&str, DiskMode); 2] =
    [("replicated", DiskMode::Replicated), ("shared", DiskMode::Shared)];
const CONSOLE_OUTPUT: [(&str, ConsoleOutput); 2] =
    [("hold", ConsoleOutput::Hold), ("pass", ConsoleOutput::Pass)];
const RDMA_PIN: [(&str, RdmaPin); 3] =
    [("auto", RdmaPin::Auto), ("on", RdmaPin::On), ("off", RdmaPin::Off)];
const NUMBER: &str = "a number";
const MILLISECONDS: &str = "a number of milliseconds";

impl FromStr for ReplicateData {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let known = [
            "destination_url",
            "epoch_ms",
            "epoch_min_ms",
            "epoch_max_ms",
            "cow",
            "connections",
            "compression",
            "heartbeat_ms",
            "timeout_ms",
            "arbiter",
            "arbiter_tls_dir",
            "arbiter_credentials",
            "degrade",
            "reconnect",
            "return_url",
            "tls_dir",
            "disk_mode",
            "console_output",
            "rdma_device",
            "rdma_port",
            "rdma_gid_index",
            "rdma_depth",
            "rdma_pin",
            "fallback",
        ];
        let mut pairs = Pairs::parse(text, &known)?;
        let epoch_ms = pairs.parsed("epoch_ms", MILLISECONDS)?.unwrap_or(EPOCH_MS_DEFAULT);
        let epoch_min_ms =
            pairs.parsed("epoch_min_ms", MILLISECONDS)?.unwrap_or(EPOCH_MIN_MS_DEFAULT);
        let heartbeat_ms =
            pairs.parsed("heartbeat_ms", MILLISECONDS)?.unwrap_or(HEARTBEAT_MS_DEFAULT);
        Ok(Self {
            destination_url: pairs.required("destination_url")?,
            epoch_ms,
            epoch_min_ms,
            epoch_max_ms: pairs.parsed("epoch_max_ms", MILLISECONDS)?,
            cow: pairs.word("cow", &COW)?.unwrap_or_default(),
            connections: pairs.parsed("connections", NUMBER)?.unwrap_or(1),
            compression: pairs.word("compression", &COMPRESSION)?.unwrap_or_default(),
            heartbeat_ms,
            timeout_ms: pairs.parsed("timeout_ms", MILLISECONDS)?.unwrap_or(TIMEOUT_MS_DEFAULT),
            arbiter: pairs.text("arbiter"),
            arbiter_tls_dir: pairs.text("arbiter_tls_dir"),
            arbiter_credentials: pairs.text("arbiter_credentials"),
            degrade: pairs.word("degrade", &DEGRADE)?.unwrap_or_default(),
            reconnect: pairs.toggle("reconnect")?.unwrap_or(true),
            return_url: pairs.text("return_url"),
            tls_dir: pairs.text("tls_dir"),
            disk_mode: pairs.word("disk_mode", &DISK_MODE)?.unwrap_or_default(),
            console_output: pairs.word("console_output", &CONSOLE_OUTPUT)?.unwrap_or_default(),
            rdma_device: pairs.text("rdma_device"),
            rdma_port: pairs.parsed("rdma_port", NUMBER)?,
            rdma_gid_index: pairs.parsed("rdma_gid_index", NUMBER)?,
            rdma_depth: pairs.parsed("rdma_depth", NUMBER)?,
            rdma_pin: pairs.word("rdma_pin", &RDMA_PIN)?,
            fallback: pairs.toggle("fallback")?.unwrap_or(false),
        })
    }
}

impl ReplicateData {
    /// The value of `--replicate` that means these settings.
    #[must_use]
    pub fn to_option(&self) -> String {
        PairWriter::default()
            .pair("destination_url", &self.destination_url)
            .pair("epoch_ms", &self.epoch_ms.to_string())
            .pair("epoch_min_ms", &self.epoch_min_ms.to_string())
            .optional("epoch_max_ms", self.epoch_max_ms.map(|ms| ms.to_string()).as_deref())
            .pair("cow", name(&COW, self.cow))
            .pair("connections", &self.connections.to_string())
            .pair("compression", name(&COMPRESSION, self.compression))
            .pair("heartbeat_ms", &self.heartbeat_ms.to_string())
            .pair("timeout_ms", &self.timeout_ms.to_string())
            .optional("arbiter", self.arbiter.as_deref())
            .optional("arbiter_tls_dir", self.arbiter_tls_dir.as_deref())
            .optional("arbiter_credentials", self.arbiter_credentials.as_deref())
            .pair("degrade", name(&DEGRADE, self.degrade))
            .pair("reconnect", if self.reconnect { "on" } else { "off" })
            .optional("return_url", self.return_url.as_deref())
            .optional("tls_dir", self.tls_dir.as_deref())
            .pair("disk_mode", name(&DISK_MODE, self.disk_mode))
            .pair("console_output", name(&CONSOLE_OUTPUT, self.console_output))
            .optional("rdma_device", self.rdma_device.as_deref())
            .optional("rdma_port", number(self.rdma_port).as_deref())
            .optional("rdma_gid_index", number(self.rdma_gid_index).as_deref())
            .optional("rdma_depth", number(self.rdma_depth).as_deref())
            .optional("rdma_pin", self.rdma_pin.map(|pin| name(&RDMA_PIN, pin)))
            .optional("fallback", self.fallback.then_some("on"))
            .finish()
    }
}

impl FromStr for ReceiveReplicaData {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let known = [
            "receiver_url",
            "staging_size",
            "heartbeat_ms",
            "timeout_ms",
            "arbiter",
            "arbiter_tls_dir",
            "arbiter_credentials",
            "tls_dir",
            "serial",
            "console",
            "disks",
            "net",
            "rdma_device",
            "rdma_port",
            "rdma_gid_index",
            "rdma_depth",
            "fallback",
        ];
        let mut pairs = Pairs::parse(text, &known)?;
        let heartbeat_ms =
            pairs.parsed("heartbeat_ms", MILLISECONDS)?.unwrap_or(HEARTBEAT_MS_DEFAULT);
        Ok(Self {
            receiver_url: pairs.required("receiver_url")?,
            staging_size: pairs.size("staging_size")?.unwrap_or(STAGING_SIZE_DEFAULT),
            heartbeat_ms,
            timeout_ms: pairs.parsed("timeout_ms", MILLISECONDS)?.unwrap_or(TIMEOUT_MS_DEFAULT),
            arbiter: pairs.text("arbiter"),
            arbiter_tls_dir: pairs.text("arbiter_tls_dir"),
            arbiter_credentials: pairs.text("arbiter_credentials"),
            tls_dir: pairs.text("tls_dir"),
            serial: pairs.with("serial", CONSOLE, console)?,
            console: pairs.with("console", CONSOLE, console)?,
            disks: entries(&mut pairs, "disks", "items as <id>@<path>", ReplicaDisk::from_text)?,
            net: entries(&mut pairs, "net", "items as <id>@<tap>", ReplicaCard::from_text)?,
            rdma_device: pairs.text("rdma_device"),
            rdma_port: pairs.parsed("rdma_port", NUMBER)?,
            rdma_gid_index: pairs.parsed("rdma_gid_index", NUMBER)?,
            rdma_depth: pairs.parsed("rdma_depth", NUMBER)?,
            fallback: pairs.toggle("fallback")?.unwrap_or(false),
        })
    }
}

impl ReceiveReplicaData {
    /// The value of `--receive-replica` that means these settings.
    #[must_use]
    pub fn to_option(&self) -> String {
        PairWriter::default()
            .pair("receiver_url", &self.receiver_url)
            .pair("staging_size", &self.staging_size.to_string())
            .pair("heartbeat_ms", &self.heartbeat_ms.to_string())
            .pair("timeout_ms", &self.timeout_ms.to_string())
            .optional("arbiter", self.arbiter.as_deref())
            .optional("arbiter_tls_dir", self.arbiter_tls_dir.as_deref())
            .optional("arbiter_credentials", self.arbiter_credentials.as_deref())
            .optional("tls_dir", self.tls_dir.as_deref())
            .optional("serial", self.serial.as_ref().map(console_text).as_deref())
            .optional("console", self.console.as_ref().map(console_text).as_deref())
            .list("disks", self.disks.iter().map(ReplicaDisk::to_text))
            .list("net", self.net.iter().map(ReplicaCard::to_text))
            .optional("rdma_device", self.rdma_device.as_deref())
            .optional("rdma_port", number(self.rdma_port).as_deref())
            .optional("rdma_gid_index", number(self.rdma_gid_index).as_deref())
            .optional("rdma_depth", number(self.rdma_depth).as_deref())
            .optional("fallback", self.fallback.then_some("on"))
            .finish()
    }
}

fn number(value: Option<u32>) -> Option<String> {
    value.map(|value| value.to_string())
}

fn entries<T>(
    pairs: &mut Pairs,
    key: &str,
    wanted: &str,
    read: impl Fn(&str) -> Option<T>,
) -> Result<Vec<T>, OptionError> {
    let items = pairs.list(key)?.unwrap_or_default();
    items.iter().map(|item| read(item).ok_or_else(|| bad(key, wanted, item))).collect()
}

const CONSOLE: &str = "off|null|pty|tty|file:<path>|socket:<path>";

/// A console within an option, where `=` already separates key and value.
fn console(text: &str) -> Option<ConsoleConfig> {
    match text.split_once(':') {
        Some(("file", path)) if !path.is_empty() => Some(ConsoleConfig::to_file(path)),
        Some(("socket", path)) if !path.is_empty() => Some(ConsoleConfig::on_socket(path)),
        Some(_) => None,
        None => word(text),
    }
}

fn console_text(config: &ConsoleConfig) -> String {
    let path = |path: &Option<std::path::PathBuf>| {
        path.as_ref().map(|path| path.display().to_string()).unwrap_or_default()
    };
    match config.mode {
        ConsoleOutputMode::Off => "off".to_owned(),
        ConsoleOutputMode::Null => "null".to_owned(),
        ConsoleOutputMode::Pty => "pty".to_owned(),
        ConsoleOutputMode::Tty => "tty".to_owned(),
        ConsoleOutputMode::File => format!("file:{}", path(&config.file)),
        ConsoleOutputMode::Socket => format!("socket:{}", path(&config.socket)),
    }
}

/// The word of a value: every value has one.
fn name<T: PartialEq>(words: &[(&'static str, T)], value: T) -> &'static str {
    words.iter().find(|(_, known)| *known == value).map_or("", |(word, _)| word)
}
