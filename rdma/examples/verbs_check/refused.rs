//! What a peer may not do, and when it may do nothing any more.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rdma::{Access, Error, Remote, Status};

use crate::setup::{self, Bench, PAGE, PAGES, Side, completions};
use crate::{post, write};

/// The status of the one completion that comes, which is of request `id`.
fn failure(side: &Side, id: u64) -> Result<Status> {
    let [completion] = completions(&side.queue, 1)?[..] else { bail!("several completions") };
    ensure!(completion.id == id, "{completion:?} instead of {id}");
    match completion.succeeded() {
        Ok(outcome) => bail!("it succeeded: {outcome:?}"),
        Err(failure) => Ok(failure.status),
    }
}

pub fn wrong_key(bench: &Bench) -> Result<()> {
    let (a, _b) = bench.pair()?;
    let (source, target) = (bench.memory(Access::LOCAL_READ)?, bench.memory(Access::REMOTE_WRITE)?);
    source.fill(5);
    let from = [source.region.segment(0, 4096)?];
    let Remote { address, key } = target.remote(0);
    post(&a.queue_pair, write(1, &from, Remote { address, key: key ^ 0x5a }))?;
    let status = failure(&a, 1)?;
    ensure!(status == Status::RemoteAccess, "{status:?}");
    post(&a.queue_pair, write(2, &from, target.remote(0)))?;
    let status = failure(&a, 2)?;
    ensure!(status == Status::Flushed, "the queue pair is not in error: {status:?}");
    target.is_all(0)
}

pub fn outside_of_region(bench: &Bench) -> Result<()> {
    let (a, _b) = bench.pair()?;
    let (source, target) = (bench.memory(Access::LOCAL_READ)?, bench.memory(Access::REMOTE_WRITE)?);
    source.fill(6);
    ensure!(source.region.segment(PAGES * PAGE - 1, 2).is_err(), "a segment outside was made");
    ensure!(source.region.segment(usize::MAX, 2).is_err(), "a segment outside was made");
    let from = [source.region.segment(0, 2)?];
    post(&a.queue_pair, write(1, &from, target.remote(PAGES * PAGE - 1)))?;
    let status = failure(&a, 1)?;
    ensure!(status == Status::RemoteAccess, "{status:?}");
    target.is_all(0)
}

pub fn region_without_remote_write(bench: &Bench) -> Result<()> {
    let (a, _b) = bench.pair()?;
    let (source, target) = (bench.memory(Access::LOCAL_READ)?, bench.memory(Access::REMOTE_READ)?);
    source.fill(7);
    let from = [source.region.segment(0, 100)?];
    post(&a.queue_pair, write(1, &from, target.remote(0)))?;
    let status = failure(&a, 1)?;
    ensure!(status == Status::RemoteAccess, "{status:?}");
    target.is_all(0)
}

pub fn region_dropped(bench: &Bench) -> Result<()> {
    let (a, _b) = bench.pair()?;
    let (source, target) = (bench.memory(Access::LOCAL_READ)?, bench.memory(Access::REMOTE_WRITE)?);
    source.fill(8);
    let (from, to) = ([source.region.segment(0, 4096)?], target.remote(0));
    let target = target.unregister();
    post(&a.queue_pair, write(1, &from, to))?;
    let status = failure(&a, 1)?;
    ensure!(status == Status::RemoteAccess, "{status:?}");
    ensure!(target.bytes(0, PAGES * PAGE).iter().all(|byte| *byte == 0), "it was written");
    // And at the near end: what was made of a region is worth nothing after it.
    let (a, _b) = bench.pair()?;
    let target = bench.memory(Access::REMOTE_WRITE)?;
    drop(source);
    post(&a.queue_pair, write(2, &from, target.remote(0))).or_else(|error| {
        ensure!(error.downcast_ref::<Error>().is_some(), "{error}");
        Ok(())
    })?;
    std::thread::sleep(Duration::from_millis(300));
    target.is_all(0)
}

/// Posts writes of the whole memory, until the queue is full, and waits until the first has begun.
fn stream(a: &Side, source: &setup::Memory, target: &setup::Memory) -> Result<()> {
    let whole = u32::try_from(PAGES * PAGE)?;
    let from = [source.region.segment(0, whole)?];
    for id in 0..u64::from(a.queue_pair.depths().sends.min(64)) {
        post(&a.queue_pair, write(id, &from, target.remote(0)))?;
    }
    let begun = Instant::now();
    while target.bytes(0, PAGE).iter().all(|byte| *byte == 0) {
        ensure!(begun.elapsed() < Duration::from_secs(10), "no write has begun");
    }
    Ok(())
}

/// Once this is called, not a byte of `target` may change.
fn stays(source: &setup::Memory, target: &setup::Bytes) -> Result<()> {
    // What is still written now, differs: the source changes at each look.
    let before = target.bytes(0, PAGES * PAGE);
    for round in 0..20 {
        source.fill(100 + round);
        std::thread::sleep(Duration::from_millis(25));
        ensure!(target.bytes(0, PAGES * PAGE) == before, "it was written after the end");
    }
    Ok(())
}

pub fn region_dropped_under_writes(bench: &Bench) -> Result<()> {
    for round in 0..5 {
        let (a, _b) = bench.pair()?;
        let source = bench.memory(Access::LOCAL_READ)?;
        let target = bench.memory(Access::REMOTE_WRITE)?;
        source.fill(1 + round);
        stream(&a, &source, &target)?;
        let target = target.unregister();
        stays(&source, &target)?;
        let failed = completions(&a.queue, 1)?.into_iter().chain(setup::rest(&a.queue)?);
        let failed: Vec<_> = failed.filter_map(|done| done.succeeded().err()).collect();
        let first = failed.first().context("all writes were done before: no test")?;
        ensure!(first.status == Status::RemoteAccess, "{first}");
    }
    Ok(())
}

pub fn queue_pair_invalidated(bench: &Bench) -> Result<()> {
    let (a, b) = bench.pair()?;
    let (source, target) = (bench.memory(Access::LOCAL_READ)?, bench.memory(Access::REMOTE_WRITE)?);
    source.fill(9);
    b.queue_pair.post_empty_receives(77, 1)?;
    b.queue_pair.invalidate()?;
    let status = failure(&b, 77)?;
    ensure!(status == Status::Flushed, "what was posted here: {status:?}");
    let from = [source.region.segment(0, 4096)?];
    post(&a.queue_pair, write(1, &from, target.remote(0)))?;
    let status = failure(&a, 1)?;
    ensure!(status == Status::NoAnswer, "{status:?}");
    target.is_all(0)
}

pub fn queue_pair_dropped_under_writes(bench: &Bench) -> Result<()> {
    for round in 0..5 {
        let (a, b) = bench.pair()?;
        let source = bench.memory(Access::LOCAL_READ)?;
        let target = bench.memory(Access::REMOTE_WRITE)?;
        source.fill(1 + round);
        stream(&a, &source, &target)?;
        drop(b);
        stays(&source, &target.bytes)?;
    }
    Ok(())
}
