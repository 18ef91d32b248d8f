//! The flags, and what they mean.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use anyhow::{Context, anyhow, ensure};
use api::config::{
    ConsoleConfig, CpusConfig, DiskConfig, MemoryConfig, NetConfig, PayloadConfig, PlatformConfig,
    RestoreConfig, RngConfig, VmConfig,
};
use api::flag::{self, Place};
use api::invalid::Invalid;
use api::replication::{ReceiveReplicaData, ReplicaCard, ReplicaDisk, ReplicateData};
use api::response::BUILD_VERSION;
use clap::error::ErrorKind;
use clap::{ArgAction, ArgGroup, CommandFactory, Parser, ValueEnum};
use vmm::event::EventMonitor;
use vmm::http;
use vmm::options::{ApiSocket, Options};

/// What `--seccomp` may say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Seccomp {
    True,
    False,
    Log,
}

/// A VMM whose VMs survive the loss of their host.
///
/// Values are written key=value,key=value. Toggles are on or off, sizes are bytes with an
/// optional K, M, G or T, lists are [a,b], quotes protect commas.
#[derive(Debug, Parser)]
#[command(name = "cloud-hypervisor", version = BUILD_VERSION)]
#[command(group = ArgGroup::new("payload").args(["kernel", "firmware"]).multiple(true))]
#[command(group = ArgGroup::new("vm").args(["kernel", "firmware", "restore"]).multiple(true))]
#[command(group = ArgGroup::new("machine").multiple(true)
    .args(["kernel", "firmware", "receive_replica"]))]
pub(crate) struct Cli {
    /// Where to offer the REST interface: path=<path>, fd=<n> or a bare path
    #[arg(long, value_name = "SOCKET", value_parser = flag::api_socket)]
    api_socket: Option<Place>,

    /// Kernel to boot: a PVH ELF or a bzImage
    #[arg(long, value_name = "PATH")]
    kernel: Option<PathBuf>,

    /// Firmware to boot in place of a kernel
    #[arg(long, value_name = "PATH")]
    firmware: Option<PathBuf>,

    /// Initial RAM disk of the kernel
    #[arg(long, value_name = "PATH", requires = "kernel")]
    initramfs: Option<PathBuf>,

    /// Command line of the kernel
    #[arg(long, value_name = "TEXT", requires = "kernel", allow_hyphen_values = true)]
    cmdline: Option<String>,

    /// vCPUs: boot=<n>,max=<n>,topology=<threads>:<cores>:<dies>:<packages>,
    /// affinity=[<vcpu>@[<cpus>]],max_phys_bits=<n>
    #[arg(long, value_name = "CPUS", requires = "payload", value_parser = flag::cpus)]
    cpus: Option<CpusConfig>,

    /// Memory: size=<size>,shared=,hugepages=,hugepage_size=<size>,prefault=,thp=,mergeable=
    #[arg(long, value_name = "MEMORY", requires = "payload", value_parser = flag::memory)]
    memory: Option<MemoryConfig>,

    /// Disk: path=<path>,readonly=,direct=,id=<id>,…; may be repeated; on a backup path and id only
    #[arg(long, value_name = "DISK", requires = "machine", num_args = 1..)]
    #[arg(value_parser = flag::disk)]
    disk: Vec<DiskConfig>,

    /// Network card: tap=<name>,ip=,mask=,mac=,fd=[<n>],num_queues=,queue_size=,id=,…; may be
    /// repeated; on a backup tap and id only
    #[arg(long, value_name = "NET", requires = "machine", num_args = 1.., value_parser = flag::net)]
    net: Vec<NetConfig>,

    /// Entropy: src=<path>
    #[arg(long, value_name = "RNG", requires = "payload", value_parser = flag::rng)]
    rng: Option<RngConfig>,

    /// Serial port: off|null|pty|tty|file=<path>|socket=<path> [default: null]; on a backup,
    /// instead of the primary's
    #[arg(long, value_name = "MODE", requires = "machine", value_parser = flag::console)]
    serial: Option<ConsoleConfig>,

    /// Console: off|null|pty|tty|file=<path>|socket=<path> [default: tty]; on a backup, instead
    /// of the primary's
    #[arg(long, value_name = "MODE", requires = "machine", value_parser = flag::console)]
    console: Option<ConsoleConfig>,

    /// Platform: uuid=<uuid>,serial_number=<text>,oem_strings=[<text>],…
    #[arg(long, value_name = "PLATFORM", requires = "payload", value_parser = flag::platform)]
    platform: Option<PlatformConfig>,

