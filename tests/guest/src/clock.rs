//! Time, from the TSC.

use core::arch::x86_64::_rdtsc;

/// Nanoseconds since the guest began.
#[derive(Clone, Debug)]
pub struct Clock {
    start: u64,
    khz: u64,
    /// Nanoseconds per tick of the TSC, times 2^32.
    scale: u64,
}

impl Clock {
    #[must_use]
    pub fn new(khz: u64) -> Self {
        let khz = khz.max(1);
        Self { start: tsc(), khz, scale: (1_000_000 << 32) / khz }
    }

    #[must_use]
    pub fn khz(&self) -> u64 {
        self.khz
    }

    #[must_use]
    pub fn now_ns(&self) -> u64 {
        let ticks = tsc().saturating_sub(self.start);
        let scaled = (u128::from(ticks) * u128::from(self.scale)) >> 32;
        u64::try_from(scaled).unwrap_or(u64::MAX)
    }

    /// Waits without giving the processor up.
    pub fn spin(&self, duration_ns: u64) {
        let until_ns = self.now_ns() + duration_ns;
        while self.now_ns() < until_ns {
            core::hint::spin_loop();
        }
    }
}

#[must_use]
pub fn tsc() -> u64 {
    // SAFETY: CR4.TSD is clear, so ring 3 may read the TSC.
    unsafe { _rdtsc() }
}
