//! Snapshots: a guest goes on in another process as if nothing had been, and no damage is run.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use api::response::VmState;
use serde_json::{Value, json};
use understudy_tests::process::Vmm;
use understudy_tests::scene::{self, LIMIT, MEMORY};
use understudy_tests::serial::Serial;

const FILES: [&str; 3] = ["config.json", "state.json", "memory-ranges"];

fn url(path: &Path) -> String {
    format!("file://{}", path.display())
}

fn save_body(path: &Path) -> String {
    json!({"destination_url": url(path)}).to_string()
}

fn restore_body(path: &Path) -> String {
    json!({"source_url": url(path), "resume": true}).to_string()
}

/// What is done to a configuration.
type Change = fn(&mut Value);

/// The tick of a `verify` line.
fn tick(line: &str) -> Result<u64> {
    let (_, tick) = line.rsplit_once("tick=").with_context(|| format!("no tick: {line}"))?;
    Ok(tick.parse()?)
}

/// Runs a guest that verifies its memory, saves it, and kills its process. The directory, and
/// the last line that the guest said.
fn saved(folder: &Path, vcpus: u32) -> Result<(PathBuf, String)> {
    let mut vmm = scene::idle(folder, "first")?;
    let mut config = scene::config(folder, "workload=verify tick_ms=20");
    config["cpus"] = json!({"boot_vcpus": vcpus, "max_vcpus": vcpus});
    let serial = scene::boot(&vmm, folder, &config)?;
    serial.wait_more("verify ok", 10, LIMIT)?;
    vmm.put_expect("vm.pause", None, 204)?;
    let path = folder.join("snapshot");
    vmm.put_expect("vm.snapshot", Some(&save_body(&path)), 204)?;
    let lines = serial.settled()?;
    let last = lines.iter().rev().find(|line| line.starts_with("verify ok"));
    let last = last.context("the guest verified nothing")?.clone();
    vmm.kill()?;
    Ok((path, last))
}

/// The guest of a restored VM goes on after `last` and finds its memory as it was.
fn goes_on(vmm: &mut Vmm, folder: &Path, last: &str) -> Result<()> {
    let mut serial = Serial::connect(&folder.join("vm.serial"), LIMIT)?;
    let next = serial.wait_after(0, "verify ok", 1, LIMIT)?;
    ensure!(tick(&next)? > tick(last)?, "{next} after {last}");
    ensure!(tick(&next)? < tick(last)? + 100, "{next} after {last}");
    serial.wait_more("verify ok", 3, LIMIT)?;
    serial.verdict(LIMIT)?;
    assert_eq!(vmm.wait_exit(LIMIT)?.code(), Some(0), "{}", vmm.log());
    Ok(())
}

#[test]
fn a_guest_goes_on_in_another_process() -> Result<()> {
    for vcpus in [1, 2] {
        let folder = tempfile::tempdir()?;
        let (path, last) = saved(folder.path(), vcpus)?;
        let mut vmm = scene::idle(folder.path(), "second")?;
        vmm.put_expect("vm.restore", Some(&restore_body(&path)), 204)?;
        assert_eq!(vmm.vm_state()?, VmState::Running);
        vmm.put_expect("vm.restore", Some(&restore_body(&path)), 500)?;
        goes_on(&mut vmm, folder.path(), &last).with_context(|| format!("{vcpus} vCPUs"))?;
    }
    Ok(())
}

#[test]
fn a_restored_vm_is_paused_until_it_is_resumed() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (path, last) = saved(folder.path(), 1)?;
    let mut vmm = scene::idle(folder.path(), "second")?;
    let body = json!({"source_url": url(&path)}).to_string();
    vmm.put_expect("vm.restore", Some(&body), 204)?;
    assert_eq!(vmm.vm_state()?, VmState::Paused);
    // A snapshot of what was restored is as good as the first.
    let second = folder.path().join("again");
    vmm.put_expect("vm.snapshot", Some(&save_body(&second)), 204)?;
    vmm.put_expect("vm.delete", None, 204)?;
    vmm.put_expect("vm.restore", Some(&restore_body(&second)), 204)?;
    goes_on(&mut vmm, folder.path(), &last)
}

#[test]
fn restored_from_the_command_line() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (path, last) = saved(folder.path(), 1)?;
    let source = format!("source_url={},resume=on", url(&path));
    let mut vmm = Vmm::start(folder.path(), "second", &["--restore", &source])?;
    goes_on(&mut vmm, folder.path(), &last)
}

