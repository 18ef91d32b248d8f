//! A machine that waits for its take-over.

use std::sync::Arc;
use std::time::{Duration, Instant};

use api::config::{MemoryConfig, VmConfig};
use api::replication::ReplicateData;
use crossbeam_channel::Sender;
use devices::pci::virtio::VirtioPciState;
use devices::virtio::state::DeviceState;
use hypervisor::cpuid::CpuidError;
use hypervisor::cpuid::base::{self, Leaf};
use hypervisor::{CpuId, Hypervisor};
use replication::disk::ReplicaDisk;
use replication::guest::{GuestError, Replica, ReplicaBuilder};
use replication::primary::PrimaryHandle;
use replication::ram::{PageSet, Ram};
use thiserror::Error;

use super::codec::{self, Captured};
use super::description::Description;
use super::disks::Receiving;
use super::overrides::{OverrideError, Overrides, article, is_there};
use super::protected::holds;
use crate::boot::Payload;
use crate::control::Notice;
use crate::device_manager::taps::TapDescriptors;
use crate::machine::Machine;
use crate::memory::Memory;
use crate::request::{Failure, FailureKind};

/// A primary's description cannot be built on this host.
#[derive(Debug, Error)]
pub enum ReplicaError {
    #[error("The primary's description is not that of a VM")]
    Description(#[source] serde_json::Error),
    #[error("The primary's description has no CPUID that can be used")]
    Cpuid(#[source] CpuidError),
    #[error(
        "This host's CPU, as KVM offers it to guests, lacks what the VM may use since it began: {lacks}. \
         Hosts that protect each other's VMs need CPUs of the same model with the same kernel and microcode, or the \
         VM must begin on the one that offers less"
    )]
    Cpu { lacks: String },
    #[error("The primary's VM cannot run here: {0}")]
    Unusable(String),
    #[error("The machine state has {found} vCPUs, this VM {expected}")]
    Vcpus { found: usize, expected: u32 },
    #[error("The machine state has {found} {kind}, this VM {expected}")]
    Port { kind: &'static str, found: &'static str, expected: &'static str },
    #[error(
        "The memory that is left of the VM here is another one than its configuration asks for"
    )]
    Memory,
    #[error("The protection of the VM that was here has not ended")]
    Busy,
    #[error("The options of this backup do not fit the primary's VM")]
    Override(#[from] OverrideError),
}

/// What is left here of a VM that was handed over.
pub struct Kept {
    /// Its memory, for the first machine that is built, and what that was asked for.
    pub memory: Memory,
    pub config: MemoryConfig,
    /// Its protection, which has the old machine until it has ended: sockets, taps and locks are free only
    /// then.
    pub before: Arc<PrimaryHandle>,
    /// The old machine, which ends where this is let go of: whoever was busy with it as it was destroyed, a
    /// reset for one, may have it until it has noticed, and is not to end it in its own time.
    pub machine: Arc<Machine>,
}

/// How long those are waited for.
const NOTICED: Duration = Duration::from_secs(1);

impl Kept {
    /// Waits until nobody else has the old machine any more; its memory and what that was asked for, once all
    /// else of it is gone. `None` if its protection does not end.
    fn free(self) -> Option<(Memory, MemoryConfig)> {
        if !self.before.join_in_time() {
            return None;
        }
        let until = Instant::now() + NOTICED;
        while Arc::strong_count(&self.machine) > 1 && Instant::now() < until {
            // As for the engine's end: once, and there is nothing to wait on.
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(self.machine);
        Some((self.memory, self.config))
    }
}

/// Builds machines after primaries' descriptions.
pub struct ReplicaVms {
    hypervisor: Arc<Hypervisor>,
    overrides: Overrides,
    /// Of the cards that the overrides say have some here.
    taps: TapDescriptors,
    notices: Sender<Notice>,
    kept: Option<Kept>,
}

impl ReplicaVms {
    #[must_use]
    pub fn new(hypervisor: Arc<Hypervisor>, overrides: Overrides, notices: Sender<Notice>) -> Self {
        let taps = TapDescriptors::default();
        Self { hypervisor, overrides, taps, notices, kept: None }
    }

