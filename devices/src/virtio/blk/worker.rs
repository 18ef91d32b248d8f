//! How requests go from a ring to the host and back.
//!
//! ```text
//!   worker (one a queue):   wait ─▶ take ─▶ dispatch ─▶ wait
//!                                    │          │
//!                                    ▼          ▼
//!                                 Schedule ─▶ Engine
//!                                               │
//!   thread of the engine:            finish ◀───┘ ─▶ dispatch
//! ```
//!
//! Each arrow that touches the guest holds a pass of the turnstile and a place in the session, for
//! one request or for reading a few chains. What is taken under one pass is in the schedule at its
//! end, and what is answered is not: a state that is saved while parked has all that is in flight.
//!
//! Order of locks: pass, session, ring or schedule. None is held when an I/O is submitted.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

use tracing::debug;

use super::buffer::{BUFFER_BYTES_MAX, Buffer, BufferPool, cost_bytes};
use super::chain::{Table, walk};
use super::config::BlkConfig;
use super::engine::{Durability, Engine, Io, Operation};
use super::image::Image;
use super::layout::{F_DISCARD, F_FLUSH, F_WRITE_ZEROES};
use super::request::{Parsed, Request, Rules, Status, Task, parse};
use super::schedule::{Schedule, Ticket};
use super::session::{Inside, Session, Taken};
use super::write_log::{Change, Room, WriteLog};
use crate::counters::Counter;
use crate::virtio::turnstile::Turnstile;

/// Most chains read under one pass.
const BATCH: usize = 16;

/// A request on its way.
#[derive(Clone)]
pub(super) struct Work {
    session: Arc<Session>,
    /// The queue's place in the session.
    queue: usize,
    pub(super) head: u16,
    request: Arc<Request>,
    /// Bytes of data that are done.
    done: u64,
}

/// What `vm.counters` shows.
#[derive(Debug, Default)]
pub(super) struct BlkCounters {
    pub(super) read_bytes: Counter,
    pub(super) write_bytes: Counter,
    pub(super) read_ops: Counter,
    pub(super) write_ops: Counter,
    pub(super) flush_ops: Counter,
    pub(super) discard_ops: Counter,
    pub(super) write_zeroes_ops: Counter,
    /// Requests that were answered by an error, whoever is to blame.
    pub(super) errors: Counter,
    /// Requests that had to wait for their epoch, and the data of the writes among them.
    pub(super) held_ops: Counter,
    pub(super) held_bytes: Counter,
    /// Changes that were told to a log, and the data among them.
    pub(super) logged_ops: Counter,
    pub(super) logged_bytes: Counter,
}

/// What the threads of a disk share.
pub(super) struct Core {
    pub(super) turnstile: Turnstile,
    pub(super) engine: OnceLock<Arc<dyn Engine>>,
    pub(super) log: RwLock<Option<Arc<dyn WriteLog>>>,
    /// Taken out when the disk ends or is given up: its lock ends with its last user.
    pub(super) image: Mutex<Option<Arc<dyn Image>>>,
    pub(super) counters: BlkCounters,
    pub(super) identification: [u8; 20],
    pub(super) durability: Durability,
    schedule: Mutex<Schedule<Work>>,
    pub(super) buffers: BufferPool,
}

impl Work {
    /// The number of its queue.
    pub(super) fn queue_index(&self) -> u16 {
        self.session.queues[self.queue].index()
    }

    /// Bytes of data of the next piece.
    fn piece_bytes(&self) -> usize {
        let left = self.request.data.len() - self.done;
        usize::try_from(left).unwrap_or(usize::MAX).min(BUFFER_BYTES_MAX)
    }
}

/// A worker's life. `rules` is what the session's driver may ask for.
pub(super) fn run(core: &Arc<Core>, session: &Arc<Session>, queue: usize, rules: Rules) {
    while let Some(more) = core.turn(session, queue, rules) {
        if !more && !session.queues[queue].wait() {
            return;
        }
    }
}

/// What a driver with these features may ask for.
pub(super) fn rules(features: u64, capacity_sectors: u64, config: &BlkConfig) -> Rules {
    Rules {
        capacity_sectors,
        readonly: config.readonly,
        unmap: config.sparse,
        discard: features & F_DISCARD != 0,
        write_zeroes: features & F_WRITE_ZEROES != 0,
    }
}

impl Core {
    pub(super) fn new(identification: [u8; 20]) -> Self {
        Self {
            turnstile: Turnstile::default(),
            engine: OnceLock::new(),
            log: RwLock::default(),
            image: Mutex::default(),
            counters: BlkCounters::default(),
            identification,
            durability: Durability::default(),
            schedule: Mutex::new(Schedule::new()),
            buffers: BufferPool::default(),
        }
    }

