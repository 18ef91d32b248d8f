//! Pages on a data connection: runs, then the contents of the raw ones.
//!
//! ```text
//! Pages:  | epoch u64 | runs u32 | 0 u32 | run ... | raw pages ...
//! run:    | first u64 | count u32 | encoding u32 |        encoding 0 = zero, 1 = raw
//! End:    | epoch u64 | frames u64 | pages u64 | digest u32 |
//! ```
//!
//! Epoch 0 is the first sync: such pages go straight into the backup's image. All pages of one
//! aligned group of 64 travel on the same connection, so a page never overtakes an older copy.

use super::message::Fields;
use super::{ConnectionPart, Kind, WireError};
use crate::ids::{EpochId, PAGE_SIZE, PageIndex};

/// Most pages with content in one frame.
pub const RAW_PAGES_MAX: usize = 64;
/// Most pages of any kind that a sender puts into one frame. Zero pages cost next to nothing on the
/// wire, but it takes time to look at them (the host has to make each that was never touched), and a
/// peer's progress is seen by its frames: without this bound a large and empty memory looked like a
/// sender that stands still.
pub const FRAME_PAGES_MAX: usize = 1024;
/// Most runs in one frame.
pub const RUNS_MAX: usize = 256;
const PREFIX_BYTES: usize = 16;
const RUN_BYTES: usize = 16;
pub(super) const PAGES_BYTES_MAX: usize =
    PREFIX_BYTES + RUNS_MAX * RUN_BYTES + RAW_PAGES_MAX * PAGE_SIZE;
pub(super) const END_BYTES: usize = 28;

/// Consecutive pages of one encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    pub first: PageIndex,
    pub count: u32,
    /// All bytes are zero: nothing follows. Otherwise `count` pages of content follow.
    pub zero: bool,
}

/// Runs that fit one frame.
#[derive(Clone, Debug, Default)]
pub struct Runs {
    runs: Vec<Run>,
    raw: usize,
    pages: usize,
}

impl Runs {
    /// Adds a page; `false` if the frame is full and must go first.
    pub fn push(&mut self, page: PageIndex, zero: bool) -> bool {
        if !zero && self.raw == RAW_PAGES_MAX || self.pages == FRAME_PAGES_MAX {
            return false;
        }
        if let Some(last) = self.runs.last_mut()
            && last.zero == zero
            && last.first.0 + u64::from(last.count) == page.0
        {
            last.count += 1;
        } else if self.runs.len() == RUNS_MAX {
            return false;
        } else {
            self.runs.push(Run { first: page, count: 1, zero });
        }
        self.raw += usize::from(!zero);
        self.pages += 1;
        true
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    #[must_use]
    pub fn as_slice(&self) -> &[Run] {
        &self.runs
    }

    /// Number of pages, zero or not.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages as u64
    }

    pub fn clear(&mut self) {
        self.runs.clear();
        self.raw = 0;
        self.pages = 0;
    }
}

/// The part of a pages frame before the contents.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PagesHeader {
    pub epoch: EpochId,
    pub runs: Vec<Run>,
}

impl PagesHeader {
    /// Bytes of content that follow.
    #[must_use]
    pub fn raw_bytes(&self) -> usize {
        let raw = self.runs.iter().filter(|run| !run.zero);
        raw.map(|run| usize::try_from(run.count).expect("checked when decoded") * PAGE_SIZE).sum()
    }
}

/// Writes the part of a pages frame before the contents into `out`, which is replaced.
pub fn encode_pages_header(epoch: EpochId, runs: &Runs, out: &mut Vec<u8>) {
    out.clear();
    out.extend(epoch.0.to_le_bytes());
    out.extend((runs.runs.len() as u64).to_le_bytes());
    for run in &runs.runs {
        out.extend(run.first.0.to_le_bytes());
        out.extend(run.count.to_le_bytes());
        out.extend(u32::from(!run.zero).to_le_bytes());
    }
}

/// Reads the part of a pages frame before the contents by `read`, which fills a buffer from the
/// payload or says that it is too short. `universe` is the number of pages of the memory; every
/// run lies inside. On success the contents are exactly what is left of the frame, `rest` bytes.
///
/// # Errors
/// What `read` returns, and [`WireError::Malformed`].
pub fn decode_pages_header(
    universe: u64,
    into: &mut PagesHeader,
    mut read: impl FnMut(&mut [u8]) -> Result<bool, WireError>,
) -> Result<(), WireError> {
    let malformed = |what| Err(WireError::Malformed { kind: Kind::Pages, what });
    let mut prefix = [0; PREFIX_BYTES];
    if !read(&mut prefix)? {
        return malformed("too short");
    }
    let mut fields = Fields { kind: Kind::Pages, rest: &prefix };
    into.epoch = EpochId(fields.u64()?);
    let count = fields.u64()?;
    into.runs.clear();
    let Some(count) = usize::try_from(count).ok().filter(|count| (1..=RUNS_MAX).contains(count))
    else {
        return malformed("number of runs");
    };
    let mut bytes = [0; RUNS_MAX * RUN_BYTES];
    let bytes = &mut bytes[..count * RUN_BYTES];
    if !read(bytes)? {
        return malformed("too short");
    }
    let mut raw = 0u64;
    let mut fields = Fields { kind: Kind::Pages, rest: bytes };
    for _ in 0..count {
        let first = PageIndex(fields.u64()?);
        let count = fields.u32()?;
        let zero = match fields.u32()? {
            0 => true,
            1 => false,
            _ => return malformed("encoding"),
        };
        if count == 0 || first.0.checked_add(count.into()).is_none_or(|end| end > universe) {
            return malformed("run outside the memory");
        }
        raw += if zero { 0 } else { u64::from(count) };
        into.runs.push(Run { first, count, zero });
    }
    if raw > RAW_PAGES_MAX as u64 {
        return malformed("too many pages");
    }
    Ok(())
}

/// Ends an epoch on one data connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    pub epoch: EpochId,
    pub part: ConnectionPart,
}

impl End {
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(END_BYTES);
        out.extend(self.epoch.0.to_le_bytes());
        out.extend(self.part.frames.to_le_bytes());
        out.extend(self.part.pages.to_le_bytes());
        out.extend(self.part.digest.to_le_bytes());
        out
    }

    /// # Errors
    /// [`WireError::Malformed`].
    pub fn decode(payload: &[u8]) -> Result<Self, WireError> {
        let mut from = Fields { kind: Kind::End, rest: payload };
        let epoch = EpochId(from.u64()?);
        let part = ConnectionPart { frames: from.u64()?, pages: from.u64()?, digest: from.u32()? };
        from.end()?;
        Ok(Self { epoch, part })
    }
}
