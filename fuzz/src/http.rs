//! The REST interface: bytes of a client up to the request that the control loop would get.
//!
//! Beside "no panic": a head is found in the same way wherever its bytes are cut; limits hold; a
//! configuration that is accepted is the same after it was written out and read again.

use vmm::http::fuzzing::{First, first};
use vmm::http::{BODY_BYTES_MAX, HEAD_BYTES_MAX};
use vmm::request::Request;

use crate::reach::reached;

/// Routes with a request that the control loop would get.
pub const PLACES: &[&str] = &[
    "vmm.ping",
    "vmm.shutdown",
    "vm.create",
    "vm.delete",
    "vm.boot",
    "vm.pause",
    "vm.resume",
    "vm.shutdown",
    "vm.reboot",
    "vm.power-button",
    "vm.info",
    "vm.counters",
    "vm.add-disk",
    "vm.add-net",
    "vm.snapshot",
    "vm.restore",
    "vm.send-migration",
    "vm.receive-migration",
    "vm.replicate",
    "vm.receive-replica",
    "vm.stop-replication",
    "vm.failover",
    "vm.replication-info",
];

/// The first byte says how many descriptors come along.
pub fn run(bytes: &[u8]) {
    let Some((descriptors, bytes)) = bytes.split_first() else { return };
    let descriptors = usize::from(descriptors % 4);
    let found = first(bytes, descriptors);
    let (head, body) = match &found {
        First::Incomplete => (bytes.len(), 0),
        First::Refused { line } => {
            assert!(line.starts_with("HTTP/1.1 4"), "{line}");
            return;
        }
        First::Request { head, body, .. } | First::Unrouted { head, body, .. } => (*head, *body),
    };
    assert!(head <= HEAD_BYTES_MAX && body as u64 <= BODY_BYTES_MAX || found.is_incomplete());
    // Fewer bytes: more are waited for, or what is wrong is known already.
    for cut in [head / 2, head.saturating_sub(1)] {
        let early = first(&bytes[..cut], descriptors);
        assert!(early.is_incomplete() || cut == head, "{early:?} of {cut} bytes, then {found:?}");
    }
    match found {
        First::Request { request, .. } => {
            reached(route(&request));
            accepted(request);
        }
        First::Unrouted { line, .. } => assert!(line.starts_with("HTTP/1.1 4"), "{line}"),
        First::Incomplete | First::Refused { .. } => {}
    }
}

fn route(request: &Request) -> &'static str {
    match request {
        Request::VmmPing => "vmm.ping",
        Request::VmmShutdown => "vmm.shutdown",
        Request::VmCreate(_) => "vm.create",
        Request::VmDelete => "vm.delete",
        Request::VmBoot => "vm.boot",
        Request::VmPause => "vm.pause",
        Request::VmResume => "vm.resume",
        Request::VmShutdown => "vm.shutdown",
        Request::VmReboot => "vm.reboot",
        Request::VmPowerButton => "vm.power-button",
        Request::VmInfo => "vm.info",
        Request::VmCounters => "vm.counters",
        Request::VmAddDisk(_) => "vm.add-disk",
        Request::VmAddNet(_) => "vm.add-net",
        Request::VmSnapshot(_) => "vm.snapshot",
        Request::VmRestore(_) => "vm.restore",
        Request::VmSendMigration(_) => "vm.send-migration",
        Request::VmReceiveMigration(_) => "vm.receive-migration",
        Request::VmReplicate(_) => "vm.replicate",
        Request::VmReceiveReplica(_) => "vm.receive-replica",
        Request::VmStopReplication => "vm.stop-replication",
        Request::VmFailover(_) => "vm.failover",
        Request::VmReplicationInfo => "vm.replication-info",
    }
}

fn accepted(request: Request) {
    if let Request::VmCreate(config) = request {
        let _ = config.validate_boot();
        let _ = config.unsupported();
        let text = serde_json::to_string(&config).expect("a configuration that can be written");
        let again = serde_json::from_str(&text).expect("what was written");
        assert_eq!(*config, again);
    }
}
