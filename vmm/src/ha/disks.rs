//! Disks that are replicated: those of a VM that the guest can write, each with an image of its
//! own on either host.

use std::io;
use std::sync::Arc;

use devices::virtio::blk::{Change, Disk, RECORD_COST_BYTES, WriteLog};
use replication::disk::{CHANGE_COST_BYTES, Disks, Journal, Operation, ReplicaDisk, Told};

// What a disk sets aside for a change is what the log counts it for.
const _: () = assert!(RECORD_COST_BYTES == CHANGE_COST_BYTES);

/// The disks of a machine that is protected.
pub(super) struct ReplicatedDisks(pub(super) Vec<Arc<Disk>>);

/// One disk's way into the journal.
struct Recorder {
    journal: Arc<Journal>,
    disk: u32,
}

impl WriteLog for Recorder {
    fn reserve(&self, bytes: u64) -> bool {
        self.journal.reserve(bytes)
    }

    fn release(&self, bytes: u64) {
        self.journal.release(bytes);
    }

    fn record(&self, change: &Change<'_>) {
        let disk = self.disk;
        let range = |operation, offset, len| Told { disk, operation, offset, len, data: &[] };
        self.journal.record(match *change {
            Change::Write { offset, data } => {
                Told { data, ..range(Operation::Write, offset, data.len() as u64) }
            }
            Change::Zero { offset, len, unmap } => range(Operation::Zero { unmap }, offset, len),
            Change::Discard { offset, len } => range(Operation::Discard, offset, len),
            Change::Flush => range(Operation::Flush, 0, 0),
        });
    }
}

impl Disks for ReplicatedDisks {
    fn sizes_bytes(&self) -> Vec<u64> {
        self.0.iter().map(|disk| disk.capacity_bytes()).collect()
    }

    fn read(&self, disk: usize, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.0[disk].read_image(offset, into)
    }

    fn hole_bytes(&self, disk: usize, offset: u64) -> u64 {
        self.0[disk].hole_bytes(offset)
    }

    fn flush(&self, disk: usize) -> io::Result<()> {
        self.0[disk].flush_image()
    }

    fn set_journal(&self, journal: Option<Arc<Journal>>) {
        for (number, disk) in (0..).zip(&self.0) {
            let log = journal.as_ref().map(|journal| {
                let journal = Arc::clone(journal);
                Arc::new(Recorder { journal, disk: number }) as Arc<dyn WriteLog>
            });
            disk.set_write_log(log);
        }
        self.wake();
    }

    fn wake(&self) {
        self.0.iter().for_each(|disk| disk.wake());
    }
}

/// A disk of a machine that waits for its take-over: claimed, and written by replication alone.
pub(super) struct Receiving(pub(super) Arc<Disk>);

impl ReplicaDisk for Receiving {
    fn size_bytes(&self) -> u64 {
        self.0.image_bytes()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_image(offset, data)
    }

    fn zero(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.0.zero_image(offset, len, unmap)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.zero_image(offset, len, true)
    }

    fn flush(&self) -> io::Result<()> {
        self.0.flush_image()
    }
}