#[test]
fn the_saved_guest_itself_goes_on() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (mut vmm, mut serial) = scene::running(folder.path(), "vmm", "workload=verify tick_ms=20")?;
    serial.wait_more("verify ok", 5, LIMIT)?;
    vmm.put_expect("vm.pause", None, 204)?;
    let path = folder.path().join("snapshot");
    vmm.put_expect("vm.snapshot", Some(&save_body(&path)), 204)?;
    vmm.put_expect("vm.resume", None, 204)?;
    serial.wait_more("verify ok", 5, LIMIT)?;
    serial.verdict(LIMIT)?;
    assert_eq!(vmm.wait_exit(LIMIT)?.code(), Some(0));
    Ok(())
}

#[test]
fn where_and_when_a_snapshot_may_be_made() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (vmm, serial) = scene::running(folder.path(), "vmm", "workload=count tick_ms=20")?;
    let path = folder.path().join("snapshot");
    let text = vmm.put_expect("vm.snapshot", Some(&save_body(&path)), 500)?;
    assert!(text.contains("paused"), "{text}");
    assert!(!path.exists());
    vmm.put_expect("vm.pause", None, 204)?;
    for url in ["http://host/x", "file://", "", "/plain/path"] {
        let body = json!({"destination_url": url}).to_string();
        vmm.put_expect("vm.snapshot", Some(&body), 400).context(url)?;
    }
    let deep = folder.path().join("not").join("there");
    vmm.put_expect("vm.snapshot", Some(&save_body(&deep)), 500)?;
    let file = folder.path().join("file");
    fs::write(&file, "mine")?;
    vmm.put_expect("vm.snapshot", Some(&save_body(&file)), 500)?;
    assert_eq!(fs::read(&file)?, b"mine");
    // In use: not touched. Made beforehand and empty, as clients do: used.
    fs::create_dir(&path)?;
    fs::write(path.join("mine"), "mine")?;
    let text = vmm.put_expect("vm.snapshot", Some(&save_body(&path)), 500)?;
    assert!(text.contains("in use"), "{text}");
    assert_eq!(fs::read_dir(&path)?.count(), 1);
    fs::remove_file(path.join("mine"))?;
    vmm.put_expect("vm.snapshot", Some(&save_body(&path)), 204)?;
    vmm.put_expect("vm.snapshot", Some(&save_body(&path)), 500)?;
    // Nothing half done is left over, and the guest was not harmed.
    let mut names: Vec<String> = fs::read_dir(folder.path())?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    names.sort();
    assert_eq!(names, ["file", "snapshot", "vm.serial", "vmm.log", "vmm.sock"]);
    vmm.put_expect("vm.resume", None, 204)?;
    serial.wait_more("tick ", 2, LIMIT)?;
    Ok(())
}

#[test]
fn untouched_memory_takes_no_space() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let vmm = scene::idle(folder.path(), "vmm")?;
    let mut config = scene::config(folder.path(), "workload=count tick_ms=20");
    config["memory"]["size"] = json!(1 << 30);
    let serial = scene::boot(&vmm, folder.path(), &config)?;
    serial.wait_more("tick ", 2, LIMIT)?;
    vmm.put_expect("vm.pause", None, 204)?;
    let path = folder.path().join("snapshot");
    vmm.put_expect("vm.snapshot", Some(&save_body(&path)), 204)?;
    let memory = fs::metadata(path.join("memory-ranges"))?;
    assert_eq!(memory.len(), 1 << 30);
    let taken = memory.blocks() * 512;
    assert!(taken > 0 && taken < 64 << 20, "{taken} bytes");
    Ok(())
}

/// One way to harm a file, with what to call it.
type Harm = (&'static str, fn(&Path) -> Result<()>);

fn cut(path: &Path) -> Result<()> {
    let length = fs::metadata(path)?.len();
    Ok(OpenOptions::new().write(true).open(path)?.set_len(length / 2)?)
}

fn empty(path: &Path) -> Result<()> {
    Ok(fs::write(path, "")?)
}

fn append(path: &Path) -> Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    Ok(file.write_all_at(b"and more", file.metadata()?.len())?)
}

fn replace_by_folder(path: &Path) -> Result<()> {
    fs::remove_file(path)?;
    Ok(fs::create_dir(path)?)
}

fn garbage(path: &Path) -> Result<()> {
    let length = usize::try_from(fs::metadata(path)?.len().min(1 << 20))?;
    Ok(OpenOptions::new().write(true).open(path)?.write_all_at(&vec![0xa5; length], 0)?)
}

