//! The machine state of an epoch as a backup reads it, without a machine.

use api::config::VmConfig;
use replication::guest::MachineState as _;

pub use super::codec::Captured;

/// The state behind the bytes of one epoch, if it is one.
#[must_use]
pub fn decode(bytes: &[u8]) -> Option<Captured> {
    super::codec::decode(bytes).ok()
}

/// The bytes of a state.
///
/// # Panics
/// It cannot be encoded, which is a bug.
#[must_use]
pub fn encode(captured: &Captured) -> Vec<u8> {
    let mut bytes = Vec::new();
    captured.encode(&mut bytes).expect("a state that was decoded");
    bytes
}

/// Whether a machine of `config` could load `captured`, as far as that can be said without one.
#[must_use]
pub fn check(captured: &Captured, config: &VmConfig) -> bool {
    super::replica::check(captured, config).is_ok()
}
