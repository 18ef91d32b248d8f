//! Changes of disks, on the connection of the disks.
//!
//! ```text
//! Change: | epoch u64 | disk u32 | operation u32 | offset u64 | len u64 | data ...
//!         operation 0 = write, 1 = zero, 2 = zero and unmap, 3 = discard, 4 = flush
//! ```
//!
//! Only a write has data, `len` bytes of it; a flush has neither offset nor length. Epoch 0 is a
//! first copy: such a change goes straight into the backup's image, and is of 64 MiB at most. Otherwise an `End` follows the
//! last change of the epoch, where `pages` counts changes.

use super::message::Fields;
use super::{Kind, WireError};
use crate::disk::{CHANGE_BYTES_MAX, COPY_BYTES_MAX, Change, Operation, SECTOR_BYTES};
use crate::ids::EpochId;

/// Bytes of a change's frame before the data.
pub const CHANGE_HEAD_BYTES: usize = 32;

/// The part of a change before its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChangeHead {
    pub epoch: EpochId,
    pub disk: u32,
    pub operation: Operation,
    pub offset: u64,
    pub len: u64,
}

fn number(operation: Operation) -> u32 {
    match operation {
        Operation::Write => 0,
        Operation::Zero { unmap: false } => 1,
        Operation::Zero { unmap: true } => 2,
        Operation::Discard => 3,
        Operation::Flush => 4,
    }
}

fn operation(number: u32) -> Option<Operation> {
    Some(match number {
        0 => Operation::Write,
        1 => Operation::Zero { unmap: false },
        2 => Operation::Zero { unmap: true },
        3 => Operation::Discard,
        4 => Operation::Flush,
        _ => return None,
    })
}

impl ChangeHead {
    #[must_use]
    pub fn of(epoch: EpochId, change: &Change) -> Self {
        let Change { disk, operation, offset, len, .. } = *change;
        Self { epoch, disk, operation, offset, len }
    }

    #[must_use]
    pub fn encode(&self) -> [u8; CHANGE_HEAD_BYTES] {
        let mut out = [0; CHANGE_HEAD_BYTES];
        out[0..8].copy_from_slice(&self.epoch.0.to_le_bytes());
        out[8..12].copy_from_slice(&self.disk.to_le_bytes());
        out[12..16].copy_from_slice(&number(self.operation).to_le_bytes());
        out[16..24].copy_from_slice(&self.offset.to_le_bytes());
        out[24..32].copy_from_slice(&self.len.to_le_bytes());
        out
    }

    /// Reads and checks all of a change but its data, of which `data_bytes` follow. `sizes` are
    /// those of the disks: a range lies inside, in whole sectors.
    ///
    /// # Errors
    /// [`WireError::Malformed`].
    pub fn decode(
        bytes: &[u8; CHANGE_HEAD_BYTES],
        sizes: &[u64],
        data_bytes: usize,
    ) -> Result<Self, WireError> {
        let mut fields = Fields { kind: Kind::Change, rest: bytes };
        let epoch = EpochId(fields.u64()?);
        let disk = fields.u32()?;
        let Some(operation) = operation(fields.u32()?) else {
            return fields.malformed("operation");
        };
        let (offset, len) = (fields.u64()?, fields.u64()?);
        let Some(size) = usize::try_from(disk).ok().and_then(|disk| sizes.get(disk)) else {
            return fields.malformed("number of a disk");
        };
        let range = match operation {
            Operation::Flush => offset == 0 && len == 0,
            _ => {
                let end = offset.checked_add(len);
                let whole = offset.is_multiple_of(SECTOR_BYTES) && len.is_multiple_of(SECTOR_BYTES);
                whole && len > 0 && end.is_some_and(|end| end <= *size)
            }
        };
        if !range {
            return fields.malformed("range outside the disk");
        }
        if epoch == EpochId(0) && len > COPY_BYTES_MAX {
            return fields.malformed("length of a piece of a copy");
        }
        let expected = if operation == Operation::Write { len } else { 0 };
        if data_bytes > CHANGE_BYTES_MAX || expected != data_bytes as u64 {
            return fields.malformed("length of the data");
        }
        Ok(Self { epoch, disk, operation, offset, len })
    }

