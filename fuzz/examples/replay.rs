//! Runs inputs without libFuzzer, on any toolchain: `replay TARGET [FILE|FOLDER]...`.
//!
//! A panic is a finding, and its trace is that of any program. Otherwise says how many inputs there
//! were, and which places of the target were reached by how many of them, or by none.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{env, fs, io};

use understudy_fuzz::{TARGETS, Target, reach};

/// The files of folders, and other files as they are.
fn files(paths: impl Iterator<Item = PathBuf>) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in paths {
        if path.is_dir() {
            for entry in fs::read_dir(&path)? {
                files.push(entry?.path());
            }
        } else {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn replay(target: &Target, files: &[impl AsRef<Path>]) -> io::Result<()> {
    let mut totals = BTreeMap::<_, u64>::new();
    for file in files {
        (target.run)(&fs::read(file)?);
        for (place, _) in reach::take() {
            *totals.entry(place).or_default() += 1;
        }
    }
    let count = |place: &&str| totals.get(place).copied().unwrap_or(0);
    for place in target.places {
        println!("{:>8}  {place}", count(place));
    }
    let missed: Vec<_> = target.places.iter().filter(|place| count(place) == 0).copied().collect();
    let (all, reached) = (target.places.len(), target.places.len() - missed.len());
    let never = if missed.is_empty() { "" } else { "; never: " };
    println!("{} inputs, {reached} of {all} places{never}{}", files.len(), missed.join(", "));
    Ok(())
}

fn main() -> io::Result<()> {
    let usage = || io::Error::other("usage: replay TARGET [FILE|FOLDER]...");
    let mut arguments = env::args_os().skip(1);
    let name = arguments.next().ok_or_else(usage)?;
    let target = TARGETS.iter().find(|target| *target.name == *name).ok_or_else(usage)?;
    replay(target, &files(arguments.map(PathBuf::from))?)
}
