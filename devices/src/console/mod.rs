//! The host's side of serial ports and consoles.
//!
//! ```text
//!   device ─▶ OutputGate ─▶ output thread ─▶ file, socket, terminal ─▶ input thread ─▶ device
//!                                                                          ▲   room   │
//!                                                                          └──────────┘
//! ```
//!
//! What enters: a [`PortMode`], output through the gate, input from the backend. What leaves: the
//! same bytes, on the other side. What always holds: the device never waits for the backend; input
//! that the device has no room for is not read.

/// Where a port leads: files, terminals, sockets.
mod backend;
/// From the backend to the device.
mod input;
/// From the gate to the backend.
mod output;
/// The terminal that this process was started on.
pub mod tty;
/// Its size.
mod window;

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use nix::sys::eventfd::{EfdFlags, EventFd};

use self::backend::Backend;
pub use self::backend::{BackendError, PortMode};
pub use self::window::WindowSize;
use crate::counters::Counter;
use crate::output_gate::OutputGate;

/// A device as its input thread sees it.
pub trait Input: Send + Sync {
    /// Takes what fits and returns how many bytes that is. If that was not all, the device signals
    /// its room when it is worth trying again.
    fn take(&self, bytes: &[u8]) -> usize;
    fn room(&self) -> &Room;
}

/// Tells the input thread that a device has room for input again.
#[derive(Debug)]
pub struct Room {
    event: EventFd,
    /// Somebody waits.
    wanted: AtomicBool,
}

impl Room {
    /// Nobody waits.
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn new() -> io::Result<Self> {
        Ok(Self { event: new_event()?, wanted: AtomicBool::new(false) })
    }

    /// Becomes readable when there is room after [`Room::set_wanted`]. The reader resets it.
    #[must_use]
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Whether the input thread is to be told. Said before the device looks for room, or with a
    /// lock held that those who make room take: else the signal may be lost.
    pub fn set_wanted(&self, wanted: bool) {
        self.wanted.store(wanted, Ordering::SeqCst);
    }

    /// There may be room.
    pub fn signal(&self) {
        if self.wanted.swap(false, Ordering::SeqCst)
            && let Err(error) = self.event.write(1)
        {
            tracing::warn!("Input cannot be resumed: {error}");
        }
    }
}

/// An eventfd for threads.
fn new_event() -> nix::Result<EventFd> {
    EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
}

/// A backend and its threads. Finishing or dropping it writes what was released (held output stays
/// unwritten), ends the threads and undoes what opening did: raw mode, the socket's path.
#[derive(Debug)]
pub struct HostSide {
    backend: Backend,
    gate: Arc<OutputGate>,
    /// In the order in which they end, each with what tells it to.
    threads: Mutex<Vec<(Arc<EventFd>, JoinHandle<()>)>>,
    write_errors: Arc<Counter>,
}

impl HostSide {
    /// Opens it; nothing is read or written until [`HostSide::start`].
    pub fn open(mode: &PortMode) -> Result<Self, BackendError> {
        let backend = Backend::open(mode)?;
        let gate = match backend.sink {
            Some(_) => OutputGate::new(),
            None => OutputGate::null(),
        };
        Ok(Self {
            backend,
            gate: Arc::new(gate),
            threads: Mutex::default(),
            write_errors: Arc::default(),
        })
    }

    /// The gate that the device's output goes through.
    #[must_use]
    pub fn gate(&self) -> &Arc<OutputGate> {
        &self.gate
    }

    /// Starts the threads, `<name>-out` and `<name>-in`, where the mode needs them. Once.
    pub fn start(
        &mut self,
        name: &'static str,
        device: Arc<dyn Input>,
    ) -> Result<(), BackendError> {
        if let Some(sink) = self.backend.sink.take() {
            let gate = Arc::clone(&self.gate);
            let errors = Arc::clone(&self.write_errors);
            self.spawn(format!("{name}-out"), move |stop| {
                output::run(name, &gate, &sink, stop, &errors);
            })?;
        }
        if let Some(source) = self.backend.source.take() {
            self.spawn(format!("{name}-in"), move |stop| {
                input::run(name, &*device, source, stop);
            })?;
        }
        Ok(())
    }

    /// Where a pty's other side is, for `vm.info`.
    #[must_use]
    pub fn pty_path(&self) -> Option<&Path> {
        self.backend.pty_path()
    }

    /// The present size of the terminal that this process was started on, if it is this backend.
    #[must_use]
    pub fn window(&self) -> WindowSize {
        if self.backend.is_tty {
            window::of_stdin().unwrap_or_default()
        } else {
            WindowSize::default()
        }
    }

    /// What could not be written, for `vm.counters`.
    #[must_use]
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![("write_errors", self.write_errors.get())]
    }

    fn spawn(
        &mut self,
        name: String,
        body: impl FnOnce(&EventFd) + Send + 'static,
    ) -> Result<(), BackendError> {
        let failed = |source| BackendError::Start { what: format!("thread {name}"), source };
        let stop = Arc::new(new_event().map_err(io::Error::from).map_err(failed)?);
        let seen = Arc::clone(&stop);
        let thread =
            thread::Builder::new().name(name.clone()).spawn(move || body(&seen)).map_err(failed)?;
        self.threads.get_mut().unwrap_or_else(PoisonError::into_inner).push((stop, thread));
        Ok(())
    }

    /// Writes what was released and ends the threads. A second call finds nothing to do.
    pub fn finish(&self) {
        self.gate.close();
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        let is_first = !threads.is_empty();
        // One after the other: a socket's client belongs to the input thread, which closes it at
        // its end, and the last words must have reached it by then.
        for (stop, thread) in threads.drain(..) {
            let name = thread.thread().name().unwrap_or_default().to_owned();
            if let Err(error) = stop.write(1) {
                tracing::warn!("Thread {name} cannot be stopped: {error}");
            } else if thread.join().is_err() {
                tracing::warn!("Thread {name} panicked");
            }
        }
        if is_first {
            self.backend.wait_for_reader();
        }
    }
}

impl Drop for HostSide {
    fn drop(&mut self) {
        self.finish();
    }
}
