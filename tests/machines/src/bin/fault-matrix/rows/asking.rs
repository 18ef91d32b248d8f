//! What becomes of a question to the arbiter: it is lost between question and answer, or only one of the two
//! directions is cut.

use std::time::Instant;

use anyhow::{Result, ensure};
use api::replication::ReplicationState;

use super::cuts::one_wins;
use crate::row::{Does, EACH, ETCD, End, Expect, Row};
use crate::scene::{LIMIT, Scene};
use crate::world::Place::{self, A, Arbiter, B};

pub fn rows() -> Vec<Row> {
    let one_asks = [A, B].into_iter().flat_map(lost_as_one_asks);
    let rows = one_asks.chain(lost_as_both_ask()).map(|row| row.with(EACH));
    let rows = rows.chain(lost_as_a_pairs());
    let one_way = [A, B].into_iter().flat_map(one_way).chain([A, B].map(unanswered));
    let one_way = one_way.chain([A, B].map(unanswered_and_cut)).map(|row| row.with(ETCD));
    rows.chain(one_way).collect()
}

fn letter(place: Place) -> &'static str {
    if place == A { "a" } else { "b" }
}

fn other(place: Place) -> Place {
    if place == A { B } else { A }
}

fn end(place: Place) -> End {
    if place == A { End::A } else { End::B }
}

/// This side has the VM, and the other one is dead, or will hear that.
fn wait_owner(scene: &mut Scene, place: Place) -> Result<()> {
    if place == A { scene.wait_a_alone().map(drop) } else { scene.wait_b_took_over() }
}

/// The arbiter is lost once this side has got to the point of its fault.
fn lose_at_point(scene: &mut Scene, place: Place) -> Result<()> {
    scene.wait_reached(place)?;
    scene.arbiter.lose(&scene.world)?;
    scene.go_on(place)
}

/// The other side is dead: whoever is left asks.
fn lost_as_one_asks(place: Place) -> Vec<Row> {
    let (own, lost) = (letter(place), letter(other(place)));
    let (name, dead) = (own.to_uppercase(), lost.to_uppercase());
    let asked = move |scene: &mut Scene| {
        scene.blow();
        scene.arm(place)?;
        scene.vmm(other(place)).kill()?;
        lose_at_point(scene, place)?;
        scene.wait_holds(place)?;
        scene.is_held()?;
        scene.arbiter.restore(&scene.world)?;
        wait_owner(scene, place)?;
        Ok(end(place))
    };
    let what = format!(
        "{dead} is killed, and the arbiter lost as {name} asks it: {name} holds; then it is back"
    );
    let only = Expect::Only(end(place));
    let asked = Row::new(format!("arbiter-lost-swap-kill-{lost}"), what, only, asked);
    let answered = move |scene: &mut Scene| {
        scene.blow();
        scene.arm(place)?;
        scene.vmm(other(place)).kill()?;
        lose_at_point(scene, place)?;
        wait_owner(scene, place)?;
        scene.wait_served()?;
        scene.arbiter.restore(&scene.world)?;
        Ok(end(place))
    };
    let what = format!(
        "{dead} is killed, and the arbiter lost once it has given {name} the VM, which {name} does not know: \
         {name} goes on; then it is back"
    );
    let answered = Row::new(format!("arbiter-lost-swapped-kill-{lost}"), what, only, answered);
    vec![asked.fault(place, "swap", Does::Wait), answered.fault(place, "swapped", Does::Wait)]
}

/// Both live, and are cut apart, as B asks first: A hears B until B has got to its point.
fn b_asks_first(scene: &mut Scene) -> Result<()> {
    scene.blow();
    scene.arm(B)?;
    scene.world.cut_one_way(A, B)?;
    scene.wait_reached(B)?;
    scene.world.cut(A, B)
}

fn lost_as_both_ask() -> Vec<Row> {
    let asked = |scene: &mut Scene| {
        b_asks_first(scene)?;
        lose_at_point(scene, B)?;
        scene.wait_holds(A)?;
        scene.wait_holds(B)?;
        scene.is_held()?;
        scene.arbiter.restore(&scene.world)?;
        one_wins(scene)
    };
    let what =
        "A and B are cut apart, and the arbiter lost as B asks it: both hold; then it is back";
    let asked = Row::new("arbiter-lost-swap-cut", what, Expect::AOrB, asked);
    let answered = |scene: &mut Scene| {
        b_asks_first(scene)?;
        scene.arbiter.lose(&scene.world)?;
        scene.wait_holds(A)?;
        scene.is_held()?;
        scene.go_on(B)?;
        scene.wait_b_took_over()?;
        scene.wait_served()?;
        scene.wait_holds(A)?;
        scene.arbiter.restore(&scene.world)?;
        scene.world.heal()?;
        Ok(End::B)
    };
    let what = "A and B are cut apart, and the arbiter lost once it has given B the VM, which B does not know: \
                A holds, and B goes on; then it is back";
    let answered = Row::new("arbiter-lost-swapped-cut", what, Expect::Only(End::B), answered);
    vec![asked.fault(B, "swap", Does::Wait), answered.fault(B, "swapped", Does::Wait)]
}

