//! What the two ends of a data connection by RDMA tell each other before the first byte goes so.

use super::message::Fields;
use super::{Kind, WireError};

/// Bytes of an encoded [`Verbs`].
pub(super) const VERBS_BYTES: usize = 45;

/// One end's queue pair and, of the backup, the ring that the primary writes into.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verbs {
    pub queue_pair: u32,
    pub packet_number: u32,
    pub gid: [u8; 16],
    pub lid: u16,
    pub mtu_bytes: u16,
    pub reads_answered: u8,
    /// The primary has no ring: all of these are zero.
    pub ring_address: u64,
    pub ring_key: u32,
    pub ring_bytes: u32,
}

impl Verbs {
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(VERBS_BYTES);
        out.extend(self.queue_pair.to_le_bytes());
        out.extend(self.packet_number.to_le_bytes());
        out.extend(self.gid);
        out.extend(self.lid.to_le_bytes());
        out.extend(self.mtu_bytes.to_le_bytes());
        out.push(self.reads_answered);
        out.extend(self.ring_address.to_le_bytes());
        out.extend(self.ring_key.to_le_bytes());
        out.extend(self.ring_bytes.to_le_bytes());
        out
    }

    /// # Errors
    /// [`WireError::Malformed`].
    pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
        let mut from = Fields { kind: Kind::Verbs, rest: payload };
        let verbs = Self {
            queue_pair: from.u32()?,
            packet_number: from.u32()?,
            gid: from.take()?,
            lid: u16::from_le_bytes(from.take()?),
            mtu_bytes: u16::from_le_bytes(from.take()?),
            reads_answered: u8::from_le_bytes(from.take()?),
            ring_address: from.u64()?,
            ring_key: from.u32()?,
            ring_bytes: from.u32()?,
        };
        from.end()?;
        Ok(verbs)
    }
}
