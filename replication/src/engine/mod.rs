//! What both sides' engines stand on: the control connection's threads, the arbiter's thread,
//! the clock of silence, and the status that a client reads.
//!
//! An engine is one thread that owns its state machine and its side of the VM. All else that
//! happens reaches it as one stream of inputs; it never blocks on the peer or on the arbiter.

pub(crate) mod arbiter;
pub(crate) mod clock;
pub(crate) mod control;
pub(crate) mod heard;
pub(crate) mod stats;
pub(crate) mod status;
#[cfg(any(test, feature = "testing"))]
pub(crate) mod trace;

use std::thread::{Builder, JoinHandle};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::Error;

/// Starts a thread whose name a person will see; 15 bytes are what the kernel keeps.
pub(crate) fn spawn(
    name: &'static str,
    number: Option<usize>,
    body: impl FnOnce() + Send + 'static,
) -> Result<JoinHandle<()>, Error> {
    let full = number.map_or_else(|| name.to_owned(), |number| format!("{name}-{number}"));
    assert!(full.len() <= 15, "thread name {full} is cut by the kernel");
    let body = || {
        prefer_this_thread();
        body();
    };
    Builder::new().name(full).spawn(body).map_err(|error| Error::Thread(name, error))
}

/// What a thread of replication has over a vCPU's where both want the processor (nice(2)). What it
/// does is short and somebody waits for it: a seal's pause, an acknowledgement, held output.
const NICE: i32 = -5;

/// Has the scheduler prefer this thread, if that is allowed.
pub(crate) fn prefer_this_thread() {
    if let Err(error) = rustix::process::setpriority_process(None, NICE) {
        tracing::debug!("threads of replication are not preferred: {error}");
    }
}

/// Microseconds since the UNIX epoch.
pub(crate) fn now_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}
