//! Protecting a guest.
//!
//! ```text
//!  repl-engine    owns the guest and the state machine; seals, commits, decides
//!  repl-call      asks the arbiter and the backup whether there can be a session, and ends
//!  repl-setup     makes the data connections, and ends
//!  repl-send-N    pages of one data connection
//!  repl-disk      first copies and logs of the disks
//!  repl-ctl       what the backup says
//!  repl-beat      what it is told, heartbeats in between
//!  repl-arbiter   asks the arbiter
//!  repl-bell      dies with the process, at once, so that the backup hears of it
//! ```
//!
//! Enters: a guest and options. Leaves: its state at the backup, and its output once that is so. A
//! session that ends because the backup was lost is followed by another, see [`keeper`].

mod bell;
mod disk;
mod engine;
mod in_flight;
mod keeper;
mod options;
mod patience;
mod rest;
mod seal;
mod send;
mod session;
#[cfg(any(test, feature = "testing"))]
pub use engine::simulated;

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use api::replication::{ReplicateData, ReplicationInfo, ReplicationState, Role};
use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};

pub(crate) use options::{address, arbiter, asked_of_rdma, certificates, check, validate_paces};
pub(crate) use session::layout;

use crate::engine::spawn;
use crate::engine::status::Status;
use crate::error::Error;
use crate::guest::Guest;
use crate::handover::{Legacy, WayBack};
use crate::log::Log;
use crate::observer::Observer;
use crate::ownership::{HostIdentity, Known};
use crate::protocol::primary::Primary;
use crate::ram::PageSet;
use crate::transport::{name, rdma};
use crate::wire::SessionId;
use engine::{Ask, Input};
use keeper::{Keeper, Mailbox};
use options::Checked;
use rest::Rest;

/// A guest under protection. Dropping the handle ends nothing.
pub struct PrimaryHandle {
    mailbox: Mailbox,
    status: Status,
    thread: std::sync::Mutex<Option<JoinHandle<()>>>,
    identity: HostIdentity,
    timeout: Duration,
}

/// Begins to protect `guest`. Returns once the backup has accepted, or with the error why not,
/// or, if neither is known after the peer timeout, while that goes on: then `observer` is told.
///
/// `known` is what this process knows of its VMs' records: what an arbiter says is no answer if it is
/// older than that.
///
/// Every error is reported exactly once, here or to `observer`. On an error the guest was not
/// touched.
///
/// # Errors
/// [`Error::Option`] for options that contradict themselves or that this build lacks;
/// [`Error::Conflict`] if the arbiter's record names another owner; else what failed.
pub fn protect<G: Guest>(
    guest: G,
    options: ReplicateData,
    identity: HostIdentity,
    known: &Known,
    observer: Arc<dyn Observer>,
) -> Result<PrimaryHandle, Error> {
    let checked = Checked::new(options, None)?;
    let (handle, keeper, queue) = prepared(guest, &checked, (identity, known), observer);
    // A rendezvous: either the caller takes the verdict or, having left, never sees it.
    let (verdict, first) = bounded(0);
    let thread = spawn("repl-engine", None, move || keeper.run(checked, queue, &verdict))?;
    match first.recv_timeout(handle.timeout) {
        Ok(Err(error)) => {
            join(thread);
            return Err(error);
        }
        Ok(Ok(())) | Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
    }
    Ok(handle.with(thread))
}

