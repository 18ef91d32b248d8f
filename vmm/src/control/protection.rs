//! The replication requests, and what replication tells in return.
//!
//! ```text
//!          vm.replicate                    vm.receive-replica
//!   None -> Connecting -> Primary    None --------------------> Backup --take-over--> (a VM)
//!    ^--- vm.stop-replication ---'     ^--- vm.stop-replication ---'
//! ```
//!
//! A primary that lost its backup calls it again by itself (`replication::primary`); a person's
//! `vm.replicate` takes the place of that.

use std::sync::{Arc, Weak};

use api::replication::{
    ReceiveReplicaData, ReplicateData, ReplicationInfo, ReplicationState, Role,
};
use crossbeam_channel::{SendError, Sender};
use replication::backup::{self, BackupHandle};
use replication::handover::{Legacy, WayBack};
use replication::primary::{self, PrimaryHandle};
use replication::{Error as ReplicationError, ErrorKind, Event, Observer, VmId};
use serde_json::{Value, json};

use super::lifecycle::has_gone;
use super::way_back::{Return, hand_over};
use super::{Answer, Controller, Ending, Notice};
use crate::device_manager::taps::TapDescriptors;
use crate::ha::{Kept, Overrides, ProtectedVm, ReplicaVms, holds};
use crate::machine::Machine;
use crate::request::{Failure, FailureKind, Reply};

/// The one replication that this VMM takes part in.
pub(super) enum Protection {
    None,
    /// A backup was called for this machine and has not answered yet.
    Connecting {
        machine: Arc<Machine>,
        /// What this one takes the place of, and its number: it goes on if it cannot be ended.
        stays: Option<(u64, Box<Protection>)>,
        way_back: Option<Return>,
        shares_disks: bool,
        /// Nothing of the VM leaves until a protection of a reversed pair has begun and decides.
        is_held: bool,
    },
    Primary {
        handle: Arc<PrimaryHandle>,
        /// Which it protects. One that was handed over may be followed by another VM's.
        machine: Weak<Machine>,
        /// How this host is the VM's backup once it was handed over.
        way_back: Option<Return>,
        /// The image of a disk that the guest writes is one that both hosts see.
        shares_disks: bool,
    },
    Backup {
        handle: Arc<BackupHandle>,
        /// Owned by the backup's engine.
        replica: Option<Weak<Machine>>,
        /// Of its cards, where the VM was this host's.
        taps: TapDescriptors,
    },
}

impl Protection {
    pub(super) fn info(&self) -> Option<ReplicationInfo> {
        match self {
            Self::None => None,
            Self::Connecting { .. } => Some(ReplicationInfo {
                role: Role::Primary,
                state: ReplicationState::Disconnected,
                ..ReplicationInfo::default()
            }),
            Self::Primary { handle, .. } => Some(handle.info()),
            Self::Backup { handle, .. } => Some(handle.info()),
        }
    }

    /// Another handle to a primary's protection, for the case that it cannot be ended.
    pub(super) fn replaceable(&self) -> Option<Self> {
        match self {
            Self::Primary { handle, machine, way_back, shares_disks } => Some(Self::Primary {
                handle: Arc::clone(handle),
                machine: Weak::clone(machine),
                way_back: way_back.clone(),
                shares_disks: *shares_disks,
            }),
            _ => None,
        }
    }

    /// The machine that waits for its take-over.
    pub(super) fn replica(&self) -> Option<Arc<Machine>> {
        match self {
            Self::Backup { replica, .. } => replica.as_ref()?.upgrade(),
            _ => None,
        }
    }

    pub(super) fn waits_in(&mut self, machine: Weak<Machine>) {
        if let Self::Backup { replica, .. } = self {
            *replica = Some(machine);
        }
    }

    /// Whether a new replication may take this one's place.
    pub(super) fn is_over(&self) -> bool {
        match self {
            Self::None => true,
            Self::Connecting { .. } => false,
            // Its engine may still be closing: whoever comes next waits for that, see `protect`.
            Self::Primary { handle, .. } => handle.is_over(),
            Self::Backup { handle, .. } => handle.is_finished() && !handle.has_way_back(),
        }
    }
}

