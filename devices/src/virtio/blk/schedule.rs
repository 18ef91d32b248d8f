//! Which requests of a disk may go to the host, and when. Pure: no I/O, no clock, no thread.
//!
//! ```text
//!            insert            start             finish
//!  ring ──────────────▶ waiting ─────▶ running ─────────▶ gone
//!                         │   ▲           │ again (a long request, piece by piece)
//!                         │   └───────────┘
//!                         └ for an overlapping request before it, or for its epoch
//!
//!  a change's hold:  Open ──seal(n)──▶ Sealed(n) ──commit(n)──▶ Free       (hold mode)
//!                    Free                                                  (pass mode)
//!                    Dropped: never starts                                 (after discard)
//! ```
//!
//! What always holds:
//!
//! - Two requests that overlap, one of which changes the image, run one after the other in the
//!   order of their arrival. So a read sees the held write before it, and a log of the changes has
//!   the order in which they reach the host.
//! - In hold mode a change or a flush of epoch n does not start before `commit(n)`.
//! - After [`Schedule::discard`] no change starts at all.
//! - The buffers of running requests are at most [`RUNNING_BYTES_MAX`].
//! - A waiting request is linked to one request before it and no more, so memory grows with their
//!   number only.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use crate::output_gate::Waker;

/// Most bytes in buffers of running requests of one disk.
pub(super) const RUNNING_BYTES_MAX: usize = 32 << 20;

/// A request's number in order of arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ticket(u64);

/// What a request does to the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    Read,
    Change,
    Flush,
}

/// What a request touches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Access {
    pub(super) class: Class,
    /// Bytes of the image; empty for a flush.
    pub(super) range: Range<u64>,
    /// Bytes of data that the guest sends or wants.
    pub(super) data_bytes: u64,
}

impl Access {
    fn conflicts(&self, other: &Self) -> bool {
        (self.class == Class::Change || other.class == Class::Change)
            && self.range.start < other.range.end
            && other.range.start < self.range.end
    }

    /// It is held in hold mode.
    pub(super) fn is_output(&self) -> bool {
        self.class != Class::Read
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hold {
    Free,
    Open,
    Sealed(u64),
    Dropped,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Pass,
    Hold,
    Discarded,
}

struct Entry<T> {
    owner: u64,
    access: Access,
    hold: Hold,
    /// Bytes of its buffer while it runs.
    cost_bytes: usize,
    running: bool,
    /// The last request before it that it must not overtake, of those that were there when it was
    /// last looked at.
    behind: Option<Ticket>,
    /// Those that are behind this one.
    followers: Vec<Ticket>,
    payload: T,
}

/// What waits for an epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Writes, discards, write zeroes and flushes.
    pub requests: usize,
    /// Data of the writes among them.
    pub bytes: u64,
}

/// See the module's documentation.
pub(super) struct Schedule<T> {
    next: u64,
    mode: Mode,
    entries: BTreeMap<Ticket, Entry<T>>,
    /// Those that could start now.
    ready: BTreeSet<Ticket>,
    running_bytes: usize,
    waker: Option<Waker>,
    /// Requests that were looked at for the sake of others.
    #[cfg(test)]
    looked_at: std::cell::Cell<u64>,
}

impl<T: Clone> Schedule<T> {
    pub(super) fn new() -> Self {
        Self {
            next: 0,
            mode: Mode::Pass,
            entries: BTreeMap::new(),
            ready: BTreeSet::new(),
            running_bytes: 0,
            waker: None,
            #[cfg(test)]
            looked_at: std::cell::Cell::default(),
        }
    }

    /// Takes a request of `owner`. The waker is to be called, without the schedule's lock, when it
    /// is the first that waits for a seal.
    pub(super) fn insert(
        &mut self,
        owner: u64,
        access: Access,
        cost_bytes: usize,
        payload: T,
    ) -> (Ticket, Option<Waker>) {
        let ticket = Ticket(self.next);
        self.next += 1;
        let hold = match self.mode {
            Mode::Hold if access.is_output() => Hold::Open,
            Mode::Discarded if access.is_output() => Hold::Dropped,
            _ => Hold::Free,
        };
        let first =
            hold == Hold::Open && !self.entries.values().any(|entry| entry.hold == Hold::Open);
        self.entries.insert(
            ticket,
            Entry {
                owner,
                access,
                hold,
                cost_bytes,
                running: false,
                behind: None,
                followers: Vec::new(),
                payload,
            },
        );
        self.link(ticket, ticket);
        (ticket, self.waker.clone().filter(|_| first))
    }

    /// Starts the oldest request that may, if its buffer fits beside those of the running ones.
    /// Without `all` a read.
    pub(super) fn start(&mut self, all: bool) -> Option<(Ticket, T)> {
        let may = |ticket: &&Ticket| {
            all || self.entries.get(ticket).is_some_and(|entry| !entry.access.is_output())
        };
        let ticket = *self.ready.iter().find(may)?;
        let entry = self.entries.get_mut(&ticket)?;
        let bytes = self.running_bytes.saturating_add(entry.cost_bytes);
        if bytes > RUNNING_BYTES_MAX && self.running_bytes > 0 {
            return None;
        }
        self.running_bytes = bytes;
        entry.running = true;
        self.ready.remove(&ticket);
        Some((ticket, entry.payload.clone()))
    }

    /// A piece of a running request is done; the next one takes its place among the others, with
    /// `payload`. It is not held again.
    pub(super) fn again(&mut self, ticket: Ticket, payload: T) {
        let Some(entry) = self.entries.get_mut(&ticket) else { return };
        entry.payload = payload;
        entry.running = false;
        self.running_bytes -= entry.cost_bytes;
        self.consider(ticket);
    }

