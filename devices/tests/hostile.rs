//! A guest that writes anything anywhere: no device panics, and each one can be saved and
//! restored afterwards.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use devices::acpi::pm::{PM_BASE, PM_LEN, PmDevice, PmState, PowerCallback, PowerEvent};
use devices::bus::{Bus, BusDevice};
use devices::console::Input;
use devices::counters::Counters;
use devices::irq::IrqLine;
use devices::legacy::cmos::{CMOS_BASE, CMOS_LEN, Cmos, CmosState};
use devices::legacy::debug_port::{DEBUG_PORT_BASE, DEBUG_PORT_LEN, DebugPort};
use devices::legacy::i8042::{I8042, I8042_BASE, I8042_LEN, I8042State};
use devices::output_gate::OutputGate;
use devices::serial::{SERIAL_BASE, SERIAL_LEN, Serial, SerialState};
use proptest::prelude::*;

/// A machine's ports.
struct Machine {
    bus: Bus,
    serial: Arc<Serial>,
    pm: Arc<PmDevice>,
    i8042: Arc<I8042>,
    cmos: Arc<Cmos>,
    debug: Arc<DebugPort>,
    power: Arc<Mutex<Vec<PowerEvent>>>,
}

impl Machine {
    fn new() -> Self {
        let power = Arc::<Mutex<Vec<PowerEvent>>>::default();
        let recorded = Arc::clone(&power);
        let on_power: PowerCallback = Arc::new(move |event| recorded.lock().unwrap().push(event));
        let gate = Arc::new(OutputGate::new());
        let machine = Self {
            bus: Bus::pio(),
            serial: Serial::new(IrqLine::new().unwrap(), gate).unwrap(),
            pm: Arc::new(PmDevice::new(IrqLine::new().unwrap(), Arc::clone(&on_power))),
            i8042: Arc::new(I8042::new(on_power)),
            // 2026-02-28 23:59:58 UTC, a Saturday.
            cmos: Arc::new(Cmos::with_clock(Box::new(|| 1_772_323_198))),
            debug: Arc::default(),
            power,
        };
        let ranges: [(u64, u64, Arc<dyn BusDevice>); 5] = [
            (SERIAL_BASE, SERIAL_LEN, machine.serial.clone()),
            (u64::from(PM_BASE), u64::from(PM_LEN), machine.pm.clone()),
            (I8042_BASE, I8042_LEN, machine.i8042.clone()),
            (CMOS_BASE, CMOS_LEN, machine.cmos.clone()),
            (DEBUG_PORT_BASE, DEBUG_PORT_LEN, machine.debug.clone()),
        ];
        for (base, len, device) in ranges {
            machine.bus.insert(base, len, device).unwrap();
        }
        machine
    }

    fn inb(&self, port: u64) -> u8 {
        let mut data = [0];
        self.bus.read(port, &mut data);
        data[0]
    }

    fn outb(&self, port: u64, value: u8) {
        self.bus.write(port, &[value]);
    }

    fn power(&self) -> Vec<PowerEvent> {
        std::mem::take(&mut self.power.lock().unwrap())
    }

    fn save(&self) -> (SerialState, PmState, I8042State, CmosState) {
        (self.serial.save(), self.pm.save(), self.i8042.save(), self.cmos.save())
    }
}

#[test]
fn power_off_and_reset_are_what_guests_were_told() {
    let machine = Machine::new();
    machine.outb(0x600, 0x34);
    assert_eq!(machine.power(), [PowerEvent::Off]);
    machine.outb(0x601, 0x01);
    assert_eq!(machine.power(), [PowerEvent::Reset]);
    machine.outb(0x64, 0xfe);
    assert_eq!(machine.power(), [PowerEvent::Reset]);
    // Not enabled, another sleep state, other values, other ports.
    for (port, value) in
        [(0x600, 0x14), (0x600, 0x2c), (0x601, 0), (0x601, 2), (0x602, 0x80), (0x64, 0xff)]
    {
        machine.outb(port, value);
    }
    assert_eq!(machine.power(), []);
    assert_eq!((machine.inb(0x600), machine.inb(0x601), machine.inb(0x602)), (0, 0, 0));
    assert!(machine.pm.counters().contains(&("sleeps_ignored", 1)));
}

#[test]
fn the_power_button_interrupts_until_it_is_read() {
    let machine = Machine::new();
    machine.pm.power_button().unwrap();
    assert_eq!(machine.pm.irq().event().read().unwrap(), 1);
    let state = machine.pm.save();
    assert_eq!((machine.inb(0x608), machine.inb(0x608)), (1, 0));

    let restored = Machine::new();
    restored.pm.restore(&state).unwrap();
    assert_eq!(restored.pm.irq().event().read().unwrap(), 1);
    assert_eq!(restored.inb(0x608), 1);
    restored.pm.restore(&PmState { events: 0xfe }).unwrap();
    assert!(restored.pm.irq().event().read().is_err());
    assert_eq!(restored.inb(0x608), 0);
}

