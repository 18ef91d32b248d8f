//! Checksums of pages that the device writes straight into the backup's image.
//!
//! Made by the senders while the device is at it: of a page that is written meanwhile, of any mixture. So one
//! alone proves nothing against a page; see the backup's `suspects`. Four bytes for each page of memory, for the time of a copy.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::ids::PageIndex;

pub(super) struct Sums(Box<[AtomicU32]>);

impl Sums {
    /// Of a memory of so many pages.
    pub(super) fn new(pages: u64) -> Self {
        let pages = usize::try_from(pages).expect("pages fit the address space");
        Self((0..pages).map(|_| AtomicU32::new(0)).collect())
    }

    fn place(&self, page: PageIndex) -> &AtomicU32 {
        &self.0[usize::try_from(page.0).expect("a page of this memory")]
    }

    /// Of a page, as it was sent last.
    pub(super) fn set(&self, page: PageIndex, sum: u32) {
        // The engine hears of a job's end before it looks.
        self.place(page).store(sum, Ordering::Relaxed);
    }

    pub(super) fn get(&self, page: PageIndex) -> u32 {
        self.place(page).load(Ordering::Relaxed)
    }
}
