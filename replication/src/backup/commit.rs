//! Commit: an epoch is whole once its seal and a matching part of every connection are here.

use thiserror::Error;

use super::disks::DiskPart;
use super::staging::Part;
use crate::ids::EpochId;
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

/// Gathers one epoch.
#[derive(Debug)]
pub(super) struct Gather {
    seal: Option<Seal>,
    parts: Vec<Option<Part>>,
    /// Whether one is due, and the one that is here.
    has_disks: bool,
    disks: Option<DiskPart>,
}

impl Gather {
    pub(super) fn new(connections: usize, has_disks: bool) -> Self {
        let parts = (0..connections).map(|_| None).collect();
        Self { seal: None, parts, has_disks, disks: None }
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.seal = None;
        self.parts.iter_mut().for_each(|part| *part = None);
        self.disks = None;
    }

    /// A seal arrived, where `due` is the epoch that may.
    pub(super) fn seal(&mut self, seal: Seal, due: EpochId) -> Result<Option<Epoch>, CommitError> {
        let epoch = seal.epoch;
        if epoch != due {
            return Err(CommitError::Order { due, found: epoch });
        }
        if self.seal.is_some() {
            return Err(CommitError::Twice(epoch));
        }
        if seal.pages.len() != self.parts.len() {
            let (expected, found) = (self.parts.len(), seal.pages.len());
            return Err(CommitError::Connections { epoch, expected, found });
        }
        self.seal = Some(seal);
        self.whole()
    }

    /// A connection's part arrived.
    pub(super) fn part(
        &mut self,
        connection: usize,
        part: Part,
        due: EpochId,
    ) -> Result<Option<Epoch>, CommitError> {
        if part.epoch != due {
            return Err(CommitError::Order { due, found: part.epoch });
        }
        match self.parts.get_mut(connection) {
            Some(slot @ None) => *slot = Some(part),
            _ => return Err(CommitError::Twice(due)),
        }
        self.whole()
    }

    /// The disks' part arrived.
    pub(super) fn disk_part(
        &mut self,
        part: DiskPart,
        due: EpochId,
    ) -> Result<Option<Epoch>, CommitError> {
        if part.epoch != due {
            return Err(CommitError::Order { due, found: part.epoch });
        }
        if self.disks.replace(part).is_some() {
            return Err(CommitError::Twice(due));
        }
        self.whole()
    }

    fn whole(&mut self) -> Result<Option<Epoch>, CommitError> {
        let lacks_disks = self.has_disks && self.disks.is_none();
        if self.seal.is_none() || lacks_disks || self.parts.iter().any(Option::is_none) {
            return Ok(None);
        }
        let Some(seal) = self.seal.take() else { return Ok(None) };
        let parts: Vec<Part> = self.parts.iter_mut().filter_map(Option::take).collect();
        for (connection, (part, sealed)) in parts.iter().zip(&seal.pages).enumerate() {
            let (epoch, found, sealed) = (seal.epoch, part.sum.pages, *sealed);
            if found != sealed {
                return Err(CommitError::Pages { epoch, connection, found, sealed });
            }
        }
        let disks = self.disks.take().unwrap_or_default();
        if disks.sum.pages != seal.changes {
            let (epoch, found, sealed) = (seal.epoch, disks.sum.pages, seal.changes);
            return Err(CommitError::Changes { epoch, found, sealed });
        }
        Ok(Some(Epoch { seal, parts, disks }))
    }
}
