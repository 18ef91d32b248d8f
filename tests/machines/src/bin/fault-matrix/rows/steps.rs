//! A process is killed, or hangs, at a step of the protocol.

use std::time::Duration;

use anyhow::Result;

use crate::row::{Does, EACH, End, Expect, Row, asking_arbiters};
use crate::scene::Scene;
use crate::world::Place;

/// A step of a side, and what it is in words.
pub(super) type Step = (&'static str, &'static str);

pub(super) const A_STEPS: &[Step] = &[
    ("seal", "with the guest stopped for a seal"),
    ("sealed", "with an epoch sealed and not yet sent"),
    ("given", "with an epoch handed to its senders"),
    ("send", "as a sender is about to send some pages of an epoch"),
    ("sent", "with an epoch sent"),
    ("ack", "with an acknowledgement that it has not looked at"),
    ("acked", "once an epoch's output is released"),
];

pub(super) const B_STEPS: &[Step] = &[
    ("staged", "with some pages of an epoch"),
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
    rows.extend(first_copy());
    rows.extend(first_pair());
    rows.extend(take_over());
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
    row = row.with(asking_arbiters(point));
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

/// B is lost while A copies to it: the VM was never anybody else's, and A runs it as before, heard by its
/// clients all the time. The link is slow: on a fast one all of this small VM is out by then, the arbiter is
/// asked for the pair, and output is held.
fn first_copy() -> Vec<Row> {
    let lost = |name, what, lose: fn(&mut Scene) -> Result<()>| {
        let act = move |scene: &mut Scene| {
            scene.blow();
            scene.world.throttle("20mbit", "200ms")?;
            scene.arm(Place::A)?;
            let asked = scene.ask_protect()?;
            scene.wait_reached(Place::A)?;
            lose(scene)?;
            scene.go_on(Place::A)?;
            scene.wait_a_unprotected(asked.join().unwrap_or_default())?;
            scene.wait_event(Place::A, &["replication-failed"])?;
            Ok(End::A)
        };
        let row = Row::new(name, what, Expect::Only(End::A), act);
        row.unprotected().fault(Place::A, "copy", Does::Wait)
    };
    vec![
        lost(
            "kill-b-first-copy",
            "B is killed with the first pages of the first copy on their way, on a slow link",
            |scene| scene.b.kill(),
        ),
        lost(
            "cut-first-copy",
            "A and B are cut apart with the first pages of the first copy on their way, on a slow link",
            |scene| scene.world.cut(Place::A, Place::B),
        ),
    ]
}

/// B is out of reach as A makes a pair of the two, and hears nothing of it: A holds output until it suspects
/// B, and asks for the VM alone.
fn first_pair() -> Vec<Row> {
    let rows = OF_THE_PAIR.iter().map(|(point, when)| {
        let act = |scene: &mut Scene| {
            scene.blow();
            scene.arm(Place::A)?;
            let asked = scene.ask_protect()?;
            scene.wait_reached(Place::A)?;
            scene.world.cut(Place::A, Place::B)?;
            scene.go_on(Place::A)?;
            scene.wait_a_unprotected(asked.join().unwrap_or_default())?;
            scene.wait_event(Place::A, &["replication-degraded"])?;
            scene.world.heal()?;
            scene.wait_b_without_primary()?;
            Ok(End::A)
        };
        let what = format!("A and B are cut apart, A not protected yet, {when}; healed later");
        let row = Row::new(format!("cut-first-{point}"), what, Expect::Only(End::A), act);
        row.unprotected().with(asking_arbiters(point)).fault(Place::A, point, Does::Wait)
    });
    rows.collect()
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
        row = row.with(asking_arbiters(point));
        rows.push(row.fault(Place::B, point, Does::Kill));
    }
    rows
}
