//! A data connection by RDMA: its bytes are written into the backup's memory, without the backup's
//! processor and without a system call for each of its packets.
//!
//! ```text
//! primary                                            backup
//!   TCP: Hello(n), Verbs (queue pair)        ->
//!                                            <-       TCP: Verbs (queue pair, ring)
//!   WRITE, WRITE with immediate (its bytes)  =>       ring, and a completion
//!                                            <-       TCP: how much was read, now and then
//! ```
//!
//! What the primary writes is gathered: heads and encoded pages from a ring of its own, as large as the
//! backup's, pages that stay as they are from guest memory itself ([`gather`], [`lent`]). Who waits for
//! that is told when the last WRITE that reads them has completed ([`flight`]).
//!
//! In a copy, which nobody could start yet, whole pages are written straight into the backup's image
//! ([`Stream::place`]), for as long as the backup has opened that ([`opened`], [`window`]).
//!
//! Enters: frames, as on any [`Stream`]. Leaves: the same frames. Always holds: the backup's device writes only
//! into the ring, but for the time of a copy, so what a primary that was given up still writes reaches
//! nobody; bytes of the ring are checked like those of a socket, after they were copied out of it; no
//! more is under way than the ring has room for ([`ring`]). The TCP connection stays: its end ends
//! this one, whichever thread ends it, and all that is not bytes of frames goes over it. Verbs are called
//! by the thread that reads or writes, and by threads of their own ([`aside`]) before and after that: a
//! device that hangs keeps no other.
//!
//! A completion at the primary says that the backup's device has the bytes, not that its software
//! does: nothing here is an acknowledgement.

mod aside;
#[cfg(test)]
pub(crate) mod fake;
mod flight;
mod gather;
mod kept;
mod lent;
mod opened;
mod opening;
mod pace;
mod pieces;
mod registrar;
mod ring;
mod setup;
#[cfg(test)]
mod straight_tests;
#[cfg(test)]
mod tests;
mod window;

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::ops::{Deref, DerefMut};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ::rdma::{
    Buffer, Completion, CompletionChannel, CompletionQueue, Context, Event, Operation, Outcome,
    PortChange, ProtectionDomain, QueuePair, Remote, Request, RequestList, Segment,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use self::aside::drop_aside;
use self::flight::{Flight, Leases};
use self::gather::{Chunk, Limits, Place, Rest};
pub(crate) use self::kept::{Finds, Kept, Registered};
pub(crate) use self::lent::Lent;
pub(crate) use self::opened::{NotOpened, Opened};
use self::pace::Pace;
pub(crate) use self::pieces::{LendError, patience as registering_patience};
use self::ring::{Incoming, Outgoing, RING_BYTES};
#[cfg(test)]
pub(crate) use self::setup::FAKE;
pub(crate) use self::setup::{Adapter, Asked, CHECK_PATIENCE, Lender, SetupError};
pub(crate) use self::window::PLACED_PAGES_MAX;
use self::window::Placed;
pub use self::window::Window;
use super::{Lease, Part, Stream};
use crate::ids::{PAGE_SIZE, PageIndex};
use crate::ram::Slice;

/// Most bytes of one chunk.
const CHUNK_BYTES_MAX: usize = 1 << 20;
/// Requests that a chunk may need at least: one on each side of the ring's end.
const REQUESTS_MIN: usize = 2;
/// Bytes that are under way straight into the backup's memory when more are posted: as in a ring. More would only
/// hide how far the device is from whoever waits for it.
const PLACED_BYTES_MAX: usize = RING_BYTES;
/// Completions that are looked at at once.
const BATCH: usize = 16;
/// Bytes of a word about what was read.
const CREDIT_BYTES: usize = 8;

fn failed(error: ::rdma::Error) -> io::Error {
    io::Error::other(crate::error::chain(&error))
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what)
}

/// The numbers of a session's queue pairs. A device may stay open from one session to the next, and its word about a
/// pair of the one before be late.
#[derive(Default)]
struct Pairs(Mutex<Vec<u32>>);

impl Pairs {
    fn add(&self, pair: &QueuePair) {
        lock(&self.0).push(pair.number());
    }

    fn has(&self, number: u32) -> bool {
        lock(&self.0).contains(&number)
    }
}

