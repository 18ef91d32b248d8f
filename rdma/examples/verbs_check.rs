//! Verbs on a real device: two queue pairs of this process, connected to each other.
//!
//! `verbs_check ADDRESS` uses the device whose GID is this address of the host; Soft-RoCE will do. It prints
//! a line for each check, `PASS name` or `FAIL name: why`, and exits with 1 if any failed.
//! `verbs_check ADDRESS port-event` prints `READY` and waits for the port to go down; `verbs_check ADDRESS
//! locked-memory` is started by root with a limit (ulimit -l 64) and gives its privileges up.

#[path = "verbs_check/lent.rs"]
mod lent;
#[path = "verbs_check/refused.rs"]
mod refused;
#[path = "verbs_check/setup.rs"]
mod setup;

use std::net::IpAddr;
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use rdma::{
    Access, Error, Event, Operation, Outcome, PortChange, QueuePair, Remote, Request, RequestList,
    Wanted,
};
use setup::{Bench, PAGE, PAGES, Side, completions, quiet};

type Check = fn(&Bench) -> Result<()>;

const CHECKS: &[(&str, Check)] = &[
    ("choice-of-device", choice_of_device),
    ("write-of-several-segments", write_of_several_segments),
    ("write-with-immediate", write_with_immediate),
    ("memory-of-a-guest-is-gathered", lent::memory_of_a_guest_is_gathered),
    ("inline-send", inline_send),
    ("read", read),
    ("one-completion-for-a-chain", one_completion_for_a_chain),
    ("channel-wakes-a-poll", channel_wakes_a_poll),
    ("wrong-key", refused::wrong_key),
    ("outside-of-region", refused::outside_of_region),
    ("region-without-remote-write", refused::region_without_remote_write),
    ("region-dropped", refused::region_dropped),
    ("region-dropped-under-writes", refused::region_dropped_under_writes),
    ("queue-pair-invalidated", refused::queue_pair_invalidated),
    ("queue-pair-dropped-under-writes", refused::queue_pair_dropped_under_writes),
    ("full-queue-names-the-request", full_queue_names_the_request),
    ("limits-name-the-request", limits_name_the_request),
];

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let Some(Ok(address)) = arguments.next().map(|text| text.parse::<IpAddr>()) else {
        eprintln!("usage: verbs_check ADDRESS [port-event|locked-memory]");
        return ExitCode::from(2);
    };
    let bench = match Bench::new(address) {
        Ok(bench) => bench,
        Err(error) => {
            println!("FAIL setup: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    let checks: &[(&str, Check)] = match arguments.next().as_deref() {
        Some("port-event") => &[("port-event", port_event)],
        Some(_) => &[("locked-memory", locked_memory)],
        None => CHECKS,
    };
    let mut failed = false;
    for (name, check) in checks {
        match check(&bench) {
            Ok(()) => println!("PASS {name}"),
            Err(error) => {
                println!("FAIL {name}: {error:#}");
                failed = true;
            }
        }
    }
    ExitCode::from(u8::from(failed))
}

fn write<'a>(id: u64, from: &'a [rdma::Segment], to: Remote) -> Request<'a> {
    Request { id, signalled: true, fence: false, operation: Operation::Write { from, to } }
}

fn post(queue_pair: &QueuePair, request: Request<'_>) -> Result<()> {
    let mut list = RequestList::default();
    list.push(request);
    Ok(queue_pair.post(&mut list)?)
}

fn choice_of_device(bench: &Bench) -> Result<()> {
    let devices = bench.library.devices()?;
    for device in &devices {
        println!("{device}");
    }
    let port = devices.iter().find(|device| device.name == bench.place.device);
    let port = &port.context("the chosen device is not listed")?.ports[0];
    ensure!(port.mtu_bytes.is_some_and(|bytes| bytes >= 256), "MTU {:?}", port.mtu_bytes);
    let local = "192.0.2.1".parse().ok();
    let error = Wanted { local, ..Wanted::default() }.choose(&devices).unwrap_err().to_string();
    ensure!(error.contains(&bench.place.device), "the error does not list it: {error}");
    let limits = bench.context.limits()?;
    ensure!(limits.requests_max > 0 && limits.reads_begun_max > 0, "{limits:?}");
    Ok(())
}

