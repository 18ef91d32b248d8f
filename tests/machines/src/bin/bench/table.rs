//! The rows as text.

use std::fmt::Write;

use crate::row::{Bound, Row, Verdict};

const HEAD: [&str; 8] =
    ["row", "floor", "baseline", "ours", "measure", "value", "promise", "verdict"];

/// The whole table: a line for each promise, the figures in each row's first.
#[must_use]
pub fn text(rows: &[Row]) -> String {
    let mut lines = vec![HEAD.map(str::to_owned)];
    rows.iter().for_each(|row| lines.extend(lines_of(row)));
    let mut widths = [0; HEAD.len()];
    for line in &lines {
        let cells = widths.iter_mut().zip(line);
        cells.for_each(|(width, cell)| *width = (*width).max(cell.chars().count()));
    }
    let mut text = String::new();
    for line in &lines {
        for (cell, width) in line.iter().zip(widths) {
            // A String takes all that is written to it.
            let _ = write!(text, "{cell:<width$}  ");
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    text
}

fn lines_of(row: &Row) -> Vec<[String; HEAD.len()]> {
    let mut lines: Vec<[String; HEAD.len()]> = Vec::new();
    let baselines = row.columns.iter().filter(|c| !["floor", "ours"].contains(&&*c.label));
    let baselines: Vec<String> = baselines
        .map(|column| format!("{} {}", column.label, figure(column.stats.median)))
        .collect();
    let cell = |label: &str| {
        row.stats(label).map_or("-".into(), |stats| {
            format!("{} ({}-{})", figure(stats.median), figure(stats.p25), figure(stats.p75))
        })
    };
    for check in &row.checks {
        let promise = match check.bound {
            Bound::AtMost(most) => format!("<= {}", figure(most)),
            Bound::AtLeast(least) => format!(">= {}", figure(least)),
        };
        let verdict = match check.verdict {
            Verdict::Met => "met",
            Verdict::Missed => "MISSED",
            Verdict::Unknown => "unknown",
        };
        let value = check.value.map_or("-".into(), figure);
        let mut line: [String; HEAD.len()] = Default::default();
        line[4] = check.what.clone();
        [line[5], line[6], line[7]] = [value, promise, verdict.to_owned()];
        lines.push(line);
    }
    if lines.is_empty() {
        lines.push(Default::default());
    }
    while lines.len() < baselines.len() {
        lines.push(Default::default());
    }
    lines[0][0] = format!("{} [{}]", row.name, row.unit);
    if row.not_run.is_some() {
        // Why is said below the table, where there is room for it.
        lines[0][7] = "not run".into();
        return lines;
    }
    lines[0][1] = cell("floor");
    lines[0][3] = cell("ours");
    lines.iter_mut().zip(baselines).for_each(|(line, cell)| line[2] = cell);
    lines
}

/// Three digits that count, or a whole number.
#[must_use]
pub fn figure(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// What follows the table: how pauses divide into steps, and remarks.
#[must_use]
pub fn details(rows: &[Row]) -> String {
    let mut text = String::new();
    for (row, profile) in rows.iter().flat_map(|row| row.profiles.iter().map(move |of| (row, of))) {
        let (label, whole) = (profile.label, profile.whole_us());
        let _ = writeln!(text, "\na pause of {}, {label}, taken apart (medians):", row.name);
        for step in &profile.steps {
            let share = 100.0 * step.us / whole.max(1.0);
            let _ = writeln!(text, "  {:<12} {:>8} us  {share:>3.0} %", step.name, figure(step.us));
        }
    }
    for row in rows.iter().filter(|row| !row.notes.is_empty() || row.not_run.is_some()) {
        let _ = writeln!(text, "\n{}: {}", row.name, row.what);
        if let Some(why) = &row.not_run {
            let _ = writeln!(text, "  not run: {}", why.replace('\n', " "));
        }
        for note in &row.notes {
            let _ = writeln!(text, "  {note}");
        }
    }
    text
}
