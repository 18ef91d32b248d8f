//! Which path is which request. Pure: bytes of a client in, a request or the reason why there
//! is none out. Whether a configuration makes sense is for the control loop to say.

use api::config::{DiskConfig, NetConfig, VmConfig};
use api::invalid::Invalid;
use serde::de::DeserializeOwned;

use super::head::Method;
use super::response::Status;
use crate::request::Request;

/// Where all routes lie.
const PREFIX: &str = "/api/v1/";

/// A request that does not reach the control loop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: Status,
    /// Outermost cause first.
    pub(super) chain: Vec<String>,
}

impl Refusal {
    fn bad(message: impl Into<String>) -> Self {
        Self { status: Status::BadRequest, chain: vec![message.into()] }
    }
}

/// How a route gets its request.
enum Parse {
    /// There is no body.
    Bodyless(Request),
    /// There is a body of JSON.
    Json(fn(&str, &[u8]) -> Result<Request, Refusal>),
}

/// The request that a client makes.
pub(super) fn route(
    method: Method,
    path: &str,
    body: &[u8],
    descriptors: usize,
) -> Result<Request, Refusal> {
    let unknown = || Refusal {
        status: Status::NotFound,
        chain: vec![format!("Route is unknown: {}", shortened(path))],
    };
    let name = path.strip_prefix(PREFIX).ok_or_else(unknown)?;
    let (expected, parse) = table(name).ok_or_else(unknown)?;
    if method != expected {
        let wanted = if expected == Method::Get { "GET" } else { "PUT" };
        return Err(Refusal::bad(format!("{name} takes the method {wanted}")));
    }
    let request = match parse {
        Parse::Bodyless(_) if !body.is_empty() => {
            return Err(Refusal::bad(format!("{name} takes no body")));
        }
        Parse::Json(_) if body.is_empty() => {
            return Err(Refusal::bad(format!("{name} needs a body")));
        }
        Parse::Bodyless(request) => request,
        Parse::Json(parse) => parse(name, body)?,
    };
    let (wanted, optional) = descriptors_of(&request);
    if descriptors != wanted && !(optional && descriptors == 0) {
        let message = format!("{name} takes {wanted} descriptors here, {descriptors} came");
        return Err(Refusal::bad(message));
    }
    Ok(request)
}

fn table(name: &str) -> Option<(Method, Parse)> {
    use Method::{Get, Put};
    use Parse::{Bodyless, Json};
    Some(match name {
        "vmm.ping" => (Get, Bodyless(Request::VmmPing)),
        "vmm.shutdown" => (Put, Bodyless(Request::VmmShutdown)),
        "vm.create" => (Put, Json(|name, body| Ok(Request::VmCreate(json(name, body)?)))),
        "vm.delete" => (Put, Bodyless(Request::VmDelete)),
        "vm.boot" => (Put, Bodyless(Request::VmBoot)),
        "vm.pause" => (Put, Bodyless(Request::VmPause)),
        "vm.resume" => (Put, Bodyless(Request::VmResume)),
        "vm.shutdown" => (Put, Bodyless(Request::VmShutdown)),
        "vm.reboot" => (Put, Bodyless(Request::VmReboot)),
        "vm.power-button" => (Put, Bodyless(Request::VmPowerButton)),
        "vm.info" => (Get, Bodyless(Request::VmInfo)),
        "vm.counters" => (Get, Bodyless(Request::VmCounters)),
        "vm.snapshot" => (Put, Json(|name, body| Ok(Request::VmSnapshot(json(name, body)?)))),
        "vm.restore" => (Put, Json(|name, body| Ok(Request::VmRestore(json(name, body)?)))),
        "vm.send-migration" => {
            (Put, Json(|name, body| Ok(Request::VmSendMigration(json(name, body)?))))
        }
        "vm.receive-migration" => {
            (Put, Json(|name, body| Ok(Request::VmReceiveMigration(json(name, body)?))))
        }
        "vm.add-disk" => (Put, Json(add_disk)),
        "vm.add-net" => (Put, Json(add_net)),
        "vm.replicate" => (Put, Json(|name, body| Ok(Request::VmReplicate(json(name, body)?)))),
        "vm.receive-replica" => {
            (Put, Json(|name, body| Ok(Request::VmReceiveReplica(json(name, body)?))))
        }
        "vm.stop-replication" => (Put, Bodyless(Request::VmStopReplication)),
        "vm.failover" => (Put, Json(|name, body| Ok(Request::VmFailover(json(name, body)?)))),
        "vm.replication-info" => (Get, Bodyless(Request::VmReplicationInfo)),
        _ => return None,
    })
}

fn add_disk(name: &str, body: &[u8]) -> Result<Request, Refusal> {
    let disk: DiskConfig = json(name, body)?;
    let config = VmConfig { disks: Some(vec![disk.clone()]), ..VmConfig::default() };
    check_device(name, &config)?;
    Ok(Request::VmAddDisk(Box::new(disk)))
}

fn add_net(name: &str, body: &[u8]) -> Result<Request, Refusal> {
    let card: NetConfig = json(name, body)?;
    let config = VmConfig { net: Some(vec![card.clone()]), ..VmConfig::default() };
    check_device(name, &config)?;
    Ok(Request::VmAddNet(Box::new(card)))
}

/// Everything that is wrong with a device that no VM of this version can have.
fn check_device(name: &str, config: &VmConfig) -> Result<(), Refusal> {
    let mut chain = vec![format!("{name} is refused")];
    chain.extend(config.validate().iter().chain(&config.unsupported()).map(Invalid::line));
    if chain.len() == 1 { Ok(()) } else { Err(Refusal { status: Status::BadRequest, chain }) }
}

fn json<T: DeserializeOwned>(name: &str, body: &[u8]) -> Result<T, Refusal> {
    // serde would take an array for the fields in their order, and an empty one for a default.
    if body.trim_ascii_start().first() == Some(&b'[') {
        return Err(Refusal::bad(format!("The body of {name} is an array, not an object")));
    }
    serde_json::from_slice(body).map_err(|error| Refusal {
        status: Status::BadRequest,
        chain: vec![format!("Cannot parse the body of {name}"), error.to_string()],
    })
}

/// How many descriptors a request must bring, and whether it may also bring none.
fn descriptors_of(request: &Request) -> (usize, bool) {
    match request {
        Request::VmRestore(restore) => {
            let nets = restore.net_fds.iter().flatten();
            (nets.fold(0, |sum: usize, net| sum.saturating_add(net.num_fds)), false)
        }
        // One for each queue pair, where the card has its tap that way.
        Request::VmAddNet(card) => (card.num_queues / 2, true),
        _ => (0, false),
    }
}

/// Enough of a path to recognise it.
fn shortened(path: &str) -> String {
    const SHOWN: usize = 120;
    path.chars().take(SHOWN).collect()
}
