//! What a seed decides before its run begins.

use rand::Rng;
use rand::rngs::StdRng;

/// What the arbiter is, where there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One that answers in any way an arbiter may.
    Any,
    /// A directory, by the client that ships.
    Files,
    /// An etcd cluster, by the client that ships.
    Etcd,
}

/// Times in microseconds; chances of a thousand.
#[derive(Clone, Debug)]
pub struct Plan {
    pub arbiter: bool,
    pub kind: Kind,
    /// Whether switch-overs reverse the pair, where there is an arbiter.
    pub reverses: bool,
    /// When faults stop, and when the run ends.
    pub faults_end_us: u64,
    pub end_us: u64,
    pub heartbeat_us: u64,
    pub timeout_us: u64,
    pub epoch_us: u64,
    pub epoch_min_ms: u64,
    /// Longest way of a message; longest wait for the arbiter.
    pub delay_us_max: u64,
    pub arbiter_us_max: u64,
    /// Mean time between faults, and between what people ask for.
    pub fault_every_us: u64,
    pub ask_every_us: u64,
    /// How often a call to the arbiter goes wrong.
    pub arbiter_wrong: u32,
    /// Connections for pages, and what a backup can stage of them.
    pub connections: usize,
    pub staging_pages: u64,
}

const S: u64 = 1_000_000;

impl Plan {
    pub fn draw(rng: &mut StdRng) -> Self {
        let timeout_us = rng.random_range(100_000..500_000);
        let faults_end_us = rng.random_range(2 * S..12 * S);
        Self {
            arbiter: rng.random_ratio(2, 3),
            kind: [Kind::Any, Kind::Files, Kind::Etcd][rng.random_range(0..3)],
            reverses: rng.random_ratio(1, 2),
            faults_end_us,
            // A claim waits for 5 s at most between its tries, a host sleeps for 1.5 s at most, and a
            // backup that does nothing is given up after 2 s.
            end_us: faults_end_us + 15 * S,
            heartbeat_us: timeout_us / 5,
            timeout_us,
            epoch_us: rng.random_range(8_000..60_000),
            epoch_min_ms: rng.random_range(1..10),
            delay_us_max: rng.random_range(200..20_000),
            arbiter_us_max: rng.random_range(1_000..200_000),
            fault_every_us: rng.random_range(S / 2..4 * S),
            ask_every_us: rng.random_range(S / 2..4 * S),
            arbiter_wrong: rng.random_range(0..400),
            connections: rng.random_range(1..=2),
            staging_pages: rng.random_range(24..100),
        }
    }
}
