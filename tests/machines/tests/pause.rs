//! An epoch's pause of a machine in this process: the vCPUs are saved beside what else it does.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hypervisor::{Hypervisor, VcpuState};
use replication::ids::{PAGE_SIZE, PageIndex};
use replication::ram::{PageSet, Ram};
use serde_json::json;
use understudy_tests::interrupt::Folder;
use understudy_tests::serial::Serial;
use vmm::device_manager::taps::TapDescriptors;
use vmm::machine::Machine;

/// IA32_TIME_STAMP_COUNTER (Intel SDM vol. 4).
const TSC: u32 = 0x10;
const VCPUS: u32 = 4;

fn machine(folder: &Folder) -> Result<Machine> {
    let machine = build(folder)?;
    machine.boot()?;
    Ok(machine)
}

fn build(folder: &Folder) -> Result<Machine> {
    let config = json!({
        "payload": {"kernel": guest_image::PATH, "cmdline": "workload=verify tick_ms=20"},
        "cpus": {"boot_vcpus": VCPUS, "max_vcpus": VCPUS},
        "memory": {"size": 64 << 20},
        "serial": {"mode": "Socket", "socket": folder.path().join("serial")},
        "console": {"mode": "Off"},
    });
    let hypervisor = Arc::new(Hypervisor::open()?);
    let config = serde_json::from_value(config)?;
    Ok(Machine::build(&hypervisor, config, TapDescriptors::default())?)
}

/// By the vCPU's own clock.
fn ticks(state: &VcpuState) -> Result<u64> {
    let msr = state.msrs.iter().find(|msr| msr.index == TSC);
    Ok(msr.context("a state without a time stamp counter")?.data)
}

/// A pause that ends without a capture, as one does whose epoch is too large, must not leave its
/// states to the next one: memory would be newer than the registers.
#[test]
fn states_are_those_of_the_last_stop() -> Result<()> {
    let folder = Folder::new()?;
    let machine = machine(&folder)?;
    for _ in 0..5 {
        machine.quiesce()?;
        let first = machine.capture()?.vcpus;
        let since = Instant::now();
        machine.release()?;
        std::thread::sleep(Duration::from_millis(5));
        machine.quiesce()?;
        machine.release()?;
        std::thread::sleep(Duration::from_millis(20));
        let least = since.elapsed();
        machine.quiesce()?;
        let second = machine.capture()?.vcpus;
        machine.release()?;
        ensure!(second.len() == first.len() && first.len() == usize::try_from(VCPUS)?);
        for (id, (before, after)) in first.iter().zip(&second).enumerate() {
            ensure!(before.tsc_khz > 0, "KVM does not say how fast the guest's clock runs");
            let passed = ticks(after)?.saturating_sub(ticks(before)?);
            // Its frequency is known to a kHz and a host's clock is slewed.
            let milliseconds = passed / u64::from(before.tsc_khz) + 1;
            let least = u64::try_from(least.as_millis())?;
            ensure!(milliseconds >= least, "vCPU {id} is of {milliseconds} ms of {least}");
        }
    }
    Ok(())
}

/// A guest that was held until there was room is sealed where it stands: the pause that follows reads
/// what the vCPUs are then, and one release ends both.
#[test]
fn a_guest_that_was_held_is_read_by_the_pause_that_follows() -> Result<()> {
    let folder = Folder::new()?;
    let machine = machine(&folder)?;
    for _ in 0..5 {
        machine.quiesce()?;
        let before = machine.capture()?.vcpus;
        machine.release()?;
        std::thread::sleep(Duration::from_millis(20));
        machine.hold()?;
        // No save of the stop that only held it: what it says would be as old as that.
        std::thread::sleep(Duration::from_millis(20));
        machine.quiesce()?;
        let held = machine.capture()?.vcpus;
        machine.release()?;
        std::thread::sleep(Duration::from_millis(20));
        machine.quiesce()?;
        let after = machine.capture()?.vcpus;
        machine.release()?;
        for ((before, held), after) in before.iter().zip(&held).zip(&after) {
            for (first, second, least_ms) in [(before, held, 39), (held, after, 19)] {
                let passed = ticks(second)?.saturating_sub(ticks(first)?);
                let least = u64::from(first.tsc_khz) * least_ms;
                ensure!(passed >= least, "{passed} ticks of {least}");
            }
        }
    }
    Ok(())
}

/// Where the log is on already KVM takes turning it on for no change, and names what was written since:
/// a first copy of that would be a VM of zeroes.
#[test]
fn tracking_that_is_turned_on_again_names_every_page() -> Result<()> {
    let folder = Folder::new()?;
    let machine = machine(&folder)?;
    let pages = machine.memory().ram().pages();
    for turn in 0..3 {
        machine.set_tracking(true)?;
        let mut dirty = PageSet::new(pages);
        machine.harvest(&mut dirty)?;
        ensure!(dirty.len() == pages, "turn {turn}: {} of {pages} pages", dirty.len());
    }
    let mut dirty = PageSet::new(pages);
    machine.harvest(&mut dirty)?;
    ensure!(dirty.len() < pages, "what nobody wrote is named as well");
    Ok(())
}

fn bytes(ram: &Ram) -> Vec<u8> {
    let (mut all, mut page) = (vec![], [0; PAGE_SIZE]);
    for at in 0..ram.pages() {
        assert!(ram.read_page(PageIndex(at), &mut page));
        all.extend_from_slice(&page);
    }
    all
}

/// What a backup finds out before it acknowledges the first epoch: after that the primary may be gone.
#[test]
fn vcpu_states_that_this_host_does_not_take_are_found_and_leave_nothing() -> Result<()> {
    let folder = Folder::new()?;
    let source = machine(&folder)?;
    std::thread::sleep(Duration::from_millis(50));
    source.quiesce()?;
    let states = source.capture()?.vcpus;
    source.destroy();
    drop(source);

    let twin = build(&folder)?;
    let before = bytes(twin.memory().ram());
    twin.try_vcpus(&states)?;
    let mut unknown = states.clone();
    let mut msr = *unknown[1].msrs.first().context("a state without a register")?;
    (msr.index, msr.data) = (0xdead_beef, 1);
    unknown[1].msrs.push(msr);
    ensure!(twin.try_vcpus(&unknown).is_err(), "a register that no processor has was taken");
    let mut longer = states;
    longer[2].xsave.0.resize(64 << 10, 0);
    ensure!(twin.try_vcpus(&longer).is_err(), "registers that this host lacks were taken");
    ensure!(bytes(twin.memory().ram()) == before, "memory was written");
    // What it powers on with is there again.
    twin.boot()?;
    let limit = Duration::from_secs(30);
    let serial = Serial::connect(&folder.path().join("serial"), limit)?;
    serial.wait_line("the guest's first words", 0, limit, |line| !line.is_empty())?;
    Ok(())
}
