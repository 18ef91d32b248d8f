//! Against real etcd servers, against what is none, and against a script.

mod cluster;
mod hostile;
mod login;
mod order;
mod proxy;
mod swap;
mod tls;
mod unknown;

use anyhow::{Context, Result, ensure};
use etcd_server::{Cluster, request};
use serde_json::{Value, json};
use uuid::Uuid;

use super::*;
use crate::ownership::{HostId, Standing as Who, VmId};
use crate::protocol::ownership::{Action, Claim, Event, Verdict};

const KEY: &str = "vm1";

/// An arbiter of an option's value.
fn arbiter_with(url: &str, access: Access) -> Result<EtcdArbiter> {
    match url.parse()? {
        api::endpoint::ArbiterUrl::Etcd(cluster) => {
            Ok(EtcdArbiter::new(cluster, access).map_err(|(_, error)| error)?)
        }
        other => anyhow::bail!("{other} is not etcd"),
    }
}

fn arbiter(url: &str) -> Result<EtcdArbiter> {
    arbiter_with(url, Access::default())
}

fn solo(generation: u64, vm: VmId) -> Record {
    let standing = Who::Solo { owner: HostId(Uuid::new_v4()) };
    Record { generation: Generation(generation), vm, standing }
}

fn vm() -> VmId {
    VmId(Uuid::new_v4())
}

/// Calls a member's gateway as anybody could.
fn gateway(cluster: &Cluster, path: &str, body: &Value, headers: &[(&str, &str)]) -> Result<Value> {
    let (status, text) =
        request(cluster.client(0).into(), "POST", path, headers, &body.to_string())?;
    ensure!(status == 200, "{path}: status {status}: {text}");
    serde_json::from_str(&text).with_context(|| text)
}

/// Writes whatever into the key.
fn put(cluster: &Cluster, value: &[u8]) -> Result<()> {
    let (key, value) = (encoded(KEY.as_bytes()), encoded(value));
    gateway(cluster, "/v3/kv/put", &json!({"key": key, "value": value}), &[]).map(drop)
}

/// How often the key was written since it was created.
fn writes(cluster: &Cluster) -> Result<u64> {
    let body = json!({"key": encoded(KEY.as_bytes())});
    let answer = gateway(cluster, "/v3/kv/range", &body, &[])?;
    let version = answer["kvs"][0]["version"].as_str().context("no version")?;
    Ok(version.parse()?)
}

fn encoded(bytes: &[u8]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

/// Carries a claim through as an engine does; also how many of its calls failed.
fn claim(arbiter: &dyn Arbiter, expected: u64, next: Record) -> (Verdict, u32) {
    let (mut claim, mut action) = Claim::new(Generation(expected), next);
    let mut failures = 0;
    loop {
        let answer = match action {
            Action::Decide(verdict) => return (verdict, failures),
            Action::Wait { ms } => {
                std::thread::sleep(std::time::Duration::from_millis(ms));
                Ok(Event::Timer)
            }
            Action::Read { .. } => arbiter.read().map(Event::Read),
            Action::Swap { expected, next } => {
                arbiter.compare_and_swap(expected, &next).map(Event::Swapped)
            }
        };
        failures += u32::from(answer.is_err());
        action = claim.step(answer.unwrap_or(Event::Failed)).expect("the claim goes on");
    }
}
