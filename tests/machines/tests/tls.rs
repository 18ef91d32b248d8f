//! A pair whose connections go by TLS, with certificates that `scripts/make-certificates.sh` makes, as the
//! operator's guide has it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use api::replication::{ReplicationState, Role};
use understudy_tests::pair::{Setup, free_port, start_backup};
use understudy_tests::process::binary;
use understudy_tests::scene::{self, LIMIT, records};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/make-certificates.sh");
const PATIENT: &str = ",timeout_ms=20000";

/// A directory of certificates for a backup at `host`.
fn certificates(folder: &Path, name: &str, host: &str) -> Result<PathBuf> {
    let directory = folder.join(name);
    let made = Command::new("bash").arg(SCRIPT).arg(&directory).arg(host).output()?;
    ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    Ok(directory)
}

fn setup(directory: &Path) -> Setup {
    let mut setup = Setup::verify(2, "64M");
    let options = format!("{PATIENT},tls_dir={}", directory.display());
    setup.replicate_options.clone_from(&options);
    setup.receive_options = options;
    setup
}

#[test]
fn a_killed_primary_is_replaced() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let directory = certificates(folder.path(), "tls", "127.0.0.1")?;
    let mut setup = setup(&directory);
    setup.replicate_options.push_str(",connections=3");
    let mut pair = scene::protected(folder.path(), &setup)?;
    for vmm in [&pair.primary, &pair.backup] {
        assert_eq!(vmm.replication()?.transport.as_deref(), Some("tcp+tls"));
    }
    // Certificates are read when a side starts, and not again.
    std::fs::remove_dir_all(&directory)?;
    pair.primary_serial.wait_more("verify ok", 5, LIMIT)?;
    pair.primary.kill()?;
    pair.backup.wait_state(ReplicationState::TakenOver, LIMIT)?;
    let last = records(&pair.arbiter)?.pop().context("no record")?;
    ensure!(last["standing"]["solo"]["owner"].is_string(), "nobody owns it alone: {last}");
    pair.backup_serial.wait_more("verify ok", 3, LIMIT)?;
    pair.backup_serial.verdict(LIMIT)?;
    let status = pair.backup.wait_exit(LIMIT)?;
    ensure!(status.success(), "it ended with {status}:\n{}", pair.backup.log());
    Ok(())
}

/// What `ch-remote replicate` says that must fail.
fn refused(socket: &Path, options: &str) -> Result<String> {
    let output = Command::new(binary("ch-remote")?)
        .arg(format!("--api-socket={}", socket.display()))
        .args(["replicate", options])
        .output()?;
    ensure!(output.status.code() == Some(1), "it ended with {}", output.status);
    Ok(String::from_utf8(output.stderr)?)
}

#[test]
fn a_certificate_that_does_not_fit_is_refused_with_the_reason() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let good = certificates(folder.path(), "good", "127.0.0.1")?;
    let other = certificates(folder.path(), "other", "127.0.0.1")?;
    let elsewhere = certificates(folder.path(), "elsewhere", "b.example")?;
    let mut setup = setup(&good);
    setup.arbiter = false;
    let port = free_port()?;
    let url = format!("tcp:127.0.0.1:{port}");
    let mut backup = start_backup(folder.path(), "backup", &url, &setup)?;
    let (mut primary, serial) =
        scene::running(folder.path(), "primary", "workload=verify tick_ms=20")?;
    let options = |directory: &Path| {
        format!("destination_url={url}{PATIENT},tls_dir={}", directory.display())
    };
    let mut noted = |text: &str| -> Result<()> {
        backup.wait(&format!("'{text}' in last_error"), LIMIT, |vmm| {
            vmm.replication().ok()?.last_error.filter(|error| error.contains(text)).map(drop)
        })
    };
    let said = refused(primary.socket(), &options(&other))?;
    let reason = "The backup's certificate is refused: it is not of the authority of ca-cert.pem";
    assert!(said.contains(reason), "{said}");
    noted("The primary refuses this side's certificate: it is not of the authority")?;
    // A primary that trusts the backup and is not trusted.
    std::fs::copy(good.join("ca-cert.pem"), other.join("ca-cert.pem"))?;
    let said = refused(primary.socket(), &options(&other))?;
    let reason = "client-cert.pem' cannot be used: it is not of the authority of ca-cert.pem";
    assert!(said.contains(reason), "{said}");
    let said = refused(primary.socket(), &format!("destination_url={url}{PATIENT}"))?;
    assert!(said.contains("The peer speaks TLS and this side does not"), "{said}");
    noted("The primary speaks no TLS: give tls_dir to both sides, or to neither")?;
    let mut second = setup.clone();
    second.receive_options = format!("{PATIENT},tls_dir={}", elsewhere.display());
    let port = free_port()?;
    let far = format!("tcp:127.0.0.1:{port}");
    let _second = start_backup(folder.path(), "second", &far, &second)?;
    std::fs::copy(elsewhere.join("ca-cert.pem"), other.join("ca-cert.pem"))?;
    for file in ["client-cert.pem", "client-key.pem"] {
        std::fs::copy(elsewhere.join(file), other.join(file))?;
    }
    let said = refused(
        primary.socket(),
        &format!("destination_url={far}{PATIENT},tls_dir={}", other.display()),
    )?;
    assert!(said.contains("the host of destination_url is not among its names"), "{said}");
    // The guest went on, and the right certificates serve it still.
    serial.wait_more("verify ok", 3, LIMIT)?;
    let body = options(&good).parse::<api::replication::ReplicateData>()?;
    primary.put_ok("vm.replicate", Some(&serde_json::to_string(&body)?))?;
    let info = primary.wait_state(ReplicationState::Protected, LIMIT)?;
    assert_eq!(info.role, Role::Primary);
    Ok(())
}
