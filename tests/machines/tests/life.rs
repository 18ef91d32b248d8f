//! A VM's life over the REST interface: every state, and the exact code of every answer.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use api::response::{VmCounters, VmState, VmmPingResponse};
use serde_json::{Value, json};
use understudy_tests::process::Vmm;
use understudy_tests::scene::{self, LIMIT, MEMORY};
use understudy_tests::serial::Serial;

const COUNT: &str = "workload=count tick_ms=20";

/// Every request about the VM that needs one, with a body that would do.
fn about_a_vm(folder: &Path) -> Vec<(&'static str, Option<String>)> {
    let snapshot = json!({"destination_url": format!("file://{}", folder.join("s").display())});
    let replicate = json!({"destination_url": "tcp:127.0.0.1:1"});
    vec![
        ("vm.boot", None),
        ("vm.pause", None),
        ("vm.resume", None),
        ("vm.shutdown", None),
        ("vm.reboot", None),
        ("vm.power-button", None),
        ("vm.snapshot", Some(snapshot.to_string())),
        ("vm.replicate", Some(replicate.to_string())),
        ("vm.stop-replication", None),
        ("vm.failover", Some("{}".to_owned())),
    ]
}

#[test]
fn without_a_vm() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let vmm = scene::idle(folder.path(), "vmm")?;
    let ping: VmmPingResponse = serde_json::from_str(&vmm.get_expect("vmm.ping", 200)?)?;
    assert_eq!(ping.pid, i64::from(vmm.pid()));
    assert!(ping.features.iter().any(|feature| feature == "replication"), "{ping:?}");
    let major = ping.version.trim_start_matches('v').split('.').next().unwrap_or_default();
    assert!(major.parse::<u32>()? >= 40, "{}", ping.version);
    vmm.get_expect("vm.info", 404)?;
    vmm.get_expect("vm.counters", 404)?;
    for (name, body) in about_a_vm(folder.path()) {
        vmm.put_expect(name, body.as_deref(), 404)?;
    }
    vmm.put_expect("vm.delete", None, 204)?;
    let info: Value = serde_json::from_str(&vmm.get_expect("vm.replication-info", 200)?)?;
    assert_eq!(info["role"], "None");
    Ok(())
}

#[test]
fn wrong_requests() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let vmm = scene::idle(folder.path(), "vmm")?;
    vmm.get_expect("vm.nonsense", 404)?;
    vmm.put_expect("vm.nonsense", Some("{}"), 404)?;
    // A wrong method is a bad request, never a 405.
    vmm.get_expect("vm.create", 400)?;
    vmm.put_expect("vm.info", None, 400)?;
    vmm.put_expect("vm.create", None, 400)?;
    for body in ["", "{", "[]", "\"text\"", "7", "null", "{\"cpus\": 7}", "{} {}"] {
        vmm.put_expect("vm.create", Some(body), 400).context(body)?;
    }
    vmm.put_expect("vm.boot", Some("{}"), 400)?;
    vmm.put_expect("vm.snapshot", Some("{}"), 400)?;
    vmm.put_expect("vm.replicate", Some("{\"destination_url\": \"tcp:h:1\", \"x\": 1}"), 400)?;
    vmm.get_expect("vm.info", 404)?;
    Ok(())
}

#[test]
fn an_empty_configuration_is_one() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let vmm = scene::idle(folder.path(), "vmm")?;
    vmm.put_expect("vm.create", Some("{}"), 204)?;
    let text = vmm.get_expect("vm.info", 200)?;
    assert!(!text.contains("null"), "absent fields are omitted: {text}");
    let info = vmm.info()?;
    assert_eq!((info.state, info.memory_actual_size), (VmState::Created, 512 << 20));
    let text = vmm.put_expect("vm.boot", None, 400)?;
    assert!(text.contains("kernel"), "{text}");
    assert_eq!(vmm.vm_state()?, VmState::Created);
    vmm.put_expect("vm.delete", None, 204)?;
    vmm.get_expect("vm.info", 404)?;
    Ok(())
}

