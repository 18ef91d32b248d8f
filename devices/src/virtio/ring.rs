//! What a device does to a ring (virtio 1.2, 2.7), and nothing that trusts it.
//!
//! What enters: a queue whose addresses the transport has checked, with contents of the guest's
//! choice. What leaves: chains of checked segments, and used buffers. What always holds: a chain
//! is walked once over at most `queue size` descriptors (2.7.5.3.1), each of which has bytes that
//! lie in guest memory. A chain that does not is [`ChainError`], which costs the guest that chain;
//! [`RingError`] means that the ring itself makes no sense.
//!
//! Used buffers are made visible together, which `Queue::add_used` cannot: a frame that is spread
//! over several buffers must not be seen in part (5.1.6.4).
//!
//! Whether the driver is to ring is written only where that differs from what is there. A device
//! looks at its rings after each pause, and what it writes makes a page dirty: a guest that does
//! nothing would have something to seal in every epoch.

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use thiserror::Error;
use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory as _, Permissions};

use crate::virtio::device::GuestMemory;

/// Bytes of `flags` and `idx`, before the elements of either ring.
const RING_HEADER_BYTES: u64 = 4;
/// Offset of `idx` in either ring.
const INDEX_OFFSET: u64 = 2;
const AVAIL_ELEMENT_BYTES: u64 = 2;
const USED_ELEMENT_BYTES: u64 = 8;

/// The ring makes no sense: the device needs a reset.
#[derive(Debug, Error)]
pub enum RingError {
    #[error("The available ring is not usable")]
    Available(#[source] virtio_queue::Error),
    #[error("Notifications of the driver cannot be turned on or off")]
    Notification(#[source] virtio_queue::Error),
    #[error("The head {head} is outside of a queue of {size} descriptors")]
    Head { head: u16, size: u16 },
    #[error("The used ring cannot be written")]
    Used(#[source] vm_memory::GuestMemoryError),
    #[error("The available ring cannot be read")]
    Event(#[source] vm_memory::GuestMemoryError),
    #[error("A ring's address overflows")]
    Address,
}

/// A chain makes no sense.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum ChainError {
    #[error("The chain has no descriptor")]
    Empty,
    #[error("The chain is broken or longer than its queue")]
    Unterminated,
    #[error("A descriptor has no bytes")]
    NoBytes,
    #[error("A descriptor lies outside of guest memory")]
    OutsideMemory,
    #[error("A descriptor goes the wrong way")]
    Direction,
    #[error("The chain is too long for a frame")]
    TooLong,
    #[error("The chain is too short for a frame")]
    TooShort,
}

/// A part of guest memory that a descriptor names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub address: GuestAddress,
    pub len: usize,
    /// The device writes it; otherwise it reads it.
    pub writable: bool,
}

/// An answer to a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    pub head: u16,
    /// Bytes that the device has written.
    pub len: u32,
}

/// Takes the next chain that the driver made available.
pub fn pop<'m>(
    queue: &mut Queue,
    memory: &'m GuestMemory,
) -> Result<Option<DescriptorChain<&'m GuestMemory>>, RingError> {
    let size = queue.size();
    let Some(chain) = queue.iter(memory).map_err(RingError::Available)?.next() else {
        return Ok(None);
    };
    let head = chain.head_index();
    if head >= size { Err(RingError::Head { head, size }) } else { Ok(Some(chain)) }
}

/// Whether the driver has made more available. If not, it will ring the doorbell.
pub fn has_more(queue: &mut Queue, memory: &GuestMemory) -> Result<bool, RingError> {
    let available = queue.avail_idx(memory, Ordering::Acquire).map_err(RingError::Available)?;
    if available != Wrapping(queue.next_avail()) {
        return Ok(true);
    }
    enable_notification(queue, memory)
}

/// Asks the driver to ring for the next chain. True if that is there already.
pub fn enable_notification(queue: &mut Queue, memory: &GuestMemory) -> Result<bool, RingError> {
    let used = GuestAddress(queue.used_ring());
    if queue.event_idx_enabled() {
        let event = RING_HEADER_BYTES + u64::from(queue.size()) * USED_ELEMENT_BYTES;
        write_wish(memory, offset(used, event)?, queue.next_avail())?;
    } else {
        write_wish(memory, used, 0)?;
    }
    // The wish must be visible before the index is read: the driver does the reverse. It is also
    // where it was read only, since it was written before.
    fence(Ordering::SeqCst);
    let available = queue.avail_idx(memory, Ordering::Relaxed).map_err(RingError::Available)?;
    Ok(available != Wrapping(queue.next_avail()))
}

/// Tells the driver that it need not ring. With event indices it rings once at most anyway.
pub fn disable_notification(queue: &Queue, memory: &GuestMemory) -> Result<(), RingError> {
    if queue.event_idx_enabled() {
        return Ok(());
    }
    let flags = u16::try_from(VRING_USED_F_NO_NOTIFY).unwrap_or_default();
    write_wish(memory, GuestAddress(queue.used_ring()), flags)
}

