//! The saved form of a console.
//!
//! A console cannot ask again for output that was lost with the primary, so what was not yet
//! written to its backend is a part of the state, as a serial port's is: a reader may see a range
//! of bytes twice, never a gap. Input that is not in the guest's buffers is not: it is the host's.

use serde::{Deserialize, Serialize};

use crate::output_gate::GATE_BYTES_MAX;
use crate::virtio::device::StateError;

/// What the driver cannot see in the rings. Where those stand the transport knows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    /// Bytes of the next chain in the transmit ring that were taken already: a long one is taken
    /// piece by piece, and answered when all of it is in the gate.
    pub taken_bytes: u64,
    /// Output that the saved machine had produced and not yet written to its backend; at most
    /// [`GATE_BYTES_MAX`] bytes, none outside replication.
    pub pending_output: Vec<u8>,
}

impl ConsoleState {
    /// Whether a console could load this.
    pub fn validate(&self) -> Result<(), StateError> {
        let pending = self.pending_output.len();
        if pending > GATE_BYTES_MAX {
            let why = format!("{pending} bytes of pending output, more than {GATE_BYTES_MAX}");
            return Err(StateError::Unusable(why));
        }
        Ok(())
    }
}
