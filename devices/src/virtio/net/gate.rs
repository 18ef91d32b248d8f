//! Holds the frames that a guest sends until the epoch that produced them is committed.
//!
//! What enters: whole frames, copied out of the guest's rings ([`TxGate::push`], by the worker of
//! a queue pair under a pass); what leaves: the same frames, taken by the same worker
//! ([`TxGate::next`]), which writes them to the tap. Each pair has a *lane*. What always holds:
//!
//! - In hold mode nothing of epoch n becomes released before `commit(n)`.
//! - Within a lane frames leave in the order in which they came. Lanes do not wait for each other.
//! - At most [`Limits`] wait, in all lanes together; a frame that is given back may exceed it by
//!   one for each lane. A full gate refuses, and its wakers are called when half of it is free.
//! - Releasing moves marks, not frames, and never waits for a tap.
//!
//! ```text
//!           push (hold)        seal(n)          commit(n)
//!  guest ───────────────▶ open ───────▶ sealed ──────────▶ released ──next──▶ worker ──▶ tap
//!    │                                                        ▲                  │
//!    └──────────────────────── push (pass) ──────────────────┘◀────give_back─────┘
//!
//!  modes:  Pass ──hold()──▶ Hold ──pass()──▶ Pass
//!           └─────┬──────────┘
//!             discard() ──▶ Discarded (final: what was held and what comes is gone)
//! ```
//!
//! Unlike a serial line a network may lose, so what waits here is no part of the device's state:
//! after a take-over the senders' own retransmission brings it back.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::frame::FRAME_BYTES_MAX;
use crate::counters::{Counter, Counters};
use crate::output_gate::Waker;

/// Most that waits in a gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// At least twice [`FRAME_BYTES_MAX`], so that half a gate takes any frame.
    pub bytes: usize,
    /// At least two.
    pub frames: usize,
}

impl Default for Limits {
    /// Some 25 ms of a 10 Gbit/s link. The number of frames bounds what small ones cost beside
    /// their bytes.
    fn default() -> Self {
        Self { bytes: 32 << 20, frames: 32 << 10 }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Pass,
    Hold,
    Discarded,
}

/// Neighbouring frames of a lane that share a fate.
#[derive(Clone, Copy, Debug)]
struct Batch {
    frames: usize,
    bytes: usize,
    /// When the first of them came.
    since: Instant,
}

/// The frames of one queue pair: first the released ones, then one batch for each sealed epoch,
/// then the open batch.
#[derive(Default)]
struct Lane {
    frames: VecDeque<Vec<u8>>,
    released: usize,
    /// Epochs ascend; no batch is empty.
    sealed: VecDeque<(u64, Batch)>,
    open: Option<Batch>,
    waker: Option<Waker>,
}

struct Inner {
    mode: Mode,
    lanes: Vec<Lane>,
    frames: usize,
    bytes: usize,
    open_bytes: usize,
    sealed_bytes: usize,
    waker: Option<Waker>,
}

/// See the module's documentation. Shared by the workers of a device and the engine.
pub struct TxGate {
    inner: Mutex<Inner>,
    limits: Limits,
    /// Written under the lock; a hint for workers.
    full: AtomicBool,
    held_frames: Counter,
    held_bytes: Counter,
    dropped_frames: Counter,
    dropped_bytes: Counter,
    full_times: Counter,
    held_us_max: AtomicU64,
}

impl TxGate {
    /// A gate in pass mode for `lanes` queue pairs.
    #[must_use]
    pub fn new(lanes: usize, limits: Limits) -> Self {
        assert!(limits.bytes >= 2 * FRAME_BYTES_MAX && limits.frames >= 2, "{limits:?}");
        Self {
            inner: Mutex::new(Inner {
                mode: Mode::Pass,
                lanes: (0..lanes).map(|_| Lane::default()).collect(),
                frames: 0,
                bytes: 0,
                open_bytes: 0,
                sealed_bytes: 0,
                waker: None,
            }),
            limits,
            full: AtomicBool::new(false),
            held_frames: Counter::default(),
            held_bytes: Counter::default(),
            dropped_frames: Counter::default(),
            dropped_bytes: Counter::default(),
            full_times: Counter::default(),
            held_us_max: AtomicU64::new(0),
        }
    }