/// What is left here of a VM that was handed over, beside its memory.
struct Rest {
    vm: VmId,
    overrides: Overrides,
    taps: TapDescriptors,
    left: Option<(Legacy, Kept)>,
}

/// What begins a protection.
enum Plan {
    /// A client.
    Asked(ReplicateData),
    /// A VM that was handed over, whose old host is its backup or is about to listen as that.
    Back(WayBack),
}

impl Plan {
    fn options(&self) -> &ReplicateData {
        match self {
            Self::Asked(options) => options,
            Self::Back(way_back) => way_back.options(),
        }
    }

    fn is_held(&self) -> bool {
        matches!(self, Self::Back(way_back) if way_back.is_reversed())
    }
}

/// Passes replication's events to the control loop.
struct Forward {
    notices: Sender<Notice>,
    protection: u64,
}

impl Observer for Forward {
    fn event(&self, event: Event) {
        // A closed channel means that the VMM is on its way out.
        let protection = self.protection;
        let _ = self.notices.send(Notice::Replication { protection, event });
    }
}

pub(super) fn failure(error: &ReplicationError) -> Failure {
    let kind = match error.kind() {
        ErrorKind::Invalid => FailureKind::BadRequest,
        ErrorKind::Conflict => FailureKind::Conflict,
        ErrorKind::Other => FailureKind::Internal,
    };
    Failure::from_error(kind, error)
}

fn conflict(message: &str) -> Failure {
    Failure::new(FailureKind::Conflict, message)
}

fn no_replication() -> Failure {
    Failure::new(FailureKind::NotFound, "This VMM takes part in no replication")
}

/// A switch-over was cut off with no arbiter to ask.
pub(super) fn is_cut(handle: &PrimaryHandle) -> bool {
    handle.is_handing_over() && handle.info().state == ReplicationState::Suspended
}

/// Ends a protection in order, its last words to the backup included, for a VM that ends.
pub(super) fn stop_primary(handle: &PrimaryHandle) -> Result<(), ReplicationError> {
    if !handle.is_over() {
        handle.end()?;
    }
    handle.join();
    Ok(())
}

/// Ends what another protection takes the place of.
fn end_before(before: Protection) -> Result<(), ReplicationError> {
    match before {
        // The engine turns the tracking off as its last act.
        Protection::Primary { handle, .. } => stop_primary(&handle)?,
        // It has taken over, and is about to end.
        Protection::Backup { handle, .. } => handle.join(),
        Protection::None | Protection::Connecting { .. } => {}
    }
    Ok(())
}

/// Says that a protection did not end as it should.
pub(super) fn no_order(ended: Result<(), ReplicationError>) {
    if let Err(error) = ended {
        tracing::warn!("replication did not end in order: {}", error.chain());
    }
}

fn taking_over() -> Failure {
    conflict("The VM was handed over to this host just now, and its old one is called: try again")
}

/// It says that the primary is gone, and this is the primary.
fn not_by_force() -> Failure {
    conflict(
        "force is for the backup of a VM whose primary is gone: this host runs the VM, and hands it over without",
    )
}

fn connecting() -> Failure {
    conflict("The backup was called and has not answered yet: try again")
}

/// The primary keeps the image's lock until its VM is gone, which is when the backup's runs, which
/// waits for the lock.
fn cannot_hand_over_shared_disks() -> Failure {
    conflict(
        "A VM whose disks are shared cannot be handed over yet: its image stays locked until this \
         process ends. End the process, and the backup takes over",
    )
}

impl Controller {
    /// Connects to the backup beside the loop: an unreachable one may take its time-out.
    pub(super) fn replicate(&mut self, data: ReplicateData, reply: Sender<Answer>) {
        match self.protected_vm(&data) {
            Ok(machine) => self.protect(machine, Plan::Asked(data), reply),
            Err(failure) => drop(reply.send(Err(failure))),
        }
    }