    /// Forgets a request, whether it ran or not, and lets go what was behind it.
    pub(super) fn finish(&mut self, ticket: Ticket) {
        let Some(entry) = self.entries.remove(&ticket) else { return };
        self.ready.remove(&ticket);
        if entry.running {
            self.running_bytes -= entry.cost_bytes;
        }
        if let Some(before) = entry.behind.and_then(|at| self.entries.get_mut(&at)) {
            before.followers.retain(|follower| *follower != ticket);
        }
        // What lies between is nothing that a follower must wait for, or it would be behind that.
        for follower in entry.followers {
            self.link(follower, ticket);
        }
    }

    /// Forgets what of `owner` does not run. What runs keeps its place until it is finished, so
    /// that nobody else's request overtakes it.
    pub(super) fn abandon(&mut self, owner: u64) {
        let idle = |entry: &Entry<T>| entry.owner == owner && !entry.running;
        let tickets: Vec<_> =
            self.entries.iter().filter(|(_, entry)| idle(entry)).map(|(at, _)| *at).collect();
        // The youngest first: each is then nobody's to wait for any more.
        for ticket in tickets.into_iter().rev() {
            self.finish(ticket);
        }
    }

    /// The requests of `owner` in order of arrival.
    pub(super) fn of(&self, owner: u64) -> impl Iterator<Item = &T> {
        self.entries.values().filter(move |entry| entry.owner == owner).map(|entry| &entry.payload)
    }

    /// From now on changes and flushes wait for their epoch. Those that are there do not.
    pub(super) fn hold(&mut self) {
        if self.mode == Mode::Pass {
            self.mode = Mode::Hold;
        }
    }

    /// Changes and flushes wait for their epoch.
    pub(super) fn holds(&self) -> bool {
        self.mode == Mode::Hold
    }

    /// Tags what arrived since the last seal with `epoch`. Epochs never descend while anything
    /// sealed waits.
    pub(super) fn seal(&mut self, epoch: u64) {
        for entry in self.entries.values_mut() {
            match entry.hold {
                Hold::Open => entry.hold = Hold::Sealed(epoch),
                Hold::Sealed(last) => {
                    assert!(last <= epoch, "epoch {epoch} sealed after epoch {last}");
                }
                Hold::Free | Hold::Dropped => {}
            }
        }
    }

    /// Frees everything tagged with `epoch` or an earlier one. True if something can start.
    pub(super) fn commit(&mut self, epoch: u64) -> bool {
        self.free(|hold| matches!(hold, Hold::Sealed(tag) if tag <= epoch))
    }

    /// Frees everything and holds nothing more. True if something can start.
    pub(super) fn pass(&mut self) -> bool {
        if self.mode != Mode::Hold {
            return false;
        }
        self.mode = Mode::Pass;
        self.free(|hold| matches!(hold, Hold::Open | Hold::Sealed(_)))
    }

    /// No change or flush starts any more. Final.
    pub(super) fn discard(&mut self) {
        self.mode = Mode::Discarded;
        for (ticket, entry) in &mut self.entries {
            if entry.access.is_output() && !entry.running {
                entry.hold = Hold::Dropped;
                self.ready.remove(ticket);
            }
        }
    }

    /// What waits for a commit, unsealed requests included.
    pub(super) fn held(&self) -> Held {
        self.sum(|hold| matches!(hold, Hold::Open | Hold::Sealed(_)))
    }

    /// What waits for a seal.
    pub(super) fn open(&self) -> Held {
        self.sum(|hold| hold == Hold::Open)
    }

    pub(super) fn set_waker(&mut self, waker: Waker) {
        self.waker = Some(waker);
    }

    #[cfg(test)]
    pub(super) fn looked_at(&self) -> u64 {
        self.looked_at.get()
    }

    fn sum(&self, which: impl Fn(Hold) -> bool) -> Held {
        let mut held = Held::default();
        for entry in self.entries.values().filter(|entry| which(entry.hold)) {
            held.requests += 1;
            held.bytes += entry.access.data_bytes;
        }
        held
    }

    fn free(&mut self, which: impl Fn(Hold) -> bool) -> bool {
        let mut freed = Vec::new();
        for (ticket, entry) in &mut self.entries {
            if which(entry.hold) {
                entry.hold = Hold::Free;
                freed.push(*ticket);
            }
        }
        for ticket in freed {
            self.consider(ticket);
        }
        !self.ready.is_empty()
    }

    /// Puts a request behind the last before `end` that it must not overtake.
    fn link(&mut self, ticket: Ticket, end: Ticket) {
        let Some(entry) = self.entries.get(&ticket) else { return };
        let access = &entry.access;
        let before = self.entries.range(..end).rev();
        #[cfg(test)]
        let before = before.inspect(|_| self.looked_at.set(self.looked_at.get() + 1));
        let behind =
            before.filter(|(_, other)| access.conflicts(&other.access)).map(|(at, _)| *at).next();
        if let Some(other) = behind.and_then(|at| self.entries.get_mut(&at)) {
            other.followers.push(ticket);
        }
        if let Some(entry) = self.entries.get_mut(&ticket) {
            entry.behind = behind;
        }
        self.consider(ticket);
    }

    /// Makes a request ready if nothing keeps it, and not if something does.
    fn consider(&mut self, ticket: Ticket) {
        let Some(entry) = self.entries.get_mut(&ticket) else { return };
        if self.mode == Mode::Discarded && entry.access.is_output() && !entry.running {
            entry.hold = Hold::Dropped;
        }
        if entry.behind.is_none() && entry.hold == Hold::Free && !entry.running {
            self.ready.insert(ticket);
        } else {
            self.ready.remove(&ticket);
        }
    }
}
