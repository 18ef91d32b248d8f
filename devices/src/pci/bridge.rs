//! The host bridge at 00:00.0: it identifies itself, and that is all that it does.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::PciFunction;
use super::config::{ConfigError, ConfigSpace, ConfigState, Identity};

/// The generic PCI Express host bridge of virtual machines, which no kernel has a quirk for.
const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: 0x06_0000,
    subsystem_vendor: 0,
    subsystem: 0,
};

/// The function.
pub struct HostBridge {
    config: Mutex<ConfigSpace>,
}

impl Default for HostBridge {
    fn default() -> Self {
        Self { config: Mutex::new(ConfigSpace::new(&IDENTITY)) }
    }
}

impl HostBridge {
    #[must_use]
    pub fn save(&self) -> ConfigState {
        self.lock().save()
    }

    /// Whether [`HostBridge::restore`] would take this.
    pub fn check(&self, state: &ConfigState) -> Result<(), ConfigError> {
        self.lock().check(state)
    }

    pub fn restore(&self, state: &ConfigState) -> Result<(), ConfigError> {
        self.lock().restore(state)
    }

    /// Back to power-on.
    pub fn reset(&self) {
        *self.lock() = ConfigSpace::new(&IDENTITY);
    }

    fn lock(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PciFunction for HostBridge {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.lock().read(offset.into(), data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        self.lock().write(offset.into(), data);
    }
}
