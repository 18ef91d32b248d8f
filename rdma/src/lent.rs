//! Memory of others that a device may read, or a peer may write: a guest's.

use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::error::Error;
use crate::memory::{Access, MemoryRegion, ProtectionDomain, Remote, Segment};

/// A mapping that is only kept alive.
trait Memory: Send + Sync {}
impl<M: Send + Sync> Memory for M {}

/// A piece of a guest's memory that a device may read, and nothing else, unless it was opened to a peer's
/// writes. Holds the mapping.
///
/// A hole punched into the memory's file takes pages away from the mapping and not from the device, which
/// goes on reading what was there: whoever may do that must not while this lives.
pub struct LentMemory {
    /// `None` once it ended.
    region: Option<MemoryRegion>,
    memory: Option<Arc<dyn Memory>>,
}

impl LentMemory {
    /// Registers `len` bytes from `start` on, which lie in one region of `memory`. Pages that were never
    /// touched are made now, and all of them stay where they are.
    ///
    /// # Errors
    /// If there is no such memory, it cannot be locked, or the device has no room for it.
    pub fn register<M>(
        domain: &Arc<ProtectionDomain>,
        memory: &Arc<M>,
        start: GuestAddress,
        len: usize,
    ) -> Result<Self, Error>
    where
        M: GuestMemoryBackend + Send + Sync + 'static,
    {
        Self::with(domain, memory, start, len, Access::LOCAL_READ)
    }

    /// As [`LentMemory::register`], and a peer that has the key writes it as it likes, until it ends.
    ///
    /// # Errors
    /// As [`LentMemory::register`].
    pub fn open<M>(
        domain: &Arc<ProtectionDomain>,
        memory: &Arc<M>,
        start: GuestAddress,
        len: usize,
    ) -> Result<Self, Error>
    where
        M: GuestMemoryBackend + Send + Sync + 'static,
    {
        Self::with(domain, memory, start, len, Access::REMOTE_WRITE)
    }

    fn with<M>(
        domain: &Arc<ProtectionDomain>,
        memory: &Arc<M>,
        start: GuestAddress,
        len: usize,
        access: Access,
    ) -> Result<Self, Error>
    where
        M: GuestMemoryBackend + Send + Sync + 'static,
    {
        let outside = || Error::NoMemory { start: start.0, len };
        let slice = memory.get_slice(start, len).map_err(|_| outside())?;
        let guard = slice.ptr_guard_mut();
        let address = NonNull::new(guard.as_ptr()).ok_or_else(outside)?;
        // SAFETY: the mapping is held until the region has ended, or for ever if it cannot. It is a guest's
        // memory, which everybody accesses by raw or volatile access and has no reference to, so that the
        // device, and the peer through it, may write it where that is permitted.
        let region = unsafe { MemoryRegion::register(domain, address, len, access)? };
        let memory: Arc<dyn Memory> = Arc::clone(memory) as _;
        Ok(Self { region: Some(region), memory: Some(memory) })
    }

    /// Where it is registered.
    #[must_use]
    pub fn domain(&self) -> &Arc<ProtectionDomain> {
        self.region.as_ref().expect("it ends when it is dropped").domain()
    }

    /// Where a peer finds it. The key is good for nothing unless it was opened.
    #[must_use]
    pub fn remote(&self) -> Remote {
        let region = self.region.as_ref().expect("it ends when it is dropped");
        Remote { address: region.address(), key: region.remote_key() }
    }

    /// `len` bytes from `offset` on, for a request.
    ///
    /// # Errors
    /// If they are not within the piece.
    pub fn segment(&self, offset: usize, len: u32) -> Result<Segment, Error> {
        self.region.as_ref().expect("it ends when it is dropped").segment(offset, len)
    }

    /// Ends it: the device reads it no longer, and no peer writes it. Takes its time where the piece is large.
    ///
    /// # Errors
    /// If the device keeps it. Then the mapping stays, too: a guest need not end for a device that can
    /// only read; of what was opened, nothing may run that has this memory.
    pub fn end(mut self) -> Result<(), Error> {
        self.end_now()
    }

    fn end_now(&mut self) -> Result<(), Error> {
        let Some(region) = self.region.take() else { return Ok(()) };
        region.end().inspect_err(|_| std::mem::forget(self.memory.take()))
    }
}

impl Drop for LentMemory {
    fn drop(&mut self) {
        // Who wants to know calls `end`.
        let _ = self.end_now();
    }
}

impl fmt::Debug for LentMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("LentMemory").field(&self.region).finish()
    }
}
