//! The benchmark: each figure beside the least that the same machine can do, in the same run.

mod bare;
mod floor;
mod guest;
mod host;
mod perftest;
mod picture;
mod row;
mod rows;
mod samples;
mod stream;
mod table;
mod turns;
mod verbs;

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use serde::Serialize;
use understudy_tests::interrupt;

use crate::host::{Busy, Host};
use crate::row::Row;

/// Measures what docs/SPECIFICATION.md promises under "Performance": a table, bench.json, pictures.
#[derive(Parser)]
struct Options {
    /// In less than five minutes (the default).
    #[arg(long, conflicts_with = "full")]
    quick: bool,
    /// More and longer turns, and the rows that take long.
    #[arg(long)]
    full: bool,
    /// Only these rows, separated by commas.
    #[arg(long, value_delimiter = ',')]
    rows: Vec<String>,
    /// This host's address on an RDMA device, for the rows rdma-*, which are left out without it.
    #[arg(long, value_name = "ADDRESS")]
    rdma: Option<IpAddr>,
    /// Where bench.json and the pictures go.
    #[arg(long, default_value = "target/bench")]
    out: PathBuf,
}

/// From here on what others do on this host is said beside the figures.
const DISTURBED_CORES: f64 = 0.2;

/// How much is measured.
pub struct Effort {
    pub is_full: bool,
    /// Rows were asked for by name.
    pub is_named: bool,
    /// Turns of each column.
    pub turns: u32,
    /// Pauses of a turn, as far as `limit` lasts.
    pub pauses: u32,
    pub limit: Duration,
    /// Seconds of a turn of what is measured over time.
    pub seconds: u64,
    /// This host's address on an RDMA device.
    pub rdma: Option<IpAddr>,
}

#[derive(Serialize)]
struct Report<'a> {
    host: Host,
    mode: &'static str,
    seconds: u64,
    rows: &'a [Row],
}

fn main() -> ExitCode {
    let options = Options::parse();
    match interrupt::watch().and_then(|()| run(&options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("Error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let known: Vec<&str> = rows::ALL.iter().map(|(name, _)| *name).collect();
    for name in &options.rows {
        ensure!(known.contains(&&**name), "There is no row {name}; there are {}", known.join(", "));
    }
    std::fs::create_dir_all(&options.out)
        .with_context(|| format!("Cannot create {}", options.out.display()))?;
    let host = Host::read();
    println!(
        "{} cores, {} MiB ({} MiB available), Linux {}, {}, {}",
        host.cores, host.memory_mib, host.available_mib, host.kernel, host.kvm, host.cpu
    );
    let secs = Duration::from_secs;
    let (is_named, rdma) = (!options.rows.is_empty(), options.rdma);
    let effort = if options.full {
        Effort {
            is_full: true,
            is_named,
            turns: 5,
            pauses: 200,
            limit: secs(15),
            seconds: 10,
            rdma,
        }
    } else {
        Effort { is_full: false, is_named, turns: 3, pauses: 30, limit: secs(1), seconds: 2, rdma }
    };
    let start = Instant::now();
    let mut done = Vec::new();
    for (name, measure) in rows::ALL {
        let is_left_out = name.starts_with("rdma-") && rdma.is_none();
        let is_wanted = options.rows.iter().any(|wanted| wanted == name);
        if is_named && !is_wanted || !is_named && is_left_out {
            continue;
        }
        let (began, before) = (Instant::now(), Busy::now());
        let mut row = measure(&effort)
            .unwrap_or_else(|error| Row::new(name, "", "").not_run(format!("{error:#}")));
        let took = began.elapsed();
        row.others_cores = Busy::now().others_since(before) / took.as_secs_f64().max(0.01);
        if row.others_cores > DISTURBED_CORES {
            row.note(format!("disturbed: others took {:.1} cores meanwhile", row.others_cores));
        }
        println!("{name}: {} s, others took {:.2} cores", took.as_secs(), row.others_cores);
        done.push(row);
    }
    println!("\n{}{}", table::text(&done), table::details(&done));
    let seconds = start.elapsed().as_secs();
    let mode = if effort.is_full { "full" } else { "quick" };
    let path = options.out.join("bench.json");
    let report = Report { host, mode, seconds, rows: &done };
    std::fs::write(&path, serde_json::to_vec_pretty(&report)?)
        .with_context(|| format!("Cannot write {}", path.display()))?;
    let pictures = picture::draw(&done, &options.out)?;
    println!("\n{} in {seconds} s, beside it {}", path.display(), pictures.join(", "));
    Ok(())
}
