//! The binary form of an epoch's machine state: a version, then postcard.
//!
//! Fields of [`MachineState`] are positional in postcard, so any change of them is a new version.

use replication::guest::GuestError;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::machine::MachineState;

/// The version of the layout that this build writes and reads.
const VERSION: u16 = 2;

/// An epoch's machine state is not usable.
#[derive(Debug, Error)]
pub enum CodecError {
    #[error("The machine state has version {found}, this build reads {VERSION}")]
    Version { found: u16 },
    #[error("The machine state is cut short")]
    Short,
    #[error("The machine state has {0} bytes too many")]
    Trailing(usize),
    #[error("The machine state cannot be encoded")]
    Encode(#[source] postcard::Error),
    #[error("The machine state cannot be decoded")]
    Decode(#[source] postcard::Error),
}

/// What a seal captured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Captured {
    pub machine: MachineState,
    /// A person had paused the VM: it stays paused after a take-over.
    pub paused: bool,
}

impl replication::guest::MachineState for Captured {
    fn encode(&self, out: &mut Vec<u8>) -> Result<(), GuestError> {
        out.extend_from_slice(&VERSION.to_le_bytes());
        postcard::to_io(self, out).map_err(CodecError::Encode)?;
        Ok(())
    }
}

/// The state behind the bytes of one epoch.
pub fn decode(bytes: &[u8]) -> Result<Captured, CodecError> {
    let (version, body) = bytes.split_first_chunk::<2>().ok_or(CodecError::Short)?;
    let found = u16::from_le_bytes(*version);
    if found != VERSION {
        return Err(CodecError::Version { found });
    }
    let (captured, rest) = postcard::take_from_bytes(body).map_err(CodecError::Decode)?;
    if rest.is_empty() { Ok(captured) } else { Err(CodecError::Trailing(rest.len())) }
}
