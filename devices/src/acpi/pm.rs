//! Power management registers at ports 0x600 to 0x60f.
//!
//! | Port | Register | Meaning |
//! |---|---|---|
//! | 0x600 | sleep control (ACPI 6.5, 4.8.3.7) | 0x34, SLP_EN with SLP_TYP 5: power off |
//! | 0x601 | reset | byte 1: reset |
//! | 0x602 | sleep status | WAK_STS never set: a machine that was off has reset |
//! | 0x608 | events | bit 0: power button; reading clears |
//!
//! What leaves: [`PowerEvent`]s through a callback, on the vCPU's thread, and the interrupt of the
//! generic event device (ACPI0013) when the button is pressed.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::counters::{Counter, Counters};
use crate::irq::IrqLine;

/// First port.
pub const PM_BASE: u16 = 0x600;
/// Ports of the device.
pub const PM_LEN: u16 = 0x10;
/// Sleep control register.
pub const SLEEP_CONTROL_PORT: u16 = PM_BASE;
/// Reset register.
pub const RESET_PORT: u16 = PM_BASE + 1;
/// Sleep status register.
pub const SLEEP_STATUS_PORT: u16 = PM_BASE + 2;
/// Event register.
pub const EVENT_PORT: u16 = PM_BASE + 8;
/// The value that resets.
pub const RESET_VALUE: u8 = 1;
/// SLP_TYP of the state S5, soft off.
pub const SLEEP_TYPE_S5: u8 = 5;
/// Interrupt of the generic event device.
pub const EVENT_GSI: u32 = 5;
/// Bit of the event register.
pub const EVENT_POWER_BUTTON: u8 = 1;

const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 0b111;

const SLEEP_CONTROL: u64 = 0;
const RESET: u64 = 1;
const SLEEP_STATUS: u64 = 2;
const EVENT: u64 = 8;

/// What a guest asks of its machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PowerEvent {
    /// Power off.
    Off,
    /// Reset.
    Reset,
}

/// Called on the vCPU's thread: it may only signal.
pub type PowerCallback = Arc<dyn Fn(PowerEvent) + Send + Sync>;

/// A saved device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PmState {
    /// Events that the guest has not read yet.
    pub events: u8,
}

/// The device.
pub struct PmDevice {
    events: AtomicU8,
    irq: IrqLine,
    on_power: PowerCallback,
    sleeps_ignored: Counter,
    power_buttons: Counter,
}

impl PmDevice {
    /// `irq` is the line of [`EVENT_GSI`].
    #[must_use]
    pub fn new(irq: IrqLine, on_power: PowerCallback) -> Self {
        Self {
            events: AtomicU8::new(0),
            irq,
            on_power,
            sleeps_ignored: Counter::default(),
            power_buttons: Counter::default(),
        }
    }

    /// The line to register as irqfd.
    #[must_use]
    pub fn irq(&self) -> &IrqLine {
        &self.irq
    }

    /// Presses the power button: a guest that listens shuts down.
    pub fn power_button(&self) -> io::Result<()> {
        self.power_buttons.add(1);
        self.events.fetch_or(EVENT_POWER_BUTTON, Ordering::AcqRel);
        self.irq.raise()
    }

    /// The device's state.
    #[must_use]
    pub fn save(&self) -> PmState {
        PmState { events: self.events.load(Ordering::Acquire) }
    }

    /// Takes the place of a saved device; events that were not read interrupt again.
    pub fn restore(&self, state: &PmState) -> io::Result<()> {
        let events = state.events & EVENT_POWER_BUTTON;
        self.events.store(events, Ordering::Release);
        if events == 0 { Ok(()) } else { self.irq.raise() }
    }

    fn sleep(&self, value: u8) {
        if value & SLEEP_ENABLE == 0 {
            return;
        }
        if (value >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK == SLEEP_TYPE_S5 {
            (self.on_power)(PowerEvent::Off);
        } else {
            self.sleeps_ignored.add(1);
        }
    }
}

impl BusDevice for PmDevice {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = match at {
                SLEEP_CONTROL | RESET | SLEEP_STATUS => 0,
                EVENT => self.events.swap(0, Ordering::AcqRel),
                _ => 0xff,
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (at, byte) in (offset..).zip(data) {
            match (at, *byte) {
                (SLEEP_CONTROL, value) => self.sleep(value),
                (RESET, RESET_VALUE) => (self.on_power)(PowerEvent::Reset),
                _ => {}
            }
        }
    }
}

impl Counters for PmDevice {
    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("power_buttons", self.power_buttons.get()),
            ("sleeps_ignored", self.sleeps_ignored.get()),
        ]
    }
}
