//! Pages on a data connection: runs, then the contents of those that have any.
//!
//! ```text
//! Pages:    | epoch u64 | runs u32 | 0 u32 | run ... | contents ... |
//! run:      | first u64 | count u32 | encoding u32 |
//! contents: in the order of the runs, for each page of encoding
//!           0 zero    nothing
//!           1 raw     | 4096 bytes |
//!           2 delta   | length u16 | delta |      see `encode::delta`: 2048 bytes at most
//!           3 lz4     | length u16 | block |      see `encode::lz4`: 3584 bytes at most
//! End:      | epoch u64 | frames u64 | pages u64 | digest u32 |
//! ```
//!
//! Epoch 0 is the first sync: such pages go straight into the backup's image, and none of them is a
//! delta. A delta changes the page that the image has once the epoch before is applied. All pages
//! of one aligned group of 64 travel on the same connection, so a page never overtakes an older copy,
//! and no delta the page that it is for: group g on data connection g mod connections + 1. A backup
//! refuses them on another.

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
/// Of the length of a page's content, where it has one.
pub(super) const LENGTH_BYTES: usize = 2;
pub(super) const PAGES_BYTES_MAX: usize =
    PREFIX_BYTES + RUNS_MAX * RUN_BYTES + RAW_PAGES_MAX * PAGE_SIZE;
pub(super) const END_BYTES: usize = 28;

/// How the contents of pages are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Encoding {
    /// All bytes are zero: there is no content.
    Zero = 0,
    /// The page as it is.
    Raw = 1,
    /// What changed in it.
    Delta = 2,
    /// An LZ4 block.
    Lz4 = 3,
}

impl Encoding {
    fn from_number(number: u32) -> Option<Self> {
        let all = [Self::Zero, Self::Raw, Self::Delta, Self::Lz4];
        all.into_iter().find(|encoding| u32::from(*encoding as u8) == number)
    }

    /// Whether the content of each page tells its own length.
    #[must_use]
    pub fn has_length(self) -> bool {
        matches!(self, Self::Delta | Self::Lz4)
    }
}

/// Consecutive pages of one encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    pub first: PageIndex,
    pub count: u32,
    pub encoding: Encoding,
}

/// Runs that fit one frame.
#[derive(Clone, Debug, Default)]
pub struct Runs {
    runs: Vec<Run>,
    with_content: usize,
    pages: usize,
}

impl Runs {
    /// Adds a page; `false` if the frame is full and must go first.
    pub fn push(&mut self, page: PageIndex, encoding: Encoding) -> bool {
        let has_content = encoding != Encoding::Zero;
        if has_content && self.with_content == RAW_PAGES_MAX || self.pages == FRAME_PAGES_MAX {
            return false;
        }
        if let Some(last) = self.runs.last_mut()
            && last.encoding == encoding
            && last.first.0 + u64::from(last.count) == page.0
        {
            last.count += 1;
        } else if self.runs.len() == RUNS_MAX {
            return false;
        } else {
            self.runs.push(Run { first: page, count: 1, encoding });
        }
        self.with_content += usize::from(has_content);
        self.pages += 1;
        true
    }

    /// Whether there may be no room for another page.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.with_content == RAW_PAGES_MAX
            || self.pages == FRAME_PAGES_MAX
            || self.runs.len() == RUNS_MAX
    }

    /// Whether `pages` more fit, whatever they are.
    #[must_use]
    pub fn has_room(&self, pages: usize) -> bool {
        self.with_content + pages <= RAW_PAGES_MAX
            && self.pages + pages <= FRAME_PAGES_MAX
            && self.runs.len() + pages <= RUNS_MAX
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
        self.with_content = 0;
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
    fn pages_of(&self, wanted: impl Fn(Encoding) -> bool) -> usize {
        let runs = self.runs.iter().filter(|run| wanted(run.encoding));
        runs.map(|run| usize::try_from(run.count).expect("checked when decoded")).sum()
    }

    /// Number of pages, zero or not.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.runs.iter().fold(0, |sum, run| sum.saturating_add(run.count.into()))
    }

    /// Bytes of the pages that are sent as they are.
    #[must_use]
    pub fn raw_bytes(&self) -> usize {
        self.pages_of(|encoding| encoding == Encoding::Raw) * PAGE_SIZE
    }

    /// Whether any content has a length of its own.
    #[must_use]
    pub fn has_encoded(&self) -> bool {
        self.runs.iter().any(|run| run.encoding.has_length())
    }

    /// Whether contents of `bytes` bytes can be those of the runs.
    #[must_use]
    pub fn fits(&self, bytes: usize) -> bool {
        let encoded = self.pages_of(Encoding::has_length);
        let least = self.raw_bytes() + encoded * LENGTH_BYTES;
        let most = self.raw_bytes() + encoded * PAGE_SIZE;
        (least..=most).contains(&bytes)
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
        out.extend(u32::from(run.encoding as u8).to_le_bytes());
    }
}

/// Reads the part of a pages frame before the contents by `read`, which fills a buffer from the
/// payload or says that it is too short. `universe` is the number of pages of the memory; every
/// run lies inside. The contents are what is left of the frame, if [`PagesHeader::fits`] says so.
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
    let mut with_content = 0u64;
    let mut fields = Fields { kind: Kind::Pages, rest: bytes };
    for _ in 0..count {
        let first = PageIndex(fields.u64()?);
        let count = fields.u32()?;
        let Some(encoding) = Encoding::from_number(fields.u32()?) else {
            return malformed("encoding");
        };
        if encoding == Encoding::Delta && into.epoch == EpochId(0) {
            return malformed("a delta in a first copy");
        }
        if count == 0 || first.0.checked_add(count.into()).is_none_or(|end| end > universe) {
            return malformed("run outside the memory");
        }
        with_content += if encoding == Encoding::Zero { 0 } else { u64::from(count) };
        into.runs.push(Run { first, count, encoding });
    }
    if with_content > RAW_PAGES_MAX as u64 {
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
