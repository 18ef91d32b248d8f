//! Holds a device's output until the epoch that produced it is committed.
//!
//! What enters: bytes from the guest ([`OutputGate::write`], on vCPU threads, never blocking);
//! what leaves: the same bytes in the same order, taken by the one thread that writes to the
//! backend ([`OutputGate::next_chunk`]). What always holds: in hold mode nothing of epoch n
//! becomes released before `commit(n)`; releasing only moves bytes, it never waits for a backend.
//!
//! ```text
//!            write (hold)      seal(n)          commit(n)
//!  guest ───────────────▶ open ───────▶ sealed ──────────▶ released ──▶ writer thread
//!    │                                                        ▲
//!    └──────────────────────── write (pass) ──────────────────┘
//!
//!  modes:  Pass ──hold()──▶ Hold ──pass()──▶ Pass
//!           └─────┬──────────┘
//!             discard() ──▶ Discarded (final: nothing enters, what was held is gone)
//! ```
//!
//! Bounds. At [`THROTTLE_BYTES`] waiting in all three places the gate is *throttled*: the device
//! shows the guest a busy transmitter, until half of that has left. A guest that writes all the
//! same is cut off at [`GATE_BYTES_MAX`]: bytes past it are dropped and counted. When the backend
//! has no reader ([`OutputGate::set_stalled`]) released output must not throttle the guest for
//! ever: then all but the newest [`STALLED_BYTES_MAX`] released bytes are dropped and counted.
//!
//! Serial lines do not retransmit, so a take-over must not lose what epoch n had put out: the
//! primary may die after the backup's acknowledgement and before the bytes were written.
//! [`OutputGate::pending`] is therefore part of the device's state; the backup writes it out when
//! it starts. A reader may see a range of bytes twice, never a gap.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::counters::{Counter, Counters};

/// Waiting bytes from which the guest is asked to wait.
pub const THROTTLE_BYTES: usize = 1 << 20;
/// Most waiting bytes.
pub const GATE_BYTES_MAX: usize = 2 * THROTTLE_BYTES;
/// Most released bytes that wait for a backend without a reader.
pub const STALLED_BYTES_MAX: usize = 64 << 10;
/// Most bytes that the writer thread takes at once.
pub const CHUNK_BYTES_MAX: usize = 4 << 10;

/// Called on an edge, on the thread that caused it. It may only signal: a vCPU thread calls it
/// with the device's lock held.
pub type Waker = Arc<dyn Fn() + Send + Sync>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Pass,
    Hold,
    Discarded,
}

struct Inner {
    mode: Mode,
    open: Vec<u8>,
    /// Epochs ascend; no segment is empty.
    sealed: VecDeque<(u64, Vec<u8>)>,
    sealed_bytes: usize,
    released: VecDeque<u8>,
    /// The writer could not write and waits for its backend.
    stalled: bool,
    closed: bool,
    waker: Option<Waker>,
    space_waker: Option<Waker>,
}

/// See the module's documentation. Shared by the device, the engine and the writer thread.
pub struct OutputGate {
    inner: Mutex<Inner>,
    /// Something was released, or the gate was closed.
    readable: Condvar,
    /// Something that was released has left, or never will.
    left: Condvar,
    /// Written under the lock, read without it at every look at the line status.
    throttled: AtomicBool,
    /// Output leads nowhere (mode Null): nothing is kept or held.
    null: bool,
    accepted: Counter,
    written: Counter,
    dropped: Counter,
}

impl OutputGate {
    /// A gate in pass mode.
    #[must_use]
    pub fn new() -> Self {
        Self::with_null(false)
    }

    /// A gate for a device whose output leads nowhere: it counts, keeps nothing and never asks
    /// for a seal.
    #[must_use]
    pub fn null() -> Self {
        Self::with_null(true)
    }

