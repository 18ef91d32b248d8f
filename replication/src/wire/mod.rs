//! The stream between primary and backup: versioned, length-capped, checksummed frames.
//!
//! Enters: messages and pages to send; bytes of a peer. Leaves: bytes; messages, or one precise
//! [`WireError`]. Always holds: bytes of a peer never cause a panic, nor an allocation beyond the
//! cap of the frame's kind, and a frame out of its place in the stream is refused.
//!
//! ```text
//! 0        4       6    7     8        12     16        24         32
//! | magic  | vers. |kind|flags| length | crc32 | session | sequence | payload ...
//! ```
//!
//! All numbers are little-endian. `crc32` (IEEE) covers the header with the field itself as zero,
//! and the payload. `sequence` counts the frames of one direction of one connection from 0.
//! `session` is a random number of the primary's attempt, so bytes of an older one never match.
//!
//! Version 1: first. Version 2: disks, on a connection of their own; the offer has their sizes and
//! the seal the number of their changes. Version 3: a backup says how much it has done. Version 4:
//! pages as deltas and as LZ4 blocks. Version 5: data connections by RDMA. Version
//! 6: the offer says whether they are, and their ends how many chunks they have room for. Version 7: the
//! base of a copy anew, and the way back of a switch-over. Version 8: a switch-over that reverses the
//! pair; the last seal and the word after it say of which kind it is, and the offer of the way back that the
//! pair stands. Also a copy straight into the backup's
//! memory; the offer says why data comes by TCP. Version 9: checksums of the pages of such a copy come beside it.
//! Version 10: the memory for it is opened piece by piece.
//! Version 11: the description has the CPUID that the guest was told.

mod changes;
mod contents;
mod frame;
mod message;
mod pages;
mod sums;
mod verbs;

use thiserror::Error;

pub use changes::{CHANGE_HEAD_BYTES, ChangeHead};
pub(crate) use contents::{begin_content, end_content, take_content, undo_content};
pub use contents::{staged_bytes, unpack};
pub use frame::{FrameReader, FrameWriter, HEADER_BYTES, Header, Kind, SessionId};
pub use message::{
    ABORT_BYTES_MAX, Base, ConnectionPart, GRANTS_MAX, Grant, Hello, Message, Offer, REGIONS_MAX,
    RETURN_BYTES_MAX, Seal, Welcome, WireRegion,
};
pub use pages::{
    Encoding, End, FRAME_PAGES_MAX, PagesHeader, RAW_PAGES_MAX, RUNS_MAX, Run, Runs,
    decode_pages_header, encode_pages_header,
};
pub use sums::{GroupSums, SUM_GROUPS_MAX, decode_sums, encode_sums};
pub use verbs::Verbs;

/// First bytes of every frame: "USTD".
pub const MAGIC: u32 = u32::from_le_bytes(*b"USTD");
/// The version that this build speaks.
pub const VERSION: u16 = 11;
/// Most data connections of a session.
pub const CONNECTIONS_MAX: u32 = 128;

/// Why bytes of a peer were refused.
#[derive(Debug, Error)]
pub enum WireError {
    #[error("The peer does not speak this protocol (frame starts with {0:#010x})")]
    Magic(u32),
    #[error(
        "The peer speaks TLS and this side does not: give tls_dir to both sides, or to neither"
    )]
    Tls,
    #[error("The peer speaks protocol version {theirs}, this side version {VERSION}")]
    Version { theirs: u16 },
    #[error("Frame kind {0} is unknown")]
    Kind(u8),
    #[error("Frame flags {0:#04x} are unknown")]
    Flags(u8),
    #[error("A frame of kind {kind:?} has {length} bytes, at most {cap} are allowed")]
    Length { kind: Kind, length: u64, cap: u64 },
    #[error("The checksum of a frame of kind {kind:?} does not match")]
    Checksum { kind: Kind },
    #[error("Frame {found} arrived where frame {expected} was due")]
    Sequence { expected: u64, found: u64 },
    #[error("A frame belongs to another session")]
    Session,
    #[error("A frame of kind {kind:?} is malformed: {what}")]
    Malformed { kind: Kind, what: &'static str },
    #[error("A frame of kind {found:?} arrived where {expected} was due")]
    Unexpected { found: Kind, expected: &'static str },
    #[error("The connection ended inside a frame")]
    Truncated,
    #[error("The peer closed the connection")]
    Closed,
    #[error("The connection failed")]
    Io(#[source] std::io::Error),
}

impl WireError {
    /// Whether this is the loss of a peer rather than bytes that it should not have sent.
    #[must_use]
    pub fn is_loss(&self) -> bool {
        match self {
            Self::Truncated | Self::Closed => true,
            // A stream whose peer does what it must not says so by this kind; no loss does.
            Self::Io(error) => error.kind() != std::io::ErrorKind::InvalidData,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests;
