//! MC146818-style clock at ports 0x70 (index) and 0x71 (data), as far as a kernel needs it to
//! learn the time of day: the host's, in UTC, BCD, 24 hours. Writes to the clock are ignored; no
//! alarm, no interrupt, no memory.

use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;

/// Index port.
pub const CMOS_BASE: u64 = 0x70;
/// Index and data.
pub const CMOS_LEN: u64 = 2;
/// Register of the century, as the FADT tells.
pub const CMOS_CENTURY: u8 = 0x32;

/// The top bit of the index port masks the NMI and is no part of the index.
const INDEX_MASK: u8 = 0x7f;
/// 32.768 kHz divider, usual rate, no update in progress.
const STATUS_A: u8 = 0x26;
/// 24 hours, BCD.
const STATUS_B: u8 = 0x02;
/// The battery is good: time is valid.
const STATUS_D: u8 = 0x80;
/// 9999-12-31 23:59:59, the last second that two digits of century can show.
const SECONDS_MAX: u64 = 253_402_300_799;
const DAYS_PER_400_YEARS: u64 = 146_097;

/// A saved clock: the time itself is always the host's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CmosState {
    /// Which register port 0x71 shows.
    pub index: u8,
}

/// The device.
pub struct Cmos {
    index: AtomicU8,
    /// Seconds since 1970.
    clock: Box<dyn Fn() -> u64 + Send + Sync>,
}

impl Cmos {
    /// A clock that shows the host's time.
    #[must_use]
    pub fn new() -> Self {
        Self::with_clock(Box::new(|| {
            SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
        }))
    }

    /// A clock that shows what `clock` gives: seconds since 1970.
    #[must_use]
    pub fn with_clock(clock: Box<dyn Fn() -> u64 + Send + Sync>) -> Self {
        Self { index: AtomicU8::new(0), clock }
    }

    /// The device's state.
    #[must_use]
    pub fn save(&self) -> CmosState {
        CmosState { index: self.index.load(Ordering::Relaxed) }
    }

    /// Takes the place of a saved device. Every state is valid.
    pub fn restore(&self, state: &CmosState) {
        self.index.store(state.index & INDEX_MASK, Ordering::Relaxed);
    }

    fn register(&self, index: u8) -> u8 {
        let time = Civil::from_unix((self.clock)().min(SECONDS_MAX));
        match index {
            0x00 => bcd(time.second),
            0x02 => bcd(time.minute),
            0x04 => bcd(time.hour),
            // Sunday is 1.
            0x06 => bcd(time.weekday + 1),
            0x07 => bcd(time.day),
            0x08 => bcd(time.month),
            0x09 => bcd(time.year % 100),
            0x0a => STATUS_A,
            0x0b => STATUS_B,
            0x0d => STATUS_D,
            CMOS_CENTURY => bcd(time.year / 100),
            _ => 0,
        }
    }
}

impl Default for Cmos {
    fn default() -> Self {
        Self::new()
    }
}

impl BusDevice for Cmos {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = match at {
                1 => self.register(self.index.load(Ordering::Relaxed)),
                // The index cannot be read on a PC.
                _ => 0xff,
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (at, byte) in (offset..).zip(data) {
            if at == 0 {
                self.index.store(byte & INDEX_MASK, Ordering::Relaxed);
            }
        }
    }
}

/// A date of the Gregorian calendar. Weekday 0 is Sunday.
#[derive(Debug, PartialEq, Eq)]
struct Civil {
    year: u64,
    month: u64,
    day: u64,
    weekday: u64,
    hour: u64,
    minute: u64,
    second: u64,
}

impl Civil {
    fn from_unix(seconds: u64) -> Self {
        let days = seconds / 86_400;
        let of_day = seconds % 86_400;
        // The calendar repeats every 400 years, so the loop over years is short.
        let mut year = 1970 + 400 * (days / DAYS_PER_400_YEARS);
        let mut rest = days % DAYS_PER_400_YEARS;
        while rest >= days_of_year(year) {
            rest -= days_of_year(year);
            year += 1;
        }
        let mut month = 1;
        while rest >= days_of_month(year, month) {
            rest -= days_of_month(year, month);
            month += 1;
        }
        Self {
            year,
            month,
            day: rest + 1,
            // 1970-01-01 was a Thursday.
            weekday: (days + 4) % 7,
            hour: of_day / 3600,
            minute: of_day / 60 % 60,
            second: of_day % 60,
        }
    }
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn days_of_year(year: u64) -> u64 {
    if is_leap(year) { 366 } else { 365 }
}

fn days_of_month(year: u64, month: u64) -> u64 {
    match month {
        2 if is_leap(year) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Two decimal digits; `value` is below 100.
fn bcd(value: u64) -> u8 {
    u8::try_from(((value / 10 % 10) << 4) | (value % 10)).unwrap_or(0)
}
