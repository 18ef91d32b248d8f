//! Receiving a replica, and taking over.
//!
//! ```text
//!  repl-accept    listens; repl-hello greets
//!  repl-backup    owns the replica and the state machine; acknowledges, applies, takes over
//!  repl-recv-N    pages of one data connection, staged; those of a copy into the image
//!  repl-verbs     with RDMA: asks the device at set-up, and ends
//!  repl-open      registers the image, for a copy straight into it; repl-shut gives it back
//!  repl-recv-disk first copies and changes of the disks, staged
//!  repl-image     applies what is committed to the disks' images, in order
//!  repl-ctl       what the primary says
//!  repl-beat      what it is told, heartbeats in between
//!  repl-arbiter   asks the arbiter
//!  repl-bell      waits for the end of the primary's process
//! ```
//!
//! Always holds: the image is written by an epoch only when that epoch is whole, checked and
//! acknowledged; the primary's device may write it in a copy only, which nobody could start, and nothing is
//! acknowledged before that is over; the same thread applies, and starts the VM, so a take-over finds it whole. For the
//! images of disks, which may take their time, it waits before it claims the VM.

mod accept;
mod apply;
mod commit;
mod disks;
mod engine;
mod receive;
mod staging;
pub(crate) mod suspects;

#[cfg(any(test, feature = "testing"))]
pub use engine::simulated;

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use api::replication::{ReceiveReplicaData, ReplicationInfo, ReplicationState, Role};
use crossbeam_channel::{RecvTimeoutError, Sender, bounded, unbounded};

use crate::engine::spawn;
use crate::engine::status::Status;
use crate::error::{Error, chain};
use crate::guest::ReplicaBuilder;
use crate::handover::{Legacy, WayBack};
use crate::ids::Generation;
use crate::observer::{Event, Observer};
use crate::ownership::{Arbiter, HostIdentity, Known, VmId};
use crate::primary::{address, arbiter, asked_of_rdma, certificates, validate_paces};
use crate::transport::{Address, Listener, ListenerWaker, name, rdma, tls};
use engine::{Ask, Engine, Input};

/// Bytes of staging that a request may ask for.
const STAGING_BYTES: std::ops::RangeInclusive<u64> = 1 << 20..=1 << 40;

/// A backup that listens, receives, or has taken over.
pub struct BackupHandle {
    inputs: Sender<Input>,
    status: Status,
    local: Address,
    identity: Arc<Mutex<HostIdentity>>,
    way_back: Arc<Mutex<Option<WayBack>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    arbiter: Option<String>,
    timeout: Duration,
}

/// A backup that is about to be: its options are usable, and its address is taken. Who connects waits until
/// it begins; dropping this lets go of the address.
pub struct Prepared {
    options: ReceiveReplicaData,
    rdma: Option<rdma::Asked>,
    arbiter: Option<Box<dyn Arbiter>>,
    tls: Option<tls::Server>,
    listener: Listener,
    waker: ListenerWaker,
}

impl std::fmt::Debug for Prepared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prepared").field("address", self.listener.address()).finish_non_exhaustive()
    }
}

/// Does all of a reception that may fail before anybody is heard.
///
/// # Errors
/// As [`receive`].
pub fn prepare(options: ReceiveReplicaData) -> Result<Prepared, Error> {
    let address = address("receiver_url", &options.receiver_url)?;
    prepare_at(&address, options)
}

/// Listens for a primary. Errors after that go to `observer`.
///
/// # Errors
/// [`Error::Option`] for options that contradict themselves or that this build lacks;
/// [`Error::Transport`] if it cannot listen.
pub fn receive<B: ReplicaBuilder>(
    builder: B,
    options: ReceiveReplicaData,
    observer: Arc<dyn Observer>,
) -> Result<BackupHandle, Error> {
    let address = address("receiver_url", &options.receiver_url)?;
    receive_at(builder, &address, options, HostIdentity::random(), observer)
}

/// As [`receive`], with what was prepared before, of this VM only.
///
/// # Errors
/// That no thread can be started.
pub fn receive_prepared<B: ReplicaBuilder>(
    builder: B,
    prepared: Prepared,
    vm: VmId,
    observer: Arc<dyn Observer>,
) -> Result<BackupHandle, Error> {
    begin(builder, prepared, (HostIdentity::random(), Some(vm)), None, observer)
}

