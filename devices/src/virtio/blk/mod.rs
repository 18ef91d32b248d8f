//! A disk: virtio-blk (virtio 1.2, section 5.2) over a raw image.
//!
//! ```text
//!   ring ──▶ chain ──▶ request ──▶ schedule ──▶ engine ──▶ image
//!            (walk)    (parse)    (order, hold)  (threads)   (file)
//! ```
//!
//! What enters: chains of a guest that is taken for an attacker; what leaves: I/O on an image, and
//! answers. What always holds, beside what [`crate::virtio`] says:
//!
//! - A request's range was checked against the capacity before the host hears of it.
//! - Requests that overlap, one of which changes something, run in the order of their arrival.
//!   Otherwise they end in any order. A flush is `fdatasync` begun after its arrival, which makes
//!   durable what had been answered before (virtio 1.2, 5.2.6.1).
//! - A chain with a status byte gets an answer, whatever else is wrong with it. One without is
//!   given back with nothing written. A ring that makes no sense stops the disk until its reset.
//! - Requests in flight are at most the queues' sizes, and their buffers
//!   [`schedule::RUNNING_BYTES_MAX`] bytes; long requests go piece by piece.
//! - In hold mode ([`Disk::hold`]) nothing of an uncommitted epoch reaches the image. The request
//!   stays in flight meanwhile, so a replica has it in its state and carries it out itself.
//! - While anybody keeps the disk durable ([`Disk::keep_durable`]) what was answered is on the storage,
//!   and not only in this host's page cache.

/// Buffers for the host's I/O.
mod buffer;
/// Descriptor chains as lists of memory ranges.
mod chain;
/// What a disk is made from.
mod config;
/// The device.
mod disk;
/// Carries out I/O beside the threads that serve the guest.
mod engine;
/// Holds output until its epoch is committed.
mod gate;
/// The image behind a disk, its lock and its format.
mod image;
/// Features and configuration space.
mod layout;
/// The image, read and written beside the guest for a copy of it elsewhere.
mod replica;
/// Requests, and what is wrong with them.
mod request;
/// Which requests may go to the host, and when.
mod schedule;
/// One activation, from DRIVER_OK to reset.
mod session;
/// The saved form.
mod state;
/// From the ring to the host and back.
mod worker;
/// Where changes are recorded for a copy elsewhere.
mod write_log;

#[cfg(test)]
mod tests;

pub use buffer::Buffer;
pub use config::{BlkConfig, BlkError, IN_FLIGHT_MAX, ImageType, QUEUE_SIZE_MAX, QUEUES_MAX};
pub use disk::Disk;
pub use engine::{Done, Engine, Io, KeptDurable, Operation};
pub use image::{Image, ImageError};
pub use layout::SECTOR_BYTES;
pub use schedule::Held;
pub use state::{BlkQueueState, BlkState};
pub use write_log::{Change, RECORD_COST_BYTES, WriteLog};
