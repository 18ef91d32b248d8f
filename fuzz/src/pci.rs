//! PCI: configuration space by both ways, and the registers of a virtio function.
//!
//! Beside "no panic": a device is activated only while idle, with features that it offered and rings
//! in memory; doorbells are bound once; what is saved can be restored, and is the same then; after
//! all that, a driver that makes sense gets its device.

use std::cell::Cell;
use std::io;
use std::sync::{Arc, Mutex};

use arbitrary::Arbitrary;
use devices::bus::BusDevice;
use devices::pci::access::{ConfigPorts, Ecam, Window};
use devices::pci::bridge::HostBridge;
use devices::pci::root::{PciRoot, Windows};
use devices::pci::virtio::{BAR_BYTES, Doorbells, Host, VirtioPci, VirtioPciState};
use devices::pci::{MessageSink, PciFunction, Region};
use devices::virtio::device::{
    ActivateError, Activation, ActiveQueue, AttachError, DeviceType, GuestMemory, QueuePosition,
    StateError, VirtioDevice,
};
use devices::virtio::state::DeviceState;
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::guest::Rest;
use crate::reach::reached;

const RAM_BYTES: usize = 1 << 20;
const LOW: Region = Region { base: 0xc000_0000, len: 0x1000_0000 };
const HIGH: Region = Region { base: 1 << 36, len: 1 << 30 };
/// Where the function's BAR is at power-on.
const BAR: u64 = HIGH.base + BAR_BYTES;
const SLOT: u8 = 1;
const OFFERED: u64 = 0b1101 | 1 << 28 | 1 << 29;
const VERSION_1: u64 = 1 << 32;
/// ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK.
const STEPS: [u8; 4] = [1, 3, 0xb, 0xf];
const DRIVE_STEPS: u8 = 8;
const NEEDS_RESET: u8 = 0x40;
/// The capability of message signalled interrupts with a table.
const MSIX: u8 = 0x11;

/// What a driver brings about by single accesses, without [`Act::Drive`].
pub const PLACES: &[&str] = &[
    "pci: the driver's own steps activate the device",
    "pci: rings outside of memory are refused",
    "pci: the BAR has moved",
    "pci: a message was sent",
    "pci: saved while active",
    "pci: saved while broken",
];

#[derive(Arbitrary, Debug)]
pub struct Input {
    driven: bool,
    acts: Rest<Act>,
}

#[derive(Arbitrary, Debug)]
enum Act {
    /// The function's configuration space.
    Config {
        offset: u8,
        data: Data,
    },
    /// Anywhere in ECAM.
    Ecam {
        offset: u32,
        data: Data,
    },
    Port {
        offset: u8,
        data: Data,
    },
    /// A register of the common configuration.
    Common {
        offset: u8,
        data: Data,
    },
    Bar {
        offset: u16,
        data: Data,
    },
    /// The function's memory at any place of the windows.
    Window {
        high: bool,
        offset: u64,
        data: Data,
    },
    Queue {
        index: u8,
        size_shift: u8,
        rings: [u16; 3],
        enable: bool,
    },
    Status(u8),
    Drive,
    /// The next of the things that [`Act::Drive`] does, one or more.
    Next(u8),
    /// An interrupt's place in the table, and which queue's it is.
    Vector {
        queue: u8,
        vector: u8,
        masked: bool,
        on: bool,
    },
    Interrupt {
        queue: u8,
        config: bool,
        breaks: bool,
    },
    Save,
    Reset,
}

/// One to eight bytes, often a small number.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Data {
    Byte(u8),
    Word(u16),
    Long(u32),
    Quad(u64),
    Odd { bytes: [u8; 8], len: u8 },
}

impl Data {
    fn bytes(self) -> Vec<u8> {
        match self {
            Self::Byte(value) => value.to_le_bytes().into(),
            Self::Word(value) => value.to_le_bytes().into(),
            Self::Long(value) => value.to_le_bytes().into(),
            Self::Quad(value) => value.to_le_bytes().into(),
            Self::Odd { bytes, len } => bytes[..usize::from(len % 8) + 1].into(),
        }
    }
}