fn write_of_several_segments(bench: &Bench) -> Result<()> {
    let (a, b) = bench.pair()?;
    let (source, target) = (bench.memory(Access::LOCAL_READ)?, bench.memory(Access::REMOTE_WRITE)?);
    source.fill(1);
    let pieces = [(0, 4096), (2 * PAGE + 100, 3000), (5 * PAGE, 9000), (17, 1)];
    let mut expected = Vec::new();
    let mut segments = Vec::new();
    for (offset, len) in pieces {
        segments.push(source.region.segment(offset, len)?);
        expected.extend(source.bytes(offset, len as usize));
    }
    let at = 10 * PAGE + 123;
    post(&a.queue_pair, write(7, &segments, target.remote(at)))?;
    let done = completions(&a.queue, 1)?;
    ensure!(done[0].id == 7 && done[0].outcome == Outcome::Written, "{done:?}");
    ensure!(done[0].queue_pair == a.queue_pair.number(), "{done:?}");
    ensure!(target.bytes(at, expected.len()) == expected, "other bytes arrived");
    let outside = [target.bytes(0, at), target.bytes(at + expected.len(), PAGE)].concat();
    ensure!(outside.iter().all(|byte| *byte == 0), "bytes arrived elsewhere");
    quiet(&b.queue)
}

fn write_with_immediate(bench: &Bench) -> Result<()> {
    let (a, b) = bench.pair()?;
    let (source, target) = (bench.memory(Access::LOCAL_READ)?, bench.memory(Access::REMOTE_WRITE)?);
    source.fill(2);
    // More than are posted at once.
    b.queue_pair.post_empty_receives(40, 50)?;
    for round in 0..50 {
        let from = [source.region.segment(0, 5000)?, source.region.segment(PAGE, 10)?];
        let (to, immediate) = (target.remote(round), 0xDEAD_0000 + u32::try_from(round)?);
        let operation = Operation::WriteWithImmediate { from: &from, to, immediate };
        post(&a.queue_pair, Request { id: 9, signalled: true, fence: false, operation })?;
        let there = completions(&b.queue, 1)?[0];
        let expected = Outcome::WrittenHere { bytes: 5010, immediate };
        ensure!(there.id == 40 && there.outcome == expected, "{there:?}");
        ensure!(target.bytes(round, 5000) == source.bytes(0, 5000), "it came before the bytes");
        let here = completions(&a.queue, 1)?[0];
        ensure!(here.id == 9 && here.outcome == Outcome::Written, "{here:?}");
    }
    Ok(())
}

fn inline_send(bench: &Bench) -> Result<()> {
    let (a, b) = bench.pair()?;
    let target = bench.memory(Access::LOCAL_WRITE)?;
    for id in 0..3 {
        b.queue_pair.post_receive(id, &[target.region.segment(100 * usize::try_from(id)?, 64)?])?;
    }
    let mut list = RequestList::default();
    for byte in 1..=3 {
        let operation = Operation::SendInline { bytes: &[byte; 60] };
        list.push(Request { id: byte.into(), signalled: byte == 3, fence: false, operation });
    }
    a.queue_pair.post(&mut list)?;
    // The bytes are the device's already.
    list.clear();
    let operation = Operation::SendInline { bytes: &[99; 64] };
    list.push(Request { id: 4, signalled: false, fence: false, operation });
    let there = completions(&b.queue, 3)?;
    for (received, id) in there.iter().zip(0..) {
        ensure!(received.id == id, "{received:?}");
        ensure!(received.outcome == Outcome::Received { bytes: 60 }, "{received:?}");
        let bytes = target.bytes(100 * usize::try_from(id)?, 60);
        ensure!(bytes == [u8::try_from(id + 1)?; 60], "other bytes arrived");
    }
    let here = completions(&a.queue, 1)?[0];
    ensure!(here.id == 3 && here.outcome == Outcome::Sent, "{here:?}");
    Ok(())
}

fn read(bench: &Bench) -> Result<()> {
    let (a, _b) = bench.pair()?;
    let (here, there) = (bench.memory(Access::LOCAL_WRITE)?, bench.memory(Access::REMOTE_READ)?);
    there.fill(3);
    let into = [here.region.segment(50, 6000)?, here.region.segment(4 * PAGE, 2000)?];
    let operation = Operation::Read { into: &into, from: there.remote(PAGE + 1) };
    post(&a.queue_pair, Request { id: 5, signalled: true, fence: false, operation })?;
    let done = completions(&a.queue, 1)?[0];
    ensure!(matches!(done.outcome, Outcome::Read { .. }), "{done:?}");
    let read = [here.bytes(50, 6000), here.bytes(4 * PAGE, 2000)].concat();
    ensure!(read == there.bytes(PAGE + 1, 8000), "other bytes were read");
    Ok(())
}

fn one_completion_for_a_chain(bench: &Bench) -> Result<()> {
    let (a, _b) = bench.pair()?;
    let (source, target) = (bench.memory(Access::LOCAL_READ)?, bench.memory(Access::REMOTE_WRITE)?);
    source.fill(4);
    let mut list = RequestList::with_capacity(PAGES, PAGES, 0);
    // Twice around the queue: the room of what was not signalled comes back.
    for round in 0..2 * a.queue_pair.depths().sends / u32::try_from(PAGES)? + 1 {
        list.clear();
        for page in 0..PAGES {
            // The last page first.
            let from = [source.region.segment((PAGES - 1 - page) * PAGE, u32::try_from(PAGE)?)?];
            let request = write(u64::from(round), &from, target.remote(page * PAGE));
            list.push(Request { signalled: page == PAGES - 1, ..request });
        }
        a.queue_pair.post(&mut list)?;
        let done = completions(&a.queue, 1)?[0];
        ensure!(done.id == u64::from(round) && done.outcome == Outcome::Written, "{done:?}");
        for page in 0..PAGES {
            let expected = source.bytes((PAGES - 1 - page) * PAGE, PAGE);
            ensure!(target.bytes(page * PAGE, PAGE) == expected, "page {page} is another");
        }
        target.fill(0);
    }
    quiet(&a.queue)
}

