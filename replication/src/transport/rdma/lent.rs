//! Guest memory that the primary's device may read: registered once a session.
//!
//! Enters: a memory. Leaves: segments for requests, once all of it is registered ([`Pieces`]).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use ::rdma::{ProtectionDomain, Segment};

use super::pieces::{LendError, Pieces, Purpose};
use crate::ids::{PAGE_SIZE, PageIndex};
use crate::ram::Ram;

/// The memory of a session, for all of its connections.
#[derive(Default)]
pub(crate) struct Lent {
    pieces: OnceLock<Pieces>,
    ended: AtomicBool,
}

impl Lent {
    /// Whether pages can be read in memory.
    pub(crate) fn is_ready(&self) -> bool {
        self.pieces.get().is_some()
    }

    /// Whether the page after `page` lies behind it for the device, too.
    pub(super) fn follows(&self, page: PageIndex) -> bool {
        self.pages_left(page) > 1
    }

    /// How many pages from `page` on lie side by side for the device; 0 if it has none of them.
    pub(super) fn pages_left(&self, page: PageIndex) -> u64 {
        let piece = self.pieces.get().and_then(|pieces| pieces.of(page));
        piece.map_or(0, |piece| piece.first.0 + piece.pages - page.0)
    }

    /// `len` bytes from `offset` in `page` on, of one piece.
    pub(super) fn segment(
        &self,
        page: PageIndex,
        offset: usize,
        len: usize,
    ) -> Result<Segment, ::rdma::Error> {
        let outside = || ::rdma::Error::OutsideRegion { offset, len, region: 0 };
        let piece = self.pieces.get().and_then(|pieces| pieces.of(page)).ok_or_else(outside)?;
        let pages = usize::try_from(page.0 - piece.first.0).map_err(|_| outside())?;
        let length = u32::try_from(len).map_err(|_| outside())?;
        piece.memory.segment(pages * PAGE_SIZE + offset, length)
    }

    /// The session is over: what is not registered yet will not be.
    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::Release);
    }

    /// Registers all of `ram`, of which `done` is told how many bytes are.
    ///
    /// # Errors
    /// [`LendError`]; then nothing of it stays registered.
    pub(super) fn lend(
        &self,
        ram: &Ram,
        domain: &Arc<ProtectionDomain>,
        done: impl FnMut(u64),
    ) -> Result<(), LendError> {
        let pieces = Pieces::register(ram, domain, Purpose::Reading, &self.ended, done)?;
        // Nobody else lends.
        let _ = self.pieces.set(pieces);
        Ok(())
    }
}
