//! A host is killed as a VM that lost its backup, or moved, is protected again: at each step from the swap to
//! the first epoch of the later pair.
//!
//! - `recall-…`: A lost B, and calls it again
//! - `return-…`: B has the VM by a switch-over, and copies it back to A, since it has a disk
//! - `other-…`: B took over from an A that was killed, and protects the VM by another process on A's host

use std::time::Duration;

use anyhow::{Result, ensure};
use api::replication::ReplicationState;

use super::life::b_sleeps;
use super::steps::{OF_THE_FIRST, OF_THE_PAIR, Step};
use super::switches::a_is_killed_by_its_heir;
use crate::row::{Does, End, Expect, Row};
use crate::scene::{LIMIT, Scene};
use crate::world::Place;

const SHORT: Duration = Duration::from_secs(4);

pub fn rows() -> Vec<Row> {
    let mut rows = vec![];
    rows.extend(OF_THE_PAIR.iter().map(|step| recall_kill_a(*step)));
    rows.extend(OF_THE_FIRST.iter().map(|step| recall_kill_b(*step)));
    rows.extend(OF_THE_PAIR.iter().map(|step| return_kill_b(*step)));
    rows.extend(OF_THE_FIRST.iter().map(|step| return_kill_a(*step)));
    rows.extend(OF_THE_PAIR.iter().map(|step| other_kill_b(*step)));
    rows.extend(OF_THE_FIRST.iter().map(|step| other_kill_a(*step)));
    rows.push(other_takes_over());
    rows
}

/// Both are lost to the VM: whoever had it is dead, and the other one has nothing that could start.
fn lost(
    name: String,
    what: String,
    act: impl Fn(&mut Scene) -> Result<()> + Send + Sync + 'static,
) -> Row {
    let act = move |scene: &mut Scene| act(scene).map(|()| End::Nobody);
    let mut row = Row::new(name, what, Expect::Only(End::Nobody), act);
    row.prepared.silence_limit = SHORT;
    row
}

fn recall_kill_a((point, when): Step) -> Row {
    let act = |scene: &mut Scene| {
        scene.blow();
        b_sleeps(scene)?;
        scene.arm(Place::A)?;
        scene.b.signal(libc::SIGCONT)?;
        scene.wait_killed(Place::A)?;
        scene.b.wait_state(ReplicationState::Disconnected, LIMIT)?;
        ensure!(!scene.has_event(Place::B, "failover-finished"), "B has taken over");
        Ok(())
    };
    let what = format!("A goes on alone, calls B again, and is killed {when}");
    lost(format!("recall-kill-a-{point}"), what, act).fault(Place::A, point, Does::Kill)
}

fn recall_kill_b((point, when): Step) -> Row {
    let act = |scene: &mut Scene| {
        scene.blow();
        b_sleeps(scene)?;
        scene.arm(Place::B)?;
        scene.b.signal(libc::SIGCONT)?;
        scene.wait_killed(Place::B)?;
        scene.wait_served()?;
        scene.restart_b()?;
        scene.wait_protected()?;
        Ok(End::Pair)
    };
    let what = format!(
        "A goes on alone and calls B again, which is killed {when}, and started anew: A calls that one"
    );
    let row = Row::new(format!("recall-kill-b-{point}"), what, Expect::Only(End::Pair), act);
    row.fault(Place::B, point, Does::Kill)
}

/// B owns the VM, and A is called, and waits with its answer: B's next swap is that for the pair.
fn a_is_called(scene: &mut Scene) -> Result<()> {
    scene.arm(Place::A)?;
    let waits = scene.ask_failover();
    scene.wait_reached(Place::A)?;
    // Its answer is of a VM that is elsewhere.
    let _ = waits.join();
    Ok(())
}

fn return_kill_b((point, when): Step) -> Row {
    let act = |scene: &mut Scene| {
        scene.blow();
        a_is_called(scene)?;
        scene.arm(Place::B)?;
        scene.go_on(Place::A)?;
        scene.wait_killed(Place::B)?;
        scene.a.wait_state(ReplicationState::Disconnected, LIMIT).map(drop)
    };
    let what = format!("B has the VM by a switch-over, copies it back to A, and is killed {when}");
    lost(format!("return-kill-b-{point}"), what, act)
        .recalls()
        .fault(Place::A, "accepted", Does::Wait)
        .fault(Place::B, point, Does::Kill)
}

fn return_kill_a((point, when): Step) -> Row {
    let what =
        format!("B has the VM by a switch-over and copies it back to A, which is killed {when}");
    let name = format!("return-kill-a-{point}");
    let row = Row::new(name, what, Expect::Only(End::B), a_is_killed_by_its_heir);
    row.recalls().fault(Place::A, point, Does::Kill)
}

/// A is dead, B has the VM, and another process on A's host listens.
fn other_listens(scene: &mut Scene) -> Result<()> {
    scene.a.kill()?;
    scene.wait_b_took_over()?;
    scene.wait_served()?;
    scene.return_a()
}

fn other_kill_b((point, when): Step) -> Row {
    let act = |scene: &mut Scene| {
        scene.blow();
        other_listens(scene)?;
        scene.arm(Place::B)?;
        scene.protect_b()?;
        scene.wait_killed(Place::B)?;
        scene.a.wait_state(ReplicationState::Disconnected, LIMIT).map(drop)
    };
    let what = format!("A is killed, B protects the VM by another process, and is killed {when}");
    lost(format!("other-kill-b-{point}"), what, act).fault(Place::B, point, Does::Kill)
}

fn other_kill_a((point, when): Step) -> Row {
    let act = |scene: &mut Scene| {
        scene.blow();
        other_listens(scene)?;
        scene.arm(Place::A)?;
        let is_begun = scene.protect_b()?;
        scene.wait_killed(Place::A)?;
        scene.wait_b_unprotected(is_begun)?;
        Ok(End::B)
    };
    let what = format!("A is killed, B protects the VM by another process, which is killed {when}");
    let row = Row::new(format!("other-kill-a-{point}"), what, Expect::Only(End::B), act);
    row.fault(Place::A, point, Does::Kill)
}

fn other_takes_over() -> Row {
    let act = |scene: &mut Scene| {
        scene.blow();
        other_listens(scene)?;
        scene.protect_b()?;
        scene.wait_reversed()?;
        scene.wait_served()?;
        scene.b.kill()?;
        scene.a.wait_state(ReplicationState::TakenOver, LIMIT)?;
        Ok(End::Back)
    };
    let what = "A is killed, B protects the VM by another process on A's host, and is killed";
    Row::new("other-takes-over", what, Expect::Only(End::Back), act)
}
