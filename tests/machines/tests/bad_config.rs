//! Configurations and payloads that cannot work: each is one clear error, and the process serves
//! on, whatever else it runs.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use api::response::VmState;
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use serde_json::{Value, json};
use understudy_tests::process::Vmm;
use understudy_tests::scene::{self, LIMIT, MEMORY};

const COUNT: &str = "workload=count tick_ms=20";

/// Creates a VM that must be refused at its boot, and deletes it; what is said.
fn boot_refused(vmm: &Vmm, config: &Value, status: u16) -> Result<String> {
    vmm.put_expect("vm.create", Some(&config.to_string()), 204)?;
    let text = vmm.put_expect("vm.boot", None, status)?;
    ensure!(vmm.vm_state()? == VmState::Created, "a VM that did not boot is {:?}", vmm.info()?);
    vmm.put_expect("vm.delete", None, 204)?;
    Ok(text)
}

/// After all that was refused, a good VM runs in the same process.
fn still_runs_a_vm(vmm: &Vmm, folder: &Path) -> Result<()> {
    let serial = scene::boot(vmm, folder, &scene::config(folder, COUNT))?;
    serial.wait_more("tick ", 2, LIMIT)?;
    Ok(())
}

/// Writes a copy of the test guest's image after `change`.
fn image(path: &Path, change: impl FnOnce(&mut Vec<u8>)) -> Result<()> {
    let mut bytes = fs::read(guest_image::PATH)?;
    change(&mut bytes);
    Ok(fs::write(path, bytes)?)
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|window| window == wanted)
}

/// Offset of the first loadable program header (ELF-64 gABI: `e_phoff` at 32, entries of 56
/// bytes, `PT_LOAD` is 1).
fn first_load(bytes: &[u8]) -> usize {
    let start = usize::from(bytes[32]) | usize::from(bytes[33]) << 8;
    (0..8)
        .map(|index| start + index * 56)
        .find(|at| bytes[*at..*at + 4] == [1, 0, 0, 0])
        .expect("the guest has a segment to load")
}

/// The 64-bit number at an offset.
fn number(bytes: &[u8], at: usize) -> usize {
    let number = u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    usize::try_from(number).expect("an offset of a small file")
}

#[test]
fn kernels_that_are_none() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let vmm = scene::idle(folder.path(), "vmm")?;
    let path = |name: &str| folder.path().join(name);
    fs::write(path("text"), "#!/bin/sh\necho I am a script, not a kernel\n".repeat(100))?;
    fs::write(path("short"), "x")?;
    fs::write(path("empty"), "")?;
    fs::create_dir(path("directory"))?;
    File::create(path("zeroes"))?.set_len(1 << 20)?;
    image(&path("cut-head"), |bytes| bytes.truncate(40))?;
    image(&path("cut-table"), |bytes| bytes.truncate(70))?;
    image(&path("cut-segment"), |bytes| {
        // `p_offset` at 8, `p_filesz` at 32: the first segment without its last byte.
        let header = first_load(bytes);
        let end = number(bytes, header + 8) + number(bytes, header + 32);
        bytes.truncate(end - 1);
    })?;
    image(&path("elf-32"), |bytes| bytes[4] = 1)?;
    image(&path("big-endian"), |bytes| bytes[5] = 2)?;
    // `e_machine` at 18: AArch64.
    image(&path("other-machine"), |bytes| bytes[18] = 183)?;
    image(&path("no-note"), |bytes| {
        let at = find(bytes, b"Xen\0").expect("the guest has a PVH note");
        bytes[at] = b'Y';
    })?;
    image(&path("load-beyond"), |bytes| {
        // `p_paddr` at 24: 1 TiB.
        let at = first_load(bytes) + 24;
        bytes[at..at + 8].copy_from_slice(&(1_u64 << 40).to_le_bytes());
    })?;
    image(&path("load-overflow"), |bytes| {
        let at = first_load(bytes) + 24;
        bytes[at..at + 8].copy_from_slice(&(u64::MAX - 100).to_le_bytes());
    })?;
    image(&path("load-huge"), |bytes| {
        // `p_filesz` at 32.
        let at = first_load(bytes) + 32;
        bytes[at..at + 8].copy_from_slice(&(1_u64 << 40).to_le_bytes());
    })?;
    let names = [
        "text",
        "short",
        "empty",
        "directory",
        "zeroes",
        "cut-head",
        "cut-table",
        "cut-segment",
        "elf-32",
        "big-endian",
        "other-machine",
        "no-note",
        "load-beyond",
        "load-overflow",
        "load-huge",
        "missing",
    ];
    for name in names {
        let mut config = scene::config(folder.path(), COUNT);
        config["payload"]["kernel"] = json!(path(name));
        let text = boot_refused(&vmm, &config, 400).context(name)?;
        ensure!(text.contains(&path(name).display().to_string()), "{name} is not named: {text}");
    }
    still_runs_a_vm(&vmm, folder.path())
}

