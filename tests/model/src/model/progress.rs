//! Whether somebody goes on once faults stop.
//!
//! stateright's `eventually` says nothing about cycles (its documentation says so), and a claim that
//! reads and waits is one. So this is checked in another way: from each state that is reached, a run
//! without further faults, in which whatever can go on goes on in turn, has to end, and to end well.
//! Such a run is one fair schedule of many; it is taken from every state, so from wherever another
//! schedule leads, too.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Mutex, PoisonError};

use replication::ownership::{HostId, Standing};
use replication::protocol::backup::State as BackupState;
use replication::protocol::primary::State as PrimaryState;

use super::config::Config;
use super::world::{Act, At, World};
use crate::vm::Vm;

/// Steps of a run after which it does not end.
const STEPS_MAX: usize = 200;
const SHARDS: usize = 64;

/// States from which somebody goes on.
#[derive(Debug)]
pub struct Progress {
    hasher: RandomState,
    good: Vec<Mutex<HashSet<u64>>>,
}

impl Default for Progress {
    fn default() -> Self {
        let good = (0..SHARDS).map(|_| Mutex::default()).collect();
        Self { hasher: RandomState::new(), good }
    }
}

impl Progress {
    fn shard(&self, hash: u64) -> &Mutex<HashSet<u64>> {
        &self.good[usize::try_from(hash % SHARDS as u64).unwrap_or(0)]
    }

    fn is_known(&self, hash: u64) -> bool {
        self.shard(hash).lock().unwrap_or_else(PoisonError::into_inner).contains(&hash)
    }

    /// Whether a run from here ends with somebody who goes on, or ends rightly without.
    #[must_use]
    pub fn goes_on(&self, world: &World, config: &Config) -> bool {
        let mut hash = self.hasher.hash_one(world);
        let mut path = vec![];
        let mut now = world.clone();
        for _ in 0..STEPS_MAX {
            if self.is_known(hash) {
                break;
            }
            path.push(hash);
            let Some(act) = next(&now, config) else {
                if !ends_well(&now, config) {
                    return false;
                }
                break;
            };
            now.act(act, config);
            hash = self.hasher.hash_one(&now);
        }
        if path.len() == STEPS_MAX {
            return false;
        }
        for hash in path {
            self.shard(hash).lock().unwrap_or_else(PoisonError::into_inner).insert(hash);
        }
        true
    }
}

/// What a run without faults does next: whatever goes on by itself, but no epochs for their own sake.
fn next(world: &World, config: &Config) -> Option<Act> {
    let mut acts = vec![];
    for at in [0, 1] {
        world.ordinary(at, config, &mut acts);
        if is_alone(world, at) || is_forsaken(world, at) {
            acts.push(Act::Suspect(at));
        }
    }
    acts.into_iter().find(|act| match act {
        Act::Seal(_) => false,
        Act::Pages(at) => world.hosts[*at].backup().is_some_and(|backup| backup.awaits_pages()),
        _ => true,
    })
}

/// The other end of the connection is closed, and all that came from there was read.
fn is_alone(world: &World, at: At) -> bool {
    world.hosts[at].is_connected()
        && !world.link.open[1 - at]
        && world.link.queues[at].is_empty()
        && !world.hosts[at].backup().is_some_and(|backup| backup.awaits_pages())
}

/// One of a reversed pair, and the other will not be reached.
fn is_forsaken(world: &World, at: At) -> bool {
    world.hosts[at].awaits() && !world.reaches(at) && !world.reaches(1 - at)
}

fn is_alive(world: &World, process: HostId) -> bool {
    world.hosts.iter().any(|host| host.alive && host.identity.host == process)
}

/// Nothing more happens by itself.
fn ends_well(world: &World, config: &Config) -> bool {
    if (0..2).any(|at| goes_on(world, at)) {
        return true;
    }
    let (primary, backup) = (
        world.hosts.iter().find_map(|host| host.primary()),
        world.hosts.iter().find_map(|host| host.backup()),
    );
    let undecided = primary.is_some_and(|p| p.machine.state() == PrimaryState::Undecided);
    let orphan = backup.is_some_and(|b| b.machine.state() == BackupState::Orphan);
    if !config.arbiter && (undecided || orphan) {
        // Only a person knows.
        return true;
    }
    if world.ghost.is_start_lost {
        return true;
    }
    // Both are lost: whoever owns it was killed, and nobody else had to go on.
    match world.arbiter.standing().map(|record| record.standing) {
        // It had won, or its call arrived after it was killed.
        Some(Standing::Solo { owner }) => !is_alive(world, owner),
        Some(Standing::Pair { primary, .. }) => {
            !is_alive(world, primary) && world.ghost.owes.is_none()
        }
        None => !is_alive_with_vm(world),
    }
}

fn is_alive_with_vm(world: &World) -> bool {
    world.hosts.iter().any(|host| host.vm.is_some())
}

/// The guest runs, and what it sends leaves, at once or with the next acknowledgement.
fn goes_on(world: &World, at: At) -> bool {
    let (host, other) = (&world.hosts[at], &world.hosts[1 - at]);
    let Some(vm) = &host.vm else { return false };
    if vm.stands() {
        return false;
    }
    let protected = host.primary().is_some_and(|primary| {
        primary.machine.state() == PrimaryState::Protected
            && primary.is_connected()
            && other.backup().is_some_and(|backup| backup.is_receiving())
    });
    vm.is_free() || protected
}
