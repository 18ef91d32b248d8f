//! The transport with a driver that is a script, and with one that makes no sense.

use std::io::ErrorKind;
use std::sync::Mutex;

use proptest::prelude::*;
use vm_memory::Bytes;
use vmm_sys_util::eventfd::EventFd;

use super::common::{ACKNOWLEDGE, DRIVER};
use super::*;
use crate::pci::msix::tests::Messages;
use crate::pci::root::{ConfigAddress, PciRoot, Windows};
use crate::virtio::device::{AttachError, DeviceType, StateError};
use crate::virtio::state::DeviceState;

const RAM: usize = 1 << 20;
const WINDOW: Region = Region { base: 1 << 36, len: 1 << 30 };
const LOW: Region = Region { base: 0xc000_0000, len: 0x1000_0000 };
const BASE: u64 = WINDOW.base + BAR_BYTES;
const OFFERED: u64 = 0b101;
const CALM: u8 = ACKNOWLEDGE | DRIVER;

/// A device that only remembers.
#[derive(Default)]
struct Probe {
    active: Mutex<Option<Activation>>,
    activations: Counter,
    resets: Counter,
    config: Mutex<Vec<(u64, usize)>>,
    refuses: AtomicBool,
}

impl VirtioDevice for Probe {
    fn id(&self) -> &str {
        "probe"
    }

    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![64, 16]
    }

    fn features(&self) -> u64 {
        OFFERED
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = at.to_le_bytes()[0];
        }
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        self.config.lock().unwrap().push((offset, data.len()));
    }

    fn attach(&self) -> Result<(), AttachError> {
        Ok(())
    }

    fn activate(&self, activation: Activation) -> Result<(), ActivateError> {
        if self.refuses.load(Ordering::Acquire) {
            return Err(ActivateError::NotAttached);
        }
        self.activations.add(1);
        let before = self.active.lock().unwrap().replace(activation);
        assert!(before.is_none(), "activated twice");
        Ok(())
    }

    fn reset(&self) {
        self.resets.add(1);
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
        let queues = &active.as_ref().expect("asked while idle").queues;
        let position = |queue: &ActiveQueue| QueuePosition {
            index: queue.index,
            next_avail: queue.queue.next_avail(),
            next_used: queue.queue.next_used(),
        };
        queues.iter().map(position).collect()
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// Remembers what is bound; a second binding of a place fails, as KVM's does.
#[derive(Default)]
struct Bound(Mutex<Vec<u64>>);

impl Doorbells for Bound {
    fn register(&self, _event: &EventFd, address: u64) -> io::Result<()> {
        let mut bound = self.0.lock().unwrap();
        if bound.contains(&address) {
            return Err(ErrorKind::AlreadyExists.into());
        }
        bound.push(address);
        Ok(())
    }

    fn unregister(&self, _event: &EventFd, address: u64) -> io::Result<()> {
        let mut bound = self.0.lock().unwrap();
        let at = bound.iter().position(|bound| *bound == address);
        bound.remove(at.expect("unbound what was not bound"));
        Ok(())
    }
}

struct Machine {
    root: PciRoot,
    function: Arc<VirtioPci>,
    device: Arc<Probe>,
    messages: Arc<Messages>,
    bound: Arc<Bound>,
    seen: Arc<Mutex<Vec<Activity>>>,
}

impl Machine {
    fn new() -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
        let (device, messages) = (Arc::new(Probe::default()), Arc::new(Messages::default()));
        let (bound, seen) = (Arc::new(Bound::default()), Arc::new(Mutex::new(Vec::new())));
        let host = Host {
            memory: Arc::new(memory),
            messages: Arc::clone(&messages) as _,
            doorbells: Arc::clone(&bound) as _,
            observer: Arc::new({
                let seen = Arc::clone(&seen);
                move |_, activity| seen.lock().unwrap().push(activity)
            }),
        };
        let function = VirtioPci::new(1, BASE, Arc::clone(&device) as _, host).unwrap();
        let function = Arc::new(function);
        let root = PciRoot::new(Windows { low: LOW, high: WINDOW });
        root.insert(1, Arc::clone(&function) as _).unwrap();
        Self { root, function, device, messages, bound, seen }
    }

    fn at(offset: u16) -> ConfigAddress {
        ConfigAddress { bus: 0, slot: 1, function: 0, offset }
    }

    fn config_32(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.root.read_config(Self::at(offset), &mut data);
        u32::from_le_bytes(data)
    }

    fn decode(&self) {
        self.root.write_config(Self::at(4), &[6, 0]);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.root.write_memory(BASE + offset, data);
    }

    fn read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.root.read_memory(BASE + offset, &mut data);
        data
    }

    fn status(&self) -> u8 {
        self.read::<1>(0x14)[0]
    }

    fn set_status(&self, status: u8) {
        self.write(0x14, &[status]);
    }

    fn choose(&self, features: u64) {
        let bytes = features.to_le_bytes();
        self.write(8, &[0; 4]);
        self.write(0xc, &bytes[..4]);
        self.write(8, &[1, 0, 0, 0]);
        self.write(0xc, &bytes[4..]);
    }

    /// Queue `index` with its rings at `at`.
    fn set_up_queue(&self, index: u16, at: u64) {
        self.write(0x16, &index.to_le_bytes());
        self.write(0x18, &16u16.to_le_bytes());
        self.write(0x1a, &(index + 1).to_le_bytes());
        self.write(0x20, &at.to_le_bytes());
        self.write(0x28, &(at + 0x1000).to_le_bytes()[..4]);
        self.write(0x30, &(at + 0x2000).to_le_bytes());
        self.write(0x1c, &[1, 0]);
    }

    /// Vectors unmasked, each with its own data.
    fn set_up_vectors(&self) {
        self.root.write_config(Self::at(self.msix_control()), &[0, 0x80]);
        for vector in 0..3u32 {
            let at = 0x4000 + 16 * u64::from(vector);
            self.write(at, &0xfee0_0000_u64.to_le_bytes());
            self.write(at + 8, &(0x30 + vector).to_le_bytes());
            self.write(at + 12, &[0; 4]);
        }
    }

    fn msix_control(&self) -> u16 {
        u16::try_from(self.function.msix_capability + 2).unwrap()
    }

    /// All that Linux does until DRIVER_OK.
    fn drive(&self) {
        self.decode();
        self.set_up_vectors();
        self.set_status(0);
        self.set_status(ACKNOWLEDGE);
        self.set_status(CALM);
        self.choose(VERSION_1 | 1);
        self.set_status(CALM | FEATURES_OK);
        assert_eq!(self.status(), CALM | FEATURES_OK);
        self.write(0x10, &[0, 0]);
        self.set_up_queue(0, 0x1_0000);
        self.set_up_queue(1, 0x2_0000);
        self.set_status(CALM | FEATURES_OK | DRIVER_OK);
    }

    fn interrupt(&self) -> Arc<dyn Interrupt> {
        Arc::clone(&self.device.active.lock().unwrap().as_ref().unwrap().interrupt)
    }

    fn rung(&self, queue: usize) -> bool {
        let active = self.device.active.lock().unwrap();
        active.as_ref().unwrap().queues[queue].doorbell.read().is_ok()
    }
}

