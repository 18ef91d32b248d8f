//! Staging: pages of epochs that are not committed yet, invisible to the image.
//!
//! Enters: checked frames of one data connection. Leaves: one [`Part`] at its end marker. Always
//! holds: the parts of all such epochs have at most the bytes that were set aside together, each
//! byte of contents counted as it is kept, and each run that is not of whole pages ([`cost_bytes`]).
//! A page takes 4 KiB at most, whatever its encoding, so a primary that counts pages never exceeds
//! them. Buffers that are kept for the next epochs have a small multiple of what recent ones needed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::ids::EpochId;
use crate::wire::{ConnectionPart, Encoding, Run};

/// Bytes of a run as it is kept.
const RUN_BYTES: usize = size_of::<Run>();
/// Of so many parts of what was needed once, one is forgotten with each epoch: half of it in 44.
const FORGOTTEN: usize = 64;
/// A buffer of more than so many times what is needed is cut down to a quarter of that.
const EXCESS: usize = 8;
/// Bytes below which a buffer is not worth cutting.
const TRIMMED_BYTES_MIN: usize = 64 << 10;

/// What runs of a frame, whose contents take `staged` bytes, take of the budget: those of whole
/// pages nothing, since they take 1/256 of their contents at most and a page that is counted as
/// one must never take more; any other run itself, since nothing else bounds how many there are.
pub(super) fn cost_bytes(runs: &[Run], staged: usize) -> u64 {
    let is_less = |run: &&Run| matches!(run.encoding, Encoding::Zero | Encoding::Delta);
    (staged + runs.iter().filter(is_less).count() * RUN_BYTES) as u64
}

/// What is left of the bytes set aside for the epochs that are being staged.
#[derive(Clone, Debug)]
pub(super) struct Budget {
    left: Arc<AtomicU64>,
    whole: u64,
}

impl Budget {
    pub(super) fn new(whole: u64) -> Self {
        Self { left: Arc::new(AtomicU64::new(whole)), whole }
    }

    /// Takes `bytes`, all or nothing.
    pub(super) fn take(&self, bytes: u64) -> bool {
        let less = |left: u64| left.checked_sub(bytes);
        self.left.fetch_update(Ordering::AcqRel, Ordering::Acquire, less).is_ok()
    }

    /// What an epoch took is free again.
    pub(super) fn give_back(&self, bytes: u64) {
        let more = |left: u64| Some(left.saturating_add(bytes).min(self.whole));
        let _ = self.left.fetch_update(Ordering::AcqRel, Ordering::Acquire, more);
    }

    pub(super) fn whole(&self) -> u64 {
        self.whole
    }
}

/// What one connection carried of an epoch.
#[derive(Debug, Default)]
pub(super) struct Part {
    pub(super) epoch: EpochId,
    pub(super) sum: ConnectionPart,
    /// What it took of the budget.
    pub(super) cost_bytes: u64,
    pub(super) runs: Vec<Run>,
    /// Contents of the runs that are not zero, in order: pages, and deltas with their lengths.
    pub(super) bytes: Vec<u8>,
}

impl Part {
    /// Forgets what it holds and keeps its buffers.
    pub(super) fn clear(&mut self) {
        self.epoch = EpochId(0);
        self.sum = ConnectionPart::default();
        self.cost_bytes = 0;
        self.runs.clear();
        self.bytes.clear();
    }

    /// As [`Part::clear`], and gives back room that recent epochs would not have needed.
    pub(super) fn reuse(&mut self, needs: &Needs) {
        self.clear();
        needs.runs.trim(&mut self.runs);
        needs.bytes.trim(&mut self.bytes);
    }

    /// Room for the contents of a frame, to be read into.
    pub(super) fn room(&mut self, bytes: usize) -> &mut [u8] {
        let from = self.bytes.len();
        self.bytes.resize(from + bytes, 0);
        &mut self.bytes[from..]
    }
}

/// What recent epochs needed of each buffer.
#[derive(Debug, Default)]
pub(super) struct Needs {
    runs: Need,
    bytes: Need,
}

