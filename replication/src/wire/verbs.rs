//! What the two ends of a data connection by RDMA tell each other before the first byte goes so.

use api::replication::RDMA_DEPTH;
use rdma::Endpoint;

use super::message::Fields;
use super::{Kind, WireError};

/// Bytes of an encoded [`Verbs`].
pub(super) const VERBS_BYTES: usize = 49;

/// One end's queue pair and, of the backup, the ring that the primary writes into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verbs {
    pub endpoint: Endpoint,
    /// Chunks under way that this end has room for: the smaller number of both ends' counts.
    pub chunks: u32,
    /// The primary has no ring: all of these are zero.
    pub ring_address: u64,
    pub ring_key: u32,
    pub ring_bytes: u32,
}

impl Verbs {
    /// An end without a ring.
    #[must_use]
    pub fn of(endpoint: Endpoint, chunks: u32) -> Self {
        Self { endpoint, chunks, ring_address: 0, ring_key: 0, ring_bytes: 0 }
    }

    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let Endpoint { queue_pair, packet_number, gid, lid, mtu_bytes, reads_answered } =
            self.endpoint;
        let mut out = Vec::with_capacity(VERBS_BYTES);
        out.extend(queue_pair.to_le_bytes());
        out.extend(packet_number.to_le_bytes());
        out.extend(gid);
        out.extend(lid.to_le_bytes());
        out.extend(mtu_bytes.to_le_bytes());
        out.push(reads_answered);
        out.extend(self.chunks.to_le_bytes());
        out.extend(self.ring_address.to_le_bytes());
        out.extend(self.ring_key.to_le_bytes());
        out.extend(self.ring_bytes.to_le_bytes());
        out
    }

    /// Whether the endpoint makes sense is for the device's module to say.
    ///
    /// # Errors
    /// [`WireError::Malformed`].
    pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
        let mut from = Fields { kind: Kind::Verbs, rest: payload };
        let endpoint = Endpoint {
            queue_pair: from.u32()?,
            packet_number: from.u32()?,
            gid: from.take()?,
            lid: u16::from_le_bytes(from.take()?),
            mtu_bytes: u16::from_le_bytes(from.take()?),
            reads_answered: u8::from_le_bytes(from.take()?),
        };
        let verbs = Self {
            endpoint,
            chunks: from.u32()?,
            ring_address: from.u64()?,
            ring_key: from.u32()?,
            ring_bytes: from.u32()?,
        };
        from.end()?;
        if !RDMA_DEPTH.contains(&verbs.chunks) {
            return from.malformed("number of chunks");
        }
        Ok(verbs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_heard() {
        let said = Verbs {
            endpoint: Endpoint {
                queue_pair: 0x0102_0304,
                packet_number: 5,
                gid: std::array::from_fn(|at| u8::try_from(at).unwrap()),
                lid: 0x0607,
                mtu_bytes: 4096,
                reads_answered: 16,
            },
            chunks: 0x0203,
            ring_address: 0x0809_0a0b_0c0d_0e0f,
            ring_key: 0x1011_1213,
            ring_bytes: 0x1415_1617,
        };
        let bytes = said.encode();
        assert_eq!((bytes.len(), Verbs::decode(&bytes).unwrap()), (VERBS_BYTES, said));
        assert!(
            Verbs::decode(&bytes[1..]).is_err()
                && Verbs::decode(&[&bytes[..], &[0]].concat()).is_err()
        );
        for chunks in [0, 3, 1025, u32::MAX] {
            assert!(Verbs::decode(&Verbs { chunks, ..said }.encode()).is_err(), "{chunks} chunks");
        }
    }
}