fn remove(path: &Path) -> Result<()> {
    Ok(fs::remove_file(path)?)
}

/// A copy of a snapshot's directory under another name.
fn copy(from: &Path, name: &str) -> Result<PathBuf> {
    let to = from.with_file_name(name);
    fs::create_dir(&to)?;
    for file in FILES {
        fs::copy(from.join(file), to.join(file))?;
    }
    Ok(to)
}

/// A restore that must be refused, once, and leave the VMM as it was.
fn refused(vmm: &Vmm, path: &Path) -> Result<String> {
    refused_as(vmm, path, 500)
}

fn refused_as(vmm: &Vmm, path: &Path, status: u16) -> Result<String> {
    let text = vmm.put_expect("vm.restore", Some(&restore_body(path)), status)?;
    vmm.get_expect("vm.info", 404)?;
    vmm.get_expect("vmm.ping", 200)?;
    Ok(text)
}

#[test]
fn damaged_files_are_refused() -> Result<()> {
    const HARMS: [Harm; 6] = [
        ("cut", cut),
        ("empty", empty),
        ("longer", append),
        ("a folder", replace_by_folder),
        ("garbage", garbage),
        ("missing", remove),
    ];
    let folder = tempfile::tempdir()?;
    let (path, last) = saved(folder.path(), 1)?;
    let mut vmm = scene::idle(folder.path(), "second")?;
    for file in FILES {
        for (what, harm) in HARMS {
            let case = format!("{file}, {what}");
            let bad = copy(&path, "bad")?;
            harm(&bad.join(file)).context(case.clone())?;
            let text = refused(&vmm, &bad).context(case.clone())?;
            ensure!(text.contains(file), "{case}: the file is not named: {text}");
            fs::remove_dir_all(&bad)?;
        }
    }
    let text = refused(&vmm, &folder.path().join("nowhere"))?;
    ensure!(text.contains("nowhere"), "{text}");
    let body = json!({"source_url": "http://host/x"}).to_string();
    vmm.put_expect("vm.restore", Some(&body), 400)?;
    // After all that the good one is still as good.
    vmm.put_expect("vm.restore", Some(&restore_body(&path)), 204)?;
    goes_on(&mut vmm, folder.path(), &last)
}

fn flip(path: &Path, at: u64, bit: u8) -> Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    Ok(file.write_all_at(&[byte[0] ^ (1 << bit)], at)?)
}

#[test]
fn a_flipped_bit_of_memory_is_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (path, _) = saved(folder.path(), 1)?;
    let vmm = scene::idle(folder.path(), "second")?;
    let memory = path.join("memory-ranges");
    // The kernel's first page, and pages of the workload.
    for at in [(1 << 20) + 64, MEMORY / 2 + 123, MEMORY - (8 << 20) + 4095] {
        flip(&memory, at, 5)?;
        let text = refused(&vmm, &path).with_context(|| format!("byte {at:#x}"))?;
        ensure!(text.contains("memory-ranges is damaged"), "{text}");
        flip(&memory, at, 5)?;
    }
    Ok(())
}

#[test]
fn a_flipped_bit_of_the_state_is_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (path, last) = saved(folder.path(), 1)?;
    let mut vmm = scene::idle(folder.path(), "second")?;
    let state = path.join("state.json");
    let text = fs::read(&state)?;
    // Values, wherever they are: a changed digit is still JSON, and still no state to run.
    let digits: Vec<usize> =
        (0..text.len()).filter(|at| (b'2'..=b'7').contains(&text[*at])).collect();
    for chosen in 0..24 {
        let at = digits[chosen * (digits.len() - 1) / 23];
        flip(&state, u64::try_from(at)?, 0)?;
        let around = String::from_utf8_lossy(&text[at.saturating_sub(60)..at + 1]).into_owned();
        refused(&vmm, &path).with_context(|| format!("byte {at} of state.json: {around}"))?;
        flip(&state, u64::try_from(at)?, 0)?;
    }
    vmm.put_expect("vm.restore", Some(&restore_body(&path)), 204)?;
    goes_on(&mut vmm, folder.path(), &last)
}

#[test]
fn another_version_is_refused_as_such() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (path, _) = saved(folder.path(), 1)?;
    let vmm = scene::idle(folder.path(), "second")?;
    let state = path.join("state.json");
    let mut json: Value = serde_json::from_slice(&fs::read(&state)?)?;
    let found = json["version"].as_u64().context("no version")?;
    json["version"] = json!(found + 98);
    // Another version may also look quite different.
    json["machine"] = json!({"something": "else"});
    fs::write(&state, json.to_string())?;
    let text = refused(&vmm, &path)?;
    ensure!(text.contains("version") && text.contains(&(found + 98).to_string()), "{text}");
    Ok(())
}

