//! Commit: an epoch is whole once its seal and a matching part of every connection are here. Those
//! in flight after it are gathered meanwhile, and handed out in their order.

use std::collections::VecDeque;

use thiserror::Error;

use super::disks::DiskPart;
use super::staging::Part;
use crate::ids::EpochId;
use crate::protocol::primary::IN_FLIGHT_MAX;
use crate::wire::Seal;

/// Why what arrived is no epoch.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum CommitError {
    #[error("Epoch {found} arrived where {due} was due")]
    Order { due: EpochId, found: EpochId },
    #[error("Epoch {0} was sealed twice")]
    Twice(EpochId),
    #[error("Epoch {epoch} names {found} connections of {expected}")]
    Connections { epoch: EpochId, expected: usize, found: usize },
    #[error("Epoch {epoch} has {found} pages on connection {connection}, its seal says {sealed}")]
    Pages { epoch: EpochId, connection: usize, found: u64, sealed: u64 },
    #[error("Epoch {epoch} has {found} changes of disks, its seal says {sealed}")]
    Changes { epoch: EpochId, found: u64, sealed: u64 },
}

/// A whole epoch.
#[derive(Debug)]
pub(super) struct Epoch {
    pub(super) seal: Seal,
    pub(super) parts: Vec<Part>,
    /// Empty where there are no disks.
    pub(super) disks: DiskPart,
}

impl Epoch {
    /// What it took of the staging.
    pub(super) fn cost_bytes(&self) -> u64 {
        let pages: u64 = self.parts.iter().map(|part| part.cost_bytes).sum();
        pages + self.disks.cost_bytes
    }
}

/// An epoch of which something is here.
#[derive(Debug)]
struct Gathering {
    seal: Option<Seal>,
    parts: Vec<Option<Part>>,
    disks: Option<DiskPart>,
}

/// Gathers the epochs that are in flight.
#[derive(Debug)]
pub(super) struct Gather {
    connections: usize,
    /// Whether each epoch has a part of the disks.
    has_disks: bool,
    /// The one that is due, and those after it.
    epochs: VecDeque<Gathering>,
}

impl Gather {
    pub(super) fn new(connections: usize, has_disks: bool) -> Self {
        Self { connections, has_disks, epochs: VecDeque::new() }
    }

    /// Forgets everything; returns what it took of the staging.
    pub(super) fn clear(&mut self) -> u64 {
        let cost = |of: Gathering| {
            let pages: u64 = of.parts.iter().flatten().map(|part| part.cost_bytes).sum();
            pages + of.disks.map_or(0, |disks| disks.cost_bytes)
        };
        self.epochs.drain(..).map(cost).sum()
    }

    /// What is here of `epoch`, where `due` is the first that may come.
    fn of(&mut self, epoch: EpochId, due: EpochId) -> Result<&mut Gathering, CommitError> {
        let order = CommitError::Order { due, found: epoch };
        let ahead = epoch.0.checked_sub(due.0).filter(|ahead| *ahead < IN_FLIGHT_MAX);
        let ahead = ahead.and_then(|ahead| usize::try_from(ahead).ok()).ok_or(order)?;
        while self.epochs.len() <= ahead {
            let parts = (0..self.connections).map(|_| None).collect();
            self.epochs.push_back(Gathering { seal: None, parts, disks: None });
        }
        Ok(&mut self.epochs[ahead])
    }

    /// A seal arrived.
    pub(super) fn seal(&mut self, seal: Seal, due: EpochId) -> Result<(), CommitError> {
        let (epoch, expected, found) = (seal.epoch, self.connections, seal.pages.len());
        let of = self.of(epoch, due)?;
        if of.seal.is_some() {
            return Err(CommitError::Twice(epoch));
        }
        if found != expected {
            return Err(CommitError::Connections { epoch, expected, found });
        }
        of.seal = Some(seal);
        Ok(())
    }

    /// A connection's part arrived.
    pub(super) fn part(
        &mut self,
        connection: usize,
        part: Part,
        due: EpochId,
    ) -> Result<(), CommitError> {
        let epoch = part.epoch;
        match self.of(epoch, due)?.parts.get_mut(connection) {
            Some(slot @ None) => *slot = Some(part),
            _ => return Err(CommitError::Twice(epoch)),
        }
        Ok(())
    }

    /// The disks' part arrived.
    pub(super) fn disk_part(&mut self, part: DiskPart, due: EpochId) -> Result<(), CommitError> {
        let epoch = part.epoch;
        if self.of(epoch, due)?.disks.replace(part).is_some() {
            return Err(CommitError::Twice(epoch));
        }
        Ok(())
    }

    /// What is here of the epoch that is due, sealed and not whole: for a rule that is broken on purpose.
    #[cfg(any(test, feature = "testing"))]
    pub(super) fn take_staged(&mut self) -> Option<(Seal, Vec<Part>)> {
        let Gathering { seal: Some(seal), parts, .. } = self.epochs.pop_front()? else {
            return None;
        };
        Some((seal, parts.into_iter().flatten().collect()))
    }

    /// Hands out the epoch that is due once it is whole.
    pub(super) fn whole(&mut self) -> Result<Option<Epoch>, CommitError> {
        let has_disks = self.has_disks;
        let is_whole = |of: &Gathering| {
            let disks = !has_disks || of.disks.is_some();
            of.seal.is_some() && disks && of.parts.iter().all(Option::is_some)
        };
        if !self.epochs.front().is_some_and(is_whole) {
            return Ok(None);
        }
        let Some(Gathering { seal: Some(seal), parts, disks }) = self.epochs.pop_front() else {
            return Ok(None);
        };
        let parts: Vec<Part> = parts.into_iter().flatten().collect();
        for (connection, (part, sealed)) in parts.iter().zip(&seal.pages).enumerate() {
            let (epoch, found, sealed) = (seal.epoch, part.sum.pages, *sealed);
            if found != sealed {
                return Err(CommitError::Pages { epoch, connection, found, sealed });
            }
        }
        let disks = disks.unwrap_or_default();
        if disks.sum.pages != seal.changes {
            let (epoch, found, sealed) = (seal.epoch, disks.sum.pages, seal.changes);
            return Err(CommitError::Changes { epoch, found, sealed });
        }
        Ok(Some(Epoch { seal, parts, disks }))
    }
}
