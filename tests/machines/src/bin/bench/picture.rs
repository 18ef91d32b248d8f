//! The rows as pictures: a bar for each column, and pauses taken apart.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::row::{FLOOR, OURS, Profile, Row};
use crate::samples::float;
use crate::table::figure;

const WIDTH: u32 = 720;
const BAR: u32 = 44;
const FRAME: u32 = 90;
const LABEL: u32 = 110;
const FONT: (&str, u32) = ("sans-serif", 14);

type Drawn = Result<(), Box<dyn std::error::Error>>;

/// Writes `NAME.svg` for each row that has figures, and `steps.svg`.
pub fn draw(rows: &[Row], folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for row in rows.iter().filter(|row| !row.columns.is_empty()) {
        let name = format!("{}.svg", row.name);
        bars(row, &folder.join(&name)).map_err(|error| anyhow!("Cannot draw {name}: {error}"))?;
        names.push(name);
    }
    for (label, name) in [(OURS, "steps.svg"), (FLOOR, "steps-floor.svg")] {
        let apart = |row: &'_ Row| Some((row.name, row.profile(label)?.clone()));
        let taken_apart: Vec<_> = rows.iter().filter_map(apart).collect();
        if !taken_apart.is_empty() {
            steps(label, &taken_apart, &folder.join(name))
                .map_err(|error| anyhow!("Cannot draw {name}: {error}"))?;
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

/// Medians as bars, quartiles as whiskers.
fn bars(row: &Row, path: &Path) -> Drawn {
    let count = u32::try_from(row.columns.len())?;
    let root = SVGBackend::new(path, (WIDTH, FRAME + BAR * count)).into_drawing_area();
    root.fill(&WHITE)?;
    let most = row.columns.iter().map(|column| column.stats.p75).fold(0.0, f64::max);
    let end = if most > 0.0 { most * 1.25 } else { 1.0 };
    let mut chart = ChartBuilder::on(&root)
        .caption(format!("{}: {}", row.name, row.what), FONT)
        .margin(10)
        .margin_left(LABEL)
        .x_label_area_size(36)
        .build_cartesian_2d(0.0..end, 0.0..f64::from(count))?;
    chart.configure_mesh().disable_y_mesh().disable_y_axis().x_desc(row.unit).draw()?;
    for (number, column) in (1..).zip(&row.columns) {
        let (stats, middle) = (&column.stats, f64::from(count - number) + 0.5);
        let color = if column.label == "ours" { BLUE.mix(0.7) } else { BLACK.mix(0.3) };
        let bar =
            Rectangle::new([(0.0, middle - 0.3), (stats.median, middle + 0.3)], color.filled());
        chart.draw_series([bar])?;
        let whisker = vec![(stats.p25, middle), (stats.p75, middle)];
        chart.draw_series([PathElement::new(whisker, BLACK.stroke_width(2))])?;
        let at = (stats.median.max(stats.p75) + 0.01 * end, middle + 0.1);
        chart.draw_series([Text::new(figure(stats.median), at, FONT)])?;
        let place = (8, i32::try_from(26 + BAR * (number - 1) + BAR / 2)?);
        root.draw(&Text::new(column.label.clone(), place, FONT))?;
    }
    root.present()?;
    Ok(())
}

/// One bar for each pause, its steps side by side as shares.
fn steps(label: &str, rows: &[(&str, Profile)], path: &Path) -> Drawn {
    let count = u32::try_from(rows.len())?;
    let root = SVGBackend::new(path, (WIDTH, FRAME + BAR * count + 40)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(format!("Where a pause goes, in percent ({label})"), FONT)
        .margin(10)
        .margin_left(LABEL)
        .x_label_area_size(36)
        .build_cartesian_2d(0.0..100.0, -1.0..f64::from(count))?;
    chart.configure_mesh().disable_y_mesh().disable_y_axis().draw()?;
    for (number, (row, profile)) in (1..).zip(rows) {
        let whole = profile.whole_us();
        let (mut from, bottom) = (0.0, f64::from(count - number) + 0.15);
        for (at, step) in profile.steps.iter().enumerate() {
            let to = from + 100.0 * step.us / whole.max(1.0);
            let corners = [(from, bottom), (to, bottom + 0.7)];
            chart.draw_series([Rectangle::new(corners, Palette99::pick(at).filled())])?;
            from = to;
        }
        let place = (4, i32::try_from(28 + BAR * (number - 1) + BAR / 2)?);
        root.draw(&Text::new((*row).to_owned(), place, FONT))?;
    }
    for (at, step) in rows[0].1.steps.iter().enumerate() {
        let x = 16.0 * float(u64::try_from(at)?);
        let corners = [(x, -0.7), (x + 1.5, -0.4)];
        chart.draw_series([Rectangle::new(corners, Palette99::pick(at).filled())])?;
        chart.draw_series([Text::new(step.name, (x + 2.0, -0.35), FONT)])?;
    }
    root.present()?;
    Ok(())
}
