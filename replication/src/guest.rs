//! What a VMM implements so that its guest can be protected ([`Guest`]) or received
//! ([`ReplicaBuilder`], [`Replica`]).
//!
//! The engine drives these from its own threads and never from two at once. A benchmark or the
//! simulator implements them with plain memory, so the subsystem runs without KVM.
//!
//! ```text
//! primary, an epoch:   (hold ->) quiesce -> harvest -> capture -> seal_output -> release
//!                      ... encode, send, wait for the backup's software ...
//!                      commit_output
//! backup:              build -> (ram written) -> parse -> ... -> start
//! ```

use std::error::Error;
use std::fmt;
use std::sync::Arc;

use api::replication::ReplicateData;

use crate::disk::{Disks, ReplicaDisk};
use crate::ids::EpochId;
use crate::ram::{PageSet, Ram};

/// An error of the VMM: replication passes it on with its whole chain and adds what it was doing.
pub type GuestError = Box<dyn Error + Send + Sync>;

/// Machine state as captured during a pause; it is turned into bytes after the guest runs again.
pub trait MachineState: Send + 'static {
    /// Appends the versioned binary form to `out`.
    fn encode(&self, out: &mut Vec<u8>) -> Result<(), GuestError>;
}

/// A machine that can be protected.
pub trait Guest: Send + 'static {
    /// What [`Guest::capture`] fills.
    type State: MachineState;

    /// The guest's memory. The same for the life of the guest.
    fn ram(&self) -> Ram;

    /// The disks whose images the backup shall have too. The same for the life of the guest.
    fn disks(&self) -> Option<Arc<dyn Disks>> {
        None
    }

    /// What a backup needs to build the same machine: opaque to replication, at most
    /// [`crate::guest::DESCRIPTION_BYTES_MAX`] bytes.
    fn describe(&mut self) -> Result<Vec<u8>, GuestError>;

    /// Turns dirty tracking on. Every page counts as dirty until the first harvest.
    fn start_tracking(&mut self) -> Result<(), GuestError>;

    /// How writes are tracked, for whoever reads replication-info.
    fn tracking_name(&self) -> Option<&'static str> {
        None
    }

    /// Turns dirty tracking off; the guest runs as fast as an unprotected one.
    fn stop_tracking(&mut self) -> Result<(), GuestError>;

    /// Stops every vCPU and parks every device at a request boundary. On return nobody writes
    /// guest memory and no device state changes until [`Guest::release`]. Waits for nothing that
    /// the host's disks or network could delay, but for the RDMA device where a vCPU or a device writes
    /// a page that it reads: until its completion, or the session's patience. Has no side effect that a
    /// client can see.
    fn quiesce(&mut self) -> Result<(), GuestError>;

    /// As [`Guest::quiesce`], for a guest that only has to wait: nothing of it is going to be captured
    /// before a [`Guest::quiesce`] that follows, or that ends with the next release.
    fn hold(&mut self) -> Result<(), GuestError> {
        self.quiesce()
    }

    /// Adds to `dirty` every page that was written since the last harvest (the set may be larger
    /// than the truth, never smaller) and re-arms the tracking. Allowed while the guest runs.
    fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), GuestError>;

    /// How many pages were written since the last harvest, counted without re-arming the tracking, so
    /// that the guest pays nothing for it. `None` if that cannot be had: then no epoch is longer than
    /// `epoch_ms`, since what it grows to has to be watched. Asked while the guest runs.
    fn written_pages(&mut self) -> Result<Option<u64>, GuestError> {
        Ok(None)
    }

    /// Removes from `pages` those that nobody ever wrote, as far as that is known: they read as zero,
    /// and reading them would cost the host a page each. Asked after a harvest, while the guest runs;
    /// what is written after that harvest is in the next one.
    fn drop_untouched(&mut self, pages: &mut PageSet) {
        let _ = pages;
    }

    /// Reads vCPU and device state. Only between quiesce and release.
    fn capture(&mut self) -> Result<Self::State, GuestError>;

    /// From now on output is held until its epoch is committed.
    fn hold_output(&mut self);

    /// Tags all output that was produced since the last seal with `epoch`. Only while quiesced.
    fn seal_output(&mut self, epoch: EpochId);

    /// Waits a moment for what was released to leave this host, so that the state of the last epoch
    /// of a switch-over does not carry it too. Only while quiesced.
    fn settle_output(&mut self) {}

    /// Lets the guest run on, unless a person paused the VM.
    fn release(&mut self) -> Result<(), GuestError>;

    /// Lets out whatever was tagged with `epoch` or an earlier one.
    fn commit_output(&mut self, epoch: EpochId);

    /// The backup has the last epoch of a switch-over. What that epoch's machine state carries is
    /// the backup's to say and stays held; everything else leaves here, as at a commit.
    fn hand_over_output(&mut self, epoch: EpochId) {
        self.commit_output(epoch);
    }

    /// Lets out everything and holds nothing more: this side owns the VM alone, or replication
    /// was stopped by a person.
    fn pass_output(&mut self);

    /// Bytes held at the moment.
    fn output_held_bytes(&self) -> u64;

    /// Whether output waits that no seal has tagged yet. Asked while no epoch is in flight.
    fn output_waiting(&self) -> bool {
        self.output_held_bytes() > 0
    }

    /// Where to tell that output begins to wait, so that an epoch can be sealed early. Without
    /// a call the engine looks at [`Guest::output_waiting`] only when an epoch ends.
    fn set_output_waker(&mut self, waker: Waker) {
        drop(waker);
    }

    /// Keeps the guest paused until a person resumes it or [`Guest::regain`] (degrade=pause).
    fn suspend(&mut self) -> Result<(), GuestError>;

    /// Ends what [`Guest::suspend`] began, if nobody did meanwhile: the VM is protected again. A pause
    /// that a person asked for goes on.
    fn regain(&mut self) -> Result<(), GuestError>;

    /// The peer owns the VM: destroy this one without letting out a byte of what is held.
    fn destroy(&mut self);
}