/// What an end has of the device for itself.
struct Device {
    context: Arc<Context>,
    channel: Arc<CompletionChannel>,
    completions: Arc<CompletionQueue>,
    /// Of all ends of the session.
    pairs: Arc<Pairs>,
}

impl Device {
    fn new(
        domain: &ProtectionDomain,
        entries: u32,
        pairs: &Arc<Pairs>,
    ) -> Result<Self, ::rdma::Error> {
        let channel = CompletionChannel::new(domain.context())?;
        let completions = CompletionQueue::new(domain.context(), entries, Some(&channel))?;
        let (context, pairs) = (Arc::clone(domain.context()), Arc::clone(pairs));
        Ok(Self { context, channel, completions, pairs })
    }

    /// Takes what the device reports by itself. All connections of a session hear it from the same place, whoever
    /// is first: what ends any of them ends this one, and with it the session.
    fn take_events(&self) -> io::Result<()> {
        while let Some(event) = self.context.next_event().map_err(failed)? {
            tell(self.context.name(), event);
            if let Some(what) = ends(event, |number| self.pairs.has(number)) {
                return Err(io::Error::new(ErrorKind::ConnectionReset, what));
            }
        }
        match self.context.has_failed() {
            // An end of the session before may have been the one that heard it.
            true => Err(io::Error::new(ErrorKind::ConnectionReset, "The RDMA device has failed")),
            false => Ok(()),
        }
    }
}

/// Says what a device reports.
fn tell(device: &str, event: Event) {
    match event {
        // Requests are tried again for as long as the session's patience: it may come back.
        Event::Port { port, change: PortChange::Down } => {
            tracing::warn!("port {port} of the RDMA device {device} is down");
        }
        Event::Port { port, change } => {
            tracing::info!("port {port} of the RDMA device {device}: {change:?}");
        }
        Event::QueuePair { .. } | Event::Other { .. } => tracing::debug!("{device}: {event:?}"),
        Event::DeviceFailed | Event::QueuePairFailed { .. } | Event::CompletionQueueFailed => {
            tracing::warn!("the RDMA device {device} reports: {event:?}");
        }
    }
}

/// Why a session is over, if the event says so; `ours` are its queue pairs. A queue pair's end is told to one
/// connection, which need not be its own: whose it is may hear nothing else.
fn ends(event: Event, ours: impl Fn(u32) -> bool) -> Option<&'static str> {
    match event {
        Event::DeviceFailed => Some("The RDMA device has failed"),
        Event::CompletionQueueFailed => Some("A completion queue of the RDMA device ran over"),
        Event::QueuePairFailed { number } if ours(number) => {
            Some("The RDMA device reports that a queue pair has failed")
        }
        Event::QueuePairFailed { .. }
        | Event::Port { .. }
        | Event::QueuePair { .. }
        | Event::Other { .. } => None,
    }
}

/// What the handles of a connection share: how to end it. The device is no part of this: whoever has a
/// handle, an engine, does not wait for it.
struct Link {
    tcp: Mutex<Box<dyn Stream>>,
    timeout: Mutex<Option<Duration>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What of the device an end has, in the order in which it is given back.
struct Parts {
    pair: QueuePair,
    device: Device,
    /// The ring.
    local: Buffer,
}

/// One end, and what it waits for.
struct End {
    link: Arc<Link>,
    tcp: Box<dyn Stream>,
    /// `None` once it is dropped.
    parts: Option<Parts>,
    /// How long whoever drops it waits for the device.
    patience: Duration,
}

impl Deref for End {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        self.parts.as_ref().expect("an end that is not dropped")
    }
}

impl DerefMut for End {
    fn deref_mut(&mut self) -> &mut Parts {
        self.parts.as_mut().expect("an end that is not dropped")
    }
}

impl End {
    fn new(tcp: Box<dyn Stream>, parts: Parts, patience: Duration) -> io::Result<Self> {
        let second = Mutex::new(tcp.duplicate()?);
        let link = Arc::new(Link { tcp: second, timeout: Mutex::default() });
        Ok(Self { link, tcp, parts: Some(parts), patience })
    }