#[test]
fn states_and_codes() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let vmm = scene::idle(folder.path(), "vmm")?;
    let config = scene::config(folder.path(), COUNT).to_string();
    vmm.put_expect("vm.create", Some(&config), 204)?;
    vmm.put_expect("vm.create", Some(&config), 500)?;
    for name in ["vm.pause", "vm.resume", "vm.reboot", "vm.shutdown", "vm.power-button"] {
        vmm.put_expect(name, None, 500).context("a VM that was only created")?;
    }
    let info = vmm.info()?;
    assert_eq!((info.state, info.memory_actual_size), (VmState::Created, MEMORY));
    vmm.put_expect("vm.boot", None, 204)?;
    let serial = Serial::connect(&folder.path().join("vm.serial"), LIMIT)?;
    serial.wait_more("tick ", 2, LIMIT)?;
    assert_eq!(vmm.vm_state()?, VmState::Running);
    vmm.put_expect("vm.boot", None, 500)?;
    vmm.put_expect("vm.create", Some(&config), 500)?;
    vmm.put_expect("vm.resume", None, 500)?;
    vmm.put_expect("vm.pause", None, 204)?;
    assert_eq!(vmm.vm_state()?, VmState::Paused);
    vmm.put_expect("vm.pause", None, 500)?;
    vmm.put_expect("vm.boot", None, 500)?;
    vmm.put_expect("vm.resume", None, 204)?;
    vmm.put_expect("vm.resume", None, 500)?;
    serial.wait_more("tick ", 2, LIMIT)?;
    vmm.put_expect("vm.shutdown", None, 204)?;
    assert_eq!(vmm.vm_state()?, VmState::Created);
    vmm.put_expect("vm.shutdown", None, 500)?;
    vmm.put_expect("vm.pause", None, 500)?;
    vmm.put_expect("vm.boot", None, 204)?;
    let serial = Serial::connect(&folder.path().join("vm.serial"), LIMIT)?;
    serial.wait_more("tick ", 1, LIMIT)?;
    vmm.put_expect("vm.delete", None, 204)?;
    vmm.get_expect("vm.info", 404)?;
    // Nothing is left over in the way of a next VM.
    vmm.put_expect("vm.create", Some(&config), 204)?;
    vmm.put_expect("vm.boot", None, 204)?;
    assert_eq!(vmm.vm_state()?, VmState::Running);
    Ok(())
}

#[test]
fn a_paused_guest_stands_still() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (vmm, serial) = scene::running(folder.path(), "vmm", COUNT)?;
    serial.wait_more("tick ", 2, LIMIT)?;
    vmm.put_expect("vm.pause", None, 204)?;
    let before = serial.settled()?;
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(serial.lines(), before, "a paused guest spoke");
    vmm.put_expect("vm.resume", None, 204)?;
    let next = serial.wait_after(before.len(), "tick ", 1, LIMIT)?;
    let last = before.iter().rev().find(|line| line.starts_with("tick ")).context("no tick")?;
    assert_eq!(tick(&next)?, tick(last)? + 1, "after {last}");
    Ok(())
}

fn tick(line: &str) -> Result<u64> {
    let number = line.strip_prefix("tick ").and_then(|rest| rest.split(' ').next());
    Ok(number.with_context(|| format!("no tick: {line}"))?.parse()?)
}

#[test]
fn a_reboot_starts_the_guest_anew() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (vmm, mut serial) = scene::running(folder.path(), "vmm", "workload=verify tick_ms=20")?;
    serial.wait_more("verify ok", 5, LIMIT)?;
    let mark = serial.mark();
    vmm.put_expect("vm.reboot", None, 204)?;
    serial.wait_after(mark, "understudy-guest", 1, LIMIT)?;
    serial.wait_more("verify ok", 2, LIMIT)?;
    assert_eq!(vmm.vm_state()?, VmState::Running);
    // A paused VM that is rebooted runs.
    vmm.put_expect("vm.pause", None, 204)?;
    let mark = serial.mark();
    vmm.put_expect("vm.reboot", None, 204)?;
    serial.wait_after(mark, "understudy-guest", 1, LIMIT)?;
    assert_eq!(vmm.vm_state()?, VmState::Running);
    serial.wait_more("verify ok", 2, LIMIT)?;
    serial.verdict(LIMIT)?;
    Ok(())
}

#[test]
fn a_guest_resets_itself() -> Result<()> {
    for end in ["reset", "triple"] {
        let folder = tempfile::tempdir()?;
        let line = format!("workload=count tick_ms=10 ticks=3 end={end}");
        let (vmm, serial) = scene::running(folder.path(), "vmm", &line)?;
        serial.wait_more("understudy-guest", 2, LIMIT).context(end)?;
        assert_eq!(vmm.vm_state()?, VmState::Running, "{end}");
    }
    Ok(())
}

