//! A machine's state, as a seal carries it; its pages travel by connections of their own.

use replication::guest::{GuestError, MachineState};

use crate::guest::Position;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    pub position: Position,
    /// What its console has not said.
    pub console: Vec<u8>,
}

impl State {
    /// # Errors
    /// It is none.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let &[a, b, c, d, handover, ref console @ ..] = bytes else {
            return Err("a machine state that is too short".to_owned());
        };
        let (incarnation, at) = (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
        let position = Position { incarnation, at, handover: handover != 0 };
        Ok(Self { position, console: console.to_vec() })
    }
}

impl MachineState for State {
    fn encode(&self, out: &mut Vec<u8>) -> Result<(), GuestError> {
        let Position { incarnation, at, handover } = self.position;
        out.extend(incarnation.to_le_bytes());
        out.extend(at.to_le_bytes());
        out.push(handover.into());
        out.extend(&self.console);
        Ok(())
    }
}
