//! Inputs to begin with, the same each time.
//!
//! Where inputs are bytes as they are, seeds are good ones. Inputs that are made of [`arbitrary`]
//! values have seeds of a generator: libFuzzer begins with a few bytes, and would take hours to come
//! to inputs of some length by itself.

/// How many of a generator there are.
const GENERATED: usize = 200;
const GENERATED_BYTES_MAX: u64 = 1024;

/// The seeds of a target.
#[must_use]
pub fn of(target: &str) -> Vec<Vec<u8>> {
    match target {
        "options" => options(),
        "etcd" => answers(),
        #[cfg(feature = "machine")]
        "http" => requests(),
        #[cfg(feature = "machine")]
        "state" => states::all(),
        _ => {
            let mut generator = Generator::new();
            (0..GENERATED).map(|_| generator.input()).collect()
        }
    }
}

/// xorshift64*, of Vigna, "An experimental exploration of Marsaglia's xorshift generators".
pub struct Generator(u64);

impl Generator {
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        Self(0x5eed)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        // Its high bits are the better ones.
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % end
    }

    pub fn byte(&mut self) -> u8 {
        self.below(256).to_le_bytes()[0]
    }

    fn input(&mut self) -> Vec<u8> {
        let len = self.below(GENERATED_BYTES_MAX);
        // Lists within an input have an odd byte before each element.
        let odd = self.below(2) * self.below(8);
        let mut byte = || self.byte() | u8::from(self.below(8) < odd);
        (0..len).map(|_| byte()).collect()
    }
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
        (
            11,
            "destination_url=unix:/s,arbiter=\"etcd:http://a,https://[::1]:1/k\",arbiter_tls_dir=/t",
        ),
        (12, "receiver_url=unix:/s,staging_size=1G,serial=file:/s,disks=[a@/b,c@/d],net=[a@b]"),
        (13, "tcp:localhost:4000"),
    ];
    texts.iter().map(|(which, text)| [&[*which], text.as_bytes()].concat()).collect()
}

const SOLO: &str = r#"{"generation":2,"vm":"6e5c8a9e-0000-4000-8000-000000000001","standing":{"solo":{"owner":"6e5c8a9e-0000-4000-8000-000000000002"}}}"#;
const PAIR: &str = r#"{"generation":1,"vm":"6e5c8a9e-0000-4000-8000-000000000001","standing":{"pair":{"primary":"6e5c8a9e-0000-4000-8000-000000000002","backup":"6e5c8a9e-0000-4000-8000-000000000003"}}}"#;
/// [`SOLO`] as the gateway has it, in base64.
const SOLO_ENCODED: &str = "eyJnZW5lcmF0aW9uIjoyLCJ2bSI6IjZlNWM4YTllLTAwMDAtNDAwMC04MDAwLTAwMDAwMDAwMDAwMSIsInN0YW5kaW5nIjp7InNvbG8iOnsib3duZXIiOiI2ZTVjOGE5ZS0wMDAwLTQwMDAtODAwMC0wMDAwMDAwMDAwMDIifX19";

