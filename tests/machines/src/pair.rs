//! A primary, its backup and their arbiter, on this host.

use std::net::{IpAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result};
use api::replication::{ReplicateData, ReplicationInfo, ReplicationState};

use crate::process::Vmm;
use crate::serial::Serial;

/// Longest wait for a serial port.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// The environment's name for another place of the test guest: the nested bed has no source tree.
const GUEST: &str = "UNDERSTUDY_TEST_GUEST";

/// How the primary reaches its backup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// The loopback.
    #[default]
    Tcp,
    /// A socket in the pair's folder.
    Unix,
    /// This host's address on an RDMA device.
    Rdma(IpAddr),
}

impl FromStr for Transport {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "tcp" => Ok(Self::Tcp),
            None if text == "unix" => Ok(Self::Unix),
            Some(("rdma", address)) => {
                let parsed = address.parse().map(Self::Rdma);
                parsed.map_err(|_| format!("{address:?} is no IP address"))
            }
            _ => Err("expected tcp, unix or rdma:<address of this host>".to_owned()),
        }
    }
}

impl Transport {
    /// Where a backup in `folder` may listen.
    pub fn url(self, folder: &Path) -> Result<String> {
        Ok(match self {
            Self::Tcp => format!("tcp:127.0.0.1:{}", free_port()?),
            Self::Unix => format!("unix:{}", folder.join("replica").display()),
            Self::Rdma(IpAddr::V4(address)) => format!("rdma:{address}:{}", free_port()?),
            Self::Rdma(IpAddr::V6(address)) => format!("rdma:[{address}]:{}", free_port()?),
        })
    }
}

/// How a pair is set up.
#[derive(Clone, Debug)]
pub struct Setup {
    pub vcpus: u32,
    /// As `--memory size=` takes it.
    pub memory: String,
    pub kernel: PathBuf,
    pub initramfs: Option<PathBuf>,
    pub command_line: String,
    /// Appended to `--replicate`, each with its leading comma.
    pub replicate_options: String,
    /// Appended to `--receive-replica`, each with its leading comma.
    pub receive_options: String,
    pub arbiter: bool,
    /// Another arbiter than the directory of the pair, as an option's value.
    pub arbiter_url: Option<String>,
    pub transport: Transport,
    /// Further arguments of the primary, and of the backup: its own taps and images.
    pub primary_arguments: Vec<String>,
    pub backup_arguments: Vec<String>,
    /// Variables of the primary's environment, and the backup's.
    pub primary_environment: Vec<(String, String)>,
    pub backup_environment: Vec<(String, String)>,
}

impl Setup {
    /// The test guest under a workload that verifies its memory.
    #[must_use]
    pub fn verify(vcpus: u32, memory: &str) -> Self {
        Self {
            vcpus,
            memory: memory.to_owned(),
            kernel: std::env::var_os(GUEST).map_or(guest_image::PATH.into(), PathBuf::from),
            initramfs: None,
            command_line: format!("workload=verify vcpus={vcpus} tick_ms=20"),
            replicate_options: String::new(),
            receive_options: String::new(),
            arbiter: true,
            arbiter_url: None,
            transport: Transport::default(),
            primary_arguments: Vec::new(),
            backup_arguments: Vec::new(),
            primary_environment: Vec::new(),
            backup_environment: Vec::new(),
        }
    }
}

/// Two VMMs of which the first runs the guest.
pub struct Pair {
    pub primary: Vmm,
    pub backup: Vmm,
    pub primary_serial: Serial,
    pub backup_serial: Serial,
    pub arbiter: PathBuf,
}

/// A TCP port of the loopback that was free a moment ago.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Starts a backup that listens on `url` with its serial port on a socket.
pub fn start_backup(folder: &Path, name: &str, url: &str, setup: &Setup) -> Result<Vmm> {
    let arguments = backup_arguments(folder, name, url, setup);
    Vmm::start_with(folder, name, &arguments, &setup.backup_environment)
}

/// What a backup is started with, its API socket excepted.
#[must_use]
pub fn backup_arguments(folder: &Path, name: &str, url: &str, setup: &Setup) -> Vec<String> {
    let arbiter = arbiter_option(folder, setup);
    let mut arguments = vec![
        "--receive-replica".to_owned(),
        format!("receiver_url={url}{arbiter}{}", setup.receive_options),
        "--serial".to_owned(),
        format!("socket={}", folder.join(format!("{name}.serial")).display()),
        "--console".to_owned(),
        "off".to_owned(),
    ];
    arguments.extend(setup.backup_arguments.iter().cloned());
    arguments
}

/// Starts a VM, protected by a backup at `url` where one is given.
pub fn start_primary(folder: &Path, name: &str, url: Option<&str>, setup: &Setup) -> Result<Vmm> {
    let arguments = primary_arguments(folder, name, url, setup);
    Vmm::start_with(folder, name, &arguments, &setup.primary_environment)
}