    /// The first machine that is built is what a VM is here that was handed over.
    #[must_use]
    pub fn around(self, kept: Option<Kept>) -> Self {
        Self { kept, ..self }
    }

    /// Cards have these taps, for each machine that is built.
    #[must_use]
    pub fn with(self, taps: TapDescriptors) -> Self {
        Self { taps, ..self }
    }

    /// The primary's machine as it is here.
    fn configure(&self, description: &[u8]) -> Result<Description, ReplicaError> {
        let mut theirs = Description::decode(description).map_err(ReplicaError::Description)?;
        self.overrides.apply(&mut theirs.config)?;
        Ok(theirs)
    }

    /// What the vCPUs' CPUID is made from: what it was on the host where the guest began, since that has seen it.
    fn cpuid(&self, leaves: &[Leaf]) -> Result<CpuId, GuestError> {
        let cpuid = base::from_leaves(leaves).map_err(ReplicaError::Cpuid)?;
        let lacks = base::lacks(&cpuid, &self.hypervisor.supported_cpuid()?);
        if !lacks.is_empty() {
            return Err(ReplicaError::Cpu { lacks: lacks.join(", ") }.into());
        }
        Ok(cpuid)
    }
}

/// Whether a machine of `config` could be built here, as far as that can be said before.
///
/// # Errors
/// The configuration is not usable, or its payload is not here.
pub fn check_host(config: &VmConfig) -> Result<(), GuestError> {
    crate::control::check_config(config)
        .map_err(|failure| ReplicaError::Unusable(failure.chain.join(": ")))?;
    // A guest that resets itself after a take-over boots from here.
    Payload::open(&config.payload)?;
    Ok(())
}

/// Whether a machine of `config` could load `captured`.
pub(super) fn check(captured: &Captured, config: &VmConfig) -> Result<(), GuestError> {
    let (found, expected) = (captured.machine.vcpus.len(), config.cpus.boot_vcpus);
    if u32::try_from(found) != Ok(expected) {
        return Err(ReplicaError::Vcpus { found, expected }.into());
    }
    let devices = &captured.machine.devices;
    let is_console = |state: &VirtioPciState| matches!(state.device, DeviceState::Console(_));
    let ports = [
        ("serial port", devices.platform.serial.is_some(), is_there(&config.serial)),
        ("console", devices.pci.functions.iter().any(is_console), is_there(&config.console)),
    ];
    for (kind, found, expected) in ports {
        if found != expected {
            let (found, expected) = (article(found), article(expected));
            return Err(ReplicaError::Port { kind, found, expected }.into());
        }
    }
    Ok(())
}

impl ReplicaBuilder for ReplicaVms {
    type Replica = ReplicaVm;

    fn build(&mut self, description: &[u8]) -> Result<ReplicaVm, GuestError> {
        // Of the first machine alone: whatever a later one is to be, it begins with memory that is empty.
        let kept = self.kept.take();
        let Description { config, cpuid } = self.configure(description)?;
        check_host(&config)?;
        let cpuid = self.cpuid(&cpuid)?;
        let memory = match kept {
            Some(kept) => {
                // One that hangs in a device keeps its memory. Nobody is heard here until this returns, not the
                // new primary either: it is given up, and copied back.
                let (memory, of) = kept.free().ok_or(ReplicaError::Busy)?;
                if of != config.memory {
                    return Err(ReplicaError::Memory.into());
                }
                memory
            }
            None => {
                Memory::check_fits(&config.memory)?;
                Memory::new(&config.memory)?
            }
        };
        let taps = self.taps.duplicate()?;
        let machine =
            Arc::new(Machine::build_around(memory, &self.hypervisor, config, taps, cpuid)?);
        // Only looked at from there: the engine alone decides how long a replica lives, and its
        // memory and sockets must be free before another is built. A closed channel means that
        // the VMM is on its way out.
        let _ = self.notices.send(Notice::ReplicaBuilt(Arc::downgrade(&machine)));
        Ok(ReplicaVm {
            machine,
            notices: self.notices.clone(),
            is_tracked: false,
            is_loadable: false,
        })
    }

