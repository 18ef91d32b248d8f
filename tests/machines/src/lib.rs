//! Drives whole VMMs from outside, as a user would: processes, sockets, files.
//!
//! - [`process`]: one VMM process and what can be asked of it
//! - [`serial`]: the guest's serial port over a socket, each piece of output with its time
//! - [`interrupt`]: programs that leave nothing behind when they are told to end
//! - [`link`]: what lies between a primary and its backup, to be cut, healed and slowed
//! - [`network`]: a bridge, two taps and clients in network namespaces of their own
//! - [`pair`]: a primary, its backup and their arbiter
//! - [`round`]: one kill round, from the first sync to the guest's verdict
//! - [`scene`]: what most tests begin with
//! - [`kv`]: clients of the key-value server in the guest, and the checks of what they saw
//! - [`statistics`]: minimum, median, maximum
//! - [`timeline`]: a round as a picture

pub mod equality;
pub mod interrupt;
pub mod kv;
pub mod link;
pub mod network;
pub mod pair;
pub mod process;
pub mod round;
pub mod scene;
pub mod serial;
pub mod statistics;
pub mod timeline;

use std::time::{SystemTime, UNIX_EPOCH};

/// Microseconds since the UNIX epoch: the clock in which all processes of one host agree.
#[must_use]
pub fn now_us() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
}