#[test]
fn the_clock_tells_the_date_in_bcd() {
    let machine = Machine::new();
    let register = |index: u8| {
        machine.outb(0x70, index);
        machine.inb(0x71)
    };
    let time = [0x32, 9, 8, 7, 6, 4, 2, 0].map(register);
    assert_eq!(time, [0x20, 0x26, 0x02, 0x28, 0x07, 0x23, 0x59, 0x58]);
    assert_eq!(register(0x0a) & 0x80, 0, "no update in progress");
    assert_eq!((register(0x0b), register(0x0d)), (0x02, 0x80));
    // The top bit is the NMI mask; the state is the index.
    machine.outb(0x70, 0x80 | 0x09);
    assert_eq!(machine.cmos.save(), CmosState { index: 9 });
    let restored = Machine::new();
    restored.cmos.restore(&machine.cmos.save());
    assert_eq!(restored.inb(0x71), 0x26);
}

#[test]
fn the_clock_agrees_with_known_dates() {
    for (seconds, date) in [
        (0, [0x19, 0x70, 0x01, 0x01, 0x05]),
        (951_782_400, [0x20, 0x00, 0x02, 0x29, 0x03]),
        (4_107_542_400, [0x21, 0x00, 0x03, 0x01, 0x02]),
        (253_402_300_799, [0x99, 0x99, 0x12, 0x31, 0x06]),
        (u64::MAX, [0x99, 0x99, 0x12, 0x31, 0x06]),
    ] {
        let clock = Cmos::with_clock(Box::new(move || seconds));
        let shown = [0x32, 9, 8, 7, 6].map(|index: u8| {
            clock.write(0, &[index]);
            let mut data = [0];
            clock.read(1, &mut data);
            data[0]
        });
        assert_eq!(shown, date, "{seconds}");
    }
}

#[test]
fn port_b_toggles_and_never_hangs_a_calibration() {
    let machine = Machine::new();
    machine.outb(0x61, 0xfd);
    let (first, second) = (machine.inb(0x61), machine.inb(0x61));
    assert_eq!(first ^ second, 0x10);
    assert_eq!((first & 0x0f, first & 0x20), (0x0d, 0x20));
    assert_eq!(machine.inb(0x64) & 0x03, 0);
    let restored = Machine::new();
    restored.i8042.restore(&machine.i8042.save());
    assert_eq!(restored.inb(0x61), machine.inb(0x61));
}

#[test]
fn the_debug_port_takes_and_shows_codes() {
    let machine = Machine::new();
    machine.outb(0x80, 0x42);
    assert_eq!(machine.inb(0x80), 0x42);
    assert!(machine.debug.counters().contains(&("last_code", 0x42)));
}

#[test]
fn vcpus_share_the_ports() {
    let machine = Machine::new();
    let seen = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for byte in 0..4 {
            let (machine, seen) = (&machine, &seen);
            scope.spawn(move || {
                for _ in 0..1000 {
                    machine.outb(0x3f8, byte);
                    seen.fetch_add(u32::from(machine.inb(0x3fd) & 0x20 != 0), Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(seen.into_inner(), 4000);
    assert!(machine.serial.counters().contains(&("output_bytes", 4000)));
}

#[derive(Clone, Debug)]
enum Access {
    Read(u64, usize),
    Write(u64, Vec<u8>),
    Input(Vec<u8>),
}

fn access() -> impl Strategy<Value = Access> {
    // Mostly our ports, their edges included.
    let port = prop_oneof![
        8 => SERIAL_BASE - 2..SERIAL_BASE + SERIAL_LEN + 1,
        3 => 0x5feu64..0x612,
        3 => 0x5eu64..0x82,
        1 => any::<u64>(),
    ];
    let data = prop::collection::vec(any::<u8>(), 0..9);
    prop_oneof![
        (port.clone(), 0usize..9).prop_map(|(port, len)| Access::Read(port, len)),
        (port, data.clone()).prop_map(|(port, data)| Access::Write(port, data)),
        data.prop_map(Access::Input),
    ]
}

proptest! {
    #[test]
    fn any_accesses_leave_a_machine_that_can_be_saved(
        accesses in prop::collection::vec(access(), 0..200),
        holding: bool,
    ) {
        let machine = Machine::new();
        if holding {
            machine.serial.gate().hold();
        }
        for (epoch, access) in (1..).zip(accesses) {
            match access {
                Access::Read(port, len) => machine.bus.read(port, &mut vec![0; len]),
                Access::Write(port, data) => machine.bus.write(port, &data),
                Access::Input(data) => drop(machine.serial.take(&data)),
            }
            machine.serial.gate().seal(epoch);
        }
        let state = machine.save();
        let restored = Machine::new();
        restored.serial.gate().hold();
        restored.serial.restore(&state.0).unwrap();
        restored.pm.restore(&state.1).unwrap();
        restored.i8042.restore(&state.2);
        restored.cmos.restore(&state.3);
        prop_assert_eq!(restored.save(), state);
    }

    #[test]
    fn any_bytes_are_no_panic_as_a_state(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        if let Ok((state, _)) = postcard::take_from_bytes::<SerialState>(&bytes) {
            let machine = Machine::new();
            let accepted = machine.serial.restore(&state).is_ok();
            prop_assert_eq!(accepted, state.validate().is_ok());
        }
    }
}
