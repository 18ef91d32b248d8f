//! From a call to an engine: which session it is, what the backup accepted, and what an engine is made of.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use api::replication::ReplicateData;
use crossbeam_channel::{Receiver, Sender};

use super::Input;
use crate::disk::Disks;
use crate::engine::arbiter::Asker;
use crate::engine::control::Control;
use crate::engine::heard::Heard;
use crate::engine::status::Status;
use crate::error::Error;
use crate::ids::Generation;
use crate::observer::Observer;
use crate::ownership::{Arbiter, HostId, HostIdentity, Seen};
use crate::primary::options::Checked;
use crate::primary::rest::Rest;
use crate::primary::send::Senders;
use crate::primary::session::{self, Session};
use crate::protocol::primary::Primary;
use crate::transport::{Stream, rdma};
use crate::wire::{FrameWriter, Offer, SessionId};

/// Which session of the VM it is.
pub(in crate::primary) enum Begin {
    /// The VM was never protected.
    First,
    /// It was protected before, and is alone.
    Again,
    /// It was handed over to this host in a switch-over that reversed the pair: it is protected
    /// already, and the session goes on from the last epoch of that.
    Reversed(Primary),
}

impl Begin {
    /// The machine of the session, where the record's generation is `generation`.
    pub(in crate::primary) fn machine(self, arbiter: bool, generation: Generation) -> Primary {
        match self {
            Self::First => Primary::new(arbiter, generation),
            Self::Again => Primary::again(arbiter, generation),
            Self::Reversed(machine) => machine,
        }
    }
}

/// What a backup accepted that was called: a session without its threads.
pub(in crate::primary) struct Called {
    pub(in crate::primary) options: ReplicateData,
    pub(in crate::primary) arbiter: Option<Box<dyn Arbiter>>,
    pub(in crate::primary) generation: Generation,
    pub(in crate::primary) session: Session,
}

impl Called {
    /// Whether the backup has what the copy may go on from.
    pub(in crate::primary) fn has_base(&self) -> bool {
        self.session.welcome.has_base
    }
}

/// Reads the record, connects and is welcomed: all that may block, and nothing that needs the guest.
pub(in crate::primary) fn call(
    checked: Checked,
    offer: Offer,
    identity: HostIdentity,
    status: Status,
    (seen, finds): (&Seen, rdma::Finds),
) -> Result<Called, Error> {
    let Checked { options, destination, rdma, fell_back: _, arbiter } = checked;
    let generation = match &arbiter {
        Some(arbiter) => {
            let record = arbiter.read().map_err(Error::Arbiter)?;
            seen.admit(record, identity)?
        }
        None => Generation(0),
    };
    let report = move |path| status.lock().info.rdma = Some(path);
    let adapter = rdma.map(|asked| |timeout| rdma::Adapter::new(asked, timeout, report, finds));
    let session = session::open(offer, &destination, &options, identity, adapter)?;
    Ok(Called { options, arbiter, generation, session })
}

/// Whom an engine works for and with: all that is not of one session.
pub(in crate::primary) struct Around {
    pub(in crate::primary) identity: HostIdentity,
    pub(in crate::primary) backup: HostId,
    pub(in crate::primary) observer: Arc<dyn Observer>,
    pub(in crate::primary) status: Status,
    /// What this process knows of the record.
    pub(in crate::primary) seen: Seen,
}

/// What carries out what an engine wants: threads that run, or what a simulator has in their place.
pub(in crate::primary) struct Crew {
    pub(in crate::primary) id: SessionId,
    pub(in crate::primary) queue: Receiver<Input>,
    /// Keeps the queue open when every other sender is gone.
    pub(in crate::primary) inputs: Sender<Input>,
    pub(in crate::primary) asker: Asker,
    pub(in crate::primary) control: Control,
    pub(in crate::primary) senders: Senders,
    pub(in crate::primary) heard: Heard,
    /// What the backup says it has done.
    pub(in crate::primary) done: Arc<AtomicU64>,
    pub(in crate::primary) lender: Option<rdma::Lender>,
}

/// The disks whose images are copied, and where to.
pub(in crate::primary) type Copied = (Arc<dyn Disks>, FrameWriter<Box<dyn Stream>>);

/// How a session ended that another one may follow.
pub(in crate::primary) struct Ended {
    /// What the backup may have of it, while the tracking of dirty pages goes on.
    pub(in crate::primary) rest: Option<Rest>,
    /// Why data is to go by TCP in the next one.
    pub(in crate::primary) no_rdma: Option<String>,
    /// The guest's memory, if it is registered with an RDMA device.
    pub(in crate::primary) registered: Option<rdma::Kept>,
}
