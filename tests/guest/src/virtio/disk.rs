//! The disk (virtio 1.2, 5.2): one request at a time, whose end is looked for.

use guest_logic::kv::SECTOR_BYTES;
use virtio_drivers::transport::{DeviceType, Transport};

use super::NoDevice;
use super::ring::Ring;
use crate::pci::Function;
use crate::pool;

const QUEUE: u16 = 0;
const QUEUE_SIZE: usize = 16;
/// Sectors of one request: 64 KiB.
pub const SECTORS_MAX: usize = 128;
const DATA_PAGES: usize = (SECTORS_MAX * SECTOR_BYTES).div_ceil(virtio_drivers::PAGE_SIZE);

/// `struct virtio_blk_req` (5.2.6): type, reserved, sector; in the end one byte of status.
const HEADER_BYTES: usize = 16;
const STATUS_AT: usize = HEADER_BYTES;
const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const STATUS_OK: u8 = 0;
/// No device writes it.
const STATUS_NONE: u8 = 0xff;

bitflags::bitflags! {
    #[derive(Clone, Copy, Debug)]
    struct Features: u64 {
        const FLUSH = 1 << 9;
        const VERSION_1 = 1 << 32;
    }
}

/// The device answered with this status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskError(pub u8);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Request {
    /// Of so many bytes.
    Read(usize),
    Write(usize),
    Flush,
}

pub struct Disk {
    sectors: u64,
    features: Features,
    ring: Ring<QUEUE_SIZE>,
    /// Header and status, in a page of their own.
    frame: &'static mut [u8],
    data: &'static mut [u8],
    pending: Option<(u16, Request)>,
    /// Dropping it would reset the device.
    _function: Function,
}

impl Disk {
    /// The outer None where there is no disk.
    pub fn open() -> Option<Result<Self, NoDevice>> {
        let function = Function::open(DeviceType::Block)?;
        Some(function.map_err(NoDevice).and_then(Self::start))
    }

    fn start(mut function: Function) -> Result<Self, NoDevice> {
        let features = function.transport.begin_init(Features::all());
        let capacity = function.transport.read_consistent(|| {
            let low = function.transport.read_config_space::<u32>(0)?;
            Ok((low, function.transport.read_config_space::<u32>(4)?))
        });
        let (low, high) = capacity.map_err(|_| NoDevice("has no configuration"))?;
        let ring = Ring::new(&mut function, QUEUE).map_err(|_| NoDevice("has no such queue"))?;
        function.transport.finish_init();
        let frame = pool::pages(1).ok_or(NoDevice("has no memory"))?;
        let data = pool::pages(DATA_PAGES).ok_or(NoDevice("has no memory"))?;
        let sectors = u64::from(high) << 32 | u64::from(low);
        Ok(Self { sectors, features, ring, frame, data, pending: None, _function: function })
    }

    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether there is anything that [`Disk::start_flush`] could do.
    #[must_use]
    pub fn can_flush(&self) -> bool {
        self.features.contains(Features::FLUSH)
    }

    /// What was read and what is to be written: `SECTORS_MAX` sectors. Not while a request is
    /// pending.
    pub fn data(&mut self) -> &mut [u8] {
        assert!(self.pending.is_none(), "the device has the data");
        self.data
    }

    /// Writes the first `count` sectors of the data to `sector` and the following.
    pub fn start_write(&mut self, sector: u64, count: usize) {
        self.begin(TYPE_OUT, sector, Request::Write(count * SECTOR_BYTES));
    }

    pub fn start_read(&mut self, sector: u64, count: usize) {
        self.begin(TYPE_IN, sector, Request::Read(count * SECTOR_BYTES));
    }

    pub fn start_flush(&mut self) {
        self.begin(TYPE_FLUSH, 0, Request::Flush);
    }

    fn begin(&mut self, kind: u32, sector: u64, request: Request) {
        assert!(self.pending.is_none(), "one request at a time");
        self.frame[..4].copy_from_slice(&kind.to_le_bytes());
        self.frame[8..HEADER_BYTES].copy_from_slice(&sector.to_le_bytes());
        self.frame[STATUS_AT] = STATUS_NONE;
        let (header, status) = self.frame.split_at_mut(HEADER_BYTES);
        let status = &mut status[..1];
        // SAFETY: all of it is there for good, and is not touched while the request is pending.
        let token = unsafe {
            match request {
                Request::Read(length) => {
                    self.ring.add(&[header], &mut [&mut self.data[..length], status])
                }
                Request::Write(length) => {
                    self.ring.add(&[header, &self.data[..length]], &mut [status])
                }
                Request::Flush => self.ring.add(&[header], &mut [status]),
            }
        };
        self.pending = Some((token.expect("an empty queue has room"), request));
        self.ring.kick();
    }

    /// Whether the pending request has ended. Only reads.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.pending.is_some() && self.ring.done().is_some()
    }

    /// How the pending request went; None as long as it has not ended.
    pub fn finish(&mut self) -> Option<Result<(), DiskError>> {
        let (token, request) = self.pending?;
        self.ring.done()?;
        let (header, status) = self.frame.split_at_mut(HEADER_BYTES);
        let status = &mut status[..1];
        // SAFETY: the buffers are those of `begin`.
        let taken = unsafe {
            match request {
                Request::Read(length) => {
                    self.ring.take(token, &[header], &mut [&mut self.data[..length], status])
                }
                Request::Write(length) => {
                    self.ring.take(token, &[header, &self.data[..length]], &mut [status])
                }
                Request::Flush => self.ring.take(token, &[header], &mut [status]),
            }
        };
        assert!(taken.is_ok(), "the disk gave back what it did not have");
        self.pending = None;
        // SAFETY: the byte is ours again; the device wrote it, hence volatile.
        let status = unsafe { (&raw const self.frame[STATUS_AT]).read_volatile() };
        Some(if status == STATUS_OK { Ok(()) } else { Err(DiskError(status)) })
    }
}
