//! A guest's memory, registered with a device piece by piece.
//!
//! Enters: a memory, and the device's protection domain. Leaves: regions, for one's own requests or for the
//! peer's. Always holds: the whole memory is registered, or nothing of it is used; it is not given back to the
//! host as long as any is (`Ram::pin`); nobody but threads of its own waits for the device, neither at the
//! beginning nor at the end; what a peer could write is given back before anybody hears that it is not
//! registered, or is said to be kept.

use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ::rdma::{LentMemory, ProtectionDomain};
use thiserror::Error;
use vm_memory::GuestAddress;

use super::aside::{aside, give_back};
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
    #[error("The device keeps memory that the peer may write, or may make it so later")]
    Kept(#[source] TransportError),
}

/// What registered memory is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Being read for one's own WRITEs.
    Reading,
    /// Being written by the peer.
    Opened,
}

/// What a device has of a memory.
pub(super) trait Region: Send + Sized + 'static {
    /// Asks the device, which may take its time.
    fn end(self) -> Result<(), ::rdma::Error>;
}

impl Region for LentMemory {
    fn end(self) -> Result<(), ::rdma::Error> {
        LentMemory::end(self)
    }
}

/// A piece of a memory.
pub(super) struct Piece<R = LentMemory> {
    pub(super) first: PageIndex,
    pub(super) pages: u64,
    pub(super) memory: R,
}

impl<R> Piece<R> {
    fn bytes(&self) -> u64 {
        self.pages * PAGE_SIZE as u64
    }
}

/// All of a memory.
pub(super) struct Pieces<R: Region = LentMemory> {
    /// Ascending, side by side.
    list: Vec<Piece<R>>,
    /// For the thread that ends them: the memory is not given back before.
    pin: Option<Pin>,
    /// How long a device may take for so many bytes.
    patience: fn(u64) -> Duration,
}

impl Pieces {
    /// Registers all of `ram`, of which `done` is told how many bytes are. Gives up after the piece during
    /// which `ended` is raised.
    ///
    /// # Errors
    /// [`LendError`]; then nothing of it stays registered, but with [`LendError::Kept`]. What only this side's
    /// requests can name is given back by a thread of its own.
    pub(super) fn register(
        ram: &Ram,
        domain: &Arc<ProtectionDomain>,
        purpose: Purpose,
        ended: &AtomicBool,
        done: impl FnMut(u64),
    ) -> Result<Self, LendError> {
        // Before the first piece: a hole would take pages from the guest and not from the device.
        let pieces = Self { list: vec![], pin: Some(ram.pin()), patience };
        pieces.filled(layout(ram), purpose, ended, done, |start, bytes| {
            let (domain, mapping) = (Arc::clone(domain), Arc::clone(ram.mapping()));
            let len = usize::try_from(bytes).unwrap_or(usize::MAX);
            move || match purpose {
                Purpose::Reading => LentMemory::register(&domain, &mapping, start, len),
                Purpose::Opened => LentMemory::open(&domain, &mapping, start, len),
            }
        })
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
}

impl<R: Region> Pieces<R> {
    /// Registers each piece of `layout` by what `register` makes for its start and bytes.
    fn filled<F>(
        mut self,
        layout: Vec<(PageIndex, u64, GuestAddress)>,
        purpose: Purpose,
        ended: &AtomicBool,
        mut done: impl FnMut(u64),
        mut register: impl FnMut(GuestAddress, u64) -> F,
    ) -> Result<Self, LendError>
    where
        F: FnOnce() -> Result<R, ::rdma::Error> + Send + 'static,
    {
        let mut bytes_done = 0;
        for (first, pages, start) in layout {
            if ended.load(Ordering::Acquire) {
                return Err(self.given_up(purpose, LendError::Ended));
            }
            let bytes = pages * PAGE_SIZE as u64;
            let memory = aside((self.patience)(bytes), register(start, bytes))
                .and_then(|memory| memory.map_err(TransportError::Rdma));
            match memory {
                Ok(memory) => self.list.push(Piece { first, pages, memory }),
                Err(error) => return Err(self.given_up(purpose, error.into())),
            }
            bytes_done += bytes;
            done(bytes_done);
        }
        Ok(self)
    }