#[test]
fn a_driver_finds_everything_by_the_capabilities() {
    let machine = Machine::new();
    assert_eq!(machine.config_32(0), 0x1042_1af4);
    assert_eq!(machine.config_32(8), 0x0180_0001);
    let mut found = Vec::new();
    let mut at = machine.config_32(0x34) & 0xff;
    while at != 0 {
        let place = u16::try_from(at).unwrap();
        let head = machine.config_32(place);
        let [id, next, size, kind] = head.to_le_bytes();
        if id == 9 {
            let (bar, offset) = (machine.config_32(place + 4), machine.config_32(place + 8));
            found.push((kind, size, bar, offset, machine.config_32(place + 12)));
        } else {
            assert_eq!((id, size, kind), (0x11, 2, 0), "MSI-X with three vectors");
            assert_eq!(machine.config_32(place + 4), 0x4000);
            assert_eq!(machine.config_32(place + 8), 0x6000);
        }
        at = next.into();
    }
    found.sort_unstable();
    assert_eq!(
        found,
        [
            (1, 16, 0, 0, 0x38),
            (2, 20, 0, 0x3000, 0x1000),
            (3, 16, 0, 0x1000, 1),
            (4, 16, 0, 0x2000, 0x1000),
            (5, 20, 0, 0, 0),
        ]
    );
}