impl Needs {
    /// An epoch is whole.
    pub(super) fn saw(&mut self, part: &Part) {
        self.runs.saw(part.runs.len());
        self.bytes.saw(part.bytes.len());
    }
}

/// The largest length of late, the older the smaller. So a rare large epoch finds its room, and a
/// guest whose epochs became small gives it back; a buffer that was cut is right until epochs have
/// doubled, and one that grew until they are a quarter or less: none is cut and grown by turns.
#[derive(Debug, Default)]
struct Need(usize);

impl Need {
    fn saw(&mut self, length: usize) {
        self.0 = length.max(self.0 - self.0.div_ceil(FORGOTTEN));
    }

    fn trim<T>(&self, buffer: &mut Vec<T>) {
        let least = TRIMMED_BYTES_MIN / size_of::<T>();
        if buffer.capacity() / EXCESS > self.0.max(least) {
            buffer.shrink_to(self.0.max(least) * EXCESS / 4);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encode::delta::DELTA_BYTES_MAX;
    use crate::ids::{PAGE_SIZE, PageIndex};

    #[test]
    fn a_page_never_takes_more_than_its_size() {
        let contents = [
            (Encoding::Zero, 0),
            (Encoding::Raw, PAGE_SIZE),
            (Encoding::Delta, 2 + DELTA_BYTES_MAX),
            (Encoding::Lz4, PAGE_SIZE),
        ];
        for (encoding, staged) in contents {
            let run = Run { first: PageIndex(7), count: 1, encoding };
            let cost = cost_bytes(&[run], staged);
            assert!((1..=PAGE_SIZE as u64).contains(&cost), "{encoding:?} takes {cost}");
        }
    }

    /// Parts that go round as those of a receiver do, each with so many bytes.
    fn go_round(lengths: impl Iterator<Item = usize>) -> (Vec<usize>, usize) {
        let (mut needs, mut changes) = (Needs::default(), 0);
        let mut parts: Vec<Part> = (0..4).map(|_| Part::default()).collect();
        for (epoch, length) in lengths.enumerate() {
            let part = &mut parts[epoch % 4];
            let before = part.bytes.capacity();
            part.reuse(&needs);
            let mut left = length;
            while left > 0 {
                let frame = left.min(64 * PAGE_SIZE);
                part.room(frame);
                left -= frame;
            }
            needs.saw(part);
            changes += usize::from(part.bytes.capacity() != before);
        }
        (parts.iter().map(|part| part.bytes.capacity()).collect(), changes)
    }

    #[test]
    fn room_that_a_large_epoch_needed_is_given_back() {
        let (large, small) = (16 << 20, 1 << 18);
        let (had, _) = go_round([small, large, large, large, large].into_iter());
        assert!(had.iter().all(|room| *room >= large), "{had:?}");
        let epochs = std::iter::repeat_n(large, 4).chain(std::iter::repeat_n(small, 400));
        let (have, _) = go_round(epochs);
        assert!(have.iter().all(|room| (small..=8 * small).contains(room)), "{have:?}");
        let (have, _) = go_round(std::iter::repeat_n(large, 4).chain(std::iter::repeat_n(0, 2000)));
        assert!(have.iter().all(|room| *room <= EXCESS * TRIMMED_BYTES_MIN), "{have:?}");
    }

    #[test]
    fn room_is_not_given_back_to_be_taken_again() {
        let (large, small) = (2 << 20, 100);
        // A large epoch now and then, and small ones in between.
        for every in [2, 10, 50] {
            let lengths = (0..1000).map(|epoch| if epoch % every == 0 { large } else { small });
            let (_, changes) = go_round(lengths);
            assert!(changes <= 2 * 4, "{changes} changes with one of {every} large");
        }
        // Epochs that grow and shrink slowly.
        let wave = |epoch: i32| (f64::from(epoch) / 100.0).sin().mul_add(0.9, 1.0) * 1e6;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let (_, changes) = go_round((0..1000).map(|epoch| wave(epoch) as usize));
        assert!(changes < 100, "{changes} changes");
    }
}
