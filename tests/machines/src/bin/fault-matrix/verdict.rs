//! The oracle: what must hold once a row has done its worst.
//!
//! - who goes on serves its clients, and its side says why (state, event)
//! - the other side, where its process lives, has no VM, says that it lost, and is silent on the wire
//! - the arbiter's records have no gap
//! - all that the clients saw is linearizable, no connection broke, and the log of the VM that goes on has
//!   every acknowledged write (docs/design/0012)

use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use api::replication::{ReplicationState, Role};
use understudy_tests::kv::client::Client;
use understudy_tests::kv::crowd::Seen;
use understudy_tests::kv::history::Operation;
use understudy_tests::kv::judge;
use understudy_tests::kv::violation::Violation;
use understudy_tests::network::SERVER;

use crate::row::{End, Row};
use crate::scene::{LIMIT, Scene};
use crate::world::Place;

/// What a round of a row showed.
pub struct Outcome {
    pub end: End,
    /// The longest time in which no client was answered, microseconds; none where nobody goes on.
    pub without_service_us: Option<u64>,
    pub answered: usize,
}

/// Holds everything against the row's end.
pub fn settle(mut scene: Scene, end: End, row: &Row) -> Result<Outcome> {
    ensure!(row.expect.allows(end), "{end:?} goes on, which is not {:?}", row.expect);
    match end {
        End::A => alone(&mut scene, Place::A, Place::B, row.prepared.recalls)?,
        End::B => alone(&mut scene, Place::B, Place::A, row.prepared.recalls)?,
        End::Pair => pair(&mut scene)?,
        End::Reversed => reversed(&mut scene)?,
        End::Back => back(&mut scene)?,
        End::Nobody => nobody(&mut scene)?,
    }
    let records = scene.arbiter.records(&scene.world)?;
    let blow = scene.blow_at().context("the row has not said when it strikes")?;
    let mut seen = scene.take_crowd()?.finish();
    let survivor = match end {
        End::A | End::Pair | End::Back => Some(Place::A),
        End::B | End::Reversed => Some(Place::B),
        End::Nobody => None,
    };
    if let Some(survivor) = survivor {
        stop(&mut scene, &mut seen, survivor, row)?;
    }
    if end == End::Pair {
        scene.b.wait_state(ReplicationState::Disconnected, LIMIT)?;
    }
    let Seen { mut operations, mut violations, .. } = seen;
    operations.extend(scene.take_before());
    violations.retain(|violation| !is_allowed(violation, row, end));
    let has_disk = !row.prepared.reverses;
    let image = survivor.filter(|_| has_disk).map(|place| scene.image(place));
    violations.extend(judge::judge(&operations, image.as_deref())?.violations);
    if !violations.is_empty() {
        let found: Vec<String> = violations.iter().take(4).map(Violation::chain).collect();
        let count = violations.len();
        bail!("{end:?} goes on, {records} records, {count} findings: {}", found.join("; "));
    }
    Ok(Outcome {
        end,
        without_service_us: survivor.map(|_| without_service_us(&operations, blow)),
        answered: operations.iter().filter(|operation| operation.returned.is_some()).count(),
    })
}

/// One side goes on, the other has nothing more to say.
fn alone(scene: &mut Scene, survivor: Place, other: Place, recalls: bool) -> Result<()> {
    scene.wait_served()?;
    let is_primary = scene.vmm(survivor).replication()?.role == Role::Primary;
    // B is one where it has the VM by a switch-over and was told of a backup.
    let (wanted, event) = if survivor == Place::A || is_primary {
        (ReplicationState::Degraded, "replication-degraded")
    } else {
        (ReplicationState::TakenOver, "failover-finished")
    };
    let found = scene.vmm(survivor).replication()?.state;
    // A failure before the first commit ends what had not begun.
    use ReplicationState::{Disconnected, Protected, Stopped, Syncing};
    let never_synced = !scene.has_event(survivor, "replication-synced");
    let is_early = matches!(found, Stopped | Disconnected) && (is_primary || never_synced);
    // It was alone, which the event says, and calls the other one as soon as that can be reached.
    let is_again = is_primary && matches!(found, Syncing | Protected);
    ensure!(found == wanted || is_early || is_again, "{survivor:?} goes on and is {found:?}");
    // Alone since the switch-over, if no epoch of the copy back was committed: nothing has changed.
    let was_alone = recalls && never_synced;
    if !is_early && !was_alone {
        scene.wait_event(survivor, &[event])?;
    }
    scene.wait_without_vm(other)?;
    let is_backup =
        other == Place::A && scene.a.is_alive() && scene.a.replication()?.role == Role::Backup;
    if other == Place::A && scene.a.is_alive() && !is_backup {
        scene.a.wait_state(ReplicationState::Lost, LIMIT)?;
        scene.wait_event(other, &["replication-lost", "failover-finished"])?;
    }
    let before = scene.host(other).frames()?;
    scene.wait_served()?;
    let after = scene.host(other).frames()?;
    ensure!(before == after, "{other:?} lost the VM and sent {} frames", after - before);
    Ok(())
}