#[test]
fn a_guest_that_powers_off_ends_the_process() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut vmm = scene::idle(folder.path(), "vmm")?;
    let config = scene::config(folder.path(), "workload=count tick_ms=10 ticks=3");
    let serial = scene::boot(&vmm, folder.path(), &config)?;
    let status = vmm.wait_exit(LIMIT)?;
    assert_eq!(status.code(), Some(0), "{}", vmm.log());
    // Its last words are not lost.
    serial.wait_line("its last line", 0, LIMIT, |line| line == "stopped ticks=3")?;
    assert!(!vmm.socket().exists(), "the API socket is left over");
    assert!(!folder.path().join("vm.serial").exists(), "the serial socket is left over");
    Ok(())
}

#[test]
fn no_shutdown_keeps_the_process() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut vmm = Vmm::start(folder.path(), "vmm", &["--no-shutdown"])?;
    let config = scene::config(folder.path(), "workload=count tick_ms=10 ticks=3");
    scene::boot(&vmm, folder.path(), &config)?;
    for _ in 0..2 {
        vmm.wait("the guest's end", LIMIT, |vmm| {
            (vmm.vm_state().ok()? == VmState::Shutdown).then_some(())
        })?;
        vmm.put_expect("vm.pause", None, 500)?;
        vmm.put_expect("vm.boot", None, 204)?;
    }
    vmm.put_expect("vm.delete", None, 204)?;
    vmm.get_expect("vmm.ping", 200)?;
    Ok(())
}

#[test]
fn signals_end_it_gracefully() -> Result<()> {
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let folder = tempfile::tempdir()?;
        let events = folder.path().join("events");
        let monitor = format!("path={}", events.display());
        let mut vmm = Vmm::start(folder.path(), "vmm", &["--event-monitor", &monitor])?;
        let serial = scene::boot(&vmm, folder.path(), &scene::config(folder.path(), COUNT))?;
        serial.wait_more("tick ", 1, LIMIT)?;
        vmm.signal(signal)?;
        assert_eq!(vmm.wait_exit(LIMIT)?.code(), Some(0), "{}", vmm.log());
        assert!(!vmm.socket().exists(), "the API socket is left over");
        let told = std::fs::read_to_string(&events)?;
        for event in ["\"shutdown\"", "\"deleted\""] {
            assert!(told.contains(event), "no {event} in {told}");
        }
        let last = told.rsplit("\n\n").find(|event| !event.trim().is_empty());
        assert!(last.is_some_and(|event| event.contains("\"vmm\"")), "{told}");
    }
    Ok(())
}

#[test]
fn vmm_shutdown_ends_it() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (mut vmm, _serial) = scene::running(folder.path(), "vmm", COUNT)?;
    let answer = vmm.put("vmm.shutdown", None)?;
    assert_eq!((answer.status, answer.body.as_str()), (200, ""));
    assert_eq!(vmm.wait_exit(LIMIT)?.code(), Some(0), "{}", vmm.log());
    Ok(())
}

#[test]
fn counters() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (vmm, serial) = scene::running(folder.path(), "vmm", COUNT)?;
    serial.wait_more("tick ", 1, LIMIT)?;
    let read = || -> Result<VmCounters> {
        Ok(serde_json::from_str(&vmm.get_expect("vm.counters", 200)?)?)
    };
    let sum = |counters: &VmCounters| -> Result<u64> {
        Ok(counters.get("__serial").context("no serial port")?.values().sum())
    };
    let before = read()?;
    ensure!(!before.contains_key("__replication"), "nothing is replicated: {before:?}");
    serial.wait_more("tick ", 2, LIMIT)?;
    let after = read()?;
    assert!(sum(&after)? > sum(&before)?, "{before:?} {after:?}");
    Ok(())
}

#[test]
fn the_device_tree_names_virtio_rng_and_its_place() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (vmm, _serial) = scene::running(folder.path(), "vmm", COUNT)?;
    let tree = vmm.info()?.device_tree.context("no device tree")?;
    let rng = tree.get("__rng").context("no __rng")?;
    assert_eq!(rng.pci_bdf.as_deref(), Some("0000:00:01.0"));
    let parent = rng.parent.as_deref().context("no parent")?;
    assert_eq!(tree.get(parent).context("the parent is not there")?.children, ["__rng"]);
    let counters: VmCounters = serde_json::from_str(&vmm.get_expect("vm.counters", 200)?)?;
    let rng = counters.get("__rng").context("no counters of __rng")?;
    // The guest of this test has no driver for it.
    assert_eq!((rng.get("activations"), rng.get("bytes")), (Some(&0), Some(&0)), "{rng:?}");
    Ok(())
}

