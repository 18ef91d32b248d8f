//! Standard output. Whoever reads it may have seen enough and be gone, which is no error.

use std::io::{self, Write};

use anyhow::Context;

/// Prints `text`, all of it at once.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    judge(out.write_all(text.as_bytes()).and_then(|()| out.flush()))
}

/// What a command that has written comes to.
pub(crate) fn judge(written: io::Result<()>) -> anyhow::Result<()> {
    match written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written.context("Cannot write to standard output"),
    }
}