    fn with_null(null: bool) -> Self {
        Self {
            inner: Mutex::new(Inner {
                mode: Mode::Pass,
                open: Vec::new(),
                sealed: VecDeque::new(),
                sealed_bytes: 0,
                released: VecDeque::new(),
                stalled: false,
                closed: false,
                waker: None,
                space_waker: None,
            }),
            readable: Condvar::new(),
            left: Condvar::new(),
            throttled: AtomicBool::new(false),
            null,
            accepted: Counter::default(),
            written: Counter::default(),
            dropped: Counter::default(),
        }
    }

    /// Takes bytes from the guest. Never blocks on a backend.
    pub fn write(&self, bytes: &[u8]) {
        self.accepted.add_len(bytes.len());
        if self.null || bytes.is_empty() {
            return;
        }
        let mut inner = self.lock();
        if inner.mode == Mode::Discarded || inner.closed {
            self.dropped.add_len(bytes.len());
            return;
        }
        let room = GATE_BYTES_MAX.saturating_sub(inner.total());
        let (kept, lost) = bytes.split_at(room.min(bytes.len()));
        self.dropped.add_len(lost.len());
        let mut waker = None;
        if inner.mode == Mode::Hold {
            if inner.open.is_empty() && !kept.is_empty() {
                waker = inner.waker.clone();
            }
            inner.open.extend_from_slice(kept);
        } else {
            self.release(&mut inner, kept);
        }
        // Never the end of a throttle, so the space waker, which takes the device's lock, is not
        // called from below that lock.
        if inner.total() >= THROTTLE_BYTES {
            self.throttled.store(true, Ordering::Relaxed);
        }
        drop(inner);
        if let Some(waker) = waker {
            waker();
        }
    }

    /// From now on output waits for its epoch. What was released before goes out.
    pub fn hold(&self) {
        let mut inner = self.lock();
        if inner.mode == Mode::Pass {
            inner.mode = Mode::Hold;
        }
    }

    /// Tags all open output with `epoch`. Epochs never descend while anything sealed waits.
    pub fn seal(&self, epoch: u64) {
        let mut inner = self.lock();
        if inner.open.is_empty() {
            return;
        }
        let last = inner.sealed.back().map_or(0, |(last, _)| *last);
        assert!(last <= epoch, "epoch {epoch} sealed after epoch {last}");
        let open = std::mem::take(&mut inner.open);
        inner.sealed_bytes += open.len();
        inner.sealed.push_back((epoch, open));
    }

    /// Releases everything tagged with `epoch` or an earlier one.
    pub fn commit(&self, epoch: u64) {
        let mut inner = self.lock();
        while let Some((_, bytes)) = inner.sealed.pop_front_if(|(tag, _)| *tag <= epoch) {
            inner.sealed_bytes -= bytes.len();
            self.release(&mut inner, &bytes);
        }
        self.after_change(inner);
    }

    /// Releases everything and holds nothing more.
    pub fn pass(&self) {
        let mut inner = self.lock();
        if inner.mode != Mode::Hold {
            return;
        }
        inner.mode = Mode::Pass;
        let held = inner.take_held();
        self.release(&mut inner, &held);
        self.after_change(inner);
    }

    /// Drops everything that is held and everything that the guest writes from now on: the peer
    /// owns the VM. Final. What was released belongs to committed epochs and still goes out.
    pub fn discard(&self) {
        let mut inner = self.lock();
        inner.mode = Mode::Discarded;
        let held = inner.take_held();
        self.dropped.add_len(held.len());
        self.after_change(inner);
    }

