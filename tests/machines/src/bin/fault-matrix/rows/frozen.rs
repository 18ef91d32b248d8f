//! A process stands still for longer than the time-out, and wakes: both live then, one of them is silent.

use anyhow::Result;
use api::replication::ReplicationState;

use super::steps::{A_STEPS, B_STEPS};
use crate::row::{Does, End, Expect, Row};
use crate::scene::{LIMIT, Scene, TIMEOUT};
use crate::world::Place;

pub fn rows() -> Vec<Row> {
    let mut rows = vec![
        Row::new(
            "stop-a",
            "A stands still (SIGSTOP) until B has the VM, and wakes (SIGCONT)",
            Expect::Only(End::B),
            |scene| {
                scene.blow();
                scene.a.signal(libc::SIGSTOP)?;
                a_wakes_late(scene)
            },
        )
        .quick(),
        Row::new(
            "stop-b",
            "B stands still until A goes on alone, and wakes",
            Expect::Only(End::A),
            |scene| {
                scene.blow();
                scene.b.signal(libc::SIGSTOP)?;
                b_wakes_late(scene)
            },
        )
        .quick(),
        Row::new(
            "stop-a-short",
            "A stands still for a quarter of the time-out",
            Expect::Only(End::Pair),
            |scene| stands_shortly(scene, Place::A),
        ),
        Row::new(
            "stop-b-short",
            "B stands still for a quarter of the time-out",
            Expect::Only(End::Pair),
            |scene| stands_shortly(scene, Place::B),
        ),
        Row::new(
            "stop-both",
            "Both stand still for two time-outs, and wake",
            Expect::PairOrOne,
            |scene| {
                scene.blow();
                scene.a.signal(libc::SIGSTOP)?;
                scene.b.signal(libc::SIGSTOP)?;
                std::thread::sleep(2 * TIMEOUT);
                scene.a.signal(libc::SIGCONT)?;
                scene.b.signal(libc::SIGCONT)?;
                scene.wait_settled()
            },
        ),
        Row::new(
            "stop-a-kill-b",
            "A stands still shortly, B is killed meanwhile",
            Expect::Only(End::A),
            |scene| {
                scene.blow();
                scene.a.signal(libc::SIGSTOP)?;
                scene.b.kill()?;
                std::thread::sleep(TIMEOUT / 4);
                scene.a.signal(libc::SIGCONT)?;
                scene.wait_a_alone()?;
                Ok(End::A)
            },
        ),
        Row::new(
            "stop-b-kill-a",
            "B stands still, A is killed meanwhile, B wakes",
            Expect::Only(End::B),
            |scene| {
                scene.blow();
                scene.b.signal(libc::SIGSTOP)?;
                scene.a.kill()?;
                std::thread::sleep(2 * TIMEOUT);
                scene.b.signal(libc::SIGCONT)?;
                scene.wait_b_took_over()?;
                Ok(End::B)
            },
        ),
    ];
    for (point, when) in A_STEPS {
        let what = format!("A stands still {when}, until B has the VM, and wakes");
        let row = Row::new(format!("stop-a-{point}"), what, Expect::Only(End::B), |scene| {
            scene.blow();
            scene.arm(Place::A)?;
            scene.wait_reached(Place::A)?;
            a_wakes_late(scene)
        });
        rows.push(row.fault(Place::A, point, Does::Stop));
    }
    for (point, when) in B_STEPS {
        let what = format!("B stands still {when}, until A goes on alone, and wakes");
        let row = Row::new(format!("stop-b-{point}"), what, Expect::Only(End::A), |scene| {
            scene.blow();
            scene.arm(Place::B)?;
            scene.wait_reached(Place::B)?;
            b_wakes_late(scene)
        });
        rows.push(row.fault(Place::B, point, Does::Stop));
    }
    rows.extend(early());
    rows
}

/// The VM is not protected yet: whoever stands still, it runs on A.
fn early() -> Vec<Row> {
    let mut rows = vec![];
    for (point, when) in [
        ("copy", "with the first pages on their way"),
        ("swap", "before it asks the arbiter for the pair"),
        ("swapped", "once the arbiter has the pair, before it knows"),
        ("paired", "before it tells B that they are a pair"),
        ("sealed", "after the first seal"),
    ] {
        let what = format!("A, not protected yet, stands still {when}, until B gave up, and wakes");
        let row = Row::new(format!("stop-a-first-{point}"), what, Expect::Only(End::A), |scene| {
            scene.blow();
            scene.arm(Place::A)?;
            let asked = scene.ask_protect()?;
            scene.wait_reached(Place::A)?;
            scene.b.wait_state(ReplicationState::Disconnected, LIMIT)?;
            scene.a.signal(libc::SIGCONT)?;
            scene.wait_a_unprotected(asked.join().unwrap_or_default())?;
            Ok(End::A)
        });
        rows.push(row.unprotected().fault(Place::A, point, Does::Stop));
    }
    for (point, when) in [
        ("accepted", "with the first copy about to come"),
        ("paired", "once it has read that they are a pair"),
        ("verified", "with the first epoch whole and not acknowledged"),
    ] {
        let what = format!("B stands still {when}, until A runs on alone, and wakes");
        let row = Row::new(format!("stop-b-first-{point}"), what, Expect::Only(End::A), |scene| {
            scene.blow();
            scene.arm(Place::B)?;
            let asked = scene.ask_protect()?;
            scene.wait_reached(Place::B)?;
            scene.wait_a_unprotected(asked.join().unwrap_or_default())?;
            scene.wait_served()?;
            scene.b.signal(libc::SIGCONT)?;
            scene.wait_b_without_primary()?;
            Ok(End::A)
        });
        rows.push(row.unprotected().fault(Place::B, point, Does::Stop));
    }
    rows
}

fn a_wakes_late(scene: &mut Scene) -> Result<End> {
    scene.wait_b_took_over()?;
    scene.wait_served()?;
    scene.a.signal(libc::SIGCONT)?;
    Ok(End::B)
}

fn b_wakes_late(scene: &mut Scene) -> Result<End> {
    scene.wait_a_alone()?;
    scene.wait_served()?;
    scene.b.signal(libc::SIGCONT)?;
    scene.wait_b_without_primary()?;
    Ok(End::A)
}

fn stands_shortly(scene: &mut Scene, place: Place) -> Result<End> {
    scene.blow();
    scene.vmm(place).signal(libc::SIGSTOP)?;
    std::thread::sleep(TIMEOUT / 4);
    scene.vmm(place).signal(libc::SIGCONT)?;
    scene.wait_settled()
}