#[test]
fn payloads_that_do_not_fit() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let vmm = scene::idle(folder.path(), "vmm")?;
    let path = folder.path().join("initramfs");
    for bytes in [MEMORY - (1 << 20), MEMORY, 1 << 33] {
        File::create(&path)?.set_len(bytes)?;
        let mut config = scene::config(folder.path(), COUNT);
        config["payload"]["initramfs"] = json!(path);
        let text = boot_refused(&vmm, &config, 400)?;
        ensure!(text.contains("does not fit") && text.contains("initramfs"), "{text}");
    }
    let mut config = scene::config(folder.path(), COUNT);
    config["payload"]["initramfs"] = json!(folder.path());
    boot_refused(&vmm, &config, 400).context("an initramfs that is a directory")?;
    let longest = 64 << 10;
    let line = |bytes: usize| format!("{COUNT}{}", " ".repeat(bytes - COUNT.len()));
    let config = scene::config(folder.path(), &line(longest + 1)).to_string();
    let text = vmm.put_expect("vm.create", Some(&config), 400)?;
    ensure!(text.contains("cmdline"), "{text}");
    let text = boot_refused(&vmm, &scene::config(folder.path(), &line(longest)), 400)?;
    ensure!(text.contains("command line"), "{text}");
    still_runs_a_vm(&vmm, folder.path())
}

/// Each is refused by `vm.create` with a complaint that names the key.
fn refused_keys(cases: &[(&str, Value)], status: u16) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let vmm = scene::idle(folder.path(), "vmm")?;
    for (key, part) in cases {
        let mut config = scene::config(folder.path(), COUNT);
        for (name, value) in part.as_object().context("no object")? {
            config[name] = value.clone();
        }
        let text = vmm
            .put_expect("vm.create", Some(&config.to_string()), status)
            .with_context(|| part.to_string())?;
        ensure!(text.contains(key), "{part}: '{key}' is not named: {text}");
        vmm.get_expect("vm.info", 404)?;
    }
    still_runs_a_vm(&vmm, folder.path())
}

#[test]
fn contradictions_are_named() -> Result<()> {
    let cases = [
        ("cpus.boot_vcpus", json!({"cpus": {"boot_vcpus": 4, "max_vcpus": 2}})),
        ("cpus.boot_vcpus", json!({"cpus": {"boot_vcpus": 0, "max_vcpus": 2}})),
        ("cpus.boot_vcpus", json!({"cpus": {"boot_vcpus": 255, "max_vcpus": 255}})),
        (
            "cpus.topology",
            json!({"cpus": {"boot_vcpus": 2, "max_vcpus": 2, "topology":
            {"threads_per_core": 2, "cores_per_die": 2, "dies_per_package": 1, "packages": 1}}}),
        ),
        ("memory.size", json!({"memory": {"size": 0}})),
        ("memory.size", json!({"memory": {"size": MEMORY + 1}})),
        ("memory.size", json!({"memory": {"size": u64::MAX}})),
        ("memory.size", json!({"memory": {"size": 1_u64 << 60}})),
        ("memory.hugepages", json!({"memory": {"size": MEMORY, "hugepage_size": 2 << 20}})),
        (
            "memory.hugepage_size",
            json!({"memory": {"size": MEMORY, "hugepages": true, "hugepage_size": 3 << 20}}),
        ),
        ("serial.file", json!({"serial": {"mode": "File"}})),
        ("serial.socket", json!({"serial": {"mode": "Socket"}})),
        ("console.file", json!({"console": {"mode": "File"}})),
        ("serial.mode", json!({"serial": {"mode": "Tty"}, "console": {"mode": "Tty"}})),
        ("payload.firmware", json!({"payload": {"kernel": "/k", "firmware": "/f"}})),
        ("payload.kernel", json!({"payload": {"initramfs": "/i"}})),
    ];
    refused_keys(&cases, 400)
}