    fn protected_vm(&self, data: &ReplicateData) -> Result<Arc<Machine>, Failure> {
        Failure::from_complaints("The replication options are not usable", &data.validate())?;
        let machine = Arc::clone(self.running()?);
        match &self.protection {
            _ if self.has_gone() => Err(has_gone()),
            Protection::Connecting { .. } => Err(connecting()),
            Protection::Backup { handle, .. } if handle.has_way_back() => Err(taking_over()),
            // One that has taken over is about to end, and that is waited for.
            Protection::Backup { handle, .. }
                if !handle.is_finished() && handle.info().state != ReplicationState::TakenOver =>
            {
                Err(conflict("This VMM is a backup: vm.stop-replication ends that"))
            }
            // Its backup is lost and is called in vain: what is asked for takes the place of that.
            Protection::Primary { handle, .. }
                if !handle.is_over() && !handle.may_be_replaced() =>
            {
                let state = handle.info().state;
                Err(conflict(&format!(
                    "The VM is already replicated ({state:?}): vm.stop-replication ends that"
                )))
            }
            _ => Ok(machine),
        }
    }

    /// Begins a protection beside the loop.
    fn protect(&mut self, machine: Arc<Machine>, plan: Plan, reply: Sender<Answer>) {
        let is_held = plan.is_held();
        let holds = holds(plan.options());
        let way_back = Return::of(plan.options());
        let mut guest = ProtectedVm::new(Arc::clone(&machine), holds);
        let shares_disks = holds.disks && !machine.devices().writable_disks().is_empty();
        let called_for = Arc::clone(&machine);
        let before = std::mem::replace(&mut self.protection, Protection::None);
        let stays = before.replaceable().map(|before| (self.heard, Box::new(before)));
        let (identity, known) = (self.identity, self.known.clone());
        let observer = self.observer();
        let notices = self.notices.clone();
        let lost = reply.clone();
        let started = std::thread::Builder::new().name("repl-connect".into()).spawn(move || {
            let ready = end_before(before).and_then(|()| guest.keep_durable());
            let result = ready.and_then(|()| match plan {
                Plan::Asked(options) => {
                    primary::protect(guest, options, identity, &known, observer)
                }
                Plan::Back(way_back) => {
                    primary::protect_back(guest, way_back, identity, &known, observer)
                }
            });
            let handle = result.map(Arc::new).map_err(|error| failure(&error));
            // A closed channel means that the VMM is on its way out.
            let _ = notices.send(Notice::Protected { machine: called_for, handle, reply });
        });
        match started {
            Ok(_) => {
                self.protection =
                    Protection::Connecting { machine, stays, way_back, shares_disks, is_held };
            }
            Err(error) => {
                // What was there goes on: to drop its handle ends nothing.
                self.put_back(stays);
                let failure = Failure::from_error(FailureKind::Internal, &error);
                if is_held {
                    self.leave_to_old_host(&failure.chain.join(": "));
                }
                let _ = lost.send(Err(failure));
            }
        }
    }

    /// The VM runs here with its output held, and nobody here will ever let it out: it is destroyed, and its
    /// old host, which waits for a call, goes on from the last epoch of the switch-over. Nobody heard of
    /// anything that came after.
    fn leave_to_old_host(&mut self, why: &str) {
        tracing::error!("the VM is left to its old host, which is not called: {why}");
        if let Some(machine) = &self.machine {
            machine.destroy();
        }
        self.unprotect();
        self.guest_is_down = false;
        self.resetting = false;
        self.ownership_lost("its old host", true);
    }

    /// Whatever an engine that still claims comes to say is of no VM that this process has from here on.
    pub(super) fn unprotect(&mut self) {
        self.protection = Protection::None;
        self.number();
    }

    /// A number for a protection that is none of those before, whose events are not heard any more.
    pub(super) fn number(&mut self) -> u64 {
        self.protections += 1;
        self.heard = self.protections;
        self.heard
    }

