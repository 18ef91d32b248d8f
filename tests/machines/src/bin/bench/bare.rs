//! A VM that is protected and set free by turns: what protection costs it, in one process.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use api::replication::{ReplicateData, ReplicationInfo, ReplicationState};
use understudy_tests::interrupt::Folder;
use understudy_tests::pair::{Setup, free_port, start_backup, start_primary};
use understudy_tests::process::Vmm;
use understudy_tests::serial::Serial;

const LIMIT: Duration = Duration::from_secs(180);

/// A primary and a backup that it may have.
pub struct Bare {
    pub primary: Vmm,
    pub backup: Vmm,
    pub serial: Serial,
    replicate: String,
    _folder: Folder,
}

impl Bare {
    /// Starts both; nothing is protected yet. Without an arbiter, since nobody is to take over.
    pub fn start(mut setup: Setup) -> Result<Self> {
        setup.arbiter = false;
        let folder = Folder::new()?;
        let url = format!("tcp:127.0.0.1:{}", free_port()?);
        let backup = start_backup(folder.path(), "backup", &url, &setup)?;
        let primary = start_primary(folder.path(), "primary", None, &setup)?;
        let socket: PathBuf = folder.path().join("primary.serial");
        let serial = Serial::connect(&socket, LIMIT)?;
        let options = format!("destination_url={url}{}", setup.replicate_options);
        let replicate = serde_json::to_string(&options.parse::<ReplicateData>()?)?;
        Ok(Self { primary, backup, serial, replicate, _folder: folder })
    }

    /// Protects the VM; how long that took.
    pub fn protect(&mut self) -> Result<Duration> {
        let options = self.replicate.clone();
        self.protect_as(&options)
    }

    /// The same with another value of an option.
    pub fn protect_with(&mut self, option: &str, value: u64) -> Result<Duration> {
        let mut options: serde_json::Value = serde_json::from_str(&self.replicate)?;
        options[option] = value.into();
        self.protect_as(&options.to_string())
    }

    fn protect_as(&mut self, options: &str) -> Result<Duration> {
        let start = Instant::now();
        self.primary.put_ok("vm.replicate", Some(options))?;
        let protected = self.primary.wait_state(ReplicationState::Protected, LIMIT);
        protected.with_context(|| format!("The backup says:\n{}", self.backup.log()))?;
        Ok(start.elapsed())
    }

    /// Ends the protection on both sides.
    pub fn set_free(&mut self) -> Result<()> {
        self.primary.put_ok("vm.stop-replication", None)?;
        for vmm in [&mut self.primary, &mut self.backup] {
            vmm.wait("the end of the protection", LIMIT, |vmm| {
                let is_over = |info: ReplicationInfo| {
                    use ReplicationState::{Disconnected, Stopped};
                    matches!(info.state, Disconnected | Stopped)
                };
                vmm.replication().ok().filter(|info| is_over(info.clone())).map(drop)
            })?;
        }
        ensure!(self.backup.is_alive(), "the backup ended:\n{}", self.backup.log());
        Ok(())
    }
}