#[test]
fn a_driver_gets_its_device_going_and_back() {
    let machine = Machine::new();
    machine.drive();
    assert_eq!(machine.status(), CALM | FEATURES_OK | DRIVER_OK);
    {
        let active = machine.device.active.lock().unwrap();
        let active = active.as_ref().unwrap();
        assert_eq!(active.features, VERSION_1 | 1);
        let queues: Vec<_> = active.queues.iter().map(|q| (q.index, q.queue.size())).collect();
        assert_eq!(queues, [(0, 16), (1, 16)]);
        assert_eq!(active.queues[1].queue.avail_ring(), 0x2_1000);
        assert!(!active.queues[0].queue.event_idx_enabled());
    }
    assert!(machine.rung(0) && machine.rung(1), "once after activation");
    assert!(!machine.rung(0));
    machine.write(0x3004, &[1, 0]);
    assert!(machine.rung(1) && !machine.rung(0));
    machine.interrupt().queue(1);
    machine.interrupt().config();
    assert_eq!(machine.messages.take(), [(0xfee0_0000, 0x32), (0xfee0_0000, 0x30)]);
    assert_eq!(machine.read::<1>(0x15), [1], "the configuration's generation");
    machine.set_status(0);
    assert_eq!(machine.status(), 0);
    assert!(machine.device.active.lock().unwrap().is_none());
    assert_eq!(machine.device.activations.get(), 1);
    machine.drive();
    assert_eq!(machine.device.activations.get(), 2);
    let seen = machine.seen.lock().unwrap();
    use Activity::{Activated, Reset};
    assert_eq!(*seen, [Reset, Activated, Reset, Reset, Activated]);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    for features in [VERSION_1 | 2, 1, VERSION_1 | 1 << 63, 0] {
        let machine = Machine::new();
        machine.decode();
        machine.set_status(CALM);
        machine.choose(features);
        machine.set_status(CALM | FEATURES_OK);
        assert_eq!(machine.status(), CALM, "{features:#x}");
        machine.set_status(CALM | DRIVER_OK);
        assert_eq!(machine.status(), CALM, "no way past the negotiation");
        assert_eq!(machine.device.activations.get(), 0);
    }
}

#[test]
fn what_is_agreed_does_not_change() {
    let machine = Machine::new();
    machine.drive();
    machine.choose(VERSION_1 | 4);
    machine.set_up_queue(0, 0x5_0000);
    machine.write(8, &[0; 4]);
    assert_eq!(machine.read::<4>(0xc), [1, 0, 0, 0]);
    machine.write(0x16, &[0, 0]);
    assert_eq!(machine.read::<8>(0x20), 0x1_0000_u64.to_le_bytes());
    machine.set_status(CALM | FEATURES_OK | DRIVER_OK);
    assert_eq!(machine.device.activations.get(), 1);
    machine.write(0x16, &[9, 0]);
    assert_eq!(machine.read::<2>(0x18), [0, 0], "a queue that is not there");
    machine.write(0x1a, &[9, 0]);
    machine.write(0x16, &[1, 0]);
    machine.write(0x1a, &[9, 0]);
    assert_eq!(machine.read::<2>(0x1a), [0xff, 0xff], "a vector that is not there");
}

#[test]
fn rings_outside_of_memory_need_a_reset() {
    let end = u64::try_from(RAM).unwrap();
    for at in [0, end - 0x100, end, 0x1_0008, !0xf] {
        let machine = Machine::new();
        machine.decode();
        machine.set_up_vectors();
        machine.set_status(CALM);
        machine.choose(VERSION_1);
        machine.set_status(CALM | FEATURES_OK);
        machine.write(0x10, &[0, 0]);
        machine.write(0x16, &[0, 0]);
        for register in [0x20, 0x28, 0x30] {
            machine.write(register, &at.to_le_bytes());
        }
        machine.write(0x1c, &[1, 0]);
        machine.set_status(CALM | FEATURES_OK | DRIVER_OK);
        assert_eq!(machine.status(), CALM | FEATURES_OK | DRIVER_OK | NEEDS_RESET, "{at:#x}");
        assert_eq!(machine.device.activations.get(), 0);
        assert_eq!(machine.messages.take().len(), 1, "the driver is told");
        machine.drive();
        assert_eq!(machine.device.activations.get(), 1, "and can begin anew");
    }
}

#[test]
fn a_device_that_refuses_needs_a_reset() {
    let machine = Machine::new();
    machine.device.refuses.store(true, Ordering::Release);
    machine.drive();
    assert_ne!(machine.status() & NEEDS_RESET, 0);
    machine.device.refuses.store(false, Ordering::Release);
    machine.drive();
    machine.interrupt().needs_reset("a test");
    assert_ne!(machine.status() & NEEDS_RESET, 0);
}

#[test]
fn a_worker_that_is_late_does_not_spoil_a_reset() {
    let machine = Machine::new();
    machine.drive();
    let interrupt = machine.interrupt();
    machine.set_status(0);
    machine.messages.take();
    // It found the rings broken before the reset, and says so only now.
    interrupt.needs_reset("a test");
    assert_eq!(machine.status(), 0, "a driver waits for this (4.1.4.3.2)");
    assert!(machine.messages.take().is_empty());
    machine.drive();
    assert_eq!(machine.status() & NEEDS_RESET, 0);
}

