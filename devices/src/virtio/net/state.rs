//! The saved form of a network card.
//!
//! Frames that wait in the gate are no part of it: a network may lose them, and their senders
//! send again. Nothing is in flight otherwise, since a frame of the guest is answered when it is
//! copied, and a frame for the guest when it is in the guest's memory.

use serde::{Deserialize, Serialize};

use super::mac::MAC_BYTES;
use crate::virtio::device::QueuePosition;

/// What the driver cannot see in the rings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// The address that the guest has read.
    pub mac: [u8; MAC_BYTES],
    /// What the guest can receive, as feature bits, where it has chosen by a command: else
    /// everything that was negotiated.
    pub guest_offloads: Option<u64>,
    /// Queue pairs that the driver uses, at least one.
    pub active_pairs: u16,
    /// The driver was asked to announce itself and has not said that it did.
    pub announce: bool,
    /// Where the active queues stand.
    pub queues: Vec<QueuePosition>,
}
