//! A descriptor chain, read into what it names (virtio 1.2, 2.7.5).
//!
//! What enters: a head index and guest memory; what leaves: the device-readable and the
//! device-writable bytes as lists of ranges that lie in guest memory, and where the last writable
//! byte is. What always holds: a walk reads at most [`DESCRIPTORS_MAX`] descriptors, whatever they
//! link to, and no list is longer. The walk is repeatable: a restored device walks again from the
//! same heads, which is why it does not begin at the available ring.

use thiserror::Error;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::virtio::device::GuestMemory;

/// Most descriptors of a chain, those of an indirect table included. A driver that heeds SEG_MAX
/// needs a header and a status more than that.
pub(super) const DESCRIPTORS_MAX: u16 = 256;

/// Bytes of a descriptor.
const DESCRIPTOR_BYTES: u32 = 16;

/// A chain does not say where an answer could go.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub(super) enum ChainError {
    #[error("The chain has more than {DESCRIPTORS_MAX} descriptors or is a loop")]
    TooLong,
    #[error("Descriptor {0} is outside of its table")]
    Index(u16),
    #[error("The descriptor table is not in memory")]
    Table,
    #[error("The indirect descriptor is not acceptable")]
    Indirect,
    #[error("The chain does not end in a writable byte")]
    NoStatus,
}

/// What is wrong with a chain that can still be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ChainFault {
    /// A readable descriptor follows a writable one (virtio 1.2, 2.7.4.2).
    Order,
    /// A buffer is not in guest memory.
    Wild,
    /// More than 2^32 bytes in total (virtio 1.2, 2.7.5.2).
    Bytes,
}

/// A range of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    address: GuestAddress,
    len: u32,
}

/// Ranges of guest memory that follow each other in a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Segments {
    list: Vec<Segment>,
    len: u64,
}

impl Segments {
    fn push(&mut self, address: GuestAddress, len: u32) {
        if len > 0 {
            self.list.push(Segment { address, len });
            self.len += u64::from(len);
        }
    }

    /// Their bytes in total.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Without the first `count` bytes, or with none if there are fewer.
    pub(super) fn skip(mut self, count: u64) -> Self {
        let mut left = count;
        let mut kept = Self::default();
        for segment in self.list.drain(..) {
            let cut = u32::try_from(left).unwrap_or(u32::MAX).min(segment.len);
            left -= u64::from(cut);
            let address = GuestAddress(segment.address.0 + u64::from(cut));
            kept.push(address, segment.len - cut);
        }
        kept
    }

    /// Without the last byte.
    fn without_last(mut self) -> Self {
        if let Some(last) = self.list.last_mut() {
            last.len -= 1;
            self.len -= 1;
        }
        self.list.retain(|segment| segment.len > 0);
        self
    }

    /// Fills `bytes` from what is `offset` bytes in. False if there are not as many.
    pub(super) fn read(&self, memory: &GuestMemory, offset: u64, bytes: &mut [u8]) -> bool {
        let mut done = 0;
        self.each(offset, bytes.len(), |address, len| {
            let part = bytes.get_mut(done..done + len)?;
            done += len;
            memory.read_slice(part, address).ok()
        })
    }

    /// Writes `bytes` to what is `offset` bytes in. False if there is not the room.
    pub(super) fn write(&self, memory: &GuestMemory, offset: u64, bytes: &[u8]) -> bool {
        let mut done = 0;
        self.each(offset, bytes.len(), |address, len| {
            let part = bytes.get(done..done + len)?;
            done += len;
            memory.write_slice(part, address).ok()
        })
    }

    /// Calls `copy` for the parts of `count` bytes from `offset` on.
    fn each(
        &self,
        offset: u64,
        count: usize,
        mut copy: impl FnMut(GuestAddress, usize) -> Option<()>,
    ) -> bool {
        let (mut skip, mut left) = (offset, count);
        for segment in &self.list {
            let len = u64::from(segment.len);
            if skip >= len {
                skip -= len;
                continue;
            }
            let part = usize::try_from(len - skip).unwrap_or(usize::MAX).min(left);
            if part > 0 && copy(GuestAddress(segment.address.0 + skip), part).is_none() {
                return false;
            }
            skip = 0;
            left -= part;
            if left == 0 {
                break;
            }
        }
        left == 0
    }
}

