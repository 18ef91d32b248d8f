//! What is asked of a VM while it is handed over, and a host that is lost once the old one is the backup
//! of a reversed pair.

use anyhow::{Result, ensure};
use understudy_tests::network::run;

use super::handovers::a_has_it_back;
use super::steps::OF_THE_FIRST;
use crate::row::{Does, End, Expect, Row};
use crate::scene::Scene;
use crate::world::Place;

/// What a request is answered that cannot be carried out now.
const CONFLICT: u16 = 409;

pub fn rows() -> Vec<Row> {
    let mut rows = refused();
    rows.push(reboot());
    rows.push(without_tap());
    rows.extend(heirs());
    rows
}

/// B has the last epoch and has not asked the arbiter: A's guest stands, and never runs again here unless
/// B is lost. A request that changed anything now would change nothing of the VM that goes on.
fn refused() -> Vec<Row> {
    let mut rows = vec![];
    for (name, command) in [
        ("pause", "vm.pause"),
        ("shutdown", "vm.shutdown"),
        ("delete", "vm.delete"),
        ("power-button", "vm.power-button"),
    ] {
        let act = move |scene: &mut Scene| {
            asked_meanwhile(scene, command)?;
            scene.wait_b_took_over()?;
            Ok(End::B)
        };
        let what =
            format!("{command} as the VM is handed over to B: refused, and it goes on there");
        let row = Row::new(format!("switch-over-{name}"), what, Expect::Only(End::B), act);
        rows.push(row.fault(Place::B, "claim", Does::Wait));
    }
    let act = |scene: &mut Scene| {
        asked_meanwhile(scene, "vm.shutdown")?;
        scene.wait_reversed()?;
        Ok(End::Reversed)
    };
    let what =
        "vm.shutdown as the VM is handed over to B: refused, and A is its backup from then on";
    let row = Row::new("reverse-shutdown", what, Expect::Only(End::Reversed), act).reverses();
    rows.push(row.fault(Place::B, "claim", Does::Wait));
    rows
}

fn asked_meanwhile(scene: &mut Scene, command: &str) -> Result<()> {
    scene.blow();
    scene.arm(Place::B)?;
    let waits = scene.ask_failover();
    scene.wait_reached(Place::B)?;
    let answer = scene.a.put(command, None)?;
    let said = answer.body.clone();
    ensure!(answer.status == CONFLICT, "{command} is answered {}: {said}", answer.status);
    scene.go_on(Place::B)?;
    ensure!(waits.join().unwrap_or_default(), "the switch-over is not answered as done");
    Ok(())
}

/// A reset that was asked for before, and waits for the machine while that is handed over.
fn reboot() -> Row {
    let act = |scene: &mut Scene| {
        scene.blow();
        scene.arm(Place::A)?;
        scene.arm(Place::B)?;
        let reboot = scene.ask("vm.reboot", None);
        scene.wait_reached(Place::A)?;
        let waits = scene.ask_failover();
        scene.wait_reached(Place::B)?;
        scene.go_on(Place::A)?;
        scene.go_on(Place::B)?;
        scene.wait_b_took_over()?;
        ensure!(waits.join().unwrap_or_default(), "the switch-over is not answered as done");
        ensure!(!reboot.join().unwrap_or_default(), "a VM that is gone is answered as reset");
        ensure!(scene.a.is_alive(), "A has ended");
        Ok(End::B)
    };
    let what =
        "vm.reboot that waits as the VM is handed over to B: it is not carried out, and says so";
    Row::new("switch-over-reboot", what, Expect::Only(End::B), act)
        .fault(Place::A, "reset", Does::Wait)
        .fault(Place::B, "claim", Does::Wait)
}

/// B lost its tap since it became the backup, which nobody can know before B looks again.
fn without_tap() -> Row {
    let act = |scene: &mut Scene| {
        let tap = scene.world.b.tap;
        scene.blow();
        rename(scene, tap, "elsewhere")?;
        // A name that is free would be taken for a tap of its own.
        scene.world.b.network.within(|| run("ip", &format!("link add {tap} type bridge")))??;
        let is_done = scene.ask_failover().join().unwrap_or_default();
        ensure!(!is_done, "a switch-over to a host without the VM's tap is answered as done");
        scene.wait_event(Place::A, &["failover-failed"])?;
        scene.wait_served()?;
        scene.wait_protected()?;
        scene.world.b.network.within(|| run("ip", &format!("link delete {tap}")))??;
        rename(scene, "elsewhere", tap)?;
        let waits = scene.ask_failover();
        scene.wait_b_took_over()?;
        ensure!(waits.join().unwrap_or_default(), "the switch-over is not answered as done");
        Ok(End::B)
    };
    let what = "B's tap is gone as the VM is handed over: refused, and A goes on and is protected again; \
                with the tap back it goes to B";
    Row::new("switch-over-no-tap", what, Expect::Only(End::B), act)
}

/// An interface that is up cannot be renamed everywhere.
fn rename(scene: &Scene, from: &str, to: &str) -> Result<()> {
    scene.world.b.network.within(|| {
        run("ip", &format!("link set {from} down"))?;
        run("ip", &format!("link set {from} name {to}"))?;
        run("ip", &format!("link set {to} up"))
    })?
}

/// A hands its VM over, and is killed at the step of its fault, as the backup of the new primary.
pub(super) fn a_is_killed_by_its_heir(scene: &mut Scene) -> Result<End> {
    scene.blow();
    scene.arm(Place::A)?;
    let waits = scene.ask_failover();
    scene.wait_killed(Place::A)?;
    scene.wait_b_alone()?;
    // There is nobody left who could answer.
    let _ = waits.join();
    Ok(End::B)
}

/// The pair is reversed, both hosts live, and one is lost as they connect.
fn heirs() -> Vec<Row> {
    let mut rows = vec![];
    for (point, when) in [
        ("paired", "as it tells A that they are a pair"),
        ("seal", "in the first seal"),
        ("given", "with the first epoch handed to its senders"),
        ("sent", "with the first epoch sent"),
    ] {
        let what = format!("The pair is reversed, A is called, and B is killed {when}");
        let name = format!("reverse-kill-b-first-{point}");
        let row = Row::new(name, what, Expect::Only(End::Back), a_has_it_back);
        rows.push(row.reverses().fault(Place::B, point, Does::Kill));
    }
    for (point, when) in [("accepted", "as it is called")].iter().chain(&OF_THE_FIRST[1..]) {
        let what = format!("The pair is reversed, and A is killed {when}");
        let name = format!("reverse-kill-a-first-{point}");
        let row = Row::new(name, what, Expect::Only(End::B), a_is_killed_by_its_heir);
        rows.push(row.reverses().fault(Place::A, point, Does::Kill));
    }
    rows
}
