//! Which devices a machine has, where they sit, and their state as a whole.
//!
//! | Device | Ports | Interrupt |
//! |---|---|---|
//! | i8042 (reset only) | 0x60-0x64 | - |
//! | CMOS clock | 0x70-0x71 | - |
//! | progress port | 0x80 | - |
//! | COM1 | 0x3f8-0x3ff | 4 |
//! | ACPI power management | 0x600-0x60f | 5 |
//! | PCI bus: [`pci`] | 0xcf8-0xcff | messages |

mod host;
pub mod pci;
pub mod taps;
#[cfg(test)]
mod tests;
pub mod virtio;
mod wishes;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use api::config::{ConsoleConfig, ConsoleOutputMode, VmConfig};
use api::response::{DeviceNode, VmCounters};
use crossbeam_channel::Sender;
use devices::acpi::pm::{EVENT_GSI, PM_BASE, PM_LEN, PmDevice, PmState, PowerCallback, PowerEvent};
use devices::acpi::tables::{self, AcpiConfig, AcpiError};
use devices::bus::{Bus, BusError};
use devices::console::{BackendError, PortMode};
use devices::counters::Counters;
use devices::irq::IrqLine;
use devices::legacy::cmos::{CMOS_BASE, CMOS_LEN, Cmos, CmosState};
use devices::legacy::debug_port::{DEBUG_PORT_BASE, DEBUG_PORT_LEN, DebugPort};
use devices::legacy::i8042::{I8042, I8042_BASE, I8042_LEN, I8042State};
use devices::output_gate::OutputGate;
use devices::pci::virtio::{Activity, Host, Observer};
use devices::serial::{
    SERIAL_BASE, SERIAL_GSI, SERIAL_LEN, Serial, SerialPort, SerialState, SerialStateError,
};
use devices::virtio::blk::Disk;
use devices::virtio::device::AttachError;
use devices::virtio::net::gate::TxGate;
use hypervisor::{Vm, VmError};
use replication::checking::is_broken;
use replication::ram::Mapping;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::boot::{ACPI_END, ACPI_START};
use crate::cpu::MachineEvent;
use crate::memory::Memory;
use host::Kvm;
use pci::{PciDevices, PciError, PciState};
use taps::TapDescriptors;
use virtio::VirtioDevices;
use wishes::Wishes;

