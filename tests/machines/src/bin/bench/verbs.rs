//! Bare verbs into memory of the same freshness as a backup's: what a first copy by RDMA costs a device and
//! the kernel, with nothing of a VMM in it.
//!
//! Enters: the device that a pair used. Leaves: MiB a second, registering on both sides included. Both ends are
//! in this process.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use api::config::MemoryConfig;
use api::replication::RdmaPath;
use crossbeam_channel::{Receiver, bounded};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rdma::{
    Access, Completion, CompletionChannel, CompletionQueue, ConnectOptions, Context, Depths,
    LentMemory, Library, Operation, Origin, ProtectionDomain, QueuePair, Remote, Request,
    RequestList,
};
use replication::ram::Mapping;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm::memory::Memory;

use crate::perftest::MESSAGE_BYTES;
use crate::samples::float;

/// What is registered at a time, as the product does.
const PIECE: usize = 8 << 20;
const PIECE_BYTES: u64 = PIECE as u64;
const MESSAGE: u32 = 1 << 20;
const _: () = assert!(MESSAGE as u64 == MESSAGE_BYTES);
const PIECE_MESSAGES: u32 = 8;
const _: () = assert!(PIECE_MESSAGES as u64 * MESSAGE_BYTES == PIECE_BYTES);
/// WRITEs that were posted and have not completed.
const FLIGHT_MAX: u32 = 16;
const LIMIT: Duration = Duration::from_secs(300);

/// What a copy took.
pub struct Took {
    /// All of it: until the memory that was written is its owner's alone again.
    pub all: Duration,
    /// What registering took each side's thread.
    pub registering: [Duration; 2],
    /// To give back what a peer could write.
    pub returning: Duration,
}

impl Took {
    pub fn note(&self) -> String {
        let [ours, theirs] = self.registering.map(|time| time.as_millis());
        format!(
            "verbs, fresh: {} ms; beside each other the source's pages were registered for {ours} ms and the \
             target's, which had to be made, for {theirs}; to give the target back took {} ms",
            self.all.as_millis(),
            self.returning.as_millis()
        )
    }
}

/// A device, and a memory of which every page has a content.
pub struct Verbs {
    path: RdmaPath,
    context: Arc<Context>,
    source: Memory,
}

/// One end of a connection.
struct End {
    queue_pair: QueuePair,
    queue: Arc<CompletionQueue>,
    channel: Arc<CompletionChannel>,
}

impl Verbs {
    /// `bytes`: a multiple of 8 MiB.
    pub fn new(path: &RdmaPath, bytes: u64) -> Result<Self> {
        ensure!(
            bytes > 0 && bytes.is_multiple_of(PIECE_BYTES),
            "{bytes} bytes are no whole pieces"
        );
        let context = Context::open(&Library::load()?, &path.device)?;
        let source = Memory::new(&MemoryConfig { size: bytes, ..MemoryConfig::default() })?;
        let page: Vec<u8> = (0..4096_u32).map(|at| u8::try_from(at % 251).unwrap_or(1)).collect();
        for at in pieces(source.mapping()) {
            for offset in (0..PIECE_BYTES).step_by(page.len()) {
                source.mapping().write_slice(&page, GuestAddress(at.0 + offset))?;
            }
        }
        Ok(Self { path: path.clone(), context, source })
    }

    fn end(&self, domain: &Arc<ProtectionDomain>) -> Result<End> {
        let channel = CompletionChannel::new(&self.context)?;
        let queue = CompletionQueue::new(&self.context, 4 * FLIGHT_MAX, Some(&channel))?;
        let RdmaPath { port, gid_index, .. } = self.path;
        let origin = Origin { port, gid_index, access: Access::REMOTE_WRITE };
        let queue_pair = QueuePair::new(domain, &queue, &queue, &Depths::default(), origin)?;
        Ok(End { queue_pair, queue, channel })
    }

    /// Registers both memories beside each other, a piece at a time, writes what is registered on both sides, and
    /// gives the written one back.
    pub fn copy(&self) -> Result<Took> {
        let domains =
            [ProtectionDomain::new(&self.context)?, ProtectionDomain::new(&self.context)?];
        let (from, to) = (self.end(&domains[0])?, self.end(&domains[1])?);
        let options =
            ConnectOptions { mtu_bytes_max: self.path.mtu_bytes, ..ConnectOptions::default() };
        from.queue_pair.connect(&to.queue_pair.endpoint(), &options)?;
        to.queue_pair.connect(&from.queue_pair.endpoint(), &options)?;
        let target =
            Memory::new(&MemoryConfig { size: self.source.size(), ..MemoryConfig::default() })?;
        let began = Instant::now();
        let took = std::thread::scope(|scope| -> Result<Took> {
            let (sources, ours) = register(scope, &domains[0], self.source.mapping(), false);
            let (targets, theirs) = register(scope, &domains[1], target.mapping(), true);
            let pieces = self.source.size() / PIECE_BYTES;
            let (mut read, mut written) = (vec![], vec![]);
            let mut flight = Flight::new(&from);
            for _ in 0..pieces {
                let ends = "a memory could not be registered";
                // Whoever cannot go on says why when it is joined.
                let (Ok(source), Ok(target)) = (sources.recv(), targets.recv()) else {
                    ours.join().expect("it does not panic").context(ends)?;
                    theirs.join().expect("it does not panic").context(ends)?;
                    anyhow::bail!(ends);
                };
                flight.write(&source, &target)?;
                read.push(source);
                written.push(target);
            }
            flight.land()?;
            let returning = Instant::now();
            written.into_iter().try_for_each(LentMemory::end)?;
            let (all, returning) = (began.elapsed(), returning.elapsed());
            let registering = [
                ours.join().expect("it does not panic")?,
                theirs.join().expect("it does not panic")?,
            ];
            Ok(Took { all, registering, returning })
        })?;
        self.is_equal(&target)?;
        Ok(took)
    }

