//! A host that is killed in pairs of other kinds than most rows have: other ways to keep pages, TLS, one
//! image for both hosts, no arbiter.

use anyhow::ensure;

use super::steps::{A_STEPS, B_STEPS};
use crate::row::{Does, End, Expect, NONE, Row};
use crate::scene::Scene;
use crate::world::Place;

pub fn rows() -> Vec<Row> {
    let mut rows = vec![];
    // With cow=off pages are sent as they are, which has no step of its own.
    for (cow, options, sending) in [
        ("protect", ",cow=protect", "send"),
        ("copy", ",cow=copy", "send"),
        ("off", ",cow=off", "given"),
    ] {
        for (victim, point) in [(Place::A, sending), (Place::B, "verified")] {
            let what = format!("With cow={cow}");
            let mut row = killed(&format!("cow-{cow}"), &what, victim, point);
            row.prepared.options = options;
            rows.push(row);
        }
    }
    for (victim, point) in [(Place::A, "acked"), (Place::B, "applying")] {
        let mut row = killed("tls", "With TLS", victim, point);
        row.prepared.has_tls = true;
        rows.push(row);
        let what = "With one image for both hosts (disk_mode=shared)";
        let mut row = killed("shared", what, victim, point);
        row.prepared.is_shared = true;
        rows.push(row);
    }
    rows.extend(forced());
    rows
}

fn killed(kind: &str, what: &str, victim: Place, point: &'static str) -> Row {
    let (letter, steps, end) = match victim {
        Place::A => ("a", A_STEPS, End::B),
        _ => ("b", B_STEPS, End::A),
    };
    let (_, when) = steps.iter().find(|step| step.0 == point).expect("a step of this side");
    let act = move |scene: &mut Scene| {
        scene.blow();
        scene.arm(victim)?;
        scene.wait_killed(victim)?;
        match end {
            End::A => drop(scene.wait_a_alone()?),
            _ => scene.wait_b_took_over()?,
        }
        Ok(end)
    };
    let what = format!("{what}: {} is killed {when}", letter.to_uppercase());
    let row = Row::new(format!("{kind}-kill-{letter}"), what, Expect::Only(end), act);
    row.fault(victim, point, Does::Kill)
}

/// Without an arbiter a person decides.
fn forced() -> Vec<Row> {
    let without = |row: Row| row.with(NONE);
    let a = Row::new(
        "no-arbiter-kill-a",
        "Without an arbiter, A is killed: B holds, and refuses to take over until a person insists (force)",
        Expect::Only(End::B),
        |scene| {
            scene.blow();
            scene.a.kill()?;
            scene.wait_holds(Place::B)?;
            scene.is_held()?;
            scene.b.put_expect("vm.failover", Some(r#"{"force":false}"#), 409)?;
            scene.is_held()?;
            scene.b.put_ok("vm.failover", Some(r#"{"force":true}"#))?;
            scene.wait_b_took_over()?;
            Ok(End::B)
        },
    );
    let b = Row::new(
        "no-arbiter-kill-b",
        "Without an arbiter, B is killed: A goes on alone",
        Expect::Only(End::A),
        |scene| {
            scene.blow();
            scene.b.kill()?;
            scene.wait_a_alone()?;
            Ok(End::A)
        },
    );
    let frozen = Row::new(
        "no-arbiter-stop-a",
        "Without an arbiter, A stands still until B holds, and wakes: it goes on alone, and B does not take \
         over",
        Expect::Only(End::A),
        |scene| {
            scene.blow();
            scene.a.signal(libc::SIGSTOP)?;
            scene.wait_holds(Place::B)?;
            scene.is_held()?;
            scene.a.signal(libc::SIGCONT)?;
            scene.wait_a_alone()?;
            ensure!(!scene.has_event(Place::B, "failover-finished"), "B has taken over");
            Ok(End::A)
        },
    );
    [a, b, frozen].map(without).into()
}