    /// Takes a frame of the guest, or gives it back where there is no room: then the lane's waker
    /// is called as soon as there is. No frame is longer than [`FRAME_BYTES_MAX`].
    pub fn push(&self, lane: usize, frame: Vec<u8>) -> Result<(), Vec<u8>> {
        let len = frame.len();
        assert!(len <= FRAME_BYTES_MAX, "a frame of {len} bytes");
        let mut inner = self.lock();
        if inner.mode == Mode::Discarded {
            drop(inner);
            self.count_dropped(1, len);
            return Ok(());
        }
        if inner.bytes + len > self.limits.bytes || inner.frames >= self.limits.frames {
            if !self.full.swap(true, Ordering::Relaxed) {
                self.full_times.add(1);
            }
            return Err(frame);
        }
        inner.bytes += len;
        inner.frames += 1;
        let hold = inner.mode == Mode::Hold;
        let mut waker = None;
        if hold {
            if inner.open_bytes == 0 {
                waker = inner.waker.clone();
            }
            inner.open_bytes += len;
        }
        let lane = &mut inner.lanes[lane];
        if hold {
            let now = Instant::now();
            let open = lane.open.get_or_insert(Batch { frames: 0, bytes: 0, since: now });
            open.frames += 1;
            open.bytes += len;
        } else {
            lane.released += 1;
        }
        lane.frames.push_back(frame);
        drop(inner);
        if hold {
            self.held_frames.add(1);
            self.held_bytes.add_len(len);
        }
        if let Some(waker) = waker {
            waker();
        }
        Ok(())
    }

    /// The next frame of `lane` that may leave. For the lane's one worker only.
    pub fn next(&self, lane: usize) -> Option<Vec<u8>> {
        let mut inner = self.lock();
        let taken = &mut inner.lanes[lane];
        taken.released = taken.released.checked_sub(1)?;
        let frame = taken.frames.pop_front().expect("a released frame is queued");
        inner.frames -= 1;
        inner.bytes -= frame.len();
        self.after_change(inner, Vec::new());
        Some(frame)
    }

    /// Puts a frame back that [`TxGate::next`] gave and the tap did not take: it is the next again.
    pub fn give_back(&self, lane: usize, frame: Vec<u8>) {
        let mut inner = self.lock();
        inner.frames += 1;
        inner.bytes += frame.len();
        let lane = &mut inner.lanes[lane];
        lane.released += 1;
        lane.frames.push_front(frame);
    }

    /// From now on frames wait for their epoch. What was released before leaves.
    pub fn hold(&self) {
        let mut inner = self.lock();
        if inner.mode == Mode::Pass {
            inner.mode = Mode::Hold;
        }
    }

    /// Tags all open frames with `epoch`. Epochs never descend while anything sealed waits.
    pub fn seal(&self, epoch: u64) {
        let mut inner = self.lock();
        for lane in &mut inner.lanes {
            let Some(open) = lane.open.take() else { continue };
            let last = lane.sealed.back().map_or(0, |(last, _)| *last);
            assert!(last <= epoch, "epoch {epoch} sealed after epoch {last}");
            lane.sealed.push_back((epoch, open));
        }
        inner.sealed_bytes += std::mem::take(&mut inner.open_bytes);
    }

    /// Releases everything tagged with `epoch` or an earlier one, and wakes who writes it.
    pub fn commit(&self, epoch: u64) {
        let mut inner = self.lock();
        let mut wakers = Vec::new();
        let mut committed = 0;
        let mut oldest: Option<Instant> = None;
        for lane in &mut inner.lanes {
            let before = lane.released;
            while let Some((_, batch)) = lane.sealed.pop_front_if(|(tag, _)| *tag <= epoch) {
                lane.released += batch.frames;
                committed += batch.bytes;
                oldest = Some(oldest.map_or(batch.since, |oldest| oldest.min(batch.since)));
            }
            if lane.released != before {
                wakers.extend(lane.waker.clone());
            }
        }
        inner.sealed_bytes -= committed;
        self.note_held(oldest);
        self.after_change(inner, wakers);
    }

