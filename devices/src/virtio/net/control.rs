//! Commands of the driver (virtio 1.2, 5.1.6.5).
//!
//! What enters: a chain of the control queue; what leaves: a [`Command`] and where its answer
//! goes. What a command does to the device is [`ControlState::after`], pure, so that a command can
//! be carried out on the host before it is answered, with no pass held in between: it stays in
//! the ring until it is answered, and a replica that finds it there carries it out again.

use std::sync::Arc;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::features::{CTRL_GUEST_OFFLOADS, GUEST_ANNOUNCE, GuestOffloads, MQ};
use crate::virtio::device::{GuestMemory, QueuePosition};
use crate::virtio::ring::{self, ChainError, RingError, Segments, Used};

const CLASS_ANNOUNCE: u8 = 3;
const CLASS_MQ: u8 = 4;
const CLASS_GUEST_OFFLOADS: u8 = 5;
/// In each of the classes above, the one command that there is.
const COMMAND_ACK: u8 = 0;
const COMMAND_PAIRS_SET: u8 = 0;
const COMMAND_OFFLOADS_SET: u8 = 0;

const ANSWER_OK: u8 = 0;
const ANSWER_ERROR: u8 = 1;

/// Bytes of the longest command that the device knows: class, command and eight bytes.
const COMMAND_BYTES_MAX: usize = 10;

/// What a driver wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// It has announced itself.
    AnnounceAck,
    /// It uses so many queue pairs.
    Pairs(u16),
    /// It can receive these, as feature bits.
    GuestOffloads(u64),
    /// Nothing that is known.
    Unknown,
}

impl Command {
    /// `bytes` is the start of a command, `len` its length.
    fn parse(bytes: &[u8], len: usize) -> Self {
        let Some(bytes) = bytes.get(..len) else { return Self::Unknown };
        match bytes {
            [CLASS_ANNOUNCE, COMMAND_ACK] => Self::AnnounceAck,
            [CLASS_MQ, COMMAND_PAIRS_SET, pairs @ ..] => pairs
                .try_into()
                .map_or(Self::Unknown, |pairs| Self::Pairs(u16::from_le_bytes(pairs))),
            [CLASS_GUEST_OFFLOADS, COMMAND_OFFLOADS_SET, set @ ..] => set
                .try_into()
                .map_or(Self::Unknown, |set| Self::GuestOffloads(u64::from_le_bytes(set))),
            _ => Self::Unknown,
        }
    }
}

/// What commands change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlState {
    /// None: everything that was negotiated.
    pub guest_offloads: Option<u64>,
    /// Queue pairs in use.
    pub pairs: u16,
    /// The driver is asked to announce itself.
    pub announce: bool,
    /// Where a restored device's queues stand, for its activation.
    pub positions: Arc<[QueuePosition]>,
}

impl Default for ControlState {
    /// As after a reset (5.1.6.5.5: one pair).
    fn default() -> Self {
        Self { guest_offloads: None, pairs: 1, announce: false, positions: Arc::new([]) }
    }
}

impl ControlState {
    /// What the guest can receive now.
    #[must_use]
    pub fn offloads(&self, features: u64) -> GuestOffloads {
        let negotiated = GuestOffloads::negotiated(features);
        let chosen = self.guest_offloads.unwrap_or(u64::MAX) & negotiated.bits();
        GuestOffloads::chosen(chosen, features).unwrap_or_default()
    }

    /// The state after `command`, or none where the driver must not give it.
    #[must_use]
    pub fn after(&self, command: Command, features: u64, pairs_max: u16) -> Option<Self> {
        match command {
            Command::AnnounceAck if features & GUEST_ANNOUNCE != 0 => {
                Some(Self { announce: false, ..self.clone() })
            }
            Command::Pairs(pairs) if features & MQ != 0 => {
                (1..=pairs_max).contains(&pairs).then(|| Self { pairs, ..self.clone() })
            }
            Command::GuestOffloads(set) if features & CTRL_GUEST_OFFLOADS != 0 => {
                let chosen = GuestOffloads::chosen(set, features)?;
                Some(Self { guest_offloads: Some(chosen.bits()), ..self.clone() })
            }
            _ => None,
        }
    }
}

/// A command in the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    pub head: u16,
    pub command: Command,
    /// Where the answer, a byte, goes.
    answer: GuestAddress,
}

/// What is next in the control queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing; the doorbell will ring.
    Nothing,
    Request(Request),
    /// A chain that has no room for an answer or goes the wrong way.
    Malformed {
        head: u16,
    },
}

