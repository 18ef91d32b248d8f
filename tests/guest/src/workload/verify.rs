//! `verify`: every processor writes pages of its own over and over, and before each write checks
//! that the page holds exactly what it wrote there last (`guest_logic::page`).
//!
//! Page `slot * participants + index` belongs to processor `index`. What the processor remembers
//! of it, the generation, is in a table of its own (`guest_logic::table`), whose digest is in the
//! worker, on the processor's stack.

use core::ptr::with_exposed_provenance_mut;
use core::sync::atomic::Ordering;

use guest_logic::machine::PAGE_SIZE;
use guest_logic::order::Mixed;
use guest_logic::pace::Pace;
use guest_logic::page::{self, Page, PageId};
use guest_logic::pair::{self, PARTNERS_MAX, PairFault, PairPage};
use guest_logic::table::{Digest, Entries};

use crate::serial::say;
use crate::shared::{self, Shared};
use crate::world::World;

/// Pages of one step: few enough that the first processor looks at its clock often.
const BATCH: u64 = 16;
const FILL_BATCH: u64 = 16;
/// Waking up costs more than a few pages: they are visited together.
const REST_NS: u64 = 4_000_000;
/// Beyond this, failures are counted but no longer printed.
const REPORTED_MAX: u64 = 32;

pub struct Verify {
    world: &'static World,
    shared: &'static Shared,
    index: u32,
    /// Pages of this processor.
    count: u64,
    table: &'static mut [u64],
    entries: Entries,
    digest: Digest,
    order: Mixed,
    pace: Pace,
    /// Pages that have been written at least once: all slots below.
    filled: u64,
    /// What this processor has published in each pair, and seen in each that it watches.
    published: [u64; PARTNERS_MAX as usize],
    seen: [u64; PARTNERS_MAX as usize],
    pair_turn: u32,
    reported: u64,
}

impl Verify {
    pub fn new(world: &'static World, index: u32) -> Self {
        let config = &world.config;
        let count = share(world, index);
        let table = table_of(world, index);
        let length = usize::try_from(count).unwrap_or(0);
        // SAFETY: world.rs took a table for each processor out of the free memory; this
        // processor alone has this one, and calls `new` once. Zeroes are valid words.
        let table = unsafe {
            table.write_bytes(0, length);
            core::slice::from_raw_parts_mut(table, length)
        };
        let shared = shared::of(index);
        shared.table.store(table.as_ptr().expose_provenance() as u64, Ordering::Release);
        let entries = Entries::new(index, config.seed);
        let digest = Digest::of(entries.summary(table.iter().copied()));
        Self {
            world,
            shared,
            index,
            count,
            table,
            entries,
            digest,
            order: Mixed::new(count, config.seed ^ u64::from(index)),
            pace: Pace::new(config.verify_rate, world.clock.now_ns()),
            filled: 0,
            published: [0; PARTNERS_MAX as usize],
            seen: [0; PARTNERS_MAX as usize],
            pair_turn: 0,
            reported: 0,
        }
    }

    /// Visits what is due; when to come again.
    pub fn step(&mut self, now_ns: u64) -> u64 {
        if self.filled < self.count {
            self.fill(FILL_BATCH);
            if self.filled == self.count {
                self.shared.generation_min.store(1, Ordering::Release);
                self.pace = Pace::new(self.world.config.verify_rate, now_ns);
            }
            return 0;
        }
        let due = self.pace.due(now_ns, BATCH);
        for _ in 0..due {
            let Some(visit) = self.order.visit() else { return u64::MAX };
            self.visit(visit.slot);
            if visit.pass_done {
                self.audit();
                shared::add(&self.shared.passes, 1);
            }
        }
        self.pace.did(due);
        shared::add(&self.shared.visits, due);
        if due > 0 {
            self.take_pair_turn();
        }
        if due == BATCH { 0 } else { self.pace.next_ns().max(now_ns + REST_NS) }
    }

    /// Ends writing: fills what is left, checks all pages of this processor, and its table.
    pub fn check_own(&mut self) {
        while self.filled < self.count {
            self.fill(FILL_BATCH);
            self.shared.beat();
        }
        self.audit();
        let mut confirmed = 0;
        for slot in 0..self.count {
            confirmed += u64::from(self.check(self.index, slot, self.entry(slot)).is_some());
            if slot % 64 == 0 {
                self.shared.beat();
            }
        }
        self.shared.confirmed.store(confirmed, Ordering::Release);
        for turn in 0..pair::partners(self.world.participants) {
            self.observe(turn);
        }
    }

    /// Checks the next processor's pages with that processor's table. Nobody writes any more.
    pub fn check_neighbour(&mut self) {
        let neighbour = (self.index + 1) % self.world.participants;
        if neighbour == self.index {
            return;
        }
        let published = shared::of(neighbour).table.load(Ordering::Acquire);
        let table = table_of(self.world, neighbour);
        if published != table.addr() as u64 {
            self.fail(published, 0, 0, "table");
            return;
        }
        for slot in 0..share(self.world, neighbour) {
            let place = usize::try_from(slot).unwrap_or(0);
            // SAFETY: the place is within the neighbour's table, which it no longer writes.
            let entry = unsafe { table.add(place).read_volatile() };
            self.check(neighbour, slot, entry);
            if slot % 64 == 0 {
                self.shared.beat();
            }
        }
    }

