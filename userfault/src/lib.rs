//! Write protection of guest memory, by userfaultfd, and its pages ahead of their first write.
//!
//! Enters: a mapping of guest memory; runs of its pages to protect. Leaves: the pages that somebody
//! waits to write. Always holds: a write to a protected page, by a vCPU, by KVM or by this process
//! itself, waits until the page's protection ends; contents never change by anything done here.
//!
//! - [`Userfault`]: one registered memory;
//! - [`sys`]: the ioctls;
//! - [`populate`]: pages that are there before they are written.
//!
//! Facts of the interface that cost hours (Linux 6.x): KVM takes a guest's faults in kernel mode, so
//! a descriptor with UFFD_USER_MODE_ONLY loses them; UFFD_FEATURE_SIGBUS does not go with KVM; only
//! what is written through the registered mapping is seen, not a second mapping nor `pwrite`;
//! discarding pages (a hole in the file) ends their protection without a word.

mod populate;
mod sys;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use thiserror::Error;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

pub use populate::populate;

/// Bytes of a page.
pub const PAGE_SIZE: u64 = 4096;
/// Faults that are read at once.
const MESSAGES: usize = 64;

/// Memory cannot be protected, or not any more.
#[derive(Debug, Error)]
pub enum UserfaultError {
    #[error(
        "userfaultfd is not permitted: run as root, give the capability CAP_SYS_PTRACE or access \
         to /dev/userfaultfd, or set the sysctl vm.unprivileged_userfaultfd to 1"
    )]
    Open(#[source] io::Error),
    #[error("This kernel's userfaultfd cannot protect shared memory (Linux 5.19 can)")]
    Api(#[source] io::Error),
    #[error("A region of guest memory has no address in this process")]
    Address,
    #[error("Guest memory at {start:#x} cannot be registered with userfaultfd")]
    Register { start: u64, source: io::Error },
    #[error("This memory cannot be protected page by page, as that of huge pages cannot")]
    Granule(#[source] Box<UserfaultError>),
    #[error("{pages} pages from page {first} lie outside the memory")]
    Outside { first: u64, pages: u64 },
    #[error("Protection of {pages} pages from page {first} cannot be changed")]
    Protect { first: u64, pages: u64, source: io::Error },
    #[error("Faults cannot be read")]
    Read(#[source] io::Error),
}

/// A region: pages with consecutive numbers at consecutive addresses.
#[derive(Clone, Copy, Debug)]
struct Place {
    first: u64,
    pages: u64,
    /// In this process.
    start: u64,
}

/// A memory whose writes can be caught. Pages are numbered through its regions, holes left out. All
/// protection ends, and everybody who waits goes on, when this is dropped.
#[derive(Debug)]
pub struct Userfault {
    fd: OwnedFd,
    places: Vec<Place>,
    /// Keeps the mapping where it is for as long as it is registered.
    _memory: Arc<dyn Memory>,
}

/// A mapping that is only kept alive.
trait Memory: Send + Sync {}
impl<M: Send + Sync> Memory for M {}

impl std::fmt::Debug for dyn Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Memory")
    }
}

/// A descriptor for what is needed. Pages of shared memory that are not there yet can be protected since
/// Linux 5.19; those of private memory since 6.4, and where that is missing nobody who has such memory
/// here misses it: guest memory is shared.
fn open() -> Result<OwnedFd, UserfaultError> {
    let shared = sys::FEATURE_PAGEFAULT_FLAG_WP | sys::FEATURE_WP_HUGETLBFS_SHMEM;
    let fd = sys::open().map_err(UserfaultError::Open)?;
    if sys::api(&fd, shared | sys::FEATURE_WP_UNPOPULATED).is_ok() {
        return Ok(fd);
    }
    // A descriptor that was refused its features takes no second wish.
    let fd = sys::open().map_err(UserfaultError::Open)?;
    sys::api(&fd, shared).map_err(UserfaultError::Api)?;
    Ok(fd)
}

impl Userfault {
    /// Registers all of `memory`.
    ///
    /// # Errors
    /// If the kernel lacks what this needs, or does not permit it, or the memory is of huge pages
    /// only.
    pub fn new<M>(memory: Arc<M>) -> Result<Self, UserfaultError>
    where
        M: GuestMemoryBackend + Send + Sync + 'static,
    {
        let fd = open()?;
        let mut places = Vec::new();
        let mut first = 0;
        for region in memory.iter() {
            let at = region.get_host_address(MemoryRegionAddress(0));
            let start = at.map_err(|_| UserfaultError::Address)? as u64;
            let place = Place { first, pages: region.len() / PAGE_SIZE, start };
            let range = sys::Range { start, len: place.pages * PAGE_SIZE };
            sys::register(&fd, range)
                .map_err(|source| UserfaultError::Register { start, source })?;
            first += place.pages;
            places.push(place);
        }
        let this = Self { fd, places, _memory: memory };
        for Place { first, .. } in &this.places {
            let tried = this.protect(*first, 1);
            tried.map_err(|error| UserfaultError::Granule(Box::new(error)))?;
            this.unprotect(*first, 1)?;
        }
        Ok(this)
    }

    /// Protects `pages` pages from `first` on: whoever writes one of them waits from here on.
    ///
    /// # Errors
    /// If such pages do not exist, or the kernel refuses.
    pub fn protect(&self, first: u64, pages: u64) -> Result<(), UserfaultError> {
        self.change(first, pages, true)
    }

    /// Ends the protection of `pages` pages from `first` on; whoever waits to write one goes on.
    ///
    /// # Errors
    /// As [`Userfault::protect`].
    pub fn unprotect(&self, first: u64, pages: u64) -> Result<(), UserfaultError> {
        self.change(first, pages, false)
    }

    fn change(&self, first: u64, pages: u64, protect: bool) -> Result<(), UserfaultError> {
        let (mut at, mut left) = (first, pages);
        while left > 0 {
            let place = self.place(at).ok_or(UserfaultError::Outside { first, pages })?;
            let offset = at - place.first;
            let count = left.min(place.pages - offset);
            let start = place.start + offset * PAGE_SIZE;
            let len = count * PAGE_SIZE;
            loop {
                match sys::write_protect(&self.fd, sys::Range { start, len }, protect) {
                    Ok(()) => break,
                    // The address space is being changed at this moment.
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(source) => return Err(UserfaultError::Protect { first, pages, source }),
                }
            }
            at += count;
            left -= count;
        }
        Ok(())
    }

    /// Wakes who waits for a page whose protection has ended.
    ///
    /// # Errors
    /// As [`Userfault::protect`].
    pub fn wake(&self, page: u64) -> Result<(), UserfaultError> {
        let outside = UserfaultError::Outside { first: page, pages: 1 };
        let place = self.place(page).ok_or(outside)?;
        let start = place.start + (page - place.first) * PAGE_SIZE;
        sys::wake(&self.fd, &sys::Range { start, len: PAGE_SIZE })
            .map_err(|source| UserfaultError::Protect { first: page, pages: 1, source })
    }

    fn place(&self, page: u64) -> Option<Place> {
        let after = self.places.partition_point(|place| place.first <= page);
        let place = *self.places.get(after.checked_sub(1)?)?;
        (page - place.first < place.pages).then_some(place)
    }

    /// Replaces `pages` by those that somebody waits to write, as far as they were not reported
    /// before; none: nobody waits. The descriptor ([`AsFd`]) is readable when somebody does.
    ///
    /// # Errors
    /// If the descriptor cannot be read.
    pub fn faults(&self, pages: &mut Vec<u64>) -> Result<(), UserfaultError> {
        pages.clear();
        let mut messages = [sys::Message::default(); MESSAGES];
        let count = sys::read(&self.fd, &mut messages).map_err(UserfaultError::Read)?;
        let faults = messages[..count].iter().filter(|m| m.event == sys::EVENT_PAGEFAULT);
        pages.extend(faults.filter_map(|message| self.page(message.address)));
        Ok(())
    }

    fn page(&self, address: u64) -> Option<u64> {
        let place = self.places.iter().find(|place| {
            address.checked_sub(place.start).is_some_and(|offset| offset / PAGE_SIZE < place.pages)
        })?;
        Some(place.first + (address - place.start) / PAGE_SIZE)
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