/// A, not protected yet, asks for the pair. Its VM runs on, whatever becomes of that. Where an unmounted
/// directory is asked for a first record it takes it: decision 21 says what is left of that.
fn lost_as_a_pairs() -> Vec<Row> {
    let mut rows = vec![];
    for (point, when, arbiters) in [
        ("swap", "as A asks it for the pair", ETCD),
        ("swapped", "once it has the pair, which nobody knows", EACH),
    ] {
        let act = |scene: &mut Scene| {
            scene.blow();
            scene.arm(A)?;
            let asked = scene.ask_protect()?;
            lose_at_point(scene, A)?;
            scene.wait_served()?;
            scene.arbiter.restore(&scene.world)?;
            ensure!(asked.join().unwrap_or_default(), "vm.replicate is not answered as done");
            scene.wait_protected()?;
            Ok(End::Pair)
        };
        let what =
            format!("The arbiter is lost {when}: A's VM runs on; then it is back, and A protected");
        let row =
            Row::new(format!("arbiter-lost-{point}-first"), what, Expect::Only(End::Pair), act);
        rows.push(row.with(arbiters).unprotected().fault(A, point, Does::Wait));
    }
    rows
}

/// One direction between a side and the arbiter is cut, and the other side is killed, or cut off: that one wins.
fn one_way(place: Place) -> Vec<Row> {
    let (own, lost) = (letter(place), letter(other(place)));
    let (name, rival) = (own.to_uppercase(), lost.to_uppercase());
    let mut rows = vec![];
    for (way, from, to, said) in [
        (
            format!("{own}-to-arbiter"),
            place,
            Arbiter,
            format!("Nothing of {name} reaches the arbiter"),
        ),
        (
            format!("arbiter-to-{own}"),
            Arbiter,
            place,
            format!("Nothing of the arbiter reaches {name}"),
        ),
    ] {
        let killed = move |scene: &mut Scene| {
            scene.blow();
            scene.world.cut_one_way(from, to)?;
            scene.vmm(other(place)).kill()?;
            scene.wait_holds(place)?;
            scene.is_held()?;
            scene.world.heal()?;
            wait_owner(scene, place)?;
            Ok(end(place))
        };
        let what = format!("{said}, {rival} is killed: {name} holds; then all is heard again");
        let only = Expect::Only(end(place));
        rows.push(Row::new(format!("cut-{way}-kill-{lost}"), what, only, killed));
        let apart = move |scene: &mut Scene| {
            scene.blow();
            scene.world.cut_one_way(from, to)?;
            scene.world.cut(A, B)?;
            wait_owner(scene, other(place))?;
            scene.wait_served()?;
            scene.wait_holds(place)?;
            scene.world.heal()?;
            if place == B {
                scene.wait_b_without_primary()?;
            }
            Ok(end(other(place)))
        };
        let what = format!("{said}, and A and B are cut apart; healed once {rival} has the VM");
        let only = Expect::Only(end(other(place)));
        rows.push(Row::new(format!("cut-{way}-cut"), what, only, apart));
    }
    rows
}

/// The arbiter has one more record than this, which nobody was told.
fn wait_record(scene: &Scene, before: usize) -> Result<()> {
    let start = Instant::now();
    while scene.arbiter.records(&scene.world)? == before {
        ensure!(start.elapsed() < LIMIT, "the arbiter has put nothing");
        std::thread::sleep(understudy_tests::process::POLL);
    }
    Ok(())
}

/// The arbiter puts what a side asks for, and no answer reaches that side.
fn unanswered(place: Place) -> Row {
    let (own, lost) = (letter(place), letter(other(place)));
    let act = move |scene: &mut Scene| {
        scene.blow();
        let before = scene.arbiter.records(&scene.world)?;
        scene.world.cut_verdicts(place)?;
        scene.vmm(other(place)).kill()?;
        wait_record(scene, before)?;
        scene.wait_holds(place)?;
        scene.is_held()?;
        scene.world.heal()?;
        wait_owner(scene, place)?;
        let after = scene.arbiter.records(&scene.world)?;
        ensure!(after == before + 1, "{} records were put for one claim", after - before);
        Ok(end(place))
    };
    let (name, dead) = (own.to_uppercase(), lost.to_uppercase());
    let what = format!(
        "{dead} is killed, the arbiter gives {name} the VM, and no answer reaches {name}: it holds; then one does"
    );
    Row::new(format!("unanswered-kill-{lost}"), what, Expect::Only(end(place)), act)
}

/// The same, and the other side lives, asks too, and loses: nobody speaks until the owner hears that it is one.
fn unanswered_and_cut(place: Place) -> Row {
    let act = move |scene: &mut Scene| {
        scene.blow();
        let before = scene.arbiter.records(&scene.world)?;
        scene.world.cut_verdicts(place)?;
        // The other one hears it still, so that this one is first to suspect.
        scene.world.cut_one_way(other(place), place)?;
        wait_record(scene, before)?;
        scene.world.cut(A, B)?;
        scene.wait_without_vm(other(place))?;
        if place == A {
            scene.b.wait_state(ReplicationState::Disconnected, LIMIT)?;
        }
        scene.wait_holds(place)?;
        scene.is_held()?;
        scene.world.heal()?;
        wait_owner(scene, place)?;
        Ok(end(place))
    };
    let name = letter(place).to_uppercase();
    let what = format!(
        "A and B are cut apart, the arbiter gives {name} the VM, and no answer reaches {name}: it holds, and the \
         other one has lost; then one does"
    );
    Row::new(format!("unanswered-cut-{}", letter(place)), what, Expect::Only(end(place)), act)
}