#[test]
fn doorbells_follow_the_bar() {
    let machine = Machine::new();
    let bound = || machine.bound.0.lock().unwrap().clone();
    assert!(bound().is_empty());
    machine.decode();
    assert_eq!(bound(), [BASE + 0x3000, BASE + 0x3004]);
    let moved = WINDOW.base + 8 * BAR_BYTES;
    machine.root.write_config(Machine::at(0x10), &moved.to_le_bytes()[..4]);
    assert_eq!(bound(), [moved + 0x3000, moved + 0x3004]);
    machine.root.write_config(Machine::at(0x10), &[0xff; 8]);
    assert!(bound().is_empty(), "nowhere that a BAR may be");
    machine.root.write_config(Machine::at(0x10), &LOW.base.to_le_bytes());
    assert_eq!(bound(), [LOW.base + 0x3000, LOW.base + 0x3004]);
    machine.root.write_config(Machine::at(4), &[0, 0]);
    assert!(bound().is_empty());
}

#[test]
fn configuration_space_leads_to_the_bar() {
    let machine = Machine::new();
    let at = u16::try_from(machine.function.access_capability).unwrap();
    let set = |offset: u32, len: u32| {
        machine.root.write_config(Machine::at(at + 8), &offset.to_le_bytes());
        machine.root.write_config(Machine::at(at + 12), &len.to_le_bytes());
    };
    // Memory need not be decoded for this.
    set(0x12, 2);
    assert_eq!(machine.config_32(at + 16), 2, "queues");
    set(0x2004, 4);
    assert_eq!(machine.config_32(at + 16), 0x0706_0504);
    set(0x14, 1);
    machine.root.write_config(Machine::at(at + 16), &[ACKNOWLEDGE, 0, 0, 0]);
    assert_eq!(machine.config_32(at + 16) & 0xff, u32::from(ACKNOWLEDGE));
    for (offset, len) in [(0x7ffe, 4), (0xffff_fffc, 4), (1, 2), (0, 3), (0, 0), (0x8000, 1)] {
        set(offset, len);
        machine.root.write_config(Machine::at(at + 16), &[0xff; 4]);
        let _ = machine.config_32(at + 16);
    }
    machine.root.write_config(Machine::at(at + 4), &[5]);
    set(0x14, 1);
    machine.root.write_config(Machine::at(at + 16), &[0; 4]);
    machine.decode();
    assert_eq!(machine.status(), ACKNOWLEDGE, "BAR 5 is none of ours");
}

#[test]
fn without_msix_a_driver_polls() {
    let machine = Machine::new();
    machine.drive();
    machine.root.write_config(Machine::at(machine.msix_control()), &[0, 0]);
    machine.interrupt().queue(0);
    machine.interrupt().config();
    assert!(machine.messages.take().is_empty());
    assert_eq!(machine.read::<4>(0x1000), [3, 0, 0, 0]);
    assert_eq!(machine.read::<1>(0x1000), [0], "reading clears");
}

#[test]
fn a_restored_device_goes_on_and_is_woken() {
    let machine = Machine::new();
    machine.drive();
    machine.root.write_config(Machine::at(machine.msix_control()), &[0, 0xc0]);
    machine.interrupt().queue(1);
    {
        let mut active = machine.device.active.lock().unwrap();
        let queue = &mut active.as_mut().unwrap().queues[1].queue;
        queue.set_next_avail(7);
        queue.set_next_used(5);
    }
    let state = machine.function.save();
    let other = Machine::new();
    other.function.restore(&state).unwrap();
    other.root.place();
    assert_eq!(other.function.save(), state);
    assert_eq!(*other.bound.0.lock().unwrap(), *machine.bound.0.lock().unwrap());
    assert!(other.rung(0) && other.rung(1));
    assert!(other.messages.take().is_empty(), "the vCPUs have no state yet");
    other.function.nudge();
    other.root.write_config(Machine::at(other.msix_control()), &[0, 0x80]);
    assert_eq!(other.messages.take(), [(0xfee0_0000, 0x31), (0xfee0_0000, 0x32)]);
    other.function.restore(&Machine::new().function.save()).unwrap();
    assert!(other.device.active.lock().unwrap().is_none());
    assert_eq!(other.status_of_registers(), 0);
}

