//! What the rows showed, as a table for people and as a page of the documentation.

use std::fmt::Write;

use anyhow::Result;
use understudy_tests::statistics::Summary;

use crate::arbiter::Kind;
use crate::row::{End, Row};
use crate::verdict::Outcome;

/// A row's rounds with one arbiter.
pub struct Line {
    name: String,
    what: String,
    arbiter: &'static str,
    ends: Vec<End>,
    without_us: Vec<u64>,
    failed: usize,
}

impl Line {
    #[must_use]
    pub fn new(row: &Row, kind: Kind) -> Self {
        Self {
            name: row.name.clone(),
            what: row.what.clone(),
            arbiter: kind.name(),
            ends: vec![],
            without_us: vec![],
            failed: 0,
        }
    }

    pub fn add(&mut self, outcome: Result<Outcome>) {
        match outcome {
            Ok(outcome) => {
                if !self.ends.contains(&outcome.end) {
                    self.ends.push(outcome.end);
                }
                self.without_us.extend(outcome.without_service_us);
            }
            Err(_) => self.failed += 1,
        }
    }

    #[must_use]
    pub fn is_failed(&self) -> bool {
        self.failed > 0
    }

    fn cells(&self) -> [String; 6] {
        let ends: Vec<&str> = self.ends.iter().map(|end| who(*end)).collect();
        let verdict = match self.failed {
            0 => "good".to_owned(),
            failed => format!("**{failed} FAILED**"),
        };
        let [median, max] = Summary::of(self.without_us.clone())
            .map_or(["-".to_owned(), "-".to_owned()], |s| [duration(s.median), duration(s.max)]);
        [self.name.clone(), self.arbiter.to_owned(), ends.join(" or "), verdict, median, max]
    }
}

/// Who goes on, in words.
#[must_use]
pub fn who(end: End) -> &'static str {
    match end {
        End::A => "A alone",
        End::B => "B",
        End::Pair => "the pair",
        End::Reversed => "B, with A as its backup",
        End::Back => "A, from the hand-over",
        End::Nobody => "nobody",
    }
}

/// Microseconds, as exact as they are worth: two digits.
#[must_use]
pub fn duration(us: u64) -> String {
    match us {
        0..10_000 => format!("{}.{} ms", us / 1000, us % 1000 / 100),
        10_000..100_000 => format!("{} ms", us / 1000),
        100_000..1_000_000 => format!("{} ms", us / 10_000 * 10),
        _ => format!("{}.{} s", us / 1_000_000, us % 1_000_000 / 100_000),
    }
}

/// For a terminal.
#[must_use]
pub fn text(lines: &[Line]) -> String {
    let head = ["row", "arbiter", "goes on", "verdict", "median", "max"].map(str::to_owned);
    let rows: Vec<[String; 6]> =
        std::iter::once(head).chain(lines.iter().map(Line::cells)).collect();
    let width = |at: usize| rows.iter().map(|row| row[at].len()).max().unwrap_or(0);
    let widths: [usize; 6] = std::array::from_fn(width);
    let mut text = String::new();
    for row in &rows {
        let cells: Vec<String> =
            row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        let _ = writeln!(text, "{}", cells.join("  ").trim_end());
    }
    text
}

const HEAD: &str = include_str!("head.md");
const TAIL: &str = include_str!("tail.md");

/// For `docs/`.
#[must_use]
pub fn document(lines: &[Line], rounds: u32, jobs: u32) -> String {
    let mut text = HEAD.replace("{rounds}", &rounds.to_string());
    text = text.replace("{jobs}", &jobs.to_string());
    for line in lines {
        let [name, arbiter, ends, verdict, median, max] = line.cells();
        let what = &line.what;
        let _ = writeln!(
            text,
            "| `{name}` | {what} | {arbiter} | {ends} | {verdict} | {median} | {max} |"
        );
    }
    text.push_str(TAIL);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_two_digits() {
        let said = [7, 1_290, 12_345, 456_789, 2_099_999].map(duration);
        assert_eq!(said, ["0.0 ms", "1.2 ms", "12 ms", "450 ms", "2.0 s"]);
    }
}