    /// Releases everything and holds nothing more.
    pub fn pass(&self) {
        let mut inner = self.lock();
        if inner.mode != Mode::Hold {
            return;
        }
        inner.mode = Mode::Pass;
        let mut wakers = Vec::new();
        let mut oldest: Option<Instant> = None;
        for lane in &mut inner.lanes {
            let open = lane.open.take();
            for batch in lane.sealed.drain(..).map(|(_, batch)| batch).chain(open) {
                oldest = Some(oldest.map_or(batch.since, |oldest| oldest.min(batch.since)));
            }
            if lane.released != lane.frames.len() {
                lane.released = lane.frames.len();
                wakers.extend(lane.waker.clone());
            }
        }
        (inner.open_bytes, inner.sealed_bytes) = (0, 0);
        self.note_held(oldest);
        self.after_change(inner, wakers);
    }

    /// Drops everything that is held and everything that the guest sends from now on: the peer
    /// owns the VM. Final. What was released belongs to committed epochs and still leaves.
    pub fn discard(&self) {
        let mut inner = self.lock();
        inner.mode = Mode::Discarded;
        let mut frames = 0;
        for lane in &mut inner.lanes {
            frames += lane.frames.len() - lane.released;
            lane.frames.truncate(lane.released);
            lane.sealed.clear();
            lane.open = None;
        }
        let bytes = inner.open_bytes + inner.sealed_bytes;
        (inner.open_bytes, inner.sealed_bytes) = (0, 0);
        inner.frames -= frames;
        inner.bytes -= bytes;
        self.count_dropped(frames, bytes);
        self.after_change(inner, Vec::new());
    }

    /// Bytes of uncommitted epochs, open ones included, headers counted.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        let inner = self.lock();
        inner.open_bytes + inner.sealed_bytes
    }

    /// Bytes that wait for a seal.
    #[must_use]
    pub fn open_bytes(&self) -> usize {
        self.lock().open_bytes
    }

    /// Frames that may leave and have not been written yet.
    #[must_use]
    pub fn released_frames(&self) -> usize {
        self.lock().lanes.iter().map(|lane| lane.released).sum()
    }

    /// `waker` is called whenever open output goes from none to some, on a worker, under a pass:
    /// it may only signal.
    pub fn set_waker(&self, waker: Waker) {
        self.lock().waker = Some(waker);
    }

    /// `waker` is called whenever frames of `lane` are released and whenever a full gate has room
    /// again, without any lock held.
    pub fn set_lane_waker(&self, lane: usize, waker: Waker) {
        self.lock().lanes[lane].waker = Some(waker);
    }

    /// The gate refused a frame and has not called the wakers since: to take another is in vain.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.full.load(Ordering::Relaxed)
    }

    /// Ends fullness with hysteresis, so that a guest at the limit is not resumed for each frame
    /// that leaves; then calls `wakers`, and everybody's where there is room again.
    fn after_change(&self, inner: MutexGuard<'_, Inner>, mut wakers: Vec<Waker>) {
        let half = inner.bytes <= self.limits.bytes / 2 && inner.frames <= self.limits.frames / 2;
        if half && self.full.swap(false, Ordering::Relaxed) {
            wakers = inner.lanes.iter().filter_map(|lane| lane.waker.clone()).collect();
        }
        drop(inner);
        for waker in wakers {
            waker();
        }
    }

    fn note_held(&self, oldest: Option<Instant>) {
        if let Some(oldest) = oldest {
            let held_us = u64::try_from(oldest.elapsed().as_micros()).unwrap_or(u64::MAX);
            self.held_us_max.fetch_max(held_us, Ordering::Relaxed);
        }
    }

    fn count_dropped(&self, frames: usize, bytes: usize) {
        self.dropped_frames.add_len(frames);
        self.dropped_bytes.add_len(bytes);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for TxGate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = self.lock();
        f.debug_struct("TxGate")
            .field("mode", &inner.mode)
            .field("frames", &inner.frames)
            .field("open", &inner.open_bytes)
            .field("sealed", &inner.sealed_bytes)
            .finish_non_exhaustive()
    }
}

impl Counters for TxGate {
    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("tx_held_frames", self.held_frames.get()),
            ("tx_held_bytes", self.held_bytes.get()),
            ("tx_held_us_max", self.held_us_max.load(Ordering::Relaxed)),
            ("tx_gate_full", self.full_times.get()),
            ("tx_discarded_frames", self.dropped_frames.get()),
            ("tx_discarded_bytes", self.dropped_bytes.get()),
        ]
    }
}

#[cfg(test)]
mod tests;