    /// The protection that one which did not come about was to replace is there, and heard, again.
    fn put_back(&mut self, before: Option<(u64, Box<Protection>)>) {
        self.protection = match before {
            Some((number, before)) => {
                self.heard = number;
                *before
            }
            None => Protection::None,
        };
    }

    /// The VM was handed over to this host, and its old one is its backup, or is about to be.
    fn protect_back(&mut self, way_back: WayBack) {
        let machine = match self.running().map(Arc::clone) {
            Ok(machine) => machine,
            Err(failure) if way_back.is_reversed() => {
                return self.leave_to_old_host(&failure.chain.join(": "));
            }
            Err(_) => return,
        };
        let url = &way_back.options().destination_url;
        match way_back.is_reversed() {
            true => tracing::info!("the VM's old host is its backup, and is called: {url}"),
            false => tracing::info!("the VM's old host is called as its backup: {url}"),
        }
        let (reply, _nobody) = crossbeam_channel::bounded(1);
        self.protect(machine, Plan::Back(way_back), reply);
    }

    /// The VM was handed over, and this host is its backup, or is to be.
    fn receive_back(&mut self, way_back: &Return, rest: Rest) {
        if let Err(failure) = self.receive_rest(way_back, rest) {
            let url = way_back.url();
            let error = failure.chain.join(": ");
            tracing::error!("this host cannot be the VM's backup at {url}: {error}");
            self.monitor.emit("vm", "replica-receive-failed", Some(json!({"error": error})));
        }
    }

    /// For a protection that begins.
    fn observer(&mut self) -> Arc<Forward> {
        let protection = self.number();
        Arc::new(Forward { notices: self.notices.clone(), protection })
    }

    /// The backup accepted the VM, or did not.
    pub(super) fn protected(
        &mut self,
        machine: &Arc<Machine>,
        handle: Result<Arc<PrimaryHandle>, Failure>,
        reply: Sender<Answer>,
    ) {
        let waits = match &mut self.protection {
            Protection::Connecting { machine: waits, stays, way_back, shares_disks, is_held }
                if Arc::ptr_eq(waits, machine) =>
            {
                Some((stays.take(), way_back.take(), *shares_disks, *is_held))
            }
            _ => None,
        };
        let answer = match handle {
            Ok(handle) => {
                if let Some((_, way_back, shares_disks, _)) = waits {
                    let machine = Arc::downgrade(machine);
                    self.protection =
                        Protection::Primary { handle, machine, way_back, shares_disks };
                    return drop(reply.send(Ok(Reply::Empty)));
                }
                // The VM was ended in the meantime, and another one may have come after.
                let stop = move || {
                    no_order(handle.stop());
                    Err(conflict("The VM was ended before it was protected"))
                };
                return Self::beside("stop-replica", reply, stop);
            }
            Err(failure) => {
                if let Some((stays, _, _, is_held)) = waits {
                    if is_held {
                        self.leave_to_old_host(&failure.chain.join(": "));
                    }
                    // One that could not be ended goes on, and is not to be forgotten.
                    self.put_back(stays.filter(|(_, before)| !before.is_over()));
                }
                Err(failure)
            }
        };
        if let Err(SendError(Err(failure))) = reply.send(answer) {
            // Nobody asked, or nobody waited: of a way back, for one.
            let error = failure.chain.join(": ");
            tracing::error!("the VM is not protected: {error}");
            self.monitor.emit("vm", "replication-failed", Some(json!({"error": error})));
        }
    }

