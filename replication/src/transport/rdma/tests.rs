//! The whole way of bytes without a device: frames, chunks, both ends of the ring, completions; and a
//! guest that writes a page as soon as it may.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};

use ::rdma::{Event, PortChange};
use proptest::prelude::*;

use super::ends;
use super::flight::Flight;
use super::gather::{Chunk, Limits, Place, Rest};
use super::ring::{Incoming, Outgoing};
use crate::ids::{PAGE_SIZE, PageIndex};
use crate::transport::{Lease, Part};

/// Pages of the guest, in two pieces for the device.
const PAGES: u64 = 8;
const BORDER: u64 = 5;
/// Of the ring: neither pages nor frames fit it evenly.
const RING: usize = 5 * PAGE_SIZE + 77;

type Memory = Arc<Mutex<Vec<Vec<u8>>>>;

/// The guest writes a page when it is let go.
struct Held {
    memory: Memory,
    pages: Vec<u64>,
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut memory = self.memory.lock().unwrap();
        for page in &self.pages {
            memory[usize::try_from(*page).unwrap()].iter_mut().for_each(|byte| *byte ^= 0xff);
        }
    }
}

/// Everything of a connection but the device.
struct Connection {
    memory: Memory,
    out: Outgoing,
    into: Incoming,
    flight: Flight,
    local: Vec<u8>,
    remote: Vec<u8>,
    limits: Limits,
    requests_max: usize,
    /// Posted, and not at the peer; at the peer, and not completed.
    posted: VecDeque<(u64, Posted)>,
    arrived: Vec<u64>,
    expected: VecDeque<u8>,
    /// Pages under way, each with the chunks that are.
    lent: HashMap<u64, usize>,
    frames: u8,
    /// A build that lets go of pages when it posts them.
    at_post: bool,
}

/// What the device has of a chunk: no bytes.
struct Posted {
    writes: Vec<(usize, Vec<(Place, usize)>)>,
    len: usize,
}

impl Posted {
    fn of(chunk: &Chunk<'_>) -> Self {
        let writes = chunk.writes.iter().map(|write| {
            let segments = &chunk.segments[write.segments.clone()];
            (write.at, segments.iter().map(|segment| (segment.place, segment.len)).collect())
        });
        Self { writes: writes.collect(), len: chunk.len }
    }
}

impl Connection {
    fn new(depth: usize, requests_max: usize, segments: usize, at_post: bool) -> Self {
        let page = |page| vec![u8::try_from(page).unwrap(); PAGE_SIZE];
        Self {
            memory: Arc::new(Mutex::new((0..PAGES).map(page).collect())),
            out: Outgoing::new(RING, depth),
            into: Incoming::new(RING, depth),
            flight: Flight::default(),
            local: vec![0; RING],
            remote: vec![0; RING],
            limits: Limits { bytes: 0, writes: 0, segments, ring: RING },
            requests_max,
            posted: VecDeque::new(),
            arrived: vec![],
            expected: VecDeque::new(),
            lent: HashMap::new(),
            frames: 0,
            at_post,
        }
    }

    fn is_under_way(&self, page: u64) -> bool {
        self.lent.get(&page).is_some_and(|chunks| *chunks > 0)
    }

    /// Sends a frame: a head, and pages, which the guest must not write until they have arrived.
    fn send(&mut self, head: usize, pages: &[u64], mut while_full: impl FnMut(&mut Self)) {
        self.frames = self.frames.wrapping_add(1);
        let head = vec![self.frames; head];
        let mut own: Vec<u64> = vec![];
        for page in pages {
            // A page is in one epoch at a time.
            if !self.is_under_way(*page) && !own.contains(page) {
                own.push(*page);
            }
        }
        let bytes: Vec<Vec<u8>> = {
            let memory = self.memory.lock().unwrap();
            own.iter().map(|page| memory[usize::try_from(*page).unwrap()].clone()).collect()
        };
        let lent = own.iter().zip(&bytes);
        let parts: Vec<Part<'_>> = std::iter::once(Part::from(&head[..]))
            .chain(lent.map(|(page, bytes)| Part { bytes, page: Some(PageIndex(*page)) }))
            .collect();
        self.expected.extend(parts.iter().flat_map(|part| part.bytes));
        let held = Held { memory: Arc::clone(&self.memory), pages: own.clone() };
        let mut leases = Some(Arc::new(vec![Box::new(held) as Lease]));
        let mut rest = Rest::new(&parts);
        while !rest.is_empty() {
            let left = self.requests_max - self.flight.requests();
            if left < 2 || self.out.room() == 0 {
                while_full(self);
                continue;
            }
            self.limits = Limits { bytes: self.out.room(), writes: left, ..self.limits };
            let chunk = rest.chunk(self.out.place(), &self.limits, |page| page.0 + 1 != BORDER);
            for (at, bytes) in &chunk.copies {
                self.local[*at..at + bytes.len()].copy_from_slice(bytes);
            }
            self.out.write(chunk.len);
            let kept = if chunk.reads_memory() { leases.clone() } else { None };
            if rest.is_empty() {
                leases = None;
            }
            let number = self.flight.post(
                chunk.writes.len(),
                chunk.len,
                if self.at_post { None } else { kept },
            );
            own.iter().for_each(|page| *self.lent.entry(*page).or_default() += 1);
            self.posted.push_back((number, Posted::of(&chunk)));
        }
    }

