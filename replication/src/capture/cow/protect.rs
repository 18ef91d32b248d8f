//! Protects the pages of an epoch and lets the guest run; copies aside what it then writes.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use api::replication::Cow;
use userfault::Userfault;

use super::buffer::Buffer;
use super::copy::copy_group;
use super::cost::{self, Copying, Costs};
use super::handler::Handler;
use super::rooms::{Rooms, Use};
use super::table::{SLOTS, Table};
use super::{
    CowError, Cursor, Freezer, Frozen, GROUP_PAGES, Kept, Loan, Page, Piece, Share, bits, page,
    rank, runs,
};
use crate::checking;
use crate::ram::{PageSet, Preserve, Ram};

/// Pages that there is room to copy from the start, ahead and in the pause.
const START_PAGES: usize = 4096;
/// Fewer pages are not worth reading the dirty log once more.
const AHEAD_PAGES_MIN: u64 = 128;
/// More pages are left for the pause, which can protect them.
const AHEAD_PAGES_MAX: usize = 16_384;
/// Below this share of good copies, copying ahead is work for nothing, for so many seals.
const USE_SHARE_MIN: f64 = 0.25;
const SKIPS: u32 = 32;

/// Keeps by protecting, or by whatever is cheaper.
pub struct ProtectFreezer {
    shared: Arc<Shared>,
    /// `None`: all that can be is protected.
    costs: Option<Costs>,
    /// Pages of the last epoch; more than any before the first.
    last_pages: u64,
    ahead: Ahead,
    kept: Kept,
    is_broken: bool,
}

/// What the epochs under way have in common. The handler outlives all of them.
struct Shared {
    table: Arc<Table>,
    rooms: Rooms,
    idle: Mutex<Idle>,
    _handler: Handler,
}

/// What no epoch uses at the moment.
#[derive(Default)]
struct Idle {
    slots: Vec<usize>,
    entries: Vec<Vec<Entry>>,
}

/// The room of an epoch, used again and again.
#[derive(Debug, Default)]
struct Parts {
    entries: Vec<Entry>,
    buffer: Buffer,
}

/// A group of 64 pages of which some are in the epoch.
#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    group: usize,
    word: u64,
    /// Those that were copied during the pause, and the place of the first.
    copied: u64,
    at: usize,
    /// Those of which the copy made ahead is good, all that were copied then, and the place of the
    /// first of these.
    ahead: u64,
    ahead_all: u64,
    ahead_at: usize,
}

impl Entry {
    /// Those that are protected.
    fn armed(&self) -> u64 {
        self.word & !self.copied & !self.ahead
    }
}

/// What was copied ahead of the next pause, and whether it is worth it.
#[derive(Debug)]
struct Ahead {
    parts: Option<Parts>,
    /// Share of the pages copied ahead that were not written again before the pause.
    use_share: f64,
    /// Seals until it is tried again.
    skip: u32,
}

impl Default for Ahead {
    fn default() -> Self {
        Self { parts: None, use_share: 1.0, skip: 0 }
    }
}

impl Ahead {
    fn learn(&mut self, good: u64, all: u64) {
        if all >= AHEAD_PAGES_MIN {
            let part = |pages: u64| f64::from(u32::try_from(pages).unwrap_or(u32::MAX));
            let share = part(good) / part(all);
            self.use_share = (self.use_share + share) / 2.0;
            if self.use_share < USE_SHARE_MIN {
                (self.skip, self.use_share) = (SKIPS, USE_SHARE_MIN);
            }
        }
    }
}

/// The pages of one epoch.
struct Held {
    shared: Arc<Shared>,
    /// `None`: all were copied.
    slot: Option<usize>,
    parts: Parts,
    /// What was copied ahead.
    ahead: Option<Parts>,
}

impl Shared {
    fn idle(&self) -> MutexGuard<'_, Idle> {
        // Nothing is half done under this lock.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Room for an epoch, empty.
    fn parts(&self, of: Use) -> Parts {
        let mut entries = self.idle().entries.pop().unwrap_or_default();
        entries.clear();
        Parts { entries, buffer: self.rooms.take(of) }
    }