impl Machine {
    fn status_of_registers(&self) -> u8 {
        self.function.interrupts.status.load(Ordering::Acquire)
    }
}

#[test]
fn states_that_do_not_fit_are_refused_and_leave_power_on() {
    let machine = Machine::new();
    machine.drive();
    let good = machine.function.save();
    let spoil: [fn(&mut VirtioPciState); 14] = [
        |state| state.common.status &= !FEATURES_OK,
        |state| state.common.driver_features = 1,
        |state| state.id.push('x'),
        |state| state.slot = 9,
        |state| state.config.registers[0] ^= 1,
        |state| state.config.registers.clear(),
        |state| state.msix.entries.clear(),
        |state| state.common.queues.clear(),
        |state| state.common.queues[0].size = 3,
        |state| state.common.queues[1].size = 64,
        |state| state.common.queues[0].vector = 3,
        |state| state.common.driver_features |= 2,
        |state| state.common.queues[0].desc = u64::MAX,
        |state| state.common.queues[0].used = u64::try_from(RAM).unwrap(),
    ];
    for (number, spoil) in spoil.into_iter().enumerate() {
        let mut state = good.clone();
        spoil(&mut state);
        let other = Machine::new();
        let fresh = other.function.save();
        assert!(other.function.restore(&state).is_err(), "number {number}");
        assert_eq!(other.function.save(), fresh, "number {number}");
    }
}

#[derive(Clone, Debug)]
enum Step {
    Config(u16, Vec<u8>),
    Memory(u64, Vec<u8>),
    Save,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let bytes = || prop::collection::vec(any::<u8>(), 1..9);
    let small = prop::collection::vec(0u8..4, 1..9);
    let value = || prop_oneof![bytes(), small.clone(), Just(vec![0x0f]), Just(vec![0])];
    let step = prop_oneof![
        (0u16..0x100, value()).prop_map(|(at, data)| Step::Config(at, data)),
        (0u64..0x40, value()).prop_map(|(at, data)| Step::Memory(at, data)),
        (0u64..0x8000, value()).prop_map(|(at, data)| Step::Memory(at, data)),
        Just(Step::Save),
    ];
    prop::collection::vec(step, 0..60)
}

proptest! {
    /// No access panics or leaves a state that could not be loaded again, and after all of them a
    /// driver that makes sense gets the device.
    #[test]
    fn garbage_is_survived(steps in steps(), driven: bool) {
        let machine = Machine::new();
        if driven {
            machine.drive();
        }
        for step in steps {
            match step {
                Step::Config(at, data) => {
                    let mut read = data.clone();
                    machine.root.write_config(Machine::at(at), &data);
                    machine.root.read_config(Machine::at(at), &mut read);
                }
                Step::Memory(at, data) => {
                    let mut read = data.clone();
                    machine.function.write_memory(at, &data);
                    machine.function.read_memory(at, &mut read);
                }
                Step::Save => {
                    let state = machine.function.save();
                    let other = Machine::new();
                    other.function.restore(&state).unwrap();
                    prop_assert_eq!(other.function.save(), state);
                }
            }
        }
        machine.root.write_config(Machine::at(0x10), &BASE.to_le_bytes());
        machine.drive();
        prop_assert_eq!(machine.status(), CALM | FEATURES_OK | DRIVER_OK);
        machine.messages.take();
        machine.interrupt().queue(0);
        prop_assert_eq!(machine.messages.take(), vec![(0xfee0_0000, 0x31)]);
    }

    /// Bytes of a peer or a file: any change of them is refused, or loads without harm.
    #[test]
    fn hostile_states_are_refused_or_harmless(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
    ) {
        let machine = Machine::new();
        machine.drive();
        let mut bytes = postcard::to_stdvec(&machine.function.save()).unwrap();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        let _ = postcard::from_bytes::<VirtioPciState>(&bytes[..cut.index(bytes.len())]);
        if let Ok(state) = postcard::from_bytes::<VirtioPciState>(&bytes) {
            let other = Machine::new();
            let json = serde_json::to_string(&state).unwrap();
            prop_assert_eq!(&serde_json::from_str::<VirtioPciState>(&json).unwrap(), &state);
            if other.function.restore(&state).is_ok() {
                other.root.place();
                other.function.nudge();
            }
            let sane = other.function.host.memory.write_obj(0u8, GuestAddress(0));
            prop_assert!(sane.is_ok());
            other.root.write_config(Machine::at(0x10), &BASE.to_le_bytes());
            other.drive();
            prop_assert_eq!(other.device.activations.get() > 0, true);
        }
    }
}
