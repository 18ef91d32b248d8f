//! A round as a picture: what happened when, before and after the kill.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::round::Outcome;

const SIZE: (u32, u32) = (960, 320);

/// Draws the take-over's steps on a line of milliseconds after the kill.
pub fn draw(outcome: &Outcome, path: &Path) -> Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    drawn(outcome, path).map_err(|error| anyhow!("Cannot draw {}: {error}", path.display()))
}

fn drawn(outcome: &Outcome, path: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let steps = [
        ("SIGKILL", 0, RED),
        ("detected", outcome.detected_us, BLUE),
        ("owned", outcome.owned_us, MAGENTA),
        ("resumed", outcome.resumed_us, GREEN),
        ("first output", outcome.first_output_us, BLACK),
    ];
    let last_ms = ms(steps.iter().map(|step| step.1).max().unwrap_or(0)).max(1.0);
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let caption = format!(
        "Take-over: epoch {} committed, generation {}",
        outcome.backup.epoch_committed, outcome.backup.generation
    );
    let mut chart = ChartBuilder::on(&root)
        .caption(caption, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(40)
        .build_cartesian_2d(-0.1 * last_ms..1.2 * last_ms, 0.0..6.0)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .disable_y_axis()
        .x_desc("milliseconds after the kill")
        .draw()?;
    for (row, (name, at_us, color)) in (1..=5u32).zip(steps) {
        let (x, y) = (ms(at_us), 6.0 - f64::from(row));
        chart.draw_series([PathElement::new(vec![(x, 0.0), (x, y)], color.stroke_width(2))])?;
        chart.draw_series([Circle::new((x, y), 4, color.filled())])?;
        let label = format!("{name} {x:.1}");
        chart.draw_series([Text::new(label, (x + 0.01 * last_ms, y), ("sans-serif", 14))])?;
    }
    root.present()?;
    Ok(())
}

/// Milliseconds for drawing; a take-over lasts less than the 71 minutes that fit.
fn ms(us: u64) -> f64 {
    f64::from(u32::try_from(us).unwrap_or(u32::MAX)) / 1000.0
}
