//! Pairs whose ownership is in a real etcd cluster.

use anyhow::{Context, Result, ensure};
use api::replication::ReplicationState;
use api::response::VmState;
use etcd_server::{Cluster, request};
use serde_json::{Value, json};
use understudy_tests::pair::{Pair, Setup};
use understudy_tests::scene::{self, LIMIT};

/// Peers that nobody freezes are not to be suspected, however busy the machine.
const PATIENT: &str = ",timeout_ms=20000";
const KEY: &str = "pairs/vm1";
/// The same in base64, as the gateway wants it.
const KEY_ENCODED: &str = "cGFpcnMvdm0x";

fn setup(cluster: &Cluster) -> Setup {
    let mut setup = Setup::verify(2, "64M");
    setup.replicate_options = PATIENT.to_owned();
    setup.receive_options = PATIENT.to_owned();
    setup.arbiter_url = Some(cluster.arbiter(KEY));
    setup
}

/// What a living member says of the key: how often it was written.
fn writes(cluster: &Cluster, member: usize) -> Result<u64> {
    let body = json!({"key": KEY_ENCODED}).to_string();
    let at = cluster.client(member).into();
    let (status, text) = request(at, "POST", "/v3/kv/range", &[], &body)?;
    ensure!(status == 200, "status {status}: {text}");
    let answer: Value = serde_json::from_str(&text)?;
    Ok(answer["kvs"][0]["version"].as_str().context("no record")?.parse()?)
}

#[test]
fn a_killed_primary_is_replaced_though_a_member_is_dead() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut cluster = Cluster::start(3)?;
    let mut pair = scene::protected(folder.path(), &setup(&cluster))?;
    assert_eq!(writes(&cluster, 0)?, 1);
    // The one that both sides ask first.
    cluster.kill(0)?;
    pair.primary.kill()?;
    let info = pair.backup.wait_state(ReplicationState::TakenOver, LIMIT)?;
    assert_eq!(info.generation, 2);
    assert_eq!(writes(&cluster, 1)?, 2);
    pair.backup_serial.wait_more("verify ok", 3, LIMIT)?;
    pair.backup_serial.verdict(LIMIT)?;
    let status = pair.backup.wait_exit(LIMIT)?;
    ensure!(status.success(), "the backup ended with {status}:\n{}", pair.backup.log());
    Ok(())
}

#[test]
fn without_a_majority_the_backup_waits() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut cluster = Cluster::start(3)?;
    let mut pair = scene::protected(folder.path(), &setup(&cluster))?;
    cluster.kill(0)?;
    cluster.kill(1)?;
    // A healthy pair does not notice.
    pair.primary_serial.wait_more("verify ok", 3, LIMIT)?;
    assert_eq!(pair.primary.replication()?.state, ReplicationState::Protected);
    pair.primary.kill()?;
    let error = pair.backup.wait("an arbiter that cannot be asked", LIMIT, |vmm| {
        vmm.replication().ok()?.last_error.filter(|error| error.contains("No etcd server"))
    })?;
    assert!(error.contains(&cluster.url(2)), "{error}");
    let info = pair.backup.replication()?;
    assert_eq!(info.state, ReplicationState::TakingOver);
    assert_eq!(pair.backup_serial.text(), "");
    cluster.restart(0)?;
    pair.backup.wait_state(ReplicationState::TakenOver, LIMIT)?;
    pair.backup_serial.wait_more("verify ok", 3, LIMIT)?;
    pair.backup_serial.verdict(LIMIT)?;
    Ok(())
}

#[test]
fn a_key_of_another_vm_is_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cluster = Cluster::start(1)?;
    let pair: Pair = scene::protected(folder.path(), &setup(&cluster))?;
    let (other, serial) =
        scene::running(folder.path(), "other", "workload=verify vcpus=1 tick_ms=20")?;
    let body = json!({
        "destination_url": "tcp:127.0.0.1:1", "arbiter": cluster.arbiter(KEY), "timeout_ms": 20000,
    });
    let text = other.put_expect("vm.replicate", Some(&body.to_string()), 409)?;
    assert!(text.contains("key of its own"), "no way out is named: {text}");
    assert_eq!(other.vm_state()?, VmState::Running);
    // A cluster that is not there, and a file that is not: named at once.
    let body = json!({
        "destination_url": "tcp:127.0.0.1:1", "arbiter": "etcd:http://127.0.0.1:1",
        "timeout_ms": 20000,
    });
    let text = other.put_expect("vm.replicate", Some(&body.to_string()), 500)?;
    assert!(text.contains("http://127.0.0.1:1") && text.contains("refused"), "{text}");
    let body = json!({
        "destination_url": "tcp:127.0.0.1:1", "arbiter": cluster.arbiter(KEY),
        "arbiter_credentials": folder.path().join("none"),
    });
    let text = other.put_expect("vm.replicate", Some(&body.to_string()), 400)?;
    assert!(text.contains("arbiter_credentials") && text.contains("none"), "{text}");
    serial.wait_more("verify ok", 2, LIMIT)?;
    assert_eq!(writes(&cluster, 0)?, 1);
    pair.primary_serial.wait_more("verify ok", 2, LIMIT)?;
    assert_eq!(pair.primary.replication()?.state, ReplicationState::Protected);
    Ok(())
}
