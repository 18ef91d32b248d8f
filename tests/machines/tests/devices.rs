//! Disks and network cards as clients handle them; what a guest does with them is seen in the nested
//! bed and in the tests of the devices.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use api::response::VmState;
use serde_json::{Value, json};
use understudy_tests::scene::{self, LIMIT};
use understudy_tests::serial::Serial;

const COUNT: &str = "workload=count tick_ms=20";

fn image(folder: &Path, name: &str) -> Result<std::path::PathBuf> {
    let path = folder.join(name);
    fs::File::create(&path)?.set_len(1 << 20)?;
    Ok(path)
}

#[test]
fn a_disk_has_a_name_a_place_and_a_lock() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let disk = image(folder.path(), "disk")?;
    let vmm = scene::idle(folder.path(), "vmm")?;
    let mut config = scene::config(folder.path(), COUNT);
    config["disks"] = json!([{"path": disk}]);
    vmm.put_expect("vm.create", Some(&config.to_string()), 204)?;
    let more = json!({"path": image(folder.path(), "more")?, "readonly": true, "id": "more"});
    vmm.put_expect("vm.add-disk", Some(&more.to_string()), 204)?;
    let text = vmm.put_expect("vm.add-disk", Some(&more.to_string()), 409)?;
    ensure!(text.contains("more"), "{text}");
    vmm.put_expect("vm.boot", None, 204)?;
    let serial = Serial::connect(&folder.path().join("vm.serial"), LIMIT)?;
    serial.wait_more("tick ", 1, LIMIT)?;
    vmm.put_expect("vm.add-disk", Some(&more.to_string()), 500)?;
    let info: Value = serde_json::from_str(&vmm.get_expect("vm.info", 200)?)?;
    let ids: Vec<_> = info["config"]["disks"].as_array().into_iter().flatten().collect();
    assert_eq!((&ids[0]["id"], &ids[1]["id"]), (&json!("_disk0"), &json!("more")), "{info}");
    assert_eq!(info["device_tree"]["_disk0"]["pci_bdf"], "0000:00:02.0", "{info}");
    let counters: Value = serde_json::from_str(&vmm.get_expect("vm.counters", 200)?)?;
    assert_eq!(counters["_disk0"]["errors"], 0, "{counters}");
    // The image that is written has one user; the one that is read may have several.
    let other = scene::idle(folder.path(), "other")?;
    let mut second = scene::config(folder.path(), COUNT);
    second["serial"] = json!({"mode": "Off"});
    second["disks"] = json!([{"path": disk}]);
    other.put_expect("vm.create", Some(&second.to_string()), 204)?;
    let text = other.put_expect("vm.boot", None, 500)?;
    ensure!(text.contains("disk") && text.contains("in use"), "{text}");
    other.put_expect("vm.delete", None, 204)?;
    second["disks"] = json!([{"path": more["path"], "readonly": true}]);
    other.put_expect("vm.create", Some(&second.to_string()), 204)?;
    other.put_expect("vm.boot", None, 204)?;
    // A VM that is shut down has let go of its image.
    vmm.put_expect("vm.shutdown", None, 204)?;
    other.put_expect("vm.delete", None, 204)?;
    second["disks"] = json!([{"path": disk}]);
    other.put_expect("vm.create", Some(&second.to_string()), 204)?;
    other.put_expect("vm.boot", None, 204)?;
    Ok(())
}

#[test]
fn images_that_cannot_be_used_are_named() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let vmm = scene::idle(folder.path(), "vmm")?;
    let qcow2 = folder.path().join("qcow2");
    fs::write(&qcow2, [b"QFI\xfb\x00\x00\x00\x03".as_slice(), &[0; 1016]].concat())?;
    for (path, status) in [(folder.path().join("missing"), 500), (qcow2, 500)] {
        let mut config = scene::config(folder.path(), COUNT);
        config["disks"] = json!([{"path": path}]);
        vmm.put_expect("vm.create", Some(&config.to_string()), 204)?;
        let text = vmm.put_expect("vm.boot", None, status)?;
        ensure!(text.contains(&path.display().to_string()), "{text}");
        assert_eq!(vmm.vm_state()?, VmState::Created);
        vmm.put_expect("vm.delete", None, 204)?;
    }
    Ok(())
}

#[test]
fn a_snapshot_carries_its_disks() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let disk = image(folder.path(), "disk")?;
    let mut vmm = scene::idle(folder.path(), "first")?;
    let mut config = scene::config(folder.path(), COUNT);
    config["disks"] = json!([{"path": disk}]);
    let serial = scene::boot(&vmm, folder.path(), &config)?;
    serial.wait_more("tick ", 2, LIMIT)?;
    vmm.put_expect("vm.pause", None, 204)?;
    let url = format!("file://{}", folder.path().join("snapshot").display());
    vmm.put_expect("vm.snapshot", Some(&json!({"destination_url": url}).to_string()), 204)?;
    let second = scene::idle(folder.path(), "second")?;
    let body = json!({"source_url": url, "resume": true}).to_string();
    // The first one still has the image.
    vmm.put_expect("vmm.shutdown", None, 200)?;
    vmm.wait_exit(LIMIT)?;
    second.put_expect("vm.restore", Some(&body), 204)?;
    let serial = Serial::connect(&folder.path().join("vm.serial"), LIMIT)?;
    serial.wait_more("tick ", 2, LIMIT)?;
    assert_eq!(second.vm_state()?, VmState::Running);
    Ok(())
}