    fn give_back(&self, of: Use, parts: Parts) {
        self.rooms.give(of, parts.buffer);
        self.idle().entries.push(parts.entries);
    }
}

impl Preserve for Shared {
    fn preserve(&self) {
        self.table.preserve();
    }
}

impl ProtectFreezer {
    /// Protects pages of `ram`: all ([`Cow::Protect`]), or those that are cheaper protected than
    /// copied. `patience` is how long a writer waits for a page that a device reads.
    ///
    /// # Errors
    /// If the kernel lacks or does not permit what this needs.
    pub fn new(ram: &Ram, cow: Cow, patience: Duration) -> Result<Self, CowError> {
        let costs = if cow == Cow::Protect { None } else { Some(Costs::measure()?) };
        if let Some(costs) = costs {
            tracing::info!("copy-on-write: {costs:?} (ns)");
        }
        let userfault = Userfault::new(Arc::clone(ram.mapping())).map_err(CowError::Protect)?;
        let table = Arc::new(Table::new(ram.clone(), userfault, patience));
        let handler = Handler::start(&table)?;
        let rooms = Rooms::start(START_PAGES, if costs.is_some() { START_PAGES } else { 0 })?;
        let idle = Mutex::new(Idle { slots: (0..SLOTS).collect(), entries: vec![] });
        let shared = Arc::new(Shared { table, rooms, idle, _handler: handler });
        let weak: Weak<Shared> = Arc::downgrade(&shared);
        ram.preserve_by(weak);
        let is_broken = checking::is_broken("protect");
        Ok(Self {
            shared,
            costs,
            last_pages: u64::MAX,
            ahead: Ahead::default(),
            kept: Kept::default(),
            is_broken,
        })
    }

    /// From here on nothing is protected, though all counts as if it were.
    #[cfg(test)]
    pub(super) fn break_for_test(&mut self) {
        self.is_broken = true;
    }
}

impl Freezer for ProtectFreezer {
    fn wants_ahead(&mut self) -> bool {
        // Copies that no seal took are older than what `late` knows from here on.
        if let Some(old) = self.ahead.parts.take() {
            self.shared.give_back(Use::Ahead, old);
        }
        if self.costs.is_none() || self.last_pages < AHEAD_PAGES_MIN {
            return false;
        }
        let skips = self.ahead.skip > 0;
        self.ahead.skip = self.ahead.skip.saturating_sub(1);
        !skips
    }

    fn ahead(&mut self, ram: &Ram, pages: &PageSet) -> Result<(), CowError> {
        let mut parts = self.shared.parts(Use::Ahead);
        for (group, word) in pages.groups() {
            let at = parts.buffer.len();
            if at + word.count_ones() as usize > AHEAD_PAGES_MAX {
                break;
            }
            parts.entries.push(Entry { group, word, at, ..Entry::default() });
            copy_group(ram, group, word, &mut parts.buffer)?;
        }
        self.shared.rooms.copied(Use::Ahead, parts.buffer.len());
        self.ahead.parts = Some(parts);
        Ok(())
    }

