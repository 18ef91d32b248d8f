//! Doorbells: an eventfd for each queue, signalled by a write to the queue's place in the BAR.
//!
//! ```text
//!   guest writes ─▶ KVM (ioeventfd at the BAR's address) ──────────────┐
//!         └───────▶ exit ─▶ BusDevice::write, where no ioeventfd is ──┴─▶ eventfd ─▶ worker
//! ```

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::layout::{NOTIFY, NOTIFY_MULTIPLIER};

/// Binds an eventfd to writes at a guest-physical address, of any width.
pub trait Doorbells: Send + Sync {
    /// From now on a write there signals `event` and does not exit to the VMM.
    fn register(&self, event: &EventFd, address: u64) -> io::Result<()>;
    fn unregister(&self, event: &EventFd, address: u64) -> io::Result<()>;
}

/// The doorbells of one function.
pub(super) struct DoorbellSet {
    events: Vec<EventFd>,
    host: Arc<dyn Doorbells>,
    /// What is registered: the event's index and the address.
    registered: Mutex<Vec<(usize, u64)>>,
}

impl DoorbellSet {
    pub fn new(count: usize, host: Arc<dyn Doorbells>) -> io::Result<Self> {
        let event = |_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let events = (0..count).map(event).collect::<io::Result<_>>()?;
        Ok(Self { events, host, registered: Mutex::default() })
    }

    /// The function's BAR is at `base` now, or nowhere. Where the host refuses, the write exits
    /// and arrives by [`DoorbellSet::write`].
    pub fn place(&self, base: Option<u64>) {
        let mut registered = self.registered.lock().unwrap_or_else(PoisonError::into_inner);
        for (index, address) in registered.drain(..) {
            if let Err(error) = self.host.unregister(&self.events[index], address) {
                tracing::warn!("a doorbell at {address:#x} could not be unbound: {error}");
            }
        }
        let Some(base) = base else { return };
        let first = base.saturating_add(NOTIFY);
        for (index, address) in (first..).step_by(step()).take(self.events.len()).enumerate() {
            match self.host.register(&self.events[index], address) {
                Ok(()) => registered.push((index, address)),
                Err(error) => {
                    tracing::debug!("a doorbell at {address:#x} is not bound: {error}");
                }
            }
        }
    }

    /// The guest wrote to the notification area.
    pub fn write(&self, offset: u64) {
        if let Ok(index) = usize::try_from(offset / NOTIFY_MULTIPLIER) {
            self.ring(index);
        }
    }

    pub fn ring(&self, index: usize) {
        if let Some(event) = self.events.get(index) {
            // A counter at its end is a doorbell that has been rung.
            let _ = event.write(1);
        }
    }

    /// A descriptor of the same event for the device.
    pub fn event(&self, index: usize) -> io::Result<EventFd> {
        let event = self.events.get(index).ok_or(io::ErrorKind::NotFound)?;
        event.try_clone()
    }
}

impl Drop for DoorbellSet {
    fn drop(&mut self) {
        self.place(None);
    }
}

fn step() -> usize {
    usize::try_from(NOTIFY_MULTIPLIER).unwrap_or(1)
}
