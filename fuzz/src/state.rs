//! Machine states: of a peer's epoch, of a snapshot's file, of one virtio function.
//!
//! Beside "no panic": what decodes is encoded again to the same; a function's registers take a
//! state whole or are as after power-on, and a device that took one works on rings of any contents.

use std::sync::Arc;

use api::config::VmConfig;
use devices::pci::virtio::{BAR_BYTES, VirtioPci, VirtioPciState};
use devices::virtio::device::{GuestMemory, VirtioDevice};
use devices::virtio::rng::Rng;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm::ha::fuzzing as codec;
use vmm::machine::MachineState;

use crate::{TURNS_MAX, blk, net, pci};

/// The first byte says whose state the rest is.
pub fn run(bytes: &[u8]) {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    match kind % 3 {
        0 => epoch(bytes),
        1 => snapshot(bytes),
        _ => {
            if let Ok((state, _)) = postcard::take_from_bytes::<VirtioPciState>(bytes) {
                function(&state);
            }
        }
    }
}

/// The state in a seal.
fn epoch(bytes: &[u8]) {
    let Some(captured) = codec::decode(bytes) else { return };
    let encoded = codec::encode(&captured);
    let again = codec::decode(&encoded).expect("what was encoded");
    assert_eq!(codec::encode(&again), encoded);
    let _ = codec::check(&captured, &VmConfig::default());
    machine(&captured.machine);
}

/// The machine in `state.json`.
fn snapshot(bytes: &[u8]) {
    let Ok(state) = serde_json::from_slice::<MachineState>(bytes) else { return };
    let text = serde_json::to_vec(&state).expect("a state that can be encoded");
    let again: MachineState = serde_json::from_slice(&text).expect("what was encoded");
    assert_eq!(serde_json::to_vec(&again).expect("as before"), text);
    machine(&state);
}

fn machine(state: &MachineState) {
    if state.validate().is_ok() {
        state.devices.pci.functions.iter().take(8).for_each(function);
    }
}

/// A state meets each kind of device.
fn function(state: &VirtioPciState) {
    let ranges = [(GuestAddress(0), 1 << 20)];
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).expect("memory"));
    let (disk, mut card) = (Arc::new(blk::idle()), net::idle());
    if load(state, &memory, Arc::clone(&disk) as _) {
        for _ in 0..TURNS_MAX {
            disk.turn();
        }
    }
    if load(state, &memory, Arc::clone(&card.0) as _) {
        card.1.iter_mut().for_each(|hand| {
            hand.turn();
        });
    }
    let rng = Rng::new("_rng0", "/dev/zero".into()).expect("descriptors");
    rng.work_by_hand();
    rng.attach().expect("/dev/zero");
    let rng = Arc::new(rng);
    if load(state, &memory, Arc::clone(&rng) as _) {
        let mut stock = Vec::new();
        for _ in 0..TURNS_MAX {
            rng.turn(&mut stock);
        }
    }
}

fn load(state: &VirtioPciState, memory: &Arc<GuestMemory>, device: Arc<dyn VirtioDevice>) -> bool {
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
        function.nudge();
    } else {
        let now = function.save();
        let same = now.common == fresh.common && now.msix == fresh.msix;
        assert!(same && now.config == fresh.config, "refused, and not as after power-on: {now:?}");
    }
    function.device().unpark();
    taken
}
