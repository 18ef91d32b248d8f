//! Port 0x80, to which firmware writes progress codes and kernels write for a short delay.

use std::sync::atomic::{AtomicU8, Ordering};

use crate::bus::BusDevice;
use crate::counters::{Counter, Counters};

/// The port.
pub const DEBUG_PORT_BASE: u64 = 0x80;
/// One port.
pub const DEBUG_PORT_LEN: u64 = 1;

/// Takes every byte and remembers the last. Nothing in it is worth saving.
#[derive(Debug, Default)]
pub struct DebugPort {
    last: AtomicU8,
    writes: Counter,
}

impl BusDevice for DebugPort {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(self.last.load(Ordering::Relaxed));
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        self.writes.add(1);
        if let Some(last) = data.last() {
            self.last.store(*last, Ordering::Relaxed);
        }
    }
}

impl Counters for DebugPort {
    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("writes", self.writes.get()),
            ("last_code", u64::from(self.last.load(Ordering::Relaxed))),
        ]
    }
}