#[test]
fn what_cannot_be_honoured_is_named() -> Result<()> {
    let cases = [
        ("disks vhost_user", json!({"disks": [{"vhost_user": true, "vhost_socket": "/s"}]})),
        ("disks iommu", json!({"disks": [{"path": "/d", "iommu": true}]})),
        ("net vhost_user", json!({"net": [{"vhost_user": true}]})),
        ("iommu", json!({"iommu": true})),
        ("devices", json!({"devices": [{"path": "/sys/bus/pci/devices/0000:00:00.0"}]})),
        ("user_devices", json!({"user_devices": [{"socket": "/s"}]})),
        ("fs", json!({"fs": [{"tag": "t", "socket": "/s"}]})),
        ("pmem", json!({"pmem": [{"file": "/p"}]})),
        ("vdpa", json!({"vdpa": [{"path": "/v"}]})),
        ("tpm", json!({"tpm": {"socket": "/s"}})),
        ("numa", json!({"numa": [{"guest_numa_id": 0}]})),
        ("sgx_epc", json!({"sgx_epc": [{"id": "e", "size": 4096}]})),
        ("cpus.kvm_hyperv", json!({"cpus": {"boot_vcpus": 1, "max_vcpus": 1, "kvm_hyperv": true}})),
        ("watchdog", json!({"watchdog": true})),
        ("landlock_enable", json!({"landlock_enable": true})),
    ];
    refused_keys(&cases, 400)
}

#[test]
fn unknown_keys_are_tolerated() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let vmm = scene::idle(folder.path(), "vmm")?;
    let mut config = scene::config(folder.path(), COUNT);
    config["of_a_later_version"] = json!({"a": [1, 2, 3]});
    config["memory"]["of_a_later_version"] = json!(true);
    let serial = scene::boot(&vmm, folder.path(), &config)?;
    serial.wait_more("tick ", 1, LIMIT)?;
    Ok(())
}

#[test]
fn a_serial_port_that_cannot_be_had() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let vmm = scene::idle(folder.path(), "vmm")?;
    let taken = folder.path().join("taken");
    fs::write(&taken, "a file, not a socket")?;
    for serial in [
        json!({"mode": "File", "file": "/nonexistent/output"}),
        json!({"mode": "Socket", "socket": "/nonexistent/socket"}),
        json!({"mode": "Socket", "socket": taken}),
    ] {
        let mut config = scene::config(folder.path(), COUNT);
        config["serial"] = serial.clone();
        boot_refused(&vmm, &config, 500).with_context(|| serial.to_string())?;
    }
    assert_eq!(fs::read_to_string(&taken)?, "a file, not a socket");
    still_runs_a_vm(&vmm, folder.path())
}

#[test]
fn a_huge_body_does_not_disturb_the_vm() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (mut vmm, mut serial) = scene::running(folder.path(), "vmm", "workload=verify tick_ms=20")?;
    serial.wait_more("verify ok", 2, LIMIT)?;
    let config = json!({"payload": {"cmdline": "x".repeat(100 << 20)}}).to_string();
    let text = vmm.put_expect("vm.create", Some(&config), 413)?;
    ensure!(text.len() < 4096, "the answer repeats the request: {} bytes", text.len());
    drop(config);
    // Only announced, by a client that waits for permission.
    for length in ["104857600", "18446744073709551615"] {
        let mut stream = UnixStream::connect(vmm.socket())?;
        let head = format!(
            "PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: {length}\r\n\
             Expect: 100-continue\r\n\r\n"
        );
        stream.write_all(head.as_bytes())?;
        let mut answer = [0; 12];
        stream.read_exact(&mut answer)?;
        assert_eq!(String::from_utf8_lossy(&answer), "HTTP/1.1 413", "{length}");
    }
    serial.wait_more("verify ok", 2, LIMIT)?;
    vmm.get_expect("vmm.ping", 200)?;
    serial.verdict(LIMIT)?;
    assert_eq!(vmm.wait_exit(LIMIT)?.code(), Some(0));
    Ok(())
}

#[test]
fn garbage_does_not_disturb_the_vm() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (mut vmm, mut serial) = scene::running(folder.path(), "vmm", "workload=verify tick_ms=20")?;
    serial.wait_more("verify ok", 2, LIMIT)?;
    let mut random = StdRng::seed_from_u64(4);
    for round in 0..40 {
        let mut stream = UnixStream::connect(vmm.socket())?;
        let mut bytes = vec![0; random.random_range(1..64 << 10)];
        random.fill_bytes(&mut bytes);
        if round % 2 == 0 {
            // Something that begins well goes further in.
            bytes.splice(0..0, *b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 4096\r\n\r\n{");
        }
        // A server that has seen enough closes while we still send.
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        ensure!(!answer.starts_with(b"HTTP/1.1 2"), "garbage was accepted");
    }
    serial.wait_more("verify ok", 2, LIMIT)?;
    assert_eq!(vmm.vm_state()?, VmState::Running);
    serial.verdict(LIMIT)?;
    assert_eq!(vmm.wait_exit(LIMIT)?.code(), Some(0));
    Ok(())
}
