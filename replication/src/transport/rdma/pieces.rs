//! A guest's memory, registered with a device piece by piece.
//!
//! ```text
//!   | 0 | 1 | 2 | 3 | 4 | 5 | ...      pieces, taken in this order, by several threads
//!   | x | x | x |   | x |   |          registered
//!   ─── ready ──|                      of use: from the first page on, without a gap
//! ```
//!
//! Enters: a memory, and the device's protection domain. Leaves: regions, for one's own requests or for the
//! peer's, each as soon as it and all before it are registered. Always holds: what is ready stays so until whoever
//! uses it gives all of it up; the memory is not given back to the
//! host as long as any is registered (`Ram::pin`); nobody but threads of its own waits for the device, neither at the
//! beginning nor at the end; what a peer could write, and was never told of, is given back before anybody hears that
//! it is not registered, or is said to be kept; what a peer was told of is given back when it says that it is done.

use std::mem::ManuallyDrop;
use std::num::NonZero;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::Builder;
use std::time::{Duration, Instant};

use ::rdma::ProtectionDomain;
use thiserror::Error;
use vm_memory::GuestAddress;

use super::aside::{aside, give_back};
use super::registrar::{Memory, Registrar};
use crate::error::chain;
use crate::ids::{PAGE_SIZE, PageIndex};
use crate::ram::{Pin, Ram};
use crate::transport::TransportError;
use crate::wire::{GRANTS_MAX, Grant, REGIONS_MAX};

/// Bytes that are registered at a time, unless that were more than [`PIECES_MAX`]: a copy goes on, progress is seen,
/// and an end is heard, after each. Some WRITEs of the largest size, and far more than what it costs to ask a device.
pub(super) const PIECE_BYTES_MIN: u64 = 8 << 20;
/// What a larger one is a multiple of: no huge page is in two.
const PIECE_BYTES_UNIT: u64 = 2 << 20;
/// Beside those that are smaller because a region of memory ends.
const PIECES_MAX: u64 = (GRANTS_MAX - REGIONS_MAX) as u64;
/// Threads that register pieces of one memory: making pages, and clearing them, is what takes the time.
const THREADS_MAX: usize = 4;
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

impl LendError {
    /// Something may be registered later, by a thread that was left behind, if only for a moment.
    fn may_come_about(&self) -> bool {
        matches!(self, Self::Device(TransportError::Hung { .. }))
    }
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
pub(super) trait Region: Send + Sync + Sized + 'static {
    /// Asks the device, which may take its time.
    fn end(self) -> Result<(), ::rdma::Error>;
}

/// A piece of a memory, registered or not yet.
pub(super) struct Piece<R = Memory> {
    pub(super) first: PageIndex,
    pub(super) pages: u64,
    start: GuestAddress,
    memory: OnceLock<R>,
}

impl<R> Piece<R> {
    fn bytes(&self) -> u64 {
        self.pages * PAGE_SIZE as u64
    }
}

impl Piece {
    /// What a peer has to know to write it.
    pub(super) fn grant(&self) -> Option<Grant> {
        let ::rdma::Remote { address, key } = self.memory.get()?.remote();
        Some(Grant { pages: self.pages, address, key })
    }
}

/// That a piece more is registered.
pub(super) struct Step<'a, R = Memory> {
    /// Registered so far.
    pub(super) bytes: u64,
    /// Those that are ready by it.
    pub(super) ready: &'a [Piece<R>],
}

/// All of a memory.
pub(super) struct Pieces<R: Region = Memory> {
    /// Ascending, side by side.
    list: Vec<Piece<R>>,
    /// Pages from the first on that are registered, without a gap.
    ready: AtomicU64,
    /// For the thread that ends them: the memory is not given back before.
    pin: Option<Pin>,
    /// How long a device may take for so many bytes.
    patience: fn(u64) -> Duration,
}

/// What became of a memory that was to be opened to a peer.
pub(super) enum Filled<R: Region = Memory> {
    All(Pieces<R>),
    /// Of some the peer was told, and it may be at them: they stay until it says that it is not.
    Short(Pieces<R>, LendError),
    /// Nobody writes there, but with [`LendError::Kept`].
    Nothing(LendError),
}

/// How far the threads are that register pieces.
struct Turn<D> {
    bytes: u64,
    /// Pieces from the first on that are registered.
    ready: usize,
    done: D,
}

