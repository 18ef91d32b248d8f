//! What can go wrong, and what to do about it.

use std::error::Error as _;
use std::io;

use thiserror::Error;

/// A verb failed, or cannot be asked for.
#[derive(Debug, Error)]
pub enum Error {
    #[error(
        "This build has no RDMA: use tcp:, or a build with the feature `rdma`, which is in by default"
    )]
    NotBuilt,
    #[error(
        "RDMA needs the library libibverbs.so.1, which cannot be loaded ({reason}): install the \
         packages libibverbs1 and ibverbs-providers"
    )]
    Load { reason: String },
    #[error(
        "The library libibverbs.so.1 has no {name} of version {version}: it is not that of rdma-core, \
         which the package libibverbs1 has"
    )]
    Symbol { name: &'static str, version: &'static str },
    #[error("RDMA devices cannot be listed")]
    List(#[source] io::Error),
    #[error("{path} cannot be read")]
    Sysfs { path: String, source: io::Error },
    #[error(
        "There is no RDMA device {name} that libibverbs knows a provider for: install the package \
         ibverbs-providers, load the module ib_uverbs"
    )]
    NoDevice { name: String },
    #[error("No RDMA port here is {wanted}; there is: {present}")]
    NoPlace { wanted: String, present: String },
    #[error(
        "The RDMA device {device} cannot be opened: this needs access to /dev/infiniband/uverbs*"
    )]
    Open { device: String, source: io::Error },
    /// A call on an opened device; `what` says the rest of "cannot".
    #[error("The RDMA device {device} cannot {what}")]
    Device { device: String, what: String, source: io::Error },
    #[error(
        "{bytes} bytes of memory cannot be locked for the RDMA device {device}, the limit is {limit}: \
         raise RLIMIT_MEMLOCK (ulimit -l; LimitMEMLOCK=infinity in a systemd unit)"
    )]
    LockedMemory { device: String, bytes: usize, limit: String, source: io::Error },
    #[error("There are no {len} bytes of guest memory at {start:#x}")]
    NoMemory { start: u64, len: usize },
    #[error("{len} bytes from {offset} are not within the memory region of {region} bytes")]
    OutsideRegion { offset: usize, len: usize, region: usize },
    #[error("The peer's RDMA endpoint makes no sense: {what}")]
    Endpoint { what: String },
    #[error("An RDMA option is out of range: {what}")]
    Option { what: String },
    #[error("Work request {index} of {count} asks for {what}")]
    Request { index: usize, count: usize, what: String },
    /// None from `index` on was posted, all before it were.
    #[error("Work request {index} of {count} cannot be posted to queue pair {queue_pair}")]
    Post { queue_pair: u32, index: usize, count: usize, source: io::Error },
}

impl Error {
    /// With its cause, for a person.
    pub(crate) fn in_words(&self) -> String {
        let source = self.source().map(|source| format!(": {source}"));
        format!("{self}{}", source.unwrap_or_default())
    }
}

/// What a verb returned that answers 0, an errno, or -1 with the errno set.
pub(crate) fn check(returned: i32) -> Result<(), io::Error> {
    match returned {
        0 => Ok(()),
        errno if errno > 0 => Err(io::Error::from_raw_os_error(errno)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// For destructors of what nothing uses any more: a refusal is our own bug, and a leak at worst. But for EIO,
/// by which older kernels say that the device is gone, and with it all that it had. Not for memory, see
/// [`crate::MemoryRegion`].
pub(crate) fn given_back(what: &str, returned: i32) {
    let kept = check(returned).err().filter(|error| error.raw_os_error() != Some(libc::EIO));
    debug_assert!(kept.is_none(), "{what} cannot be given back: {kept:?}");
}