#[test]
fn a_configuration_that_does_not_fit_the_state_is_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (path, last) = saved(folder.path(), 2)?;
    let mut vmm = scene::idle(folder.path(), "second")?;
    let file = path.join("config.json");
    let good = fs::read(&file)?;
    let changes: [(&str, Change); 4] = [
        ("fewer vCPUs", |config| config["cpus"] = json!({"boot_vcpus": 1, "max_vcpus": 1})),
        ("more vCPUs", |config| config["cpus"] = json!({"boot_vcpus": 4, "max_vcpus": 4})),
        ("more memory", |config| config["memory"]["size"] = json!(2 * MEMORY)),
        ("no serial port", |config| config["serial"] = json!({"mode": "Off"})),
    ];
    for (what, change) in changes {
        let mut config: Value = serde_json::from_slice(&good)?;
        change(&mut config);
        fs::write(&file, config.to_string())?;
        refused(&vmm, &path).context(what)?;
    }
    fs::write(&file, &good)?;
    vmm.put_expect("vm.restore", Some(&restore_body(&path)), 204)?;
    goes_on(&mut vmm, folder.path(), &last)
}

#[test]
fn two_snapshots_at_once_do_not_harm_each_other() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (vmm, _serial) = scene::running(folder.path(), "first", "workload=verify tick_ms=20")?;
    vmm.put_expect("vm.pause", None, 204)?;
    let path = folder.path().join("snapshot");
    let body = save_body(&path);
    let answers = std::thread::scope(|scope| {
        let calls: Vec<_> =
            (0..4).map(|_| scope.spawn(|| vmm.put("vm.snapshot", Some(&body)))).collect();
        let joined = calls.into_iter().map(|call| call.join().expect("no client panics"));
        joined.collect::<Result<Vec<_>>>()
    })?;
    let done = answers.iter().filter(|answer| answer.status == 204).count();
    ensure!(done == 1, "{answers:?}");
    let names: Vec<_> = fs::read_dir(folder.path())?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    ensure!(!names.iter().any(|name| name.contains("partial")), "{names:?}");
    drop(vmm);
    let second = scene::idle(folder.path(), "second")?;
    second.put_expect("vm.restore", Some(&restore_body(&path)), 204)?;
    Ok(())
}

#[test]
fn a_directory_of_the_client_s_keeps_its_mode() -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir()?;
    let (vmm, _serial) = scene::running(folder.path(), "first", "workload=verify tick_ms=20")?;
    vmm.put_expect("vm.pause", None, 204)?;
    let (given, made) = (folder.path().join("given"), folder.path().join("made"));
    fs::create_dir(&given)?;
    fs::set_permissions(&given, fs::Permissions::from_mode(0o750))?;
    let before = fs::metadata(&given)?.ino();
    for path in [&given, &made] {
        vmm.put_expect("vm.snapshot", Some(&save_body(path)), 204)?;
        let mut names: Vec<_> = fs::read_dir(path)?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<Result<_>>()?;
        names.sort();
        assert_eq!(names, ["config.json", "memory-ranges", "state.json"]);
        for name in FILES {
            assert_eq!(fs::metadata(path.join(name))?.mode() & 0o777, 0o600, "{name}");
        }
    }
    let after = fs::metadata(&given)?;
    assert_eq!((after.ino(), after.mode() & 0o777), (before, 0o750));
    assert_eq!(fs::metadata(&made)?.mode() & 0o777, 0o700);
    Ok(())
}

#[test]
fn a_configuration_that_cannot_be_honoured_is_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (path, _) = saved(folder.path(), 1)?;
    let vmm = scene::idle(folder.path(), "second")?;
    let file = path.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&file)?)?;
    config["vsock"] = json!({"cid": 3, "socket": "/tmp/none"});
    fs::write(&file, config.to_string())?;
    let text = refused_as(&vmm, &path, 400)?;
    ensure!(text.contains("vsock"), "{text}");
    config["vsock"] = Value::Null;
    config["cpus"] = json!({"boot_vcpus": 0, "max_vcpus": 1});
    fs::write(&file, config.to_string())?;
    let text = refused_as(&vmm, &path, 400)?;
    ensure!(text.contains("boot_vcpus"), "{text}");
    Ok(())
}
