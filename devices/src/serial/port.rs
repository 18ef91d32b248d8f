//! A serial port as a VM has it: the device and its host side.

use std::path::Path;
use std::sync::Arc;

use super::Serial;
use crate::console::{BackendError, HostSide, PortMode};
use crate::counters::Counters;
use crate::irq::IrqLine;

/// Finishing or dropping it ends the host side.
#[derive(Debug)]
pub struct SerialPort {
    device: Arc<Serial>,
    host: HostSide,
}

impl SerialPort {
    /// Opens the host side and starts its threads; the device is in its reset state.
    pub fn open(mode: &PortMode, irq: IrqLine) -> Result<Self, BackendError> {
        let mut host = HostSide::open(mode)?;
        let device = Serial::new(irq, Arc::clone(host.gate()))
            .map_err(|source| BackendError::Start { what: "serial port".into(), source })?;
        host.start("serial", Arc::clone(&device) as _)?;
        Ok(Self { device, host })
    }

    /// The device, for the port bus and for saving.
    #[must_use]
    pub fn device(&self) -> &Arc<Serial> {
        &self.device
    }

    /// Where a pty's other side is, for `vm.info`.
    #[must_use]
    pub fn pty_path(&self) -> Option<&Path> {
        self.host.pty_path()
    }

    /// Writes what was released and ends the threads. A second call finds nothing to do.
    pub fn finish(&self) {
        self.host.finish();
    }
}

impl Counters for SerialPort {
    fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut counters = self.device.counters();
        counters.extend(self.host.counters());
        counters
    }
}
