//! The commands, and the request that each makes.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use api::client::Method;
use api::config::{
    DiskConfig, NetConfig, ReceiveMigrationData, RemoveDevice, ResizeConfig, RestoreConfig,
    SendMigrationData, SnapshotConfig,
};
use api::flag;
use api::option::{OptionError, Pairs, parse_size};
use api::replication::{FailoverData, ReceiveReplicaData, ReplicateData};
use clap::Subcommand;
use serde::Serialize;

/// Bytes of a configuration that the server would take; a longer file is some other file.
const CONFIG_BYTES_MAX: u64 = 4 << 20;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Boot the VM that was created
    Boot,
    /// Print the counters of all devices
    Counters,
    /// Create a VM from a JSON configuration
    Create {
        /// File with the configuration, - for standard input
        #[arg(default_value = "-")]
        path: PathBuf,
    },
    /// Delete the VM
    Delete,
    /// Print the VM's configuration and state
    Info,
    /// Send a non-maskable interrupt
    Nmi,
    /// Pause the VM
    Pause,
    /// Ask whether the VMM is alive
    Ping,
    /// Press the VM's power button
    PowerButton,
    /// Reset the VM
    Reboot,
    /// Let a paused VM run on
    Resume,
    /// Switch the VM off
    Shutdown,
    /// End the VMM
    ShutdownVmm,
    /// Write a paused VM to a directory
    Snapshot {
        /// file://<directory>
        destination_url: String,
    },
    /// Take a VM from a snapshot
    Restore {
        /// source_url=file://<directory>,prefault=on|off,resume=on|off,net_fds=[<id>@[3,4]]
        #[arg(value_parser = flag::restore)]
        config: RestoreConfig,
    },
    /// Start moving the VM to another host
    SendMigration {
        /// destination_url=tcp:<host>:<port>|unix:<path>,local=on|off, or the URL alone
        #[arg(value_parser = send_migration)]
        config: SendMigrationData,
        /// Hand the memory over as a descriptor, on the same host
        #[arg(long)]
        local: bool,
    },
    /// Receive a VM from another host
    ReceiveMigration {
        /// receiver_url=tcp:<host>:<port>|unix:<path>, or the URL alone
        #[arg(value_parser = receive_migration)]
        config: ReceiveMigrationData,
    },
    /// Add a disk
    AddDisk {
        /// path=<path>,readonly=on|off,…
        #[arg(value_parser = flag::disk)]
        config: DiskConfig,
    },
    /// Add a network card
    AddNet {
        /// tap=<name>|fd=[<n>,…],mac=<address>,…
        #[arg(value_parser = flag::net)]
        config: NetConfig,
    },
    /// Remove a device
    RemoveDevice { id: String },
    /// Change the number of vCPUs or the memory
    Resize {
        #[arg(long)]
        cpus: Option<u32>,
        /// Bytes, or with K, M, G, T
        #[arg(long, value_parser = size)]
        memory: Option<u64>,
    },
    /// Protect the VM
    Replicate {
        /// destination_url=tcp:<host>:<port>|rdma:<host>:<port>|unix:<path>,
        /// arbiter=file:<directory>|"etcd:<url>,<url>/<key>",arbiter_tls_dir=<directory>,
        /// arbiter_credentials=<file>,…
        config: ReplicateData,
    },
    /// Be the backup of a VM
    ReceiveReplica {
        /// receiver_url=tcp:<host>:<port>|rdma:<host>:<port>|unix:<path>,
        /// arbiter=file:<directory>|"etcd:<url>,<url>/<key>",arbiter_tls_dir=<directory>,
        /// arbiter_credentials=<file>,…
        config: ReceiveReplicaData,
    },
    /// End the protection; the VM runs on
    StopReplication,
    /// Take over on a backup, or hand over on a primary
    Failover {
        /// On a backup without an arbiter: you vouch that the primary is gone
        #[arg(long)]
        force: bool,
    },
    /// Print how the replication does
    ReplicationInfo {
        /// Print a line again and again until interrupted
        #[arg(long)]
        watch: bool,
        /// Milliseconds between two lines, 10 to 30000
        // The VMM closes a connection that is silent for 60 s.
        #[arg(long, default_value_t = 500)]
        #[arg(value_parser = clap::value_parser!(u64).range(10..=30_000))]
        interval: u64,
    },
    /// Print this host's RDMA devices, and what rdma: would use of them
    ///
    /// For each of its addresses a line says which device, port and GID a connection from there would
    /// use. Needs no --api-socket. The exit code is 0 if there is one such address at least, and 1
    /// if rdma: cannot work here; standard error then says why.
    RdmaDevices,
}

/// A request on its way to the server.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) method: Method,
    pub(crate) name: &'static str,
    pub(crate) body: Option<String>,
    /// Descriptors of this process that go with it.
    pub(crate) fds: Vec<i32>,
}

impl Request {
    fn get(name: &'static str) -> Self {
        Self { method: Method::Get, name, body: None, fds: vec![] }
    }

    fn put(name: &'static str) -> Self {
        Self { method: Method::Put, name, body: None, fds: vec![] }
    }

    fn with(name: &'static str, body: &impl Serialize) -> anyhow::Result<Self> {
        let body = serde_json::to_string(body).context("Cannot write the request as JSON")?;
        Ok(Self { method: Method::Put, name, body: Some(body), fds: vec![] })
    }
}

