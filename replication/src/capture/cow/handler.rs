//! The thread that serves the guest's writes to protected pages.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use userfault::Userfault;

use super::CowError;
use super::table::Table;
use crate::engine::prefer_this_thread;

/// The running thread. It ends when this is dropped, which is after the last page was let go.
pub(super) struct Handler {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

/// A guest that waits for a page for ever can neither be saved nor reported; a host that died can.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

impl Handler {
    pub(super) fn start(table: &Arc<Table>) -> Result<Self, CowError> {
        let io = |errno: Errno| CowError::Thread(errno.into());
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let stop = Arc::new(EventFd::from_value_and_flags(0, flags).map_err(io)?);
        let (table, stopped) = (Arc::clone(table), Arc::clone(&stop));
        let thread = std::thread::Builder::new()
            .name("repl-cow".into())
            .spawn(move || {
                let _guard = AbortOnPanic;
                prefer_this_thread();
                serve(&table, &stopped);
            })
            .map_err(CowError::Thread)?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        // It cannot be full, written once.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            // A panic there has ended this process.
            let _ = thread.join();
        }
    }
}

fn serve(table: &Table, stop: &EventFd) {
    let mut pages = Vec::new();
    loop {
        let overdue = table.overdue();
        let limit = overdue.map_or(PollTimeout::NONE, |at| {
            // Rounded up: not a moment too early, again and again.
            let left = at.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        if overdue.is_some_and(|at| at <= Instant::now()) {
            table.revoke();
        }
        match wait(table.userfault(), Some(stop), limit) {
            Ok(true) => return,
            Ok(false) => {}
            Err(error) => table.fatal(&error),
        }
        loop {
            let began = Instant::now();
            if let Err(error) = table.userfault().faults(&mut pages) {
                table.fatal(&CowError::Protect(error));
            }
            if pages.is_empty() {
                break;
            }
            let (mut faults, mut waited) = (0, Duration::ZERO);
            for page in &pages {
                table.fault(*page);
                faults += 1;
                waited += began.elapsed();
            }
            table.served(faults, waited);
        }
    }
}

/// Waits until somebody waits for a page; `true`: it is to end.
pub(super) fn wait(
    userfault: &Userfault,
    stop: Option<&EventFd>,
    limit: impl Into<PollTimeout>,
) -> Result<bool, CowError> {
    let mut sources = vec![PollFd::new(userfault.as_fd(), PollFlags::POLLIN)];
    sources.extend(stop.map(|stop| PollFd::new(stop.as_fd(), PollFlags::POLLIN)));
    match poll(&mut sources, limit) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(errno) => return Err(CowError::Thread(errno.into())),
    }
    let stops = sources.get(1).and_then(PollFd::any);
    Ok(stops.unwrap_or(false))
}
