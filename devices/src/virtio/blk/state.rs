//! The saved form of a disk.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use super::config::BlkConfig;
use crate::virtio::device::{QueuePosition, StateError};

/// A queue: how far it has got, and what of that was not answered.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlkQueueState {
    pub position: QueuePosition,
    /// Head indexes in order of arrival. The requests themselves are in guest memory.
    pub in_flight: Vec<u16>,
}

/// A disk. Its image is not part of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlkState {
    /// What the guest was told.
    pub capacity_sectors: u64,
    /// The disk waits for its reset.
    pub stopped: bool,
    /// The active queues, ascending.
    pub queues: Vec<BlkQueueState>,
}

impl BlkState {
    /// Checks a state that may come from anywhere.
    pub(super) fn validate(
        &self,
        config: &BlkConfig,
        image_sectors: u64,
    ) -> Result<(), StateError> {
        let unusable = |what: String| Err(StateError::Unusable(what));
        if self.capacity_sectors > image_sectors {
            let wanted = self.capacity_sectors;
            return unusable(format!("{wanted} sectors on an image of {image_sectors}"));
        }
        let mut next = 0;
        for queue in &self.queues {
            let index = queue.position.index;
            if index >= config.num_queues || index < next {
                return unusable(format!("queue {index} is not in its place"));
            }
            next = index + 1;
            let heads: HashSet<_> = queue.in_flight.iter().take(usize::from(u16::MAX)).collect();
            let inside = queue.in_flight.iter().all(|head| *head < config.queue_size);
            if !inside || heads.len() != queue.in_flight.len() {
                return unusable(format!("queue {index} has impossible requests in flight"));
            }
        }
        Ok(())
    }
}
