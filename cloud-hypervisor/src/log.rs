//! Where the log goes, and how much of it.

use std::fs::OpenOptions;
use std::io::IsTerminal;
use std::path::Path;
use std::sync::Mutex;

use anyhow::Context;
use tracing::level_filters::LevelFilter;

/// Starts logging to `file`, or to standard error. More `-v` mean more detail.
pub(crate) fn start(verbosity: u8, file: Option<&Path>) -> anyhow::Result<()> {
    let level = match verbosity {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    let builder = tracing_subscriber::fmt().with_max_level(level).with_thread_names(true);
    match file {
        Some(path) => {
            let file = OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .with_context(|| format!("Cannot open the log file {}", path.display()))?;
            builder.with_ansi(false).with_writer(Mutex::new(file)).init();
        }
        None => {
            let colours = std::io::stderr().is_terminal();
            builder.with_ansi(colours).with_writer(std::io::stderr).init();
        }
    }
    Ok(())
}