    fn is_same(&self, one: &[u8], other: &[u8]) -> bool {
        match (self.configure(one), self.configure(other)) {
            (Ok(one), Ok(other)) => one == other,
            _ => false,
        }
    }

    fn reuse(&mut self, replica: &mut ReplicaVm) {
        // As in `build`.
        let _ = self.notices.send(Notice::ReplicaBuilt(Arc::downgrade(&replica.machine)));
    }
}

/// How often a take-over asks for what the devices need of the host, and how often it says so.
const ATTACH_PAUSE: Duration = Duration::from_millis(5);
const ATTACH_REMINDER: Duration = Duration::from_secs(10);

/// A machine that does not run yet.
pub struct ReplicaVm {
    machine: Arc<Machine>,
    notices: Sender<Notice>,
    /// Whether what is written is noted.
    is_tracked: bool,
    /// Whether this host's KVM took a state of this VM's vCPUs.
    is_loadable: bool,
}

impl ReplicaVm {
    /// What was written up to now is of no interest.
    fn forget_written(&self) -> Result<(), GuestError> {
        let mut written = PageSet::new(self.machine.memory().ram().pages());
        Ok(self.machine.harvest(&mut written)?)
    }
}

impl Replica for ReplicaVm {
    type State = Captured;

    fn ram(&self) -> Ram {
        self.machine.memory().ram().clone()
    }

    fn open_disks(&mut self) -> Result<Vec<Arc<dyn ReplicaDisk>>, GuestError> {
        let disks = self.machine.devices().writable_disks();
        for disk in &disks {
            // Images that replication writes are nobody else's: a primary on this host that uses
            // the same file, or another backup, holds its lock.
            disk.claim()?;
        }
        Ok(disks.into_iter().map(|disk| Arc::new(Receiving(disk)) as _).collect())
    }

    fn parse(&mut self, state: &[u8]) -> Result<Captured, GuestError> {
        let captured = codec::decode(state)?;
        check(&captured, self.machine.config())?;
        self.machine.check(&captured.machine)?;
        // Once, before the first acknowledgement: a primary whose vCPUs this host cannot run must hear of it
        // while it lives, and what the two hosts differ in does not change after that.
        if !self.is_loadable {
            self.machine.try_vcpus(&captured.machine.vcpus)?;
            self.is_loadable = true;
        }
        Ok(captured)
    }

    fn ready(&mut self) -> Result<(), GuestError> {
        Ok(self.machine.devices().try_attach()?)
    }

    fn track(&mut self) -> Result<(), GuestError> {
        self.machine.set_tracking(true)?;
        self.forget_written()?;
        self.is_tracked = true;
        Ok(())
    }