/// As [`receive`], on the host that a VM was handed over from: with what that has of it. Where the pair was
/// reversed this side is the VM's backup from the first moment, and takes it over if its new primary does
/// not call.
///
/// # Errors
/// That no thread can be started.
pub fn receive_back<B: ReplicaBuilder>(
    builder: B,
    prepared: Prepared,
    legacy: Legacy,
    observer: Arc<dyn Observer>,
) -> Result<BackupHandle, Error> {
    let identity = legacy.identity;
    begin(builder, prepared, (identity, Some(identity.vm)), Some(legacy), observer)
}

/// As [`receive`], at an address that options cannot express (a port that the system picks) and
/// under a host's name that the caller knows; the VM's name comes from the primary.
///
/// # Errors
/// As [`receive`].
pub fn receive_at<B: ReplicaBuilder>(
    builder: B,
    address: &Address,
    options: ReceiveReplicaData,
    identity: HostIdentity,
    observer: Arc<dyn Observer>,
) -> Result<BackupHandle, Error> {
    begin(builder, prepare_at(address, options)?, (identity, None), None, observer)
}

fn prepare_at(address: &Address, options: ReceiveReplicaData) -> Result<Prepared, Error> {
    validate_paces(options.heartbeat_ms, options.timeout_ms)?;
    if !STAGING_BYTES.contains(&options.staging_size) {
        let reason = "expected 1 MiB to 1 TiB".to_owned();
        return Err(Error::Option { option: "staging_size", reason });
    }
    let numbers = [options.rdma_port, options.rdma_gid_index, options.rdma_depth];
    let rdma = asked_of_rdma(address, options.rdma_device.as_deref(), numbers)?;
    match rdma.as_ref().map_or(Ok(()), rdma::Asked::check) {
        Ok(()) => {}
        // A primary that hears so by the first data connection falls back.
        Err(error) if options.fallback => tracing::warn!("no RDMA yet: {}", chain(&error)),
        Err(error) => return Err(Error::Transport(error)),
    }
    if options.fallback && rdma.is_none() {
        let reason = "it is for rdma: only".to_owned();
        return Err(Error::Option { option: "fallback", reason });
    }
    let own = [&options.arbiter_tls_dir, &options.arbiter_credentials];
    let arbiter = arbiter(options.arbiter.as_deref(), own.map(Option::as_deref))?;
    let load = |directory: &Path, _: &str| tls::Server::load(directory);
    let tls = certificates(address, options.tls_dir.as_deref(), load)?;
    let (listener, waker) = Listener::bind(address).map_err(Error::Transport)?;
    Ok(Prepared { options, rdma, arbiter, tls, listener, waker })
}

fn begin<B: ReplicaBuilder>(
    builder: B,
    prepared: Prepared,
    (identity, only): (HostIdentity, Option<VmId>),
    legacy: Option<Legacy>,
    observer: Arc<dyn Observer>,
) -> Result<BackupHandle, Error> {
    let Prepared { options, rdma, arbiter, tls, listener, waker } = prepared;
    let local = listener.address().clone();
    let status = Status::default();
    status.lock().info.role = Role::Backup;
    status.lock().info.transport = Some(name(&local, tls.is_some()).to_owned());
    let timeout = Duration::from_millis(options.timeout_ms);
    let (inputs, queue) = unbounded();
    let deliver = inputs.clone();
    let acceptor = accept::start(
        listener,
        tls,
        timeout.max(Duration::from_secs(1)),
        move |arrival, place| deliver.send(Input::Arrival(arrival, place)).is_ok(),
    )?;
    look_at_arbiter(&options, &status);
    let identity = Arc::new(Mutex::new(identity));
    let way_back = Arc::default();
    let asked_at = options.arbiter.clone();
    let options = ReceiveReplicaData { receiver_url: local.to_string(), ..options };
    let engine = Engine::new(
        builder,
        (options, rdma),
        arbiter,
        (Arc::clone(&identity), Arc::clone(&way_back)),
        Arc::clone(&observer),
        (inputs.clone(), queue),
        status.clone(),
    )?
    .only(only);
    observer.event(Event::ReceiveReady { address: local.to_string() });
    let thread = spawn("repl-backup", None, move || {
        engine.run(legacy);
        drop(waker);
        if acceptor.join().is_err() {
            tracing::error!("The acceptor panicked");
        }
    })?;
    let thread = Mutex::new(Some(thread));
    Ok(BackupHandle {
        inputs,
        status,
        local,
        identity,
        way_back,
        thread,
        arbiter: asked_at,
        timeout,
    })
}

