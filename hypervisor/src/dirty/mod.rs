//! Which pages the guest wrote: KVM's bitmap or its rings, behind one trait.
//!
//! In: what KVM noted. Out: the pages that were written since the last harvest, by words of 64,
//! and all of them re-armed. What always holds, for both: a page that is written after a harvest
//! returned is reported by the next one; what is reported may be more than is true, never less.
//!
//! | | [`Tracking::Bitmap`] | [`Tracking::Ring`] |
//! |---|---|---|
//! | kept | one bit a page of each slot | one entry of 16 bytes a write fault, in a ring for each vCPU |
//! | a harvest costs | a copy of the bitmap, by the memory's size, and a call for a stretch of pages | by the pages that were written |
//! | begins with | all pages dirty, where KVM can do that | none |
//! | if it fills | cannot | the vCPU comes back from KVM_RUN, empties all rings and goes on, see [`rings_are_sound`] |
//!
//! A VM has one or the other from its creation on: KVM takes rings only before the first vCPU, and
//! refuses to read a bitmap then. Linux: Documentation/virt/kvm/api.rst, KVM_GET_DIRTY_LOG,
//! KVM_CLEAR_DIRTY_LOG, KVM_CAP_DIRTY_LOG_RING.

mod bitmap;
mod probe;
mod ring;
mod words;

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::sync::{Mutex, PoisonError};

use crate::system::Capabilities;
use crate::vm::VmError;
use vmm_sys_util::errno;

pub(crate) use bitmap::Bitmap;
pub use bitmap::words_of;
pub use probe::rings_are_sound;
pub use ring::RING_ENTRIES;
pub(crate) use ring::Rings;
pub use words::Words;

/// Where KVM notes the pages that a guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tracking {
    /// A bitmap for each memory slot.
    Bitmap,
    /// A ring for each vCPU.
    Ring,
}

impl Tracking {
    /// `bitmap` or `ring`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Bitmap => "bitmap",
            Self::Ring => "ring",
        }
    }

    /// What a host's KVM can do; the bitmap always.
    #[must_use]
    pub fn is_possible(self, capabilities: &Capabilities) -> bool {
        self == Self::Bitmap || capabilities.dirty_ring_max >= RING_ENTRIES
    }
}

/// Up to 64 pages that were written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    pub slot: u32,
    /// Number of the first page in its slot; a multiple of 64.
    pub first_page: u64,
    /// Bit 0 is the first page.
    pub word: u64,
}

/// A VM's log of written pages.
pub trait DirtyLog: Send + Sync {
    fn tracking(&self) -> Tracking;

    /// Whether all pages of a slot count as written from when its logging starts. Where they do
    /// not, who needs them all takes them for written by itself.
    fn begins_full(&self) -> bool;

    /// A slot was set, with so many pages; 0: it was removed.
    fn slot_set(&self, slot: u32, pages: u64, logs: bool);

    /// A vCPU was created.
    ///
    /// # Errors
    /// The kernel does not give its part of the log.
    fn vcpu_created(&self, vcpu: &dyn AsRawFd) -> Result<(), errno::Error>;

    /// Reports what was written since the last harvest, and re-arms it. Each page once or more.
    ///
    /// # Errors
    /// The kernel's; what was reported before is re-armed or will be reported again.
    fn harvest(&self, report: &mut dyn FnMut(Written)) -> Result<(), VmError>;

    /// How many pages were written since the last harvest; they stay as they are, so that the guest
    /// pays no fault for this look. `None` where KVM's looking re-arms.
    ///
    /// # Errors
    /// The kernel's.
    fn written(&self) -> Result<Option<u64>, VmError>;

    /// Makes room for a vCPU that cannot run on, see KVM_EXIT_DIRTY_RING_FULL.
    ///
    /// # Errors
    /// The kernel's.
    fn make_room(&self) -> Result<(), VmError>;
}

/// Pages of each slot, and whether they are logged.
#[derive(Debug, Default)]
pub(crate) struct Slots(Mutex<BTreeMap<u32, (u64, bool)>>);

impl Slots {
    /// No pages: the slot is removed.
    pub(crate) fn set(&self, slot: u32, pages: u64, logs: bool) {
        let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match pages {
            0 => slots.remove(&slot),
            pages => slots.insert(slot, (pages, logs)),
        };
    }

    pub(crate) fn pages(&self, slot: u32) -> Option<u64> {
        let slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        slots.get(&slot).map(|(pages, _)| *pages)
    }

    /// Those that are logged, with their pages.
    fn logged(&self) -> Vec<(u32, u64)> {
        let slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let logged = slots.iter().filter(|(_, (_, logs))| *logs);
        logged.map(|(slot, (pages, _))| (*slot, *pages)).collect()
    }
}
