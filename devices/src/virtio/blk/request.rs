//! Requests of a block device, virtio 1.2 section 5.2.6.
//!
//! What enters: a chain; what leaves: a request that the host may carry out as it is, or the
//! answer that the guest gets at once. What always holds: the range of a request that leaves here
//! is a whole number of sectors and lies in the image.

use vm_memory::GuestAddress;

use super::chain::{Chain, Segments};
use super::layout::{
    DISCARD_SECTORS_MAX, SECTOR_BYTES, SECTOR_SHIFT, SERIAL_BYTES, WRITE_ZEROES_SECTORS_MAX,
};
use super::schedule::{Access, Class};
use crate::virtio::device::GuestMemory;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// Type, reserved, sector.
const HEADER_BYTES: u64 = 16;
/// Sector, number of sectors, flags.
const RANGE_BYTES: u64 = 16;
/// The only flag of a range.
const FLAG_UNMAP: u32 = 1;

/// How a request ended (virtio 1.2, 5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

impl Status {
    /// The byte that the guest sees.
    pub(super) fn byte(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::IoError => 1,
            Self::Unsupported => 2,
        }
    }
}

/// What the host shall do. Offsets and lengths in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Task {
    Read { offset: u64 },
    Write { offset: u64 },
    Zero { offset: u64, len: u64, unmap: bool },
    Discard { offset: u64, len: u64 },
    Flush,
}

/// A request for the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) task: Task,
    /// Where the data is or goes; empty but for reads and writes.
    pub(super) data: Segments,
    pub(super) status: GuestAddress,
}

impl Request {
    /// What the request does to the image, for its place among the others.
    pub(super) fn access(&self) -> Access {
        let (class, offset, len) = match self.task {
            Task::Read { offset } => (Class::Read, offset, self.data.len()),
            Task::Write { offset } => (Class::Change, offset, self.data.len()),
            Task::Zero { offset, len, .. } | Task::Discard { offset, len } => {
                (Class::Change, offset, len)
            }
            Task::Flush => (Class::Flush, 0, 0),
        };
        Access { class, range: offset..offset + len, data_bytes: self.data.len() }
    }
}

/// What became of a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Parsed {
    Io(Request),
    /// The device's identification goes to `data`.
    Identify {
        data: Segments,
        status: GuestAddress,
    },
    /// Answered without the host.
    Refused {
        code: Status,
        status: GuestAddress,
    },
}

/// What a device accepts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    pub(super) capacity_sectors: u64,
    pub(super) readonly: bool,
    /// VIRTIO_BLK_F_DISCARD was negotiated.
    pub(super) discard: bool,
    /// VIRTIO_BLK_F_WRITE_ZEROES was negotiated.
    pub(super) write_zeroes: bool,
    /// Zeroes that may give room back do.
    pub(super) unmap: bool,
}

/// Reads what a chain asks for.
pub(super) fn parse(memory: &GuestMemory, chain: Chain, rules: Rules) -> Parsed {
    let status = chain.status;
    parse_chain(memory, chain, rules).unwrap_or_else(|code| Parsed::Refused { code, status })
}

fn parse_chain(memory: &GuestMemory, chain: Chain, rules: Rules) -> Result<Parsed, Status> {
    let Chain { readable, writable, status, fault } = chain;
    let mut header = [0; 16];
    if fault.is_some() || !readable.read(memory, 0, &mut header) {
        return Err(Status::IoError);
    }
    let (kind, sector) = (le32(&header, 0), le64(&header, 8));
    let out = readable.skip(HEADER_BYTES);
    let io = |task, data| Ok(Parsed::Io(Request { task, data, status }));
    match kind {
        T_IN => {
            let offset = rules.range(sector, writable.len())?;
            io(Task::Read { offset }, writable)
        }
        T_OUT => {
            rules.may_write()?;
            let offset = rules.range(sector, out.len())?;
            io(Task::Write { offset }, out)
        }
        T_FLUSH => io(Task::Flush, Segments::default()),
        T_GET_ID if writable.len() < SERIAL_BYTES => Err(Status::IoError),
        T_GET_ID => Ok(Parsed::Identify { data: writable, status }),
        T_DISCARD if rules.discard => {
            let range = rules.change(memory, &out, DISCARD_SECTORS_MAX)?;
            // Virtio 1.2, 5.2.6.2: unmap is a flag of write zeroes only.
            if range.unmap {
                return Err(Status::Unsupported);
            }
            io(Task::Discard { offset: range.offset, len: range.len }, Segments::default())
        }
        T_WRITE_ZEROES if rules.write_zeroes => {
            let Range { offset, len, unmap } =
                rules.change(memory, &out, WRITE_ZEROES_SECTORS_MAX)?;
            let unmap = unmap && rules.unmap;
            io(Task::Zero { offset, len, unmap }, Segments::default())
        }
        _ => Err(Status::Unsupported),
    }
}

struct Range {
    offset: u64,
    len: u64,
    unmap: bool,
}

impl Rules {
    fn may_write(&self) -> Result<(), Status> {
        if self.readonly { Err(Status::IoError) } else { Ok(()) }
    }

    /// The offset of `len` bytes from `sector` on.
    fn range(&self, sector: u64, len: u64) -> Result<u64, Status> {
        let end = sector.checked_add(len >> SECTOR_SHIFT);
        let inside = end.is_some_and(|end| end <= self.capacity_sectors);
        if len == 0 || !len.is_multiple_of(SECTOR_BYTES) || !inside {
            return Err(Status::IoError);
        }
        // No overflow: the sector is in an image whose bytes were counted.
        Ok(sector << SECTOR_SHIFT)
    }

    /// The one range of a discard or a write zeroes; the configuration space allows no more.
    fn change(&self, memory: &GuestMemory, out: &Segments, max: u32) -> Result<Range, Status> {
        self.may_write()?;
        let mut bytes = [0; 16];
        if out.len() != RANGE_BYTES || !out.read(memory, 0, &mut bytes) {
            return Err(Status::IoError);
        }
        let (sector, sectors, flags) = (le64(&bytes, 0), le32(&bytes, 8), le32(&bytes, 12));
        if flags & !FLAG_UNMAP != 0 {
            return Err(Status::Unsupported);
        }
        if sectors > max {
            return Err(Status::IoError);
        }
        let len = u64::from(sectors) << SECTOR_SHIFT;
        let offset = self.range(sector, len)?;
        Ok(Range { offset, len, unmap: flags & FLAG_UNMAP != 0 })
    }
}

fn le32(bytes: &[u8; 16], at: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(field)
}

fn le64(bytes: &[u8; 16], at: usize) -> u64 {
    let mut field = [0; 8];
    field.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(field)
}
