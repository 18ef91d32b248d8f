//! From a buffer of the VMM into the guest's receive buffers (virtio 1.2, 5.3.6).
//!
//! What enters: input of the host; what leaves: as much of it as there are buffers for, each with
//! what it holds. A receive buffer that is no buffer stops the device: there is nothing to answer.

use thiserror::Error;
use virtio_queue::{DescriptorChain, Queue};
use vm_memory::Bytes;

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

/// Buffers that are reused from input to input.
#[derive(Debug, Default)]
pub struct Scratch {
    segments: Vec<Segment>,
    used: Vec<Used>,
}

/// Puts `input` into the guest's buffers and returns how many bytes fitted. If that was not all,
/// the doorbell will ring. The bool says that the driver wants an interrupt.
pub fn deliver(
    queue: &mut Queue,
    memory: &GuestMemory,
    input: &[u8],
    scratch: &mut Scratch,
) -> Result<(usize, bool), RxError> {
    scratch.used.clear();
    let mut rest = input;
    let mut looked_again = false;
    while !rest.is_empty() {
        let Some(chain) = ring::pop(queue, memory)? else {
            // Once: a guest that takes its buffers back does not keep us here.
            if looked_again || !ring::has_more(queue, memory)? {
                break;
            }
            looked_again = true;
            continue;
        };
        let head = chain.head_index();
        gather(queue, chain, memory, rest.len(), &mut scratch.segments)?;
        let before = rest.len();
        for segment in &scratch.segments {
            let (part, after) = rest.split_at(segment.len.min(rest.len()));
            memory.write_slice(part, segment.address).map_err(|_| ChainError::OutsideMemory)?;
            rest = after;
        }
        let len = u32::try_from(before - rest.len()).map_err(|_| ChainError::TooLong)?;
        scratch.used.push(Used { head, len });
    }
    let interrupt = ring::answer(queue, memory, &scratch.used)?;
    Ok((input.len() - rest.len(), interrupt))
}

/// Collects the segments of a buffer, as many as `len` bytes need.
fn gather(
    queue: &Queue,
    chain: DescriptorChain<&GuestMemory>,
    memory: &GuestMemory,
    len: usize,
    segments: &mut Vec<Segment>,
) -> Result<(), ChainError> {
    segments.clear();
    let mut capacity = 0usize;
    for segment in Segments::new(queue, chain, memory) {
        let segment = segment?;
        if !segment.writable {
            return Err(ChainError::Direction);
        }
        capacity = capacity.saturating_add(segment.len);
        segments.push(segment);
        if capacity >= len {
            break;
        }
    }
    Ok(())
}