/// What a chain names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chain {
    pub(super) readable: Segments,
    /// Without the status byte.
    pub(super) writable: Segments,
    /// The last writable byte.
    pub(super) status: GuestAddress,
    pub(super) fault: Option<ChainFault>,
}

/// Where a queue's chains are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table {
    pub(super) address: GuestAddress,
    pub(super) size: u16,
    /// VIRTIO_F_INDIRECT_DESC was negotiated.
    pub(super) indirect: bool,
}

struct Walk<'a> {
    memory: &'a GuestMemory,
    readable: Segments,
    writable: Segments,
    status: Option<GuestAddress>,
    fault: Option<ChainFault>,
    bytes: u32,
}

/// Reads the chain that begins at `head`.
pub(super) fn walk(memory: &GuestMemory, table: Table, head: u16) -> Result<Chain, ChainError> {
    let mut walk = Walk {
        memory,
        readable: Segments::default(),
        writable: Segments::default(),
        status: None,
        fault: None,
        bytes: 0,
    };
    walk.run(table, head)?;
    let status = walk.status.ok_or(ChainError::NoStatus)?;
    // Only a last segment that lies in memory gave a status, so it is the last of the list.
    let writable = walk.writable.without_last();
    Ok(Chain { readable: walk.readable, writable, status, fault: walk.fault })
}

impl Walk<'_> {
    fn run(&mut self, mut table: Table, head: u16) -> Result<(), ChainError> {
        let mut index = head;
        let mut left = DESCRIPTORS_MAX;
        loop {
            if index >= table.size {
                return Err(ChainError::Index(index));
            }
            let offset = u64::from(index) * u64::from(DESCRIPTOR_BYTES);
            let address = table.address.0.checked_add(offset).ok_or(ChainError::Table)?;
            let descriptor: Descriptor =
                self.memory.read_obj(GuestAddress(address)).map_err(|_| ChainError::Table)?;
            if descriptor.refers_to_indirect_table() {
                table = indirect(table, &descriptor)?;
                index = 0;
                // It is not of the chain, and a table cannot refer to another one.
                continue;
            }
            left = left.checked_sub(1).ok_or(ChainError::TooLong)?;
            self.add(&descriptor);
            if !descriptor.has_next() {
                return Ok(());
            }
            index = descriptor.next();
        }
    }

    fn add(&mut self, descriptor: &Descriptor) {
        let (address, len) = (descriptor.addr(), descriptor.len());
        self.status = None;
        match self.bytes.checked_add(len) {
            Some(bytes) => self.bytes = bytes,
            None => return self.blame(ChainFault::Bytes),
        }
        // An empty buffer is nowhere.
        let inside =
            len == 0 || usize::try_from(len).is_ok_and(|len| self.memory.check_range(address, len));
        if !inside {
            return self.blame(ChainFault::Wild);
        }
        if descriptor.is_write_only() {
            self.writable.push(address, len);
            if len > 0 {
                self.status = Some(GuestAddress(address.0 + u64::from(len) - 1));
            }
        } else {
            if self.writable.len() > 0 {
                self.blame(ChainFault::Order);
            }
            self.readable.push(address, len);
        }
    }

    fn blame(&mut self, fault: ChainFault) {
        self.fault.get_or_insert(fault);
    }
}

/// The table that an indirect descriptor refers to (virtio 1.2, 2.7.5.3).
fn indirect(table: Table, descriptor: &Descriptor) -> Result<Table, ChainError> {
    let len = descriptor.len();
    // A table names no other (`table.indirect` is false in one), and ends the chain.
    if !table.indirect || descriptor.has_next() || len == 0 || !len.is_multiple_of(DESCRIPTOR_BYTES)
    {
        return Err(ChainError::Indirect);
    }
    let size = u16::try_from(len / DESCRIPTOR_BYTES).map_err(|_| ChainError::Indirect)?;
    Ok(Table { address: descriptor.addr(), size, indirect: false })
}