    fn receive_rest(&mut self, way_back: &Return, rest: Rest) -> Answer {
        self.may_receive()?;
        let Rest { vm, overrides, taps, left } = rest;
        let for_machines = taps.duplicate();
        let for_machines =
            for_machines.map_err(|error| Failure::from_error(FailureKind::Internal, &error))?;
        let (legacy, kept) = left.unzip();
        let builder = self.builder(overrides).around(kept).with(for_machines);
        let observer = self.observer();
        let handle = way_back.take().map_or_else(|| way_back.prepare_now(), Ok);
        let handle = handle.and_then(|prepared| match legacy {
            Some(legacy) => backup::receive_back(builder, prepared, legacy, observer),
            None => backup::receive_prepared(builder, prepared, vm, observer),
        });
        let handle = Arc::new(handle.map_err(|error| failure(&error))?);
        self.protection = Protection::Backup { handle, replica: None, taps };
        Ok(Reply::Empty)
    }

    pub(super) fn receive_replica(&mut self, data: ReceiveReplicaData) -> Answer {
        Failure::from_complaints("The replication options are not usable", &data.validate())?;
        self.may_receive()?;
        let builder = self.builder(Overrides::from(&data));
        let observer = self.observer();
        let handle = backup::receive(builder, data, observer).map_err(|error| failure(&error))?;
        let (handle, taps) = (Arc::new(handle), TapDescriptors::default());
        self.protection = Protection::Backup { handle, replica: None, taps };
        Ok(Reply::Empty)
    }

    fn builder(&self, overrides: Overrides) -> ReplicaVms {
        ReplicaVms::new(Arc::clone(&self.hypervisor), overrides, self.notices.clone())
    }

    fn may_receive(&self) -> Result<(), Failure> {
        if self.config.is_some() || self.machine.is_some() {
            return Err(conflict("This VMM has a VM of its own: a backup must have none"));
        }
        if !self.protection.is_over() {
            return Err(conflict("This VMM is a backup already: vm.stop-replication ends that"));
        }
        Ok(())
    }

    pub(super) fn stop_replication(&mut self, reply: Sender<Answer>) {
        let stopped = |result: Result<(), ReplicationError>| {
            result.map(|()| Reply::Empty).map_err(|error| failure(&error))
        };
        match &self.protection {
            Protection::None => drop(reply.send(Err(no_replication()))),
            Protection::Connecting { .. } => drop(reply.send(Err(connecting()))),
            // It has ended already, by a person or by an error that a person was told.
            Protection::Primary { handle, .. }
                if handle.info().state == ReplicationState::Stopped =>
            {
                if handle.is_finished() {
                    self.unprotect();
                }
                let _ = reply.send(Err(no_replication()));
            }
            // There is nothing here that could run on.
            Protection::Primary { handle, .. }
                if handle.info().state == ReplicationState::Lost
                    && (self.config.is_none() || self.has_gone()) =>
            {
                drop(reply.send(Err(has_gone())));
            }
            // Its engine still closes. Whoever comes next finds it, and waits for that.
            Protection::Primary { handle, .. } if handle.is_over() && !handle.is_finished() => {
                let handle = Arc::clone(handle);
                Self::beside("stop-replica", reply, move || {
                    handle.join();
                    Ok(Reply::Empty)
                });
            }
            // What is there of it is about to begin, and is not to be forgotten for this.
            Protection::Backup { handle, .. } if handle.has_way_back() => {
                drop(reply.send(Err(taking_over())));
            }
            // The VM runs on without protection, as it does already.
            ended if ended.is_over() => {
                self.unprotect();
                let _ = reply.send(Ok(Reply::Empty));
            }
            Protection::Primary { handle, .. } => {
                let handle = Arc::clone(handle);
                Self::beside("stop-replica", reply, move || stopped(handle.stop()));
            }
            Protection::Backup { handle, .. } => {
                let handle = Arc::clone(handle);
                Self::beside("stop-replica", reply, move || stopped(handle.stop()));
            }
        }
    }

