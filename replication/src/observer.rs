//! What a VMM is told while replication runs.

use crate::ids::Generation;

/// Receives the events of one side. Called from replication's own threads: must not block and
/// must not call back into the handle.
pub trait Observer: Send + Sync {
    /// Something happened.
    fn event(&self, event: Event);
}

/// Observes nothing.
impl Observer for () {
    fn event(&self, _event: Event) {}
}

/// One thing that happened; errors are whole chains in one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Primary: the backup accepted, the first copy begins.
    ReplicationStarted { peer: String },
    /// Primary: the first epoch is committed, the VM is protected.
    Synced,
    /// Primary: protected again after a time without.
    Resynced,
    /// Primary, after a switch-over that reversed the pair: the old host is connected as the backup that
    /// it has been since.
    Reversed,
    /// Primary: it owns the VM alone and runs, or stays paused, without protection.
    Degraded { reason: String, generation: Generation },
    /// Either side: ended by a person.
    Stopped,
    /// Primary: replication ended by an error before the VM was protected.
    Failed { error: String },
    /// Either side: ownership cannot be decided at the moment; output stays held, retries go on.
    Undecided { error: String },
    /// Either side: the peer owns the VM; this side's was destroyed or discarded.
    OwnershipLost { owner: String },
    /// Backup: listening.
    ReceiveReady { address: String },
    /// Backup: a primary was accepted.
    ReceiveStarted { peer: String },
    /// Backup: the session ended by an error; see `last_error` for what the backup does now.
    ReceiveFailed { error: String },
    /// A take-over or switch-over began, of a VM of this generation.
    FailoverStarted { reason: String, generation: Generation },
    /// The VM runs on its new host, which won this generation.
    FailoverFinished { generation: Generation },
    /// The take-over did not happen.
    FailoverFailed { error: String },
}
