//! From the guest's transmit ring into the gate (virtio 1.2, 5.3.6).
//!
//! What enters: chains of the driver; what leaves: their bytes in the gate, and the answer of a
//! chain when all of it is there, in the same pass. What always holds:
//!
//! - A pass copies [`PASS_BYTES_MAX`] at most: of a longer chain a piece, and how far it got is a
//!   part of the device's state. No length that a guest names takes memory.
//! - Nothing is taken while the gate is throttled, so it never drops what comes from here.
//! - A chain that is no output is answered, counted and forgotten.

use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::{Address, Bytes};

use crate::counters::Counter;
use crate::output_gate::OutputGate;
use crate::virtio::device::GuestMemory;
use crate::virtio::ring::{self, ChainError, RingError, Segment, Segments, Used};

/// Bytes after which a pass ends, so that parking waits for some ten microseconds at most.
pub const PASS_BYTES_MAX: usize = 64 << 10;
/// Most chains that are answered in one pass.
const PASS_CHAINS_MAX: usize = 64;

/// Why no more was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TakeEnd {
    /// The ring is empty; the doorbell will ring.
    Empty,
    /// The pass has lasted long enough.
    Budget,
    /// The gate is throttled; it will call its waker.
    Throttled,
}

/// Buffers that are reused from pass to pass.
#[derive(Debug, Default)]
pub struct Scratch {
    segments: Vec<Segment>,
    used: Vec<Used>,
    bytes: Vec<u8>,
}

/// Moves output from the ring into the gate. `taken` is how much of the next chain is there
/// already. The bool says that the driver wants an interrupt.
pub fn take(
    queue: &mut Queue,
    memory: &GuestMemory,
    taken: &mut u64,
    gate: &OutputGate,
    errors: &Counter,
    scratch: &mut Scratch,
) -> Result<(TakeEnd, bool), RingError> {
    scratch.used.clear();
    let mut room = PASS_BYTES_MAX;
    let end = loop {
        if room == 0 || scratch.used.len() >= PASS_CHAINS_MAX {
            break TakeEnd::Budget;
        }
        if gate.throttled() {
            break TakeEnd::Throttled;
        }
        let position = queue.next_avail();
        let Some(chain) = ring::pop(queue, memory)? else {
            break if ring::has_more(queue, memory)? { TakeEnd::Budget } else { TakeEnd::Empty };
        };
        // Not before there is one: a look at an empty ring leaves the page as it is.
        ring::disable_notification(queue, memory)?;
        let head = chain.head_index();
        match copy_out(queue, chain, memory, (*taken, room), scratch) {
            Ok(is_rest) => {
                gate.write(&scratch.bytes);
                room -= scratch.bytes.len();
                if !is_rest {
                    *taken = taken.saturating_add(scratch.bytes.len() as u64);
                    queue.set_next_avail(position);
                    break TakeEnd::Budget;
                }
            }
            Err(error) => {
                tracing::debug!("Output of the guest is dropped: {error}");
                errors.add(1);
            }
        }
        *taken = 0;
        scratch.used.push(Used { head, len: 0 });
    };
    let interrupt = ring::answer(queue, memory, &scratch.used)?;
    Ok((end, interrupt))
}

/// Copies what comes after the first `skip` bytes of a chain, `room` bytes at most, when the whole
/// chain is known to be output. True if that is the chain's rest.
fn copy_out(
    queue: &Queue,
    chain: DescriptorChain<&GuestMemory>,
    memory: &GuestMemory,
    (mut skip, room): (u64, usize),
    scratch: &mut Scratch,
) -> Result<bool, ChainError> {
    scratch.segments.clear();
    scratch.bytes.clear();
    for segment in Segments::new(queue, chain, memory) {
        let segment = segment?;
        if segment.writable {
            return Err(ChainError::Direction);
        }
        scratch.segments.push(segment);
    }
    for segment in &scratch.segments {
        let len = segment.len as u64;
        if skip >= len {
            skip -= len;
            continue;
        }
        let from = std::mem::take(&mut skip);
        let left = usize::try_from(len - from).unwrap_or(usize::MAX);
        let start = scratch.bytes.len();
        let part = left.min(room - start);
        let address = segment.address.checked_add(from).ok_or(ChainError::OutsideMemory)?;
        scratch.bytes.resize(start + part, 0);
        memory
            .read_slice(&mut scratch.bytes[start..], address)
            .map_err(|_| ChainError::OutsideMemory)?;
        if part < left {
            return Ok(false);
        }
    }
    Ok(true)
}