impl Pieces {
    pub(super) fn new(ram: &Ram, registrar: &Registrar) -> Self {
        // Before the first piece: a hole would take pages from the guest and not from the device.
        Self::of_layout(layout(ram, registrar.piece_bytes_min()), ram.pin(), patience)
    }

    /// Registers all of `ram`, whose pieces these are, and tells `done` of each that is. Gives up after the pieces
    /// during which `ended` is raised.
    ///
    /// # Errors
    /// [`LendError`]; what is ready by then stays so.
    pub(super) fn register(
        &self,
        ram: &Ram,
        registrar: &Registrar,
        purpose: Purpose,
        ended: &AtomicBool,
        done: impl FnMut(Step<'_>) + Send,
    ) -> Result<(), LendError> {
        self.fill(threads(), ended, done, |start, bytes| {
            let (registrar, ram) = (registrar.clone(), ram.clone());
            move || registrar.register(&ram, purpose, start, bytes / PAGE_SIZE as u64)
        })
    }

    /// Where they are registered; `None` as long as the first is not.
    pub(super) fn domain(&self) -> Option<&Arc<ProtectionDomain>> {
        self.list.first()?.memory.get()?.domain()
    }

    /// The piece that a page is in, and what the device has of it, if it is ready.
    pub(super) fn of(&self, page: PageIndex) -> Option<(&Piece, &Memory)> {
        if page.0 >= self.ready() {
            return None;
        }
        let after = self.list.partition_point(|piece| piece.first <= page);
        let piece = self.list.get(after.checked_sub(1)?)?;
        Some((piece, piece.memory.get()?))
    }
}

impl<R: Region> Pieces<R> {
    fn of_layout(
        layout: Vec<(PageIndex, u64, GuestAddress)>,
        pin: Pin,
        patience: fn(u64) -> Duration,
    ) -> Self {
        let piece = |(first, pages, start)| Piece { first, pages, start, memory: OnceLock::new() };
        let list = layout.into_iter().map(piece).collect();
        Self { list, ready: AtomicU64::new(0), pin: Some(pin), patience }
    }

    /// Pages from the first on that are registered, without a gap.
    pub(super) fn ready(&self) -> u64 {
        self.ready.load(Ordering::Acquire)
    }

    pub(super) fn is_all_ready(&self) -> bool {
        self.ready() == self.list.last().map_or(0, |last| last.first.0 + last.pages)
    }

