//! Pages as fewer bytes.
//!
//! Enters: the pages that one connection sends, in order. Leaves: an [`Encoding`] for each and, for
//! those that have one, the encoded content. Always holds: a delta is against what was sent for the
//! page before on the same connection, and nothing before the last first copy counts.
//!
//! - [`delta`]: what changed in a page;
//! - [`lz4`]: a page compressed;
//! - [`cache`]: what the peer has of a page;
//! - [`choose`]: what pays, for `compression=auto`.
//!
//! ```text
//!                  ┌─ all zero ──────────────────────────────────────────> zero
//!   page ──────────┤                ┌─ known, and half a page at most ───> delta
//!                  └─ compare it ───┤                    ┌─ 7/8 at most ─> lz4
//!                     (if chosen)   └─ compress it ──────┴─ else ────────> raw
//!                                      (if chosen)
//! ```
//!
//! The backup applies epochs in their order, each page at most once in one. So whatever was sent
//! for a page in an earlier epoch is in the image by the time a delta is applied, also if several
//! epochs are in flight; and a session in which an epoch was sent and not applied goes on with a
//! copy anew, or not at all.

pub mod cache;
pub mod choose;
pub mod delta;
pub mod lz4;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::time::{Duration, Instant};

use api::replication::Compression;

use crate::capture::cow::Page;
use crate::ids::{EpochId, PageIndex};
use crate::transport::{Delivery, Part};
use crate::wire::{Encoding, Kind, WireError, begin_content, end_content, undo_content};
use cache::{Cache, Known};
use choose::{Choice, Costs, choose};
use lz4::Compressor;

/// Of so many pages one is a sample: with `auto`, it is compared although comparing is not chosen,
/// and what encodings take is measured on it. Always the same pages, so that they are known.
const SAMPLE_PAGES: u64 = 128;
/// Of so many samples one is compressed although compressing is not chosen: that takes longer.
const COMPRESSED_SAMPLES: u32 = 16;
/// Of so many bytes one goes as it is although compressing is chosen, to see what writing it takes: a
/// whole frame, and then none until the others have made up for it.
const PLAIN_PARTS: u64 = 128;
/// The first bytes of a job go into the socket's buffer and say nothing about the link. It may take
/// some MiB, but who skipped them all would learn nothing from most epochs; what the kernel knows
/// of the bytes' arrival says the rest ([`crate::transport::Delivery`]).
const BUFFER_BYTES: u64 = 256 << 10;
/// Within a job the kernel is asked how bytes arrive after so many.
const ASK_BYTES: u64 = 4 << 20;
/// A frame of fewer bytes tells what a call costs, not what the link does.
const LINK_FRAME_BYTES: u64 = 32 << 10;

pub(crate) fn malformed<T>(what: &'static str) -> Result<T, WireError> {
    Err(WireError::Malformed { kind: Kind::Pages, what })
}

/// Encodes what one connection sends.
pub(crate) struct Encoder {
    connections: usize,
    /// What is done; with `auto` it changes.
    choice: Choice,
    auto: Option<Auto>,
    /// Made when it is first needed; without deltas it never is.
    cache: Option<Cache>,
    compressor: Option<Compressor>,
    /// Pages go straight into the image, in no order that a delta could rely on.
    is_copy: bool,
    /// The contents of the frame, in order.
    pieces: Vec<Piece>,
    bytes: Vec<u8>,
}

/// A content of a frame.
enum Piece {
    /// The next of the pages that the sender keeps.
    Kept,
    /// Encoded contents that follow each other.
    Encoded(Range<usize>),
}

/// What `auto` has learnt.
#[derive(Default)]
struct Auto {
    costs: Costs,
    samples: u32,
    /// What is to be sent until a frame goes as it is again.
    until_plain_bytes: u64,
    job_bytes: u64,
    /// Sent since the kernel was asked how bytes arrive, in jobs that are large enough to tell.
    unasked_bytes: u64,
}

impl Encoder {
    pub(crate) fn new(compression: Compression, connections: usize) -> Self {
        let choice = Choice {
            delta: compression == Compression::Delta,
            lz4: compression == Compression::Lz4,
        };
        Self {
            connections,
            choice,
            auto: (compression == Compression::Auto).then(Auto::default),
            cache: None,
            compressor: None,
            is_copy: true,
            pieces: Vec::new(),
            bytes: Vec::new(),
        }
    }

