//! Arithmetic with a known result: a processor whose registers were damaged or swapped on the
//! way computes something else.

use crate::random::Random;

const MULTIPLIER: u64 = 0x5851_f42d_4c95_7f2d;
const INCREMENT: u64 = 0x1405_7b7e_f767_814f;

/// Independent chains, so that they stay in registers side by side.
pub const CHAINS: usize = 4;

/// Steps every chain on, one step after the other.
#[must_use]
#[inline(never)]
pub fn walk(mut chains: [u64; CHAINS], steps: u64) -> [u64; CHAINS] {
    for _ in 0..steps {
        for chain in &mut chains {
            *chain = chain.wrapping_mul(MULTIPLIER).wrapping_add(INCREMENT);
        }
    }
    chains
}

/// The same result by repeated squaring.
#[must_use]
#[inline(never)]
pub fn jump(chains: [u64; CHAINS], mut steps: u64) -> [u64; CHAINS] {
    let (mut multiplier, mut increment) = (MULTIPLIER, INCREMENT);
    let (mut total_multiplier, mut total_increment) = (1_u64, 0_u64);
    while steps > 0 {
        if steps & 1 == 1 {
            total_multiplier = total_multiplier.wrapping_mul(multiplier);
            total_increment = total_increment.wrapping_mul(multiplier).wrapping_add(increment);
        }
        increment = multiplier.wrapping_add(1).wrapping_mul(increment);
        multiplier = multiplier.wrapping_mul(multiplier);
        steps >>= 1;
    }
    chains.map(|chain| chain.wrapping_mul(total_multiplier).wrapping_add(total_increment))
}

/// Starting values for `walk` and `jump`.
#[must_use]
pub fn chains(random: &mut Random) -> [u64; CHAINS] {
    [(); CHAINS].map(|()| random.number())
}

/// Lanes of the floating-point work: sums and values are four registers of four doubles each.
pub const LANES: usize = 16;

/// `lane + step` summed over `steps`, in each lane; every intermediate result is a whole number
/// below 2^53, so that doubles hold it exactly, in whatever order it is added up.
#[must_use]
pub fn lanes_expected(first: u32, steps: u32) -> [u64; LANES] {
    let (first, steps) = (u64::from(first), u64::from(steps));
    let rising = steps * steps.saturating_sub(1) / 2;
    let mut lane = 0;
    [(); LANES].map(|()| {
        let sum = (first + lane) * steps + rising;
        lane += 1;
        sum
    })
}

/// The floating-point work itself.
#[must_use]
#[inline(always)]
pub fn lanes(first: u32, steps: u32) -> [f64; LANES] {
    let mut sums = [0.0; LANES];
    let mut values = [0.0; LANES];
    let mut lane = 0.0;
    for value in &mut values {
        *value = f64::from(first) + lane;
        lane += 1.0;
    }
    for _ in 0..steps {
        for (sum, value) in sums.iter_mut().zip(&mut values) {
            *sum += *value;
            *value += 1.0;
        }
    }
    sums
}

/// Whether the work gave the result that it must.
#[must_use]
pub fn lanes_right(found: &[f64; LANES], first: u32, steps: u32) -> bool {
    // Both sides are exact, so they are compared exactly: by their bits.
    let expected = lanes_expected(first, steps).map(exact);
    found.iter().zip(&expected).all(|(found, expected)| found.to_bits() == expected.to_bits())
}

/// A whole number below 2^53 as a double.
fn exact(number: u64) -> f64 {
    let low = u32::try_from(number & 0xffff_ffff).unwrap_or(0);
    let high = u32::try_from(number >> 32).unwrap_or(0);
    f64::from(high) * 4_294_967_296.0 + f64::from(low)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_meet() {
        let start = chains(&mut Random::new(5));
        for steps in [0, 1, 2, 3, 1000, 4097] {
            assert_eq!(walk(start, steps), jump(start, steps), "steps {steps}");
        }
        assert_ne!(walk(start, 10), jump(start, 11));
    }

    #[test]
    fn lanes_are_exact() {
        for (first, steps) in [(0, 0), (7, 1), (1_000_000, 2000), (u32::MAX, 4096)] {
            assert!(lanes_right(&lanes(first, steps), first, steps), "{first} {steps}");
        }
    }

    #[test]
    fn one_bit_of_one_lane_is_seen() {
        let mut found = lanes(3, 2000);
        found[15] = f64::from_bits(found[15].to_bits() ^ 1);
        assert!(!lanes_right(&found, 3, 2000));
    }
}
