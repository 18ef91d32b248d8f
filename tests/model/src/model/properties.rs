//! What has to hold in every state, and what has to happen in some.

use replication::protocol::backup::State as BackupState;
use replication::protocol::primary::{Purpose, State as PrimaryState};
use stateright::Property;

use super::config::Config;
use super::world::{Protocol, World};
use crate::host::primary::Engine as Primary;

pub const ONE_OWNER: &str = "one owner";
pub const ONE_SPEAKER: &str = "one speaker per generation";
pub const NOTHING_LOST: &str = "released output is never lost";
pub const SAID_ONCE: &str = "what is handed over is said once";
pub const ACKNOWLEDGED: &str = "a take-over starts from the last acknowledged epoch";
pub const PROMISE: &str = "output committed under protection is never lost";
pub const PROGRESS: &str = "somebody goes on once faults stop";

/// The properties of a configuration.
#[must_use]
pub fn all(config: &Config) -> Vec<Property<Protocol>> {
    let mut all = vec![
        Property::always(ONE_OWNER, |_, world: &World| one_owner(world)),
        Property::always(SAID_ONCE, |_, world: &World| world.ghost.is_said_once()),
        Property::always(ACKNOWLEDGED, |_, world: &World| world.ghost.is_acknowledged()),
    ];
    if config.arbiter {
        all.push(Property::always(NOTHING_LOST, |_, world: &World| world.ghost.is_nothing_lost()));
        all.push(Property::always(ONE_SPEAKER, |_, world: &World| world.ghost.has_one_speaker()));
    } else {
        all.push(Property::always(PROMISE, |_, world: &World| world.ghost.is_promise_kept()));
    }
    all.push(Property::always(PROGRESS, |model: &Protocol, world: &World| {
        model.progress.goes_on(world, &model.config)
    }));
    if config.broken.is_none() {
        all.extend(examples(config));
    }
    all
}

/// Never do two machines run whose output leaves at once, and no machine is continued twice.
fn one_owner(world: &World) -> bool {
    let free = world.hosts.iter().filter(|host| host.is_free()).count();
    free <= 1 && world.ghost.is_continued_once()
}

fn primary_is(world: &World, state: PrimaryState) -> bool {
    world.hosts.iter().any(|host| host.primary().is_some_and(|p| p.machine.state() == state))
}

fn backup_is(world: &World, state: BackupState) -> bool {
    world.hosts.iter().any(|host| host.backup().is_some_and(|b| b.machine.state() == state))
}

/// What has to be possible: a model in which nothing happens proves nothing.
fn examples(config: &Config) -> Vec<Property<Protocol>> {
    let mut all = vec![
        Property::sometimes("an epoch is committed", |_, world: &World| {
            world.ghost.promised().iter().any(|promised| *promised > 1)
        }),
        Property::sometimes("two epochs are in flight", |_, world: &World| {
            world.hosts.iter().any(|h| h.primary().is_some_and(|p| p.machine.in_flight() == 2))
        }),
    ];
    if config.arbiter {
        all.push(Property::sometimes("a backup takes over", |_, world: &World| {
            world.ghost.started.iter().any(|start| !start.from.handover)
        }));
        all.push(Property::sometimes("a primary wins, alone", |_, world: &World| {
            world.arbiter.generation().0 == 2 && world.ghost.started.is_empty()
        }));
        all.push(Property::sometimes("both claim", |_, world: &World| {
            primary_is(world, PrimaryState::Claiming(Purpose::PeerLost))
                && backup_is(world, BackupState::Claiming)
        }));
    } else {
        all.push(Property::sometimes("a person starts an orphan", |_, world: &World| {
            world.ghost.started.iter().any(|start| !start.from.handover)
        }));
        all.push(Property::sometimes("a switch-over is undecided", |_, world: &World| {
            primary_is(world, PrimaryState::Undecided)
        }));
    }
    if config.asks > 0 {
        all.push(Property::sometimes("a switch-over is done", |_, world: &World| {
            world.ghost.started.iter().any(|start| start.from.handover)
                && world.hosts.iter().all(|host| host.alive && host.primary().is_none())
        }));
    }
    if config.reverses {
        all.push(Property::sometimes("a reversed pair is protected", |_, world: &World| {
            let back = world.hosts[1].primary();
            back.is_some_and(|p| p.machine.committed() > p.first() && p.is_connected())
                && world.arbiter.generation().0 == 2
        }));
        all.push(Property::sometimes("a pair is reversed and back", |_, world: &World| {
            let first = world.hosts[0].primary();
            first.is_some_and(|p| p.is_connected() && p.machine.generation().0 == 3)
                && world.arbiter.generation().0 == 3
        }));
        all.push(Property::sometimes("the old host goes on from the last epoch", |_, world| {
            let world: &World = world;
            world.ghost.started.len() == 2 && world.hosts[0].is_free()
        }));
        all.push(Property::sometimes("a new host loses what nobody heard", |_, world: &World| {
            world.ghost.started.len() == 2 && world.hosts[1].alive && world.hosts[1].vm.is_none()
        }));
    }
    if config.too_large > 0 {
        all.push(Property::sometimes("a copy anew is protected", |_, world: &World| {
            let anew = |p: &Primary| p.machine.is_protected() && p.machine.generation().0 >= 3;
            world.hosts.iter().any(|host| host.primary().is_some_and(anew))
        }));
    }
    if config.sessions > 1 {
        all.push(Property::sometimes("protected in the other direction", |_, world: &World| {
            let back = world.hosts[1].primary();
            back.is_some_and(|p| p.machine.is_protected())
        }));
    }
    all
}
