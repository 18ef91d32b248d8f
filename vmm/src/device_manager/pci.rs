//! The PCI bus of a machine: where it is, what sits on it, and the devices' life as a whole.
//!
//! | Where | What |
//! |---|---|
//! | 3 GiB to 3.5 GiB | BARs below 4 GiB |
//! | 0xe0000000, 1 MiB | configuration space (ECAM) of bus 0 |
//! | past RAM and 4 GiB, 16 GiB | BARs above, where all are at power-on |
//! | ports 0xcf8 to 0xcff | configuration mechanism 1 |
//!
//! Slot 0 is the host bridge; [`PciDevices::add`] gives each device the next free one.
//!
//! ```text
//!   new, add ── attach (boot, restore, take-over) ── driver activates ⇄ resets
//!                   └ not when a replica is built: a backup owns nothing before its take-over
//! ```

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use api::response::{DeviceNode, VmCounters};
use devices::acpi::tables::AcpiPci;
use devices::bus::BusError;
use devices::pci::Region;
use devices::pci::access::{
    CONFIG_PORTS_BASE, CONFIG_PORTS_LEN, ConfigPorts, ECAM_BYTES, Ecam, Window,
};
use devices::pci::bridge::HostBridge;
use devices::pci::config::{ConfigError, ConfigState};
use devices::pci::root::{PciRoot, RootError, Windows};
use devices::pci::virtio::{
    BAR_BYTES, Host, TransportError, VirtioPci, VirtioPciState, VirtioStateError,
};
use devices::virtio::device::{AttachError, VirtioDevice};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::Buses;
use crate::memory::{ECAM_START, HIGH_RAM_START, LOW_RAM_END};

/// Bytes of the window above RAM.
const HIGH_WINDOW_BYTES: u64 = 16 << 30;
const HIGH_WINDOW_ALIGNMENT: u64 = 4 << 30;

