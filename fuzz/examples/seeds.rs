//! Writes inputs to begin with: `seeds FOLDER` makes FOLDER/TARGET/seed-N. Only for targets whose
//! inputs are bytes as they are; those that are made of [`arbitrary`] values find theirs themselves.

use std::path::Path;
use std::sync::Arc;
use std::{env, fs, io};

use devices::pci::config::ConfigState;
use devices::pci::virtio::{BAR_BYTES, VirtioPci, VirtioPciState};
use devices::virtio::device::VirtioDevice;
use understudy_fuzz::{blk, net, pci};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm::device_manager::pci::PciState;
use vmm::device_manager::{DevicesState, PlatformState};
use vmm::ha::fuzzing as codec;
use vmm::machine::MachineState;

/// Bytes of the kernel's `struct kvm_irqchip`, which begins with its number.
const IRQCHIP_BYTES: usize = 520;
const DRIVER_OK: u8 = 0xf;

fn functions() -> Vec<VirtioPciState> {
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
    let (disk, card) = (Arc::new(blk::idle()), net::idle());
    let devices: [Arc<dyn VirtioDevice>; 2] = [disk, card.0];
    let state = |(slot, device): (u8, Arc<dyn VirtioDevice>)| {
        let features = device.features() | 1 << 32;
        let base = BAR_BYTES * (1 + u64::from(slot));
        let function = VirtioPci::new(slot, base, device, pci::host(&memory)).unwrap();
        let mut state = function.save();
        state.common.driver_features = features;
        state.common.status = DRIVER_OK;
        for (queue, at) in state.common.queues.iter_mut().zip((0x1000..).step_by(0x4000)) {
            (queue.desc, queue.avail, queue.used) = (at, at + 0x1000, at + 0x2000);
            (queue.size, queue.enabled) = (16, true);
        }
        state
    };
    (1..).zip(devices).map(state).collect()
}

fn machine(functions: Vec<VirtioPciState>) -> MachineState {
    // The clock, then each controller behind its length.
    let mut bytes = postcard::to_stdvec(&0_u64).unwrap();
    for id in 0..3_u8 {
        let mut chip = vec![0; IRQCHIP_BYTES];
        chip[0] = id;
        bytes.extend(postcard::to_stdvec(&chip).unwrap());
    }
    let platform = PlatformState {
        serial: Some(Default::default()),
        pm: Default::default(),
        cmos: Default::default(),
        i8042: Default::default(),
        wish: None,
    };
    let bridge = ConfigState { registers: vec![0; 64] };
    let devices = DevicesState { platform, pci: PciState { address: 0, bridge, functions } };
    MachineState { vcpus: Vec::new(), vm: postcard::from_bytes(&bytes).unwrap(), devices }
}

fn states() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for functions in [Vec::new(), functions()] {
        seeds.extend(
            functions.iter().map(|it| [vec![2], postcard::to_stdvec(it).unwrap()].concat()),
        );
        let machine = machine(functions);
        seeds.push([vec![1], serde_json::to_vec(&machine).unwrap()].concat());
        seeds.push([vec![0], codec::encode(&codec::Captured { machine, paused: true })].concat());
    }
    seeds
}

fn requests() -> Vec<Vec<u8>> {
    let with_body = |name: &str, body: &str| {
        let head = format!("PUT /api/v1/{name} HTTP/1.1\r\nContent-Length: {}\r\n\r\n", body.len());
        format!("\0{head}{body}")
    };
    let texts = [
        "\0GET /api/v1/vmm.ping HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n".to_owned(),
        "\0PUT /api/v1/vm.boot HTTP/1.1\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
            .to_owned(),
        with_body(
            "vm.create",
            r#"{"cpus":{"boot_vcpus":1,"max_vcpus":2},"memory":{"size":1048576}}"#,
        ),
        with_body("vm.create", r#"{"payload":{"kernel":"k"},"disks":[{"path":"d","id":"a"}]}"#),
        with_body("vm.add-net", r#"{"tap":"t","mac":"52:54:00:12:34:56","num_queues":2}"#),
        with_body("vm.restore", r#"{"source_url":"file:///s","prefault":true}"#),
        with_body("vm.replicate", r#"{"destination_url":"tcp:h:1","epoch_ms":20}"#),
        with_body("vm.receive-replica", r#"{"receiver_url":"unix:/s"}"#),
    ];
    texts.map(String::into_bytes).into()
}

fn options() -> Vec<Vec<u8>> {
    let texts = [
        (0, "a=\"x,y\",b=[1,2,[3,4]],size=4K"),
        (1, "file=/tmp/x"),
        (2, "path=/d,readonly=on,num_queues=2,queue_size=64,id=a,queue_affinity=[0@[1,2-3]]"),
        (3, "tap=t,mac=52:54:00:12:34:56,ip=10.0.0.1,mask=255.0.0.0,num_queues=2,fd=[3,4]"),
        (4, "src=/dev/urandom"),
        (5, "boot=2,max=4,topology=1:2:1:1,affinity=[0@[1,2-3]]"),
        (6, "size=512M,shared=on,hugepages=on,hugepage_size=2M,prefault=off"),
        (7, "uuid=x,oem_strings=[a,b]"),
        (8, "path=/s"),
        (9, "fd=3"),
        (10, "source_url=file:///s,prefault=on"),
        (11, "destination_url=tcp:[::1]:4000,epoch_ms=20,cow=copy,arbiter=file:/a,timeout_ms=900"),
        (12, "receiver_url=unix:/s,staging_size=1G,serial=file:/s,disks=[a@/b,c@/d],net=[a@b]"),
        (13, "tcp:localhost:4000"),
    ];
    texts.iter().map(|(which, text)| [&[*which], text.as_bytes()].concat()).collect()
}

fn main() -> io::Result<()> {
    let folder = env::args_os().nth(1).ok_or_else(|| io::Error::other("usage: seeds FOLDER"))?;
    for (target, seeds) in [("state", states()), ("http", requests()), ("options", options())] {
        let folder = Path::new(&folder).join(target);
        fs::create_dir_all(&folder)?;
        for (number, seed) in seeds.iter().enumerate() {
            fs::write(folder.join(format!("seed-{number}")), seed)?;
        }
    }
    Ok(())
}