/// Looks at the next command and leaves it in the ring.
pub fn peek(queue: &mut Queue, memory: &GuestMemory) -> Result<Next, RingError> {
    let position = queue.next_avail();
    let Some(chain) = ring::pop(queue, memory)? else {
        // What came in between is looked at when its doorbell has rung, or is found by the caller.
        return Ok(Next::Nothing);
    };
    queue.set_next_avail(position);
    let head = chain.head_index();
    match read(Segments::new(queue, chain, memory), memory) {
        Ok((command, answer)) => Ok(Next::Request(Request { head, command, answer })),
        Err(error) => {
            tracing::debug!("A command of the guest is dropped: {error}");
            Ok(Next::Malformed { head })
        }
    }
}

fn read(
    segments: Segments<'_>,
    memory: &GuestMemory,
) -> Result<(Command, GuestAddress), ChainError> {
    let mut bytes = [0; COMMAND_BYTES_MAX];
    let mut len = 0usize;
    let mut answer = None;
    for segment in segments {
        let segment = segment?;
        if segment.writable {
            answer = answer.or(Some(segment.address));
            continue;
        }
        if answer.is_some() {
            return Err(ChainError::Direction);
        }
        let room = &mut bytes[len.min(COMMAND_BYTES_MAX)..];
        let part = segment.len.min(room.len());
        memory
            .read_slice(&mut room[..part], segment.address)
            .map_err(|_| ChainError::OutsideMemory)?;
        len = len.saturating_add(segment.len);
    }
    let answer = answer.ok_or(ChainError::TooShort)?;
    Ok((Command::parse(&bytes, len), answer))
}

/// Answers the command that [`peek`] showed in the same pass and takes it out of the ring. True
/// if the driver wants an interrupt.
pub fn answer(
    queue: &mut Queue,
    memory: &GuestMemory,
    request: &Request,
    done: bool,
) -> Result<bool, RingError> {
    let byte = if done { ANSWER_OK } else { ANSWER_ERROR };
    memory.write_slice(&[byte], request.answer).map_err(RingError::Used)?;
    finish(queue, memory, Used { head: request.head, len: 1 })
}

/// Takes a chain that [`peek`] called malformed out of the ring.
pub fn refuse(queue: &mut Queue, memory: &GuestMemory, head: u16) -> Result<bool, RingError> {
    finish(queue, memory, Used { head, len: 0 })
}

fn finish(queue: &mut Queue, memory: &GuestMemory, used: Used) -> Result<bool, RingError> {
    queue.set_next_avail(queue.next_avail().wrapping_add(1));
    ring::answer(queue, memory, &[used])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::net::features::{GUEST_CSUM, GUEST_TSO4, GUEST_TSO6};

    #[test]
    fn commands_are_read_to_the_byte() {
        let parse = |bytes: &[u8]| {
            let mut start = [0; COMMAND_BYTES_MAX];
            let len = bytes.len().min(COMMAND_BYTES_MAX);
            start[..len].copy_from_slice(&bytes[..len]);
            Command::parse(&start, bytes.len())
        };
        assert_eq!(parse(&[3, 0]), Command::AnnounceAck);
        assert_eq!(parse(&[4, 0, 2, 1]), Command::Pairs(0x102));
        let offloads = Command::GuestOffloads(0x82);
        assert_eq!(parse(&[5, 0, 0x82, 0, 0, 0, 0, 0, 0, 0]), offloads);
        for garbage in [
            &[][..],
            &[3],
            &[3, 1],
            &[3, 0, 0],
            &[4, 0, 2],
            &[4, 0, 2, 0, 0],
            &[4, 1, 2, 0],
            &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &[0xff; 600],
        ] {
            assert_eq!(parse(garbage), Command::Unknown, "{garbage:?}");
        }
    }

    #[test]
    fn a_command_needs_its_feature_and_its_range() {
        let state = ControlState { announce: true, ..ControlState::default() };
        let after = |command, features| state.after(command, features, 4);
        assert!(!after(Command::AnnounceAck, GUEST_ANNOUNCE).unwrap().announce);
        assert_eq!(after(Command::AnnounceAck, 0), None);
        assert_eq!(after(Command::Pairs(4), MQ).unwrap().pairs, 4);
        for (pairs, features) in [(0, MQ), (5, MQ), (4, 0)] {
            assert_eq!(after(Command::Pairs(pairs), features), None);
        }
        let features = CTRL_GUEST_OFFLOADS | GUEST_CSUM | GUEST_TSO4;
        assert_eq!(state.offloads(features).bits(), GUEST_CSUM | GUEST_TSO4);
        let less = after(Command::GuestOffloads(GUEST_CSUM), features).unwrap();
        assert_eq!(less.offloads(features).bits(), GUEST_CSUM);
        assert_eq!(after(Command::GuestOffloads(GUEST_TSO6), features), None);
        assert_eq!(after(Command::GuestOffloads(MQ), features | MQ), None);
        assert_eq!(after(Command::GuestOffloads(0), GUEST_CSUM), None);
        assert_eq!(after(Command::Unknown, u64::MAX), None);
    }
}