    /// Take a VM from a snapshot: source_url=file://<directory>,prefault=,resume=
    #[arg(long, value_name = "RESTORE", value_parser = flag::restore)]
    #[arg(conflicts_with = "payload")]
    restore: Option<RestoreConfig>,

    /// Protect the VM: destination_url=tcp:<host>:<port>|rdma:<host>:<port>|unix:<path>,
    /// arbiter=file:<directory>|"etcd:<url>,<url>/<key>",arbiter_tls_dir=<directory>,
    /// arbiter_credentials=<file>,epoch_ms=<n>,heartbeat_ms=<n>,timeout_ms=<n>,
    /// degrade=unprotected|pause,reconnect=on|off,return_url=<as destination_url>,
    /// rdma_device=<name>,rdma_port=<n>,rdma_gid_index=<n>,rdma_depth=<n>,
    /// rdma_pin=auto|on|off,fallback=on|off,…
    #[arg(long, value_name = "REPLICATE", requires = "vm")]
    replicate: Option<ReplicateData>,

    /// Be the backup of a VM: receiver_url=tcp:<host>:<port>|rdma:<host>:<port>|unix:<path>,
    /// arbiter=file:<directory>|"etcd:<url>,<url>/<key>",arbiter_tls_dir=<directory>,
    /// arbiter_credentials=<file>,staging_size=<size>,serial=<mode>,console=<mode>,
    /// disks=[<id>@<path>,…],net=[<id>@<tap>,…],
    /// rdma_device=<name>,rdma_port=<n>,rdma_gid_index=<n>,rdma_depth=<n>,fallback=on|off,…
    #[arg(long, value_name = "REPLICA", conflicts_with_all = ["vm", "replicate"])]
    receive_replica: Option<ReceiveReplicaData>,

    /// Where to report events: path=<path> or fd=<n>
    #[arg(long, value_name = "MONITOR", value_parser = flag::event_monitor)]
    event_monitor: Option<Place>,

    /// Log file; standard error otherwise
    #[arg(long, value_name = "PATH")]
    pub(crate) log_file: Option<PathBuf>,

    /// More detail in the log: -v informs, -vv debugs, -vvv traces
    #[arg(short = 'v', action = ArgAction::Count)]
    pub(crate) verbosity: u8,

    /// System call filters; this version has none to install
    #[arg(long, value_name = "MODE")]
    seccomp: Option<Seccomp>,

    /// Outlive the guest's shutdown
    #[arg(long)]
    no_shutdown: bool,
}

impl Cli {
    /// What clap's own rules cannot say.
    pub(crate) fn check(&self) -> Result<(), clap::Error> {
        let vm = self.kernel.is_some() || self.firmware.is_some() || self.restore.is_some();
        if !vm && self.receive_replica.is_none() && self.api_socket.is_none() {
            let message = "nothing to do: give --kernel, --firmware, --restore, \
                           --receive-replica or --api-socket";
            return Err(Self::command().error(ErrorKind::MissingRequiredArgument, message));
        }
        Ok(())
    }

    /// The VMM's options, validated, with what they name on this host opened.
    pub(crate) fn options(self) -> anyhow::Result<Options> {
        if matches!(self.seccomp, Some(Seccomp::True | Seccomp::Log)) {
            tracing::warn!("--seccomp has no effect: this version has no filters");
        }
        let mut config = self.vm_config();
        let mut restore = self.restore.clone();
        let tap_fds = inherit_taps(config.as_mut())?;
        let restore_fds = inherit_restored(restore.as_mut())?;
        if let Some(config) = &config {
            let mut found = config.validate_boot();
            found.extend(config.unsupported());
            refuse("The VM's configuration", &found)?;
        }
        if let Some(data) = &self.replicate {
            refuse("--replicate", &data.validate())?;
        }
        let receive_replica = self.received()?;
        if let Some(data) = &receive_replica {
            refuse("--receive-replica", &data.validate())?;
        }
        let api_socket = self
            .api_socket
            .map(|place| match place {
                Place::Path(path) => Ok(ApiSocket::Path(path)),
                Place::Descriptor(fd) => http::inherit(fd)
                    .map(ApiSocket::Descriptor)
                    .with_context(|| format!("Descriptor {fd} of --api-socket is not open")),
            })
            .transpose()?;
        let event_monitor = match self.event_monitor {
            None => EventMonitor::disabled(),
            Some(Place::Path(path)) => EventMonitor::to_path(&path)?,
            Some(Place::Descriptor(fd)) => {
                let descriptor = http::inherit(fd)
                    .with_context(|| format!("Descriptor {fd} of --event-monitor is not open"))?;
                EventMonitor::to_descriptor(descriptor)?
            }
        };
        Ok(Options {
            api_socket,
            event_monitor,
            config,
            tap_fds,
            restore,
            restore_fds,
            replicate: self.replicate,
            receive_replica,
            no_shutdown: self.no_shutdown,
        })
    }