    /// Waits for a completion or for the TCP connection; `true`: that may have something.
    fn wait(&self) -> io::Result<bool> {
        if self.tcp.has_read_ahead() {
            return Ok(true);
        }
        let timeout = *lock(&self.link.timeout);
        let fd = self.tcp.readiness().ok_or(ErrorKind::Unsupported)?;
        let mut fds = [
            PollFd::new(fd, PollFlags::POLLIN),
            PollFd::new(self.device.channel.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.device.context.as_fd(), PollFlags::POLLIN),
        ];
        let timeout = match timeout {
            None => PollTimeout::NONE,
            Some(time) => PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX),
        };
        match poll(&mut fds, timeout) {
            Ok(0) => return Err(ErrorKind::WouldBlock.into()),
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let gone = PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL;
        if fds[1..].iter().any(|fd| fd.revents().is_some_and(|events| events.intersects(gone))) {
            return Err(io::Error::new(ErrorKind::ConnectionReset, "The RDMA device is gone"));
        }
        let [tcp, channel, events] = fds.map(|fd| fd.any().unwrap_or(true));
        if events {
            self.device.take_events()?;
        }
        if channel {
            self.device.channel.take_wakeups().map_err(failed)?;
        }
        Ok(tcp)
    }

    /// Hands each completion to `each`, with its number; an error is the connection's end.
    fn completed(&self, mut each: impl FnMut(u64, Outcome) -> io::Result<()>) -> io::Result<()> {
        let mut batch = [Completion::default(); BATCH];
        loop {
            let count = self.device.completions.poll(&mut batch).map_err(failed)?;
            for completion in &batch[..count] {
                let outcome = completion.succeeded().map_err(|failure| {
                    let text = failure.text;
                    io::Error::new(ErrorKind::ConnectionReset, format!("RDMA failed: {text}"))
                })?;
                each(completion.id, outcome)?;
            }
            if count < BATCH {
                return Ok(());
            }
        }
    }
}

impl Drop for End {
    /// The peer hears of it, whoever else has a handle to the connection. A device that answers has given
    /// up the ring when this returns; one that does not keeps the ring, which is nobody else's memory.
    fn drop(&mut self) {
        self.tcp.close();
        drop_aside(self.patience, self.parts.take());
    }
}

/// The primary's end.
struct Writer {
    /// Its ring is as large as the backup's: bytes leave from the place at which they arrive, but for
    /// those that leave from guest memory.
    end: End,
    remote: Remote,
    ring: Outgoing,
    requests: RequestList,
    segments: Vec<Segment>,
    /// Segments of a request, at most.
    segments_max: usize,
    /// What was posted and has not completed. After `end`: what it keeps is given back when the device
    /// has nothing of it any more.
    flight: Flight,
    pace: Pace,
    /// As many requests as the queue holds.
    posted_max: usize,
    lent: Arc<Lent>,
    /// For a test: the queue pair fails under so many of the chunks that read guest memory.
    fails_after: Option<u32>,
    /// Bytes of a word that is not whole yet.
    word: Vec<u8>,
}

impl Writer {
    /// Takes completions.
    fn complete(&mut self) -> io::Result<()> {
        let before = self.flight.bytes();
        let flight = &mut self.flight;
        self.end.completed(|number, _| match flight.complete(number) {
            true => Ok(()),
            false => Err(invalid("The RDMA device completed what was not under way")),
        })?;
        let bytes = before - self.flight.bytes();
        if bytes > 0 {
            self.pace.completed(bytes, Instant::now());
        }
        Ok(())
    }

    /// Something is about to be posted.
    fn under_way(&mut self, requests: usize, bytes: usize, leases: Leases) {
        if self.flight.requests() == 0 {
            self.pace.begins(Instant::now());
        }
        self.flight.post(requests, bytes, leases);
    }

    /// Takes what the backup says it has read, where the TCP connection has something.
    fn take_words(&mut self) -> io::Result<()> {
        let mut bytes = [0; 64 * CREDIT_BYTES];
        let count = match self.end.tcp.read_arrived(&mut bytes) {
            Ok(0) => return Err(ErrorKind::ConnectionReset.into()),
            Ok(count) => count,
            // Of TLS a part of a record, or a word of its own.
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        };
        self.word.extend_from_slice(&bytes[..count]);
        let (words, _) = self.word.as_chunks::<CREDIT_BYTES>();
        for word in words {
            if !self.ring.credit(u64::from_le_bytes(*word)) {
                return Err(invalid("The backup says that it has read what was not written"));
            }
        }
        let whole = words.len() * CREDIT_BYTES;
        self.word.drain(..whole);
        Ok(())
    }

