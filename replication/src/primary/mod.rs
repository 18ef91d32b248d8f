//! Protecting a guest.
//!
//! ```text
//!  repl-engine    owns the guest and the state machine; seals, commits, decides
//!  repl-setup     makes the data connections, and ends
//!  repl-send-N    pages of one data connection
//!  repl-disk      first copies and logs of the disks
//!  repl-ctl       what the backup says
//!  repl-beat      what it is told, heartbeats in between
//!  repl-arbiter   asks the arbiter
//!  repl-bell      dies with the process, at once, so that the backup hears of it
//! ```
//!
//! Enters: a guest and options. Leaves: its state at the backup, and its output once that is so.

mod bell;
mod disk;
mod engine;
mod options;
mod patience;
mod seal;
mod send;
mod session;

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use api::replication::{ReplicateData, ReplicationInfo, ReplicationState, Role};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};

pub(crate) use options::{address, arbiter, asked_of_rdma, certificates, validate_paces};
pub(crate) use session::layout;

use crate::engine::spawn;
use crate::engine::status::Status;
use crate::error::Error;
use crate::guest::Guest;
use crate::observer::{Event, Observer};
use crate::ownership::HostIdentity;
use crate::transport::{Destination, name};
use engine::{Ask, Engine, Input};
use options::Checked;

/// A guest under protection. Dropping the handle ends nothing.
pub struct PrimaryHandle {
    inputs: Sender<Input>,
    status: Status,
    thread: std::sync::Mutex<Option<JoinHandle<()>>>,
    identity: HostIdentity,
    timeout: Duration,
}

/// Begins to protect `guest`. Returns once the backup has accepted, or with the error why not,
/// or, if neither is known after the peer timeout, while that goes on: then `observer` is told.
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
    observer: Arc<dyn Observer>,
) -> Result<PrimaryHandle, Error> {
    let checked = Checked::new(options)?;
    let status = Status::default();
    {
        let mut gathered = status.lock();
        gathered.info.role = Role::Primary;
        gathered.info.state = ReplicationState::Syncing;
        gathered.info.peer = Some(checked.options.destination_url.clone());
        let Destination { address, tls } = &checked.destination;
        gathered.info.transport = Some(name(address, tls.is_some()).to_owned());
        gathered.info.dirty_log = guest.tracking_name().map(str::to_owned);
    }
    let timeout = Duration::from_millis(checked.options.timeout_ms);
    let (inputs, queue) = unbounded();
    // A rendezvous: either the caller takes the verdict or, having left, never sees it.
    let (verdict, first) = bounded(0);
    let worker = Worker { inputs: inputs.clone(), queue, status: status.clone(), verdict };
    let thread = spawn("repl-engine", None, move || {
        worker.run(guest, checked, identity, observer);
    })?;
    match first.recv_timeout(timeout) {
        Ok(Err(error)) => {
            join(thread);
            return Err(error);
        }
        Ok(Ok(())) | Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
    }
    let thread = std::sync::Mutex::new(Some(thread));
    Ok(PrimaryHandle { inputs, status, thread, identity, timeout })
}

fn join(thread: JoinHandle<()>) {
    if thread.join().is_err() {
        tracing::error!("A replication thread panicked");
    }
}

struct Worker {
    inputs: Sender<Input>,
    queue: Receiver<Input>,
    status: Status,
    verdict: Sender<Result<(), Error>>,
}

impl Worker {
    fn run(
        self,
        guest: impl Guest,
        checked: Checked,
        identity: HostIdentity,
        observer: Arc<dyn Observer>,
    ) {
        let Self { inputs, queue, status, verdict } = self;
        let peer = checked.options.destination_url.clone();
        let opened =
            Engine::open(guest, checked, identity, observer.clone(), inputs, queue, status.clone());
        match opened {
            Ok(engine) => {
                observer.event(Event::ReplicationStarted { peer });
                // The caller may have stopped waiting.
                let _ = verdict.send(Ok(()));
                engine.run();
            }
            Err(error) => {
                let line = error.chain();
                status.lock().info.state = ReplicationState::Stopped;
                status.failed(&line);
                if verdict.send(Err(error)).is_err() {
                    observer.event(Event::Failed { error: line });
                }
            }
        }
    }
}

impl PrimaryHandle {
    /// Where replication stands.
    #[must_use]
    pub fn info(&self) -> ReplicationInfo {
        self.status.info()
    }

    /// The names under which this side owns the VM.
    #[must_use]
    pub fn identity(&self) -> HostIdentity {
        self.identity
    }

    /// Ends the protection: the VM runs on, its output passes once this host owns it alone, and
    /// the backup discards its replica.
    ///
    /// # Errors
    /// [`Error::Conflict`] if the backup owns the VM; [`Error::Failed`] if the ownership is not
    /// decided within the peer timeout: that goes on in the background, output stays held.
    pub fn stop(&self) -> Result<(), Error> {
        self.ask(Ask::Stop)
    }

    /// Hands the VM over to the backup, which runs it when this returns.
    ///
    /// # Errors
    /// [`Error::Conflict`] if the VM is not protected at the moment; else why the VM stayed here.
    pub fn failover(&self, _force: bool) -> Result<(), Error> {
        self.ask(Ask::Failover)
    }

    fn ask(&self, ask: Ask) -> Result<(), Error> {
        let (answer, answered) = bounded(1);
        let gone = || Error::Conflict("Replication has ended already".to_owned());
        self.inputs.send(Input::Ask(ask, answer)).map_err(|_| gone())?;
        // A person waits: long enough for a slow arbiter, not for a dead one.
        match answered.recv_timeout(self.timeout * 10) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Disconnected) if ask == Ask::Stop => {
                // It ended by itself in the same moment.
                Ok(())
            }
            Err(RecvTimeoutError::Disconnected) => Err(gone()),
            Err(RecvTimeoutError::Timeout) => {
                let what = "The ownership is not decided yet; this goes on in the background";
                Err(Error::Failed(what.to_owned()))
            }
        }
    }

    /// Pauses that were measured so far, up to the window's size.
    #[cfg(test)]
    pub(crate) fn pauses(&self) -> u64 {
        self.status.lock().pause_us.count()
    }

    /// Whether the engine has ended: the VM is unprotected, or gone.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        let thread = self.thread.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits for the engine to end.
    pub fn join(&self) {
        let thread = {
            let mut slot = self.thread.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            slot.take()
        };
        if let Some(thread) = thread {
            join(thread);
        }
    }
}