/// Begins to protect a guest that was handed over to this host and is wanted back, as
/// [`BackupHandle::take_way_back`](crate::backup::BackupHandle::take_way_back) says. Of a reversed pair the
/// guest's output is held already, and waits for what comes of this.
///
/// # Errors
/// [`Error::Option`] for options that contradict themselves or that this build lacks; for a reversed pair
/// only that no thread can be started, or that what the old host has is not known. Nobody decides about such a
/// guest then: it is to be destroyed, and its old host goes on.
pub fn protect_back<G: Guest>(
    mut guest: G,
    way_back: WayBack,
    identity: HostIdentity,
    known: &Known,
    observer: Arc<dyn Observer>,
) -> Result<PrimaryHandle, Error> {
    let WayBack { options, base, reversed } = way_back;
    if reversed && base.is_none() {
        let what = "Nothing is known of what the VM's old host has, whose pair was reversed";
        return Err(Error::Conflict(what.to_owned()));
    }
    let pages = guest.ram().pages();
    let rest = base.map(|base| Rest {
        session: SessionId(base.session),
        generation: base.generation,
        committed: base.committed,
        sealed: base.sealed,
        pages: PageSet::new(pages),
    });
    if let (true, Some(base)) = (reversed, base) {
        let address = address("destination_url", &options.destination_url).ok();
        let transport = address.map(|to| name(&to, options.tls_dir.is_some()).to_owned());
        let (handle, mut keeper, queue) =
            prepare(guest, &options, transport, (identity, known), observer);
        {
            let mut gathered = handle.status.lock();
            gathered.info.state = ReplicationState::Protected;
            gathered.info.generation = base.generation.0;
            gathered.info.epoch_sealed = base.sealed.0;
            gathered.info.epoch_committed = base.committed.0;
            gathered.info.sync_progress = 1.0;
        }
        keeper.rest = rest;
        let machine = Primary::reversed(base.generation, base.committed);
        let thread = spawn("repl-engine", None, move || keeper.run_reversed(machine, queue))?;
        return Ok(handle.with(thread));
    }
    let checked = Checked::new(options, None).inspect_err(|_| {
        // Nobody asks for what is noted.
        if let Err(error) = guest.stop_tracking() {
            tracing::warn!("pages that the guest writes are noted for nobody: {error}");
        }
    })?;
    let (handle, mut keeper, queue) = prepared(guest, &checked, (identity, known), observer);
    {
        let mut gathered = handle.status.lock();
        gathered.info.state = ReplicationState::Degraded;
        gathered.alone = true;
        gathered.reconnects = true;
    }
    keeper.rest = rest;
    let thread = spawn("repl-engine", None, move || keeper.run_alone(queue))?;
    Ok(handle.with(thread))
}

fn prepared<G: Guest>(
    guest: G,
    checked: &Checked,
    names: (HostIdentity, &Known),
    observer: Arc<dyn Observer>,
) -> (PrimaryHandle, Keeper<G>, Receiver<Input>) {
    let transport = Some(checked.transport().to_owned());
    prepare(guest, &checked.options, transport, names, observer)
}

fn prepare<G: Guest>(
    guest: G,
    options: &ReplicateData,
    transport: Option<String>,
    (identity, known): (HostIdentity, &Known),
    observer: Arc<dyn Observer>,
) -> (PrimaryHandle, Keeper<G>, Receiver<Input>) {
    let status = Status::default();
    {
        let mut gathered = status.lock();
        gathered.info.role = Role::Primary;
        // Until the backup has accepted.
        gathered.info.state = ReplicationState::Disconnected;
        gathered.info.peer = Some(options.destination_url.clone());
        gathered.info.transport = transport;
        gathered.info.dirty_log = guest.tracking_name().map(str::to_owned);
        gathered.reconnects = options.reconnect;
    }
    let timeout = Duration::from_millis(options.timeout_ms);
    let (mailbox, queue) = Mailbox::new();
    let keeper = Keeper {
        guest,
        options: options.clone(),
        identity,
        seen: known.of(identity.vm, options.arbiter.as_deref()),
        observer,
        status: status.clone(),
        mailbox: mailbox.clone(),
        rest: None,
        fell_back: None,
        falls: Log::default(),
        registered: rdma::Registered::default(),
    };
    let thread = std::sync::Mutex::default();
    (PrimaryHandle { mailbox, status, thread, identity, timeout }, keeper, queue)
}

fn join(thread: JoinHandle<()>) {
    if thread.join().is_err() {
        tracing::error!("A replication thread panicked");
    }
}

impl PrimaryHandle {
    fn with(self, thread: JoinHandle<()>) -> Self {
        Self { thread: std::sync::Mutex::new(Some(thread)), ..self }
    }

    /// Where replication stands.
    #[must_use]
    pub fn info(&self) -> ReplicationInfo {
        self.status.info()
    }

    /// What this host still has of a VM that was handed over and is wanted back. Once: it is the memory
    /// that the guest had, which is whoever's asks.
    #[must_use]
    pub fn take_legacy(&self) -> Option<Legacy> {
        self.status.lock().legacy.take()
    }

    /// The names under which this side owns the VM.
    #[must_use]
    pub fn identity(&self) -> HostIdentity {
        self.identity
    }

    /// Ends the protection: the VM runs on, its output passes once this host owns it alone, and
    /// the backup discards its replica. Where a switch-over was cut, and shows so (`Suspended`), this says that the VM is
    /// this host's; where it is cut after the look and before the request, it is refused.
    ///
    /// # Errors
    /// [`Error::Conflict`] if the backup owns the VM; [`Error::Failed`] if the ownership is not
    /// decided within the peer timeout: that goes on in the background, output stays held.
    pub fn stop(&self) -> Result<(), Error> {
        let gathered = self.status.lock();
        let decides = gathered.hands_over && gathered.info.state == ReplicationState::Suspended;
        drop(gathered);
        self.ask(Ask::Stop { decides })
    }

