//! The local APIC in xAPIC mode (Intel SDM 3A, chapter 11): starting processors, waking up.

use core::ptr::{with_exposed_provenance, with_exposed_provenance_mut};

use guest_logic::cmdline::Wait;
use guest_logic::machine::LAPIC_ADDRESS;

use crate::boot::{self, SPURIOUS_VECTOR, TIMER_VECTOR};
use crate::clock::{Clock, tsc};

const ID: usize = 0x20;
pub const EOI: usize = 0xb0;
const SPURIOUS: usize = 0xf0;
const COMMAND_LOW: usize = 0x300;
const COMMAND_HIGH: usize = 0x310;
const TIMER: usize = 0x320;
const LINT0: usize = 0x350;
const TIMER_INITIAL: usize = 0x380;
const TIMER_CURRENT: usize = 0x390;
const TIMER_DIVIDE: usize = 0x3e0;

const ENABLE: u32 = 1 << 8;
const MASKED: u32 = 1 << 16;
const DIVIDE_BY_1: u32 = 0b1011;
const INIT: u32 = 0x4500;
const STARTUP: u32 = 0x4600;

/// KVM's timer counts nanoseconds: its bus runs at 1 GHz.
const TIMER_KHZ: u64 = 1_000_000;
const CALIBRATION_TICKS: u64 = 20_000_000;

/// Less than this is not worth a trip through ring 0.
const HALT_NS_MIN: u64 = 30_000;
const HALT_NS_MAX: u64 = 1_000_000_000;

fn read(register: usize) -> u32 {
    // SAFETY: map.rs has mapped the page uncached, and it is no memory that Rust knows of.
    unsafe { with_exposed_provenance::<u32>(address(register)).read_volatile() }
}

fn write(register: usize, value: u32) {
    // SAFETY: as for `read`.
    unsafe { with_exposed_provenance_mut::<u32>(address(register)).write_volatile(value) }
}

const fn address(register: usize) -> usize {
    LAPIC_ADDRESS as usize + register
}

#[must_use]
pub fn id() -> u32 {
    read(ID) >> 24
}

/// Turns this processor's APIC on, its timer silent. Firmware may have left a legacy interrupt
/// controller running behind LINT0.
pub fn enable() {
    write(LINT0, MASKED);
    write(SPURIOUS, ENABLE | u32::from(SPURIOUS_VECTOR));
    write(TIMER_DIVIDE, DIVIDE_BY_1);
    write(TIMER, MASKED | u32::from(TIMER_VECTOR));
}

pub fn send_init(id: u8) {
    write(COMMAND_HIGH, u32::from(id) << 24);
    write(COMMAND_LOW, INIT);
}

/// `page`: the number of the page below 1 MiB at which the processor begins.
pub fn send_startup(id: u8, page: u8) {
    write(COMMAND_HIGH, u32::from(id) << 24);
    write(COMMAND_LOW, STARTUP | u32::from(page));
}

/// The TSC's rate against the timer's.
#[must_use]
pub fn calibrate_tsc_khz() -> u64 {
    write(TIMER_INITIAL, u32::MAX);
    let start = tsc();
    let mut elapsed = 0;
    while elapsed < CALIBRATION_TICKS {
        elapsed = u64::from(u32::MAX - read(TIMER_CURRENT));
    }
    let ticks = tsc().saturating_sub(start);
    write(TIMER_INITIAL, 0);
    let khz = u128::from(ticks) * u128::from(TIMER_KHZ) / u128::from(elapsed);
    u64::try_from(khz).unwrap_or(0)
}

/// Waits until the clock says `until_ns`.
pub fn wait_until(clock: &Clock, wait: Wait, until_ns: u64) {
    loop {
        let left_ns = until_ns.saturating_sub(clock.now_ns());
        if left_ns == 0 {
            return;
        }
        if wait == Wait::Spin || left_ns < HALT_NS_MIN {
            core::hint::spin_loop();
            continue;
        }
        write(TIMER, u32::from(TIMER_VECTOR));
        write(TIMER_INITIAL, u32::try_from(left_ns.min(HALT_NS_MAX)).unwrap_or(u32::MAX));
        boot::wait_for_interrupt();
    }
}