    fn start(self, state: Captured, held: Option<&ReplicateData>) -> Result<(), GuestError> {
        attach(&self.machine);
        if self.is_tracked
            && let Err(error) = self.forget_written()
        {
            // They are copied once more.
            tracing::warn!("pages that were received count as written here: {error}");
        }
        if let Some(options) = held {
            // The state has output: that is held as well.
            self.machine.devices().hold_output(holds(options));
        }
        self.machine.restore(state.machine)?;
        if !state.paused {
            self.machine.resume()?;
        }
        let is_held = held.is_some();
        match is_held {
            // Nobody may hear of this host before its old one has answered.
            true => self.machine.devices().announce_once_released(),
            false => self.machine.devices().announce(),
        }
        let machine = Arc::clone(&self.machine);
        let _ = self.notices.send(Notice::TookOver { machine, is_held });
        Ok(())
    }
}

/// Takes what the host lends, however long that takes: to give up would be to lose the VM. No event
/// tells when it can be had.
///
/// - A primary on this same host may be dying still: its kernel gives its taps and locks back only
///   after all of its memory.
/// - A primary that stands still holds the lock of an image that both hosts see. That is as it must
///   be: until its lock is gone it may still write, and nobody else can keep it from that. It lets go
///   when it wakes up and finds that it lost the VM, or when a person ends it.
fn attach(machine: &Machine) {
    let since = Instant::now();
    let mut told: Option<Instant> = None;
    while let Err(error) = machine.attach() {
        if told.is_none_or(|last| last.elapsed() >= ATTACH_REMINDER) {
            told = Some(Instant::now());
            let line = Failure::from_error(FailureKind::Internal, &error).chain.join(": ");
            let waited = since.elapsed().as_secs();
            tracing::warn!("the take-over waits, {waited} s by now: {line}");
        }
        std::thread::sleep(ATTACH_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use api::config::{ConsoleConfig, ConsoleOutputMode, NetConfig};

    use super::*;
    use crate::ha::codec::tests::{captured, console_function};

    /// What a machine can be built of, and no guest runs on.
    fn bootable(folder: &Path) -> VmConfig {
        let mut config = VmConfig::default();
        config.memory.size = 64 << 20;
        let kernel = folder.join("kernel");
        let head = [b"\x7fELF\x02\x01".as_slice(), &[0; 12], &[62, 0]].concat();
        std::fs::write(&kernel, head).unwrap();
        config.payload.kernel = Some(kernel);
        config
    }

    /// As a primary on this host describes a machine.
    fn described(config: &VmConfig, hypervisor: &Hypervisor) -> Vec<u8> {
        let cpuid = base::to_leaves(&hypervisor.supported_cpuid().unwrap());
        Description { config: config.clone(), cpuid }.encode().unwrap()
    }

    #[test]
    fn a_host_that_lacks_what_the_guest_may_use_cannot_build_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = bootable(dir.path());
        config.serial.mode = ConsoleOutputMode::Null;
        let hypervisor = Arc::new(Hypervisor::open().unwrap());
        let (notices, _notice_queue) = crossbeam_channel::unbounded();
        let mut builder = ReplicaVms::new(Arc::clone(&hypervisor), Overrides::default(), notices);
        let mut theirs = Description::decode(&described(&config, &hypervisor)).unwrap();
        // A bit of leaf 7.2 that no CPU has yet.
        theirs.cpuid.retain(|leaf| (leaf[0], leaf[1]) != (7, 2));
        theirs.cpuid.push([7, 2, 1, 0, 0, 0, 1 << 31]);
        let error = builder.build(&theirs.encode().unwrap()).err().unwrap();
        let why = replication::chain(error.as_ref());
        assert!(why.contains("bit 31 of EDX in CPUID leaf 0x7.2"), "{why}");
        theirs.cpuid.pop();
        // What this host has and the guest was not told of stays hidden from it.
        let features = theirs.cpuid.iter_mut().find(|leaf| leaf[0] == 1).unwrap();
        features[5] &= !(1 << 30);
        let built = builder.build(&theirs.encode().unwrap()).unwrap();
        let told = base::to_leaves(built.machine.cpuid());
        assert_eq!(told, theirs.cpuid);
        let none = Description { cpuid: vec![], ..theirs }.encode().unwrap();
        let why = replication::chain(builder.build(&none).err().unwrap().as_ref());
        assert!(why.contains("no CPUID"), "{why}");
    }

    /// Needs /dev/kvm, as all that builds a machine does.
    #[test]
    fn a_replica_that_was_let_go_leaves_its_place_to_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = bootable(dir.path());
        config.serial = ConsoleConfig {
            mode: ConsoleOutputMode::Socket,
            socket: Some(dir.path().join("serial")),
            ..VmConfig::default().serial
        };
        config.console = ConsoleConfig::on_socket(dir.path().join("console"));
        let hypervisor = Arc::new(Hypervisor::open().unwrap());
        let description = described(&config, &hypervisor);
        // Nobody reads the notices: what they carry lives for as long as this test.
        let (notices, _notice_queue) = crossbeam_channel::unbounded();
        let mut builder = ReplicaVms::new(hypervisor, Overrides::default(), notices);
        let first = builder.build(&description).unwrap();
        assert!(builder.build(&description).is_err(), "the socket is in use");
        drop(first);
        drop(builder.build(&description).unwrap());
    }

    /// The card of a VM whose tap came as descriptors, and which its old host is to be the backup of: they
    /// are for each machine that is built there, and what the new host says of its own tap is not asked.
    #[test]
    fn a_card_has_the_descriptors_that_it_had_here_and_never_those_of_another_process() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = bootable(dir.path());
        config.console.mode = ConsoleOutputMode::Null;
        config.serial.mode = ConsoleOutputMode::Null;
        let card = NetConfig { fds: Some(vec![-1]), ..NetConfig::default() };
        config.net = Some(vec![card]);
        crate::device_manager::virtio::complete(&mut config).unwrap();
        let id = config.net.as_ref().unwrap()[0].id.clone().unwrap();
        let mut theirs = config.clone();
        let card = &mut theirs.net.as_mut().unwrap()[0];
        (card.tap, card.fds) = (Some("tap9".to_owned()), None);
        let hypervisor = Arc::new(Hypervisor::open().unwrap());
        let [own, theirs] = [&config, &theirs].map(|config| described(config, &hypervisor));
        let (notices, _notice_queue) = crossbeam_channel::unbounded();
        let builder = || {
            let overrides = Overrides::of(&config);
            ReplicaVms::new(Arc::clone(&hypervisor), overrides, notices.clone())
        };
        let error = builder().build(&own).err().unwrap();
        assert!(replication::chain(error.as_ref()).contains("given to another process"), "{error}");
        let mut taps = TapDescriptors::default();
        taps.insert(id, vec![std::fs::File::open("/dev/null").unwrap().into()]);
        let mut builder = builder().with(taps);
        assert!(builder.is_same(&own, &theirs));
        for description in [&own, &theirs] {
            drop(builder.build(description).unwrap());
        }
    }

