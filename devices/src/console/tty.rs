//! The terminal that this process was started on: raw while a guest uses it, as before after.

use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use nix::unistd::{getpgrp, isatty, tcgetpgrp};

/// The settings to go back to; some while the terminal is raw.
static ORIGINAL: Mutex<Option<Termios>> = Mutex::new(None);

/// Keeps standard input raw, until dropped.
#[derive(Debug)]
pub struct RawMode(());

impl RawMode {
    /// Makes standard input raw. None where there is nothing to do: it is no terminal, it belongs
    /// to another job, or it is raw already.
    pub fn enter() -> Result<Option<Self>, nix::Error> {
        let stdin = std::io::stdin();
        let mut original = ORIGINAL.lock().unwrap_or_else(PoisonError::into_inner);
        if original.is_some() || !isatty(&stdin).unwrap_or(false) || !is_foreground(&stdin) {
            return Ok(None);
        }
        let settings = tcgetattr(&stdin)?;
        let mut raw = settings.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&stdin, SetArg::TCSANOW, &raw)?;
        *original = Some(settings);
        Ok(Some(Self(())))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore_terminal();
    }
}

/// Ends raw mode, if it is on. For ends of the process that run no destructors: a panic hook, or
/// just before `exit`.
pub fn restore_terminal() {
    let original = ORIGINAL.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(settings) = original
        && let Err(error) = tcsetattr(std::io::stdin(), SetArg::TCSANOW, &settings)
    {
        tracing::warn!("The terminal's settings cannot be restored: {error}");
    }
}

/// A job in the background would be stopped by SIGTTIN or SIGTTOU for touching the terminal.
/// Where there is no job control, the terminal is ours.
pub(super) fn is_foreground(terminal: impl AsFd) -> bool {
    tcgetpgrp(terminal).map_or(true, |group| group == getpgrp())
}
