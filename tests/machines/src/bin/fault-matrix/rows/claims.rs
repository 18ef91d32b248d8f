//! Both hosts live and are cut apart; one of them dies or hangs on its way to the ownership.

use std::time::Duration;

use anyhow::Result;
use api::replication::ReplicationState;

use crate::row::{Does, EACH, End, Expect, Row, asking_arbiters};
use crate::scene::{LIMIT, Scene};
use crate::world::Place;

/// Of clients of a VM that nobody has in the end: longer than it takes until that is decided.
const LONG: Duration = Duration::from_secs(8);

pub fn rows() -> Vec<Row> {
    let mut rows = b_is_killed();
    rows.extend(b_hangs());
    rows.extend(a_is_killed());
    rows.extend(a_hangs());
    rows
}

fn b_is_killed() -> Vec<Row> {
    let mut rows = vec![];
    for (point, when, end) in [
        ("claim", "as it suspects A", End::A),
        ("swap", "before it has asked the arbiter", End::A),
        ("swapped", "once it owns the VM, which it does not know", End::Nobody),
        ("start", "once it owns the VM, before that runs", End::Nobody),
    ] {
        let act = move |scene: &mut Scene| {
            scene.blow();
            scene.arm(Place::B)?;
            // A hears B still, so that B is first to suspect.
            scene.world.cut_one_way(Place::A, Place::B)?;
            scene.wait_killed(Place::B)?;
            scene.world.cut(Place::A, Place::B)?;
            if end == End::A {
                scene.wait_a_alone()?;
            }
            Ok(end)
        };
        let what = format!("A and B are cut apart, and B is killed {when}");
        let mut row = Row::new(format!("cut-kill-b-{point}"), what, Expect::Only(end), act);
        if end == End::Nobody {
            row.prepared.silence_limit = LONG;
        }
        row = row.with(asking_arbiters(point));
        rows.push(row.fault(Place::B, point, Does::Kill));
    }
    rows
}

fn b_hangs() -> Vec<Row> {
    let mut rows = vec![];
    for (point, when, end) in [
        ("claim", "as it suspects A", End::A),
        ("swap", "before it has asked the arbiter", End::A),
        ("swapped", "once it owns the VM, which it does not know", End::B),
        ("start", "once it owns the VM, before that runs", End::B),
    ] {
        let act = move |scene: &mut Scene| {
            scene.blow();
            scene.arm(Place::B)?;
            scene.world.cut_one_way(Place::A, Place::B)?;
            scene.wait_reached(Place::B)?;
            scene.world.cut(Place::A, Place::B)?;
            if end == End::A {
                scene.wait_a_alone()?;
            } else {
                scene.wait_without_vm(Place::A)?;
            }
            scene.go_on(Place::B)?;
            if end == End::B {
                scene.wait_b_took_over()?;
            }
            Ok(end)
        };
        let what = format!("A and B are cut apart, and B hangs {when}, until A has decided");
        let row = Row::new(format!("cut-hang-b-{point}"), what, Expect::Only(end), act).with(EACH);
        rows.push(row.fault(Place::B, point, Does::Wait));
    }
    rows
}

/// A step of A's claim, what it is in words, and who has the VM where A gets no further.
type Claim = (&'static str, &'static str, End);

const BEFORE: [Claim; 2] =
    [("claim", "as it suspects B", End::B), ("swap", "before it has asked the arbiter", End::B)];

fn a_is_killed() -> Vec<Row> {
    let swapped = ("swapped", "once it owns the VM alone, which it does not know", End::Nobody);
    let rows = BEFORE.into_iter().chain([swapped]).map(|(point, when, end)| {
        let act = move |scene: &mut Scene| {
            scene.blow();
            // B is too slow to notice: it stands still. What the kernel says of A's death is not to reach it,
            // and so B suspects A for its silence.
            scene.b.signal(libc::SIGSTOP)?;
            scene.world.cut(Place::A, Place::B)?;
            scene.arm(Place::A)?;
            scene.wait_killed(Place::A)?;
            scene.b.signal(libc::SIGCONT)?;
            b_decides(scene, end)?;
            Ok(end)
        };
        let what = format!("A and B are cut apart, and A is killed {when}");
        let mut row = Row::new(format!("cut-kill-a-{point}"), what, Expect::Only(end), act);
        if end == End::Nobody {
            row.prepared.silence_limit = LONG;
        }
        row.with(asking_arbiters(point)).fault(Place::A, point, Does::Kill)
    });
    rows.collect()
}

/// B has the VM, or has found that it is not its own.
fn b_decides(scene: &mut Scene, end: End) -> Result<()> {
    match end {
        End::B => scene.wait_b_took_over(),
        _ => scene.b.wait_state(ReplicationState::Disconnected, LIMIT).map(drop),
    }
}

fn a_hangs() -> Vec<Row> {
    let swapped = ("swapped", "once it owns the VM alone, which it does not know", End::A);
    let rows = BEFORE.into_iter().chain([swapped]).map(|(point, when, end)| {
        let act = move |scene: &mut Scene| {
            scene.blow();
            scene.arm(Place::A)?;
            // B is too slow to notice: it stands still.
            scene.b.signal(libc::SIGSTOP)?;
            scene.wait_reached(Place::A)?;
            scene.world.cut(Place::A, Place::B)?;
            scene.b.signal(libc::SIGCONT)?;
            b_decides(scene, end)?;
            scene.go_on(Place::A)?;
            if end == End::A {
                scene.wait_a_alone()?;
            }
            Ok(end)
        };
        let what = format!("A and B are cut apart, and A hangs {when}, until B has decided");
        let row = Row::new(format!("cut-hang-a-{point}"), what, Expect::Only(end), act);
        row.fault(Place::A, point, Does::Wait)
    });
    rows.collect()
}