    /// The device writes the next chunk into the peer's memory.
    fn deliver(&mut self) -> bool {
        let Some((number, chunk)) = self.posted.pop_front() else { return false };
        let memory = self.memory.lock().unwrap().concat();
        for (at, segments) in &chunk.writes {
            let mut to = *at;
            for (place, len) in segments {
                let from = match *place {
                    Place::Ring { at } => &self.local[at..at + len],
                    Place::Memory { page, offset } => {
                        let first = usize::try_from(page.0).unwrap() * PAGE_SIZE + offset;
                        &memory[first..first + len]
                    }
                };
                self.remote[to..to + len].copy_from_slice(from);
                to += len;
            }
        }
        assert!(self.into.arrived(u32::try_from(chunk.len).unwrap()));
        self.arrived.push(number);
        true
    }

    /// One of the chunks that have arrived completes.
    fn complete(&mut self, which: usize) -> bool {
        if self.arrived.is_empty() {
            return false;
        }
        let number = self.arrived.swap_remove(which % self.arrived.len());
        assert!(self.flight.complete(number));
        if self.arrived.is_empty() && self.posted.is_empty() {
            self.lent.clear();
        }
        true
    }

    /// The backup reads; `false` if it finds other bytes than were sent.
    fn read(&mut self, len: usize) -> bool {
        let at = self.into.read(len);
        let found = &self.remote[at.offset..][..at.len];
        let expected: Vec<u8> = self.expected.drain(..at.len).collect();
        let is_good = found == expected;
        if let Some(read) = self.into.credit() {
            assert!(self.out.credit(read));
        }
        is_good
    }
}

/// Runs a connection through `steps`; whether all bytes that were read were those that were sent.
fn run(mut connection: Connection, steps: &[(u8, usize, Vec<u64>)]) -> bool {
    let mut is_good = true;
    for (what, number, pages) in steps {
        match what % 4 {
            0 => connection.send(1 + number % 300, pages, |full| {
                // The peer, the device and the guest go on, whoever waits.
                full.deliver();
                full.complete(*number);
                is_good &= full.read(RING);
            }),
            1 => drop(connection.deliver()),
            2 => drop(connection.complete(*number)),
            _ => is_good &= connection.read(*number),
        }
    }
    while connection.deliver() || connection.complete(0) || connection.into.unread() > 0 {
        is_good &= connection.read(RING);
    }
    assert!(connection.expected.is_empty(), "all has arrived");
    assert_eq!(connection.flight.requests(), 0);
    is_good
}

fn any_steps() -> impl Strategy<Value = Vec<(u8, usize, Vec<u64>)>> {
    let pages = prop::collection::vec(0..PAGES, 0..6);
    prop::collection::vec((any::<u8>(), 0usize..9000, pages), 1..60)
}

proptest! {
    #[test]
    fn what_is_read_is_what_was_sent(
        steps in any_steps(),
        depth in 1usize..20,
        requests_max in 2usize..20,
        segments in 1usize..6,
    ) {
        prop_assert!(run(Connection::new(depth, requests_max, segments, false), &steps));
    }
}

/// The test above tells a build that waits for completions from one that does not.
#[test]
fn a_build_that_lets_go_when_it_posts_is_found() {
    let steps = [(0, 10, vec![1, 2, 3]), (1, 0, vec![]), (3, RING, vec![])];
    assert!(run(Connection::new(4, 8, 4, false), &steps));
    assert!(!run(Connection::new(4, 8, 4, true), &steps));
}

/// The device stays open from session to session, and is heard by one connection for all.
#[test]
fn a_queue_pair_that_fails_ends_its_own_session() {
    let ours = |number| [7, 9].contains(&number);
    for number in [7, 9] {
        assert!(ends(Event::QueuePairFailed { number }, ours).is_some(), "of any connection");
    }
    assert_eq!(ends(Event::QueuePairFailed { number: 8 }, ours), None, "of the session before");
    assert!(ends(Event::DeviceFailed, ours).is_some());
    assert!(ends(Event::CompletionQueueFailed, ours).is_some());
    let down = Event::Port { port: 1, change: PortChange::Down };
    assert_eq!(ends(down, ours), None, "it may be back before patience is over");
}