/// Both go on as they were.
fn pair(scene: &mut Scene) -> Result<()> {
    scene.wait_served()?;
    scene.wait_protected()?;
    let before = scene.world.b.frames()?;
    let committed = scene.a.replication()?.epoch_committed;
    scene.wait_served()?;
    let info = scene.a.replication()?;
    ensure!(info.state == ReplicationState::Protected, "A is {:?}", info.state);
    ensure!(info.epoch_committed > committed, "no epoch was committed after {committed}");
    ensure!(scene.world.b.frames()? == before, "B speaks beside its primary");
    Ok(())
}

/// B goes on, and A has an epoch of it, and then the next.
fn reversed(scene: &mut Scene) -> Result<()> {
    scene.wait_served()?;
    scene.wait_reversed()?;
    scene.wait_event(Place::B, &["replication-reversed"])?;
    ensure!(!scene.has_event(Place::B, "replication-degraded"), "B was without a backup");
    scene.wait_without_vm(Place::A)?;
    let before = scene.world.a.frames()?;
    let committed = scene.b.replication()?.epoch_committed;
    scene.wait_served()?;
    let found = scene.b.replication()?.epoch_committed;
    ensure!(found > committed, "no epoch was committed after {committed}");
    ensure!(scene.world.a.frames()? == before, "A speaks beside its primary");
    Ok(())
}

/// A goes on, which was the VM's backup by then; B is dead, or lost it.
fn back(scene: &mut Scene) -> Result<()> {
    scene.wait_served()?;
    let found = scene.a.replication()?.state;
    ensure!(found == ReplicationState::TakenOver, "A goes on and is {found:?}");
    scene.wait_without_vm(Place::B)?;
    let before = scene.world.b.frames()?;
    scene.wait_served()?;
    let after = scene.world.b.frames()?;
    ensure!(before == after, "B lost the VM and sent {} frames", after - before);
    Ok(())
}

fn nobody(scene: &mut Scene) -> Result<()> {
    scene.wait_without_vm(Place::A)?;
    scene.wait_without_vm(Place::B)?;
    scene.is_held()
}

/// What clients may meet with where nobody goes on, or where the row says so.
fn is_allowed(violation: &Violation, row: &Row, end: End) -> bool {
    let is_felt = row.is_felt || end == End::Nobody;
    let is_break = matches!(
        violation,
        Violation::Connection { .. }
            | Violation::Closed { .. }
            | Violation::Silent { .. }
            | Violation::Refused { .. }
    );
    is_felt && is_break
}

/// The last word on every key, and the end of the guest: what it has flushed is in its image.
fn stop(scene: &mut Scene, seen: &mut Seen, survivor: Place, row: &Row) -> Result<()> {
    let limit = row.prepared.silence_limit;
    let connect = |sequence: &_| {
        let connect = || Client::connect(1000, SERVER, limit, sequence);
        scene.world.clients.within(connect)?
    };
    let mut reader = match seen.read_back(connect) {
        Ok(reader) => reader,
        Err(error) if seen.violations.is_empty() => return Err(error),
        // A server that nobody can talk to any more is among what the clients found.
        Err(_) => return Ok(()),
    };
    match reader.stop() {
        Ok(()) => {
            let status = scene.vmm(survivor).wait_exit(LIMIT)?;
            ensure!(status.success(), "{survivor:?} ended with {status}");
        }
        Err(violation) => seen.violations.push(violation),
    }
    Ok(())
}

/// The longest time without an answer to anybody that was not over at the blow.
fn without_service_us(operations: &[Operation], blow: Instant) -> u64 {
    let mut answers: Vec<Instant> =
        operations.iter().filter_map(|operation| Some(operation.returned?.event.at)).collect();
    answers.sort_unstable();
    let gaps = answers.windows(2).filter(|pair| pair[1] >= blow);
    let longest = gaps.map(|pair| pair[1].duration_since(pair[0])).max().unwrap_or_default();
    u64::try_from(longest.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use understudy_tests::kv::history::{Event, Kind, Returned};

    use super::*;

    #[test]
    fn the_time_without_service_is_nobody_s_answer_from_the_blow_on() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let event = |ms| Event { sequence: ms, at: at(ms) };
        let operation = |from, to| Operation {
            client: 0,
            id: from,
            key: 1,
            kind: Kind::Get,
            invoked: event(from),
            returned: Some(Returned { event: event(to), value: 0 }),
        };
        let mut operations: Vec<_> =
            [(0, 1), (1, 400), (2, 500), (3, 740), (600, 760)].map(|(a, b)| operation(a, b)).into();
        operations.push(Operation { returned: None, ..operation(1, 2) });
        assert_eq!(without_service_us(&operations, at(450)), 240_000);
        assert_eq!(without_service_us(&operations, at(750)), 20_000);
        assert_eq!(without_service_us(&operations, at(0)), 399_000);
        assert_eq!(without_service_us(&operations, at(900)), 0);
    }
}