/// The devices could not be set up, saved or loaded.
#[derive(Debug, Error)]
pub enum DeviceError {
    #[error("Cannot open the serial port")]
    Serial(#[source] BackendError),
    #[error("A serial port or console of mode {0:?} needs a path")]
    PortPath(ConsoleOutputMode),
    #[error("Cannot make an interrupt line")]
    Irq(#[source] io::Error),
    #[error("Cannot connect an interrupt line to KVM")]
    Irqfd(#[source] VmError),
    #[error("Two devices want the same addresses")]
    Bus(#[from] BusError),
    #[error("Cannot describe the machine by ACPI")]
    Acpi(#[from] AcpiError),
    #[error("Cannot write the ACPI tables to guest memory")]
    AcpiWrite(#[source] GuestMemoryError),
    #[error("The serial port refused its state")]
    SerialState(#[source] SerialStateError),
    #[error("The state is of a machine that differs in its serial port")]
    SerialPresence,
    #[error("The power-management device refused its state")]
    PmState(#[source] io::Error),
    #[error("Cannot use the PCI bus")]
    Pci(#[from] PciError),
    #[error("Cannot press the power button")]
    PowerButton(#[source] io::Error),
}

/// State of all devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DevicesState {
    pub platform: PlatformState,
    pub pci: PciState,
}

/// State of what is not on the PCI bus.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlatformState {
    pub serial: Option<SerialState>,
    pub pm: PmState,
    pub cmos: CmosState,
    pub i8042: I8042State,
    /// What the guest asked for and the VMM has not done yet.
    pub wish: Option<PowerEvent>,
}

impl DevicesState {
    /// Whether a machine could load this; nothing of it is trusted before.
    pub fn validate(&self) -> Result<(), DeviceError> {
        let serial = self.platform.serial.as_ref().map_or(Ok(()), SerialState::validate);
        serial.map_err(DeviceError::SerialState)?;
        Ok(self.pci.validate()?)
    }
}

/// The address spaces that vCPU exits go to.
pub struct Buses {
    pub port: Bus,
    pub mmio: Bus,
}

/// How long a switch-over may wait for the writers of output.
const SETTLE_LIMIT: Duration = Duration::from_millis(200);

/// Whose output waits for the commit of its epoch; frames always do.
#[derive(Clone, Copy, Debug)]
pub struct Holds {
    /// Output of the serial port and the console.
    pub console: bool,
    /// What changes the image of a disk that both hosts see.
    pub disks: bool,
}

/// The devices of one machine.
pub struct Devices {
    buses: Arc<Buses>,
    serial: Option<SerialPort>,
    pm: Arc<PmDevice>,
    cmos: Arc<Cmos>,
    i8042: Arc<I8042>,
    wishes: Arc<Wishes>,
    virtio: VirtioDevices,
    pci: PciDevices,
    /// What a reset goes back to.
    power_on: PlatformState,
    /// The world is to be told where the VM is, once its output may leave.
    announcement_waits: AtomicBool,
}

impl Devices {
    /// Makes the devices, connects their interrupts and puts them on their buses.
    pub fn new(
        config: &VmConfig,
        vm: &Arc<Vm>,
        memory: &Memory,
        taps: TapDescriptors,
        events: &Sender<MachineEvent>,
    ) -> Result<Self, DeviceError> {
        let line = |gsi| {
            let line = IrqLine::new().map_err(DeviceError::Irq)?;
            vm.register_irqfd(line.event(), gsi).map_err(DeviceError::Irqfd)?;
            Ok::<_, DeviceError>(line)
        };
        let serial = match port_mode(&config.serial)? {
            Some(mode) => {
                Some(SerialPort::open(&mode, line(SERIAL_GSI)?).map_err(DeviceError::Serial)?)
            }
            None => None,
        };
        let wishes = Arc::new(Wishes::new(events.clone()));
        let on_power = power_callback(&wishes);
        let pm = Arc::new(PmDevice::new(line(EVENT_GSI)?, Arc::clone(&on_power)));
        let cmos = Arc::new(Cmos::new());
        let i8042 = Arc::new(I8042::new(on_power));
        let buses = Arc::new(Buses { port: Bus::pio(), mmio: Bus::mmio() });
        let port = &buses.port;
        if let Some(serial) = &serial {
            port.insert(SERIAL_BASE, SERIAL_LEN, Arc::clone(serial.device()) as _)?;
        }
        port.insert(PM_BASE.into(), PM_LEN.into(), Arc::clone(&pm) as _)?;
        port.insert(CMOS_BASE, CMOS_LEN, Arc::clone(&cmos) as _)?;
        port.insert(I8042_BASE, I8042_LEN, Arc::clone(&i8042) as _)?;
        port.insert(DEBUG_PORT_BASE, DEBUG_PORT_LEN, Arc::new(DebugPort::default()))?;
        let kvm = Arc::new(Kvm(Arc::clone(vm)));
        let host = Host {
            memory: Arc::clone(memory.mapping()),
            messages: Arc::clone(&kvm) as _,
            doorbells: kvm,
            observer: observer(events.clone()),
        };
        let pci = PciDevices::new(&buses, memory.end(), host)?;
        let console = port_mode(&config.console)?;
        let virtio = VirtioDevices::new(config, console.as_ref(), taps)?;
        for device in virtio.all() {
            pci.add(device)?;
        }
        let power_on = save(serial.as_ref(), &pm, &cmos, &i8042);
        let announcement_waits = AtomicBool::new(false);
        Ok(Self {
            buses,
            serial,
            pm,
            cmos,
            i8042,
            wishes,
            virtio,
            pci,
            power_on,
            announcement_waits,
        })
    }

    #[must_use]
    pub fn buses(&self) -> &Arc<Buses> {
        &self.buses
    }

    /// The pty of the serial port, where it has one.
    #[must_use]
    pub fn serial_pty(&self) -> Option<PathBuf> {
        self.serial.as_ref()?.pty_path().map(Into::into)
    }

    /// The pty of the console, where it has one.
    #[must_use]
    pub fn console_pty(&self) -> Option<PathBuf> {
        self.virtio.console.as_ref()?.pty_path().map(Into::into)
    }

    /// Writes the ACPI tables and returns where they start.
    pub fn write_acpi_tables(
        &self,
        config: &VmConfig,
        memory: &Mapping,
    ) -> Result<u64, DeviceError> {
        let built = tables::build(&AcpiConfig {
            vcpus: config.cpus.boot_vcpus,
            max_vcpus: config.cpus.boot_vcpus,
            serial: self.serial.is_some(),
            pci: Some(self.pci.acpi()),
            base: ACPI_START,
            limit: ACPI_END,
        })?;
        for (address, bytes) in &built.blobs {
            memory.write_slice(bytes, GuestAddress(*address)).map_err(DeviceError::AcpiWrite)?;
        }
        Ok(built.rsdp)
    }

    /// Takes what the host lends the devices. Before the guest runs, on the host that owns it.
    pub fn attach(&self) -> Result<(), DeviceError> {
        Ok(self.pci.attach()?)
    }

    /// Whether the host would lend the cards their taps now. Images are another matter: those that are
    /// replicated are this host's already, and a shared one is its owner's until that has let go.
    pub fn try_attach(&self) -> Result<(), AttachError> {
        self.virtio.cards.iter().try_for_each(|card| card.try_attach())
    }

    /// No state changes from outside until [`Devices::unpark`].
    pub fn park(&self) {
        self.pci.park();
        if let Some(serial) = self.serial() {
            serial.park();
        }
    }

    /// Input flows again.
    pub fn unpark(&self) {
        self.pci.unpark();
        if let Some(serial) = self.serial() {
            serial.unpark();
        }
    }

    #[must_use]
    pub fn save(&self) -> DevicesState {
        DevicesState {
            platform: PlatformState {
                wish: self.wishes.asked(),
                ..save(self.serial.as_ref(), &self.pm, &self.cmos, &self.i8042)
            },
            pci: self.pci.save(),
        }
    }

    /// Whether [`Devices::restore`] would load this, as far as that can be said before.
    pub fn check(&self, state: &DevicesState) -> Result<(), DeviceError> {
        state.validate()?;
        if self.serial.is_some() != state.platform.serial.is_some() {
            return Err(DeviceError::SerialPresence);
        }
        Ok(self.pci.check(&state.pci)?)
    }

    /// Loads a state. Only while parked; [`Devices::nudge`] is to follow.
    pub fn restore(&self, state: &DevicesState) -> Result<(), DeviceError> {
        self.restore_platform(&state.platform)?;
        Ok(self.pci.restore(&state.pci)?)
    }

    /// All but the PCI bus.
    fn restore_platform(&self, state: &PlatformState) -> Result<(), DeviceError> {
        match (self.serial(), &state.serial) {
            (Some(serial), Some(state)) => {
                serial.restore(state).map_err(DeviceError::SerialState)?;
            }
            (None, None) => {}
            _ => return Err(DeviceError::SerialPresence),
        }
        self.pm.restore(&state.pm).map_err(DeviceError::PmState)?;
        self.cmos.restore(&state.cmos);
        self.i8042.restore(&state.i8042);
        if let Some(wish) = state.wish {
            self.wishes.ask(wish);
        }
        Ok(())
    }

    /// After [`Devices::restore`], when the vCPUs have their state: interrupts that may have been
    /// under way at the capture are made up for.
    pub fn nudge(&self) {
        self.pci.nudge();
    }

    /// The VM goes on from a replica here: tells the world.
    pub fn announce(&self) {
        self.pci.announce();
    }

    /// As [`Devices::announce`], where output is held: the guest is asked at once, what it says is held as
    /// all else is. The world is told with the first output that leaves.
    pub fn announce_once_released(&self) {
        self.announcement_waits.store(true, Ordering::SeqCst);
        self.pci.announce_to_guest();
    }

    fn announce_now_if_due(&self) {
        if self.announcement_waits.swap(false, Ordering::SeqCst) {
            self.pci.announce();
        }
    }

    /// What the guest asked of the machine as a whole, and no reset has fulfilled.
    #[must_use]
    pub fn wish(&self) -> Option<PowerEvent> {
        self.wishes.asked()
    }

    /// For whoever hears of such a wish.
    #[must_use]
    pub fn on_power(&self) -> PowerCallback {
        power_callback(&self.wishes)
    }

    /// Back to power-on. Only while parked.
    pub fn reset(&self) -> Result<(), DeviceError> {
        self.pci.reset();
        self.wishes.forget();
        self.restore_platform(&self.power_on)
    }

    pub fn power_button(&self) -> Result<(), DeviceError> {
        self.pm.power_button().map_err(DeviceError::PowerButton)
    }

    /// From now on output waits for the commit of its epoch.
    pub fn hold_output(&self, holds: Holds) {
        if holds.disks && !is_broken("disk-gate") {
            self.each_disk(Disk::hold);
        }
        if holds.console {
            self.each_gate(OutputGate::hold);
        }
        if is_broken("net-gate") {
            tracing::error!("FRAMES LEAVE BEFORE THEIR EPOCH IS COMMITTED: a test asked for that");
            return;
        }
        self.each_card(TxGate::hold);
    }

    pub fn seal_output(&self, epoch: u64) {
        self.each_gate(|gate| gate.seal(epoch));
        self.each_card(|gate| gate.seal(epoch));
        self.each_disk(|disk| disk.seal(epoch));
    }

    pub fn commit_output(&self, epoch: u64) {
        self.each_gate(|gate| gate.commit(epoch));
        self.each_card(|gate| gate.commit(epoch));
        self.each_disk(|disk| disk.commit(epoch));
        self.announce_now_if_due();
    }

    /// The backup has the last epoch of a switch-over. Frames leave here: no state carries them. A
    /// serial port's or console's output is part of its state, and so the backup's to say; a disk's requests are
    /// in flight in it, and so the backup's to carry out.
    pub fn hand_over_output(&self, epoch: u64) {
        self.each_card(|gate| gate.commit(epoch));
    }

    /// Waits for released output to be written, unless its reader does not read.
    pub fn settle_output(&self) {
        self.each_gate(|gate| {
            if !gate.settle(SETTLE_LIMIT) {
                tracing::warn!("Output was not read in time: a piece of it may come twice");
            }
        });
    }

    /// Nothing is held any more.
    pub fn pass_output(&self) {
        self.each_gate(OutputGate::pass);
        self.each_card(TxGate::pass);
        self.each_disk(Disk::pass);
        self.announce_now_if_due();
    }

    /// What is held is dropped, and whatever comes after it.
    pub fn silence(&self) {
        self.each_gate(OutputGate::discard);
        self.each_card(TxGate::discard);
        self.each_disk(Disk::discard);
        self.announcement_waits.store(false, Ordering::SeqCst);
        self.pci.silence();
    }

    /// Nothing is written after this: what was released is out, or nobody takes it.
    pub fn finish(&self) {
        if let Some(serial) = &self.serial {
            serial.finish();
        }
        if let Some(console) = &self.virtio.console {
            console.finish();
        }
    }

    #[must_use]
    pub fn output_held_bytes(&self) -> u64 {
        let ports: usize = self.gates().map(|gate| gate.held_bytes()).sum();
        let frames: usize = self.virtio.cards.iter().map(|card| card.gate().held_bytes()).sum();
        let changes: u64 = self.virtio.disks.iter().map(|disk| disk.held().bytes).sum();
        (ports + frames) as u64 + changes
    }

    /// Calls `waker` whenever output begins to wait for a seal.
    pub fn set_output_waker(&self, waker: &Arc<dyn Fn() + Send + Sync>) {
        self.each_gate(|gate| gate.set_waker(Arc::clone(waker)));
        self.each_card(|gate| gate.set_waker(Arc::clone(waker)));
        self.each_disk(|disk| disk.set_waker(Arc::clone(waker)));
    }

    /// Output waits for a seal.
    #[must_use]
    pub fn output_waiting(&self) -> bool {
        self.gates().any(|gate| gate.open_bytes() > 0)
            || self.virtio.cards.iter().any(|card| card.gate().open_bytes() > 0)
            || self.virtio.disks.iter().any(|disk| disk.open().requests > 0)
    }

    /// Disks that the guest can write, in the order of their slots.
    #[must_use]
    pub fn writable_disks(&self) -> Vec<Arc<Disk>> {
        self.virtio.disks.iter().filter(|disk| !disk.is_readonly()).cloned().collect()
    }

    #[must_use]
    pub fn counters(&self) -> VmCounters {
        let named = |counters: Vec<(&'static str, u64)>| {
            counters
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value))
                .collect::<BTreeMap<_, _>>()
        };
        let mut all = self.pci.counters();
        if let Some(serial) = &self.serial {
            all.insert("__serial".to_owned(), named(serial.counters()));
        }
        all
    }

    /// All devices that a client may know by their ids.
    #[must_use]
    pub fn tree(&self) -> BTreeMap<String, DeviceNode> {
        let mut nodes = self.pci.tree();
        if self.serial.is_some() {
            nodes.push(DeviceNode { id: "__serial".into(), ..Default::default() });
        }
        nodes.into_iter().map(|node| (node.id.clone(), node)).collect()
    }

    fn serial(&self) -> Option<&Arc<Serial>> {
        self.serial.as_ref().map(SerialPort::device)
    }

    fn each_card(&self, act: impl Fn(&TxGate)) {
        for card in &self.virtio.cards {
            act(card.gate());
        }
    }

    fn each_disk(&self, act: impl Fn(&Disk)) {
        for disk in &self.virtio.disks {
            act(disk);
        }
    }

    fn each_gate(&self, act: impl Fn(&OutputGate)) {
        self.gates().for_each(|gate| act(gate));
    }

    /// Those of the serial port and the console.
    fn gates(&self) -> impl Iterator<Item = &Arc<OutputGate>> {
        let console = self.virtio.console.iter().map(|console| console.gate());
        self.serial().map(|serial| serial.gate()).into_iter().chain(console)
    }
}

fn save(serial: Option<&SerialPort>, pm: &PmDevice, cmos: &Cmos, i8042: &I8042) -> PlatformState {
    PlatformState {
        serial: serial.map(|serial| serial.device().save()),
        pm: pm.save(),
        cmos: cmos.save(),
        i8042: i8042.save(),
        wish: None,
    }
}

/// Tells the control loop what drivers do to their devices. A guest that does nothing else must
/// not fill the VMM's memory with it.
fn observer(events: Sender<MachineEvent>) -> Observer {
    const WAITING_MAX: usize = 1024;
    Arc::new(move |id, activity| {
        if events.len() >= WAITING_MAX {
            return;
        }
        let what = match activity {
            Activity::Activated => "activated",
            Activity::Reset => "reset",
        };
        // A closed channel means that the VMM is on its way out.
        let _ = events.send(MachineEvent::Virtio { id: id.to_owned(), what });
    })
}

fn power_callback(wishes: &Arc<Wishes>) -> PowerCallback {
    let wishes = Arc::clone(wishes);
    Arc::new(move |wish| wishes.ask(wish))
}

fn port_mode(config: &ConsoleConfig) -> Result<Option<PortMode>, DeviceError> {
    let path = |path: &Option<PathBuf>| path.clone().ok_or(DeviceError::PortPath(config.mode));
    Ok(match config.mode {
        ConsoleOutputMode::Off => None,
        ConsoleOutputMode::Null => Some(PortMode::Null),
        ConsoleOutputMode::Tty => Some(PortMode::Tty),
        ConsoleOutputMode::Pty => Some(PortMode::Pty),
        ConsoleOutputMode::File => Some(PortMode::File(path(&config.file)?)),
        ConsoleOutputMode::Socket => Some(PortMode::Socket(path(&config.socket)?)),
    })
}
