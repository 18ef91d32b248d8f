//! A process is killed, or hangs, at a step of the protocol.

use std::time::Duration;

use anyhow::Result;

use crate::row::{Does, EACH, End, Expect, Row};
use crate::scene::Scene;
use crate::world::Place;

/// A step of a side, and what it is in words.
pub(super) type Step = (&'static str, &'static str);

const A_STEPS: &[Step] = &[
    ("seal", "with the guest stopped for a seal"),
    ("sealed", "with an epoch sealed and not yet sent"),
    ("given", "while an epoch is being sent"),
    ("sent", "with an epoch sent"),
    ("ack", "with an acknowledgement that it has not looked at"),
    ("acked", "once an epoch's output is released"),
];

const B_STEPS: &[Step] = &[
    ("verified", "with an epoch whole and not acknowledged"),
    ("acked", "with an epoch acknowledged and not applied"),
    ("applying", "in the middle of applying an epoch"),
    ("applied", "with an epoch applied"),
];

/// Of a primary, from the arbiter's pair to the first seal: nothing is acknowledged yet.
pub(super) const OF_THE_PAIR: &[Step] = &[
    ("swap", "before it asks the arbiter for the pair"),
    ("swapped", "once the arbiter has the pair, before it knows"),
    ("paired", "before it tells its backup that they are a pair"),
    ("seal", "in the first seal"),
];

/// Of a backup, from the first copy to the first epoch.
pub(super) const OF_THE_FIRST: &[Step] = &[
    ("accepted", "with the copy about to come"),
    ("paired", "once it has read that they are a pair"),
    ("verified", "with the first epoch whole and not acknowledged"),
    ("applied", "with the first epoch applied"),
];

const SHORT: Duration = Duration::from_secs(4);

pub fn rows() -> Vec<Row> {
    let mut rows = vec![];
    rows.extend(A_STEPS.iter().map(|step| kill_a(*step)));
    rows.extend(B_STEPS.iter().map(|step| kill_b(*step)));
    rows.push(kill_a_early(("copy", "with the first pages on their way")));
    rows.extend(OF_THE_PAIR.iter().map(|step| kill_a_early(*step)));
    rows.push(kill_a_early(("sent", "with the first epoch sent")));
    rows.extend(OF_THE_FIRST.iter().map(|step| kill_b_early(*step)));
    rows.extend(take_over());
    rows.extend(claims());
    rows.extend(switch_over());
    rows
}

fn kill_a((point, when): Step) -> Row {
    let act = |scene: &mut Scene| {
        scene.blow();
        scene.arm(Place::A)?;
        scene.wait_killed(Place::A)?;
        scene.wait_b_took_over()?;
        Ok(End::B)
    };
    let what = format!("A is killed {when}");
    let row = Row::new(format!("kill-a-{point}"), what, Expect::Only(End::B), act);
    let row = row.fault(Place::A, point, Does::Kill);
    if point == "acked" { row.with(EACH).quick() } else { row }
}

fn kill_b((point, when): Step) -> Row {
    let act = |scene: &mut Scene| {
        scene.blow();
        scene.arm(Place::B)?;
        scene.wait_killed(Place::B)?;
        scene.wait_a_alone()?;
        Ok(End::A)
    };
    let what = format!("B is killed {when}");
    let row = Row::new(format!("kill-b-{point}"), what, Expect::Only(End::A), act);
    let row = row.fault(Place::B, point, Does::Kill);
    if point == "applying" { row.quick() } else { row }
}

fn kill_a_early((point, when): Step) -> Row {
    let act = |scene: &mut Scene| {
        scene.blow();
        scene.arm(Place::A)?;
        scene.protect()?;
        scene.wait_killed(Place::A)?;
        nobody_or_b(scene)
    };
    let expect = if point == "sent" { Expect::BOrNobody } else { Expect::Only(End::Nobody) };
    let what = format!("A, not protected yet, is killed {when}");
    let mut row = Row::new(format!("kill-a-first-{point}"), what, expect, act);
    row.prepared.silence_limit = SHORT;
    row.unprotected().fault(Place::A, point, Does::Kill)
}

/// B has taken over from the first epoch, or listens again without anything.
fn nobody_or_b(scene: &mut Scene) -> Result<End> {
    use api::replication::ReplicationState::{Disconnected, TakenOver};
    scene.b.wait("B to decide", crate::scene::LIMIT, |vmm| match vmm.replication().ok()?.state {
        TakenOver => Some(End::B),
        Disconnected => Some(End::Nobody),
        _ => None,
    })
}

