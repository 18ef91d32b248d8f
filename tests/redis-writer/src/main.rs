//! A client of Redis that remembers what it was promised.
//!
//! ```text
//! redis-writer write ADDRESS ACKNOWLEDGED FINISH   SET after SET over one connection, until the
//!                                                  file FINISH exists; then reads every key back
//!                                                  over the same connection
//! redis-writer check ADDRESS ACKNOWLEDGED          reads them back over a new connection
//! redis-writer aof FILE ACKNOWLEDGED               finds them in an append-only file
//! ```
//!
//! The file ACKNOWLEDGED gets a key's number, a line each, once the server's `+OK` for it was read.
//! Status 0: no acknowledged key is missing or wrong, and the connection never ended.
#![forbid(unsafe_code)]

mod aof;
mod connection;
mod keys;
mod resp;

use std::fs::{self, File};
use std::io::BufReader;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use connection::Connection;

const USAGE: &str = "Usage: redis-writer write ADDRESS ACKNOWLEDGED FINISH
       redis-writer check ADDRESS ACKNOWLEDGED
       redis-writer aof FILE ACKNOWLEDGED";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match run(&arguments) {
        Ok(said) => {
            println!("{said}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("redis-writer: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[&str]) -> Result<String> {
    match arguments {
        ["write", address, acknowledged, finish] => write(address, acknowledged, finish),
        ["check", address, acknowledged] => {
            let numbers = numbers(acknowledged)?;
            Connection::open(address)?.verify(&numbers)?;
            Ok(format!("{} keys over a new connection", numbers.len()))
        }
        ["aof", file, acknowledged] => {
            let numbers = numbers(acknowledged)?;
            let log = File::open(file).with_context(|| format!("Cannot open {file}"))?;
            aof::verify(&mut BufReader::new(log), &numbers)
                .with_context(|| format!("{file} is not what it should be"))?;
            Ok(format!("{} keys in the append-only file", numbers.len()))
        }
        _ => bail!("{USAGE}"),
    }
}

fn write(address: &str, acknowledged: &str, finish: &str) -> Result<String> {
    let mut log =
        File::create(acknowledged).with_context(|| format!("Cannot create {acknowledged}"))?;
    let mut connection = Connection::open(address)?;
    let written = connection.write(&mut log, || Path::new(finish).exists())?;
    let numbers: Vec<u64> = (1..=written.acknowledged).collect();
    connection.verify(&numbers)?;
    Ok(format!(
        "{} acknowledged and read back over one connection, longest silence {:.1} s before key {}",
        written.acknowledged,
        written.silence_max.as_secs_f64(),
        written.silence_before
    ))
}

/// The numbers in a file of acknowledged keys, which holds one at least.
fn numbers(path: &str) -> Result<Vec<u64>> {
    let text = fs::read_to_string(path).with_context(|| format!("Cannot read {path}"))?;
    let numbers = text
        .lines()
        .map(|line| line.parse().with_context(|| format!("{path} holds '{line}', no number")))
        .collect::<Result<Vec<u64>>>()?;
    ensure!(!numbers.is_empty(), "{path} names no acknowledged key");
    Ok(numbers)
}
