//! Wall clocks that a row turns: libfaketime in each side's process, which reads the time from a file.
//! The monotonic clock stays what it is, as on a host whose time is set.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::world::Place;

const LIBRARY: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1";
/// After this a process has seen that its clock was turned.
const SEEN_AFTER_S: &str = "1";

fn file(folder: &Path, place: Place) -> PathBuf {
    folder.join(if place == Place::A { "clock-a" } else { "clock-b" })
}

/// Both clocks go right.
pub fn prepare(folder: &Path) -> Result<()> {
    ensure!(Path::new(LIBRARY).exists(), "{LIBRARY} is missing: apt-get install libfaketime");
    turn(folder, Place::A, "+0")?;
    turn(folder, Place::B, "+0")
}

/// What a side's process is started with.
pub fn environment(folder: &Path, place: Place) -> Vec<(String, String)> {
    let file = file(folder, place).display().to_string();
    let pairs = [
        ("LD_PRELOAD", LIBRARY),
        ("FAKETIME_TIMESTAMP_FILE", file.as_str()),
        ("FAKETIME_CACHE_DURATION", SEEN_AFTER_S),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
        ("FAKETIME_DONT_RESET", "1"),
    ];
    pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).into()
}

/// Turns a side's clock: `+<seconds>` from what is right, or `@<date> <time>` from now on.
pub fn turn(folder: &Path, place: Place, to: &str) -> Result<()> {
    let file = file(folder, place);
    // In one step: it may be read at any moment.
    let next = file.with_extension("next");
    std::fs::write(&next, format!("{to}\n")).context("Cannot turn a clock")?;
    std::fs::rename(&next, &file).context("Cannot turn a clock")
}