/// What a primary is started with, its API socket excepted.
#[must_use]
pub fn primary_arguments(
    folder: &Path,
    name: &str,
    url: Option<&str>,
    setup: &Setup,
) -> Vec<String> {
    let mut arguments = vec![
        "--kernel".to_owned(),
        setup.kernel.display().to_string(),
        "--cmdline".to_owned(),
        setup.command_line.clone(),
        "--cpus".to_owned(),
        format!("boot={}", setup.vcpus),
        "--memory".to_owned(),
        format!("size={}", setup.memory),
        "--serial".to_owned(),
        format!("socket={}", folder.join(format!("{name}.serial")).display()),
        "--console".to_owned(),
        "off".to_owned(),
    ];
    if let Some(initramfs) = &setup.initramfs {
        arguments.extend(["--initramfs".to_owned(), initramfs.display().to_string()]);
    }
    if let Some(url) = url {
        arguments.extend(["--replicate".to_owned(), replicate_options(folder, url, setup)]);
    }
    arguments.extend(setup.primary_arguments.iter().cloned());
    arguments
}

/// What `vm.replicate` is given for a backup at `url`, as the command line takes it.
#[must_use]
pub fn replicate_options(folder: &Path, url: &str, setup: &Setup) -> String {
    let arbiter = arbiter_option(folder, setup);
    format!("destination_url={url}{arbiter}{}", setup.replicate_options)
}

fn arbiter_option(folder: &Path, setup: &Setup) -> String {
    if let Some(url) = &setup.arbiter_url {
        format!(",arbiter=\"{url}\"")
    } else if setup.arbiter {
        format!(",arbiter=file:{}", folder.join("arbiter").display())
    } else {
        String::new()
    }
}

fn make_arbiter(folder: &Path) -> Result<PathBuf> {
    let arbiter = folder.join("arbiter");
    std::fs::create_dir(&arbiter).context("Cannot create the arbiter's directory")?;
    Ok(arbiter)
}

fn connect_primary(folder: &Path, primary: &Vmm) -> Result<Serial> {
    Serial::connect(&folder.join("primary.serial"), CONNECT_LIMIT)
        .with_context(|| format!("The primary says:\n{}", primary.log()))
}

/// A VM without protection, and a backup that waits for one.
pub struct Apart {
    pub primary: Vmm,
    pub primary_serial: Serial,
    backup: Vmm,
    arbiter: PathBuf,
    /// What `vm.replicate` is given.
    replicate: ReplicateData,
}

impl Apart {
    /// Starts both in `folder`.
    pub fn start(folder: &Path, setup: &Setup) -> Result<Self> {
        let url = setup.transport.url(folder)?;
        let arbiter = make_arbiter(folder)?;
        let backup = start_backup(folder, "backup", &url, setup)?;
        let primary = start_primary(folder, "primary", None, setup)?;
        let primary_serial = connect_primary(folder, &primary)?;
        let replicate = replicate_options(folder, &url, setup).parse()?;
        Ok(Self { primary, primary_serial, backup, arbiter, replicate })
    }

    /// Switches protection on; the first sync is under way when this returns.
    pub fn protect(self, folder: &Path) -> Result<Pair> {
        let Self { primary, primary_serial, backup, arbiter, replicate } = self;
        primary.put_ok("vm.replicate", Some(&serde_json::to_string(&replicate)?))?;
        let backup_serial = Serial::connect(&folder.join("backup.serial"), CONNECT_LIMIT)?;
        Ok(Pair { primary, backup, primary_serial, backup_serial, arbiter })
    }
}

impl Pair {
    /// Starts both in `folder`; the first sync is under way when this returns.
    pub fn start(folder: &Path, setup: &Setup) -> Result<Self> {
        Self::start_at(folder, setup, &setup.transport.url(folder)?)
    }

    /// As [`Pair::start`], with a backup that listens on `url`.
    pub fn start_at(folder: &Path, setup: &Setup, url: &str) -> Result<Self> {
        let arbiter = make_arbiter(folder)?;
        let backup = start_backup(folder, "backup", url, setup)?;
        let primary = start_primary(folder, "primary", Some(url), setup)?;
        let primary_serial = connect_primary(folder, &primary)?;
        // The backup's serial port is there once the machine is built.
        let backup_serial = Serial::connect(&folder.join("backup.serial"), CONNECT_LIMIT)?;
        Ok(Self { primary, backup, primary_serial, backup_serial, arbiter })
    }

    /// Waits until every committed epoch is on both sides.
    pub fn wait_protected(&mut self, limit: Duration) -> Result<ReplicationInfo> {
        self.primary.wait_state(ReplicationState::Protected, limit)
    }
}
