//! When the announcements of a take-over are sent.
//!
//! One at once and one after each of [`PAUSES_MS`]: a switch that is slow to come up, or a frame
//! that is lost, must not leave the guest unreachable until it speaks by itself.

use std::io;
use std::time::Duration;

use vmm_sys_util::timerfd::TimerFd;

/// Pauses before the repetitions, milliseconds.
pub const PAUSES_MS: [u64; 5] = [50, 150, 250, 350, 450];

/// The timer of a worker's announcements.
pub struct Announcer {
    timer: TimerFd,
    /// Pauses that are yet to come.
    pauses: std::slice::Iter<'static, u64>,
}

impl Announcer {
    pub fn new() -> io::Result<Self> {
        let timer = TimerFd::new().map_err(io::Error::from)?;
        Ok(Self { timer, pauses: [].iter() })
    }

    pub fn timer(&self) -> &TimerFd {
        &self.timer
    }

    /// Begins from the start. The caller sends one.
    pub fn start(&mut self) -> io::Result<()> {
        self.pauses = PAUSES_MS.iter();
        self.arm()
    }

    /// The timer's descriptor is readable. The caller sends one.
    pub fn expired(&mut self) -> io::Result<()> {
        self.timer.wait().map_err(io::Error::from)?;
        self.arm()
    }

    fn arm(&mut self) -> io::Result<()> {
        match self.pauses.next() {
            Some(pause_ms) => {
                self.timer.reset(Duration::from_millis(*pause_ms), None).map_err(io::Error::from)
            }
            None => Ok(()),
        }
    }
}
