//! The memory's way into a backup's image, step by step and without threads: for a simulator, which has its own
//! engine, clock and network.
//!
//! What is done in a step is what the product does: [`Receiving`] reads, checks and stages frames,
//! [`Gather`] says which epoch is whole, [`apply`] brings it into the image, [`Budget`] bounds all of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam_channel::{Sender, bounded};

use super::apply::apply;
use super::commit::{Epoch, Gather};
use super::receive::{Receiving, Shared};
use super::staging::{Budget, Part};
use crate::capture::cow::Share;
use crate::engine::heard::Heard;
use crate::error::chain;
use crate::ids::{EpochId, Generation};
use crate::primary::simulated::Terms;
use crate::ram::Ram;
use crate::testing::Tape;
use crate::wire::{FrameReader, Seal};

/// What a simulator breaks on purpose.
#[derive(Clone, Copy, Debug, Default)]
pub struct Broken {
    /// A part goes into the image as it comes, before its epoch is whole.
    pub applies_early: bool,
}

struct Connection {
    receiving: Receiving,
    tape: Tape,
    spare: Sender<Part>,
}

/// The backup's side of a session.
pub struct Reception {
    shared: Shared,
    connections: Vec<Connection>,
    scratch: Vec<u8>,
    gather: Gather,
    verified: Option<Epoch>,
    broken: Broken,
}

impl Reception {
    /// Begins a session; `is_whole`: the image is that of a committed epoch already.
    #[must_use]
    pub fn open(ram: Ram, terms: Terms, is_whole: bool, broken: Broken) -> Self {
        let shared = Shared {
            ram,
            is_whole,
            budget: Budget::new(terms.staging_bytes),
            round: Arc::new(AtomicU64::new(0)),
            heard: Heard::new(),
            counters: Arc::default(),
            rdma: None,
        };
        let of = terms.connections;
        let connect = |index| {
            let tape = Tape::default();
            let reader = FrameReader::new(Box::new(tape.clone()) as _, Some(terms.session));
            let (spare, spares) = bounded(3);
            let receiving = Receiving::new(Share { index, of }, reader, shared.clone(), spares);
            Connection { receiving, tape, spare }
        };
        let connections = (0..of).map(connect).collect();
        let (scratch, gather) = (Receiving::scratch(), Gather::new(of, false));
        Self { shared, connections, scratch, gather, verified: None, broken }
    }

    /// Bytes of a data connection, in their order.
    ///
    /// # Errors
    /// Why a product would end the session.
    pub fn arrived(&mut self, connection: usize, bytes: &[u8], due: EpochId) -> Result<(), String> {
        let Some(of) = self.connections.get_mut(connection) else { return Ok(()) };
        of.tape.put(bytes);
        while of.tape.has_frame() {
            let part = of.receiving.frame(&mut self.scratch).map_err(|error| chain(&error))?;
            let Some(part) = part else { continue };
            if self.broken.applies_early {
                let _ = apply(&self.shared.ram, &part.runs, &part.bytes);
            }
            self.gather.part(connection, part, due).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    /// A seal arrived.
    ///
    /// # Errors
    /// Why a product would end the session.
    pub fn sealed(&mut self, seal: Seal, due: EpochId) -> Result<(), String> {
        self.gather.seal(seal, due).map_err(|error| error.to_string())
    }

    /// Whether the epoch that is due is whole: then it is looked at, and is the one to be applied.
    ///
    /// # Errors
    /// Why a product would end the session.
    pub fn is_whole(&mut self) -> Result<bool, String> {
        let whole = self.gather.whole().map_err(|error| error.to_string())?;
        let Some(epoch) = whole else { return Ok(false) };
        self.shared.budget.give_back(epoch.cost_bytes());
        self.verified = Some(epoch);
        Ok(true)
    }

    /// The epoch that was looked at, and its pair's generation.
    #[must_use]
    pub fn verified(&self) -> Option<(EpochId, Generation)> {
        self.verified.as_ref().map(|epoch| (epoch.seal.epoch, epoch.seal.generation))
    }

    /// Applies the epoch that was looked at.
    ///
    /// # Panics
    /// If that is another one, or was not checked.
    pub fn apply(&mut self, epoch: EpochId) {
        let Some(verified) = self.verified.take() else { return };
        assert_eq!(verified.seal.epoch, epoch, "what was verified is what is applied");
        for (part, of) in verified.parts.into_iter().zip(&self.connections) {
            if !self.broken.applies_early {
                apply(&self.shared.ram, &part.runs, &part.bytes).expect("every run was checked");
            }
            // Full: the buffer is simply freed.
            let _ = of.spare.try_send(part);
        }
    }

    /// Nothing of what is staged will be acknowledged.
    pub fn drop_staging(&mut self) {
        self.verified = None;
        let cost_bytes = self.gather.clear();
        self.shared.budget.give_back(cost_bytes);
    }

    /// The primary copies anew, and is told that it may.
    pub fn begin_anew(&mut self) {
        self.shared.round.fetch_add(1, Ordering::AcqRel);
    }
}

impl std::fmt::Debug for Reception {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reception").finish_non_exhaustive()
    }
}