/// Tells the engine that output waits. Cheap, never blocks, callable from any thread; calls
/// between two seals count once.
#[derive(Clone)]
pub struct Waker(Arc<dyn Fn() + Send + Sync>);

impl Waker {
    pub(crate) fn new(wake: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(wake))
    }

    /// Output waits.
    pub fn wake(&self) {
        (self.0)();
    }
}

impl fmt::Debug for Waker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Waker")
    }
}

/// Most bytes of a description, and of one epoch's machine state.
pub const DESCRIPTION_BYTES_MAX: usize = 1 << 20;
/// Most bytes of the machine state of one epoch.
pub const STATE_BYTES_MAX: usize = 64 << 20;

/// Builds the machine that will receive a replica.
pub trait ReplicaBuilder: Send + 'static {
    /// The machine that was built.
    type Replica: Replica;

    /// Allocates memory and devices after a primary's description. The machine does not run,
    /// takes no image lock and touches no network. `ram_bytes` is what the primary says its
    /// memory holds: the result must have exactly that, or an error says so.
    fn build(&mut self, description: &[u8]) -> Result<Self::Replica, GuestError>;

    /// A replica that was built before is received again, after a while in which it was kept for its
    /// memory's sake.
    fn reuse(&mut self, replica: &mut Self::Replica) {
        let _ = replica;
    }

    /// Whether a machine that was built here after the one description is what would be built after
    /// the other.
    fn is_same(&self, one: &[u8], other: &[u8]) -> bool {
        one == other
    }
}

/// A machine that waits for its take-over.
pub trait Replica: Send + 'static {
    /// Machine state, parsed and checked, ready to be loaded.
    type State: Send + 'static;

    /// The memory into which committed pages go.
    fn ram(&self) -> Ram;

    /// Opens the images into which the primary's disks go, in its order: of this machine alone, and
    /// written from the first copy on. Called if the primary replicates disks.
    ///
    /// # Errors
    /// An image that cannot be had, or that somebody else has.
    fn open_disks(&mut self) -> Result<Vec<Arc<dyn ReplicaDisk>>, GuestError> {
        Ok(vec![])
    }

    /// Parses and checks one epoch's machine state; called before the epoch is acknowledged, so a
    /// state that this host could not load is refused while the primary still runs.
    fn parse(&mut self, state: &[u8]) -> Result<Self::State, GuestError>;

    /// Whether the host lends what the VM needs to run here, so far as that can be tried without taking it.
    /// Asked when the replica is built, for a warning, and before the last epoch of a switch-over is
    /// acknowledged, which is refused otherwise: the primary lives and can go on. A take-over from a primary
    /// that is lost does not ask.
    ///
    /// # Errors
    /// What the host does not lend.
    fn ready(&mut self) -> Result<(), GuestError> {
        Ok(())
    }

    /// From here on pages that the guest, its devices or the VMM write are noted, as after
    /// [`Guest::start_tracking`] and a first harvest. Called before a take-over whose other side keeps its
    /// memory; what was noted up to [`Replica::start`] may be forgotten there.
    ///
    /// # Errors
    /// Nothing can be noted: then the way back copies everything.
    fn track(&mut self) -> Result<(), GuestError> {
        Err("This machine does not note what is written before it is protected".into())
    }

    /// Loads the state and lets the guest run: it is now an ordinary VM of its VMM. With `held`, which are the
    /// options that it is to be protected with, its output is held from before the state is loaded, as
    /// after [`Guest::hold_output`].
    fn start(self, state: Self::State, held: Option<&ReplicateData>) -> Result<(), GuestError>;
}
