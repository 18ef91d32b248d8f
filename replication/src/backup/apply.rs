//! Pages into the image. Called only for an epoch that is whole, checked and acknowledged, or
//! during the first copy, when there is nothing to lose.

use thiserror::Error;
use vm_memory::{Bytes, GuestMemoryBackend};

use crate::encode::delta;
use crate::ids::{PAGE_SIZE, PageIndex};
use crate::ram::Ram;
use crate::wire::{Encoding, Run, take_content};

/// Our own bookkeeping is wrong: everything was checked before.
#[derive(Debug, Error)]
#[error("Page {0} cannot be written")]
pub(super) struct ApplyError(PageIndex);

static ZERO: [u8; 64 * PAGE_SIZE] = [0; 64 * PAGE_SIZE];

/// Writes `runs`, whose staged contents are `bytes`. Deltas are for the image as it is.
pub(super) fn apply(ram: &Ram, runs: &[Run], bytes: &[u8]) -> Result<(), ApplyError> {
    let mut bytes = bytes;
    for run in runs {
        let end = PageIndex(run.first.0 + u64::from(run.count));
        match run.encoding {
            Encoding::Delta => apply_deltas(ram, run.first, end, &mut bytes)?,
            Encoding::Zero => write(ram, run.first, end, |_| Some(&ZERO[..]))?,
            Encoding::Raw => write(ram, run.first, end, |size| {
                let (from, rest) = bytes.split_at_checked(size)?;
                bytes = rest;
                Some(from)
            })?,
            // Decoded before it was staged.
            Encoding::Lz4 => return Err(ApplyError(run.first)),
        }
    }
    Ok(())
}

/// Writes whole pages; `take` gives so many bytes of contents at least.
fn write<'a>(
    ram: &Ram,
    first: PageIndex,
    end: PageIndex,
    mut take: impl FnMut(usize) -> Option<&'a [u8]>,
) -> Result<(), ApplyError> {
    let mut page = first;
    while page < end {
        // A run of the wire may cross from one region into the next.
        let count = contiguous(ram, page, (end.0 - page.0).min(64));
        let size = usize::try_from(count).unwrap_or(0) * PAGE_SIZE;
        let address = ram.address(page).ok_or(ApplyError(page))?;
        let from = take(size).and_then(|from| from.get(..size)).ok_or(ApplyError(page))?;
        ram.mapping().write_slice(from, address).map_err(|_| ApplyError(page))?;
        page = PageIndex(page.0 + count);
    }
    Ok(())
}

fn apply_deltas(
    ram: &Ram,
    first: PageIndex,
    end: PageIndex,
    bytes: &mut &[u8],
) -> Result<(), ApplyError> {
    for page in (first.0..end.0).map(PageIndex) {
        let delta = take_content(Encoding::Delta, bytes).map_err(|_| ApplyError(page))?;
        let address = ram.address(page).ok_or(ApplyError(page))?;
        let memory = ram.mapping().get_slice(address, PAGE_SIZE).map_err(|_| ApplyError(page))?;
        for range in delta::ranges(delta) {
            let (at, new) = range.map_err(|_| ApplyError(page))?;
            memory.write_slice(new, at).map_err(|_| ApplyError(page))?;
        }
    }
    Ok(())
}

/// How many of `most` pages from `page` on lie in one region; 1 at least.
fn contiguous(ram: &Ram, page: PageIndex, most: u64) -> u64 {
    let after = ram.regions().partition_point(|region| region.first <= page);
    let region = after.checked_sub(1).and_then(|at| ram.regions().get(at));
    let end = region.map_or(0, |region| region.first.0 + region.pages);
    end.saturating_sub(page.0).clamp(1, most)
}
