//! Memory that a device may access.
//!
//! Enters: memory that is mapped. Leaves: regions, and keys for them. Always holds: when a region is
//! dropped, the device is done with its memory, and no key for it is good for anything.

use std::ffi::c_int;
use std::fmt;
use std::io;
use std::mem::ManuallyDrop;
use std::ops::BitOr;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::abi;
use crate::context::Context;
use crate::error::{Error, check, given_back};

/// What belongs together: a queue pair accesses regions of its own domain only, for itself or for its
/// peer.
pub struct ProtectionDomain {
    context: Arc<Context>,
    raw: NonNull<abi::Pd>,
}

// SAFETY: as for `Context`.
unsafe impl Send for ProtectionDomain {}
// SAFETY: as for `Context`.
unsafe impl Sync for ProtectionDomain {}

impl ProtectionDomain {
    /// Makes one.
    ///
    /// # Errors
    /// If the device has no room for it.
    pub fn new(context: &Arc<Context>) -> Result<Arc<Self>, Error> {
        // SAFETY: the context is open.
        let raw = unsafe { (context.library().ibv_alloc_pd)(context.raw()) };
        let raw = NonNull::new(raw).ok_or_else(|| {
            context.failed("make a protection domain", io::Error::last_os_error())
        })?;
        Ok(Arc::new(Self { context: Arc::clone(context), raw }))
    }

    /// The device.
    #[must_use]
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    pub(crate) fn raw(&self) -> *mut abi::Pd {
        self.raw.as_ptr()
    }
}

impl fmt::Debug for ProtectionDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ProtectionDomain").field(&self.context.name()).finish()
    }
}

impl Drop for ProtectionDomain {
    fn drop(&mut self) {
        // SAFETY: the domain is there, and what was made in it held it, so is gone.
        let returned = unsafe { (self.context.library().ibv_dealloc_pd)(self.raw()) };
        given_back("a protection domain", returned);
    }
}

/// What a device may do with a region, or a peer through a queue pair. Reading for one's own requests
/// is always permitted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access(u32);

impl Access {
    /// Reading for one's own WRITEs and SENDs only.
    pub const LOCAL_READ: Self = Self(0);
    /// Being the target of one's own READs and receives.
    pub const LOCAL_WRITE: Self = Self(abi::ACCESS_LOCAL_WRITE);
    /// Being written by a peer that knows the key; includes [`Access::LOCAL_WRITE`], as devices want.
    pub const REMOTE_WRITE: Self = Self(abi::ACCESS_REMOTE_WRITE | abi::ACCESS_LOCAL_WRITE);
    /// Being read by a peer that knows the key.
    pub const REMOTE_READ: Self = Self(abi::ACCESS_REMOTE_READ);

    pub(crate) fn bits(self) -> u32 {
        self.0
    }
}

impl BitOr for Access {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Memory that a device may access: its pages are locked, and its address is known to the device.
///
/// It has ended only if the device says so. Any error means that it is kept, EIO too: of a device that is gone
/// the kernel answers that memory is given back, so an error is that of a driver whose region lives, and with it
/// a key by which a peer writes.
pub struct MemoryRegion {
    domain: Arc<ProtectionDomain>,
    raw: NonNull<abi::Mr>,
    start: u64,
    len: usize,
}

// SAFETY: as for `Context`; the memory itself is never accessed through this.
unsafe impl Send for MemoryRegion {}
// SAFETY: as above.
unsafe impl Sync for MemoryRegion {}

/// A piece of a region, for a request.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct Segment(pub(crate) abi::Sge);

/// Memory of the peer: an address of its process, with the key of the region there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Remote {
    pub address: u64,
    pub key: u32,
}

impl MemoryRegion {
    /// Registers `len` bytes from `start` on. Pages that were never touched are made now; protection
    /// by userfaultfd comes after this, not before.
    ///
    /// # Errors
    /// If the memory cannot be locked, or the device has no room for it.
    ///
    /// # Safety
    /// The memory stays mapped where it is until the region is dropped. As long as that, it counts as
    /// shared with the device: without any `access` the device may read it at any time, with some of it
    /// write it too, at a peer's will. So nobody has a reference to memory that the device may write,
    /// nor a unique one to any of it, and whoever else accesses it does so by raw or volatile access, as
    /// with a guest's memory.
    pub unsafe fn register(
        domain: &Arc<ProtectionDomain>,
        start: NonNull<u8>,
        len: usize,
        access: Access,
    ) -> Result<Self, Error> {
        let context = domain.context();
        let flags = c_int::try_from(access.bits()).unwrap_or(0);
        // SAFETY: the domain is there; the caller promises what the device needs of the memory.
        let raw = unsafe {
            (context.library().ibv_reg_mr)(domain.raw(), start.as_ptr().cast(), len, flags)
        };
        let Some(raw) = NonNull::new(raw) else {
            return Err(not_registered(context, len, io::Error::last_os_error()));
        };
        let start = start.as_ptr().expose_provenance() as u64;
        Ok(Self { domain: Arc::clone(domain), raw, start, len })
    }