    /// Bytes of uncommitted epochs, open ones included.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        let inner = self.lock();
        inner.open.len() + inner.sealed_bytes
    }

    /// Bytes that wait for a seal.
    #[must_use]
    pub fn open_bytes(&self) -> usize {
        self.lock().open.len()
    }

    /// `waker` is called whenever open output goes from none to some. See [`Waker`].
    pub fn set_waker(&self, waker: Waker) {
        self.lock().waker = Some(waker);
    }

    /// `waker` is called whenever the gate stops being throttled, without any lock held.
    pub fn set_space_waker(&self, waker: Waker) {
        self.lock().space_waker = Some(waker);
    }

    /// The guest shall wait with further output.
    #[must_use]
    pub fn throttled(&self) -> bool {
        self.throttled.load(Ordering::Relaxed)
    }

    /// What a state captured now must carry: in hold mode, everything that was not written yet.
    /// In pass mode nothing, since this process goes on and writes it itself.
    #[must_use]
    pub fn pending(&self) -> Vec<u8> {
        let inner = self.lock();
        if inner.mode != Mode::Hold {
            return Vec::new();
        }
        let mut bytes = Vec::with_capacity(inner.total());
        bytes.extend(&inner.released);
        for (_, sealed) in &inner.sealed {
            bytes.extend_from_slice(sealed);
        }
        bytes.extend_from_slice(&inner.open);
        bytes
    }

    /// Waits until something is released and copies up to [`CHUNK_BYTES_MAX`] bytes of it into
    /// `chunk`; they stay in the gate until [`OutputGate::consume`] or [`OutputGate::lose`].
    /// False when the gate is closed and empty. For one thread only.
    pub fn next_chunk(&self, chunk: &mut Vec<u8>) -> bool {
        let mut inner = self.lock();
        inner.stalled = false;
        while inner.released.is_empty() {
            if inner.closed {
                return false;
            }
            inner = self.readable.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        chunk.clear();
        chunk.extend(inner.released.iter().take(CHUNK_BYTES_MAX));
        true
    }

    /// The first `len` bytes of the last chunk were written.
    pub fn consume(&self, len: usize) {
        self.written.add_len(len);
        self.remove_released(len);
    }

    /// The first `len` bytes of the last chunk could not be written and never will.
    pub fn lose(&self, len: usize) {
        self.dropped.add_len(len);
        self.remove_released(len);
    }

    /// The writer waits for a backend that takes nothing, until it asks for the next chunk: no
    /// bytes of a chunk are in its hands.
    pub fn set_stalled(&self) {
        let mut inner = self.lock();
        inner.stalled = true;
        self.left.notify_all();
        self.release(&mut inner, &[]);
        self.after_change(inner);
    }

    /// Waits until all that was released has been written; false if a backend that takes nothing,
    /// or `limit`, came first. A state captured after it carries nothing that is written here too.
    #[must_use]
    pub fn settle(&self, limit: Duration) -> bool {
        let inner = self.lock();
        let (inner, _) = self
            .left
            .wait_timeout_while(inner, limit, |inner| {
                !inner.released.is_empty() && !inner.stalled && !inner.closed
            })
            .unwrap_or_else(PoisonError::into_inner);
        inner.released.is_empty()
    }

    /// No more output: the writer ends when it has written what is released.
    pub fn close(&self) {
        self.lock().closed = true;
        self.readable.notify_all();
        self.left.notify_all();
    }

    fn remove_released(&self, len: usize) {
        let mut inner = self.lock();
        let len = len.min(inner.released.len());
        inner.released.drain(..len);
        self.left.notify_all();
        self.after_change(inner);
    }

    fn release(&self, inner: &mut Inner, bytes: &[u8]) {
        inner.released.extend(bytes);
        if inner.stalled {
            let excess = inner.released.len().saturating_sub(STALLED_BYTES_MAX);
            inner.released.drain(..excess);
            self.dropped.add_len(excess);
        }
        if !bytes.is_empty() {
            self.readable.notify_one();
        }
    }

    /// Moves the throttle with hysteresis, so that a guest near the limit does not get an
    /// interrupt for each byte that leaves.
    fn after_change(&self, inner: MutexGuard<'_, Inner>) {
        let total = inner.total();
        if total >= THROTTLE_BYTES {
            self.throttled.store(true, Ordering::Relaxed);
        } else if total <= THROTTLE_BYTES / 2 && self.throttled.swap(false, Ordering::Relaxed) {
            let waker = inner.space_waker.clone();
            drop(inner);
            if let Some(waker) = waker {
                waker();
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn total(&self) -> usize {
        self.open.len() + self.sealed_bytes + self.released.len()
    }

    fn take_held(&mut self) -> Vec<u8> {
        let mut held = Vec::with_capacity(self.sealed_bytes + self.open.len());
        for (_, bytes) in self.sealed.drain(..) {
            held.extend_from_slice(&bytes);
        }
        self.sealed_bytes = 0;
        held.append(&mut self.open);
        held
    }
}

impl Default for OutputGate {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for OutputGate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = self.lock();
        f.debug_struct("OutputGate")
            .field("mode", &inner.mode)
            .field("open", &inner.open.len())
            .field("sealed", &inner.sealed_bytes)
            .field("released", &inner.released.len())
            .finish_non_exhaustive()
    }
}

impl Counters for OutputGate {
    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("output_bytes", self.accepted.get()),
            ("output_written_bytes", self.written.get()),
            ("output_dropped_bytes", self.dropped.get()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::thread;

    use proptest::prelude::*;

    use super::*;

    fn released(gate: &OutputGate) -> Vec<u8> {
        gate.lock().released.iter().copied().collect()
    }

    /// What the writer thread would write, taken out.
    fn drain(gate: &OutputGate) -> Vec<u8> {
        let bytes = released(gate);
        gate.consume(bytes.len());
        bytes
    }

    fn counting_waker() -> (Waker, Arc<AtomicUsize>) {
        let count = Arc::<AtomicUsize>::default();
        let counted = Arc::clone(&count);
        let waker: Waker = Arc::new(move || {
            counted.fetch_add(1, Ordering::Relaxed);
        });
        (waker, count)
    }

    fn counter(gate: &OutputGate, name: &str) -> u64 {
        gate.counters().into_iter().find(|(found, _)| *found == name).unwrap().1
    }

    #[test]
    fn output_leaves_only_when_its_epoch_is_committed() {
        let gate = OutputGate::new();
        gate.write(b"before ");
        gate.hold();
        gate.write(b"one ");
        gate.seal(1);
        gate.seal(1);
        gate.write(b"two ");
        assert_eq!(drain(&gate), b"before ");
        gate.seal(2);
        gate.write(b"three ");
        gate.seal(5);
        gate.write(b"open");
        assert_eq!((gate.held_bytes(), gate.open_bytes()), (18, 4));
        gate.commit(0);
        assert_eq!(drain(&gate), b"");
        gate.commit(1);
        assert_eq!(drain(&gate), b"one ");
        gate.commit(4);
        assert_eq!(drain(&gate), b"two ");
        gate.pass();
        assert_eq!(drain(&gate), b"three open");
        gate.write(b" free");
        assert_eq!(drain(&gate), b" free");
        assert_eq!((gate.held_bytes(), gate.open_bytes()), (0, 0));
    }

    #[test]
    #[should_panic(expected = "sealed after epoch")]
    fn epochs_do_not_descend() {
        let gate = OutputGate::new();
        gate.hold();
        gate.write(b"a");
        gate.seal(2);
        gate.write(b"b");
        gate.seal(1);
    }

    #[test]
    fn what_is_discarded_never_leaves() {
        let gate = OutputGate::new();
        gate.write(b"committed");
        gate.hold();
        gate.write(b"sealed");
        gate.seal(1);
        gate.write(b"open");
        gate.discard();
        gate.write(b"late");
        gate.commit(9);
        gate.pass();
        gate.hold();
        gate.write(b"later");
        gate.pass();
        assert_eq!(drain(&gate), b"committed");
        assert_eq!(gate.held_bytes(), 0);
        assert_eq!(counter(&gate, "output_dropped_bytes"), 6 + 4 + 4 + 5);
    }

    #[test]
    fn pending_output_is_what_was_not_written() {
        let gate = OutputGate::new();
        gate.write(b"12");
        assert_eq!(gate.pending(), b"");
        gate.hold();
        gate.write(b"34");
        gate.seal(1);
        gate.write(b"56");
        assert_eq!(gate.pending(), b"123456");
        gate.consume(1);
        gate.commit(1);
        assert_eq!(gate.pending(), b"23456");
        assert_eq!(drain(&gate), b"234");
        assert_eq!(gate.pending(), b"56");
    }

    #[test]
    fn the_waker_is_called_when_open_output_appears() {
        let gate = OutputGate::new();
        let (waker, calls) = counting_waker();
        gate.set_waker(waker);
        gate.write(b"pass");
        assert_eq!(calls.load(Ordering::Relaxed), 0);
        gate.hold();
        gate.write(b"");
        assert_eq!(calls.load(Ordering::Relaxed), 0);
        gate.write(b"a");
        gate.write(b"b");
        assert_eq!(calls.load(Ordering::Relaxed), 1);
        gate.seal(1);
        assert_eq!(calls.load(Ordering::Relaxed), 1);
        gate.write(b"c");
        assert_eq!(calls.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn a_full_gate_throttles_then_drops_and_recovers() {
        let gate = OutputGate::new();
        let (waker, calls) = counting_waker();
        gate.set_space_waker(waker);
        gate.hold();
        gate.write(&vec![b'x'; THROTTLE_BYTES - 1]);
        assert!(!gate.throttled());
        gate.write(b"x");
        assert!(gate.throttled());
        gate.write(&vec![b'y'; GATE_BYTES_MAX]);
        assert_eq!(gate.held_bytes(), GATE_BYTES_MAX);
        let lost = u64::try_from(THROTTLE_BYTES).unwrap();
        assert_eq!(counter(&gate, "output_dropped_bytes"), lost);
        gate.seal(1);
        gate.write(b"z");
        assert_eq!(gate.open_bytes(), 0);
        gate.commit(1);
        assert!(gate.throttled(), "released bytes still wait for the backend");
        gate.consume(GATE_BYTES_MAX - THROTTLE_BYTES / 2 - 1);
        assert_eq!((gate.throttled(), calls.load(Ordering::Relaxed)), (true, 0));
        gate.consume(1);
        assert_eq!((gate.throttled(), calls.load(Ordering::Relaxed)), (false, 1));
        assert!(drain(&gate).iter().all(|byte| *byte == b'y'));
        assert_eq!(calls.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_stalled_backend_keeps_the_newest_bytes_and_frees_the_guest() {
        let gate = OutputGate::new();
        let (waker, calls) = counting_waker();
        gate.set_space_waker(waker);
        gate.write(&vec![b'x'; THROTTLE_BYTES]);
        assert!(gate.throttled());
        gate.set_stalled();
        assert_eq!((gate.throttled(), calls.load(Ordering::Relaxed)), (false, 1));
        gate.write(b"last words");
        let kept = released(&gate);
        assert_eq!(kept.len(), STALLED_BYTES_MAX);
        assert!(kept.ends_with(b"xlast words"));
        // Asking for a chunk means that the backend takes bytes again.
        assert!(gate.next_chunk(&mut Vec::new()));
        gate.write(&[b'y'; STALLED_BYTES_MAX]);
        assert_eq!(released(&gate).len(), 2 * STALLED_BYTES_MAX);
    }

    #[test]
    fn settling_waits_for_the_writer_and_for_no_longer_than_it_may() {
        let gate = Arc::new(OutputGate::new());
        let short = Duration::from_millis(20);
        assert!(gate.settle(short), "nothing to wait for");
        gate.write(b"words");
        assert!(!gate.settle(short), "nobody writes");
        let writer = thread::spawn({
            let gate = Arc::clone(&gate);
            move || {
                thread::sleep(Duration::from_millis(50));
                gate.consume(2);
                gate.consume(3);
            }
        });
        assert!(gate.settle(Duration::from_secs(60)));
        writer.join().unwrap();
        gate.write(b"more");
        gate.set_stalled();
        assert!(!gate.settle(Duration::from_secs(60)), "a stalled backend is not waited for");
    }

    #[test]
    fn a_null_gate_keeps_nothing_and_asks_for_nothing() {
        let gate = OutputGate::null();
        let (waker, calls) = counting_waker();
        gate.set_waker(waker);
        gate.hold();
        gate.write(&vec![0; 4 * GATE_BYTES_MAX]);
        assert_eq!((gate.held_bytes(), gate.throttled()), (0, false));
        assert_eq!(calls.load(Ordering::Relaxed), 0);
        assert!(gate.pending().is_empty());
    }

    #[test]
    fn the_writer_gets_everything_and_ends_after_close() {
        let gate = Arc::new(OutputGate::new());
        let writer = thread::spawn({
            let gate = Arc::clone(&gate);
            move || {
                let (mut all, mut chunk) = (Vec::new(), Vec::new());
                while gate.next_chunk(&mut chunk) {
                    assert!(chunk.len() <= CHUNK_BYTES_MAX);
                    // Half of it, as a backend that takes less than it is offered.
                    let taken = chunk.len().div_ceil(2);
                    all.extend_from_slice(&chunk[..taken]);
                    gate.consume(taken);
                }
                all
            }
        });
        let text: Vec<u8> = (0..200_000u32).flat_map(u32::to_le_bytes).collect();
        for part in text.chunks(977) {
            gate.write(part);
        }
        gate.close();
        gate.write(b"too late");
        assert_eq!(writer.join().unwrap(), text);
    }

    #[derive(Clone, Debug)]
    enum Op {
        Write(u8),
        Seal,
        Commit(u64),
        Hold,
        Pass,
        Drain,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            4 => (1u8..6).prop_map(Op::Write),
            2 => Just(Op::Seal),
            2 => (0u64..3).prop_map(Op::Commit),
            1 => Just(Op::Hold),
            1 => Just(Op::Pass),
            2 => Just(Op::Drain),
        ]
    }

    proptest! {
        /// Against a list of (byte, epoch): what leaves is a prefix of what was written, it is
        /// as long as the commits allow, and what stays is what a state would carry.
        #[test]
        fn any_order_of_calls_keeps_the_promise(ops in prop::collection::vec(op(), 0..80)) {
            let gate = OutputGate::new();
            // None: not sealed; epoch 0: may leave.
            let mut model: Vec<(u8, Option<u64>)> = Vec::new();
            let (mut next, mut epoch, mut holding, mut out) = (0u8, 1u64, false, Vec::new());
            for op in ops {
                match op {
                    Op::Write(len) => for _ in 0..len {
                        next = next.wrapping_add(1);
                        gate.write(&[next]);
                        model.push((next, (!holding).then_some(0)));
                    },
                    Op::Seal => {
                        gate.seal(epoch);
                        for (_, tag) in &mut model {
                            tag.get_or_insert(epoch);
                        }
                        epoch += 1;
                    }
                    Op::Commit(back) => {
                        let upto = epoch.saturating_sub(back);
                        gate.commit(upto);
                        for (_, tag) in &mut model {
                            if tag.is_some_and(|tag| tag <= upto) {
                                *tag = Some(0);
                            }
                        }
                    }
                    Op::Hold => { gate.hold(); holding = true; }
                    Op::Pass => {
                        gate.pass();
                        holding = false;
                        for (_, tag) in &mut model {
                            *tag = Some(0);
                        }
                    }
                    Op::Drain => out.extend(drain(&gate)),
                }
                let all: Vec<u8> = model.iter().map(|(byte, _)| *byte).collect();
                let free = model.iter().take_while(|(_, tag)| *tag == Some(0)).count();
                let mut left = out.clone();
                left.extend(released(&gate));
                prop_assert_eq!(&left, &all[..free]);
                prop_assert_eq!(gate.held_bytes(), all.len() - free);
                let pending = if holding { &all[out.len()..] } else { &[] };
                prop_assert_eq!(gate.pending(), pending);
            }
        }
    }
}
