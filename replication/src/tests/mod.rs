//! Both sides together: real threads, real sockets, memory as the guest.

mod again;
mod bad_input;
mod bounds;
mod disk_input;
mod disks;
mod doubt;
mod encodings;
mod failover;
mod fake_backup;
mod fallback;
mod orphan;
mod overlap;
mod pace;
mod pair;
mod scripted;
mod steady;
mod straight;
mod switch;
mod tls;

use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use api::replication::{ReceiveReplicaData, ReplicateData};

use crate::ids::PageIndex;
use crate::testing::{Machine, memory};

/// Two regions with a hole, the second not at a multiple of 64 pages.
pub(crate) const LAYOUT: [(u64, u64); 2] = [(0, 100), (0x10_0000, 173)];

pub(crate) fn small_machine() -> Arc<Machine> {
    Machine::new(memory(&LAYOUT))
}

/// Options as a client would give them.
pub(crate) fn replicate(url: &str, arbiter: Option<&Path>) -> ReplicateData {
    let arbiter = arbiter.map(|dir| format!("file:{}", dir.display()));
    serde_json::from_value(serde_json::json!({
        "destination_url": url, "epoch_ms": 5, "epoch_min_ms": 0, "connections": 3,
        "arbiter": arbiter, "heartbeat_ms": 200, "timeout_ms": 5000, "reconnect": false,
    }))
    .unwrap()
}

pub(crate) fn receive_options(arbiter: Option<&Path>) -> ReceiveReplicaData {
    let arbiter = arbiter.map(|dir| format!("file:{}", dir.display()));
    serde_json::from_value(serde_json::json!({
        "receiver_url": "tcp:127.0.0.1:1", "staging_size": 4 << 20, "arbiter": arbiter,
        "heartbeat_ms": 200, "timeout_ms": 5000,
    }))
    .unwrap()
}

/// Guest threads that write and speak until the machine is destroyed.
pub(crate) struct Workers(Vec<JoinHandle<u64>>);

impl Workers {
    pub(crate) fn start(machine: &Arc<Machine>, count: usize, seed: u64) -> Self {
        let start = |worker: usize| {
            let machine = Arc::clone(machine);
            std::thread::spawn(move || {
                let mut random = Random(seed ^ (worker as u64 + 1).wrapping_mul(0x9E37_79B9));
                let pages = machine.ram().pages();
                let mut steps = 0;
                while machine
                    .work(worker, PageIndex(random.next() % pages), random.next())
                    .is_some()
                {
                    steps += 1;
                    // A guest with some rest between its writes: dirty sets of all sizes.
                    std::thread::sleep(Duration::from_micros(random.next() % 200));
                }
                steps
            })
        };
        Self((0..count).map(start).collect())
    }

    /// Waits for the threads to end; the machine must be off.
    pub(crate) fn join(self) -> u64 {
        self.0.into_iter().map(|worker| worker.join().unwrap()).sum()
    }
}

/// xorshift64*: tests need no better.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 |= 1;
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 8
    }
}

/// Waits until `info` says so; panics with it after a minute.
pub(crate) fn until<T: std::fmt::Debug>(info: impl Fn() -> T, wanted: impl Fn(&T) -> bool) -> T {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let now = info();
        if wanted(&now) {
            return now;
        }
        assert!(Instant::now() < deadline, "still {now:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Processor time that the threads of a name have taken, in ticks of 10 ms.
pub(crate) fn cpu_ticks(thread: &str) -> u64 {
    let mut ticks = 0;
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let Ok(stat) = std::fs::read_to_string(task.unwrap().path().join("stat")) else { continue };
        // proc_pid_stat(5): the name in parentheses, then field 3 on; 14 and 15 are the times.
        let (head, rest) = stat.rsplit_once(')').unwrap();
        if head.split_once('(').unwrap().1 == thread {
            let times = rest.split_whitespace().skip(11).take(2);
            ticks += times.map(|time| time.parse::<u64>().unwrap()).sum::<u64>();
        }
    }
    ticks
}
