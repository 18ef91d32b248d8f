//! Pages into the image. Called only for an epoch that is whole, checked and acknowledged, or
//! during the first copy, when there is nothing to lose.

use thiserror::Error;
use vm_memory::Bytes;

use crate::ids::{PAGE_SIZE, PageIndex};
use crate::ram::Ram;
use crate::wire::Run;

/// Our own bookkeeping is wrong: everything was checked before.
#[derive(Debug, Error)]
#[error("Page {0} cannot be written")]
pub(super) struct ApplyError(PageIndex);

static ZERO: [u8; 64 * PAGE_SIZE] = [0; 64 * PAGE_SIZE];

/// Writes `runs`, whose contents are `bytes`.
pub(super) fn apply(ram: &Ram, runs: &[Run], bytes: &[u8]) -> Result<(), ApplyError> {
    let mut bytes = bytes;
    for run in runs {
        let mut page = run.first;
        let mut left = u64::from(run.count);
        while left > 0 {
            // A run of the wire may cross from one region into the next.
            let count = contiguous(ram, page, left.min(64));
            let size = usize::try_from(count).unwrap_or(0) * PAGE_SIZE;
            let address = ram.address(page).ok_or(ApplyError(page))?;
            let from = if run.zero {
                &ZERO[..size]
            } else {
                let (from, rest) = bytes.split_at_checked(size).ok_or(ApplyError(page))?;
                bytes = rest;
                from
            };
            ram.mapping().write_slice(from, address).map_err(|_| ApplyError(page))?;
            page = PageIndex(page.0 + count);
            left -= count;
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