    /// What a backup is told, with this host's own ports from either place.
    fn received(&self) -> anyhow::Result<Option<ReceiveReplicaData>> {
        let Some(mut data) = self.receive_replica.clone() else { return Ok(None) };
        data.serial = once("serial", data.serial, self.serial.as_ref())
            .context("--serial contradicts serial= of --receive-replica")?;
        data.console = once("console", data.console, self.console.as_ref())
            .context("--console contradicts console= of --receive-replica")?;
        for disk in &self.disk {
            data.disks.push(ReplicaDisk::of(disk).map_err(|what| anyhow!("--disk: {what}"))?);
        }
        for card in &self.net {
            data.net.push(ReplicaCard::of(card).map_err(|what| anyhow!("--net: {what}"))?);
        }
        Ok(Some(data))
    }

    /// The VM that the flags describe, if they describe one.
    fn vm_config(&self) -> Option<VmConfig> {
        if self.kernel.is_none() && self.firmware.is_none() {
            return None;
        }
        let default = VmConfig::default();
        Some(VmConfig {
            payload: PayloadConfig {
                kernel: self.kernel.clone(),
                firmware: self.firmware.clone(),
                initramfs: self.initramfs.clone(),
                cmdline: self.cmdline.clone(),
                ..PayloadConfig::default()
            },
            cpus: self.cpus.clone().unwrap_or_default(),
            memory: self.memory.clone().unwrap_or_default(),
            disks: some(&self.disk),
            net: some(&self.net),
            rng: self.rng.clone().unwrap_or_default(),
            serial: self.serial.clone().unwrap_or(default.serial.clone()),
            console: self.console.clone().unwrap_or(default.console.clone()),
            platform: self.platform.clone(),
            ..default
        })
    }
}

/// What a backup's port is to be, from one of two places.
fn once<T: Clone>(port: &str, own: Option<T>, flag: Option<&T>) -> anyhow::Result<Option<T>> {
    ensure!(
        own.is_none() || flag.is_none(),
        "The backup's {port} is given twice: give one of them"
    );
    Ok(own.or_else(|| flag.cloned()))
}

/// The descriptors of `--net fd=[…]`, in the order of the cards.
fn inherit_taps(config: Option<&mut VmConfig>) -> anyhow::Result<Vec<OwnedFd>> {
    let mut all = Vec::new();
    for card in config.and_then(|config| config.net.as_mut()).into_iter().flatten() {
        for fd in card.fds.iter_mut().flatten() {
            all.push(inherit_tap(*fd, "--net")?);
            *fd = -1;
        }
    }
    Ok(all)
}

/// The descriptors of `--restore net_fds=[…]`, in the order of the cards.
fn inherit_restored(restore: Option<&mut RestoreConfig>) -> anyhow::Result<Vec<OwnedFd>> {
    let cards = restore.and_then(|restore| restore.net_fds.as_mut()).into_iter().flatten();
    let fds = cards.filter_map(|card| card.fds.take()).flatten();
    fds.map(|fd| inherit_tap(fd, "--restore")).collect()
}

fn inherit_tap(fd: i32, flag: &str) -> anyhow::Result<OwnedFd> {
    http::inherit(fd).with_context(|| format!("Descriptor {fd} of {flag} is not open"))
}

fn some<T: Clone>(items: &[T]) -> Option<Vec<T>> {
    (!items.is_empty()).then(|| items.to_vec())
}

/// One error that has everything wrong with `what` as its causes.
fn refuse(what: &str, found: &[Invalid]) -> anyhow::Result<()> {
    let mut lines = found.iter().rev().map(Invalid::line);
    let Some(innermost) = lines.next() else { return Ok(()) };
    let error = lines.fold(anyhow::anyhow!(innermost), anyhow::Error::context);
    Err(error.context(format!("{what} is not valid")))
}