    fn freeze(
        &mut self,
        ram: &Ram,
        pages: &Arc<PageSet>,
        late: &PageSet,
    ) -> Result<Arc<dyn Frozen>, CowError> {
        let slot = self.shared.idle().slots.pop();
        let parts = self.shared.parts(Use::Pause);
        // From here on an error lets go of what was armed.
        let ahead = self.ahead.parts.take();
        let mut held = Held { shared: Arc::clone(&self.shared), slot, parts, ahead };
        let mut copies = Copies::new(held.ahead.as_ref(), late);
        let mut arming = Arming::new(&self.shared.table, self.is_broken);
        let room = held.parts.buffer.room();
        let began = Instant::now();
        for (group, word) in pages.groups() {
            let buffer = &mut held.parts.buffer;
            let mut entry = copies.of(group, word);
            let rest = word & !entry.ahead;
            let room = buffer.room().saturating_sub(buffer.len());
            let armed = match slot {
                // Most groups have nothing left to keep, and their state is in no cache.
                Some(slot) if rest != 0 => {
                    let armed = arming.group(slot, group, rest, self.costs.as_ref(), room);
                    // `held` does not know of this group yet.
                    armed.inspect_err(|_| self.shared.table.let_go(slot, group))?
                }
                _ => 0,
            };
            let copied = rest & !armed;
            (entry.copied, entry.at) = (copied, buffer.len());
            held.parts.entries.push(entry);
            copy_group(ram, group, copied, buffer)?;
            if copied != 0 && self.costs.is_some() {
                let heat = self.shared.table.heat(group);
                bits(copied).for_each(|bit| cost::fade(&heat[bit]));
            }
        }
        arming.flush()?;
        let (good, tried) =
            (copies.good, held.ahead.as_ref().map_or(0, |parts| parts.buffer.len()));
        self.ahead.learn(good, tried as u64);
        let copies = held.parts.buffer.len();
        self.last_pages = pages.len();
        self.shared.rooms.copied(Use::Pause, copies);
        self.kept.ahead += good;
        self.kept.copied += copies as u64;
        self.kept.protected += pages.len() - copies as u64 - good;
        if let Some(costs) = &mut self.costs {
            let count = |pages: usize| u32::try_from(pages).unwrap_or(u32::MAX);
            let copied = Copying {
                pages: count(copies),
                touched: count(copies.saturating_sub(room)),
                took: began.elapsed().saturating_sub(arming.took),
            };
            costs.correct((arming.calls, arming.pages, arming.took), copied);
            let (faults, serving) = self.shared.table.take_served();
            costs.correct_faults(faults, serving);
        }
        Ok(Arc::new(held))
    }

    fn prepare(&mut self) {
        self.shared.rooms.prepare();
    }

    fn kept(&self) -> Kept {
        Kept { faults: self.shared.table.faults(), ..self.kept }
    }
}

/// Looks up what was copied ahead, group by group in ascending order.
struct Copies<'a> {
    entries: &'a [Entry],
    late: &'a PageSet,
    /// Copies that are good.
    good: u64,
}

impl<'a> Copies<'a> {
    fn new(ahead: Option<&'a Parts>, late: &'a PageSet) -> Self {
        Self { entries: ahead.map_or(&[], |parts| &parts.entries), late, good: 0 }
    }

    /// A group of the epoch, with the copies of it that are good.
    fn of(&mut self, group: usize, word: u64) -> Entry {
        while let Some((first, rest)) = self.entries.split_first()
            && first.group < group
        {
            self.entries = rest;
        }
        let mut entry = Entry { group, word, ..Entry::default() };
        if let Some(copied) = self.entries.first().filter(|copied| copied.group == group) {
            entry.ahead = copied.word & word & !self.late.word(group);
            (entry.ahead_all, entry.ahead_at) = (copied.word, copied.at);
            self.good += u64::from(entry.ahead.count_ones());
        }
        entry
    }
}

/// The runs of a set that are protected, one call each.
struct Arming<'a> {
    table: &'a Table,
    /// For tests: nothing is protected, though all counts as if it were.
    is_off: bool,
    /// The run that may go on.
    first: u64,
    end: u64,
    calls: u32,
    pages: u32,
    took: Duration,
}

impl<'a> Arming<'a> {
    fn new(table: &'a Table, is_off: bool) -> Self {
        let took = Duration::ZERO;
        Self { table, is_off, first: 0, end: 0, calls: 0, pages: 0, took }
    }

    /// Arms what is to be protected of a group, and returns it.
    fn group(
        &mut self,
        slot: usize,
        group: usize,
        word: u64,
        costs: Option<&Costs>,
        room: usize,
    ) -> Result<u64, CowError> {
        let start = group as u64 * 64;
        let continues = self.end == start && self.end > self.first;
        let heat = self.table.heat(group);
        let (armed, plan) = self.table.arm(slot, group, word, |free| match costs {
            Some(costs) => costs.choose(free, heat, continues, room),
            None => free,
        });
        for (first, count) in runs(plan) {
            let first = start + first;
            if first != self.end {
                self.flush()?;
                self.first = first;
            }
            self.end = first + count;
        }
        Ok(armed)
    }

