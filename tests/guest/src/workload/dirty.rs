//! `dirty`: writes a word into one page after the other, at a given rate. Each processor has the
//! pages `slot * participants + index` to itself.

use core::ptr::with_exposed_provenance_mut;

use guest_logic::free::Area;
use guest_logic::machine::PAGE_SIZE;
use guest_logic::order::{Pattern, Writes};
use guest_logic::pace::Pace;

use crate::shared::{self, Shared};
use crate::world::World;

/// Pages of one step.
const BATCH: u64 = 256;
/// Waking up costs more than a few pages: they are written together.
const REST_NS: u64 = 2_000_000;

pub struct Dirty {
    area: &'static Area,
    shared: &'static Shared,
    stride: u64,
    index: u64,
    writes: Writes,
    pace: Pace,
    /// A small rate can leave a processor with no page at all.
    resting: bool,
    total: u64,
}

impl Dirty {
    pub fn new(world: &'static World, index: u32) -> Self {
        let config = &world.config;
        let (stride, index_wide) = (u64::from(world.participants), u64::from(index));
        let share = |total: u64| (total + stride - 1 - index_wide) / stride;
        let pattern = match config.dirty_order {
            Pattern::Hot { hot } => Pattern::Hot { hot: share(hot).max(1) },
            other => other,
        };
        let pages = share(world.dirty.pages());
        let rate = share(config.dirty_pages);
        Self {
            area: &world.dirty,
            shared: shared::of(index),
            stride,
            index: index_wide,
            writes: Writes::new(pattern, pages, config.seed.wrapping_add(index_wide)),
            pace: Pace::new(rate, world.clock.now_ns()),
            resting: pages == 0 || (rate == 0 && config.dirty_pages > 0),
            total: 0,
        }
    }

    /// Writes what is due; when to come again.
    pub fn step(&mut self, now_ns: u64) -> u64 {
        if self.resting {
            return u64::MAX;
        }
        let due = self.pace.due(now_ns, BATCH);
        for _ in 0..due {
            self.write_one();
        }
        self.pace.did(due);
        shared::add(&self.shared.dirtied, due);
        if due == BATCH { 0 } else { self.pace.next_ns().max(now_ns + REST_NS) }
    }

    fn write_one(&mut self) {
        self.total = self.total.wrapping_add(1);
        let page = self.area.page(self.writes.slot() * self.stride + self.index);
        let Some(page) = page.and_then(|page| usize::try_from(page).ok()) else { return };
        let offset = usize::try_from(self.total * 8 % PAGE_SIZE).unwrap_or(0);
        // SAFETY: the page is mapped memory of the dirty area, and this processor's alone.
        unsafe {
            with_exposed_provenance_mut::<u64>(page + offset).write_volatile(self.total);
        }
    }
}
