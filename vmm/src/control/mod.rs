//! The control loop: one thread owns the VM's life, everybody else sends it messages.
//!
//! ```text
//!   HTTP connections --Call--------+
//!   vCPU threads ------MachineEvent+--> Controller --> Machine, replication handles, events
//!   replication -------Notice------+
//!   signals -----------Notice------+
//! ```
//!
//! Always holds: at most one VM exists; what may take long without changing the VM's life
//! (a snapshot, a fail-over, ending a replication) runs beside the loop and answers its client
//! itself, so a ping is always served.

mod command_line;
mod ending;
mod leaving;
mod lifecycle;
mod protection;
mod report;
mod signals;
#[cfg(test)]
mod tests;
mod way_back;

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Weak};

use api::config::VmConfig;
use crossbeam_channel::{Receiver, Sender, select, unbounded};
use hypervisor::{Hypervisor, OpenError};
use replication::primary::PrimaryHandle;
use replication::{Event, HostIdentity, Known};
use thiserror::Error;

use crate::device_manager::taps::TapDescriptors;
use crate::event::EventMonitor;
use crate::http::{self, HttpError, HttpServer};
use crate::machine::{Machine, MachineError};
use crate::options::Options;
use crate::request::{Call, Failure, FailureKind, Reply, Request};
use ending::{After, Parting};
use leaving::Leaving;
use protection::Protection;

pub use lifecycle::check_config;
pub use signals::block as block_signals;

