//! What registers memory: a session's device.
//!
//! Enters: a piece of a memory. Leaves: what the device has of it. In unit tests there may be a device that is none,
//! whose WRITEs are copies within the process: `fake.rs`.

use std::sync::Arc;

use ::rdma::{LentMemory, ProtectionDomain, Remote, Segment};
use vm_memory::GuestAddress;

#[cfg(test)]
use super::fake;
use super::pieces::{PIECE_BYTES_MIN, Purpose, Region};
use crate::ids::PAGE_SIZE;
use crate::ram::Ram;

/// Of a session.
#[derive(Clone)]
pub(super) enum Registrar {
    Device(Arc<ProtectionDomain>),
    #[cfg(test)]
    Fake(Arc<fake::Plan>),
}

/// What a device has of a memory.
pub(super) enum Memory {
    Device(LentMemory),
    #[cfg(test)]
    Fake(fake::Memory),
}

impl Registrar {
    /// Bytes that are registered at a time, at least.
    pub(super) fn piece_bytes_min(&self) -> u64 {
        match self {
            Self::Device(_) => PIECE_BYTES_MIN,
            #[cfg(test)]
            Self::Fake(_) => fake::PIECE_BYTES,
        }
    }

    /// Asks the device, which may take its time.
    pub(super) fn register(
        &self,
        ram: &Ram,
        purpose: Purpose,
        start: GuestAddress,
        pages: u64,
    ) -> Result<Memory, ::rdma::Error> {
        match self {
            Self::Device(domain) => {
                let len = usize::try_from(pages).unwrap_or(usize::MAX).saturating_mul(PAGE_SIZE);
                let register = match purpose {
                    Purpose::Reading => LentMemory::register,
                    Purpose::Opened => LentMemory::open,
                };
                register(domain, ram.mapping(), start, len).map(Memory::Device)
            }
            #[cfg(test)]
            Self::Fake(plan) => plan.register(ram, purpose, start, pages).map(Memory::Fake),
        }
    }
}

impl Memory {
    pub(super) fn domain(&self) -> Option<&Arc<ProtectionDomain>> {
        match self {
            Self::Device(memory) => Some(memory.domain()),
            #[cfg(test)]
            Self::Fake(_) => None,
        }
    }

    /// Where a peer finds it.
    pub(super) fn remote(&self) -> Remote {
        match self {
            Self::Device(memory) => memory.remote(),
            #[cfg(test)]
            Self::Fake(memory) => memory.remote(),
        }
    }

    /// `len` bytes from `offset` on, for a request.
    pub(super) fn segment(&self, offset: usize, len: u32) -> Result<Segment, ::rdma::Error> {
        match self {
            Self::Device(memory) => memory.segment(offset, len),
            #[cfg(test)]
            Self::Fake(_) => Err(::rdma::Error::Option { what: "no requests here".to_owned() }),
        }
    }
}

impl Region for Memory {
    fn end(self) -> Result<(), ::rdma::Error> {
        match self {
            Self::Device(memory) => memory.end(),
            #[cfg(test)]
            Self::Fake(memory) => {
                drop(memory);
                Ok(())
            }
        }
    }
}
