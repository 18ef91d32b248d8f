//! `compute`: integer and floating-point arithmetic whose result is known beforehand.

use guest_logic::random::Random;
use guest_logic::sum::{CHAINS, LANES, chains, jump, lanes, lanes_right, walk};

use crate::serial::say;
use crate::shared::{self, Shared};
use crate::world::World;

/// Steps of each kind between two looks at the clock: some ten microseconds.
const STEPS: u32 = 2000;
const OPERATIONS: u64 = STEPS as u64 * (2 * CHAINS as u64 + 2 * LANES as u64);
const REPORTED_MAX: u64 = 16;

pub struct Compute {
    shared: &'static Shared,
    index: u32,
    avx2: bool,
    random: Random,
    reported: u64,
}

impl Compute {
    pub fn new(world: &'static World, index: u32) -> Self {
        Self {
            shared: shared::of(index),
            index,
            avx2: world.avx2,
            random: Random::new(world.config.seed ^ (u64::from(index) << 32)),
            reported: 0,
        }
    }

    pub fn step(&mut self) {
        let start = chains(&mut self.random);
        let walked = walk(start, u64::from(STEPS));
        if walked != jump(start, u64::from(STEPS)) {
            self.fail("integer");
        }
        let first = u32::try_from(self.random.below(1 << 30)).unwrap_or(0);
        // SAFETY: has_avx2() asked CPUID, and ring 0 has switched AVX on.
        let found = if self.avx2 { unsafe { lanes_avx2(first) } } else { lanes_sse2(first) };
        if !lanes_right(&found, first, STEPS) {
            self.fail("float");
        }
        shared::add(&self.shared.operations, OPERATIONS);
    }

    fn fail(&mut self, what: &str) {
        shared::add(&self.shared.failures, 1);
        self.reported += 1;
        if self.reported <= REPORTED_MAX {
            say!("COMPUTE FAILED kind={what} vcpu={}", self.index);
        }
    }
}

#[target_feature(enable = "avx2")]
#[inline(never)]
fn lanes_avx2(first: u32) -> [f64; LANES] {
    lanes(first, STEPS)
}

#[inline(never)]
fn lanes_sse2(first: u32) -> [f64; LANES] {
    lanes(first, STEPS)
}
