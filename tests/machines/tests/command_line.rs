//! The process as a shell sees it: exit codes, and what it says about them.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::Result;
use understudy_tests::process::{Vmm, binary};
use understudy_tests::scene::LIMIT;

fn run(arguments: &[&str]) -> Result<Output> {
    Ok(Command::new(binary("cloud-hypervisor")?).args(arguments).output()?)
}

fn complaint(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn the_version_comes_first() -> Result<()> {
    let output = run(&["--version"])?;
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8(output.stdout)?;
    let version = text.strip_prefix("cloud-hypervisor v").unwrap_or_default();
    let major: u32 = version.split('.').next().unwrap_or_default().parse()?;
    assert!(major >= 40, "{text}");
    Ok(())
}

#[test]
fn usage_errors_exit_with_2() -> Result<()> {
    let kernel = guest_image::PATH;
    // What is wrong, and the word that the message must contain.
    let cases: &[(&[&str], &str)] = &[
        (&[], "nothing to do"),
        (&["--nonsense"], "--nonsense"),
        (&["--kernel", kernel, "--cpus", "bot=1"], "bot"),
        (&["--kernel", kernel, "--cpus", "boot=x"], "boot"),
        (&["--kernel", kernel, "--memory", "size=1Q"], "size"),
        (&["--kernel", kernel, "--memory", "colour=red"], "colour"),
        (&["--kernel", kernel, "--serial", "telepathy"], "telepathy"),
        (&["--memory", "size=64M"], "--kernel"),
        (&["--replicate", "destination_url=tcp:h:1"], "--kernel"),
        (&["--receive-replica", "receiver_url=tcp:h:1", "--kernel", kernel], "--receive-replica"),
        (&["--kernel", kernel, "--replicate", "destination_url=tcp:h:1,colour=red"], "colour"),
    ];
    for (arguments, named) in cases {
        let output = run(arguments)?;
        let text = complaint(&output);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {text}");
        assert!(text.contains(named), "{arguments:?} does not name '{named}': {text}");
    }
    Ok(())
}

#[test]
fn other_errors_exit_with_1_and_their_causes() -> Result<()> {
    let kernel = guest_image::PATH;
    let small = ["--memory", "size=64M", "--console", "off"];
    let cases: &[(&[&str], &[&str])] = &[
        (&["--kernel", "/nonexistent/kernel"], &["/nonexistent/kernel", "No such file"]),
        (&["--kernel", kernel, "--cpus", "boot=4,max=2"], &["boot_vcpus"]),
        (&["--kernel", kernel, "--memory", "size=0"], &["memory.size"]),
        (&["--kernel", kernel, "--serial", "file=/nonexistent/x"], &["/nonexistent/x"]),
        (&["--restore", "source_url=file:///nonexistent/s"], &["/nonexistent/s", "No such file"]),
        (&["--kernel", kernel, "--replicate", "destination_url=warp:h:1"], &["warp"]),
        (&["--receive-replica", "receiver_url=unix:/nonexistent/s"], &["/nonexistent/s"]),
        (
            &[
                "--receive-replica",
                "receiver_url=unix:/nonexistent/s,serial=null",
                "--serial",
                "off",
            ],
            &["--serial contradicts serial="],
        ),
    ];
    for (arguments, named) in cases {
        let has_memory = arguments.contains(&"--memory");
        let is_vm = arguments.contains(&"--kernel");
        let more: &[&str] = if is_vm && !has_memory { &small } else { &[] };
        let output = run(&[arguments, more].concat())?;
        let text = complaint(&output);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {text}");
        for named in *named {
            assert!(text.contains(named), "{arguments:?} does not name '{named}': {text}");
        }
        assert!(text.lines().count() >= 2, "{arguments:?} names no cause: {text}");
        assert!(!text.contains("panicked"), "{arguments:?}: {text}");
    }
    Ok(())
}

#[test]
fn a_vm_from_the_command_line_ends_with_0() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let output = folder.path().join("output");
    let serial = format!("file={}", output.display());
    let line = "workload=count tick_ms=10 ticks=3";
    let mut vmm = Vmm::spawn(
        folder.path(),
        "vmm",
        &[
            "--kernel",
            guest_image::PATH,
            "--cmdline",
            line,
            "--memory",
            "size=64M",
            "--serial",
            &serial,
            "--console",
            "off",
        ],
    )?;
    assert_eq!(vmm.wait_exit(LIMIT)?.code(), Some(0), "{}", vmm.log());
    assert!(std::fs::read_to_string(&output)?.contains("stopped ticks=3"));
    // The API socket of another process is not taken away from it.
    let other = std::os::unix::net::UnixListener::bind(folder.path().join("taken.sock"))?;
    let mut vmm = Vmm::spawn::<&str>(folder.path(), "taken", &[])?;
    assert_eq!(vmm.wait_exit(LIMIT)?.code(), Some(1), "{}", vmm.log());
    assert!(vmm.log().contains("taken.sock"), "{}", vmm.log());
    assert!(folder.path().join("taken.sock").exists());
    drop(other);
    Ok(())
}

/// A guest that goes on for ever, to be protected by whoever listens at a port.
fn protected_by(folder: &Path, name: &str, port: u16, timeout_ms: u32) -> Result<Vmm> {
    let replicate =
        format!("destination_url=tcp:127.0.0.1:{port},heartbeat_ms=100,timeout_ms={timeout_ms}");
    let small = ["--memory", "size=64M", "--serial", "off", "--console", "off"];
    let line = ["--kernel", guest_image::PATH, "--cmdline", "workload=count tick_ms=10"];
    Vmm::spawn(folder, name, &[&line[..], &small, &["--replicate", &replicate]].concat())
}

#[test]
fn a_backup_that_says_nothing_ends_the_process_with_1() -> Result<()> {
    let folder = tempfile::tempdir()?;
    // The kernel connects whoever comes.
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    let mut vmm = protected_by(folder.path(), "vmm", port, 300)?;
    assert_eq!(vmm.wait_exit(LIMIT)?.code(), Some(1), "{}", vmm.log());
    assert!(vmm.log().contains("Cannot protect the VM"), "{}", vmm.log());
    // Whoever waits long is told so, and may have enough of it.
    let mut vmm = protected_by(folder.path(), "patient", port, 600_000)?;
    vmm.wait("a word of the wait", LIMIT, |vmm| {
        vmm.log().contains("the backup has not answered").then_some(())
    })?;
    vmm.signal(libc::SIGTERM)?;
    assert_eq!(vmm.wait_exit(LIMIT)?.code(), Some(0), "{}", vmm.log());
    Ok(())
}
