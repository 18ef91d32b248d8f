//! What the guest asks of its machine as a whole.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crossbeam_channel::Sender;
use devices::acpi::pm::PowerEvent;

use crate::cpu::MachineEvent;

/// One wish is told until a reset has fulfilled it, so a guest may write its registers as often as
/// it likes without filling the queue. It is part of the state: a host that dies between the wish
/// and its fulfilment must not leave a guest that waits for ever.
pub(super) struct Wishes {
    asked: Mutex<Option<PowerEvent>>,
    events: Sender<MachineEvent>,
}

impl Wishes {
    pub(super) fn new(events: Sender<MachineEvent>) -> Self {
        Self { asked: Mutex::new(None), events }
    }

    pub(super) fn ask(&self, wish: PowerEvent) {
        let mut asked = self.lock();
        if asked.is_none() {
            *asked = Some(wish);
            let event = match wish {
                PowerEvent::Off => MachineEvent::PowerOff,
                PowerEvent::Reset => MachineEvent::Reset,
            };
            // A closed channel means that the VMM is on its way out.
            let _ = self.events.send(event);
        }
    }

    pub(super) fn asked(&self) -> Option<PowerEvent> {
        *self.lock()
    }

    pub(super) fn forget(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> MutexGuard<'_, Option<PowerEvent>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
