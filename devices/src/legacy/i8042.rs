//! Ports 0x60 to 0x64: a keyboard controller without a keyboard, so that a kernel's last resort
//! for a reboot works, and system control port B.
//!
//! | Port | Read | Write |
//! |---|---|---|
//! | 0x60 | 0 | ignored |
//! | 0x61 | timer 2 output set, refresh toggles, low bits as written | gate and speaker bits kept |
//! | 0x64 | 0: nothing to read, ready for a command | 0xfe: reset |
//!
//! There is no PIT. Timer 2's output reads as set because a kernel that calibrates with it waits
//! for that bit without a limit; it then finds the measurement implausible and uses another clock.

use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::acpi::pm::{PowerCallback, PowerEvent};
use crate::bus::BusDevice;

/// First port.
pub const I8042_BASE: u64 = 0x60;
/// Ports 0x60 to 0x64.
pub const I8042_LEN: u64 = 5;

const PORT_B: u64 = 1;
const COMMAND: u64 = 4;
const COMMAND_RESET: u8 = 0xfe;
/// Timer 2 gate, speaker, and the two error enables.
const PORT_B_WRITABLE: u8 = 0x0f;
const PORT_B_REFRESH: u8 = 1 << 4;
const PORT_B_TIMER2_OUT: u8 = 1 << 5;

/// A saved controller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042State {
    /// Low bits and refresh toggle of port 0x61.
    pub port_b: u8,
}

/// The device.
pub struct I8042 {
    state: Mutex<I8042State>,
    on_power: PowerCallback,
}

impl I8042 {
    /// `on_power` is called with [`PowerEvent::Reset`], on the vCPU's thread.
    #[must_use]
    pub fn new(on_power: PowerCallback) -> Self {
        Self { state: Mutex::default(), on_power }
    }

    /// The device's state.
    #[must_use]
    pub fn save(&self) -> I8042State {
        *self.lock()
    }

    /// Takes the place of a saved device. Every state is valid.
    pub fn restore(&self, state: &I8042State) {
        let known = PORT_B_WRITABLE | PORT_B_REFRESH;
        *self.lock() = I8042State { port_b: state.port_b & known };
    }

    fn lock(&self) -> MutexGuard<'_, I8042State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = match at {
                PORT_B => {
                    let mut state = self.lock();
                    state.port_b ^= PORT_B_REFRESH;
                    state.port_b | PORT_B_TIMER2_OUT
                }
                0 | COMMAND => 0,
                _ => 0xff,
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (at, byte) in (offset..).zip(data) {
            match (at, *byte) {
                (PORT_B, value) => {
                    let mut state = self.lock();
                    state.port_b = (state.port_b & !PORT_B_WRITABLE) | (value & PORT_B_WRITABLE);
                }
                (COMMAND, COMMAND_RESET) => (self.on_power)(PowerEvent::Reset),
                _ => {}
            }
        }
    }
}
