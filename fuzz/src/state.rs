//! Machine states: of a peer's epoch, of a snapshot's file, of one virtio function.
//!
//! Beside "no panic": what decodes is encoded again to the same; a function's registers take a
//! state whole or are as after power-on, and a device that took one works on rings of any contents.

use std::sync::Arc;

use api::config::{ConsoleOutputMode, VmConfig};
use devices::pci::virtio::{BAR_BYTES, VirtioPci, VirtioPciState};
use devices::virtio::device::{GuestMemory, VirtioDevice};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm::ha::fuzzing as codec;
use vmm::machine::MachineState;

use crate::reach::reached;
use crate::{TURNS_MAX, blk, net, pci, rng};

/// What states are taken by, and whether the device works then.
pub const PLACES: &[&str] = &[
    "state: an epoch's",
    "state: an epoch's that fits",
    "state: a snapshot's",
    "state: a function's",
    "state: of a valid machine",
    "state: disk",
    "state: disk, active",
    "state: card",
    "state: card, active",
    "state: rng",
    "state: rng, active",
];

/// The driver is ready, the device is not broken.
const ACTIVE: u8 = 4;
const NEEDS_RESET: u8 = 0x40;

/// The first byte says whose state the rest is.
pub fn run(bytes: &[u8]) {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    match kind % 3 {
        0 => epoch(bytes),
        1 => snapshot(bytes),
        _ => {
            if let Ok((state, _)) = postcard::take_from_bytes::<VirtioPciState>(bytes) {
                reached("state: a function's");
                function(&state);
            }
        }
    }
}

/// The state in a seal.
fn epoch(bytes: &[u8]) {
    let Some(captured) = codec::decode(bytes) else { return };
    reached("state: an epoch's");
    let encoded = codec::encode(&captured);
    let again = codec::decode(&encoded).expect("what was encoded");
    assert_eq!(codec::encode(&again), encoded);
    let mut config = VmConfig::default();
    // As many as there are: the seeds are of machines without vCPUs.
    config.cpus.boot_vcpus = u32::try_from(captured.machine.vcpus.len()).unwrap_or(u32::MAX);
    if captured.machine.devices.platform.serial.is_none() {
        config.serial.mode = ConsoleOutputMode::Off;
    }
    config.console.mode = ConsoleOutputMode::Off;
    if codec::check(&captured, &config) {
        reached("state: an epoch's that fits");
    }
    machine(&captured.machine);
}

/// The machine in `state.json`.
fn snapshot(bytes: &[u8]) {
    let Ok(state) = serde_json::from_slice::<MachineState>(bytes) else { return };
    reached("state: a snapshot's");
    let text = serde_json::to_vec(&state).expect("a state that can be encoded");
    let again: MachineState = serde_json::from_slice(&text).expect("what was encoded");
    assert_eq!(serde_json::to_vec(&again).expect("as before"), text);
    machine(&state);
}

fn machine(state: &MachineState) {
    if state.validate().is_ok() {
        reached("state: of a valid machine");
        state.devices.pci.functions.iter().take(8).for_each(function);
    }
}

/// A state meets each kind of device.
fn function(state: &VirtioPciState) {
    let ranges = [(GuestAddress(0), 1 << 20)];
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).expect("memory"));
    let (disk, mut card) = (Arc::new(blk::idle()), net::idle());
    if load(state, &memory, Arc::clone(&disk) as _, ["state: disk", "state: disk, active"]) {
        for _ in 0..TURNS_MAX {
            disk.turn();
        }
    }
    if load(state, &memory, Arc::clone(&card.0) as _, ["state: card", "state: card, active"]) {
        card.1.iter_mut().for_each(|hand| {
            hand.turn();
        });
    }
    let rng = Arc::new(rng::idle());
    if load(state, &memory, Arc::clone(&rng) as _, ["state: rng", "state: rng, active"]) {
        let mut stock = Vec::new();
        for _ in 0..TURNS_MAX {
            rng.turn(&mut stock);
        }
    }
}

/// Whether `device` takes `state`; where that gets to, and where an active one does.
fn load(
    state: &VirtioPciState,
    memory: &Arc<GuestMemory>,
    device: Arc<dyn VirtioDevice>,
    [place, place_active]: [&'static str; 2],
) -> bool {
    let id = device.id().to_owned();
    let slot = state.slot % 32;
    let base = BAR_BYTES * (1 + u64::from(slot));
    let function = VirtioPci::new(slot, base, device, pci::host(memory)).expect("a function");
    let fresh = function.save();
    function.device().park();
    // Whose state it is, is the first that is asked.
    let state = VirtioPciState { id, slot, ..state.clone() };
    let taken = function.restore(&state).is_ok();
    if taken {
        reached(place);
        if state.common.status & (ACTIVE | NEEDS_RESET) == ACTIVE {
            reached(place_active);
        }
        function.nudge();
    } else {
        let now = function.save();
        let same = now.common == fresh.common && now.msix == fresh.msix;
        assert!(same && now.config == fresh.config, "refused, and not as after power-on: {now:?}");
    }
    function.device().unpark();
    taken
}