    fn fill(&mut self, batch: u64) {
        let end = (self.filled + batch).min(self.count);
        for slot in self.filled..end {
            self.write(slot, 1);
        }
        self.filled = end;
        self.shared.filled.store(end, Ordering::Release);
    }

    fn visit(&mut self, slot: u64) {
        let generation = match self.check(self.index, slot, self.entry(slot)) {
            Some(generation) => generation,
            // The failure has been counted. Going on from what is there counts it only once.
            None => u32::try_from(self.entry(slot) >> 32).unwrap_or(0),
        };
        self.write(slot, generation.wrapping_add(1).max(1));
    }

    /// The page's generation if the page is what its owner's table says.
    fn check(&mut self, owner: u32, slot: u64, entry: u64) -> Option<u32> {
        let id = self.id(owner, slot)?;
        let entries = Entries::new(owner, self.world.config.seed);
        let Ok(expected) = entries.decode(slot, entry) else {
            let table = table_of(self.world, owner).addr() as u64 + slot * 8;
            self.fail(table, entry >> 32, 0, "table");
            return None;
        };
        // SAFETY: the page is mapped memory of the working area. Its owner is this processor,
        // or has stopped writing.
        let content = unsafe { &*page_at(id.address) };
        match page::check(content, id, expected) {
            Ok(()) => Some(expected),
            Err(mismatch) => {
                let kind = mismatch.kind.name();
                self.fail(id.address, u64::from(expected), mismatch.found_generation, kind);
                None
            }
        }
    }

    fn write(&mut self, slot: u64, generation: u32) {
        let Some(id) = self.id(self.index, slot) else { return };
        // SAFETY: the page is mapped memory of the working area and this processor's alone.
        page::write(unsafe { &mut *page_at(id.address) }, id, generation);
        let place = usize::try_from(slot).unwrap_or(0);
        let Some(entry) = self.table.get_mut(place) else { return };
        let new = self.entries.encode(slot, generation);
        self.digest.replace(self.entries, slot, *entry, new);
        *entry = new;
    }

    /// Reads the whole table against its digest.
    fn audit(&mut self) {
        let summary = self.entries.summary(self.table.iter().copied());
        if let Err(damage) = self.digest.check(summary) {
            let table = table_of(self.world, self.index).addr() as u64;
            self.fail(table, self.digest.value(), damage.found, "table");
            self.digest = Digest::of(summary);
        }
        let generation_min = u64::from(summary.generation_min);
        self.shared.generation_min.store(generation_min, Ordering::Release);
    }

    /// Counts up in one pair, and looks at another.
    fn take_pair_turn(&mut self) {
        let partners = pair::partners(self.world.participants);
        if partners == 0 {
            return;
        }
        self.pair_turn = (self.pair_turn + 1) % partners;
        let turn = self.pair_turn;
        let page = pair_page(self.world, self.index, turn);
        let published = &mut self.published[turn as usize];
        if let Err(fault) = page.publish(published) {
            self.fail_pair(page, fault);
        }
        self.observe(turn);
    }

    fn observe(&mut self, turn: u32) {
        let vcpus = self.world.participants;
        let writer = (self.index + vcpus - 1 - turn) % vcpus;
        let page = pair_page(self.world, writer, turn);
        if let Err(fault) = page.observe(&mut self.seen[turn as usize]) {
            self.fail_pair(page, fault);
        }
    }

    fn fail_pair(&mut self, page: &PairPage, fault: PairFault) {
        let address = core::ptr::from_ref(page).addr() as u64;
        self.fail(address, fault.expected, fault.found, "pair");
    }

    fn fail(&mut self, address: u64, expected: u64, found: u64, kind: &str) {
        shared::add(&self.shared.failures, 1);
        self.reported += 1;
        if self.reported <= REPORTED_MAX {
            say!(
                "VERIFY FAILED addr={address:#x} expected_gen={expected} found_gen={found} \
                 kind={kind} vcpu={}",
                self.index
            );
        }
    }

    fn id(&self, owner: u32, slot: u64) -> Option<PageId> {
        let page = slot * u64::from(self.world.participants) + u64::from(owner);
        let address = self.world.verify.page(page)?;
        Some(PageId { address, owner, seed: self.world.config.seed })
    }

    fn entry(&self, slot: u64) -> u64 {
        usize::try_from(slot).ok().and_then(|slot| self.table.get(slot)).copied().unwrap_or(0)
    }
}

/// How many pages a processor owns.
fn share(world: &World, index: u32) -> u64 {
    let (pages, stride) = (world.verify.pages(), u64::from(world.participants));
    (pages + stride - 1 - u64::from(index)) / stride
}

fn table_of(world: &World, index: u32) -> *mut u64 {
    let address = world.tables + u64::from(index) * world.table_pages * PAGE_SIZE;
    with_exposed_provenance_mut(usize::try_from(address).unwrap_or(0))
}

fn pair_page(world: &World, writer: u32, turn: u32) -> &'static PairPage {
    let partners = pair::partners(world.participants);
    let page = u64::from(writer * partners + turn);
    let address = usize::try_from(world.pairs + page * PAGE_SIZE).unwrap_or(0);
    // SAFETY: world.rs took a page for each pair out of the free memory and zeroed it; it is
    // only used through this type, whose fields are atomic.
    unsafe { &*with_exposed_provenance_mut::<PairPage>(address) }
}

fn page_at(address: u64) -> *mut Page {
    with_exposed_provenance_mut(usize::try_from(address).unwrap_or(0))
}