    /// What is registered already is of no use, because of `error`. A peer's reach is ended here and now:
    /// whoever hears of this takes the memory for its own.
    fn given_up(self, purpose: Purpose, error: LendError) -> LendError {
        if purpose == Purpose::Reading {
            return error;
        }
        let ended = self.end(|_| ());
        match (error, ended) {
            // It may be registered later, by the thread that was left behind, if only for a moment.
            (LendError::Device(error @ TransportError::Hung { .. }), _) | (_, Err(error)) => {
                LendError::Kept(error)
            }
            (error, Ok(())) => error,
        }
    }

    /// Gives all of it back, and waits for that; `done` is told how many bytes each piece had. A device may
    /// take its time for each, and then it counts as one that hangs, and is asked no more here.
    ///
    /// # Errors
    /// If a device keeps some of it: whoever had the key may still write there, for ever.
    pub(super) fn end(mut self, mut done: impl FnMut(u64)) -> Result<(), TransportError> {
        let mut kept = None;
        let mut list = std::mem::take(&mut self.list).into_iter();
        for piece in list.by_ref() {
            let bytes = piece.bytes();
            // Without a thread it is kept, and not given back by whoever drops it, which may take for ever.
            let memory = ManuallyDrop::new(piece.memory);
            let end = move || ManuallyDrop::into_inner(memory).end();
            match give_back((self.patience)(bytes), end) {
                Ok(Ok(())) => done(bytes),
                // The others are given back all the same.
                Ok(Err(error)) => kept = kept.or(Some(TransportError::Rdma(error))),
                Err(error) => {
                    kept = kept.or(Some(error));
                    break;
                }
            }
        }
        let Some(error) = kept else { return Ok(()) };
        // A device still has some of it.
        std::mem::forget(self.pin.take());
        // The others, for a thread that nobody waits for.
        self.list = list.collect();
        Err(error)
    }
}

impl<R: Region> Drop for Pieces<R> {
    /// Unlocking a large memory takes its time, and a device may hang: nobody waits for it.
    fn drop(&mut self) {
        let (list, pin) = (std::mem::take(&mut self.list), self.pin.take());
        if list.is_empty() {
            return;
        }
        // Without a thread all of it is kept: whoever drops this may be an engine.
        let held = ManuallyDrop::new((list, pin));
        let body = move || {
            let (list, pin) = ManuallyDrop::into_inner(held);
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
            // Else others of its pieces were not given back.
            if pin.is_some() {
                tracing::info!(
                    "guest memory is not registered any more, after {:?}",
                    began.elapsed()
                );
            }
        };
        let started = std::thread::Builder::new().name("repl-unpin".to_owned()).spawn(body);
        if let Err(error) = started {
            tracing::error!("guest memory stays registered: no thread to give it back: {error}");
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
    use std::sync::atomic::AtomicUsize;
    use std::sync::mpsc;

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

    /// Registered while `open` counts it; given back once `hangs` lets it, if it hangs.
    struct Fake {
        open: Arc<AtomicUsize>,
        hangs: Option<mpsc::Receiver<()>>,
        is_kept: bool,
    }

    impl Region for Fake {
        fn end(self) -> Result<(), ::rdma::Error> {
            if let Some(hangs) = &self.hangs {
                let _ = hangs.recv();
            }
            if self.is_kept {
                return Err(::rdma::Error::Option { what: "kept".to_owned() });
            }
            self.open.fetch_sub(1, Ordering::AcqRel);
            Ok(())
        }
    }

    /// What becomes of each piece that is asked for.
    #[derive(Clone, Copy, PartialEq, Eq)]
    enum Fate {
        Good,
        Fails,
        Hangs,
        /// Being registered it is good.
        HangsAtItsEnd,
        KeptAtItsEnd,
        /// The session ends before it.
        CalledOff,
    }

    type Filled = Result<Pieces<Fake>, LendError>;

    /// What came of it, how many pieces are registered at that moment, and what lets those that hang go on.
    fn register(
        purpose: Purpose,
        fates: &[Fate],
    ) -> (Filled, Arc<AtomicUsize>, Vec<mpsc::Sender<()>>) {
        let ram = memory(&[(0, 1)]);
        let pieces =
            Pieces { list: vec![], pin: Some(ram.pin()), patience: |_| Duration::from_millis(100) };
        let layout =
            (0..fates.len() as u64).map(|at| (PageIndex(at), 1, GuestAddress(at))).collect();
        let (open, ended) = (Arc::<AtomicUsize>::default(), AtomicBool::new(false));
        let mut lets_go = vec![];
        let filled = pieces.filled(
            layout,
            purpose,
            &ended,
            |bytes| {
                let next = usize::try_from(bytes).unwrap() / PAGE_SIZE;
                let is_over = fates.get(next) == Some(&Fate::CalledOff);
                ended.store(is_over, Ordering::Release);
            },
            |start, _| {
                let fate = fates[usize::try_from(start.0).unwrap()];
                let (let_go, hangs) = mpsc::channel();
                lets_go.push(let_go);
                let open = Arc::clone(&open);
                move || {
                    if fate == Fate::Hangs {
                        let _ = hangs.recv();
                    }
                    if fate == Fate::Fails {
                        return Err(::rdma::Error::Option { what: "no room".to_owned() });
                    }
                    open.fetch_add(1, Ordering::AcqRel);
                    let hangs = (fate == Fate::HangsAtItsEnd).then_some(hangs);
                    Ok(Fake { open, hangs, is_kept: fate == Fate::KeptAtItsEnd })
                }
            },
        );
        (filled, open, lets_go)
    }

    /// Whoever hears that it is not registered may take the memory for its own.
    #[test]
    fn what_a_peer_could_write_is_given_back_before_anybody_hears_that_it_is_not_open() {
        use Fate::{CalledOff, Fails, Good};
        for (fates, is_ended) in [([Good, Good, Fails], false), ([Good, Good, CalledOff], true)] {
            let (failed, open, _lets_go) = register(Purpose::Opened, &fates);
            assert_eq!(open.load(Ordering::Acquire), 0, "still open");
            let error = failed.err().unwrap();
            assert_eq!(matches!(error, LendError::Ended), is_ended, "{error}");
            assert!(!matches!(error, LendError::Kept(_)), "{error}");
        }
    }

    #[test]
    fn what_a_device_keeps_open_is_said_to_be_kept() {
        use Fate::{CalledOff, Fails, Good, Hangs, HangsAtItsEnd, KeptAtItsEnd};
        for fates in [
            vec![Hangs],
            vec![Good, Hangs],
            vec![HangsAtItsEnd, Good, Fails],
            vec![Good, HangsAtItsEnd, CalledOff],
            vec![KeptAtItsEnd, Good, CalledOff],
        ] {
            let (failed, _open, _lets_go) = register(Purpose::Opened, &fates);
            let error = failed.err().unwrap();
            assert!(matches!(error, LendError::Kept(_)), "{error}");
        }
    }

    /// As many pieces as there are, one that hangs is waited for once, and nobody gives back the others inline.
    #[test]
    fn a_device_that_hangs_at_the_end_is_waited_for_once() {
        let (pieces, open, lets_go) = register(Purpose::Opened, &[Fate::HangsAtItsEnd; 200]);
        let (told, tells) = mpsc::channel();
        std::thread::spawn(move || told.send(pieces.ok().unwrap().end(|_| ())));
        let ended = tells.recv_timeout(Duration::from_secs(10)).expect("it waits for the device");
        assert!(matches!(ended, Err(TransportError::Hung { .. })));
        assert_eq!(open.load(Ordering::Acquire), 200);
        drop(lets_go);
        while open.load(Ordering::Acquire) > 0 {
            std::thread::yield_now();
        }
    }

    #[test]
    fn patience_grows_with_what_is_asked_for() {
        assert_eq!(patience(1), PATIENCE);
        assert_eq!(patience(PATIENCE_BYTES), PATIENCE);
        assert_eq!(patience(4 * PATIENCE_BYTES), 4 * PATIENCE);
    }
}
