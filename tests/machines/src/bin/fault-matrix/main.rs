//! The fault matrix: a pair of whole VMMs is abused in every way that the network, the storage, the kernel
//! and people have, and for each way an oracle says whether anything was lost.

mod arbiter;
mod clock;
mod failing;
mod row;
mod rows;
mod scene;
mod table;
mod verdict;
mod world;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use understudy_tests::interrupt::{self, Folder};

use crate::arbiter::Kind;
use crate::row::Row;
use crate::scene::Scene;
use crate::table::Line;
use crate::verdict::Outcome;

/// Characters of a failure that are shown.
const SHOWN: usize = 4000;

/// Abuses a pair of VMMs row by row, and says whether anything was lost.
#[derive(Parser)]
struct Options {
    /// Rows to run, by name or by the begin of their names; all where none is given.
    rows: Vec<String>,
    /// The few rows that every run of the tests takes.
    #[arg(long)]
    quick: bool,
    /// Names the rows and does nothing.
    #[arg(long)]
    list: bool,
    /// Rounds of each row.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Rows at a time: mostly they wait. What clients wait for is measured best by one.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16))]
    jobs: u32,
    /// Clients of the guest's server, each with a connection.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=30))]
    clients: u32,
    /// Only with this arbiter; with each that a row is for where none is given.
    #[arg(long, value_enum)]
    arbiter: Option<Kind>,
    /// Write the table there.
    #[arg(long)]
    write: Option<PathBuf>,
    /// Keep the logs of failed rounds there.
    #[arg(long)]
    keep: Option<PathBuf>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    match interrupt::watch().and_then(|()| run(&options)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("Error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<bool> {
    let rows = chosen(options)?;
    if options.list {
        rows.iter().for_each(|row| println!("{:<28} {}", row.name, row.what));
        return Ok(true);
    }
    check_tools()?;
    let turns = rows.iter().flat_map(|row| row.arbiters.iter().map(move |kind| (row, *kind)));
    let turns: Vec<_> =
        turns.filter(|(_, kind)| options.arbiter.is_none_or(|only| only == *kind)).collect();
    ensure!(!turns.is_empty(), "no row is for this arbiter");
    let (count, start) = (turns.len(), Instant::now());
    let Options { rounds, jobs, clients, .. } = options;
    println!("{count} rows, {rounds} rounds each, {jobs} at a time, {clients} clients");
    let lines = all(options, &turns)?;
    let failed = lines.iter().filter(|line| line.is_failed()).count();
    println!("\n{}", table::text(&lines));
    println!("{} passed, {failed} failed, {} s", count - failed, start.elapsed().as_secs());
    if let Some(path) = &options.write {
        let text = table::document(&lines, options.rounds, options.jobs);
        std::fs::write(path, text).with_context(|| format!("Cannot write {}", path.display()))?;
        println!("the table is in {}", path.display());
    }
    Ok(failed == 0)
}

/// Each row with each of its arbiters, several at a time if that is wanted.
fn all(options: &Options, turns: &[(&Row, Kind)]) -> Result<Vec<Line>> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some((row, kind)) = turns.get(number) else { return done };
            let mut line = Line::new(row, *kind);
            for round in 1..=options.rounds {
                let outcome = tell(options, row, *kind, (number + 1, turns.len(), round));
                line.add(outcome);
            }
            done.push((number, line));
        }
    };
    let mut lines: Vec<(usize, Line)> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..options.jobs).map(|_| scope.spawn(work)).collect();
        let done = workers.into_iter().map(|worker| worker.join().expect("rounds are caught"));
        done.flatten().collect()
    });
    lines.sort_by_key(|(number, _)| *number);
    Ok(lines.into_iter().map(|(_, line)| line).collect())
}

/// Runs a round and says how it went.
fn tell(
    options: &Options,
    row: &Row,
    kind: Kind,
    (number, count, round): (usize, usize, u32),
) -> Result<Outcome> {
    let began = Instant::now();
    let outcome = one(options, row, kind);
    let took = began.elapsed().as_secs_f64();
    let name = format!("[{number}/{count}] {} ({}), round {round}", row.name, kind.name());
    match &outcome {
        Ok(outcome) => println!("{name}: {}, {took:.1} s", said(outcome)),
        Err(error) => {
            // Logs of processes may be in it, and be long: --keep keeps them.
            let what: String = format!("{error:#}").chars().take(SHOWN).collect();
            println!("{name}: FAILED after {took:.1} s: {what}");
        }
    }
    outcome
}

fn said(outcome: &Outcome) -> String {
    let without = outcome.without_service_us.map_or("for good".to_owned(), table::duration);
    let answered = outcome.answered;
    format!("{}; without service {without}; {answered} answers", table::who(outcome.end))
}

/// The rows that the options name, each of which must exist.
fn chosen(options: &Options) -> Result<Vec<Row>> {
    let mut rows = rows::all();
    for wanted in &options.rows {
        if !rows.iter().any(|row| row.name.starts_with(wanted)) {
            bail!("There is no row '{wanted}': --list names them");
        }
    }
    let is_named = |row: &Row| options.rows.is_empty() || rows_named(options, &row.name);
    rows.retain(|row| is_named(row) && (row.is_quick || !options.quick));
    ensure!(!rows.is_empty(), "none of these rows is a quick one");
    Ok(rows)
}

/// By its own name, or by the begin of it where no row has just that name.
fn rows_named(options: &Options, name: &str) -> bool {
    let all = rows::all();
    options.rows.iter().any(|wanted| {
        let is_name = all.iter().any(|row| row.name == *wanted);
        if is_name { name == wanted } else { name.starts_with(wanted.as_str()) }
    })
}

fn check_tools() -> Result<()> {
    for (program, package) in
        [("ip", "iproute2"), ("tc", "iproute2"), ("nft", "nftables"), ("losetup", "mount")]
    {
        let found = std::process::Command::new(program).arg("-V").output();
        ensure!(found.is_ok(), "'{program}' is missing: install the package {package}");
    }
    Ok(())
}

/// One round, in a view of the file systems of its own, which ends with its thread.
fn one(options: &Options, row: &Row, kind: Kind) -> Result<Outcome> {
    let folder = Folder::new()?;
    let round = || -> Result<Outcome> {
        world::isolate()?;
        let mut scene = Scene::start(folder.path(), kind, &row.prepared, options.clients)?;
        let end = (row.act)(&mut scene)?;
        verdict::settle(scene, end, row)
    };
    let outcome = std::thread::scope(|scope| {
        let thread = scope.spawn(round);
        thread.join().unwrap_or_else(|_| bail!("the round panicked"))
    });
    if outcome.is_err() {
        keep(options, folder.path(), row)?;
    }
    outcome
}

/// Keeps the files of a failed round, if that is wanted.
fn keep(options: &Options, folder: &Path, row: &Row) -> Result<()> {
    let Some(keep) = &options.keep else { return Ok(()) };
    let target = keep.join(&row.name);
    std::fs::create_dir_all(&target)?;
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let is_told = path.extension().is_some_and(|kind| kind == "log" || kind == "events");
        if let (true, Some(name)) = (is_told, path.file_name()) {
            std::fs::copy(&path, target.join(name))?;
        }
    }
    println!("(its logs are in {})", target.display());
    Ok(())
}