    pub(super) fn failover(&mut self, force: bool, reply: Sender<Answer>) {
        match &self.protection {
            Protection::None => drop(reply.send(Err(no_replication()))),
            Protection::Connecting { .. } => drop(reply.send(Err(connecting()))),
            Protection::Primary { shares_disks: true, .. } => {
                drop(reply.send(Err(cannot_hand_over_shared_disks())));
            }
            Protection::Primary { .. } if force => drop(reply.send(Err(not_by_force()))),
            Protection::Primary { handle, way_back, .. } => {
                let (handle, way_back) = (Arc::clone(handle), way_back.clone());
                let config = self.machine.as_ref().map(|machine| machine.config().clone());
                let monitor = self.monitor.clone();
                Self::beside("failover", reply, move || {
                    hand_over(&handle, way_back.as_ref(), config.as_ref(), &monitor)
                        .map(|()| Reply::Empty)
                        .map_err(|error| failure(&error))
                });
            }
            Protection::Backup { handle, .. } => {
                let handle = Arc::clone(handle);
                Self::beside("failover", reply, move || {
                    handle.failover(force).map(|()| Reply::Empty).map_err(|error| failure(&error))
                });
            }
        }
    }

    pub(super) fn replication_info(&self) -> Answer {
        super::report::json(&self.protection.info().unwrap_or_default())
    }

    /// A replica runs: it is this VMM's VM. With output held, its protection begins with it: there is no
    /// moment in which a request finds the one without the other.
    pub(super) fn adopt(&mut self, machine: Arc<Machine>, is_held: bool) {
        let way_back = match &self.protection {
            Protection::Backup { handle, .. } if is_held && !self.winding_down => {
                handle.take_way_back()
            }
            _ => None,
        };
        if self.machine.is_some() || (is_held && way_back.is_none()) {
            let why = match is_held {
                true => "its old host goes on",
                false => "this process has another one",
            };
            tracing::error!(
                "a VM that was taken over is destroyed, nobody here waits for it: {why}"
            );
            return machine.destroy();
        }
        self.config = Some(machine.config().clone());
        self.machine = Some(machine);
        self.taps = TapDescriptors::default();
        self.guest_is_down = false;
        // What a reset left that came to nothing, or to another VM, is none of this one's.
        self.resetting = false;
        if let Protection::Backup { handle, replica, taps } = &mut self.protection {
            *replica = None;
            self.taps = std::mem::take(taps);
            // A later protection of this VM goes under the names that the record knows.
            self.identity = handle.identity();
            handle.tell(&self.known);
        }
        self.monitor.emit("vm", "resumed", None);
        if let Some(way_back) = way_back {
            self.protect_back(way_back);
        }
    }

    pub(super) fn replication_event(&mut self, protection: u64, event: Event) {
        let (name, properties) = describe(&event);
        let text = properties.as_ref().map_or(String::new(), |told| format!(": {told}"));
        match &event {
            // The VM is not protected, or not this host's, and nothing goes on that mends it.
            Event::Failed { .. } | Event::Undecided { .. } | Event::OwnershipLost { .. } => {
                tracing::error!("{name}{text}");
            }
            Event::Degraded { .. } | Event::FailoverFailed { .. } => tracing::warn!("{name}{text}"),
            // Whoever calls a backup can bring about as many failures as he likes.
            _ => tracing::info!("{name}{text}"),
        }
        self.monitor.emit("vm", name, properties);
        if protection != self.heard {
            // Of a VM that this process does not have any more.
            return;
        }
        match event {
            Event::OwnershipLost { owner } => self.ownership_lost(&owner, true),
            Event::FailoverFinished { .. } => self.failover_finished(),
            Event::Degraded { .. } | Event::FailoverFailed { .. } => self.stays(),
            Event::ReceiveFailed { .. } | Event::Stopped => {
                self.stays();
                self.replica_gone();
            }
            _ => {}
        }
    }

    /// The VM stays here: a switch-over that was under way has come to nothing.
    fn stays(&self) {
        if let Protection::Primary { way_back: Some(way_back), .. } = &self.protection {
            drop(way_back.take());
        }
    }

