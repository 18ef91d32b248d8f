//! The disks of a replica: what arrives for their images, and how it gets there.
//!
//! - [`receive`]: first copies go straight into the images, changes of an epoch are staged;
//! - [`images`]: changes of committed epochs go into the images, in order.
//!
//! Always holds: one thread at a time writes an image: the receiver while there is nothing to
//! start from, the other one while there is. What is staged and what waits for an image is bounded.

mod images;
mod receive;

use std::io;

use thiserror::Error;

use crate::disk::Change;
use crate::ids::EpochId;
use crate::wire::ConnectionPart;

pub(super) use images::Images;
pub(super) use receive::{DiskConnection, DiskDelivery};

/// An image cannot be written: what it contains is of no use any more.
#[derive(Debug, Error)]
#[error("Cannot write the image of disk {disk}")]
pub(super) struct ImageError {
    pub(super) disk: u32,
    #[source]
    pub(super) source: io::Error,
}

/// The changes of one epoch.
#[derive(Debug, Default)]
pub(super) struct DiskPart {
    pub(super) epoch: EpochId,
    /// `pages` counts changes.
    pub(super) sum: ConnectionPart,
    /// What it took of the staging.
    pub(super) cost_bytes: u64,
    pub(super) changes: Vec<Change>,
}
