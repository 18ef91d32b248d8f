//! From the guest's transmit ring into the gate (virtio 1.2, 5.1.6.2).
//!
//! What enters: chains of the driver; what leaves: frames in the gate and the chains' answers, in
//! the same pass, so that a state captured between two passes has each frame either in the ring
//! or in the gate. A chain that is no frame is answered, counted and forgotten.

use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::Bytes;

use super::frame::{FRAME_BYTES_MAX, FRAME_BYTES_MIN};
use super::gate::TxGate;
use super::shared::NetCounters;
use crate::virtio::device::GuestMemory;
use crate::virtio::ring::{self, ChainError, RingError, Segment, Segments, Used};

/// Most frames that are copied in one pass.
const BATCH_FRAMES: usize = 64;
/// Bytes after which a pass ends, so that parking waits for some ten microseconds at most.
const BATCH_BYTES: usize = 128 << 10;

/// Why no more frames were taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TakeEnd {
    /// The ring is empty; the doorbell will ring.
    Empty,
    /// The pass has lasted long enough.
    Budget,
    /// The gate is full; it will call its waker.
    Full,
}

/// Buffers that are reused from pass to pass.
#[derive(Debug, Default)]
pub struct Scratch {
    segments: Vec<Segment>,
    used: Vec<Used>,
}

/// Moves frames from the ring into `lane` of the gate. The bool says that the driver wants an
/// interrupt.
pub fn take(
    queue: &mut Queue,
    memory: &GuestMemory,
    (gate, lane): (&TxGate, usize),
    counters: &NetCounters,
    scratch: &mut Scratch,
) -> Result<(TakeEnd, bool), RingError> {
    scratch.used.clear();
    let mut bytes = 0;
    let end = loop {
        if scratch.used.len() >= BATCH_FRAMES || bytes >= BATCH_BYTES {
            break TakeEnd::Budget;
        }
        if gate.is_full() {
            break TakeEnd::Full;
        }
        let position = queue.next_avail();
        let Some(chain) = ring::pop(queue, memory)? else {
            break if ring::has_more(queue, memory)? { TakeEnd::Budget } else { TakeEnd::Empty };
        };
        // Not before there is one: a look at an empty ring leaves the page as it is.
        ring::disable_notification(queue, memory)?;
        let head = chain.head_index();
        match copy_out(queue, chain, memory, &mut scratch.segments) {
            Ok(frame) => {
                bytes += frame.len();
                if gate.push(lane, frame).is_err() {
                    // Not answered, so it is as if it had not been looked at.
                    queue.set_next_avail(position);
                    break TakeEnd::Full;
                }
            }
            Err(error) => {
                tracing::debug!("A frame of the guest is dropped: {error}");
                counters.tx_errors.add(1);
            }
        }
        scratch.used.push(Used { head, len: 0 });
    };
    let interrupt = ring::answer(queue, memory, &scratch.used)?;
    Ok((end, interrupt))
}

/// Copies a frame out of guest memory, after it is known to be one.
fn copy_out(
    queue: &Queue,
    chain: DescriptorChain<&GuestMemory>,
    memory: &GuestMemory,
    segments: &mut Vec<Segment>,
) -> Result<Vec<u8>, ChainError> {
    segments.clear();
    let mut len = 0usize;
    for segment in Segments::new(queue, chain, memory) {
        let segment = segment?;
        if segment.writable {
            return Err(ChainError::Direction);
        }
        len = len.saturating_add(segment.len);
        if len > FRAME_BYTES_MAX {
            return Err(ChainError::TooLong);
        }
        segments.push(segment);
    }
    if len < FRAME_BYTES_MIN {
        return Err(ChainError::TooShort);
    }
    let mut frame = vec![0; len];
    let mut rest = frame.as_mut_slice();
    for segment in segments.iter() {
        let (part, after) = rest.split_at_mut(segment.len);
        memory.read_slice(part, segment.address).map_err(|_| ChainError::OutsideMemory)?;
        rest = after;
    }
    Ok(frame)
}