fn write_wish(memory: &GuestMemory, at: GuestAddress, value: u16) -> Result<(), RingError> {
    let failed = |error| RingError::Notification(virtio_queue::Error::GuestMemory(error));
    let value = value.to_le();
    let found: u16 = memory.load(at, Ordering::Relaxed).map_err(failed)?;
    if found == value {
        return Ok(());
    }
    memory.store(value, at, Ordering::Relaxed).map_err(failed)
}

/// Walks the next segment of `chain`: an item for each descriptor.
pub struct Segments<'m> {
    chain: DescriptorChain<&'m GuestMemory>,
    memory: &'m GuestMemory,
    /// Descriptors that may still come.
    left: u16,
    /// The last descriptor named a next one.
    more: bool,
    any: bool,
}

impl<'m> Segments<'m> {
    /// The segments of a chain of `queue`.
    #[must_use]
    pub fn new(
        queue: &Queue,
        chain: DescriptorChain<&'m GuestMemory>,
        memory: &'m GuestMemory,
    ) -> Self {
        Self { chain, memory, left: queue.size(), more: true, any: false }
    }

    fn step(&mut self) -> Result<Option<Segment>, ChainError> {
        if !self.more {
            return Ok(None);
        }
        if self.left == 0 {
            return Err(ChainError::Unterminated);
        }
        self.left -= 1;
        let Some(descriptor) = self.chain.next() else {
            return Err(if self.any { ChainError::Unterminated } else { ChainError::Empty });
        };
        self.any = true;
        self.more = descriptor.has_next();
        let len = usize::try_from(descriptor.len()).map_err(|_| ChainError::TooLong)?;
        let (address, writable) = (descriptor.addr(), descriptor.is_write_only());
        if len == 0 {
            return Err(ChainError::NoBytes);
        }
        let access = if writable { Permissions::Write } else { Permissions::Read };
        if !self.memory.check_range(address, len, access) {
            return Err(ChainError::OutsideMemory);
        }
        Ok(Some(Segment { address, len, writable }))
    }
}

impl Iterator for Segments<'_> {
    type Item = Result<Segment, ChainError>;

    fn next(&mut self) -> Option<Self::Item> {
        let step = self.step().transpose();
        if matches!(step, Some(Err(_))) {
            self.more = false;
        }
        step
    }
}

/// Gives buffers back to the driver, all in the same instant. True if it wants an interrupt for
/// any of them.
pub fn answer(queue: &mut Queue, memory: &GuestMemory, used: &[Used]) -> Result<bool, RingError> {
    if used.is_empty() {
        return Ok(false);
    }
    let size = queue.size();
    let ring = GuestAddress(queue.used_ring());
    let old = Wrapping(queue.next_used());
    let mut next = old;
    for Used { head, len } in used {
        if *head >= size {
            return Err(RingError::Head { head: *head, size });
        }
        let slot = u64::from(next.0 % size);
        let mut element = [0; 8];
        element[..4].copy_from_slice(&u32::from(*head).to_le_bytes());
        element[4..].copy_from_slice(&len.to_le_bytes());
        let address = offset(ring, RING_HEADER_BYTES + slot * USED_ELEMENT_BYTES)?;
        memory.write_slice(&element, address).map_err(RingError::Used)?;
        next += 1;
    }
    memory
        .store(next.0.to_le(), offset(ring, INDEX_OFFSET)?, Ordering::Release)
        .map_err(RingError::Used)?;
    queue.set_next_used(next.0);
    wants_interrupt(queue, memory, old, next)
}

/// Whether the driver wants to hear that the used index went from `old` to `new` (2.7.7.2).
fn wants_interrupt(
    queue: &Queue,
    memory: &GuestMemory,
    old: Wrapping<u16>,
    new: Wrapping<u16>,
) -> Result<bool, RingError> {
    // The index must be visible before the driver's wish is read: the driver does the reverse.
    fence(Ordering::SeqCst);
    let ring = GuestAddress(queue.avail_ring());
    let load = |address| memory.load::<u16>(address, Ordering::Relaxed).map(u16::from_le);
    if queue.event_idx_enabled() {
        let event = RING_HEADER_BYTES + u64::from(queue.size()) * AVAIL_ELEMENT_BYTES;
        let event = Wrapping(load(offset(ring, event)?).map_err(RingError::Event)?);
        return Ok(new - event - Wrapping(1) < new - old);
    }
    let flags = load(ring).map_err(RingError::Event)?;
    Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0)
}

fn offset(ring: GuestAddress, bytes: u64) -> Result<GuestAddress, RingError> {
    ring.checked_add(bytes).ok_or(RingError::Address)
}