fn readable(side: &Side, timeout_ms: u16) -> Result<bool> {
    let mut fds = [PollFd::new(side.channel.as_fd(), PollFlags::POLLIN)];
    Ok(poll(&mut fds, PollTimeout::from(timeout_ms))? == 1)
}

fn channel_wakes_a_poll(bench: &Bench) -> Result<()> {
    let (a, _b) = bench.pair()?;
    let (source, target) = (bench.memory(Access::LOCAL_READ)?, bench.memory(Access::REMOTE_WRITE)?);
    let from = [source.region.segment(0, 10)?];
    for round in 0..3 {
        post(&a.queue_pair, write(round, &from, target.remote(0)))?;
        completions(&a.queue, 1)?;
        ensure!(!readable(&a, 100)?, "a queue that is not armed woke");
        a.queue.arm()?;
        ensure!(!readable(&a, 100)?, "it woke without a completion");
        post(&a.queue_pair, write(round, &from, target.remote(0)))?;
        ensure!(readable(&a, 10_000)?, "nothing woke within 10 s");
        ensure!(a.channel.take_wakeups()? == 1, "several wake-ups");
        ensure!(!readable(&a, 0)? && a.channel.take_wakeups()? == 0, "it is still readable");
        ensure!(completions(&a.queue, 1)?[0].id == round, "another completion");
    }
    Ok(())
}

fn full_queue_names_the_request(bench: &Bench) -> Result<()> {
    let (a, _b) = bench.pair()?;
    let (source, target) = (bench.memory(Access::LOCAL_READ)?, bench.memory(Access::REMOTE_WRITE)?);
    let from = [source.region.segment(0, 10)?];
    let room = usize::try_from(a.queue_pair.depths().sends)?;
    let mut list = RequestList::default();
    for id in 0..2 * room as u64 + 10 {
        list.push(Request { signalled: false, ..write(id, &from, target.remote(0)) });
    }
    match a.queue_pair.post(&mut list) {
        Err(Error::Post { index, count, .. }) if index >= room && count == list.len() => Ok(()),
        other => bail!("{other:?}, with room for {room}"),
    }
}

fn limits_name_the_request(bench: &Bench) -> Result<()> {
    let (a, _b) = bench.pair()?;
    let source = bench.memory(Access::LOCAL_READ)?;
    let depths = a.queue_pair.depths();
    let too_many = vec![source.region.segment(0, 1)?; depths.send_segments as usize + 1];
    let mut list = RequestList::default();
    list.push(write(0, &too_many[1..], Remote::default()));
    list.push(write(1, &too_many, Remote::default()));
    let refused = a.queue_pair.post(&mut list);
    ensure!(matches!(refused, Err(Error::Request { index: 1, .. })), "{refused:?}");
    let bytes = vec![0; depths.inline_bytes as usize + 1];
    let operation = Operation::SendInline { bytes: &bytes };
    let request = Request { id: 0, signalled: true, fence: false, operation };
    ensure!(post(&a.queue_pair, request).is_err(), "more inline bytes than fit were posted");
    quiet(&a.queue)
}

fn port_event(bench: &Bench) -> Result<()> {
    println!("READY");
    let end = Instant::now() + Duration::from_secs(30);
    while Instant::now() < end {
        let mut fds = [PollFd::new(bench.context.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(1000_u16))?;
        while let Some(event) = bench.context.next_event()? {
            println!("{event:?}");
            if event == (Event::Port { port: bench.place.port, change: PortChange::Down }) {
                let state = bench.context.port(bench.place.port)?.state;
                ensure!(state == rdma::PortState::Down, "the port is {state:?}");
                return Ok(());
            }
        }
    }
    bail!("nothing reported within 30 s")
}

fn locked_memory(bench: &Bench) -> Result<()> {
    let nobody = nix::unistd::Uid::from_raw(65534);
    nix::unistd::setresuid(nobody, nobody, nobody)?;
    let Err(error) = bench.memory(Access::LOCAL_READ) else { bail!("the limit does not count") };
    let error = format!("{error:#}");
    println!("{error}");
    ensure!(error.contains("the limit is 65536 bytes: raise RLIMIT_MEMLOCK"), "{error}");
    Ok(())
}