    /// Bytes that may be written now, 1 at least.
    fn room(&mut self) -> io::Result<usize> {
        loop {
            self.complete()?;
            let room = if self.requests_left() < REQUESTS_MIN { 0 } else { self.ring.room() };
            if room > 0 {
                return Ok(room.min(CHUNK_BYTES_MAX));
            }
            self.sleep()?;
        }
    }

    /// See [`Stream::may_lend`].
    fn await_lending(&mut self, bytes: usize, parts: usize) -> io::Result<bool> {
        // Each part may need a segment of its own; a frame, and the ring's end, may begin another request.
        let requests = parts.div_ceil(self.segments_max) + REQUESTS_MIN * REQUESTS_MIN;
        // Of a queue that is too short for that a chunk has all, one after the other.
        let chunks = bytes.div_ceil(CHUNK_BYTES_MAX).max(requests.div_ceil(self.posted_max)) + 1;
        let (bytes_max, chunks_max) = self.ring.room_for_sure();
        if bytes > bytes_max || chunks > chunks_max {
            return Ok(false);
        }
        loop {
            self.complete()?;
            let Some(under_way) = self.pace.under_way_max(bytes) else { return Ok(false) };
            if self.requests_left() >= requests.min(self.posted_max)
                && self.ring.room() >= bytes
                && self.ring.chunks_left() >= chunks
                && self.flight.bytes() + bytes <= under_way
            {
                return Ok(true);
            }
            self.sleep()?;
        }
    }

    /// Requests that may be posted now, 1 at least. Nobody but the peer's device has to have room for them.
    fn requests_room(&mut self) -> io::Result<usize> {
        loop {
            self.complete()?;
            match self.requests_left() {
                left if left > 0 && self.flight.bytes() < PLACED_BYTES_MAX => return Ok(left),
                _ => self.sleep()?,
            }
        }
    }

    /// Posts WRITEs of guest memory into the backup's, which complete together.
    fn post_placed(&mut self, writes: &[Placed]) -> io::Result<()> {
        self.requests.clear();
        let number = self.flight.next();
        for (index, write) in writes.iter().enumerate() {
            let bytes = usize::try_from(write.pages).unwrap_or(0) * PAGE_SIZE;
            let from = [self.lent.segment(write.first, 0, bytes).map_err(failed)?];
            let operation = Operation::Write { from: &from, to: write.to };
            let signalled = index + 1 == writes.len();
            self.requests.push(Request { id: number, signalled, fence: false, operation });
        }
        // First: what was posted of a list that fails half-way is under way.
        let bytes: u64 = writes.iter().map(|write| write.pages * PAGE_SIZE as u64).sum();
        self.under_way(writes.len(), usize::try_from(bytes).unwrap_or(0), None);
        self.end.pair.post(&mut self.requests).map_err(failed)
    }

    fn requests_left(&self) -> usize {
        self.posted_max.saturating_sub(self.flight.requests())
    }

    /// Waits until something completes, or the backup says something.
    fn sleep(&mut self) -> io::Result<()> {
        self.end.device.completions.arm().map_err(failed)?;
        // What completed before it was armed wakes nobody.
        let before = self.flight.requests();
        self.complete()?;
        if self.flight.requests() == before && self.end.wait()? {
            self.take_words()?;
        }
        Ok(())
    }

    /// Writes the next chunk of `rest`, as much as there is room for; of what it reads in guest memory,
    /// `leases` end when it has.
    fn write_chunk(&mut self, rest: &mut Rest<'_, '_>, leases: &Leases) -> io::Result<usize> {
        let limits = Limits {
            bytes: self.room()?,
            writes: self.requests_left(),
            segments: self.segments_max,
            ring: RING_BYTES,
        };
        let chunk = rest.chunk(self.ring.place(), &limits, |page| self.lent.follows(page));
        let leases = if chunk.reads_memory() { leases.clone() } else { None };
        self.post(&chunk, leases)?;
        Ok(chunk.len)
    }