    /// Where it is registered.
    #[must_use]
    pub fn domain(&self) -> &Arc<ProtectionDomain> {
        &self.domain
    }

    /// The key for one's own requests.
    #[must_use]
    pub fn local_key(&self) -> u32 {
        // SAFETY: the region is registered, and the library does not change it.
        unsafe { (*self.raw.as_ptr()).lkey }
    }

    /// The key for the peer's requests; whoever has it may do what the region permits.
    #[must_use]
    pub fn remote_key(&self) -> u32 {
        // SAFETY: as for `local_key`.
        unsafe { (*self.raw.as_ptr()).rkey }
    }

    /// The address of its first byte, as the peer's requests give it.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.start
    }

    /// Bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Ends it, as dropping it does.
    ///
    /// # Errors
    /// If the device keeps the memory, whose mapping must stay then, for ever.
    pub(crate) fn end(self) -> Result<(), Error> {
        let this = ManuallyDrop::new(self);
        // SAFETY: the region is registered, and this is its end: it is not dropped.
        let returned = unsafe { (this.domain.context().library().ibv_dereg_mr)(this.raw.as_ptr()) };
        if let Err(source) = check(returned) {
            let what = format!("give back {} bytes of memory", this.len);
            return Err(this.domain.context().failed(what, source));
        }
        // SAFETY: read once, out of what is not dropped.
        drop(unsafe { std::ptr::read(&raw const this.domain) });
        Ok(())
    }

    /// `len` bytes from `offset` on, for a request.
    ///
    /// # Errors
    /// If they are not within the region.
    pub fn segment(&self, offset: usize, len: u32) -> Result<Segment, Error> {
        let outside = || Error::OutsideRegion { offset, len: len as usize, region: self.len };
        let end = offset.checked_add(len as usize).ok_or_else(outside)?;
        if end > self.len {
            return Err(outside());
        }
        let addr = self.start + offset as u64;
        Ok(Segment(abi::Sge { addr, length: len, lkey: self.local_key() }))
    }
}

/// Why memory was not registered.
fn not_registered(context: &Context, bytes: usize, source: io::Error) -> Error {
    match source.raw_os_error() {
        // Without any limit left at all it is a matter of rights.
        Some(libc::ENOMEM | libc::EAGAIN | libc::EPERM) => Error::LockedMemory {
            device: context.name().to_owned(),
            bytes,
            limit: locked_memory_limit(),
            source,
        },
        _ => context.failed(format!("register {bytes} bytes of memory"), source),
    }
}

/// How much this process may lock, for a person.
fn locked_memory_limit() -> String {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes one such structure.
    let returned = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) };
    match check(returned) {
        Ok(()) if limit.rlim_cur == libc::RLIM_INFINITY => "none".to_owned(),
        Ok(()) => format!("{} bytes", limit.rlim_cur),
        Err(_) => "unknown".to_owned(),
    }
}

impl fmt::Debug for MemoryRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { start, len, .. } = self;
        f.debug_struct("MemoryRegion").field("start", start).field("len", len).finish()
    }
}

impl Drop for MemoryRegion {
    fn drop(&mut self) {
        // SAFETY: the region is registered, and this is its end.
        let returned = unsafe { (self.domain.context().library().ibv_dereg_mr)(self.raw.as_ptr()) };
        // The memory may be unmapped next, and given to somebody else: a device that goes on writing
        // it must not be lived with. Who can keep the mapping for ever calls `end`, as all here do.
        let (len, ended) = (self.len, check(returned));
        assert!(ended.is_ok(), "An RDMA device keeps {len} bytes of memory: {ended:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writing_by_a_peer_includes_writing_at_all() {
        let both = Access::REMOTE_WRITE | Access::REMOTE_READ;
        assert_eq!(both.bits(), 7);
        assert_eq!(Access::default(), Access::LOCAL_READ);
    }

    #[test]
    fn the_limit_of_locked_memory_is_told() {
        let limit = locked_memory_limit();
        assert!(limit == "none" || limit.ends_with(" bytes"), "{limit}");
    }
}
