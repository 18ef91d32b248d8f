//! From a buffer of the VMM into the guest's receive buffers (virtio 1.2, 5.1.6.3 and 5.1.6.4).
//!
//! What enters: a whole frame that was read from the tap; what leaves: the frame in guest memory
//! and its buffers in the used ring, or nothing at all. What always holds: buffers are given back
//! only when the frame is in them entirely. A receive buffer that is no buffer stops the device:
//! there is nothing to answer, and the driver has lost its mind.

use thiserror::Error;
use virtio_queue::{Queue, QueueT};
use vm_memory::Bytes;

use super::frame::FrameHeader;
use crate::virtio::device::GuestMemory;
use crate::virtio::ring::{self, ChainError, RingError, Segment, Segments, Used};

/// The receive ring makes no sense.
#[derive(Debug, Error)]
pub enum RxError {
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error("A receive buffer is not usable")]
    Chain(#[from] ChainError),
}

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// It is in guest memory.
    Done,
    /// There are too few buffers yet. The doorbell will ring.
    NoBuffers,
    /// Buffers came while it was tried.
    Retry,
    /// It fits no buffers that this driver supplies; it is lost.
    Unfit,
}

/// Buffers that are reused from frame to frame.
#[derive(Debug, Default)]
pub struct Scratch {
    segments: Vec<Segment>,
    /// Heads of the chains, and how many segments belong to each.
    chains: Vec<(u16, usize)>,
    used: Vec<Used>,
}

/// Delivers `frame`, header included. With `mergeable` it may be spread over several buffers
/// (VIRTIO_NET_F_MRG_RXBUF), else it needs one that is large enough. The bool says that the driver
/// wants an interrupt.
pub fn deliver(
    queue: &mut Queue,
    memory: &GuestMemory,
    frame: &mut [u8],
    mergeable: bool,
    scratch: &mut Scratch,
) -> Result<(Delivery, bool), RxError> {
    let position = queue.next_avail();
    let mut gathered = gather(queue, memory, frame.len(), mergeable, scratch)?;
    if gathered != Delivery::Done {
        // The doorbell is asked for from behind what was gathered: it shall ring for the buffer
        // after that, not for the first one.
        if gathered == Delivery::NoBuffers && ring::enable_notification(queue, memory)? {
            gathered = Delivery::Retry;
        }
        queue.set_next_avail(position);
        return Ok((gathered, false));
    }
    if let Some(mut header) = FrameHeader::new(frame) {
        header.set_buffers(u16::try_from(scratch.chains.len()).unwrap_or(u16::MAX));
    }
    scatter(memory, frame, scratch)?;
    let interrupt = ring::answer(queue, memory, &scratch.used)?;
    Ok((Delivery::Done, interrupt))
}

/// Collects buffers for `len` bytes.
fn gather(
    queue: &mut Queue,
    memory: &GuestMemory,
    len: usize,
    mergeable: bool,
    scratch: &mut Scratch,
) -> Result<Delivery, RxError> {
    scratch.segments.clear();
    scratch.chains.clear();
    let mut capacity = 0usize;
    while capacity < len {
        if !mergeable && !scratch.chains.is_empty()
            || scratch.chains.len() >= usize::from(queue.size())
        {
            return Ok(Delivery::Unfit);
        }
        let Some(chain) = ring::pop(queue, memory)? else {
            return Ok(Delivery::NoBuffers);
        };
        let head = chain.head_index();
        let first = scratch.segments.len();
        let mut segments = Segments::new(queue, chain, memory);
        while capacity < len {
            let Some(segment) = segments.next().transpose()? else { break };
            if !segment.writable {
                return Err(ChainError::Direction.into());
            }
            capacity = capacity.saturating_add(segment.len);
            scratch.segments.push(segment);
        }
        scratch.chains.push((head, scratch.segments.len() - first));
    }
    Ok(Delivery::Done)
}

/// Writes the frame into what was gathered.
fn scatter(memory: &GuestMemory, frame: &[u8], scratch: &mut Scratch) -> Result<(), ChainError> {
    scratch.used.clear();
    let mut segments = scratch.segments.iter();
    let mut rest = frame;
    for (head, count) in &scratch.chains {
        let before = rest.len();
        for segment in segments.by_ref().take(*count) {
            let (part, after) = rest.split_at(segment.len.min(rest.len()));
            memory.write_slice(part, segment.address).map_err(|_| ChainError::OutsideMemory)?;
            rest = after;
        }
        let len = u32::try_from(before - rest.len()).map_err(|_| ChainError::TooLong)?;
        scratch.used.push(Used { head: *head, len });
    }
    Ok(())
}