impl Command {
    /// The request that the command makes.
    ///
    /// # Panics
    /// For `rdma-devices`, which makes none.
    pub(crate) fn request(self) -> anyhow::Result<Request> {
        Ok(match self {
            Self::Boot => Request::put("vm.boot"),
            Self::Counters => Request::get("vm.counters"),
            Self::Create { path } => {
                let body = Some(read_config(&path)?);
                Request { method: Method::Put, name: "vm.create", body, fds: vec![] }
            }
            Self::Delete => Request::put("vm.delete"),
            Self::Info => Request::get("vm.info"),
            Self::Nmi => Request::put("vm.nmi"),
            Self::Pause => Request::put("vm.pause"),
            Self::Ping => Request::get("vmm.ping"),
            Self::PowerButton => Request::put("vm.power-button"),
            Self::Reboot => Request::put("vm.reboot"),
            Self::Resume => Request::put("vm.resume"),
            Self::Shutdown => Request::put("vm.shutdown"),
            Self::ShutdownVmm => Request::put("vmm.shutdown"),
            Self::Snapshot { destination_url } => {
                Request::with("vm.snapshot", &SnapshotConfig { destination_url })?
            }
            Self::Restore { mut config } => {
                let cards = config.net_fds.iter_mut().flatten();
                let fds = cards.filter_map(|card| card.fds.take()).flatten().collect();
                Request { fds, ..Request::with("vm.restore", &config)? }
            }
            Self::SendMigration { config, local } => {
                let local = local || config.local;
                Request::with("vm.send-migration", &SendMigrationData { local, ..config })?
            }
            Self::ReceiveMigration { config } => Request::with("vm.receive-migration", &config)?,
            Self::AddDisk { config } => Request::with("vm.add-disk", &config)?,
            Self::AddNet { mut config } => {
                let fds = config.fds.take().unwrap_or_default();
                Request { fds, ..Request::with("vm.add-net", &config)? }
            }
            Self::RemoveDevice { id } => Request::with("vm.remove-device", &RemoveDevice { id })?,
            Self::Resize { cpus, memory } => {
                let config = ResizeConfig {
                    desired_vcpus: cpus,
                    desired_ram: memory,
                    desired_balloon: None,
                };
                Request::with("vm.resize", &config)?
            }
            Self::Replicate { config } => Request::with("vm.replicate", &config)?,
            Self::ReceiveReplica { config } => Request::with("vm.receive-replica", &config)?,
            Self::StopReplication => Request::put("vm.stop-replication"),
            Self::Failover { force } => Request::with("vm.failover", &FailoverData { force })?,
            Self::ReplicationInfo { .. } => Request::get("vm.replication-info"),
            Self::RdmaDevices => unreachable!("no VMM is asked"),
        })
    }
}

/// The text of a configuration file, or of standard input.
fn read_config(path: &Path) -> anyhow::Result<String> {
    let mut text = String::new();
    let read = |source: &mut dyn Read, text: &mut String| {
        source.take(CONFIG_BYTES_MAX + 1).read_to_string(text)
    };
    if path == Path::new("-") {
        read(&mut io::stdin().lock(), &mut text).context("Cannot read standard input")?;
    } else {
        let mut file =
            File::open(path).with_context(|| format!("Cannot open {}", path.display()))?;
        read(&mut file, &mut text).with_context(|| format!("Cannot read {}", path.display()))?;
    }
    if u64::try_from(text.len()).unwrap_or(u64::MAX) > CONFIG_BYTES_MAX {
        bail!("{} is larger than {CONFIG_BYTES_MAX} bytes", path.display());
    }
    Ok(text)
}

fn send_migration(text: &str) -> Result<SendMigrationData, OptionError> {
    if !text.contains('=') {
        return Ok(SendMigrationData {
            destination_url: text.to_owned(),
            ..SendMigrationData::default()
        });
    }
    let known = ["destination_url", "local", "downtime_ms", "timeout_s", "connections", "tls_dir"];
    let mut pairs = Pairs::parse(text, &known)?;
    Ok(SendMigrationData {
        destination_url: pairs.required("destination_url")?,
        local: pairs.toggle("local")?.unwrap_or(false),
        downtime_ms: pairs.parsed("downtime_ms", "a number of milliseconds")?,
        timeout_s: pairs.parsed("timeout_s", "a number of seconds")?,
        connections: pairs.parsed("connections", "a number")?,
        tls_dir: pairs.text("tls_dir"),
    })
}

fn receive_migration(text: &str) -> Result<ReceiveMigrationData, OptionError> {
    if !text.contains('=') {
        return Ok(ReceiveMigrationData { receiver_url: text.to_owned(), tls_dir: None });
    }
    let mut pairs = Pairs::parse(text, &["receiver_url", "tls_dir"])?;
    Ok(ReceiveMigrationData {
        receiver_url: pairs.required("receiver_url")?,
        tls_dir: pairs.text("tls_dir"),
    })
}

fn size(text: &str) -> Result<u64, OptionError> {
    let wanted = "a size as 4096, 512M or 4G";
    parse_size(text).ok_or_else(|| OptionError::BadWord { wanted, value: text.to_owned() })
}