/// Tells whoever sets this host up what he would hear only after a first copy, when a primary says that the record
/// is there. It is no reason to refuse: storage may come later, and hang until then.
fn look_at_arbiter(options: &ReceiveReplicaData, status: &Status) {
    let own = [&options.arbiter_tls_dir, &options.arbiter_credentials];
    let opened = arbiter(options.arbiter.as_deref(), own.map(Option::as_deref));
    let Ok(Some(arbiter)) = opened else { return };
    let status = status.clone();
    let look = move || {
        if let Err(error) = arbiter.read() {
            let why = chain(&error);
            let line = format!(
                "The arbiter cannot be read, and until it can no VM is protected here: {why}"
            );
            tracing::warn!("{line}");
            let mut gathered = status.lock();
            // Storage may hang before it fails: what a session says by then is its own.
            if gathered.info.state == ReplicationState::Disconnected {
                gathered.info.last_error = Some(line);
            }
        }
    };
    if let Err(error) = spawn("repl-look", None, look) {
        tracing::warn!("nobody has looked whether the arbiter can be read: {}", error.chain());
    }
}

impl BackupHandle {
    /// Where replication stands.
    #[must_use]
    pub fn info(&self) -> ReplicationInfo {
        self.status.info()
    }

    /// Where this listens, with the port that was picked.
    #[must_use]
    pub fn local_address(&self) -> &Address {
        &self.local
    }

    /// This host's name, and that of the VM it received last: what a later protection of the VM
    /// that was taken over goes under.
    #[must_use]
    pub fn identity(&self) -> HostIdentity {
        *self.identity.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes under which generation the VM is this host's, once it was taken over.
    pub fn tell(&self, known: &Known) {
        let generation = Generation(self.info().generation);
        known.of(self.identity().vm, self.arbiter.as_deref()).raise(generation);
    }

    /// How the VM is to be protected from here, after a planned switch-over whose primary listens for
    /// that. Once: the first who asks has to see to it.
    #[must_use]
    pub fn take_way_back(&self) -> Option<WayBack> {
        self.way_back.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Whether a VM was taken over and nobody has asked yet how it is to be protected.
    #[must_use]
    pub fn has_way_back(&self) -> bool {
        let is_left = self.way_back.lock().unwrap_or_else(PoisonError::into_inner).is_some();
        is_left && self.info().state == ReplicationState::TakenOver
    }

    /// Ends the reception and discards the replica.
    ///
    /// # Errors
    /// [`Error::Conflict`] while taking over, or when it has.
    pub fn stop(&self) -> Result<(), Error> {
        self.ask(Ask::Stop)
    }

    /// Takes over from the last committed epoch; the VM runs when this returns.
    ///
    /// # Errors
    /// [`Error::Conflict`] if there is nothing to take over, the ownership is the peer's, or
    /// only `force` could say that it is not; else why the VM could not be started.
    pub fn failover(&self, force: bool) -> Result<(), Error> {
        self.ask(Ask::Failover { force })
    }

    fn ask(&self, ask: Ask) -> Result<(), Error> {
        let (answer, answered) = bounded(1);
        let gone = || Error::Conflict("The reception has ended already".to_owned());
        self.inputs.send(Input::Ask(ask, answer)).map_err(|_| gone())?;
        match answered.recv_timeout(self.timeout * 10) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Disconnected) => Err(gone()),
            Err(RecvTimeoutError::Timeout) => {
                let what = "The ownership is not decided yet; this goes on in the background";
                Err(Error::Failed(what.to_owned()))
            }
        }
    }

    /// What comes of a listener that is of no use any more.
    #[cfg(test)]
    pub(crate) fn break_listener(&self) {
        let broken = accept::Arrival::Broken("Nobody can be accepted any more".to_owned());
        self.inputs.send(Input::Arrival(broken, accept::Place::unlimited())).expect("it runs");
    }

    /// Whether the engine has ended: stopped, or taken over.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits for the engine to end.
    pub fn join(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("The backup's engine panicked");
        }
    }
}
