//! The VM's life: create, boot, pause, resume, reboot, shutdown, delete, snapshot, restore.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use api::config::{DiskConfig, NetConfig, RestoreConfig, SnapshotConfig, VmConfig};
use crossbeam_channel::Sender;
use devices::acpi::pm::PowerEvent;
use replication::HostIdentity;
use replication::checking::{is_broken, reach};
use serde_json::json;

use super::ending::After;
use super::protection::Protection;
use super::{Answer, Controller, Ending, Notice};
use crate::cpu::MachineEvent;
use crate::device_manager::taps::{self, TapDescriptors};
use crate::device_manager::virtio::complete;
use crate::machine::{Machine, MachineError};
use crate::request::{Failure, FailureKind, Reply};
use crate::snapshot::{self, SnapshotError};

pub(super) fn no_vm() -> Failure {
    Failure::new(FailureKind::NotFound, "No VM has been created")
}

fn wrong_state(message: &str) -> Failure {
    Failure::new(FailureKind::Internal, message)
}

pub(super) fn snapshot_under_way() -> Failure {
    wrong_state("A snapshot is being written: try again when it is done")
}

fn not_running() -> Failure {
    wrong_state("The VM is not running")
}

pub(super) fn has_gone() -> Failure {
    Failure::new(FailureKind::Conflict, "The VM's backup has it: it goes on there")
}

/// What a machine that is not gone yet has of the host can be had again once it is.
fn still_leaving(failure: Failure) -> Failure {
    let what = "The machine on which the VM ran before has not been let go of yet: try again";
    Failure { chain: [vec![what.to_owned()], failure.chain].concat(), ..failure }
}

/// A switch-over began meanwhile.
fn done_here(mut failure: Failure) -> Failure {
    failure
        .chain
        .push("It was done here all the same, and the VM may go on so where it goes".into());
    failure
}

fn internal(error: &dyn std::error::Error) -> Failure {
    Failure::from_error(FailureKind::Internal, error)
}