    /// As [`PrimaryHandle::stop`], for a VM that ends: after a switch-over that was cut, and of which only a person can
    /// say where the VM runs, nothing is ended. That would say that it is this host's, let it go on for a moment, and
    /// its output out.
    ///
    /// # Errors
    /// As [`PrimaryHandle::stop`], and [`Error::Conflict`] after such a switch-over.
    pub fn end(&self) -> Result<(), Error> {
        self.ask(Ask::Stop { decides: false })
    }

    /// Hands the VM over to the backup, which runs it when this returns.
    ///
    /// # Errors
    /// [`Error::Conflict`] if the VM is not protected at the moment; else why the VM stayed here.
    pub fn failover(&self, _force: bool) -> Result<(), Error> {
        self.ask(Ask::Failover { reverses: true })
    }

    /// As [`PrimaryHandle::failover`], of a host that cannot be the VM's backup at once: the pair is not
    /// reversed, though the options say where this host is to be called.
    ///
    /// # Errors
    /// As [`PrimaryHandle::failover`].
    pub fn hand_over_alone(&self) -> Result<(), Error> {
        self.ask(Ask::Failover { reverses: false })
    }

    /// Whether a switch-over is under way, or was cut without an arbiter who could say who has the VM: what is done to the VM here need not be true of the one that goes
    /// on.
    #[must_use]
    pub fn is_handing_over(&self) -> bool {
        self.status.lock().hands_over
    }

    fn ask(&self, ask: Ask) -> Result<(), Error> {
        let (answer, answered) = bounded(1);
        let gone = || Error::Conflict("Replication has ended already".to_owned());
        if !self.mailbox.send(Input::Ask(ask, answer)) {
            return Err(gone());
        }
        // A person waits: long enough for a slow arbiter, not for a dead one.
        match answered.recv_timeout(self.timeout * 10) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Disconnected) if matches!(ask, Ask::Stop { .. }) => {
                self.ended_by_itself()
            }
            Err(RecvTimeoutError::Disconnected) => Err(gone()),
            Err(RecvTimeoutError::Timeout) => {
                let what = "The ownership is not decided yet; this goes on in the background";
                Err(Error::Failed(what.to_owned()))
            }
        }
    }

    /// What a person is told whose wish to end the protection met its end.
    fn ended_by_itself(&self) -> Result<(), Error> {
        match self.info().state {
            ReplicationState::Lost => Err(Error::Conflict("The backup owns the VM".to_owned())),
            _ => Ok(()),
        }
    }

    /// What waits for whoever works for the VM.
    #[cfg(test)]
    pub(crate) fn waiting_inputs(&self) -> usize {
        self.mailbox.waiting()
    }

    /// Pauses that were measured so far, up to the window's size.
    #[cfg(test)]
    pub(crate) fn pauses(&self) -> u64 {
        self.status.lock().pause_us.count()
    }

    /// Whether nothing more will be done for the VM without a person's word. The engine may still be
    /// closing.
    #[must_use]
    pub fn is_over(&self) -> bool {
        let gathered = self.status.lock();
        match gathered.info.state {
            ReplicationState::Lost | ReplicationState::Stopped => true,
            ReplicationState::Degraded => !gathered.reconnects,
            _ => false,
        }
    }

    /// Whether the VM lost its backup and is not protected again yet.
    #[must_use]
    pub fn is_alone(&self) -> bool {
        self.status.lock().alone
    }

    /// Whether another protection may take this one's place: the VM is alone, and no session with its
    /// backup has begun, of which the backup may come to own the VM.
    #[must_use]
    pub fn may_be_replaced(&self) -> bool {
        use ReplicationState::{Degraded, Disconnected};
        let gathered = self.status.lock();
        gathered.alone && matches!(gathered.info.state, Degraded | Disconnected)
    }

    /// Whether the engine has ended: the VM is unprotected, or gone.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        match self.thread.try_lock() {
            Ok(thread) => thread.as_ref().is_none_or(JoinHandle::is_finished),
            // Somebody waits for it.
            Err(_) => false,
        }
    }

    /// Waits for the engine to end, and no longer than the peer timeout; whether it has.
    #[must_use]
    pub fn join_in_time(&self) -> bool {
        let until = Instant::now() + self.timeout;
        while !self.is_finished() {
            if Instant::now() >= until {
                return false;
            }
            // A thread cannot be joined for a while only; this is once, at the end of a switch-over.
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }

    /// Waits for the engine to end, whoever else waits for it.
    pub fn join(&self) {
        let mut thread = self.thread.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(thread) = thread.take() {
            join(thread);
        }
    }
}