/// A device that looks at what its transport does.
pub struct Probe {
    memory: Arc<GuestMemory>,
    active: Mutex<Option<Activation>>,
}

impl VirtioDevice for Probe {
    fn id(&self) -> &str {
        "probe"
    }

    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![64, 16, 1]
    }

    fn features(&self) -> u64 {
        OFFERED
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        assert!(offset < BAR_BYTES && data.len() <= 8);
        data.fill(0x5a);
    }

    fn attach(&self) -> Result<(), AttachError> {
        Ok(())
    }

    fn activate(&self, activation: Activation) -> Result<(), ActivateError> {
        assert_eq!(activation.features & !(OFFERED | VERSION_1), 0);
        assert!(activation.queues.is_sorted_by(|a, b| a.index < b.index));
        for queue in &activation.queues {
            let size = usize::from(queue.queue.size());
            assert!(queue.index < 3 && queue.queue.ready() && size.is_power_of_two());
            let rings = [
                (queue.queue.desc_table(), 16 * size),
                (queue.queue.avail_ring(), 6 + 2 * size),
                (queue.queue.used_ring(), 6 + 8 * size),
            ];
            for (at, len) in rings {
                assert!(self.memory.check_range(GuestAddress(at), len), "{at:#x}");
            }
        }
        let before = self.active.lock().unwrap().replace(activation);
        assert!(before.is_none(), "activated twice");
        Ok(())
    }

    fn reset(&self) {
        *self.active.lock().unwrap() = None;
    }

    fn park(&self) {}

    fn unpark(&self) {}

    fn save(&self) -> DeviceState {
        DeviceState::Stateless
    }

    fn check(&self, _state: &DeviceState) -> Result<(), StateError> {
        Ok(())
    }

    fn restore(&self, _state: &DeviceState) -> Result<(), StateError> {
        assert!(self.active.lock().unwrap().is_none(), "restored while active");
        Ok(())
    }

    fn queue_positions(&self) -> Vec<QueuePosition> {
        let active = self.active.lock().unwrap();
        let position = |queue: &ActiveQueue| QueuePosition {
            index: queue.index,
            next_avail: queue.queue.next_avail(),
            next_used: queue.queue.next_used(),
        };
        active.iter().flat_map(|active| &active.queues).map(position).collect()
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// Where doorbells are bound.
#[derive(Default)]
struct Bells(Mutex<Vec<u64>>);

impl Doorbells for Bells {
    fn register(&self, _event: &EventFd, address: u64) -> io::Result<()> {
        let region = Region { base: address, len: 1 };
        assert!(LOW.contains(region) || HIGH.contains(region), "a bell at {address:#x}");
        let mut bells = self.0.lock().unwrap();
        if bells.contains(&address) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        bells.push(address);
        Ok(())
    }

    fn unregister(&self, _event: &EventFd, address: u64) -> io::Result<()> {
        let mut bells = self.0.lock().unwrap();
        let at = bells.iter().position(|bell| *bell == address);
        bells.remove(at.expect("unbound what was not bound"));
        Ok(())
    }
}

struct Deaf;

impl MessageSink for Deaf {
    fn send(&self, _address: u64, _data: u32) {
        reached("pci: a message was sent");
    }
}

/// What a function needs of its host.
pub fn host(memory: &Arc<GuestMemory>) -> Host {
    Host {
        memory: Arc::clone(memory),
        messages: Arc::new(Deaf),
        doorbells: Arc::new(Bells::default()),
        observer: Arc::new(|_, _| {}),
    }
}

struct Machine {
    root: Arc<PciRoot>,
    ecam: Ecam,
    ports: ConfigPorts,
    windows: [Window; 2],
    function: Arc<VirtioPci>,
    probe: Arc<Probe>,
    next: Cell<u8>,
}

impl Machine {
    fn new() -> Self {
        let ranges = [(GuestAddress(0), RAM_BYTES)];
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).expect("memory"));
        let probe = Arc::new(Probe { memory: Arc::clone(&memory), active: Mutex::default() });
        let device = Arc::clone(&probe) as Arc<dyn VirtioDevice>;
        let function = VirtioPci::new(SLOT, BAR, device, host(&memory)).expect("a function");
        let function = Arc::new(function);
        let root = Arc::new(PciRoot::new(Windows { low: LOW, high: HIGH }));
        root.insert(0, Arc::new(HostBridge::default())).expect("an empty slot");
        root.insert(SLOT, Arc::clone(&function) as _).expect("an empty slot");
        Self {
            ecam: Ecam::new(Arc::clone(&root)),
            ports: ConfigPorts::new(Arc::clone(&root)),
            windows: [LOW, HIGH].map(|window| Window::new(Arc::clone(&root), window.base)),
            root,
            function,
            probe,
            next: Cell::new(0),
        }
    }

    fn config(&self, offset: u64, data: &[u8]) {
        access(&self.ecam, (u64::from(SLOT) << 15) + offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        access(&self.windows[1], BAR_BYTES + offset, data);
    }

    fn status(&self) -> u8 {
        let mut status = [0];
        self.windows[1].read(BAR_BYTES + 0x14, &mut status);
        status[0]
    }

    fn queue(&self, index: u8, size: u16, rings: [u64; 3], enable: bool) {
        self.write(0x16, &[index, 0]);
        self.write(0x18, &size.to_le_bytes());
        self.write(0x1a, &[index, 0]);
        for (offset, ring) in [0x20, 0x28, 0x30].into_iter().zip(rings) {
            self.write(offset, &ring.to_le_bytes());
        }
        self.write(0x1c, &[enable.into(), 0]);
    }

    /// All that a driver does until DRIVER_OK.
    fn drive(&self) {
        (0..DRIVE_STEPS).for_each(|step| self.step(step));
    }

    fn step(&self, step: u8) {
        match step {
            0 => {
                self.config(0x10, &BAR.to_le_bytes());
                self.config(4, &[6, 0]);
            }
            1 => self.write(0x14, &[0]),
            2 => self.write(0x14, &STEPS[..1]),
            3 => self.write(0x14, &STEPS[1..2]),
            4 => {
                for (half, features) in [(0u8, 1u32), (1, 1)] {
                    self.write(8, &[half, 0, 0, 0]);
                    self.write(0xc, &features.to_le_bytes());
                }
            }
            5 => self.write(0x14, &STEPS[2..3]),
            6 => self.queue(0, 16, [0x1000, 0x2000, 0x3000], true),
            _ => self.write(0x14, &STEPS[3..]),
        }
    }

    /// A capability's place in configuration space.
    fn capability(&self, id: u8) -> u64 {
        let byte = |offset: u64| {
            let mut byte = [0];
            self.ecam.read((u64::from(SLOT) << 15) + offset, &mut byte);
            byte[0]
        };
        let mut at = u64::from(byte(0x34));
        while byte(at) != id {
            at = byte(at + 1).into();
            assert_ne!(at, 0, "there is no capability {id:#x}");
        }
        at
    }

    fn vector(&self, queue: u8, vector: u8, masked: bool, on: bool) {
        let capability = self.capability(MSIX);
        self.config(capability + 2, &[0, if on { 0x80 } else { 0x40 }]);
        let mut table = [0; 4];
        self.ecam.read((u64::from(SLOT) << 15) + capability + 4, &mut table);
        let entry = u64::from(u32::from_le_bytes(table) & !7) + 16 * u64::from(vector % 8);
        let words = [0xfee0_0000, 0, u32::from(vector), masked.into()];
        (0..).step_by(4).zip(words).for_each(|(at, word): (u64, u32)| {
            self.write(entry + at, &word.to_le_bytes());
        });
        self.write(0x16, &[queue % 4, 0]);
        self.write(0x1a, &[vector % 8, 0]);
    }

    fn is_active(&self) -> bool {
        self.probe.active.lock().unwrap().is_some()
    }

    /// What came of an act.
    fn look(&self, (was_active, was_broken): (bool, bool), (active, broken): (bool, bool)) {
        if active && !was_active {
            reached("pci: the driver's own steps activate the device");
        }
        if broken && !was_broken && !was_active {
            reached("pci: rings outside of memory are refused");
        }
        let inside = |region: &Region| LOW.contains(*region) || HIGH.contains(*region);
        if self.function.region().filter(inside).is_some_and(|region| region.base != BAR) {
            reached("pci: the BAR has moved");
        }
    }

    fn is_broken(&self) -> bool {
        let mut status = [0];
        self.function.read_memory(0x14, &mut status);
        status[0] & NEEDS_RESET != 0
    }

    fn save(&self) {
        if self.is_active() {
            reached("pci: saved while active");
        }
        if self.is_broken() {
            reached("pci: saved while broken");
        }
        let state = self.function.save();
        let bytes = postcard::to_stdvec(&state).expect("a state that can be encoded");
        let decoded: VirtioPciState = postcard::from_bytes(&bytes).expect("what was encoded");
        assert_eq!(decoded, state);
        let other = Self::new();
        other.function.restore(&decoded).expect("the state of another function");
        other.root.place();
        other.function.nudge();
        assert_eq!(other.is_active(), self.is_active() && state.common.status & NEEDS_RESET == 0);
    }

    fn interrupt(&self, queue: u8, config: bool, breaks: bool) {
        let interrupt =
            self.probe.active.lock().unwrap().as_ref().map(|it| Arc::clone(&it.interrupt));
        let Some(interrupt) = interrupt else { return };
        interrupt.queue(u16::from(queue % 4));
        if config {
            interrupt.config();
        }
        if breaks {
            interrupt.needs_reset("the input says so");
        }
    }

    fn act(&self, act: &Act) {
        match act {
            Act::Config { offset, data } => self.config(u64::from(*offset), &data.bytes()),
            Act::Ecam { offset, data } => {
                access(&self.ecam, u64::from(*offset) % (1 << 20), &data.bytes());
            }
            Act::Port { offset, data } => {
                access(&self.ports, u64::from(*offset % 8), &data.bytes());
            }
            Act::Common { offset, data } => self.write(u64::from(*offset % 0x40), &data.bytes()),
            Act::Bar { offset, data } => self.write(u64::from(*offset), &data.bytes()),
            Act::Window { high, offset, data } => {
                let len = if *high { HIGH.len } else { LOW.len };
                access(&self.windows[usize::from(*high)], offset % len, &data.bytes());
            }
            Act::Queue { index, size_shift, rings, enable } => {
                let size = 1u16 << (size_shift % 8);
                // Some are far outside of the memory.
                let place = |ring: u16| u64::from(ring) << if ring > 0xf000 { 30 } else { 4 };
                self.queue(index % 4, size, rings.map(place), *enable);
            }
            Act::Status(status) => self.write(0x14, &[*status]),
            Act::Drive => self.drive(),
            Act::Next(count) => {
                for _ in 0..=count % DRIVE_STEPS {
                    self.step(self.next.get());
                    self.next.set((self.next.get() + 1) % DRIVE_STEPS);
                }
            }
            Act::Vector { queue, vector, masked, on } => {
                self.vector(*queue, *vector, *masked, *on);
            }
            Act::Interrupt { queue, config, breaks } => self.interrupt(*queue, *config, *breaks),
            Act::Save => self.save(),
            Act::Reset => {
                self.function.reset();
                self.root.place();
            }
        }
    }
}

/// Writes, and reads what is there then.
fn access(device: &dyn BusDevice, offset: u64, data: &[u8]) {
    device.write(offset, data);
    let mut read = data.to_vec();
    device.read(offset, &mut read);
}

pub fn run(input: Input) {
    let machine = Machine::new();
    if input.driven {
        machine.drive();
    }
    let mut before = (machine.is_active(), machine.is_broken());
    for act in &input.acts.0 {
        machine.act(act);
        let now = (machine.is_active(), machine.is_broken());
        if !matches!(act, Act::Drive) {
            machine.look(before, now);
        }
        before = now;
    }
    machine.save();
    machine.drive();
    assert_eq!(machine.status(), STEPS[3]);
    assert!(machine.is_active());
}
