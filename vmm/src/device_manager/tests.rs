//! Machines, with their devices as a whole. They need /dev/kvm.

use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};

use hypervisor::Hypervisor;

use super::*;
use crate::machine::Machine;

fn machine(console: ConsoleConfig) -> Machine {
    let serial = ConsoleConfig::new(ConsoleOutputMode::Off);
    let mut config = VmConfig { serial, console, ..VmConfig::default() };
    config.memory.size = 64 << 20;
    Machine::build(
        &Arc::new(Hypervisor::open().unwrap()),
        config,
        crate::device_manager::taps::TapDescriptors::default(),
    )
    .unwrap()
}

fn gate(machine: &Machine) -> &OutputGate {
    machine.devices().virtio.console.as_ref().unwrap().gate()
}

const HOLDS: Holds = Holds { console: true, disks: false };

#[test]
fn a_console_s_output_is_held_carried_over_and_released_as_a_serial_port_s_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let primary = machine(ConsoleConfig::to_file(path("a")));
    let devices = primary.devices();
    let called = Arc::<AtomicUsize>::default();
    let counted = Arc::clone(&called);
    let waker: Arc<dyn Fn() + Send + Sync> = Arc::new(move || {
        counted.fetch_add(1, Ordering::SeqCst);
    });
    devices.set_output_waker(&waker);
    devices.hold_output(Holds { console: false, ..HOLDS });
    gate(&primary).write(b"passed ");
    assert_eq!((devices.output_held_bytes(), devices.output_waiting()), (0, false));
    devices.settle_output();
    devices.hold_output(HOLDS);
    gate(&primary).write(b"held ");
    assert_eq!((devices.output_held_bytes(), devices.output_waiting()), (5, true));
    assert_eq!(called.load(Ordering::SeqCst), 1);
    devices.park();
    let state = devices.save();
    devices.seal_output(1);
    devices.unpark();
    assert_eq!((devices.output_held_bytes(), devices.output_waiting()), (5, false));
    gate(&primary).write(b"of the next epoch");
    devices.seal_output(2);
    devices.commit_output(1);
    devices.settle_output();
    // The peer has taken over: nothing more is said here.
    devices.silence();
    gate(&primary).write(b"after all");
    devices.finish();
    assert_eq!(fs::read(path("a")).unwrap(), b"passed held ");

    let backup = machine(ConsoleConfig::to_file(path("b")));
    let devices = backup.devices();
    devices.check(&state).unwrap();
    devices.park();
    devices.restore(&state).unwrap();
    devices.unpark();
    gate(&backup).write(b"and on");
    devices.finish();
    assert_eq!(fs::read(path("b")).unwrap(), b"held and on");
    // A machine without the device is another one.
    let other = machine(ConsoleConfig::new(ConsoleOutputMode::Off));
    assert!(matches!(other.devices().check(&state), Err(DeviceError::Pci(PciError::Count { .. }))));
}

#[test]
fn a_state_with_more_output_than_a_gate_holds_is_refused() {
    use devices::virtio::state::DeviceState;
    let machine = machine(ConsoleConfig::new(ConsoleOutputMode::Null));
    let mut state = machine.devices().save();
    machine.devices().check(&state).unwrap();
    for function in &mut state.pci.functions {
        if let DeviceState::Console(console) = &mut function.device {
            console.pending_output = vec![0; devices::output_gate::GATE_BYTES_MAX + 1];
        }
    }
    assert!(machine.devices().check(&state).is_err());
}

#[test]
fn a_console_is_in_the_tree_and_the_counters_and_its_pty_has_a_name() {
    let machine = machine(ConsoleConfig::new(ConsoleOutputMode::Pty));
    let devices = machine.devices();
    let console = &devices.tree()["__console"];
    assert_eq!(console.pci_bdf.as_deref(), Some("0000:00:02.0"));
    assert_eq!(devices.counters()["__console"]["output_bytes"], 0);
    assert!(devices.console_pty().is_some_and(|path| path.starts_with("/dev/pts")));
    assert_eq!(devices.serial_pty(), None);
}
