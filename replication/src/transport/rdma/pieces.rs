//! A guest's memory, registered with a device piece by piece.
//!
//! Enters: a memory, and the device's protection domain. Leaves: regions, for one's own requests or for the
//! peer's. Always holds: the whole memory is registered, or nothing of it is used; it is not given back to the
//! host as long as any is (`Ram::pin`); nobody but threads of its own waits for the device, neither at the
//! beginning nor at the end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ::rdma::{LentMemory, ProtectionDomain};
use thiserror::Error;
use vm_memory::GuestAddress;

use super::aside::aside;
use crate::error::chain;
use crate::ids::{PAGE_SIZE, PageIndex};
use crate::ram::{Pin, Ram};
use crate::transport::TransportError;
use crate::wire::{GRANTS_MAX, Grant, REGIONS_MAX};

/// Bytes that are registered at a time, unless that were more than [`PIECES_MAX`]: progress is seen, and an
/// end is heard, after each.
const PIECE_BYTES_MIN: u64 = 256 << 20;
/// Beside those that are smaller because a region of memory ends.
const PIECES_MAX: u64 = (GRANTS_MAX - REGIONS_MAX) as u64;
/// How long a device may take for so many bytes: their pages may have to be made, or to be freed first.
const PATIENCE_BYTES: u64 = 256 << 20;
const PATIENCE: Duration = Duration::from_secs(30);

/// Why guest memory is not registered.
#[derive(Debug, Error)]
pub(crate) enum LendError {
    #[error(transparent)]
    Device(#[from] TransportError),
    #[error("The session ended before the guest's memory was registered")]
    Ended,
}

/// What registered memory is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Being read for one's own WRITEs.
    Reading,
    /// Being written by the peer.
    Opened,
}

/// A piece of a memory.
pub(super) struct Piece {
    pub(super) first: PageIndex,
    pub(super) pages: u64,
    pub(super) memory: LentMemory,
}

impl Piece {
    fn bytes(&self) -> u64 {
        self.pages * PAGE_SIZE as u64
    }
}

/// All of a memory.
pub(super) struct Pieces {
    /// Ascending, side by side.
    list: Vec<Piece>,
    /// For the thread that ends them: the memory is not given back before.
    pin: Option<Pin>,
}

impl Pieces {
    /// Registers all of `ram`, of which `done` is told how many bytes are. Gives up after the piece during
    /// which `ended` is raised.
    ///
    /// # Errors
    /// [`LendError`]; then nothing of it stays registered.
    pub(super) fn register(
        ram: &Ram,
        domain: &Arc<ProtectionDomain>,
        purpose: Purpose,
        ended: &AtomicBool,
        mut done: impl FnMut(u64),
    ) -> Result<Self, LendError> {
        // Before the first piece: a hole would take pages from the guest and not from the device.
        let mut pieces = Self { list: vec![], pin: Some(ram.pin()) };
        let mut bytes_done = 0;
        for (first, pages, start) in layout(ram) {
            if ended.load(Ordering::Acquire) {
                return Err(LendError::Ended);
            }
            let bytes = pages * PAGE_SIZE as u64;
            let (domain, mapping) = (Arc::clone(domain), Arc::clone(ram.mapping()));
            let len = usize::try_from(bytes).unwrap_or(usize::MAX);
            let memory = aside(patience(bytes), move || match purpose {
                Purpose::Reading => LentMemory::register(&domain, &mapping, start, len),
                Purpose::Opened => LentMemory::open(&domain, &mapping, start, len),
            })?;
            let memory = memory.map_err(TransportError::Rdma)?;
            pieces.list.push(Piece { first, pages, memory });
            bytes_done += bytes;
            done(bytes_done);
        }
        Ok(pieces)
    }

    /// The piece that a page is in.
    pub(super) fn of(&self, page: PageIndex) -> Option<&Piece> {
        let after = self.list.partition_point(|piece| piece.first <= page);
        let piece = self.list.get(after.checked_sub(1)?)?;
        (page.0 - piece.first.0 < piece.pages).then_some(piece)
    }

    /// What a peer has to know to write them.
    pub(super) fn grants(&self) -> Vec<Grant> {
        let grant = |piece: &Piece| {
            let ::rdma::Remote { address, key } = piece.memory.remote();
            Grant { pages: piece.pages, address, key }
        };
        self.list.iter().map(grant).collect()
    }

    /// Gives all of it back, and waits for that; `done` is told how many bytes each piece had. A device may
    /// take its time for each, and then it counts as one that hangs.
    ///
    /// # Errors
    /// If a device keeps some of it: whoever had the key may still write there, for ever.
    pub(super) fn end(mut self, mut done: impl FnMut(u64)) -> Result<(), TransportError> {
        let mut kept = None;
        for piece in std::mem::take(&mut self.list) {
            let bytes = piece.bytes();
            let ended = aside(patience(bytes), move || piece.memory.end());
            match ended.and_then(|ended| ended.map_err(TransportError::Rdma)) {
                Ok(()) => done(bytes),
                // The others are given back all the same.
                Err(error) => kept = kept.or(Some(error)),
            }
        }
        let Some(error) = kept else { return Ok(()) };
        // A device still has some of it.
        std::mem::forget(self.pin.take());
        Err(error)
    }
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
                    tracing::error!("guest memory stays registered: {}", chain(&error));
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

/// How long a device may take for `bytes` of memory.
pub(crate) fn patience(bytes: u64) -> Duration {
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