    pub(super) fn schedule(&self) -> MutexGuard<'_, Schedule<Work>> {
        self.schedule.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads some chains of a queue and gives the host what may start. False if there are no more
    /// chains; none if the session is closed.
    pub(super) fn turn(
        self: &Arc<Self>,
        session: &Arc<Session>,
        queue: usize,
        rules: Rules,
    ) -> Option<bool> {
        let more = self.take(session, queue, rules)?;
        self.dispatch();
        Some(more)
    }

    /// Reads some chains of a queue. False if there are no more; none if the session is closed.
    fn take(&self, session: &Arc<Session>, queue: usize, rules: Rules) -> Option<bool> {
        let _pass = self.turnstile.enter();
        let inside = session.enter()?;
        for _ in 0..BATCH {
            match inside.take(queue) {
                Taken::Head(head, table) => {
                    self.accept(&inside, session, queue, head, table, rules);
                }
                Taken::Empty => {
                    if session.stopped() {
                        self.schedule().abandon(session.id());
                    }
                    return Some(false);
                }
            }
        }
        Some(true)
    }

    /// Answers a chain that needs no host, or puts it in its place among the others.
    fn accept(
        &self,
        inside: &Inside<'_>,
        session: &Arc<Session>,
        queue: usize,
        head: u16,
        table: Table,
        rules: Rules,
    ) {
        let parsed = match walk(&session.memory, table, head) {
            Ok(chain) => parse(&session.memory, chain, rules),
            Err(error) => {
                debug!(%error, head, "A disk's request cannot be answered");
                self.counters.errors.add(1);
                return inside.answer(queue, head, None, 0);
            }
        };
        match parsed {
            Parsed::Io(request) => self.insert(session, queue, head, request),
            Parsed::Identify { data, status } => {
                data.write(&session.memory, 0, &self.identification);
                inside.answer(queue, head, Some((status, Status::Ok)), 21);
            }
            Parsed::Refused { code, status } => {
                self.counters.errors.add(1);
                inside.answer(queue, head, Some((status, code)), 1);
            }
        }
    }

    fn insert(&self, session: &Arc<Session>, queue: usize, head: u16, request: Request) {
        let access = request.access();
        let (output, data_bytes) = (access.is_output(), access.data_bytes);
        let (session, request) = (Arc::clone(session), Arc::new(request));
        let id = session.id();
        let work = Work { session, queue, head, request, done: 0 };
        let cost = cost_bytes(work.piece_bytes());
        let mut schedule = self.schedule();
        let (_, waker) = schedule.insert(id, access, cost, work);
        let held = output && schedule.holds();
        drop(schedule);
        if held {
            self.counters.held_ops.add(1);
            self.counters.held_bytes.add(data_bytes);
        }
        if let Some(waker) = waker {
            waker();
        }
    }