    fn is_equal(&self, target: &Memory) -> Result<()> {
        let (mut sent, mut came) = (vec![0; 4096], vec![0; 4096]);
        for at in pieces(target.mapping()) {
            let last = GuestAddress(at.0 + PIECE_BYTES - 4096);
            self.source.mapping().read_slice(&mut sent, last)?;
            target.mapping().read_slice(&mut came, last)?;
            ensure!(sent == came, "what was written did not arrive");
        }
        Ok(())
    }
}

type Registering<'scope> = std::thread::ScopedJoinHandle<'scope, Result<Duration, rdma::Error>>;

/// Registers a memory's pieces in their order by a thread of its own.
fn register<'scope>(
    scope: &'scope std::thread::Scope<'scope, '_>,
    domain: &Arc<ProtectionDomain>,
    memory: &Arc<Mapping>,
    is_written: bool,
) -> (Receiver<LentMemory>, Registering<'scope>) {
    let (domain, memory) = (Arc::clone(domain), Arc::clone(memory));
    let places = pieces(&memory);
    let (ready, pieces) = bounded(places.len());
    let body = move || {
        let began = Instant::now();
        for at in places {
            let piece = if is_written {
                LentMemory::open(&domain, &memory, at, PIECE)?
            } else {
                LentMemory::register(&domain, &memory, at, PIECE)?
            };
            // Full it never is; nobody waits for more once the copy failed.
            if ready.send(piece).is_err() {
                break;
            }
        }
        Ok(began.elapsed())
    };
    (pieces, scope.spawn(body))
}

/// WRITEs under way.
struct Flight<'a> {
    end: &'a End,
    list: RequestList,
    under_way: u32,
    began: Instant,
}

impl<'a> Flight<'a> {
    fn new(end: &'a End) -> Self {
        Self { end, list: RequestList::with_capacity(1, 1, 0), under_way: 0, began: Instant::now() }
    }

    fn write(&mut self, source: &LentMemory, target: &LentMemory) -> Result<()> {
        let Remote { address, key } = target.remote();
        for message in 0..PIECE_MESSAGES {
            while self.under_way == FLIGHT_MAX {
                self.await_some()?;
            }
            let offset = u64::from(message) * MESSAGE_BYTES;
            let from = [source.segment(usize::try_from(offset)?, MESSAGE)?];
            let to = Remote { address: address + offset, key };
            let operation = Operation::Write { from: &from, to };
            self.list.clear();
            self.list.push(Request { id: 0, signalled: true, fence: false, operation });
            self.end.queue_pair.post(&mut self.list)?;
            self.under_way += 1;
        }
        Ok(())
    }

    /// Until all is there.
    fn land(&mut self) -> Result<()> {
        while self.under_way > 0 {
            self.await_some()?;
        }
        Ok(())
    }

    /// Sleeps until something completed.
    fn await_some(&mut self) -> Result<()> {
        let End { queue, channel, .. } = self.end;
        let mut done = [Completion::default(); FLIGHT_MAX as usize];
        loop {
            // What completes after this wakes.
            queue.arm()?;
            let count = queue.poll(&mut done)?;
            for completion in &done[..count] {
                completion.succeeded()?;
                self.under_way -= 1;
            }
            if count > 0 {
                return Ok(());
            }
            ensure!(self.began.elapsed() < LIMIT, "a WRITE does not complete");
            poll(
                &mut [PollFd::new(channel.as_fd(), PollFlags::POLLIN)],
                PollTimeout::from(1000_u16),
            )?;
            channel.take_wakeups()?;
        }
    }
}

fn pieces(memory: &Mapping) -> Vec<GuestAddress> {
    let of_region = |start: GuestAddress, bytes: u64| {
        (0..bytes).step_by(PIECE).map(move |offset| GuestAddress(start.0 + offset))
    };
    memory.iter().flat_map(|region| of_region(region.start_addr(), region.len())).collect()
}

/// MiB a second.
pub fn rate(bytes: u64, took: &Took) -> f64 {
    float(bytes >> 20) / took.all.as_secs_f64()
}