    /// What is done from here on; without `auto` it is what the options say.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn choose(&mut self, choice: Choice) {
        self.choice = choice;
    }

    /// What follows belongs to `epoch`.
    pub(crate) fn begin(&mut self, epoch: EpochId) {
        self.is_copy = epoch == EpochId(0);
        if self.is_copy
            && let Some(cache) = &mut self.cache
        {
            // Perhaps an epoch was sent and never applied.
            cache.clear();
        }
        if let Some(auto) = &mut self.auto
            && std::mem::take(&mut auto.job_bytes) < BUFFER_BYTES
        {
            // What fits the buffers on the way looks as if it had arrived.
            auto.unasked_bytes = 0;
        }
    }

    /// Learns how what was sent before has arrived; `delivery` is called where that is of use: where
    /// a job begins and, now and then, in a long one.
    pub(crate) fn arrived(&mut self, delivery: impl FnOnce() -> Option<Delivery>) {
        let Some(auto) = &mut self.auto else { return };
        let due_bytes = if auto.job_bytes == 0 { BUFFER_BYTES } else { ASK_BYTES };
        if auto.unasked_bytes < due_bytes {
            return;
        }
        auto.unasked_bytes = 0;
        if let Some(Delivery { bytes_per_s, is_least }) = delivery() {
            auto.costs.link.carried(bytes_per_s, is_least);
            self.choice = choose(&auto.costs, self.choice);
        }
    }

    /// Adds a page to the frame. One that is [`Encoding::Raw`] is kept by the sender until the
    /// frame is out.
    pub(crate) fn encode(&mut self, page: PageIndex, bytes: &Page) -> Encoding {
        if is_zero(bytes) {
            if let Some(cache) = &mut self.cache {
                cache.zero(page);
            }
            return Encoding::Zero;
        }
        let is_sample = self.auto.is_some() && is_sample(page);
        if self.delta(page, bytes, is_sample) {
            Encoding::Delta
        } else if self.lz4(bytes, is_sample) {
            Encoding::Lz4
        } else {
            self.pieces.push(Piece::Kept);
            Encoding::Raw
        }
    }

    fn delta(&mut self, page: PageIndex, bytes: &Page, is_sample: bool) -> bool {
        if self.is_copy {
            return false;
        }
        if !self.choice.delta && !is_sample {
            if let Some(cache) = &mut self.cache {
                cache.forget(page);
            }
            return false;
        }
        let connections = self.connections;
        let cache = self.cache.get_or_insert_with(|| Cache::new(connections));
        let began = is_sample.then(Instant::now);
        let from = begin_content(&mut self.bytes);
        let known = match cache.know(page, bytes) {
            Known::Content(old) => Some(delta::diff(old, bytes, &mut self.bytes)),
            // A page that is new tells nothing about how well pages are known.
            Known::Nothing => None,
            Known::Crowded => Some(false),
        };
        let fits = known == Some(true);
        let became = fits.then_some(self.bytes.len() - from);
        if known.is_some()
            && let Some(auto) = &mut self.auto
        {
            auto.costs.delta.became(became);
            began.into_iter().for_each(|began| auto.costs.delta.took(began.elapsed()));
        }
        self.finish(from, fits && self.choice.delta)
    }

    fn lz4(&mut self, bytes: &Page, is_sample: bool) -> bool {
        let mut is_wanted = self.choice.lz4;
        if let Some(auto) = &mut self.auto {
            if is_sample {
                auto.samples = auto.samples.wrapping_add(1);
            }
            let is_due = auto.samples % COMPRESSED_SAMPLES == 0 || !auto.costs.lz4.is_known();
            is_wanted &= !auto.is_plain();
            if !(is_wanted || is_sample && is_due) {
                return false;
            }
        } else if !is_wanted {
            return false;
        }
        let compressor = self.compressor.get_or_insert_with(Compressor::default);
        let from = begin_content(&mut self.bytes);
        if !is_wanted && compressor.compress(bytes, &mut self.bytes) {
            // A single try is cold, and takes some times what a page of many does.
            self.bytes.truncate(from);
        }
        let began = is_sample.then(Instant::now);
        let fits = compressor.compress(bytes, &mut self.bytes);
        if let Some(auto) = &mut self.auto {
            auto.costs.lz4.became(fits.then_some(self.bytes.len() - from));
            began.into_iter().for_each(|began| auto.costs.lz4.took(began.elapsed()));
        }
        self.finish(from, fits && is_wanted)
    }

    /// The content that began at `from` is sent, or was only a try.
    fn finish(&mut self, from: usize, is_sent: bool) -> bool {
        if !is_sent {
            undo_content(from, &mut self.bytes);
            return false;
        }
        let start = end_content(from, &mut self.bytes);
        match self.pieces.last_mut() {
            Some(Piece::Encoded(range)) => range.end = self.bytes.len(),
            _ => self.pieces.push(Piece::Encoded(start..self.bytes.len())),
        }
        true
    }

    /// Appends the contents of the frame to `parts`; `kept` are the raw pages in their order.
    pub(crate) fn contents<'a>(&'a self, kept: &[Part<'a>], parts: &mut Vec<Part<'a>>) {
        let mut kept = kept.iter();
        parts.extend(self.pieces.iter().map(|piece| match piece {
            Piece::Kept => *kept.next().expect("a page for each that is raw"),
            Piece::Encoded(range) => Part::from(&self.bytes[range.clone()]),
        }));
        assert!(kept.next().is_none(), "no page that is not raw");
    }

    /// The frame, of so many bytes, is out; a new one begins.
    pub(crate) fn sent(&mut self, bytes: u64, took: Duration) {
        self.pieces.clear();
        self.bytes.clear();
        if let Some(auto) = &mut self.auto {
            auto.sent(bytes, took, auto.is_plain() || !self.choice.lz4);
            self.choice = choose(&auto.costs, self.choice);
        }
    }
}

impl Auto {
    /// Whether this frame shows what writing takes.
    fn is_plain(&self) -> bool {
        self.until_plain_bytes == 0
    }

    fn sent(&mut self, bytes: u64, took: Duration, is_plain: bool) {
        self.until_plain_bytes = match is_plain {
            true => bytes * PLAIN_PARTS,
            false => self.until_plain_bytes.saturating_sub(bytes),
        };
        if self.job_bytes >= BUFFER_BYTES && bytes >= LINK_FRAME_BYTES {
            self.costs.link.took(bytes, took);
        }
        self.job_bytes += bytes;
        self.unasked_bytes += bytes;
    }
}

fn is_sample(page: PageIndex) -> bool {
    page.0.wrapping_mul(0xD6E8_FEB8_6659_FD93) >> 32 & (SAMPLE_PAGES - 1) == 0
}

/// Whether a page is all zero; fails at the first word of most pages that are not.
pub(crate) fn is_zero(page: &Page) -> bool {
    let (chunks, _) = page.as_chunks::<64>();
    chunks.iter().all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}