/// The bus or a device on it could not be set up, attached or loaded.
#[derive(Debug, Error)]
pub enum PciError {
    #[error("Cannot make {id}")]
    Make { id: String, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("{id} has no place on the PCI bus: all slots are taken")]
    Full { id: String },
    #[error("Cannot put {id} on the PCI bus")]
    Slot { id: String, source: RootError },
    #[error("Cannot make {id} a PCI function")]
    Transport { id: String, source: TransportError },
    #[error("Cannot give the PCI bus its addresses")]
    Bus(#[from] BusError),
    #[error("Cannot attach {id}")]
    Attach { id: String, source: AttachError },
    #[error("The state has {found} PCI devices, the machine {expected}")]
    Count { found: usize, expected: usize },
    #[error("The state of the host bridge is not usable")]
    Bridge(#[source] ConfigError),
    #[error("The state of a PCI device is not usable")]
    State(#[from] VirtioStateError),
}

/// State of the bus and all that is on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciState {
    /// The address port of configuration mechanism 1.
    pub address: u32,
    pub bridge: ConfigState,
    pub functions: Vec<VirtioPciState>,
}

impl PciState {
    /// What can be said without the machine.
    pub fn validate(&self) -> Result<(), PciError> {
        Ok(self.functions.iter().try_for_each(VirtioPciState::validate)?)
    }
}

/// Who is parked, and until when.
#[derive(Debug, Default)]
struct Life {
    /// Functions that have been attached, in the order of their slots.
    attached: usize,
    /// Parked for good.
    silent: bool,
}

/// The bus.
pub struct PciDevices {
    root: Arc<PciRoot>,
    bridge: Arc<HostBridge>,
    ports: Arc<ConfigPorts>,
    host: Host,
    functions: RwLock<Vec<Arc<VirtioPci>>>,
    life: Mutex<Life>,
}

impl PciDevices {
    /// A bus with a host bridge. `ram_end` is the first address past all RAM.
    pub fn new(buses: &Buses, ram_end: u64, host: Host) -> Result<Self, PciError> {
        let windows = windows(ram_end);
        let root = Arc::new(PciRoot::new(windows));
        let ports = Arc::new(ConfigPorts::new(Arc::clone(&root)));
        buses.port.insert(CONFIG_PORTS_BASE, CONFIG_PORTS_LEN, Arc::clone(&ports) as _)?;
        let ecam = Ecam::new(Arc::clone(&root));
        buses.mmio.insert(ECAM_START.into(), ECAM_BYTES, Arc::new(ecam))?;
        for window in [windows.low, windows.high] {
            let device = Arc::new(Window::new(Arc::clone(&root), window.base));
            buses.mmio.insert(window.base, window.len, device)?;
        }
        let bridge = Arc::new(HostBridge::default());
        root.insert(0, Arc::clone(&bridge) as _)
            .map_err(|source| PciError::Slot { id: "the host bridge".into(), source })?;
        let (functions, life) = (RwLock::default(), Mutex::default());
        Ok(Self { root, bridge, ports, host, functions, life })
    }

    /// Puts a device into the lowest free slot.
    pub fn add(&self, device: Arc<dyn VirtioDevice>) -> Result<(), PciError> {
        let id = device.id().to_owned();
        let slot = self.root.free_slot().ok_or_else(|| PciError::Full { id: id.clone() })?;
        let base = self.root.windows().high.base + u64::from(slot) * BAR_BYTES;
        let function = VirtioPci::new(slot, base, device, self.host.clone())
            .map_err(|source| PciError::Transport { id: id.clone(), source })?;
        let function = Arc::new(function);
        self.root
            .insert(slot, Arc::clone(&function) as _)
            .map_err(|source| PciError::Slot { id, source })?;
        self.functions.write().unwrap_or_else(PoisonError::into_inner).push(function);
        Ok(())
    }

    /// What the ACPI tables say.
    #[must_use]
    pub fn acpi(&self) -> AcpiPci {
        AcpiPci { ecam: ECAM_START, windows: self.root.windows() }
    }

    /// Lets every device take what the host lends it: this VMM owns the VM now.
    pub fn attach(&self) -> Result<(), PciError> {
        let mut life = self.life();
        for function in self.functions().iter().skip(life.attached) {
            let device = function.device();
            device
                .attach()
                .map_err(|source| PciError::Attach { id: device.id().to_owned(), source })?;
            life.attached += 1;
        }
        Ok(())
    }

    /// Nothing touches guest memory, and nobody interrupts, until [`PciDevices::unpark`].
    pub fn park(&self) {
        let _life = self.life();
        for function in self.functions() {
            function.device().park();
        }
    }

    pub fn unpark(&self) {
        // Held to the end: nobody silences the devices in between.
        let life = self.life();
        if !life.silent {
            for function in self.functions() {
                function.device().unpark();
            }
        }
    }

    /// Parks for good: this VMM's VM has ended, or runs elsewhere.
    pub fn silence(&self) {
        self.life().silent = true;
        self.park();
    }

    /// Only while parked.
    #[must_use]
    pub fn save(&self) -> PciState {
        PciState {
            address: self.ports.save(),
            bridge: self.bridge.save(),
            functions: self.functions().iter().map(|function| function.save()).collect(),
        }
    }

    /// Whether [`PciDevices::restore`] would load this, as far as that can be said before.
    pub fn check(&self, state: &PciState) -> Result<(), PciError> {
        let functions = self.functions();
        let (found, expected) = (state.functions.len(), functions.len());
        if found != expected {
            return Err(PciError::Count { found, expected });
        }
        self.bridge.check(&state.bridge).map_err(PciError::Bridge)?;
        let mut pairs = functions.iter().zip(&state.functions);
        Ok(pairs.try_for_each(|(function, state)| function.check(state))?)
    }

    /// Loads a state. Only while parked. [`PciDevices::nudge`] is to follow when the vCPUs have
    /// their state.
    pub fn restore(&self, state: &PciState) -> Result<(), PciError> {
        self.check(state)?;
        self.ports.restore(state.address);
        self.bridge.restore(&state.bridge).map_err(PciError::Bridge)?;
        let functions = self.functions();
        let mut pairs = functions.iter().zip(&state.functions);
        let result = pairs.try_for_each(|(function, state)| function.restore(state));
        self.root.place();
        Ok(result?)
    }

    /// Interrupts for all queues of restored devices.
    pub fn nudge(&self) {
        for function in self.functions() {
            function.nudge();
        }
    }

    /// Tells the world where the VM is now.
    pub fn announce(&self) {
        for function in self.functions() {
            function.device().announce();
        }
    }

    /// Only asks the guest to do so.
    pub fn announce_to_guest(&self) {
        for function in self.functions() {
            function.device().announce_to_guest();
        }
    }

    /// Back to power-on. Only while parked.
    pub fn reset(&self) {
        self.ports.restore(0);
        self.bridge.reset();
        for function in self.functions() {
            function.reset();
        }
        self.root.place();
    }

    #[must_use]
    pub fn counters(&self) -> VmCounters {
        let functions = self.functions();
        let of = |function: &Arc<VirtioPci>| {
            let counters = function.counters().into_iter();
            let named = counters.map(|(name, value)| (name.to_owned(), value)).collect();
            (function.device().id().to_owned(), named)
        };
        functions.iter().map(of).collect()
    }

    /// A node for each device and one, its parent, for the function that it is reached through.
    #[must_use]
    pub fn tree(&self) -> Vec<DeviceNode> {
        let mut nodes = Vec::new();
        for function in self.functions() {
            let id = function.device().id().to_owned();
            let transport = format!("_virtio-pci-{id}");
            let bdf = Some(format!("0000:00:{:02x}.0", function.slot()));
            nodes.push(DeviceNode {
                id: id.clone(),
                parent: Some(transport.clone()),
                pci_bdf: bdf.clone(),
                ..Default::default()
            });
            nodes.push(DeviceNode {
                id: transport,
                children: vec![id],
                pci_bdf: bdf,
                ..Default::default()
            });
        }
        nodes
    }

    fn functions(&self) -> Vec<Arc<VirtioPci>> {
        self.functions.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn life(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The upper window depends on the memory's size alone, so it is the same on the backup.
fn windows(ram_end: u64) -> Windows {
    let base = ram_end.max(HIGH_RAM_START).next_multiple_of(HIGH_WINDOW_ALIGNMENT);
    Windows {
        low: Region { base: LOW_RAM_END, len: u64::from(ECAM_START) - LOW_RAM_END },
        high: Region { base, len: HIGH_WINDOW_BYTES },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_upper_window_is_past_all_ram() {
        let gib = 1 << 30;
        for (ram_end, base) in [(gib, 4 * gib), (4 * gib, 4 * gib), (4 * gib + 1, 8 * gib)] {
            let windows = windows(ram_end);
            assert_eq!((windows.high.base, windows.high.len), (base, 16 * gib));
            assert_eq!(windows.low.last(), Some(u64::from(ECAM_START) - 1));
        }
    }
}
