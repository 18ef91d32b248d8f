//! virtio devices: queues, the network card, the disk (virtio 1.2). Nothing is interrupt-driven:
//! whoever waits for a device looks at its queues, which only reads memory.

mod disk;
mod memory;
mod net;
mod ring;

pub use disk::{Disk, DiskError, SECTORS_MAX};
pub use memory::Memory;
pub use net::Net;

/// Why a device cannot be used.
#[derive(Debug)]
pub struct NoDevice(pub &'static str);
