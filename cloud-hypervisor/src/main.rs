//! The VMM's command line: flags in, [`vmm::Options`] out, exit code back.
//!
//! 0 is a clean end, the guest's own shutdown included; 2 a usage error; 1 any other error, with
//! its whole chain of causes on standard error.
#![forbid(unsafe_code)]

mod cli;
mod log;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;

use cli::Cli;

/// How long the reader of the event monitor may hold up the end of the process.
const LAST_EVENTS: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(error) = cli.check() {
        error.exit();
    }
    std::panic::set_hook(Box::new({
        let report = std::panic::take_hook();
        move |panic| {
            vmm::restore_terminal();
            report(panic);
        }
    }));
    let outcome = run(cli);
    // Whoever still holds the machine is cut off now: no destructor does this then.
    vmm::restore_terminal();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            report(&error);
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    vmm::block_signals()?;
    log::start(cli.verbosity, cli.log_file.as_deref())?;
    let options = cli.options()?;
    let events = options.event_monitor.clone();
    let outcome = vmm::run(options).context("Cloud Hypervisor cannot go on");
    if !events.flush(LAST_EVENTS) {
        tracing::warn!("The event monitor's reader did not take the last events");
    }
    outcome
}

/// The whole chain, outermost cause first.
fn report(error: &anyhow::Error) {
    eprintln!("Error: {error}");
    for cause in error.chain().skip(1) {
        eprintln!("  caused by: {cause}");
    }
}
