//! Guest memory that the primary's device may read.
//!
//! Enters: a memory. Leaves: segments for requests: of a copy's pages as soon as their piece is registered, of an
//! epoch's once all of it is ([`Pieces`]). Always holds: what was ready for a copy stays registered until the engine
//! says that none reads it any more, also where the rest could not be.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use ::rdma::Segment;

use super::kept::Kept;
use super::pieces::{LendError, Pieces, Purpose};
use super::registrar::Registrar;
use crate::ids::{PAGE_SIZE, PageIndex};
use crate::ram::Ram;

/// The memory of a session, for all of its connections.
#[derive(Default)]
pub(crate) struct Lent {
    kept: RwLock<Option<Kept>>,
    ended: AtomicBool,
}

impl Lent {
    fn with<T>(&self, look: impl FnOnce(&Pieces) -> T) -> Option<T> {
        let kept = self.kept.read().unwrap_or_else(PoisonError::into_inner);
        kept.as_ref().map(|kept| look(&kept.pieces))
    }

    /// Whether all pages can be read in memory.
    pub(crate) fn is_ready(&self) -> bool {
        self.with(Pieces::is_all_ready).unwrap_or(false)
    }

    /// How many pages from the first on can be.
    pub(crate) fn ready_pages(&self) -> u64 {
        self.with(Pieces::ready).unwrap_or(0)
    }

    /// Whether the page after `page` lies behind it for the device, too.
    pub(super) fn follows(&self, page: PageIndex) -> bool {
        self.pages_left(page) > 1
    }

    /// How many pages from `page` on lie side by side for the device; 0 if it has none of them.
    pub(super) fn pages_left(&self, page: PageIndex) -> u64 {
        let left = |pieces: &Pieces| {
            pieces.of(page).map_or(0, |(piece, _)| piece.first.0 + piece.pages - page.0)
        };
        self.with(left).unwrap_or(0)
    }

    /// `len` bytes from `offset` in `page` on, of one piece.
    pub(super) fn segment(
        &self,
        page: PageIndex,
        offset: usize,
        len: usize,
    ) -> Result<Segment, ::rdma::Error> {
        let outside = || ::rdma::Error::OutsideRegion { offset, len, region: 0 };
        let segment = |pieces: &Pieces| {
            let (piece, memory) = pieces.of(page).ok_or_else(outside)?;
            let pages = usize::try_from(page.0 - piece.first.0).map_err(|_| outside())?;
            let length = u32::try_from(len).map_err(|_| outside())?;
            memory.segment(pages * PAGE_SIZE + offset, length)
        };
        self.with(segment).unwrap_or_else(|| Err(outside()))
    }

    /// What the device has of a page.
    #[cfg(test)]
    pub(super) fn look<T>(
        &self,
        page: PageIndex,
        look: impl FnOnce(&super::registrar::Memory) -> T,
    ) -> Option<T> {
        self.with(|pieces| pieces.of(page).map(|(_, memory)| look(memory))).flatten()
    }

    /// The session is over: what is not registered yet will not be. What another one may find, if all of it is.
    pub(crate) fn end(&self) -> Option<Kept> {
        self.ended.store(true, Ordering::Release);
        let kept = self.kept.read().unwrap_or_else(PoisonError::into_inner);
        kept.as_ref().filter(|kept| kept.pieces.is_all_ready()).cloned()
    }

    /// Lends what is registered already.
    pub(super) fn lend_again(&self, kept: Kept) {
        drop(self.put(Some(kept)));
    }

    /// Registers all of `ram`, of which `done` is told how many bytes are.
    ///
    /// # Errors
    /// [`LendError`]; what is ready by then stays so until [`Lent::give_up`].
    pub(super) fn lend(
        &self,
        ram: &Ram,
        registrar: &Registrar,
        mut done: impl FnMut(u64) + Send,
    ) -> Result<(), LendError> {
        let pieces = Arc::new(Pieces::new(ram, registrar));
        drop(self.put(Some(Kept { pieces: Arc::clone(&pieces), ram: ram.clone() })));
        pieces.register(ram, registrar, Purpose::Reading, &self.ended, |step| done(step.bytes))
    }

    /// Not all of it could be registered, and no request reads what is.
    pub(crate) fn give_up(&self) {
        drop(self.put(None));
    }

    fn put(&self, kept: Option<Kept>) -> Option<Kept> {
        let mut held = self.kept.write().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut held, kept)
    }
}
