//! Guest memory that the primary's device may read: registered once a session, piece by piece.
//!
//! Enters: a memory, and the device's protection domain. Leaves: segments for requests. Always holds:
//! the whole memory is registered, or nothing of it is used; it is not given back to the host as long as any
//! is (`Ram::pin`); nobody but threads of its own waits for the device, neither at the beginning nor at
//! the end.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use ::rdma::{LentMemory, ProtectionDomain, Segment};
use thiserror::Error;
use vm_memory::GuestAddress;

use super::aside::aside;
use crate::ids::{PAGE_SIZE, PageIndex};
use crate::ram::{Pin, Ram};
use crate::transport::TransportError;

/// Bytes that are registered at a time, unless that were more than [`PIECES_MAX`]: progress is seen, and an
/// end is heard, after each.
const PIECE_BYTES_MIN: u64 = 256 << 20;
const PIECES_MAX: u64 = 1024;
/// How long a device may take for so many bytes: their pages may have to be made, or to be freed first.
const PATIENCE_BYTES: u64 = 256 << 20;
const PATIENCE: Duration = Duration::from_secs(30);

/// Why guest memory is not lent.
#[derive(Debug, Error)]
pub(crate) enum LendError {
    #[error(transparent)]
    Device(#[from] TransportError),
    #[error("The session ended before the guest's memory was registered")]
    Ended,
}

/// The memory of a session, for all of its connections.
#[derive(Default)]
pub(crate) struct Lent {
    pieces: OnceLock<Pieces>,
    ended: AtomicBool,
}

struct Pieces {
    /// Ascending, side by side.
    list: Vec<Piece>,
    /// For the thread that ends them: the memory is not given back before.
    pin: Option<Pin>,
}

struct Piece {
    first: PageIndex,
    pages: u64,
    memory: LentMemory,
}

impl Lent {
    /// Whether pages can be read in memory.
    pub(super) fn is_ready(&self) -> bool {
        self.pieces.get().is_some()
    }

    fn piece(&self, page: PageIndex) -> Option<&Piece> {
        let list = &self.pieces.get()?.list;
        let after = list.partition_point(|piece| piece.first <= page);
        let piece = list.get(after.checked_sub(1)?)?;
        (page.0 - piece.first.0 < piece.pages).then_some(piece)
    }

    /// Whether the page after `page` lies behind it for the device, too.
    pub(super) fn follows(&self, page: PageIndex) -> bool {
        self.piece(page).is_some_and(|piece| page.0 + 1 < piece.first.0 + piece.pages)
    }

    /// `len` bytes from `offset` in `page` on, of one piece.
    pub(super) fn segment(
        &self,
        page: PageIndex,
        offset: usize,
        len: usize,
    ) -> Result<Segment, ::rdma::Error> {
        let outside = || ::rdma::Error::OutsideRegion { offset, len, region: 0 };
        let piece = self.piece(page).ok_or_else(outside)?;
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
        mut done: impl FnMut(u64),
    ) -> Result<(), LendError> {
        // Before the first piece: a hole would take pages from the guest and not from the device.
        let mut pieces = Pieces { list: vec![], pin: Some(ram.pin()) };
        let mut bytes_done = 0;
        for (first, pages, start) in layout(ram) {
            if self.ended.load(Ordering::Acquire) {
                return Err(LendError::Ended);
            }
            let bytes = pages * PAGE_SIZE as u64;
            let (domain, mapping) = (Arc::clone(domain), Arc::clone(ram.mapping()));
            let len = usize::try_from(bytes).unwrap_or(usize::MAX);
            let memory = aside(patience(bytes), move || {
                LentMemory::register(&domain, &mapping, start, len)
            })?;
            let memory = memory.map_err(TransportError::Rdma)?;
            pieces.list.push(Piece { first, pages, memory });
            bytes_done += bytes;
            done(bytes_done);
        }
        // Nobody else lends.
        let _ = self.pieces.set(pieces);
        Ok(())
    }
}

fn patience(bytes: u64) -> Duration {
    let parts = bytes.div_ceil(PATIENCE_BYTES).max(1);
    PATIENCE.saturating_mul(u32::try_from(parts).unwrap_or(u32::MAX))
}

/// The pieces of a memory: first page, pages, guest address.
fn layout(ram: &Ram) -> Vec<(PageIndex, u64, GuestAddress)> {
    let page = PAGE_SIZE as u64;
    let most = (ram.pages() * page).div_ceil(PIECES_MAX).max(PIECE_BYTES_MIN).div_ceil(page);
    let mut pieces = vec![];
    for region in ram.regions() {
        let mut done = 0;
        while done < region.pages {
            let pages = most.min(region.pages - done);
            let start = GuestAddress(region.start.0 + done * page);
            pieces.push((PageIndex(region.first.0 + done), pages, start));
            done += pages;
        }
    }
    pieces
}

impl Drop for Pieces {
    /// Unlocking a large memory takes its time, and a device may hang: nobody waits for it.
    fn drop(&mut self) {
        let (list, pin) = (std::mem::take(&mut self.list), self.pin.take());
        if list.is_empty() {
            return;
        }
        let body = move || {
            let began = Instant::now();
            let mut is_all = true;
            for piece in list {
                if let Err(error) = piece.memory.end() {
                    is_all = false;
                    tracing::error!(
                        "guest memory stays registered: {}",
                        crate::error::chain(&error)
                    );
                }
            }
            if !is_all {
                // A device still has some of it.
                return std::mem::forget(pin);
            }
            drop(pin);
            tracing::info!("guest memory is not registered any more, after {:?}", began.elapsed());
        };
        let started = std::thread::Builder::new().name("repl-unpin".to_owned()).spawn(body);
        if let Err(error) = started {
            tracing::error!("no thread to give back guest memory: it was done here: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::memory;

    #[test]
    fn a_memory_is_registered_in_pieces_that_lie_side_by_side() {
        let ram = memory(&[(0, 90), (1 << 32, 317)]);
        let pieces = layout(&ram);
        assert_eq!(
            pieces,
            [(PageIndex(0), 90, GuestAddress(0)), (PageIndex(90), 317, GuestAddress(1 << 32))]
        );
    }

    #[test]
    fn patience_grows_with_what_is_asked_for() {
        assert_eq!(patience(1), PATIENCE);
        assert_eq!(patience(PATIENCE_BYTES), PATIENCE);
        assert_eq!(patience(4 * PATIENCE_BYTES), 4 * PATIENCE);
    }
}
