//! Disks with an image on either host, seen from outside: the guest of these tests has no driver for
//! them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use api::replication::ReplicationState;
use serde_json::{Value, json};
use understudy_tests::pair::free_port;
use understudy_tests::process::Vmm;
use understudy_tests::scene::{self, LIMIT};
use understudy_tests::serial::Serial;

const COUNT: &str = "workload=count tick_ms=20";
/// The last block of a copy is not whole.
const SIZE: usize = (9 << 20) + 512 * 3;

/// An image whose stretches differ, some of them zero, behind more than a frame of zeroes.
fn image(folder: &Path, name: &str, size: usize, seed: u8) -> Result<PathBuf> {
    let path = folder.join(name);
    let mut bytes = vec![0; size];
    for (at, chunk) in bytes.chunks_mut(70_000).enumerate().skip(20) {
        let fill = u8::try_from(at % 5).unwrap_or(0).wrapping_mul(seed);
        chunk.fill(fill);
    }
    fs::write(&path, &bytes)?;
    Ok(path)
}

/// A backup in `folder` that has `disks` for the VM, and where it listens.
fn backup(folder: &Path, name: &str, disks: &Value) -> Result<(Vmm, String)> {
    let url = format!("tcp:127.0.0.1:{}", free_port()?);
    let vmm = scene::idle(folder, name)?;
    let body = json!({
        "receiver_url": url,
        "arbiter": format!("file:{}", folder.join("arbiter").display()),
        "timeout_ms": 20000,
        "disks": disks,
        "serial": {"mode": "Socket", "socket": folder.join(format!("{name}.serial"))},
    });
    vmm.put_expect("vm.receive-replica", Some(&body.to_string()), 204)?;
    Ok((vmm, url))
}

fn replicate(folder: &Path, url: &str) -> String {
    json!({
        "destination_url": url,
        "arbiter": format!("file:{}", folder.join("arbiter").display()),
        "timeout_ms": 20000,
    })
    .to_string()
}

/// A VM with a disk that it can write and one that it cannot.
fn primary(folder: &Path, written: &Path) -> Result<(Vmm, Serial)> {
    fs::create_dir(folder.join("arbiter"))?;
    let vmm = scene::idle(folder, "primary")?;
    let mut config = scene::config(folder, COUNT);
    let read = image(folder, "read", 1 << 20, 9)?;
    config["disks"] = json!([{"path": read, "readonly": true}, {"path": written, "id": "data"}]);
    let serial = scene::boot(&vmm, folder, &config)?;
    serial.wait_more("tick ", 2, LIMIT)?;
    Ok((vmm, serial))
}

#[test]
fn a_backup_has_the_image_and_goes_on_with_it() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let here = image(folder, "here", SIZE, 11)?;
    let there = image(folder, "there", SIZE, 3)?;
    let original = fs::read(&here)?;
    let (mut vmm, _serial) = primary(folder, &here)?;
    let disks = json!([{"id": "data", "path": there}]);
    let (mut other, url) = backup(folder, "backup", &disks)?;
    vmm.put_expect("vm.replicate", Some(&replicate(folder, &url)), 204)?;
    vmm.wait_state(ReplicationState::Protected, LIMIT)?;
    ensure!(fs::read(&there)? == original, "the first copy differs");
    // Nobody else gets what the backup writes.
    let third = scene::idle(folder, "third")?;
    let mut config = scene::config(folder, COUNT);
    config["serial"] = json!({"mode": "Off"});
    config["disks"] = json!([{"path": there}]);
    third.put_expect("vm.create", Some(&config.to_string()), 204)?;
    let text = third.put_expect("vm.boot", None, 500)?;
    ensure!(text.contains("in use"), "{text}");
    vmm.kill()?;
    other.wait_state(ReplicationState::TakenOver, LIMIT)?;
    let serial = Serial::connect(&folder.join("backup.serial"), LIMIT)?;
    serial.wait_more("tick ", 2, LIMIT)?;
    ensure!(fs::read(&there)? == original && fs::read(&here)? == original);
    let info: Value = serde_json::from_str(&other.get_expect("vm.info", 200)?)?;
    assert_eq!(info["config"]["disks"][1]["path"], json!(there), "{info}");
    // And back: the loser's image is overwritten, whatever became of it.
    fs::write(&here, vec![0x77; SIZE])?;
    let disks = json!([{"id": "data", "path": here}]);
    let (mut again, url) = backup(folder, "again", &disks)?;
    other.put_expect("vm.replicate", Some(&replicate(folder, &url)), 204)?;
    other.wait_state(ReplicationState::Protected, LIMIT)?;
    other.put_expect("vm.failover", Some("{}"), 204)?;
    again.wait_state(ReplicationState::TakenOver, LIMIT)?;
    ensure!(fs::read(&here)? == original, "the second copy differs");
    Ok(())
}

#[test]
fn images_that_a_backup_must_not_write_are_named_and_the_guest_runs_on() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let here = image(folder, "here", SIZE, 11)?;
    let original = fs::read(&here)?;
    let (vmm, serial) = primary(folder, &here)?;
    let smaller = image(folder, "smaller", SIZE - 512, 3)?;
    let before = fs::read(&smaller)?;
    // Without an option the backup would write the primary's own image.
    for (name, disks, text) in [
        ("same", json!([]), "in use"),
        ("smaller", json!([{"id": "data", "path": smaller}]), "same size"),
    ] {
        let (mut other, url) = backup(folder, name, &disks)?;
        let answer = vmm.put_expect("vm.replicate", Some(&replicate(folder, &url)), 500)?;
        ensure!(answer.contains(text), "{answer}");
        serial.wait_more("tick ", 2, LIMIT)?;
        let info = other.wait_state(ReplicationState::Disconnected, LIMIT)?;
        ensure!(info.last_error.is_some_and(|error| error.contains(text)));
    }
    ensure!(fs::read(&here)? == original && fs::read(&smaller)? == before);
    Ok(())
}