/// A snapshot is being written for as long as this is there, whatever becomes of its thread.
struct UnderWay(Arc<AtomicBool>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// Everything that can be said against a configuration without building it.
pub fn check_config(config: &VmConfig) -> Result<(), Failure> {
    let mut complaints = config.validate();
    complaints.extend(config.unsupported());
    Failure::from_complaints("The VM configuration is not usable", &complaints)
}

impl Controller {
    /// `fds` are those of the cards that say how many they have, in their order.
    pub(super) fn create(&mut self, config: VmConfig, fds: Vec<OwnedFd>) -> Answer {
        self.room_for_a_vm()?;
        check_config(&config)?;
        let mut config = config;
        complete(&mut config).map_err(|error| internal(&error))?;
        let mut kept = TapDescriptors::default();
        let mut fds = fds.into_iter();
        for card in config.net.iter().flatten().filter(|card| taps::count(card) > 0) {
            let own: Vec<_> = fds.by_ref().take(taps::count(card)).collect();
            if own.len() == taps::count(card) {
                kept.insert(card.id.clone().unwrap_or_default(), own);
            }
        }
        self.begin(config, kept);
        Ok(Reply::Empty)
    }

    /// Adds a device to a VM that has not been booted.
    pub(super) fn add<T>(
        &mut self,
        list: impl Fn(&mut VmConfig) -> &mut Option<Vec<T>>,
        device: T,
    ) -> Result<(), Failure> {
        let mut config = self.config.clone().ok_or_else(|| self.no_vm())?;
        if self.machine.is_some() {
            return Err(wrong_state("Devices are added before the VM is booted: no hot-plug yet"));
        }
        list(&mut config).get_or_insert_default().push(device);
        check_config(&config)?;
        complete(&mut config).map_err(|error| internal(&error))?;
        self.config = Some(config);
        Ok(())
    }

    /// Adds a disk to a VM that has not been booted.
    pub(super) fn add_disk(&mut self, disk: DiskConfig) -> Answer {
        self.add(|config| &mut config.disks, disk).map(|()| Reply::Empty)
    }

    /// Adds a card, whose tap may have come as descriptors, to a VM that has not been booted.
    pub(super) fn add_net(&mut self, mut card: NetConfig, fds: Vec<OwnedFd>) -> Answer {
        if fds.is_empty() && taps::count(&card) > 0 {
            let what = "The card's fds say that descriptors come with the request, and none came";
            return Err(Failure::new(FailureKind::BadRequest, what));
        }
        if !fds.is_empty() {
            taps::mark(&mut card, fds.len());
        }
        self.add(|config| &mut config.net, card)?;
        if !fds.is_empty()
            && let Some(id) = self.last_card()
        {
            self.taps.insert(id, fds);
        }
        Ok(Reply::Empty)
    }

    fn last_card(&self) -> Option<String> {
        self.config.as_ref()?.net.as_ref()?.last()?.id.clone()
    }

    /// This VMM's VM is another one than before: it must not pass for that in an arbiter's record.
    fn begin(&mut self, config: VmConfig, taps: TapDescriptors) {
        self.config = Some(config);
        self.taps = taps;
        self.identity = HostIdentity { host: self.identity.host, ..HostIdentity::random() };
    }

    /// A VMM has one VM at most, and a backup's is to be its primary's.
    fn room_for_a_vm(&self) -> Result<(), Failure> {
        if self.config.is_some() || self.machine.is_some() {
            return Err(wrong_state("A VM has already been created"));
        }
        if matches!(self.protection, Protection::Backup { .. }) && !self.protection.is_over() {
            return Err(wrong_state("This VMM is a backup: vm.stop-replication ends that"));
        }
        Ok(())
    }

    pub(super) fn boot(&mut self) -> Answer {
        let config = self.config.clone().ok_or_else(|| self.no_vm())?;
        if self.machine.is_some() && !self.guest_is_down {
            return Err(wrong_state("The VM is already booted"));
        }
        if let Some(before) = self.machine.take() {
            self.let_go(Some(before), None);
        }
        self.guest_is_down = false;
        // What a reset of the old machine comes to is none of the new one's.
        self.resetting = false;
        let is_free = self.leaving.is_over();
        self.monitor.emit("vm", "booting", None);
        let taps = self.taps.duplicate().map_err(|error| internal(&error))?;
        let machine = Machine::build(&self.hypervisor, config, taps)
            .and_then(|machine| machine.boot().map(|()| machine))
            .map_err(|error| match boot_failure_kind(&error) {
                FailureKind::Internal if !is_free => still_leaving(internal(&error)),
                kind => Failure::from_error(kind, &error),
            })?;
        // It says what the devices are by now: what the guest writes does not change that.
        self.config = Some(machine.config().clone());
        self.machine = Some(Arc::new(machine));
        self.monitor.emit("vm", "booted", None);
        Ok(Reply::Empty)
    }

    /// Why there is nothing to do something with.
    fn no_vm(&self) -> Failure {
        let is_backup = matches!(self.protection, Protection::Backup { .. });
        if is_backup && !self.protection.is_over() {
            let what = "This VMM is a backup, and its VM runs elsewhere: vm.failover takes it over, \
                        vm.stop-replication ends that";
            return Failure::new(FailureKind::Conflict, what);
        }
        no_vm()
    }

    /// The VM that runs or is paused.
    pub(super) fn running(&self) -> Result<&Arc<Machine>, Failure> {
        match &self.machine {
            Some(machine) if !self.guest_is_down => Ok(machine),
            _ if self.config.is_some() => Err(not_running()),
            _ => Err(self.no_vm()),
        }
    }

    pub(super) fn pause(&mut self) -> Answer {
        let machine = Arc::clone(self.running()?);
        if machine.is_paused() {
            return Err(wrong_state("The VM is already paused"));
        }
        self.monitor.emit("vm", "pausing", None);
        machine.pause().map_err(|error| internal(&error))?;
        self.stays_here().map_err(done_here)?;
        self.monitor.emit("vm", "paused", None);
        Ok(Reply::Empty)
    }

    pub(super) fn resume(&mut self) -> Answer {
        let machine = Arc::clone(self.running()?);
        if !machine.is_paused() {
            return Err(wrong_state("The VM is not paused"));
        }
        self.monitor.emit("vm", "resuming", None);
        machine.resume().map_err(|error| internal(&error))?;
        self.stays_here().map_err(done_here)?;
        self.monitor.emit("vm", "resumed", None);
        Ok(Reply::Empty)
    }

    /// A client's reset also ends the pause that it finds, and none that begins while it waits.
    pub(super) fn reboot(&mut self, reply: Sender<Answer>) {
        let machine = match self.running() {
            Ok(_) if self.resetting => Err(wrong_state("The VM is being reset already")),
            Ok(machine) => Ok(Arc::clone(machine)),
            Err(failure) => Err(failure),
        };
        match machine {
            Ok(machine) => self.reset(&machine, machine.is_paused(), Some(reply)),
            Err(failure) => drop(reply.send(Err(failure))),
        }
    }

    /// Beside the loop: it may have to wait for an epoch to be acknowledged.
    fn reset(&mut self, machine: &Arc<Machine>, resume: bool, reply: Option<Sender<Answer>>) {
        self.monitor.emit("vm", "rebooting", None);
        let notices = self.notices.clone();
        // While this waits its VM may be handed over, and what a machine has of its host must be free then.
        let machine = Arc::downgrade(machine);
        let work = move |reply: Option<Sender<Answer>>| {
            reach("reset");
            let result = match machine.upgrade() {
                Some(machine) => {
                    machine.reset().and_then(|()| if resume { machine.resume() } else { Ok(()) })
                }
                None => Err(MachineError::Destroyed),
            };
            // A closed channel means that the VMM is on its way out.
            let _ = notices.send(Notice::Reset { machine, result, reply });
        };
        self.resetting = true;
        let started = std::thread::Builder::new().name("reset".into());
        if let Err(error) = started.spawn(move || work(reply)) {
            self.resetting = false;
            self.ending = Some(Ending::Failed(format!("Cannot start a thread: {error}")));
        }
    }

    pub(super) fn was_reset(
        &mut self,
        machine: &Weak<Machine>,
        result: Result<(), MachineError>,
        reply: Option<Sender<Answer>>,
    ) {
        let ours =
            self.machine.clone().filter(|ours| std::ptr::eq(Arc::as_ptr(ours), machine.as_ptr()));
        let Some(machine) = ours else {
            // Of a VM that was ended meanwhile: nothing of it concerns one that came after.
            if let Some(reply) = reply {
                let _ = reply.send(Err(not_running()));
            }
            return;
        };
        self.resetting = false;
        if self.winding_down {
            // It ends as it was asked to, whatever became of its reset.
            if let Some(reply) = reply {
                let _ = reply.send(Err(not_running()));
            }
            return;
        }
        match (result, reply) {
            (Ok(()), reply) => {
                self.monitor.emit("vm", "rebooted", None);
                if let Some(reply) = reply {
                    let _ = reply.send(Ok(Reply::Empty));
                }
                // The guest may have asked again before this was heard.
                self.look_at_wish();
            }
            // Its backup has it, and whoever says so is on the way here; a guest's wish is in the state that
            // goes on there.
            (Err(MachineError::Destroyed), reply) => {
                tracing::info!("the guest is not reset: its backup has the VM");
                if let Some(reply) = reply {
                    let _ = reply.send(Err(has_gone()));
                }
            }
            (Err(error), Some(reply)) if machine.can_run() => {
                let _ = reply.send(Err(internal(&error)));
            }
            (Err(error), Some(reply)) => {
                self.begin_end(After::Unbootable(reply, internal(&error)));
            }
            // The guest waits for a reset that cannot be.
            (Err(error), None) => {
                let chain = internal(&error).chain.join(": ");
                let what = format!("The guest cannot be reset: {chain}");
                self.begin_end(After::Failed(what));
            }
        }
    }

    pub(super) fn power_button(&mut self) -> Answer {
        self.running()?.devices().power_button().map_err(|error| internal(&error))?;
        self.stays_here().map_err(done_here)?;
        Ok(Reply::Empty)
    }

    pub(super) fn shutdown(&mut self, reply: Sender<Answer>) {
        if self.machine.is_some() {
            return self.begin_end(After::Shutdown(reply));
        }
        let failure = if self.config.is_some() { not_running() } else { self.no_vm() };
        let _ = reply.send(Err(failure));
    }

    /// Without a VM there is nothing to delete, and nothing to refuse: a backup stays one.
    pub(super) fn delete(&mut self, reply: Sender<Answer>) {
        if self.machine.is_some() {
            return self.begin_end(After::Delete(reply));
        }
        self.forget_and_tell(Some((reply, Ok(Reply::Empty))));
    }

    pub(super) fn snapshot(&mut self, config: SnapshotConfig, reply: Sender<Answer>) {
        let machine = match self.running() {
            Ok(machine) if machine.is_paused() => Ok(Arc::clone(machine)),
            Ok(_) => Err(wrong_state("A snapshot needs a paused VM")),
            Err(failure) => Err(failure),
        };
        let machine = match machine {
            Ok(_) if self.snapshots.swap(true, Ordering::AcqRel) => Err(snapshot_under_way()),
            machine => machine,
        };
        let machine = match machine {
            Ok(machine) => machine,
            Err(failure) => return drop(reply.send(Err(failure))),
        };
        let (monitor, under_way) = (self.monitor.clone(), UnderWay(Arc::clone(&self.snapshots)));
        Self::beside("snapshot", reply, move || {
            monitor.emit("vm", "snapshotting", None);
            let saved = snapshot::save(&machine, &config.destination_url);
            drop(under_way);
            saved.map_err(|error| Failure::from_error(snapshot_failure_kind(&error), &error))?;
            monitor.emit("vm", "snapshotted", None);
            Ok(Reply::Empty)
        });
    }

    /// `fds` are those of `config.net_fds`, in their order.
    pub(super) fn restore(&mut self, config: &RestoreConfig, fds: Vec<OwnedFd>) -> Answer {
        self.room_for_a_vm()?;
        let cards = config.net_fds.as_deref().unwrap_or_default();
        let kept = TapDescriptors::of_restore(cards, fds).map_err(|id| {
            let what = format!("net_fds names the network card {id} more than once");
            Failure::new(FailureKind::BadRequest, what)
        })?;
        let is_free = self.leaving.is_over();
        let taps = kept.duplicate().map_err(|error| internal(&error))?;
        self.monitor.emit("vm", "restoring", None);
        let machine =
            snapshot::restore(&self.hypervisor, &config.source_url, config.prefault, taps)
                .map_err(|error| match snapshot_failure_kind(&error) {
                    FailureKind::Internal if !is_free => still_leaving(internal(&error)),
                    kind => Failure::from_error(kind, &error),
                })?;
        if config.resume {
            machine.resume().map_err(|error| internal(&error))?;
        }
        self.begin(machine.config().clone(), kept);
        self.machine = Some(Arc::new(machine));
        self.guest_is_down = false;
        self.monitor.emit("vm", "restored", None);
        Ok(Reply::Empty)
    }

    /// Does what the guest asks of its machine as a whole, if that waits.
    pub(super) fn look_at_wish(&mut self) {
        let Some(machine) = self.machine.clone() else { return };
        if self.resetting || self.guest_is_down || !self.hears_guest() {
            return;
        }
        match machine.devices().wish() {
            Some(PowerEvent::Reset) => self.reset(&machine, false, None),
            Some(PowerEvent::Off) => self.guest_ended(),
            None => {}
        }
    }

    pub(super) fn machine_event(&mut self, event: MachineEvent) {
        if self.machine.is_none() || self.guest_is_down {
            // Of a VM that a client ended in the meantime.
            return;
        }
        match event {
            MachineEvent::PowerOff => {
                // A client's reset may have begun the guest anew since.
                let machine = self.machine.as_ref();
                if machine.is_some_and(|machine| machine.devices().wish() == Some(PowerEvent::Off))
                {
                    tracing::info!("the guest shut down");
                    self.guest_ended();
                }
            }
            MachineEvent::Reset => {
                if let (false, Some(machine)) = (self.resetting, self.machine.clone())
                    // Another reset may have fulfilled the wish since.
                    && machine.devices().wish() == Some(PowerEvent::Reset)
                    && !is_broken("reset")
                {
                    tracing::info!("the guest is reset");
                    self.reset(&machine, false, None);
                }
            }
            MachineEvent::Virtio { id, what } => {
                self.monitor.emit("virtio-device", what, Some(json!({ "id": id })));
            }
            MachineEvent::Failed(what) => {
                tracing::error!("{what}");
                self.begin_end(After::Failed(what));
            }
        }
    }

    fn guest_ended(&mut self) {
        if let Some(machine) = &self.machine {
            // The guest may still be running past its power-off.
            if let Err(error) = machine.pause() {
                tracing::error!(%error, "the vCPUs could not be parked");
            }
        }
        self.begin_end(After::PowerOff);
    }
}

/// A payload that does not exist or is none is the client's mistake.
fn boot_failure_kind(error: &MachineError) -> FailureKind {
    match error {
        MachineError::Boot(_)
        | MachineError::TooManyVcpus { .. }
        | MachineError::Topology { .. } => FailureKind::BadRequest,
        _ => FailureKind::Internal,
    }
}

fn snapshot_failure_kind(error: &SnapshotError) -> FailureKind {
    match error {
        SnapshotError::Url(_) | SnapshotError::Config(_) => FailureKind::BadRequest,
        _ => FailureKind::Internal,
    }
}