/// Answers as etcd 3.4 writes them.
fn answers() -> Vec<Vec<u8>> {
    const HEADER: &str = r#""header":{"cluster_id":"14841639068965178418","member_id":"10276657743932975437","revision":"3","raft_term":"2"}"#;
    let kvs = format!(
        r#""kvs":[{{"key":"dm0x","create_revision":"2","mod_revision":"3","version":"2","value":"{SOLO_ENCODED}"}}],"count":"1""#
    );
    let camel = r#"{"header":{"clusterId":7,"revision":9},"kvs":[{"key":"dm0x","modRevision":3,"value":""}]}"#;
    let texts = [
        (0, format!("{{{HEADER}}}")),
        (0, format!("{{{HEADER},{kvs}}}")),
        (0, camel.to_owned()),
        (1, format!(r#"{{{HEADER},"succeeded":true,"responses":[{{"response_put":{{}}}}]}}"#)),
        (1, format!(r#"{{{HEADER},"responses":[{{"response_range":{{{HEADER},{kvs}}}}}]}}"#)),
        (1, format!(r#"{{{HEADER},"responses":[{{"response_range":{{{HEADER}}}}}]}}"#)),
        (2, format!(r#"{{{HEADER},"token":"WcmbZfQtPaMmJZpA.12"}}"#)),
        (3, SOLO.to_owned()),
        (3, PAIR.to_owned()),
        (4, r#"{"error":"etcdserver: request timed out","code":14}"#.to_owned()),
        (4, "<html><h1>502 Bad Gateway</h1></html>".to_owned()),
    ];
    texts.iter().map(|(which, text)| [&[*which], text.as_bytes()].concat()).collect()
}

#[cfg(feature = "machine")]
fn requests() -> Vec<Vec<u8>> {
    let bodyless = |(method, name): (&str, &str)| {
        format!("\0{method} /api/v1/{name} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n")
    };
    let with_body = |(name, body): (&str, &str)| {
        let head = format!("PUT /api/v1/{name} HTTP/1.1\r\nContent-Length: {}\r\n\r\n", body.len());
        format!("\0{head}{body}")
    };
    let polite =
        "\0PUT /api/v1/vm.boot HTTP/1.1\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n";
    let mut texts = vec![polite.to_owned()];
    texts.extend(BODYLESS.map(bodyless));
    texts.extend(BODIES.map(with_body));
    texts.into_iter().map(String::into_bytes).collect()
}

#[cfg(feature = "machine")]
const BODYLESS: [(&str, &str); 13] = [
    ("GET", "vmm.ping"),
    ("PUT", "vmm.shutdown"),
    ("PUT", "vm.delete"),
    ("PUT", "vm.boot"),
    ("PUT", "vm.pause"),
    ("PUT", "vm.resume"),
    ("PUT", "vm.shutdown"),
    ("PUT", "vm.reboot"),
    ("PUT", "vm.power-button"),
    ("GET", "vm.info"),
    ("GET", "vm.counters"),
    ("PUT", "vm.stop-replication"),
    ("GET", "vm.replication-info"),
];

#[cfg(feature = "machine")]
const BODIES: [(&str, &str); 12] = [
    ("vm.create", r#"{"cpus":{"boot_vcpus":1,"max_vcpus":2},"memory":{"size":1048576}}"#),
    ("vm.create", r#"{"payload":{"kernel":"k"},"disks":[{"path":"d","id":"a"}]}"#),
    ("vm.add-disk", r#"{"path":"/d","readonly":true,"num_queues":2}"#),
    ("vm.add-net", r#"{"tap":"t","mac":"52:54:00:12:34:56","num_queues":2}"#),
    ("vm.snapshot", r#"{"destination_url":"file:///s"}"#),
    ("vm.restore", r#"{"source_url":"file:///s","prefault":true}"#),
    ("vm.restore", r#"{"source_url":"file:///s","net_fds":[{"id":"n","num_fds":0}]}"#),
    ("vm.send-migration", r#"{"destination_url":"unix:/s","local":true}"#),
    ("vm.receive-migration", r#"{"receiver_url":"tcp:h:1"}"#),
    ("vm.replicate", r#"{"destination_url":"tcp:h:1","epoch_ms":20}"#),
    ("vm.receive-replica", r#"{"receiver_url":"unix:/s"}"#),
    ("vm.failover", r#"{"force":true}"#),
];

#[cfg(feature = "machine")]
mod states {
    //! States of machines without vCPUs.

    use std::sync::Arc;

    use devices::pci::config::ConfigState;
    use devices::pci::virtio::{BAR_BYTES, VirtioPci, VirtioPciState};
    use devices::virtio::device::VirtioDevice;
    use vm_memory::{GuestAddress, GuestMemoryMmap};
    use vmm::device_manager::pci::PciState;
    use vmm::device_manager::{DevicesState, PlatformState};
    use vmm::ha::fuzzing as codec;
    use vmm::machine::MachineState;

    use crate::{blk, net, pci, rng};

    /// Bytes of the kernel's `struct kvm_irqchip`, which begins with its number.
    const IRQCHIP_BYTES: usize = 520;
    const DRIVER_OK: u8 = 0xf;

    fn functions() -> Vec<VirtioPciState> {
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
        let (disk, card, rng) = (Arc::new(blk::idle()), net::idle(), Arc::new(rng::idle()));
        let devices: [Arc<dyn VirtioDevice>; 3] = [disk, card.0, rng];
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

    /// Behind their kinds, as the target takes them.
    pub fn all() -> Vec<Vec<u8>> {
        let mut seeds = Vec::new();
        for functions in [Vec::new(), functions()] {
            seeds.extend(
                functions.iter().map(|it| [vec![2], postcard::to_stdvec(it).unwrap()].concat()),
            );
            let machine = machine(functions);
            seeds.push([vec![1], serde_json::to_vec(&machine).unwrap()].concat());
            seeds.push(
                [vec![0], codec::encode(&codec::Captured { machine, paused: true })].concat(),
            );
        }
        seeds
    }
}