#[test]
fn a_source_of_random_bytes_that_is_not_there_is_named() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let vmm = scene::idle(folder.path(), "vmm")?;
    let mut config = scene::config(folder.path(), COUNT);
    config["rng"] = json!({"src": "/no/such/source"});
    vmm.put_expect("vm.create", Some(&config.to_string()), 204)?;
    let text = vmm.put_expect("vm.boot", None, 500)?;
    assert!(text.contains("__rng") && text.contains("/no/such/source"), "{text}");
    assert_eq!(vmm.vm_state()?, VmState::Created);
    Ok(())
}

#[test]
fn events_come_in_order() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("events");
    let monitor = format!("path={}", path.display());
    let mut vmm = Vmm::start(folder.path(), "vmm", &["--event-monitor", &monitor])?;
    let serial = scene::boot(&vmm, folder.path(), &scene::config(folder.path(), COUNT))?;
    serial.wait_more("tick ", 1, LIMIT)?;
    let snapshot = folder.path().join("snapshot");
    let snapshot = json!({"destination_url": format!("file://{}", snapshot.display())});
    for (name, body) in [
        ("vm.pause", None),
        ("vm.snapshot", Some(snapshot.to_string())),
        ("vm.resume", None),
        ("vm.reboot", None),
        ("vm.shutdown", None),
        ("vm.boot", None),
        ("vm.delete", None),
    ] {
        vmm.put_expect(name, body.as_deref(), 204)?;
    }
    vmm.put_ok("vmm.shutdown", None)?;
    assert_eq!(vmm.wait_exit(LIMIT)?.code(), Some(0));
    let text = std::fs::read_to_string(&path)?;
    assert!(text.ends_with("}\n\n"), "no blank line between: {text}");
    let events: Vec<Value> =
        serde_json::Deserializer::from_str(&text).into_iter().collect::<Result<_, _>>()?;
    let names: Vec<String> = events
        .iter()
        .map(|event| {
            format!(
                "{}:{}",
                event["source"].as_str().unwrap_or("?"),
                event["event"].as_str().unwrap_or("?")
            )
        })
        .collect();
    let expected = [
        "vmm:starting",
        "vm:booting",
        "vm:booted",
        "vm:pausing",
        "vm:paused",
        "vm:snapshotting",
        "vm:snapshotted",
        "vm:resuming",
        "vm:resumed",
        "vm:rebooting",
        "vm:rebooted",
        "vm:shutdown",
        "vm:booting",
        "vm:booted",
        "vm:shutdown",
        "vm:deleted",
        "vmm:shutdown",
    ];
    assert_eq!(names, expected);
    let times: Vec<(Option<u64>, Option<u64>)> = events
        .iter()
        .map(|event| &event["timestamp"])
        .map(|time| (time["secs"].as_u64(), time["nanos"].as_u64()))
        .collect();
    assert!(times.iter().all(|time| time.0.is_some() && time.1.is_some()), "{times:?}");
    assert!(times.is_sorted(), "{times:?}");
    Ok(())
}

/// A VM whose serial port is as `serial` says; it says three ticks and powers off.
fn three_ticks(folder: &Path, serial: &Value) -> Value {
    let mut config = scene::config(folder, "workload=count tick_ms=20 ticks=3");
    config["serial"] = serial.clone();
    config
}

#[test]
fn serial_to_a_file() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("output");
    let mut vmm = scene::idle(folder.path(), "vmm")?;
    let config = three_ticks(folder.path(), &json!({"mode": "File", "file": path}));
    vmm.put_expect("vm.create", Some(&config.to_string()), 204)?;
    vmm.put_expect("vm.boot", None, 204)?;
    assert_eq!(vmm.wait_exit(LIMIT)?.code(), Some(0), "{}", vmm.log());
    let output = std::fs::read_to_string(&path)?;
    for wanted in ["understudy-guest", "tick 1 ", "tick 2 ", "tick 3 ", "stopped ticks=3"] {
        assert!(output.contains(wanted), "no '{wanted}' in {output}");
    }
    Ok(())
}