    /// Protects the run that is open.
    fn flush(&mut self) -> Result<(), CowError> {
        let pages = self.end - self.first;
        if pages > 0 && !self.is_off {
            let began = Instant::now();
            self.table.protect(self.first, pages)?;
            self.took += began.elapsed();
            self.calls += 1;
            self.pages = self.pages.saturating_add(u32::try_from(pages).unwrap_or(u32::MAX));
        }
        self.first = self.end;
        Ok(())
    }
}

impl Frozen for Held {
    fn next<'a>(
        &'a self,
        share: Share,
        cursor: &mut Cursor,
        scratch: &'a mut [Page],
        batch: &mut Vec<Piece<'a>>,
    ) {
        self.each(share, cursor, scratch, batch, |slot, entry, into| {
            self.shared.table.take(slot, entry.group, entry.armed(), into)
        });
    }

    fn lend<'a>(
        &'a self,
        share: Share,
        cursor: &mut Cursor,
        scratch: &'a mut [Page],
        batch: &mut Vec<Piece<'a>>,
        loans: &mut Vec<Loan>,
    ) {
        let table = &self.shared.table;
        self.each(share, cursor, scratch, batch, |slot, entry, into| {
            let (taken, borrowed) = table.borrow(slot, entry.group, entry.armed(), into);
            if borrowed != 0 {
                let service = Arc::clone(&self.shared);
                loans.push(Loan::new(table, entry.group, borrowed, service));
            }
            taken
        });
    }

    fn is_revoked(&self) -> bool {
        self.shared.table.is_revoked()
    }
}

impl Held {
    /// Hands out groups until the batch is full; `take` takes those pages of one that are still armed,
    /// into room for all that ever were, and says which.
    fn each<'a>(
        &'a self,
        share: Share,
        cursor: &mut Cursor,
        scratch: &'a mut [Page],
        batch: &mut Vec<Piece<'a>>,
        mut take: impl FnMut(usize, &Entry, &mut [Page]) -> u64,
    ) {
        let mut free = scratch;
        while let Some(entry) = self.parts.entries.get(cursor.0) {
            let mine = share.has(entry.group);
            if mine && batch.len() + entry.word.count_ones() as usize > GROUP_PAGES {
                return;
            }
            cursor.0 += 1;
            if mine {
                let kept = entry.armed().count_ones() as usize;
                let (into, rest) = std::mem::take(&mut free).split_at_mut(kept);
                free = rest;
                self.hand_out(entry, into, batch, &mut take);
            }
        }
    }

    /// Appends a group's pages; `into` has room for those that were not copied in the pause.
    fn hand_out<'a>(
        &'a self,
        entry: &Entry,
        into: &'a mut [Page],
        batch: &mut Vec<Piece<'a>>,
        take: impl FnOnce(usize, &Entry, &mut [Page]) -> u64,
    ) {
        let Entry { group, word, copied, at, ahead, ahead_all, ahead_at } = *entry;
        let kept = entry.armed();
        let table = &self.shared.table;
        if let Some(slot) = self.slot.filter(|_| kept != 0) {
            let taken = take(slot, entry, into);
            for bit in bits(kept & !taken) {
                table.take_aside(slot, page(group, bit), &mut into[rank(kept, bit)]);
            }
        }
        let into: &'a [Page] = into;
        batch.extend(bits(word).map(|bit| {
            let is_in = |word: u64| word & (1 << bit) != 0;
            let bytes = match &self.ahead {
                Some(parts) if is_in(ahead) => parts.buffer.page(ahead_at + rank(ahead_all, bit)),
                _ if is_in(copied) => self.parts.buffer.page(at + rank(copied, bit)),
                _ => &into[rank(kept, bit)],
            };
            (page(group, bit), bytes)
        }));
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(slot) = self.slot {
            // All was taken, unless the session ended in between: looking costs little.
            for entry in self.parts.entries.iter().filter(|entry| entry.armed() != 0) {
                self.shared.table.let_go(slot, entry.group);
            }
            self.shared.table.forget(slot);
        }
        self.shared.give_back(Use::Pause, std::mem::take(&mut self.parts));
        if let Some(ahead) = self.ahead.take() {
            self.shared.give_back(Use::Ahead, ahead);
        }
        self.shared.idle().slots.extend(self.slot);
    }
}