    /// Registers each piece by what `register` makes for its start and bytes, in so many threads. Each thread is
    /// back when this is.
    fn fill<F>(
        &self,
        threads: usize,
        ended: &AtomicBool,
        done: impl FnMut(Step<'_, R>) + Send,
        register: impl Fn(GuestAddress, u64) -> F + Sync,
    ) -> Result<(), LendError>
    where
        F: FnOnce() -> Result<R, ::rdma::Error> + Send + 'static,
    {
        let turn = Mutex::new(Turn { bytes: 0, ready: 0, done });
        let (next, failed) = (AtomicUsize::new(0), Mutex::new(None::<LendError>));
        let has_failed = AtomicBool::new(false);
        let work = || {
            while !has_failed.load(Ordering::Acquire) {
                let Some(piece) = self.list.get(next.fetch_add(1, Ordering::Relaxed)) else {
                    return;
                };
                let memory = match ended.load(Ordering::Acquire) {
                    true => Err(LendError::Ended),
                    false => {
                        aside((self.patience)(piece.bytes()), register(piece.start, piece.bytes()))
                            .and_then(|memory| memory.map_err(TransportError::Rdma))
                            .map_err(LendError::Device)
                    }
                };
                match memory {
                    Ok(memory) => self.registered(piece, memory, &turn),
                    Err(error) => {
                        has_failed.store(true, Ordering::Release);
                        let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                        // The first, but for one that is not over.
                        if failed.is_none() || error.may_come_about() {
                            *failed = Some(error);
                        }
                    }
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..threads.min(self.list.len()) {
                let helper = Builder::new().name("repl-register".to_owned());
                if let Err(error) = helper.spawn_scoped(scope, work) {
                    tracing::debug!("fewer threads register memory: {error}");
                    break;
                }
            }
            work();
        });
        failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    /// The device has this piece.
    fn registered(&self, piece: &Piece<R>, memory: R, turn: &Mutex<Turn<impl FnMut(Step<'_, R>)>>) {
        let mut turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(piece.memory.set(memory).is_ok(), "each is taken by one thread");
        turn.bytes += piece.bytes();
        let (before, rest) = (turn.ready, &self.list[turn.ready..]);
        turn.ready += rest.iter().take_while(|piece| piece.memory.get().is_some()).count();
        let ready = &self.list[before..turn.ready];
        if let Some(last) = ready.last() {
            // Before anybody is told.
            self.ready.store(last.first.0 + last.pages, Ordering::Release);
        }
        let bytes = turn.bytes;
        (turn.done)(Step { bytes, ready });
    }

    /// What a peer has of these pieces, which it was told of as they became ready, once that is over.
    pub(super) fn opened(self, registered: Result<(), LendError>) -> Filled<R> {
        match registered {
            Ok(()) => Filled::All(self),
            // It ends the session. What else there is goes to a thread that nobody waits for.
            Err(LendError::Device(error @ TransportError::Hung { .. })) => {
                Filled::Nothing(LendError::Kept(error))
            }
            Err(error @ LendError::Device(_)) if self.ready() > 0 => Filled::Short(self, error),
            // Nobody was told, or has called it off. Whoever hears of this takes the memory for its own.
            Err(error) => match self.end(|_| ()) {
                Ok(()) => Filled::Nothing(error),
                Err(kept) => Filled::Nothing(LendError::Kept(kept)),
            },
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
            let Some(memory) = piece.memory.into_inner() else { continue };
            // Without a thread it is kept, and not given back by whoever drops it, which may take for ever.
            let memory = ManuallyDrop::new(memory);
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
        let list = std::mem::take(&mut self.list).into_iter();
        let list: Vec<R> = list.filter_map(|piece| piece.memory.into_inner()).collect();
        let pin = self.pin.take();
        if list.is_empty() {
            return;
        }
        // Without a thread all of it is kept: whoever drops this may be an engine.
        let held = ManuallyDrop::new((list, pin));
        let body = move || {
            let (list, pin) = ManuallyDrop::into_inner(held);
            let began = Instant::now();
            let mut is_all = true;
            for memory in list {
                if let Err(error) = memory.end() {
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
        let started = Builder::new().name("repl-unpin".to_owned()).spawn(body);
        if let Err(error) = started {
            tracing::error!("guest memory stays registered: no thread to give it back: {error}");
        }
    }
}

/// So that a guest, or the senders, have as many processors at least.
fn threads() -> usize {
    let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
    (processors / 2).clamp(1, THREADS_MAX)
}

/// How long a device may take for `bytes` of memory.
pub(crate) fn patience(bytes: u64) -> Duration {
    let parts = bytes.div_ceil(PATIENCE_BYTES).max(1);
    PATIENCE.saturating_mul(u32::try_from(parts).unwrap_or(u32::MAX))
}

/// The pieces of a memory: first page, pages, guest address.
fn layout(ram: &Ram, least: u64) -> Vec<(PageIndex, u64, GuestAddress)> {
    let regions: Vec<_> =
        ram.regions().iter().map(|region| (region.first, region.pages, region.start)).collect();
    layout_of(ram.pages(), &regions, least)
}

fn layout_of(
    all: u64,
    regions: &[(PageIndex, u64, GuestAddress)],
    least: u64,
) -> Vec<(PageIndex, u64, GuestAddress)> {
    let page = PAGE_SIZE as u64;
    let most = (all * page).div_ceil(PIECES_MAX);
    let most = if most <= least { least } else { most.next_multiple_of(PIECE_BYTES_UNIT) } / page;
    let mut pieces = vec![];
    for (first, count, start) in regions {
        let mut done = 0;
        while done < *count {
            let pages = most.min(count - done);
            pieces.push((PageIndex(first.0 + done), pages, GuestAddress(start.0 + done * page)));
            done += pages;
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    use std::sync::{Barrier, mpsc};

    use super::*;
    use crate::testing::memory;

    #[test]
    fn a_memory_is_registered_in_pieces_that_lie_side_by_side() {
        let ram = memory(&[(0, 90), (1 << 32, 317)]);
        let pieces = layout(&ram, PIECE_BYTES_MIN);
        assert_eq!(
            pieces,
            [(PageIndex(0), 90, GuestAddress(0)), (PageIndex(90), 317, GuestAddress(1 << 32))]
        );
    }

    /// Some are ready long before the last one is, and there are no more than a window may have.
    #[test]
    fn a_piece_is_a_small_part_of_a_memory() {
        let unit = PIECE_BYTES_UNIT / PAGE_SIZE as u64;
        for (gib, pages, count) in [(1, 2048, 128), (8, 2048, 1024), (9, 2560, 922)] {
            let all = gib << 18;
            let pieces = layout_of(all, &[(PageIndex(0), all, GuestAddress(0))], PIECE_BYTES_MIN);
            assert_eq!((pieces[0].1, pieces.len()), (pages, count), "{gib} GiB");
            assert!(pieces.iter().all(|(first, ..)| first.0 % unit == 0), "{gib} GiB");
            assert_eq!(pieces.iter().map(|(_, pages, _)| pages).sum::<u64>(), all);
        }
        let all = (1 << 40) / PAGE_SIZE as u64 + 3;
        let pieces = layout_of(all, &[(PageIndex(0), all, GuestAddress(0))], PIECE_BYTES_MIN);
        assert!(pieces.len() <= usize::try_from(PIECES_MAX).unwrap(), "{}", pieces.len());
    }

    /// Registered while `open` counts it; given back once `hangs` lets it, if it hangs.
    struct Fake {
        open: Arc<AtomicUsize>,
        hangs: Option<Mutex<mpsc::Receiver<()>>>,
        is_kept: bool,
    }

    impl Region for Fake {
        fn end(self) -> Result<(), ::rdma::Error> {
            if let Some(hangs) = &self.hangs {
                let _ = hangs.lock().unwrap().recv();
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

    /// What came of it, how many pieces are registered at that moment, and what lets those that hang go on.
    struct Registered {
        filled: Filled<Fake>,
        open: Arc<AtomicUsize>,
        /// Steps: bytes, and the pages that became ready.
        steps: Vec<(u64, Vec<u64>)>,
        lets_go: Vec<mpsc::Sender<()>>,
    }

    /// By so many threads, each piece of a page.
    fn register_by(threads: usize, fates: &[Fate]) -> Registered {
        register_together(threads, fates, &Arc::new(Barrier::new(1)))
    }

    /// None that is not good goes on before so many are at it.
    fn register_together(threads: usize, fates: &[Fate], all: &Arc<Barrier>) -> Registered {
        let ram = memory(&[(0, 1)]);
        let layout =
            (0..fates.len() as u64).map(|at| (PageIndex(at), 1, GuestAddress(at))).collect();
        let hangs = fates.iter().any(|fate| matches!(fate, Fate::Hangs | Fate::HangsAtItsEnd));
        let patience = if hangs { |_| Duration::from_millis(100) } else { patience };
        let pieces = Pieces::of_layout(layout, ram.pin(), patience);
        let (open, ended) = (Arc::<AtomicUsize>::default(), AtomicBool::new(false));
        let lets_go = Mutex::new(vec![]);
        let mut steps = vec![];
        let filled = pieces.fill(
            threads,
            &ended,
            |step: Step<'_, Fake>| {
                let next = usize::try_from(step.bytes).unwrap() / PAGE_SIZE;
                let is_over = fates.get(next) == Some(&Fate::CalledOff);
                ended.store(is_over, Ordering::Release);
                steps.push((step.bytes, step.ready.iter().map(|piece| piece.first.0).collect()));
            },
            |start, _| {
                let fate = fates[usize::try_from(start.0).unwrap()];
                let (let_go, hangs) = mpsc::channel();
                lets_go.lock().unwrap().push(let_go);
                let (open, all) = (Arc::clone(&open), Arc::clone(all));
                move || {
                    if fate != Fate::Good {
                        all.wait();
                    }
                    if fate == Fate::Hangs {
                        let _ = hangs.recv();
                    }
                    if fate == Fate::Fails {
                        return Err(::rdma::Error::Option { what: "no room".to_owned() });
                    }
                    open.fetch_add(1, Ordering::AcqRel);
                    let hangs = (fate == Fate::HangsAtItsEnd).then(|| Mutex::new(hangs));
                    Ok(Fake { open, hangs, is_kept: fate == Fate::KeptAtItsEnd })
                }
            },
        );
        let lets_go = lets_go.into_inner().unwrap();
        Registered { filled: pieces.opened(filled), open, steps, lets_go }
    }

    fn register(fates: &[Fate]) -> Registered {
        register_by(1, fates)
    }

    fn nothing(filled: Filled<Fake>) -> LendError {
        match filled {
            Filled::Nothing(error) => error,
            Filled::All(_) | Filled::Short(..) => panic!("some of it is open"),
        }
    }

    /// Whoever hears that it is not registered may take the memory for its own.
    #[test]
    fn what_a_peer_could_write_is_given_back_before_anybody_hears_that_it_is_not_open() {
        use Fate::{CalledOff, Fails, Good};
        for (fates, is_ended) in [([Fails, Good, Good], false), ([Good, Good, CalledOff], true)] {
            let Registered { filled, open, .. } = register(&fates);
            assert_eq!(open.load(Ordering::Acquire), 0, "still open");
            let error = nothing(filled);
            assert_eq!(matches!(error, LendError::Ended), is_ended, "{error}");
            assert!(!matches!(error, LendError::Kept(_)), "{error}");
        }
    }

    /// A peer that was told of some may be at them: to give them back is to fail its WRITEs.
    #[test]
    fn what_a_peer_was_told_of_stays_until_it_is_done() {
        use Fate::{Fails, Good};
        let Registered { filled, open, steps, .. } = register(&[Good, Good, Fails, Good]);
        let Filled::Short(pieces, error) = filled else { panic!("none of it is open, or all") };
        assert!(matches!(error, LendError::Device(_)), "{error}");
        let page = PAGE_SIZE as u64;
        assert_eq!(steps, [(page, vec![0]), (2 * page, vec![1])]);
        assert_eq!((pieces.ready(), pieces.is_all_ready()), (2, false));
        assert_eq!(open.load(Ordering::Acquire), 2);
        let mut bytes = 0;
        pieces.end(|more| bytes += more).unwrap();
        assert_eq!((open.load(Ordering::Acquire), bytes), (0, 2 * page));
    }

    #[test]
    fn what_a_device_keeps_open_is_said_to_be_kept() {
        use Fate::{CalledOff, Good, Hangs, HangsAtItsEnd, KeptAtItsEnd};
        for fates in [
            vec![Hangs],
            vec![Good, Hangs],
            vec![Good, HangsAtItsEnd, CalledOff],
            vec![KeptAtItsEnd, Good, CalledOff],
        ] {
            let Registered { filled, lets_go: _hangs, .. } = register(&fates);
            let error = nothing(filled);
            assert!(matches!(error, LendError::Kept(_)), "{error}");
        }
    }

    /// Several threads, in any order: what is ready has no gap, nobody hears of anything else, and what was
    /// registered behind a gap is given back with the rest.
    #[test]
    fn several_threads_register_each_piece_once() {
        for threads in 1..=5 {
            let Registered { filled, open, steps, .. } = register_by(threads, &[Fate::Good; 100]);
            let Filled::All(pieces) = filled else { panic!("some of it is not open") };
            assert!(pieces.is_all_ready());
            let told: Vec<u64> = steps.iter().flat_map(|(_, ready)| ready.clone()).collect();
            assert_eq!(told, (0..100).collect::<Vec<_>>());
            let bytes: Vec<u64> = steps.iter().map(|(bytes, _)| *bytes).collect();
            assert_eq!(bytes, (1..=100).map(|pages| pages * PAGE_SIZE as u64).collect::<Vec<_>>());
            pieces.end(|_| ()).unwrap();
            assert_eq!(open.load(Ordering::Acquire), 0);
        }
        let mut fates = [Fate::Good; 100];
        fates[0] = Fate::Fails;
        for threads in 2..=5 {
            // Which of them are registered nobody knows, but that none is after this.
            let Registered { filled, open, steps, .. } = register_by(threads, &fates);
            assert!(steps.iter().all(|(_, ready)| ready.is_empty()), "a gap is not seen");
            assert!(matches!(nothing(filled), LendError::Device(_)));
            assert_eq!(open.load(Ordering::Acquire), 0, "still open");
        }
    }

    /// One thread's piece fails, another's hangs: the device may have that later.
    #[test]
    fn a_piece_that_hangs_counts_more_than_one_that_fails() {
        for fates in [[Fate::Fails, Fate::Hangs], [Fate::Hangs, Fate::Fails]] {
            let both = Arc::new(Barrier::new(2));
            let Registered { filled, lets_go, .. } = register_together(2, &fates, &both);
            assert_eq!(lets_go.len(), 2);
            let error = nothing(filled);
            assert!(matches!(error, LendError::Kept(_)), "{error}");
        }
    }

    /// As many pieces as there are, one that hangs is waited for once, and nobody gives back the others inline.
    #[test]
    fn a_device_that_hangs_at_the_end_is_waited_for_once() {
        let Registered { filled, open, lets_go, .. } = register(&[Fate::HangsAtItsEnd; 200]);
        let Filled::All(pieces) = filled else { panic!("some of it is not open") };
        let (told, tells) = mpsc::channel();
        std::thread::spawn(move || told.send(pieces.end(|_| ())));
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
