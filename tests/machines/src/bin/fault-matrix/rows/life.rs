//! What a person, or the guest, does to a VM that is protected, and failures that follow each other.

use std::time::Duration;

use anyhow::{Result, ensure};
use api::replication::ReplicationState;
use api::response::VmState;

use crate::row::{Does, EACH, End, Expect, Row};
use crate::scene::{LIMIT, Scene};
use crate::world::Place;

const SHORT: Duration = Duration::from_secs(4);

pub fn rows() -> Vec<Row> {
    let mut rows = orders();
    rows.extend(resets());
    rows.extend(again());
    rows
}

fn orders() -> Vec<Row> {
    let ended = |name, what, act: fn(&mut Scene) -> Result<()>| {
        let mut row = Row::new(name, what, Expect::Only(End::Nobody), move |scene: &mut Scene| {
            scene.blow();
            act(scene)?;
            // Told, and so it does not take over.
            scene.b.wait_state(ReplicationState::Disconnected, LIMIT)?;
            ensure!(!scene.has_event(Place::B, "failover-started"), "B has taken over");
            Ok(End::Nobody)
        });
        row.prepared.silence_limit = SHORT;
        row
    };
    vec![
        Row::new("pause", "vm.pause, later vm.resume", Expect::Only(End::Pair), |scene| {
            scene.blow();
            scene.a.put_ok("vm.pause", None)?;
            scene.wait_committed()?;
            scene.is_held()?;
            scene.a.put_ok("vm.resume", None)?;
            scene.wait_settled()
        }),
        Row::new(
            "pause-kill-a",
            "vm.pause, A is killed: the VM is B's, and paused; vm.resume there",
            Expect::Only(End::B),
            |scene| {
                scene.blow();
                scene.a.put_ok("vm.pause", None)?;
                scene.wait_committed()?;
                scene.a.kill()?;
                scene.wait_b_took_over()?;
                scene.is_unanswered()?;
                let state = scene.b.vm_state()?;
                ensure!(state == VmState::Paused, "B's VM is {state:?}");
                scene.b.put_ok("vm.resume", None)?;
                Ok(End::B)
            },
        ),
        Row::new(
            "snapshot",
            "vm.pause, vm.snapshot, vm.resume",
            Expect::Only(End::Pair),
            |scene| {
                scene.blow();
                let folder = scene.folder.join("snapshot");
                std::fs::create_dir(&folder)?;
                scene.a.put_ok("vm.pause", None)?;
                let body = format!(r#"{{"destination_url":"file://{}"}}"#, folder.display());
                scene.a.put_ok("vm.snapshot", Some(&body))?;
                scene.a.put_ok("vm.resume", None)?;
                ensure!(folder.join("state.json").is_file(), "there is no snapshot");
                scene.wait_settled()
            },
        ),
        ended("shutdown", "vm.shutdown: B is told, nobody takes over", |scene| {
            scene.a.put_ok("vm.shutdown", None)
        }),
        ended(
            "shutdown-arbiter-away",
            "vm.shutdown of A, which does not reach the arbiter: it answers that B may run the VM; then it \
             does, and B is told",
            |scene| {
                scene.arbiter.cut(&scene.world, Place::A)?;
                let answer = scene.a.put("vm.shutdown", None)?;
                ensure!(answer.status == 500, "it is answered {}", answer.status);
                ensure!(answer.body.contains("its backup may run it"), "it says {}", answer.body);
                scene.arbiter.heal(&scene.world, Place::A)
            },
        ),
        ended("delete", "vm.delete: B is told, nobody takes over", |scene| {
            scene.a.put_ok("vm.delete", None)
        }),
        ended("terminate-a", "SIGTERM of A, an order to end the VM: nobody takes over", |scene| {
            scene.a.signal(libc::SIGTERM)?;
            let status = scene.a.wait_exit(LIMIT)?;
            ensure!(status.success(), "A ended with {status}");
            Ok(())
        }),
        Row::new("terminate-b", "SIGTERM of B", Expect::Only(End::A), |scene| {
            scene.blow();
            scene.b.signal(libc::SIGTERM)?;
            scene.b.wait_exit(LIMIT)?;
            scene.wait_a_alone()?;
            Ok(End::A)
        }),
        Row::new("stop-replication-b", "vm.stop-replication on B", Expect::Only(End::A), |scene| {
            scene.blow();
            scene.b.put_ok("vm.stop-replication", None)?;
            scene.wait_a_alone()?;
            Ok(End::A)
        }),
        {
            let mut row = Row::new(
                "degrade-pause",
                "B is killed, and A was told to stay paused then (degrade=pause); vm.resume",
                Expect::Only(End::A),
                |scene| {
                    scene.blow();
                    scene.b.kill()?;
                    scene.wait_a_alone()?;
                    scene.is_unanswered()?;
                    let state = scene.a.vm_state()?;
                    ensure!(state == VmState::Paused, "A's VM is {state:?}");
                    scene.a.put_ok("vm.resume", None)?;
                    Ok(End::A)
                },
            );
            row.prepared.options = ",degrade=pause";
            row
        },
        Row::new(
            "failover-b",
            "vm.failover on B: it takes over from a primary that lives",
            Expect::Only(End::B),
            |scene| {
                scene.blow();
                scene.b.put_ok("vm.failover", Some(r#"{"force":false}"#))?;
                scene.wait_b_took_over()?;
                Ok(End::B)
            },
        ),
    ]
}

fn resets() -> Vec<Row> {
    let mut rows = vec![
        Row::new(
            "reset",
            "The guest is reset (vm.reboot): connections break, as they do; it boots protected",
            Expect::Only(End::Pair),
            |scene| {
                scene.blow();
                let mark = scene.serial.mark();
                scene.a.put_ok("vm.reboot", None)?;
                scene.wait_ready_again(mark)?;
                scene.gather_anew()?;
                scene.wait_settled()
            },
        )
        .felt(),
        Row::new(
            "reset-kill-a-late",
            "The guest is reset, and A is killed right after it: B resets it, or boots it further",
            Expect::Only(End::B),
            |scene| {
                scene.blow();
                scene.a.put_ok("vm.reboot", None)?;
                scene.a.kill()?;
                scene.wait_b_took_over()?;
                scene.gather_anew()?;
                Ok(End::B)
            },
        )
        .felt(),
    ];
    rows.extend(killed_in_a_reset());
    for (name, place, what, end) in [
        (
            "resync",
            None,
            "the VM is copied anew (staging_size=16M), and protected again",
            End::Pair,
        ),
        ("resync-kill-a", Some(Place::A), "A is killed while the VM is copied anew", End::Nobody),
        ("resync-kill-b", Some(Place::B), "B is killed while the VM is copied anew", End::A),
    ] {
        let act = move |scene: &mut Scene| resync(scene, place, end);
        let what = format!("The guest is reset, which is more than an epoch can have: {what}");
        let mut row = Row::new(name, what, Expect::Only(end), act).felt();
        row = row.fault(Place::A, "copy", Does::Wait);
        row.prepared.receive = ",staging_size=16M";
        rows.push(row);
    }
    for row in &mut rows {
        row.prepared.silence_limit = SHORT;
    }
    rows
}

/// No epoch is sealed in a reset: B goes on as if none had been asked for, and no client hears of it.
fn killed_in_a_reset() -> impl Iterator<Item = Row> {
    let points = [
        ("reset-kill-a-before", "reset", "before it has begun"),
        ("reset-kill-a", "cleared", "in the middle, with nothing in its memory"),
    ];
    points.into_iter().map(|(name, point, when)| {
        let act = |scene: &mut Scene| {
            scene.blow();
            scene.arm(Place::A)?;
            let waits = scene.ask("vm.reboot", None);
            scene.wait_killed(Place::A)?;
            ensure!(
                !waits.join().unwrap_or_default(),
                "a reset that never was is answered as done"
            );
            scene.wait_b_took_over()?;
            Ok(End::B)
        };
        let what = format!("The guest is reset, and A is killed {when}: B goes on from before it");
        let row = Row::new(name, what, Expect::Only(End::B), act);
        row.fault(Place::A, point, Does::Kill)
    })
}

fn resync(scene: &mut Scene, victim: Option<Place>, end: End) -> Result<End> {
    scene.blow();
    let mark = scene.serial.mark();
    scene.arm(Place::A)?;
    scene.a.put_ok("vm.reboot", None)?;
    // It is unprotected then, whoever dies.
    scene.wait_reached(Place::A)?;
    if victim != Some(Place::A) {
        scene.wait_ready_again(mark)?;
    }
    if let Some(victim) = victim {
        scene.vmm(victim).kill()?;
    }
    scene.go_on(Place::A)?;
    match end {
        End::Nobody => scene.b.wait_state(ReplicationState::Disconnected, LIMIT).map(drop)?,
        End::A => scene.wait_a_alone().map(drop)?,
        End::Pair | End::Reversed | End::Back | End::B => scene.wait_protected()?,
    }
    if end != End::Nobody {
        scene.gather_anew()?;
    }
    Ok(end)
}

/// Failures that follow each other.
fn again() -> Vec<Row> {
    let mut rows = by_a_person();
    rows.extend(by_itself());
    rows
}

/// The primary calls its backup again, with nobody's word.
fn by_itself() -> Vec<Row> {
    let mut lost_in_the_copy = Row::new(
        "recall-copy-kill-a",
        "B stands still until A goes on alone, and wakes; A is killed as it copies to B again, alone as it \
         was: B has nothing to start from",
        Expect::Only(End::Nobody),
        |scene| {
            scene.blow();
            b_sleeps(scene)?;
            scene.arm(Place::A)?;
            scene.b.signal(libc::SIGCONT)?;
            scene.wait_killed(Place::A)?;
            scene.b.wait_state(ReplicationState::Disconnected, LIMIT)?;
            // It woke, suspected A, and lost; nothing was finished.
            ensure!(!scene.has_event(Place::B, "failover-finished"), "B has taken over");
            Ok(End::Nobody)
        },
    )
    .fault(Place::A, "copy", Does::Kill);
    lost_in_the_copy.prepared.silence_limit = SHORT;
    vec![
        Row::new(
            "recall-kill-a",
            "B stands still until A goes on alone, and wakes; A calls it, and is protected again; A is killed",
            Expect::Only(End::B),
            |scene| {
                scene.blow();
                b_sleeps(scene)?;
                scene.b.signal(libc::SIGCONT)?;
                scene.wait_protected()?;
                scene.wait_served()?;
                scene.a.kill()?;
                scene.wait_b_took_over()?;
                Ok(End::B)
            },
        )
        .with(EACH),
        Row::new(
            "recall-anew-kill-a",
            "B is killed, and started anew; A calls it, and is protected again; once more; A is killed",
            Expect::Only(End::B),
            |scene| {
                scene.blow();
                for _ in 0..2 {
                    scene.b.kill()?;
                    scene.wait_a_alone()?;
                    scene.restart_b()?;
                    scene.wait_protected()?;
                    scene.wait_served()?;
                }
                scene.a.kill()?;
                scene.wait_b_took_over()?;
                Ok(End::B)
            },
        ),
        lost_in_the_copy,
    ]
}

/// B stands still, and A has suspected it and goes on alone.
pub(super) fn b_sleeps(scene: &mut Scene) -> Result<()> {
    scene.b.signal(libc::SIGSTOP)?;
    scene.wait_a_alone()?;
    scene.wait_served()
}

fn by_a_person() -> Vec<Row> {
    vec![
        Row::new(
            "again-kill-a",
            "B is killed; the VM is protected by a new B (vm.replicate); A is killed",
            Expect::Only(End::B),
            |scene| {
                scene.blow();
                scene.b.kill()?;
                scene.wait_a_alone()?;
                protect_again(scene)?;
                scene.a.kill()?;
                scene.wait_b_took_over()?;
                Ok(End::B)
            },
        ),
        Row::new(
            "again-kill-b",
            "B is killed, a new B in its first copy, too, and a third one protects the VM",
            Expect::Only(End::Pair),
            |scene| {
                scene.blow();
                scene.b.kill()?;
                scene.wait_a_alone()?;
                scene.arm(Place::B)?;
                scene.restart_b()?;
                let is_begun = scene.protect()?;
                scene.wait_killed(Place::B)?;
                scene.wait_a_unprotected(is_begun)?;
                scene.wait_served()?;
                protect_again(scene)?;
                Ok(End::Pair)
            },
        )
        .fault(Place::B, "accepted", Does::Kill),
    ]
}

fn protect_again(scene: &mut Scene) -> Result<()> {
    scene.restart_b()?;
    scene.protect()?;
    scene.wait_protected()?;
    scene.wait_served()
}