/// The VMM could not start, or ended with an error.
#[derive(Debug, Error)]
pub enum Error {
    #[error("Cannot use KVM")]
    Kvm(#[source] OpenError),
    #[error("Cannot block signals")]
    Signals(#[source] nix::errno::Errno),
    #[error("Cannot start a thread")]
    Thread(#[source] std::io::Error),
    #[error("Cannot serve the API")]
    Http(#[source] HttpError),
    #[error("{what}")]
    Request { what: &'static str, source: Chain },
    #[error("{0}")]
    Ended(String),
}

/// A failure's chain of messages as an error with sources.
#[derive(Debug, Error)]
#[error("{message}")]
pub struct Chain {
    message: String,
    source: Option<Box<Chain>>,
}

impl Chain {
    fn new(failure: &Failure) -> Self {
        let mut messages = failure.chain.iter().rev().cloned();
        let mut chain = Self { message: messages.next().unwrap_or_default(), source: None };
        for message in messages {
            chain = Self { message, source: Some(Box::new(chain)) };
        }
        chain
    }
}

/// What other threads tell the control loop.
pub enum Notice {
    /// SIGTERM or SIGINT.
    Terminate,
    /// A replica was built after a primary's description.
    ReplicaBuilt(Weak<Machine>),
    /// A replica runs: it is this VMM's VM from now on.
    TookOver {
        machine: Arc<Machine>,
        /// Its output is held: the pair stands, and its old host has to be called.
        is_held: bool,
    },
    /// The backup accepted the VM, or did not; a client waits for the answer.
    Protected {
        machine: Arc<Machine>,
        handle: Result<Arc<PrimaryHandle>, Failure>,
        reply: Sender<Answer>,
    },
    /// The protection of a VM that is to end has ended.
    ProtectionEnded(After, Parting),
    /// The replication with this number says what happened.
    Replication { protection: u64, event: Event },
    /// A reset has ended; a client may wait for the answer.
    Reset {
        machine: Weak<Machine>,
        result: Result<(), MachineError>,
        reply: Option<Sender<Answer>>,
    },
}

/// How the process ends.
enum Ending {
    Clean,
    Failed(String),
}

/// Answers that handlers give.
type Answer = Result<Reply, Failure>;

struct Controller {
    hypervisor: Arc<Hypervisor>,
    monitor: EventMonitor,
    no_shutdown: bool,
    /// Clients can reach this process, so it outlives its VM.
    has_api: bool,
    config: Option<VmConfig>,
    /// Of the cards in the configuration.
    taps: TapDescriptors,
    machine: Option<Arc<Machine>>,
    /// The one before.
    leaving: Leaving,
    /// The guest shut itself down and `--no-shutdown` keeps the process.
    guest_is_down: bool,
    /// The VM is being ended: its protection ends beside the loop.
    winding_down: bool,
    /// A reset is under way beside the loop.
    resetting: bool,
    /// A snapshot is being written beside the loop.
    snapshots: Arc<AtomicBool>,
    protection: Protection,
    /// Number of the last protection: events of an earlier one change nothing.
    protections: u64,
    /// The number of the one whose events are of the VM that is here.
    heard: u64,
    /// The names that this process and its VM go under in the arbiter's records. They outlive a
    /// protection, so that the VM's owner is recognised when it protects it again.
    identity: HostIdentity,
    /// What this process knows of those records; it outlives protections as well.
    known: Known,
    notices: Sender<Notice>,
    ending: Option<Ending>,
}

/// Runs the VMM until its VM or its client ends it.
pub fn run(options: Options) -> Result<(), Error> {
    let (calls, call_queue) = unbounded();
    let (notices, notice_queue) = unbounded();
    block_signals()?;
    signals::watch(notices.clone())?;
    let hypervisor = Arc::new(Hypervisor::open().map_err(Error::Kvm)?);
    let has_api = options.api_socket.is_some();
    let server = options.api_socket.map(|socket| http::serve(socket, calls)).transpose();
    let server = server.map_err(Error::Http)?;
    let mut controller = Controller::new(hypervisor, options.event_monitor, notices);
    (controller.no_shutdown, controller.has_api) = (options.no_shutdown, has_api);
    controller.monitor.emit("vmm", "starting", None);
    let mut first = Vec::new();
    if let Some(config) = options.config {
        first.push(("Cannot create the VM", Request::VmCreate(Box::new(config)), options.tap_fds));
        first.push(("Cannot boot the VM", Request::VmBoot, vec![]));
    }
    if let Some(restore) = options.restore {
        first.push(("Cannot restore the VM", Request::VmRestore(restore), options.restore_fds));
    }
    if let Some(replicate) = options.replicate {
        first.push(("Cannot protect the VM", Request::VmReplicate(Box::new(replicate)), vec![]));
    }
    if let Some(receive) = options.receive_replica {
        first.push(("Cannot be a backup", Request::VmReceiveReplica(Box::new(receive)), vec![]));
    }
    // Without an API the sender is gone and the channel would be ready for ever.
    let call_queue = if has_api { call_queue } else { crossbeam_channel::never() };
    controller.start(first, &call_queue, &notice_queue)?;
    controller.work(&call_queue, &notice_queue);
    controller.finish(call_queue, server)
}

impl Controller {
    /// Without a VM.
    fn new(hypervisor: Arc<Hypervisor>, monitor: EventMonitor, notices: Sender<Notice>) -> Self {
        Self {
            hypervisor,
            monitor,
            no_shutdown: false,
            has_api: true,
            config: None,
            taps: TapDescriptors::default(),
            machine: None,
            leaving: Leaving::default(),
            guest_is_down: false,
            winding_down: false,
            resetting: false,
            snapshots: Arc::default(),
            protection: Protection::None,
            protections: 0,
            heard: 0,
            identity: HostIdentity::random(),
            known: Known::default(),
            notices,
            ending: None,
        }
    }

    fn work(&mut self, calls: &Receiver<Call>, notices: &Receiver<Notice>) {
        while self.ending.is_none() {
            // What has come about before what is asked for: a VM that was taken over is this process's, and
            // no room for another one.
            if let Ok(notice) = notices.try_recv() {
                self.notice(notice);
                continue;
            }
            // Not the machine itself: serving a call may have to let go of it.
            let machine = self.machine.as_ref().filter(|_| self.hears_guest());
            let events = machine.map(|machine| machine.events().clone());
            let events = events.unwrap_or_else(crossbeam_channel::never);
            select! {
                recv(calls) -> call => if let Ok(call) = call { self.serve(call) },
                recv(events) -> event => if let Ok(event) = event { self.machine_event(event) },
                recv(notices) -> notice => if let Ok(notice) = notice { self.notice(notice) },
            }
        }
    }

    fn finish(mut self, calls: Receiver<Call>, server: Option<HttpServer>) -> Result<(), Error> {
        self.take_down();
        self.monitor.emit("vmm", "shutdown", None);
        // Whoever still waits in the queue learns that nobody will serve it.
        drop(calls);
        drop(server);
        match self.ending {
            Some(Ending::Failed(what)) => Err(Error::Ended(what)),
            _ => Ok(()),
        }
    }

    /// Answers a client, or leaves that to a thread that it starts.
    fn serve(&mut self, call: Call) {
        let Call { request, fds, reply } = call;
        let refused = self
            .refuse_while_ending(&request)
            .and_then(|()| self.refuse_while_saving(&request))
            .and_then(|()| self.refuse_while_handing_over(&request));
        if let Err(failure) = refused {
            let _ = reply.send(Err(failure));
            return;
        }
        let answer = match request {
            Request::VmmPing => report::ping(),
            Request::VmmShutdown => {
                self.ending = Some(Ending::Clean);
                Ok(Reply::Empty)
            }
            Request::VmCreate(config) => self.create(*config, fds),
            Request::VmDelete => return self.delete(reply),
            Request::VmBoot => self.boot(),
            Request::VmPause => self.pause(),
            Request::VmResume => self.resume(),
            Request::VmShutdown => return self.shutdown(reply),
            Request::VmReboot => return self.reboot(reply),
            Request::VmPowerButton => self.power_button(),
            Request::VmInfo => self.info(),
            Request::VmCounters => self.counters(),
            Request::VmAddDisk(disk) => self.add_disk(*disk),
            Request::VmAddNet(card) => self.add_net(*card, fds),
            Request::VmSnapshot(config) => return self.snapshot(config, reply),
            Request::VmRestore(config) => self.restore(&config, fds),
            Request::VmReplicate(data) => return self.replicate(*data, reply),
            Request::VmReceiveReplica(data) => self.receive_replica(*data),
            Request::VmStopReplication => return self.stop_replication(reply),
            Request::VmFailover(data) => return self.failover(data.force, reply),
            Request::VmReplicationInfo => self.replication_info(),
            Request::VmSendMigration(_) | Request::VmReceiveMigration(_) => Err(Failure::new(
                FailureKind::Internal,
                "Live migration is not a part of this version: use vm.replicate and vm.failover",
            )),
        };
        // A client that went away has no use for its answer.
        let _ = reply.send(answer);
    }

    /// Runs `work` beside the loop; it ends with an answer to the client.
    fn beside(name: &str, reply: Sender<Answer>, work: impl FnOnce() -> Answer + Send + 'static) {
        let fallback = reply.clone();
        let started = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || drop(reply.send(work())));
        if let Err(error) = started {
            let failure = Failure::new(FailureKind::Internal, "Cannot start a thread");
            let chain = [failure.chain, vec![error.to_string()]].concat();
            let _ = fallback.send(Err(Failure { chain, ..failure }));
        }
    }

    fn notice(&mut self, notice: Notice) {
        match notice {
            Notice::Terminate => self.ending = Some(Ending::Clean),
            Notice::ReplicaBuilt(machine) => self.protection.waits_in(machine),
            Notice::TookOver { machine, is_held } => self.adopt(machine, is_held),
            Notice::Protected { machine, handle, reply } => {
                self.protected(&machine, handle, reply);
                if !self.machine.as_ref().is_some_and(|ours| Arc::ptr_eq(ours, &machine)) {
                    // It was ended meanwhile, and this may be all that is left of it.
                    self.let_go(Some(machine), None);
                }
            }
            Notice::ProtectionEnded(after, parting) => self.parted(after, parting),
            Notice::Replication { protection, event } => {
                self.replication_event(protection, event);
            }
            Notice::Reset { machine, result, reply } => self.was_reset(&machine, result, reply),
        }
    }
}
