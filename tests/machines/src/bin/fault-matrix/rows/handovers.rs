//! A planned switch-over, and one of the two hosts is lost in it.

use std::time::Duration;

use anyhow::Result;
use api::replication::ReplicationState;

use crate::row::{Does, EACH, End, Expect, Row, asking_arbiters};
use crate::scene::{LIMIT, Scene};
use crate::world::Place;

pub fn rows() -> Vec<Row> {
    let mut rows = vec![
        Row::new(
            "switch-over",
            "The VM is handed over to B (vm.failover)",
            Expect::Only(End::B),
            |scene| {
                scene.blow();
                scene.a.put_ok("vm.failover", Some(r#"{"force":false}"#))?;
                scene.wait_b_took_over()?;
                Ok(End::B)
            },
        )
        .quick(),
    ];
    for (place, point, when, end) in [
        (Place::A, "handover", "as it begins", End::B),
        (Place::A, "handed", "once B has the last epoch", End::B),
        (Place::B, "claim", "with the last epoch, before it asks the arbiter", End::A),
        (Place::B, "swap", "as it asks the arbiter", End::A),
        (Place::B, "swapped", "once it owns the VM, which it does not know", End::Nobody),
        (Place::B, "start", "once it owns the VM, before that runs", End::Nobody),
        (Place::B, "started", "as the VM runs", End::Nobody),
    ] {
        let act = move |scene: &mut Scene| {
            scene.blow();
            scene.arm(place)?;
            let waits = scene.ask_failover();
            scene.wait_killed(place)?;
            match end {
                End::A => drop(scene.wait_a_alone()?),
                End::B => scene.wait_b_took_over()?,
                End::Pair | End::Reversed | End::Back | End::Nobody => {}
            }
            // Its answer is of a VM that may be elsewhere by now.
            let _ = waits.join();
            Ok(end)
        };
        let side = if place == Place::A { "A" } else { "B" };
        let what = format!("{side} is killed in a switch-over to B, {when}");
        let name = format!("switch-over-kill-{}-{point}", side.to_lowercase());
        let mut row = Row::new(name, what, Expect::Only(end), act);
        if end == End::Nobody {
            row.prepared.silence_limit = Duration::from_secs(8);
        }
        row = row.with(asking_arbiters(point));
        rows.push(row.fault(place, point, Does::Kill));
    }
    for (point, when, end) in [
        ("claim", "with the last epoch, before it asks the arbiter", End::A),
        ("swap", "as it asks the arbiter", End::A),
        ("swapped", "once it owns the VM, which it does not know", End::B),
        ("start", "once it owns the VM, before that runs", End::B),
    ] {
        let act = move |scene: &mut Scene| {
            scene.blow();
            scene.arm(Place::B)?;
            let waits = scene.ask_failover();
            scene.wait_reached(Place::B)?;
            if end == End::A {
                scene.wait_a_alone()?;
            } else {
                scene.wait_without_vm(Place::A)?;
            }
            scene.b.signal(libc::SIGCONT)?;
            if end == End::B {
                scene.wait_b_took_over()?;
            }
            let _ = waits.join();
            Ok(end)
        };
        let what =
            format!("B stands still in a switch-over, {when}, until A has decided, and wakes");
        let row = Row::new(format!("switch-over-stop-b-{point}"), what, Expect::Only(end), act);
        rows.push(row.fault(Place::B, point, Does::Stop));
    }
    rows.push(switch_over_cut());
    rows.push(switch_over_without_arbiter());
    rows.extend(reversals());
    rows
}

/// The pair is reversed, B is killed on the way, and A goes on from what was handed over.
pub fn a_has_it_back(scene: &mut Scene) -> Result<End> {
    scene.blow();
    scene.arm(Place::B)?;
    let waits = scene.ask_failover();
    scene.wait_killed(Place::B)?;
    scene.a.wait_state(ReplicationState::TakenOver, LIMIT)?;
    // B, which the answer was to be of, is dead: there may be one or none.
    let _ = waits.join();
    Ok(End::Back)
}

/// A switch-over that reverses the pair, and one of the two is lost before they are connected.
fn reversals() -> Vec<Row> {
    let act = |scene: &mut Scene| {
        scene.blow();
        scene.a.put_ok("vm.failover", Some(r#"{"force":false}"#))?;
        scene.wait_reversed()?;
        Ok(End::Reversed)
    };
    let what = "The VM is handed over to B, and A is its backup from then on (return_url)";
    let mut rows = vec![Row::new("reverse", what, Expect::Only(End::Reversed), act).reverses()];
    for (point, when) in [
        ("swapped", "once the record says that it runs the VM, which it does not know"),
        ("start", "before that runs"),
        ("started", "once that runs, and nobody was told"),
    ] {
        let what = format!("The pair is reversed, and B is killed {when}");
        let name = format!("reverse-kill-b-{point}");
        let row = Row::new(name, what, Expect::Only(End::Back), a_has_it_back);
        rows.push(row.reverses().fault(Place::B, point, Does::Kill));
    }
    let act = |scene: &mut Scene| {
        scene.blow();
        scene.arm(Place::A)?;
        let waits = scene.ask_failover();
        scene.wait_killed(Place::A)?;
        scene.wait_b_alone()?;
        let _ = waits.join();
        Ok(End::B)
    };
    let what = "The pair is reversed, and A is killed once B has the last epoch";
    let row = Row::new("reverse-kill-a-handed", what, Expect::Only(End::B), act);
    rows.push(row.reverses().fault(Place::A, "handed", Does::Kill));
    rows.push(reversal_cut());
    rows
}

fn reversal_cut() -> Row {
    let act = |scene: &mut Scene| {
        scene.blow();
        scene.arm(Place::B)?;
        let waits = scene.ask_failover();
        scene.wait_reached(Place::B)?;
        scene.world.cut(Place::A, Place::B)?;
        scene.go_on(Place::B)?;
        scene.wait_b_alone()?;
        let _ = waits.join();
        Ok(End::B)
    };
    let what = "The pair is reversed, and A and B are cut apart as B starts the VM";
    let row = Row::new("reverse-cut", what, Expect::Only(End::B), act).reverses();
    row.fault(Place::B, "started", Does::Wait)
}

fn switch_over_cut() -> Row {
    let act = |scene: &mut Scene| {
        scene.blow();
        scene.arm(Place::A)?;
        let waits = scene.ask_failover();
        scene.wait_reached(Place::A)?;
        scene.world.cut(Place::A, Place::B)?;
        scene.go_on(Place::A)?;
        let winner = scene.wait_winner()?;
        let _ = waits.join();
        Ok(if winner == Place::A { End::A } else { End::B })
    };
    let what = "A and B are cut apart as a switch-over begins";
    Row::new("switch-over-cut", what, Expect::AOrB, act).fault(Place::A, "handover", Does::Wait)
}

fn switch_over_without_arbiter() -> Row {
    let act = |scene: &mut Scene| {
        scene.blow();
        scene.arbiter.cut(&scene.world, Place::B)?;
        let waits = scene.ask_failover();
        scene.wait_holds(Place::B)?;
        scene.is_held()?;
        scene.arbiter.heal(&scene.world, Place::B)?;
        scene.wait_b_took_over()?;
        let _ = waits.join();
        Ok(End::B)
    };
    let what = "A switch-over to a B that does not reach the arbiter: it holds; then it does";
    Row::new("switch-over-arbiter-away", what, Expect::Only(End::B), act).with(EACH)
}