    #[test]
    fn a_host_without_the_vm_s_payload_cannot_build_it() {
        let dir = tempfile::tempdir().unwrap();
        let config = bootable(dir.path());
        check_host(&config).unwrap();
        std::fs::remove_file(config.payload.kernel.as_ref().unwrap()).unwrap();
        assert!(check_host(&config).is_err());
    }

    #[test]
    fn a_state_without_the_vm_s_ports_is_refused_before_its_epoch_is_acknowledged() {
        use ConsoleOutputMode::{Null, Off};
        let mut config = VmConfig::default();
        // No vCPU state is needed where none is expected.
        config.cpus.boot_vcpus = 0;
        for (mode, serial, fits) in
            [(Null, true, true), (Off, false, true), (Null, false, false), (Off, true, false)]
        {
            (config.serial.mode, config.console.mode) = (mode, Off);
            let checked = check(&captured(serial), &config);
            assert_eq!(checked.is_ok(), fits, "{mode:?} {serial} {checked:?}");
            if let Err(error) = checked {
                assert!(error.to_string().contains("serial port"), "{error}");
            }
        }
        config.serial.mode = Off;
        for (mode, console, fits) in
            [(Null, true, true), (Off, false, true), (Null, false, false), (Off, true, false)]
        {
            config.console.mode = mode;
            let mut captured = captured(false);
            captured.machine.devices.pci.functions.extend(console.then(console_function));
            let checked = check(&captured, &config);
            assert_eq!(checked.is_ok(), fits, "{mode:?} {console} {checked:?}");
            if let Err(error) = checked {
                assert!(error.to_string().contains("console"), "{error}");
            }
        }
    }
}
