//! Input, output and the ways to end. Ring 3 may use ports because every TSS has an I/O
//! permission bitmap that allows them.

use core::arch::asm;

use guest_logic::machine::{POWER_OFF, RESET, RESET_PORT, SLEEP_CONTROL_PORT};

use crate::boot;

pub fn output(port: u16, value: u8) {
    // SAFETY: writing a port changes a device, not memory that Rust knows of.
    unsafe {
        asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags));
    }
}

#[must_use]
pub fn input(port: u16) -> u8 {
    let value;
    // SAFETY: reading a port changes a device at most, not memory that Rust knows of.
    unsafe {
        asm!("in al, dx", in("dx") port, out("al") value, options(nostack, preserves_flags));
    }
    value
}

pub fn output_u32(port: u16, value: u32) {
    // SAFETY: as for `output`.
    unsafe {
        asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags));
    }
}

#[must_use]
pub fn input_u32(port: u16) -> u32 {
    let value;
    // SAFETY: as for `input`.
    unsafe {
        asm!("in eax, dx", in("dx") port, out("eax") value, options(nostack, preserves_flags));
    }
    value
}

/// ACPI's S5.
pub fn power_off() -> ! {
    output(SLEEP_CONTROL_PORT, POWER_OFF);
    boot::park();
}

/// ACPI's reset register.
pub fn reset() -> ! {
    output(RESET_PORT, RESET);
    boot::park();
}
