//! A card without threads, for the fuzz targets: its steps are theirs to take, so that an input
//! has the same outcome each time.

use std::io;
use std::sync::Arc;

use super::tap::TapQueue;
use super::worker::Worker;
use super::{Attachment, Net};

/// The worker of a queue pair, without its thread.
pub struct Hand(Worker);

impl Hand {
    /// Fetches what has happened and does what may be done. True if there may be more.
    pub fn turn(&mut self) -> bool {
        self.0.look();
        self.0.turn()
    }
}

impl Net {
    /// Attaches the queues of a tap, one for each pair, and gives the workers to the caller.
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn attach_by_hand(&self, taps: &[Arc<dyn TapQueue>]) -> io::Result<Vec<Hand>> {
        let hand = |index| Worker::new(&self.shared, index, taps).map(Hand);
        let hands = (0..self.shared.pairs.len()).map(hand).collect();
        *self.attachment() = Attachment::Attached(Vec::new());
        hands
    }
}
