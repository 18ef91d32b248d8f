//! The targets on any toolchain, in seconds: their seeds, and inputs of a generator that gives the
//! same each time. It shows that the targets work, and that they get somewhere, not that there is
//! nothing to find: that is for `scripts/fuzz.sh`.

use understudy_fuzz::seeds::Generator;
use understudy_fuzz::{TARGETS, Target, reach, seeds};

/// How often a seed is changed.
const DENTED: usize = 5;

/// Seeds, and each with some bytes changed.
fn run(target: &Target) {
    let mut generator = Generator::new();
    for seed in seeds::of(target.name) {
        (target.run)(&seed);
        for _ in 0..DENTED {
            let mut dented = seed.clone();
            for _ in 0..=generator.below(3) {
                let at = generator.below(u64::try_from(seed.len()).unwrap().max(1));
                if let Some(byte) = dented.get_mut(usize::try_from(at).unwrap()) {
                    *byte = generator.byte();
                }
            }
            (target.run)(&dented);
        }
    }
}

/// One test: places are counted in the whole process.
#[test]
fn targets_take_their_seeds_and_random_inputs() {
    for target in TARGETS {
        let started = std::time::Instant::now();
        reach::take();
        run(target);
        let found = reach::take();
        let missed: Vec<_> =
            target.places.iter().filter(|place| !found.contains_key(*place)).collect();
        println!("{}: {:?}, {found:?}", target.name, started.elapsed());
        // The rest takes more than chance: coverage finds it.
        let few = 3 * missed.len() > target.places.len();
        assert!(!few, "{} never got to {missed:?}", target.name);
    }
}
