//! Programs that leave nothing behind when they are told to end.
//!
//! What enters: SIGINT, SIGTERM, SIGHUP. What leaves: the folders made by [`Folder::new`] are gone,
//! and the process ends with 128 + the signal's number, as a shell would say. The VMMs die with it
//! ([`crate::process`]).
//!
//! [`watch`] blocks the signals, so that all threads that come later do too, and one thread waits
//! for them: what is done on a signal is ordinary code.

use std::collections::BTreeSet;
use std::io;
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

const SIGNALS: [(libc::c_int, &str); 3] =
    [(libc::SIGINT, "SIGINT"), (libc::SIGTERM, "SIGTERM"), (libc::SIGHUP, "SIGHUP")];
/// A VMM that still writes may put a file into a folder that is being emptied.
const REMOVE_TRIES: u32 = 20;

/// What is to be removed. Whoever waits for a signal keeps the lock to the end of the process.
static FOLDERS: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

fn folders() -> MutexGuard<'static, BTreeSet<PathBuf>> {
    FOLDERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A temporary folder that goes away when dropped, and when a watched signal comes.
pub struct Folder(tempfile::TempDir);

impl Folder {
    pub fn new() -> Result<Self> {
        // Under the lock: no signal falls between the folder and its entry.
        let mut known = folders();
        let folder = tempfile::tempdir().context("Cannot make a temporary directory")?;
        known.insert(folder.path().to_owned());
        Ok(Self(folder))
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Gone before the lock is: a signal now must not find it neither listed nor removed.
        let mut known = folders();
        known.remove(self.0.path());
        let _ = std::fs::remove_dir_all(self.0.path());
    }
}

/// Blocks the signals and starts the thread that waits for them. Call it first, on the main thread.
pub fn watch() -> Result<()> {
    mask(libc::SIG_BLOCK).context("Cannot block the signals")?;
    std::thread::Builder::new().name("signals".into()).spawn(|| match wait() {
        Ok(signal) => end(signal),
        Err(error) => eprintln!("Cannot wait for signals: {error:#}"),
    })?;
    Ok(())
}

/// For a child before its exec; async-signal-safe.
pub(crate) fn unblock() -> io::Result<()> {
    mask(libc::SIG_UNBLOCK)
}

/// Whether whoever started us ignores it, as `nohup` does: then so do we.
fn is_ignored(signal: libc::c_int) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: nothing is set, and the action to be filled lives through the call; all zeroes is a
    // valid one, should the call fail.
    unsafe {
        libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr());
        action.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

fn set() -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset(3) initializes the set that it is given; it and sigaddset(3) fail only
    // for numbers that are no signals.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for (signal, _) in SIGNALS.into_iter().filter(|(signal, _)| !is_ignored(*signal)) {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        set.assume_init()
    }
}

fn mask(how: libc::c_int) -> io::Result<()> {
    let set = set();
    // SAFETY: the set is initialized and lives through the call; the old mask is not asked for.
    match unsafe { libc::pthread_sigmask(how, &raw const set, std::ptr::null_mut()) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

fn wait() -> Result<libc::c_int> {
    let set = set();
    let mut signal = 0;
    // SAFETY: both live through the call, and the set is initialized.
    let error = unsafe { libc::sigwait(&raw const set, &raw mut signal) };
    ensure!(error == 0, "sigwait: {}", io::Error::from_raw_os_error(error));
    Ok(signal)
}

fn end(signal: libc::c_int) -> ! {
    let known = folders();
    for folder in known.iter() {
        remove(folder);
    }
    let name = SIGNALS.iter().find(|(number, _)| *number == signal).map_or("a signal", |s| s.1);
    // Nobody may be there to read it.
    let _ = io::Write::write_all(&mut io::stderr(), format!("\nEnded by {name}\n").as_bytes());
    std::process::exit(128 + signal)
}

fn remove(folder: &Path) {
    for _ in 0..REMOVE_TRIES {
        match std::fs::remove_dir_all(folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                std::thread::sleep(Duration::from_millis(10));
            }
            _ => return,
        }
    }
    let _ = io::Write::write_all(
        &mut io::stderr(),
        format!("\nCannot remove {}\n", folder.display()).as_bytes(),
    );
}
