//! One virtual machine: memory, KVM VM, devices, vCPU threads, and who may stop them.
//!
//! Four reasons stop the vCPUs, independently of each other: a person (`vm.pause`), the want of a
//! backup (degrade=pause), the replication engine (an epoch's pause), and whoever changes the machine as a whole (a reset, a
//! snapshot, a restore). The vCPUs run when nobody holds them:
//!
//! ```text
//!            pause/resume (user)      quiesce/release (epoch)     exclusive (reset, restore)
//! Life {     user_paused: bool,       quiesced: bool,             exclusive: bool }
//!            may overlap with both    excludes exclusive          excludes quiesced
//! ```
//!
//! `alone_paused` is as `user_paused`: a person's resume ends both, the next backup ends it alone.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

use api::config::{CpusConfig, VmConfig};
use crossbeam_channel::{Receiver, unbounded};
use devices::acpi::pm::PowerEvent;
use hypervisor::dirty::RING_ENTRIES;
use hypervisor::{
    CpuId, Hypervisor, StateError, Topology, Tracking, Vcpu, VcpuError, VcpuState, Vm, VmError,
    VmState,
};
use replication::checking::reach;
use replication::ids::PageIndex;
use replication::ram::PageSet;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::boot::{BootError, Entry, Payload};
use crate::cpu::{CpuError, MachineEvent, Vcpus};
use crate::device_manager::taps::TapDescriptors;
use crate::device_manager::virtio::complete;
use crate::device_manager::{DeviceError, Devices, DevicesState};
use crate::memory::{Memory, MemoryError};
use crate::tracking;

/// How long the guest stands for replication without being told. An epoch's pause is far shorter, and the guest's
/// watchdogs are far more patient.
const TOLD_AFTER: Duration = Duration::from_secs(1);

