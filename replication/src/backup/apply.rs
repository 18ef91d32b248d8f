//! Pages into the image. Called only for an epoch that is whole, checked and acknowledged, or
//! during the first copy, when there is nothing to lose.

use thiserror::Error;
use vm_memory::{Bytes, GuestMemoryBackend};

use crate::checking::reach;
use crate::encode::delta;
use crate::ids::{PAGE_SIZE, PageIndex};
use crate::ram::{Ram, Slice};
use crate::wire::{Encoding, Run, take_content};

/// Our own bookkeeping is wrong: everything was checked before.
#[derive(Debug, Error)]
#[error("Page {0} cannot be written")]
pub(super) struct ApplyError(PageIndex);

static ZERO: [u8; 64 * PAGE_SIZE] = [0; 64 * PAGE_SIZE];

/// Writes `runs`, whose staged contents are `bytes`. Deltas are for the image as it is.
pub(super) fn apply(ram: &Ram, runs: &[Run], bytes: &[u8]) -> Result<(), ApplyError> {
    let mut bytes = bytes;
    for (at, run) in runs.iter().enumerate() {
        if at > 0 && at == runs.len() / 2 {
            reach("applying");
        }
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

/// Hands the memory of a run's pages to `fill`, in as few pieces as there are regions in it.
pub(super) fn memory_of<E: From<ApplyError>>(
    ram: &Ram,
    run: &Run,
    mut fill: impl FnMut(&Slice<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let end = PageIndex(run.first.0 + u64::from(run.count));
    let mut page = run.first;
    while page < end {
        let count = contiguous(ram, page, end.0 - page.0);
        let bytes = usize::try_from(count).unwrap_or(0) * PAGE_SIZE;
        let address = ram.address(page).ok_or(ApplyError(page))?;
        let memory = ram.mapping().get_slice(address, bytes).map_err(|_| ApplyError(page))?;
        fill(&memory)?;
        page = PageIndex(page.0 + count);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::memory;

    #[test]
    fn the_memory_of_a_run_may_lie_in_several_regions() {
        let ram = memory(&[(0, 4), (0x10_0000, 4)]);
        let lengths = |first, count| {
            let run = Run { first: PageIndex(first), count, encoding: Encoding::Raw };
            let mut lengths = vec![];
            let each = |memory: &Slice<'_>| {
                lengths.push(memory.len() / PAGE_SIZE);
                memory.write_slice(&[7], 0).map_err(|_| ApplyError(run.first))
            };
            memory_of(&ram, &run, each).map(|()| lengths)
        };
        assert_eq!(lengths(1, 2).unwrap(), [2]);
        assert_eq!(lengths(2, 5).unwrap(), [2, 3]);
        let mut page = [0; PAGE_SIZE];
        for (at, content) in [(0, 0), (1, 7), (2, 7), (3, 0), (4, 7), (5, 0)] {
            assert!(ram.read_page(PageIndex(at), &mut page));
            assert_eq!(page[0], content, "page {at}");
        }
        assert!(lengths(6, 3).is_err(), "past the end");
    }
}
