//! A serial port as a VM has it: the device, its host side, and the two threads between them.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use nix::sys::eventfd::EventFd;

use super::backend::{Backend, BackendError, SerialMode};
use super::{Serial, input, new_event, output};
use crate::counters::{Counter, Counters};
use crate::irq::IrqLine;
use crate::output_gate::OutputGate;

/// Finishing or dropping it writes what was released (held output stays unwritten), ends the threads and
/// undoes what opening did: raw mode, the socket's path.
#[derive(Debug)]
pub struct SerialPort {
    device: Arc<Serial>,
    backend: Backend,
    /// In the order in which they end, each with what tells it to.
    threads: Mutex<Vec<(Arc<EventFd>, JoinHandle<()>)>>,
    write_errors: Arc<Counter>,
}

impl SerialPort {
    /// Opens the host side and starts its threads; the device is in its reset state.
    pub fn open(mode: &SerialMode, irq: IrqLine) -> Result<Self, BackendError> {
        let started = |what| move |source: io::Error| BackendError::Start { what, source };
        let mut backend = Backend::open(mode)?;
        let gate = match backend.sink {
            Some(_) => OutputGate::new(),
            None => OutputGate::null(),
        };
        let device = Serial::new(irq, Arc::new(gate)).map_err(started("device"))?;
        let source = backend.source.take();
        let sink = backend.sink.take();
        // From here on a failure drops the port, which ends what was started.
        let mut port = Self {
            device: Arc::clone(&device),
            backend,
            threads: Mutex::default(),
            write_errors: Arc::default(),
        };
        if let Some(sink) = sink {
            let gate = Arc::clone(device.gate());
            let errors = Arc::clone(&port.write_errors);
            port.spawn("serial-out", move |stop| output::run(&gate, &sink, stop, &errors))?;
        }
        if let Some(source) = source {
            port.spawn("serial-in", move |stop| input::run(&device, source, stop))?;
        }
        Ok(port)
    }

    /// The device, for the port bus and for saving.
    #[must_use]
    pub fn device(&self) -> &Arc<Serial> {
        &self.device
    }

    /// Where a pty's other side is, for `vm.info`.
    #[must_use]
    pub fn pty_path(&self) -> Option<&Path> {
        self.backend.pty_path()
    }

    fn spawn(
        &mut self,
        name: &'static str,
        body: impl FnOnce(&EventFd) + Send + 'static,
    ) -> Result<(), BackendError> {
        let failed = |source| BackendError::Start { what: name, source };
        let stop = Arc::new(new_event().map_err(io::Error::from).map_err(failed)?);
        let seen = Arc::clone(&stop);
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || body(&seen))
            .map_err(failed)?;
        self.threads.get_mut().unwrap_or_else(PoisonError::into_inner).push((stop, thread));
        Ok(())
    }

    /// Writes what was released and ends the threads. A second call finds nothing to do.
    pub fn finish(&self) {
        self.device.gate().close();
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        let is_first = !threads.is_empty();
        // One after the other: a socket's client belongs to the input thread, which closes it at
        // its end, and the last words must have reached it by then.
        for (stop, thread) in threads.drain(..) {
            if let Err(error) = stop.write(1) {
                tracing::warn!("A thread of the serial port cannot be stopped: {error}");
            } else if thread.join().is_err() {
                tracing::warn!("A thread of the serial port panicked");
            }
        }
        if is_first {
            self.backend.wait_for_reader();
        }
    }
}

impl Drop for SerialPort {
    fn drop(&mut self) {
        self.finish();
    }
}

impl Counters for SerialPort {
    fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut counters = self.device.counters();
        counters.push(("write_errors", self.write_errors.get()));
        counters
    }
}