    fn post(&mut self, chunk: &Chunk<'_>, leases: Leases) -> io::Result<()> {
        for (at, bytes) in &chunk.copies {
            self.end.local.write(*at, bytes);
        }
        self.requests.clear();
        let number = self.flight.next();
        for (index, write) in chunk.writes.iter().enumerate() {
            self.segments.clear();
            for segment in &chunk.segments[write.segments.clone()] {
                self.segments.push(match segment.place {
                    Place::Ring { at } => {
                        let len = u32::try_from(segment.len).unwrap_or(0);
                        self.end.local.segment(at, len).map_err(failed)?
                    }
                    Place::Memory { page, offset } => {
                        self.lent.segment(page, offset, segment.len).map_err(failed)?
                    }
                });
            }
            let (from, is_last) = (&self.segments[..], index + 1 == chunk.writes.len());
            let to = Remote { address: self.remote.address + write.at as u64, ..self.remote };
            let operation = if is_last {
                let immediate = u32::try_from(chunk.len).unwrap_or(0);
                Operation::WriteWithImmediate { from, to, immediate }
            } else {
                Operation::Write { from, to }
            };
            // It completes after those before it.
            let request = Request { id: number, signalled: is_last, fence: false, operation };
            self.requests.push(request);
        }
        self.ring.write(chunk.len);
        // First: what was posted of a list that fails half-way is under way.
        self.under_way(chunk.writes.len(), chunk.len, leases);
        self.end.pair.post(&mut self.requests).map_err(failed)?;
        if chunk.reads_memory()
            && let Some(left) = &mut self.fails_after
        {
            match left.checked_sub(1) {
                Some(less) => *left = less,
                None => {
                    tracing::warn!("the queue pair fails for a test, with requests under way");
                    self.end.pair.invalidate().map_err(failed)?;
                }
            }
        }
        Ok(())
    }
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    /// Returns once the bytes are in the buffer: whose they were may change them.
    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let parts: Vec<Part<'_>> = slices.iter().map(|slice| Part::from(&**slice)).collect();
        let mut rest = Rest::new(&parts);
        if rest.is_empty() {
            return Ok(0);
        }
        self.write_chunk(&mut rest, &None)
    }

    /// Waits until the backup's device has all that was written, or the connection has failed: after the
    /// last write of an epoch nobody else would look.
    fn flush(&mut self) -> io::Result<()> {
        loop {
            self.complete()?;
            if self.flight.requests() == 0 {
                return Ok(());
            }
            self.sleep()?;
        }
    }
}

/// The backup's end.
struct Reader {
    end: End,
    ring: Incoming,
    /// For a test: the queue pair is gone, without a word to the primary, once so many chunks more have come.
    gone_after: Option<u32>,
}

impl Reader {
    /// Takes completions: chunks that have come.
    fn complete(&mut self) -> io::Result<()> {
        if self.gone_after == Some(0) {
            // As a host does whose device nobody asks any more.
            return Ok(());
        }
        let (ring, mut chunks) = (&mut self.ring, 0);
        self.end.completed(|_, outcome| {
            let Outcome::WrittenHere { immediate, .. } = outcome else {
                return Err(invalid("The primary sent what is no part of a frame"));
            };
            chunks += 1;
            if ring.arrived(immediate) {
                Ok(())
            } else {
                Err(invalid("The primary wrote more than the ring has room for"))
            }
        })?;
        if chunks > 0 {
            self.end.pair.post_empty_receives(0, chunks).map_err(failed)?;
        }
        if let Some(left) = &mut self.gone_after {
            *left = left.saturating_sub(u32::try_from(chunks).unwrap_or(u32::MAX));
            if *left == 0 {
                tracing::warn!("the queue pair is gone for a test");
                self.end.pair.invalidate().map_err(failed)?;
            }
        }
        Ok(())
    }

