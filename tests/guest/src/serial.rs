//! The serial port: whole lines out, single bytes in. A lock keeps the lines of several
//! processors apart.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, Ordering};

use guest_logic::line::Line;
use guest_logic::machine::SERIAL_PORT;

use crate::port;

const LINE_STATUS: u16 = SERIAL_PORT + 5;
const DATA_READY: u8 = 0x01;
const TRANSMITTER_EMPTY: u8 = 0x20;
const LINE_SIZE: usize = 320;

static LOCK: AtomicBool = AtomicBool::new(false);

/// Prints one line.
macro_rules! say {
    ($($argument:tt)*) => { $crate::serial::say_line(format_args!($($argument)*)) };
}
pub(crate) use say;

pub fn say_line(text: fmt::Arguments<'_>) {
    while LOCK.swap(true, Ordering::Acquire) {
        core::hint::spin_loop();
    }
    say_unlocked(text);
    LOCK.store(false, Ordering::Release);
}

/// For a panic: whoever holds the lock may never give it back.
pub fn say_unlocked(text: fmt::Arguments<'_>) {
    let mut line = Line::<LINE_SIZE>::new();
    // A line never refuses text, it cuts it.
    let _ = line.write_fmt(text);
    // Every look at the status costs an exit, and the VMM's port takes each byte at once: one
    // look a line is enough.
    while port::input(LINE_STATUS) & TRANSMITTER_EMPTY == 0 {
        core::hint::spin_loop();
    }
    for byte in line.bytes() {
        port::output(SERIAL_PORT, *byte);
    }
    port::output(SERIAL_PORT, b'\n');
}

/// A byte that has arrived.
pub fn received() -> Option<u8> {
    (port::input(LINE_STATUS) & DATA_READY != 0).then(|| port::input(SERIAL_PORT))
}
