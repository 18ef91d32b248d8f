//! `dirty`: writes into one page after the other. Either at a given rate and in a given order, each
//! processor the pages `slot * participants + index`; or a fixed set in rounds, of which each
//! processor has a part to itself.

use core::ops::Range;
use core::ptr::with_exposed_provenance_mut;

use guest_logic::cmdline::Fill;
use guest_logic::free::Area;
use guest_logic::machine::PAGE_SIZE;
use guest_logic::order::{Dealt, Pattern, Rounds, Writes};
use guest_logic::pace::Pace;
use guest_logic::random::Random;

use crate::shared::{self, Shared};
use crate::world::World;

/// Pages of one step.
const BATCH: u64 = 256;
/// Waking up costs more than a few pages: they are written together.
const REST_NS: u64 = 2_000_000;
const MS: u64 = 1_000_000;
const WORD: u64 = 8;
const CACHE_LINE: u64 = 64;

pub struct Dirty {
    area: &'static Area,
    shared: &'static Shared,
    plan: Plan,
    /// Pages that are still to be filled: places of the set, or of the area.
    unfilled: Range<u64>,
    fill: Fill,
    contents: Random,
    bytes: u64,
    total: u64,
}

enum Plan {
    /// A small rate can leave a processor with no page at all.
    Resting,
    Paced {
        writes: Writes,
        pace: Pace,
        stride: u64,
        index: u64,
    },
    Rounds {
        set: Dealt,
        rounds: Rounds,
    },
}

impl Dirty {
    pub fn new(world: &'static World, index: u32) -> Self {
        let config = &world.config;
        let now_ns = world.clock.now_ns();
        let plan = if config.dirty_set > 0 {
            let set = dealt(world);
            let slots = part(world, index, set.pages());
            Plan::Rounds { set, rounds: Rounds::new(slots, config.dirty_period_ms * MS, now_ns) }
        } else {
            paced(world, index, now_ns)
        };
        let unfilled = part(world, index, Self::to_fill(world).unwrap_or(0));
        Self {
            area: &world.dirty,
            shared: shared::of(index),
            plan,
            unfilled,
            fill: config.dirty_fill,
            contents: Random::new(config.seed ^ (u64::from(index) << 32)),
            bytes: config.dirty_bytes,
            total: 0,
        }
    }

    /// Pages that all processors together fill at first.
    pub fn to_fill(world: &World) -> Option<u64> {
        match world.config.dirty_fill {
            Fill::Nothing => None,
            Fill::Set => Some(dealt(world).whole().pages()),
            Fill::All => Some(world.dirty.pages()),
        }
    }

    /// Writes what is due; when to come again.
    pub fn step(&mut self, now_ns: u64) -> u64 {
        if !self.unfilled.is_empty() {
            self.fill_some();
            return 0;
        }
        let (area, total, bytes) = (self.area, &mut self.total, self.bytes);
        let (did, next_ns) = match &mut self.plan {
            Plan::Resting => return u64::MAX,
            Plan::Paced { writes, pace, stride, index } => {
                let due = pace.due(now_ns, BATCH);
                for _ in 0..due {
                    *total = total.wrapping_add(1);
                    let page = writes.slot() * *stride + *index;
                    write(area, page, *total * WORD, WORD, *total);
                }
                pace.did(due);
                (due, if due == BATCH { 0 } else { pace.next_ns().max(now_ns + REST_NS) })
            }
            Plan::Rounds { set, rounds } => {
                let due = rounds.due(now_ns, BATCH);
                let round = rounds.round();
                let count = due.end - due.start;
                for slot in due {
                    *total = total.wrapping_add(1);
                    // Not at one offset in all pages, which would share few lines of the cache.
                    write(area, set.page(round, slot), slot * CACHE_LINE, bytes, *total);
                }
                (count, rounds.next_ns())
            }
        };
        shared::add(&self.shared.dirtied, did);
        next_ns
    }

    fn fill_some(&mut self) {
        let start = self.unfilled.start;
        self.unfilled.start = self.unfilled.end.min(start + BATCH);
        for place in start..self.unfilled.start {
            let page = match (&self.plan, self.fill) {
                (Plan::Rounds { set, .. }, Fill::Set) => set.whole().page(place),
                _ => place,
            };
            for word in 0..PAGE_SIZE / WORD {
                write(self.area, page, word * WORD, WORD, self.contents.number());
            }
        }
        shared::add(&self.shared.dirty_filled, self.unfilled.start - start);
    }
}

fn paced(world: &World, index: u32, now_ns: u64) -> Plan {
    let config = &world.config;
    let (stride, index) = (u64::from(world.participants), u64::from(index));
    let share = |total: u64| (total + stride - 1 - index) / stride;
    let pattern = match config.dirty_order {
        Pattern::Hot { hot } => Pattern::Hot { hot: share(hot).max(1) },
        other => other,
    };
    let pages = share(world.dirty.pages());
    let rate = share(config.dirty_pages);
    if pages == 0 || (rate == 0 && config.dirty_pages > 0) {
        return Plan::Resting;
    }
    let writes = Writes::new(pattern, pages, config.seed.wrapping_add(index));
    Plan::Paced { writes, pace: Pace::new(rate, now_ns), stride, index }
}

fn dealt(world: &World) -> Dealt {
    let config = &world.config;
    let sets = (config.dirty_set, config.dirty_sets);
    Dealt::new(world.dirty.pages(), sets, config.dirty_run, config.seed)
}

/// A processor's part of `0..total`, adjacent: its pages are then near each other, too.
fn part(world: &World, index: u32, total: u64) -> Range<u64> {
    let (of, index) = (u64::from(world.participants), u64::from(index));
    total * index / of..total * (index + 1) / of
}

/// Writes `value` into `bytes` bytes of a page from `offset` on, around its end.
fn write(area: &Area, page: u64, offset: u64, bytes: u64, value: u64) {
    let page = area.page(page).and_then(|page| usize::try_from(page).ok());
    let Some(page) = page else { return };
    for word in 0..bytes / WORD {
        let offset = usize::try_from((offset + word * WORD) % PAGE_SIZE).unwrap_or(0);
        // SAFETY: the page is mapped memory of the dirty area, and this processor's alone.
        unsafe {
            with_exposed_provenance_mut::<u64>(page + offset).write_volatile(value);
        }
    }
}