#[test]
fn serial_nowhere() -> Result<()> {
    for mode in ["Off", "Null"] {
        let folder = tempfile::tempdir()?;
        let mut vmm = scene::idle(folder.path(), "vmm")?;
        let config = three_ticks(folder.path(), &json!({"mode": mode}));
        vmm.put_expect("vm.create", Some(&config.to_string()), 204)?;
        vmm.put_expect("vm.boot", None, 204)?;
        assert_eq!(vmm.wait_exit(LIMIT)?.code(), Some(0), "{mode}: {}", vmm.log());
        assert!(!vmm.log().contains("tick"), "{mode}: {}", vmm.log());
    }
    Ok(())
}

#[test]
fn serial_to_standard_output() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut vmm = scene::idle(folder.path(), "vmm")?;
    let config = three_ticks(folder.path(), &json!({"mode": "Tty"}));
    vmm.put_expect("vm.create", Some(&config.to_string()), 204)?;
    vmm.put_expect("vm.boot", None, 204)?;
    assert_eq!(vmm.wait_exit(LIMIT)?.code(), Some(0), "{}", vmm.log());
    assert!(vmm.log().contains("stopped ticks=3"), "{}", vmm.log());
    Ok(())
}

#[test]
fn serial_on_a_pty() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut vmm = scene::idle(folder.path(), "vmm")?;
    let mut config = scene::config(folder.path(), COUNT);
    config["serial"] = json!({"mode": "Pty"});
    vmm.put_expect("vm.create", Some(&config.to_string()), 204)?;
    vmm.put_expect("vm.boot", None, 204)?;
    // Clients read the terminal's name from here.
    let path = vmm.info()?.config.serial.file.context("vm.info names no pty")?;
    let mut serial = Serial::open(&path)?;
    serial.wait_more("tick ", 2, LIMIT)?;
    serial.send(b"q")?;
    serial.wait_line("the end", 0, LIMIT, |line| line.starts_with("stopped"))?;
    assert_eq!(vmm.wait_exit(LIMIT)?.code(), Some(0), "{}", vmm.log());
    Ok(())
}

#[test]
fn serial_on_a_socket_outlives_its_clients() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (mut vmm, serial) = scene::running(folder.path(), "vmm", COUNT)?;
    serial.wait_more("tick ", 2, LIMIT)?;
    drop(serial);
    let mut serial = Serial::connect(&folder.path().join("vm.serial"), LIMIT)?;
    serial.wait_more("tick ", 2, LIMIT)?;
    serial.send(b"q")?;
    serial.wait_line("the end", 0, LIMIT, |line| line.starts_with("stopped"))?;
    assert_eq!(vmm.wait_exit(LIMIT)?.code(), Some(0), "{}", vmm.log());
    Ok(())
}

#[test]
fn a_fifo_without_a_reader_holds_nobody_up() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU)?;
    let mut vmm = scene::idle(folder.path(), "vmm")?;
    let config = three_ticks(folder.path(), &json!({"mode": "File", "file": path}));
    vmm.put_expect("vm.create", Some(&config.to_string()), 204)?;
    vmm.put_expect("vm.boot", None, 204)?;
    assert_eq!(vmm.wait_exit(LIMIT)?.code(), Some(0), "{}", vmm.log());
    Ok(())
}

#[test]
fn a_reset_needs_the_kernel_and_leaves_the_guest_alone_without_it() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let kernel = folder.path().join("kernel");
    std::fs::copy(guest_image::PATH, &kernel)?;
    let mut vmm = scene::idle(folder.path(), "vmm")?;
    let mut config = scene::config(folder.path(), COUNT);
    config["payload"]["kernel"] = json!(kernel);
    let serial = scene::boot(&vmm, folder.path(), &config)?;
    serial.wait_more("tick ", 2, LIMIT)?;
    std::fs::remove_file(&kernel)?;
    let text = vmm.put_expect("vm.reboot", None, 500)?;
    ensure!(text.contains("kernel"), "{text}");
    serial.wait_more("tick ", 2, LIMIT)?;
    std::fs::copy(guest_image::PATH, &kernel)?;
    let mark = serial.mark();
    vmm.put_expect("vm.reboot", None, 204)?;
    serial.wait_after(mark, "understudy-guest", 1, LIMIT)?;
    vmm.signal(libc::SIGTERM)?;
    assert_eq!(vmm.wait_exit(LIMIT)?.code(), Some(0), "{}", vmm.log());
    Ok(())
}
