//! A guest's memory, which a device reads and nobody writes through it.

use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use rdma::{Access, Error, LentMemory, Outcome};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::setup::{Bench, PAGE, completions};
use super::{post, write};

const START: GuestAddress = GuestAddress(1 << 32);

/// Two pieces of it and a buffer, in one WRITE; what was written into it after that goes with the next.
pub fn memory_of_a_guest_is_gathered(bench: &Bench) -> Result<()> {
    let (a, _b) = bench.pair()?;
    let ranges = [(GuestAddress(0), PAGE), (START, 8 * PAGE)];
    let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&ranges)?);
    let lent = LentMemory::register(bench.domain(), &memory, START, 8 * PAGE)?;
    let (head, target) = (bench.memory(Access::LOCAL_READ)?, bench.memory(Access::REMOTE_WRITE)?);
    head.fill(1);
    let page = u32::try_from(PAGE)?;
    for round in 1..4 {
        for at in 0..8 {
            let bytes = [round * 16 + u8::try_from(at)?; PAGE];
            memory.write_slice(&bytes, GuestAddress(START.0 + (at * PAGE) as u64))?;
        }
        let from = [
            head.region.segment(3, 100)?,
            lent.segment(5 * PAGE, 2 * page)?,
            lent.segment(PAGE + 10, 50)?,
        ];
        post(&a.queue_pair, write(1, &from, target.remote(77)))?;
        let done = completions(&a.queue, 1)?[0];
        ensure!(done.outcome == Outcome::Written, "{done:?}");
        let expected = [
            head.bytes(3, 100),
            vec![round * 16 + 5; PAGE],
            vec![round * 16 + 6; PAGE],
            vec![round * 16 + 1; 50],
        ];
        ensure!(target.bytes(77, 100 + 2 * PAGE + 50) == expected.concat(), "round {round}");
    }
    ensure!(lent.segment(8 * PAGE - 1, 2).is_err(), "more than was registered");
    for (start, len) in [(START, 9 * PAGE), (GuestAddress(PAGE as u64), 1)] {
        let error = LentMemory::register(bench.domain(), &memory, start, len).err();
        let error = error.context("memory that is not there was registered")?;
        ensure!(matches!(error, Error::NoMemory { .. }), "{error}");
    }
    let weak = Arc::downgrade(&memory);
    drop(memory);
    ensure!(weak.strong_count() == 1, "the mapping is held");
    lent.end()?;
    ensure!(weak.strong_count() == 0, "the mapping is kept");
    Ok(())
}
