//! What most tests begin with: a VMM that waits for a client, a VM of the test guest as a client
//! describes it, a pair that is protected.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::pair::{Pair, Setup};
use crate::process::Vmm;
use crate::serial::Serial;

/// Longest wait for anything; a machine under load is slow, a broken one for ever.
pub const LIMIT: Duration = Duration::from_secs(60);
/// Bytes of a VM's memory unless a test needs more.
pub const MEMORY: u64 = 64 << 20;

/// A VMM with its API and nothing else.
pub fn idle(folder: &Path, name: &str) -> Result<Vmm> {
    Vmm::start::<&str>(folder, name, &[])
}

/// The test guest as a client describes it: one vCPU, the serial port on `<folder>/vm.serial`.
#[must_use]
pub fn config(folder: &Path, command_line: &str) -> Value {
    json!({
        "payload": {"kernel": guest_image::PATH, "cmdline": command_line},
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
        "memory": {"size": MEMORY},
        "serial": {"mode": "Socket", "socket": folder.join("vm.serial")},
        "console": {"mode": "Off"},
    })
}

/// Creates and boots a VM; its serial port on `<folder>/vm.serial`.
pub fn boot(vmm: &Vmm, folder: &Path, config: &Value) -> Result<Serial> {
    vmm.put_expect("vm.create", Some(&config.to_string()), 204)?;
    vmm.put_expect("vm.boot", None, 204)?;
    Serial::connect(&folder.join("vm.serial"), LIMIT)
}

/// A VMM that runs the test guest under a workload of the command line.
pub fn running(folder: &Path, name: &str, command_line: &str) -> Result<(Vmm, Serial)> {
    let vmm = idle(folder, name)?;
    let serial = boot(&vmm, folder, &config(folder, command_line))?;
    Ok((vmm, serial))
}

/// A pair whose guest is protected and has begun to verify.
pub fn protected(folder: &Path, setup: &Setup) -> Result<Pair> {
    let mut pair = Pair::start(folder, setup)?;
    pair.wait_protected(LIMIT)
        .with_context(|| format!("The backup says:\n{}", pair.backup.log()))?;
    pair.primary_serial.wait_line("'verify ok'", 0, LIMIT, |line| line.contains("verify ok"))?;
    Ok(pair)
}

/// The arbiter's records in the order of their generations, which have no gap.
pub fn records(folder: &Path) -> Result<Vec<Value>> {
    let mut records: Vec<(u64, Value)> = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if let Some(generation) = name.strip_prefix("gen-") {
            let record = serde_json::from_slice(&std::fs::read(&path)?)?;
            records.push((generation.parse().context(name)?, record));
        }
    }
    records.sort_by_key(|(generation, _)| *generation);
    let expected = 1..=u64::try_from(records.len())?;
    let found: Vec<u64> = records.iter().map(|(generation, _)| *generation).collect();
    ensure!(found.iter().copied().eq(expected), "the arbiter has the records {found:?}");
    Ok(records.into_iter().map(|(_, record)| record).collect())
}
