//! Interrupt lines. What enters: a device's wish to interrupt; what leaves: a count in an eventfd
//! that the VMM registers as irqfd (edge-triggered) for the device's GSI.

use std::io;
use std::sync::Arc;

use vm_superio::Trigger;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// One edge-triggered interrupt line. Clones drive the same line.
#[derive(Clone, Debug)]
pub struct IrqLine {
    event: Arc<EventFd>,
}

impl IrqLine {
    /// Makes a line that nobody listens to yet.
    pub fn new() -> io::Result<Self> {
        Ok(Self { event: Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?) })
    }

    /// The descriptor to register as irqfd.
    #[must_use]
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Raises an edge.
    pub fn raise(&self) -> io::Result<()> {
        match self.event.write(1) {
            // The counter is at its end: an edge is pending anyway.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            result => result,
        }
    }
}

impl Trigger for IrqLine {
    type E = io::Error;

    fn trigger(&self) -> Result<(), io::Error> {
        self.raise()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raising_is_seen_and_a_full_counter_is_no_error() {
        let line = IrqLine::new().unwrap();
        line.raise().unwrap();
        line.clone().trigger().unwrap();
        assert_eq!(line.event().read().unwrap(), 2);
        line.event().write(u64::MAX - 1).unwrap();
        line.raise().unwrap();
    }
}