    pub(super) fn log(&self) -> Option<Arc<dyn WriteLog>> {
        self.log.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn image(&self) -> Option<Arc<dyn Image>> {
        self.image.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Gives the host what may start. A log that is full lets reads through only.
    pub(super) fn dispatch(self: &Arc<Self>) {
        let Some(engine) = self.engine.get() else { return };
        loop {
            let log = self.log();
            let mut room = log.as_ref().and_then(Room::reserve);
            let all = log.is_none() || room.is_some();
            let pass = self.turnstile.enter();
            let Some((ticket, work)) = self.schedule().start(all) else { return };
            let io = self.prepare(&work);
            if io.is_none() {
                self.schedule().finish(ticket);
            }
            drop(pass);
            let Some(io) = io else { continue };
            if io.operation == Operation::Read {
                room = None;
            } else if let Some(room) = &mut room {
                room.shrink(io.buffer.bytes().len());
            }
            let core = Arc::clone(self);
            let done = move |io, result| core.finish(ticket, work, io, result, room);
            engine.submit(io, Box::new(done));
        }
    }

    /// The next I/O of a request, with what the guest wants written. None if there is none to do.
    fn prepare(&self, work: &Work) -> Option<Io> {
        let inside = work.session.enter()?;
        if work.session.stopped() {
            return None;
        }
        let durable = work.session.features & F_FLUSH == 0;
        let mut buffer = Buffer::default();
        let (operation, offset) = match work.request.task {
            Task::Read { offset } => {
                buffer = self.buffers.take(work.piece_bytes());
                (Operation::Read, offset + work.done)
            }
            Task::Write { offset } => {
                buffer = self.buffers.take(work.piece_bytes());
                let data = &work.request.data;
                if !data.read(&work.session.memory, work.done, buffer.bytes_mut()) {
                    self.answer(&inside, work, Err(io::ErrorKind::InvalidInput.into()));
                    return None;
                }
                (Operation::Write { durable }, offset + work.done)
            }
            Task::Zero { offset, len, unmap } => (Operation::Zero { len, unmap, durable }, offset),
            Task::Discard { offset, len } => (Operation::Discard { len }, offset),
            Task::Flush => (Operation::Flush, 0),
        };
        Some(Io { operation, offset, buffer })
    }

    /// Takes what the host has done.
    fn finish(
        self: &Arc<Self>,
        ticket: Ticket,
        mut work: Work,
        mut io: Io,
        result: io::Result<()>,
        room: Option<Room>,
    ) {
        if result.is_err() && self.log().is_some() {
            self.look_again(&mut io);
        }
        {
            let _pass = self.turnstile.enter();
            // Whether anybody is to be answered or not: the image has it.
            self.record(&io, result.is_ok());
            let session = Arc::clone(&work.session);
            let more = session
                .enter()
                .filter(|_| !session.stopped())
                .is_some_and(|inside| self.deliver(&inside, &mut work, &io, result));
            let mut schedule = self.schedule();
            if more {
                schedule.again(ticket, work);
            } else {
                schedule.finish(ticket);
            }
            if session.stopped() {
                schedule.abandon(session.id());
            }
        }
        self.buffers.give(io.buffer);
        // What is recorded needs no room any more.
        drop(room);
        self.dispatch();
    }

    /// A write that failed may have changed some of its range. The image elsewhere is to have what
    /// this one has now; what cannot be read here is of no consequence there.
    fn look_again(&self, io: &mut Io) {
        if let (Operation::Write { .. }, Some(image)) = (io.operation, self.image()) {
            let mut found = self.buffers.take(io.buffer.bytes().len());
            if image.read_at(io.offset, found.bytes_mut()).is_ok() {
                std::mem::swap(&mut io.buffer, &mut found);
            }
            self.buffers.give(found);
        }
    }

    /// Tells the log what the host has done to the image. Of a zeroing or discard that failed it is
    /// told as if it had not: the guest was told that the range is not what it was.
    fn record(&self, io: &Io, is_ok: bool) {
        let (Some(log), Some(change)) = (self.log(), change(io)) else { return };
        if change == Change::Flush && !is_ok {
            return;
        }
        log.record(&change);
        let durable = matches!(
            io.operation,
            Operation::Write { durable: true } | Operation::Zero { durable: true, .. }
        );
        if durable && is_ok {
            log.record(&Change::Flush);
        }
        self.counters.logged_ops.add(1);
        self.counters.logged_bytes.add(u64::try_from(io.buffer.bytes().len()).unwrap_or(0));
    }

    /// Gives the guest what the host has done. True if more of the request is to do.
    fn deliver(
        &self,
        inside: &Inside<'_>,
        work: &mut Work,
        io: &Io,
        result: io::Result<()>,
    ) -> bool {
        let mut result = result;
        if result.is_ok() {
            let bytes = io.buffer.bytes();
            if io.operation == Operation::Read
                && !work.request.data.write(&work.session.memory, work.done, bytes)
            {
                result = Err(io::ErrorKind::InvalidInput.into());
            }
            work.done += u64::try_from(bytes.len()).unwrap_or(u64::MAX);
            if result.is_ok() && work.done < work.request.data.len() {
                return true;
            }
        }
        self.answer(inside, work, result);
        false
    }

    fn answer(&self, inside: &Inside<'_>, work: &Work, result: io::Result<()>) {
        let (status, len) = match result {
            Ok(()) => (Status::Ok, self.count(work)),
            Err(error) => {
                debug!(%error, task = ?work.request.task, "A disk's request failed");
                self.counters.errors.add(1);
                (Status::IoError, 0)
            }
        };
        inside.answer(work.queue, work.head, Some((work.request.status, status)), len + 1);
    }

    /// Counts a request that is done. Bytes that the guest got before the status.
    fn count(&self, work: &Work) -> u32 {
        let (counters, bytes) = (&self.counters, work.request.data.len());
        match work.request.task {
            Task::Read { .. } => {
                counters.read_ops.add(1);
                counters.read_bytes.add(bytes);
                // A chain with its status has at most 2^32 - 1 bytes.
                return u32::try_from(bytes).unwrap_or(u32::MAX - 1);
            }
            Task::Write { .. } => {
                counters.write_ops.add(1);
                counters.write_bytes.add(bytes);
            }
            Task::Zero { .. } => counters.write_zeroes_ops.add(1),
            Task::Discard { .. } => counters.discard_ops.add(1),
            Task::Flush => counters.flush_ops.add(1),
        }
        0
    }
}

/// What an I/O changes.
fn change(io: &Io) -> Option<Change<'_>> {
    let offset = io.offset;
    match io.operation {
        Operation::Read => None,
        Operation::Flush => Some(Change::Flush),
        Operation::Write { .. } => Some(Change::Write { offset, data: io.buffer.bytes() }),
        Operation::Zero { len, unmap, .. } => Some(Change::Zero { offset, len, unmap }),
        Operation::Discard { len } => Some(Change::Discard { offset, len }),
    }
}