    /// On either side: the roles are reversed where the options say so.
    fn failover_finished(&mut self) {
        match &mut self.protection {
            Protection::Primary { handle, way_back, .. } => {
                let (way_back, legacy) = (way_back.take(), handle.take_legacy());
                let vm = handle.identity().vm;
                let before = Arc::clone(handle);
                let kept = self.machine.as_ref().map(|machine| Kept {
                    memory: machine.memory().clone(),
                    config: machine.config().memory.clone(),
                    before,
                    machine: Arc::clone(machine),
                });
                // A VM that is being ended leaves no backup behind, which nobody would have a handle to.
                let way_back = way_back.filter(|_| !self.winding_down);
                let overrides =
                    self.machine.as_ref().map(|machine| Overrides::of(machine.config()));
                let taps = std::mem::take(&mut self.taps);
                self.ownership_lost("the backup", way_back.is_none());
                if let Some(way_back) = way_back {
                    let overrides = overrides.unwrap_or_default();
                    let left = legacy.zip(kept);
                    self.receive_back(&way_back, Rest { vm, overrides, taps, left });
                }
            }
            Protection::Backup { handle, .. } => {
                match handle.take_way_back() {
                    Some(way_back) => self.protect_back(way_back),
                    // Nobody asks for what is noted, should an earlier switch-over have begun to.
                    None => self.stop_tracking(),
                }
            }
            Protection::None | Protection::Connecting { .. } => {}
        }
    }

    fn stop_tracking(&self) {
        if let Some(machine) = &self.machine
            && let Err(error) = machine.set_tracking(false)
        {
            tracing::warn!("pages that the guest writes are noted for nobody: {error}");
        }
    }

    /// The peer runs the VM: this side's is destroyed already, and must not be started again.
    fn ownership_lost(&mut self, owner: &str, may_end: bool) {
        self.replica_gone();
        if let Some(machine) = self.machine.take() {
            self.let_go(Some(machine), None);
            self.config = None;
            // They may be of the very tap that this host needs when it is a backup.
            self.taps = TapDescriptors::default();
            self.resetting = false;
            self.monitor.emit("vm", "deleted", None);
            if may_end && !self.has_api {
                let what = format!("The VM goes on at its backup: {owner} owns it");
                self.ending = Some(Ending::Failed(what));
            }
        }
    }

    /// Lets go of a replica that waits for nothing any more. A stranger that was refused leaves it
    /// where it is, and so does a lost primary where there is no arbiter.
    fn replica_gone(&mut self) {
        if let Protection::Backup { handle, replica, .. } = &mut self.protection
            && matches!(
                handle.info().state,
                ReplicationState::Disconnected | ReplicationState::Stopped
            )
        {
            *replica = None;
        }
    }
}

/// The event's name and properties as the event monitor shows them.
fn describe(event: &Event) -> (&'static str, Option<Value>) {
    match event {
        Event::ReplicationStarted { peer } => ("replication-started", Some(json!({"peer": peer}))),
        Event::Synced => ("replication-synced", None),
        Event::Resynced => ("replication-resynced", None),
        Event::Reversed => ("replication-reversed", None),
        Event::Degraded { reason, generation } => {
            ("replication-degraded", Some(json!({"reason": reason, "generation": generation.0})))
        }
        Event::Stopped => ("replication-stopped", None),
        Event::Failed { error } => ("replication-failed", Some(json!({"error": error}))),
        Event::Undecided { error } => ("replication-undecided", Some(json!({"error": error}))),
        Event::OwnershipLost { owner } => ("replication-lost", Some(json!({"owner": owner}))),
        Event::ReceiveReady { address } => {
            ("replica-receive-ready", Some(json!({"address": address})))
        }
        Event::ReceiveStarted { peer } => ("replica-receive-started", Some(json!({"peer": peer}))),
        Event::ReceiveFailed { error } => ("replica-receive-failed", Some(json!({"error": error}))),
        Event::FailoverStarted { reason, generation } => {
            ("failover-started", Some(json!({"reason": reason, "generation": generation.0})))
        }
        Event::FailoverFinished { generation } => {
            ("failover-finished", Some(json!({"generation": generation.0})))
        }
        Event::FailoverFailed { error } => ("failover-failed", Some(json!({"error": error}))),
    }
}