/// The machine could not be built, changed or stopped.
#[derive(Debug, Error)]
pub enum MachineError {
    #[error("Cannot set up guest memory")]
    Memory(#[from] MemoryError),
    #[error("KVM refused the machine")]
    Vm(#[from] VmError),
    #[error("KVM refused vCPU {id}")]
    Vcpu { id: u32, source: VcpuError },
    #[error("The vCPU threads failed")]
    Cpu(#[from] CpuError),
    #[error("Cannot set up the devices")]
    Device(#[from] DeviceError),
    #[error("Cannot load the payload")]
    Boot(#[from] BootError),
    #[error(
        "The topology does not fit {asked} vCPUs with consecutive APIC ids: all but its \
             outermost factor must be powers of two"
    )]
    Topology { asked: u32 },
    #[error("The state of vCPU {id} is not usable")]
    VcpuState { id: usize, source: StateError },
    #[error("The state of the VM is not usable")]
    VmState(#[source] StateError),
    #[error("{asked} vCPUs are more than the {max} that KVM allows here")]
    TooManyVcpus { asked: u32, max: u32 },
    #[error("Cannot choose addresses for the devices")]
    Random(#[source] std::io::Error),
    #[error("The machine was destroyed")]
    Destroyed,
}

/// All machine state but memory, as snapshots and epochs carry it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MachineState {
    pub vcpus: Vec<VcpuState>,
    pub vm: VmState,
    pub devices: DevicesState,
}

struct PowerOn {
    vcpus: Vec<VcpuState>,
    vm: VmState,
}

impl MachineState {
    /// Whether a machine could load this; nothing of it is trusted before.
    pub fn validate(&self) -> Result<(), MachineError> {
        for (id, vcpu) in self.vcpus.iter().enumerate() {
            vcpu.validate().map_err(|source| MachineError::VcpuState { id, source })?;
        }
        self.vm.validate().map_err(MachineError::VmState)?;
        Ok(self.devices.validate()?)
    }
}

#[derive(Debug, Default)]
struct Life {
    user_paused: bool,
    /// Without a backup, where it must not run without one.
    alone_paused: bool,
    quiesced: bool,
    /// Since when, or since it was held for the pause that followed.
    stands_since: Option<Instant>,
    exclusive: bool,
    /// A pause has ended of which the guest was not told, since an epoch's went on.
    untold: bool,
    /// The vCPUs have a state to run from.
    started: bool,
    destroyed: bool,
}

impl Life {
    /// Replication stops the guest, or goes on to do so.
    fn stand(&mut self, now: Instant) {
        self.quiesced = true;
        self.stands_since.get_or_insert(now);
    }

    /// It lets it go. What is longer than an epoch's pause is for the guest to know.
    fn let_go(&mut self, now: Instant) {
        self.quiesced = false;
        let since = self.stands_since.take();
        let is_long = since.is_some_and(|since| now.duration_since(since) >= TOLD_AFTER);
        self.untold |= is_long && self.started;
    }

    fn is_paused(&self) -> bool {
        self.user_paused || self.alone_paused
    }
}

/// A machine whose vCPU threads exist.
pub struct Machine {
    // Dropped in this order: threads that touch memory and devices end before those go.
    vcpus: Vcpus,
    devices: Devices,
    vm: Arc<Vm>,
    memory: Memory,
    config: VmConfig,
    /// What those of the vCPUs were made from.
    cpuid: CpuId,
    /// What the guest did to the machine as a whole. Of this machine alone, so that nothing of an
    /// old one reaches a new one.
    events: Receiver<MachineEvent>,
    /// What a reset goes back to.
    power_on: PowerOn,
    life: Mutex<Life>,
    changed: Condvar,
    presence: Arc<()>,
}

impl Machine {
    /// Builds the machine with parked vCPUs that have nothing to run yet.
    pub fn build(
        hypervisor: &Arc<Hypervisor>,
        config: VmConfig,
        taps: TapDescriptors,
    ) -> Result<Self, MachineError> {
        let memory = Memory::new(&config.memory)?;
        let cpuid = hypervisor.supported_cpuid()?;
        Self::build_around(memory, hypervisor, config, taps, cpuid)
    }

    /// As [`Machine::build`], around memory that was another machine's, which is gone. It is what the
    /// configuration asks for, and stays as it is. `cpuid`: what the vCPUs' are made from.
    pub fn build_around(
        memory: Memory,
        hypervisor: &Arc<Hypervisor>,
        mut config: VmConfig,
        taps: TapDescriptors,
        cpuid: CpuId,
    ) -> Result<Self, MachineError> {
        complete(&mut config).map_err(MachineError::Random)?;
        let asked = config.cpus.boot_vcpus;
        let max = hypervisor.capabilities().max_vcpus;
        if asked > max {
            return Err(MachineError::TooManyVcpus { asked, max });
        }
        let mut vm = hypervisor.create_vm()?;
        tracking::set(&vm, &memory, false)?;
        if tracking::choose(hypervisor, &vm, &memory)? == Tracking::Ring {
            vm.use_rings(RING_ENTRIES)?;
        }
        vm.create_irqchip()?;
        let vm = Arc::new(vm);
        // Bounded by its senders: one power event between two resets, one of each vCPU, and what the
        // devices' observer lets through.
        let (sender, events) = unbounded();
        let devices = Devices::new(&config, &vm, &memory, taps, &sender)?;
        settle_images(&mut config);
        let topology = topology(&config.cpus)?;
        let mut vcpus = Vec::new();
        for id in 0..asked {
            let mut vcpu = vm.create_vcpu(id)?;
            vcpu.configure_cpuid(&cpuid, topology)
                .and_then(|()| vcpu.setup_lapic_lints())
                .map_err(|source| MachineError::Vcpu { id, source })?;
            vcpus.push(vcpu);
        }
        let vcpus = Vcpus::start(vcpus, devices.buses(), &sender, &devices.on_power())?;
        let power_on = PowerOn { vcpus: vcpus.park_and_save()?, vm: vm.save_state()? };
        Ok(Self {
            vcpus,
            devices,
            vm,
            memory,
            config,
            cpuid,
            events,
            power_on,
            life: Mutex::new(Life::default()),
            changed: Condvar::new(),
            presence: Arc::default(),
        })
    }

    /// Can be upgraded until all that the machine had of its host is free.
    #[must_use]
    pub fn presence(&self) -> Weak<()> {
        Arc::downgrade(&self.presence)
    }

    #[must_use]
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// What a host that is to run this machine must have.
    #[must_use]
    pub fn cpuid(&self) -> &CpuId {
        &self.cpuid
    }

    /// What the guest did to the machine as a whole.
    #[must_use]
    pub fn events(&self) -> &Receiver<MachineEvent> {
        &self.events
    }

    #[must_use]
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    #[must_use]
    pub fn devices(&self) -> &Devices {
        &self.devices
    }

    fn life(&self) -> MutexGuard<'_, Life> {
        self.life.lock().expect("no holder of the lock panics")
    }

    /// Loads the payload and lets the guest run.
    pub fn boot(&self) -> Result<(), MachineError> {
        self.exclusively(|| {
            self.devices.attach()?;
            self.load_payload(Payload::open(&self.config.payload)?)?;
            self.life().started = true;
            Ok(())
        })
    }

    /// Puts the machine back to power-on, in place: memory stays the same mapping, so whoever
    /// replicates it sees a machine that rewrote all of its memory.
    ///
    /// # Errors
    /// A payload that is not there any more leaves the machine as it is. After any other error it
    /// has nothing to run.
    pub fn reset(&self) -> Result<(), MachineError> {
        self.exclusively(|| {
            let payload = Payload::open(&self.config.payload)?;
            // Should the rest fail, registers must not run over memory that is gone.
            self.life().started = false;
            self.memory.reset()?;
            reach("cleared");
            self.devices.reset()?;
            self.load_payload(payload)?;
            self.life().started = true;
            Ok(())
        })
    }

    fn load_payload(&self, payload: Payload) -> Result<(), MachineError> {
        let rsdp = self.devices.write_acpi_tables(&self.config, self.memory.mapping())?;
        let entry = payload.load(self.memory.mapping(), rsdp)?;
        self.vm.restore_state(&self.power_on.vm)?;
        self.vcpus.load(self.power_on.vcpus.clone())?;
        self.vcpus.each(true, move |id, vcpu| if id == 0 { enter(vcpu, entry) } else { Ok(()) })?;
        Ok(())
    }

    /// Whether the guest has something to run, paused or not.
    #[must_use]
    pub fn can_run(&self) -> bool {
        let life = self.life();
        life.started && !life.destroyed
    }

    /// Stops the guest for a person.
    pub fn pause(&self) -> Result<(), MachineError> {
        let mut life = self.life();
        self.alive(&life)?;
        life.user_paused = true;
        // Held across the park: an epoch's release must not slip in between.
        self.vcpus.park()?;
        Ok(())
    }

    /// Ends a person's pause.
    pub fn resume(&self) -> Result<(), MachineError> {
        let mut life = self.life();
        self.alive(&life)?;
        life.untold |= life.is_paused() && life.started;
        (life.user_paused, life.alone_paused) = (false, false);
        self.run_if_free(&mut life)
    }

    /// Stops the guest for want of a backup. A person's resume ends that, too.
    pub fn pause_alone(&self) -> Result<(), MachineError> {
        let mut life = self.life();
        self.alive(&life)?;
        life.alone_paused = true;
        // As in `pause`.
        self.vcpus.park()?;
        Ok(())
    }

    /// There is a backup again. A person's pause goes on.
    pub fn end_pause_alone(&self) -> Result<(), MachineError> {
        let mut life = self.life();
        self.alive(&life)?;
        if !std::mem::take(&mut life.alone_paused) || life.user_paused {
            return Ok(());
        }
        life.untold |= life.started;
        self.run_if_free(&mut life)
    }

    /// Tells the guest that it stood still, so that its watchdogs do not take a long pause for a
    /// lockup. Not for an epoch's pause, which no watchdog sees. Only while it stands still and no epoch
    /// is in its pause.
    fn tell_pause(&self) -> Result<(), MachineError> {
        Ok(self.vcpus.each(false, |_, vcpu| {
            vcpu.signal_guest_paused();
            Ok(())
        })?)
    }

    /// Whether the machine is paused, by a person or for want of a backup.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.life().is_paused()
    }

    /// Whether a person paused the machine.
    #[must_use]
    pub fn is_user_paused(&self) -> bool {
        self.life().user_paused
    }

    /// Stops the guest for an epoch. Its memory is final when this returns; the vCPUs are read
    /// meanwhile, each on its own thread, until [`Machine::capture`].
    pub fn quiesce(&self) -> Result<(), MachineError> {
        self.stand(|vcpus| vcpus.stop_and_save())
    }

    /// Stops the guest for a while: nothing is read. A [`Machine::quiesce`] may follow, or a
    /// [`Machine::release`].
    pub fn hold(&self) -> Result<(), MachineError> {
        self.stand(Vcpus::park)
    }

    fn stand(&self, stop: impl FnOnce(&Vcpus) -> Result<(), CpuError>) -> Result<(), MachineError> {
        let life = self.life();
        let busy = |life: &mut Life| life.exclusive && !life.destroyed;
        let mut life = self.changed.wait_while(life, busy).expect("no holder panics");
        self.alive(&life)?;
        life.stand(Instant::now());
        self.devices.park();
        if let Err(error) = stop(&self.vcpus) {
            life.let_go(Instant::now());
            self.devices.unpark();
            drop(life);
            self.changed.notify_all();
            return Err(error.into());
        }
        Ok(())
    }

    /// Ends an epoch's pause.
    pub fn release(&self) -> Result<(), MachineError> {
        let mut life = self.life();
        life.let_go(Instant::now());
        self.devices.unpark();
        let result = self.run_if_free(&mut life);
        drop(life);
        self.changed.notify_all();
        result
    }

    /// The state at the last quiesce. Only between quiesce and release.
    pub fn capture(&self) -> Result<MachineState, MachineError> {
        // Before the vCPUs are waited for, which may still be saving.
        let (vm, devices) = (self.vm.save_state()?, self.devices.save());
        Ok(MachineState { vcpus: self.vcpus.saved()?, vm, devices })
    }

    /// The state of a machine that a person paused; `with` runs before anybody may change it.
    pub fn with_state<T>(&self, with: impl FnOnce(&MachineState) -> T) -> Result<T, MachineError> {
        self.exclusively(|| {
            let vcpus = self.vcpus.park_and_save()?;
            let vm = self.vm.save_state()?;
            Ok(with(&MachineState { vcpus, vm, devices: self.devices.save() }))
        })
    }

    /// Whether [`Machine::restore`] would load this, as far as that can be said before.
    pub fn check(&self, state: &MachineState) -> Result<(), MachineError> {
        state.validate()?;
        Ok(self.devices.check(&state.devices)?)
    }

    /// Loads vCPU states and then what the machine powers on with again: whether this host's KVM takes them,
    /// whatever it differs in from the one that saved them. Of a machine that has not run; its memory is not
    /// written.
    ///
    /// # Errors
    /// What a vCPU refuses.
    pub fn try_vcpus(&self, states: &[VcpuState]) -> Result<(), MachineError> {
        let mut tried = states.to_vec();
        tried.iter_mut().for_each(VcpuState::forget_paravirtual);
        self.exclusively(|| {
            let result = self.vcpus.load(tried);
            self.vcpus.load(self.power_on.vcpus.clone())?;
            Ok(result?)
        })
    }

    /// Takes what the host lends the devices; [`Machine::restore`] does so by itself. A second call
    /// takes what the first could not get.
    pub fn attach(&self) -> Result<(), MachineError> {
        Ok(self.devices.attach()?)
    }

    /// Loads a state into a machine that did not run yet; it stays paused. From here on this host
    /// owns what the devices use.
    pub fn restore(&self, state: MachineState) -> Result<(), MachineError> {
        self.life().user_paused = true;
        let wish = state.devices.platform.wish;
        self.exclusively(|| {
            self.devices.attach()?;
            // Before the vCPUs: their kvmclock MSRs refer to the VM's clock.
            self.vm.restore_state(&state.vm)?;
            if let Some(first) = state.vcpus.first().cloned() {
                self.vcpus.each(false, move |id, vcpu| match id {
                    0 => vcpu.part_tsc(&first),
                    _ => Ok(()),
                })?;
            }
            self.vcpus.load(state.vcpus)?;
            // Last: devices raise again what may have been under way to an interrupt controller,
            // and loading those would undo it.
            self.devices.restore(&state.devices)?;
            self.devices.nudge();
            self.tell_pause()?;
            self.life().started = true;
            Ok(())
        })?;
        // A vCPU that asked for it by a triple fault must not run as it is.
        if wish == Some(PowerEvent::Reset) { self.reset() } else { Ok(()) }
    }

    /// Ends the guest for good: the threads stay parked and nothing more leaves the machine.
    pub fn destroy(&self) {
        let mut life = self.life();
        life.destroyed = true;
        if let Err(error) = self.vcpus.park() {
            tracing::error!(%error, "a vCPU could not be parked");
        }
        drop(life);
        self.devices.silence();
        self.changed.notify_all();
    }

    /// Where KVM notes the pages that the guest writes.
    #[must_use]
    pub fn tracking(&self) -> Tracking {
        self.vm.dirty_log().tracking()
    }

    /// Turns KVM's dirty log on or off. With it on, all pages count as dirty at first, also where it
    /// was on before: to KVM that is no change, and its log names what was written only.
    pub fn set_tracking(&self, on: bool) -> Result<(), MachineError> {
        tracking::set(&self.vm, &self.memory, on)?;
        if on {
            self.memory.mark_all_written();
        }
        Ok(())
    }

    /// Adds the pages written since the last harvest, by the guest or by the VMM.
    pub fn harvest(&self, dirty: &mut PageSet) -> Result<(), MachineError> {
        let regions = self.memory.ram().regions();
        self.vm.dirty_log().harvest(&mut |written| {
            // Slots have the numbers of the regions.
            let region = usize::try_from(written.slot).ok().and_then(|slot| regions.get(slot));
            if let Some(region) = region {
                dirty.insert_word(PageIndex(region.first.0 + written.first_page), written.word);
            }
        })?;
        self.memory.harvest_own_writes(dirty);
        Ok(())
    }

    /// How many pages were written since the last harvest, the tracking left as it is; `None` where
    /// that cannot be had.
    pub fn written_pages(&self) -> Result<Option<u64>, MachineError> {
        let guests = self.vm.dirty_log().written()?;
        Ok(guests.map(|pages| pages + self.memory.own_writes()))
    }

    fn alive(&self, life: &Life) -> Result<(), MachineError> {
        if life.destroyed { Err(MachineError::Destroyed) } else { Ok(()) }
    }

    fn run_if_free(&self, life: &mut Life) -> Result<(), MachineError> {
        let held = life.is_paused() || life.quiesced || life.exclusive || life.destroyed;
        if life.started && !held {
            if std::mem::take(&mut life.untold) {
                self.tell_pause()?;
            }
            self.vcpus.release();
        }
        Ok(())
    }

    /// Runs `work` with the vCPUs parked and no epoch in its pause.
    fn exclusively<T>(
        &self,
        work: impl FnOnce() -> Result<T, MachineError>,
    ) -> Result<T, MachineError> {
        let life = self.life();
        let busy = |life: &mut Life| (life.quiesced || life.exclusive) && !life.destroyed;
        let mut life = self.changed.wait_while(life, busy).expect("no holder panics");
        self.alive(&life)?;
        life.exclusive = true;
        self.devices.park();
        let parked = self.vcpus.park();
        drop(life);
        let result = parked.map_err(MachineError::from).and_then(|()| work());
        let mut life = self.life();
        life.exclusive = false;
        self.devices.unpark();
        let runs = self.run_if_free(&mut life);
        drop(life);
        self.changed.notify_all();
        result.and_then(|done| runs.map(|()| done))
    }
}

/// Images that were looked at once are raw from then on, here, in snapshots and on a backup: their first bytes
/// are the guest's, who may write another format's there.
fn settle_images(config: &mut VmConfig) {
    for disk in config.disks.iter_mut().flatten() {
        disk.image_type.get_or_insert_with(|| "Raw".to_owned());
    }
}

/// What the guest sees as sockets, dies, cores and threads. APIC ids are consecutive: the ACPI
/// tables say so.
fn topology(cpus: &CpusConfig) -> Result<Topology, MachineError> {
    let asked = cpus.boot_vcpus;
    let flat = Topology::flat(u16::try_from(asked).unwrap_or(u16::MAX));
    let Some(wanted) = cpus.topology else { return Ok(flat) };
    let topology = Topology {
        threads_per_core: wanted.threads_per_core,
        cores_per_die: wanted.cores_per_die,
        dies_per_package: wanted.dies_per_package,
        packages: wanted.packages,
    };
    if topology.vcpus() < asked.into() || (0..asked).any(|id| topology.apic_id(id) != id) {
        return Err(MachineError::Topology { asked });
    }
    Ok(topology)
}

fn enter(vcpu: &mut Vcpu, entry: Entry) -> Result<(), VcpuError> {
    match entry {
        Entry::Pvh { entry, start_info } => vcpu.setup_pvh(entry, start_info),
        Entry::Linux64 { entry, boot_params, gdt, page_tables } => {
            vcpu.setup_linux64(entry, boot_params, gdt, page_tables)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_told_of_what_its_watchdogs_may_notice() {
        let now = Instant::now();
        let after = |passed_ms| now + Duration::from_millis(passed_ms);
        let mut life = Life { started: true, ..Life::default() };
        life.stand(now);
        life.let_go(after(900));
        assert!(!life.untold, "an epoch's pause");
        // Held for want of room, and sealed where it stood.
        life.stand(now);
        life.stand(after(900));
        life.let_go(after(1_100));
        assert!(life.untold && !life.quiesced);
        life.untold = false;
        life.stand(after(2_000));
        life.let_go(after(2_001));
        assert!(!life.untold, "of the pause before");
        let mut waits = Life::default();
        waits.stand(now);
        waits.let_go(after(5_000));
        assert!(!waits.untold, "it has not run yet");
    }
}