    /// Waits until there are bytes; `false`: the connection has ended.
    fn await_bytes(&mut self) -> io::Result<bool> {
        // What it holds needs no look at the device.
        if self.ring.unread() > 0 {
            return Ok(true);
        }
        loop {
            self.complete()?;
            if self.ring.unread() > 0 {
                return Ok(true);
            }
            self.end.device.completions.arm().map_err(failed)?;
            // What completed before it was armed wakes nobody.
            self.complete()?;
            if self.ring.unread() > 0 {
                return Ok(true);
            }
            if self.end.wait()? {
                match self.end.tcp.read_arrived(&mut [0; 1]) {
                    Ok(0) => {}
                    Ok(_) => return Err(invalid("The primary sent by TCP what goes by RDMA")),
                    // Of TLS a part of a record, or a word of its own.
                    Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
                    Err(error) => return Err(error),
                }
                // What was written before the end is here, or never comes.
                self.complete()?;
                return Ok(self.ring.unread() > 0);
            }
        }
    }
}

impl Reader {
    /// Tells the primary what is free, if it is time.
    fn tell_read(&mut self) -> io::Result<()> {
        match self.ring.credit() {
            Some(read) => self.end.tcp.write_all(&read.to_le_bytes()),
            None => Ok(()),
        }
    }
}

impl Read for Reader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if into.is_empty() || !self.await_bytes()? {
            return Ok(0);
        }
        let at = self.ring.read(into.len());
        self.end.local.read(at.offset, &mut into[..at.len]);
        self.tell_read()?;
        Ok(at.len)
    }
}

/// What a second handle of a connection can do: end it.
struct Handle {
    link: Arc<Link>,
}

fn wrong_way() -> io::Error {
    io::Error::new(ErrorKind::Unsupported, "A data connection by RDMA has one direction")
}

macro_rules! stream {
    ($end:ty, $($link:ident).+ $(; $($more:tt)*)?) => {
        impl Stream for $end {
            $($($more)*)?

            fn duplicate(&self) -> io::Result<Box<dyn Stream>> {
                Ok(Box::new(Handle { link: Arc::clone(&self.$($link).+) }))
            }

            fn close(&self) {
                lock(&self.$($link).+.tcp).close();
            }

            fn finish(&self) {
                lock(&self.$($link).+.tcp).finish();
            }

            fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
                *lock(&self.$($link).+.timeout) = timeout;
                Ok(())
            }

            // An end waits in one direction only.
            fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
                self.set_read_timeout(timeout)
            }

            fn keep_alive(&self, interval: Duration) -> io::Result<()> {
                lock(&self.$($link).+.tcp).keep_alive(interval)
            }
        }
    };
}

macro_rules! unreadable {
    ($end:ty) => {
        impl Read for $end {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(wrong_way())
            }
        }
    };
}

macro_rules! unwritable {
    ($end:ty) => {
        impl Write for $end {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(wrong_way())
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
    };
}

stream!(
    Writer,
    end.link;
    fn gathers(&self) -> bool {
        self.lent.is_ready()
    }

    fn may_lend(&mut self, bytes: usize, parts: usize) -> io::Result<bool> {
        self.await_lending(bytes, parts)
    }

    fn gather(&mut self, parts: &[Part<'_>], leases: Vec<Lease>) -> io::Result<()> {
        let leases = (!leases.is_empty()).then(|| Arc::new(leases));
        let mut rest = Rest::new(parts);
        while !rest.is_empty() {
            self.write_chunk(&mut rest, &leases)?;
        }
        Ok(())
    }

    fn place(&mut self, window: &Window, runs: &[(PageIndex, u64)]) -> io::Result<()> {
        let mut writes = Vec::with_capacity(runs.len());
        for run in runs {
            if !window.writes(*run, |page| self.lent.pages_left(page), &mut writes) {
                return Err(invalid("Pages that neither side has registered"));
            }
        }
        let mut rest = &writes[..];
        while !rest.is_empty() {
            let now;
            (now, rest) = rest.split_at(self.requests_room()?.min(rest.len()));
            self.post_placed(now)?;
        }
        Ok(())
    }
);
unreadable!(Writer);
stream!(
    Reader,
    end.link;
    /// Out of the ring, with no buffer in between.
    fn read_memory(&mut self, into: &Slice<'_>) -> io::Result<usize> {
        if into.is_empty() || !self.await_bytes()? {
            return Ok(0);
        }
        let at = self.ring.read(into.len());
        self.end.local.read_volatile(at.offset, at.len, into);
        self.tell_read()?;
        Ok(at.len)
    }
);
unwritable!(Reader);
stream!(Handle, link);
unreadable!(Handle);
unwritable!(Handle);