fn kill_b_early((point, when): Step) -> Row {
    let act = |scene: &mut Scene| {
        scene.blow();
        scene.arm(Place::B)?;
        let is_begun = scene.protect()?;
        scene.wait_killed(Place::B)?;
        scene.wait_a_unprotected(is_begun)?;
        Ok(End::A)
    };
    let what = format!("B is killed {when}");
    let row = Row::new(format!("kill-b-first-{point}"), what, Expect::Only(End::A), act);
    row.unprotected().fault(Place::B, point, Does::Kill)
}

/// A dies while B is at a step: what B has acknowledged and not applied, it applies first.
fn take_over() -> Vec<Row> {
    let steps = B_STEPS.iter().copied().map(|(point, when)| {
        let act = |scene: &mut Scene| {
            scene.arm(Place::B)?;
            scene.wait_reached(Place::B)?;
            scene.blow();
            scene.a.kill()?;
            scene.go_on(Place::B)?;
            scene.wait_b_took_over()?;
            Ok(End::B)
        };
        let what = format!("A is killed; B hangs {when}, and goes on");
        let row = Row::new(format!("kill-a-b-{point}"), what, Expect::Only(End::B), act);
        row.fault(Place::B, point, Does::Wait)
    });
    let mut rows: Vec<Row> = steps.collect();
    for (point, when) in [
        ("claim", "as it suspects A"),
        ("swap", "as it asks the arbiter"),
        ("swapped", "before it reads the arbiter's answer"),
        ("start", "as it starts the VM"),
        ("started", "as the VM runs"),
    ] {
        let act = |scene: &mut Scene| {
            scene.blow();
            scene.arm(Place::B)?;
            scene.a.kill()?;
            scene.wait_killed(Place::B)?;
            Ok(End::Nobody)
        };
        let what = format!("Both are lost: A is killed, and B {when}");
        let mut row = Row::new(format!("kill-both-{point}"), what, Expect::Only(End::Nobody), act);
        row.prepared.silence_limit = SHORT;
        rows.push(row.fault(Place::B, point, Does::Kill));
    }
    rows
}

/// Both live and are cut apart; one of them dies or hangs on its way to the ownership.
fn claims() -> Vec<Row> {
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
            row.prepared.silence_limit = Duration::from_secs(8);
        }
        rows.push(row.fault(Place::B, point, Does::Kill));
    }
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
    for (point, when, end) in [
        ("claim", "as it suspects B", End::B),
        ("swap", "before it has asked the arbiter", End::B),
        ("swapped", "once it owns the VM alone, which it does not know", End::A),
    ] {
        let act = move |scene: &mut Scene| {
            scene.blow();
            scene.arm(Place::A)?;
            // B is too slow to notice: it stands still.
            scene.b.signal(libc::SIGSTOP)?;
            scene.wait_reached(Place::A)?;
            scene.world.cut(Place::A, Place::B)?;
            scene.b.signal(libc::SIGCONT)?;
            if end == End::B {
                scene.wait_b_took_over()?;
            } else {
                scene.b.wait_state(
                    api::replication::ReplicationState::Disconnected,
                    crate::scene::LIMIT,
                )?;
            }
            scene.go_on(Place::A)?;
            if end == End::A {
                scene.wait_a_alone()?;
            }
            Ok(end)
        };
        let what = format!("A and B are cut apart, and A hangs {when}, until B has decided");
        let row = Row::new(format!("cut-hang-a-{point}"), what, Expect::Only(end), act);
        rows.push(row.fault(Place::A, point, Does::Wait));
    }
    rows
}

/// A planned switch-over, and one of the two dies in it.
fn switch_over() -> Vec<Row> {
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
        let act = move |scene: &mut Scene| {
            scene.blow();
            scene.arm(Place::B)?;
            let waits = scene.ask_failover();
            scene.wait_killed(Place::B)?;
            scene
                .a
                .wait_state(api::replication::ReplicationState::TakenOver, crate::scene::LIMIT)?;
            let _ = waits.join();
            Ok(End::Back)
        };
        let what = format!("The pair is reversed, and B is killed {when}");
        let row = Row::new(format!("reverse-kill-b-{point}"), what, Expect::Only(End::Back), act);
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