    /// The change, with its data.
    #[must_use]
    pub fn with(self, data: Vec<u8>) -> Change {
        let Self { disk, operation, offset, len, .. } = self;
        Change { disk, operation, offset, len, data }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZES: [u64; 2] = [1 << 20, 512];

    fn head(operation: Operation, disk: u32, offset: u64, len: u64) -> ChangeHead {
        ChangeHead { epoch: EpochId(3), disk, operation, offset, len }
    }

    #[test]
    fn what_was_encoded_is_read() {
        use Operation::{Discard, Flush, Write, Zero};
        let zero = [false, true].map(|unmap| head(Zero { unmap }, 1, 0, 512));
        let others =
            [head(Write, 0, 512, 1024), head(Discard, 0, 0, 1 << 20), head(Flush, 1, 0, 0)];
        for head in zero.into_iter().chain(others) {
            let data = if head.operation == Write { 1024 } else { 0 };
            assert_eq!(ChangeHead::decode(&head.encode(), &SIZES, data).unwrap(), head);
        }
    }

    #[test]
    fn what_lies_outside_is_refused() {
        use Operation::{Discard, Flush, Write, Zero};
        let refused = |head: ChangeHead, data: usize, what: &str| {
            let error = ChangeHead::decode(&head.encode(), &SIZES, data).unwrap_err();
            assert!(error.to_string().ends_with(what), "{head:?}: {error}");
        };
        refused(head(Write, 2, 0, 512), 512, "number of a disk");
        refused(head(Write, 1, 512, 512), 512, "range outside the disk");
        refused(head(Write, 0, 1 << 20, 512), 512, "range outside the disk");
        refused(head(Discard, 0, 512, 1 << 20), 0, "range outside the disk");
        refused(head(Zero { unmap: true }, 0, u64::MAX - 511, 512), 0, "range outside the disk");
        refused(head(Write, 0, 1, 512), 512, "range outside the disk");
        refused(head(Write, 0, 0, 100), 100, "range outside the disk");
        refused(head(Write, 0, 0, 0), 0, "range outside the disk");
        refused(head(Flush, 0, 512, 0), 0, "range outside the disk");
        refused(head(Flush, 0, 0, 512), 0, "range outside the disk");
        refused(head(Write, 0, 0, 1024), 512, "length of the data");
        refused(head(Write, 0, 0, 512), 0, "length of the data");
        refused(head(Discard, 0, 0, 512), 512, "length of the data");
        let mut bytes = head(Write, 0, 0, 512).encode();
        bytes[12] = 5;
        assert!(ChangeHead::decode(&bytes, &SIZES, 512).is_err());
    }

    #[test]
    fn a_piece_of_a_copy_is_small_and_a_guest_may_discard_a_whole_disk() {
        use Operation::{Discard, Zero};
        let sizes = [COPY_BYTES_MAX + SECTOR_BYTES];
        for operation in [Zero { unmap: false }, Zero { unmap: true }, Discard] {
            for (epoch, len, is_good) in [
                (0, COPY_BYTES_MAX, true),
                (0, COPY_BYTES_MAX + SECTOR_BYTES, false),
                (3, COPY_BYTES_MAX + SECTOR_BYTES, true),
            ] {
                let head = ChangeHead { epoch: EpochId(epoch), ..head(operation, 0, 0, len) };
                let read = ChangeHead::decode(&head.encode(), &sizes, 0);
                assert_eq!(read.is_ok(), is_good, "{head:?}");
            }
        }
    }

    proptest! {
        #[test]
        fn random_heads_lie_inside_or_are_refused(
            bytes in any::<[u8; CHANGE_HEAD_BYTES]>(),
            small in any::<bool>(),
            data in 0usize..2000,
        ) {
            let mut bytes = bytes;
            if small {
                for at in (9..16).chain(19..24).chain(27..32) { bytes[at] = 0; }
                bytes[12] &= 7;
            }
            if let Ok(head) = ChangeHead::decode(&bytes, &SIZES, data) {
                prop_assert!(head.offset + head.len <= SIZES[head.disk as usize]);
            }
        }
    }
}
