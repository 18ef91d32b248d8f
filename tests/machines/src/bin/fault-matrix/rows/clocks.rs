//! Wall clocks that jump, on either side, by years: nothing rests on one.

use anyhow::{Result, ensure};

use crate::row::{EACH, End, Expect, Row};
use crate::scene::Scene;
use crate::world::Place::{self, A, B};

const LATE: u32 = 2040;
const EARLY: u32 = 2001;

pub fn rows() -> Vec<Row> {
    let rows = vec![
        Row::new(
            "clock-kill-a",
            "A's wall clock jumps to 2040, B's to 2001; then A is killed",
            Expect::Only(End::B),
            |scene| {
                turn(scene, LATE, EARLY)?;
                scene.a.kill()?;
                scene.wait_b_took_over()?;
                scene.shows_year(B, EARLY)?;
                Ok(End::B)
            },
        )
        .with(EACH),
        Row::new(
            "clock-cut",
            "A's wall clock jumps to 2001, B's to 2040; then they are cut apart, and healed later",
            Expect::AOrB,
            |scene| {
                turn(scene, EARLY, LATE)?;
                scene.world.cut(A, B)?;
                let winner = scene.wait_winner()?;
                scene.wait_served()?;
                scene.world.heal()?;
                if winner == A {
                    scene.wait_b_without_primary()?;
                }
                scene.shows_year(A, EARLY)?;
                scene.shows_year(B, LATE)?;
                Ok(if winner == A { End::A } else { End::B })
            },
        )
        .with(EACH),
    ];
    let turned = |mut row: Row| {
        row.prepared.has_clocks = true;
        row
    };
    rows.into_iter().map(turned).collect()
}

/// The pair stays one, whatever the clocks of its sides say.
fn turn(scene: &mut Scene, a: u32, b: u32) -> Result<()> {
    let date = |year: u32| format!("@{year}-06-01 12:00:00");
    scene.blow();
    scene.turn_clock(Place::A, &date(a))?;
    scene.turn_clock(Place::B, &date(b))?;
    let end = scene.wait_settled()?;
    ensure!(end == End::Pair, "clocks that jump have ended the pair: {end:?}");
    Ok(())
}
