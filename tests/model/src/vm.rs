//! What the modelled engines need of a machine: the model's is a position in a history. The simulator's
//! has memory, a server and gates, and is driven by one of them where a new host calls its old one.

use std::fmt::Debug;
use std::hash::Hash;

use replication::ids::EpochId;
use replication::protocol::backup::Handover;

/// A machine that runs on a host; the part of `replication::guest::Guest` that matters to order.
pub trait Vm: Debug {
    /// What a copy or an epoch carries.
    type Content: Clone + Debug + PartialEq + Eq + Hash;

    /// All of it as it is now; `None` where a copy alone is of no consequence, or goes by itself.
    fn copy(&mut self) -> Option<Self::Content>;

    /// Quiesces, captures what changed since the last seal, tags all output since then with `epoch`,
    /// and lets the guest run on, unless this is the last epoch of a switch-over.
    fn seal(&mut self, epoch: EpochId, handover: Handover) -> Self::Content;

    /// Output is held from here on.
    fn hold(&mut self);

    /// What is tagged with `epoch` or an earlier one leaves.
    fn commit(&mut self, epoch: EpochId);

    /// The same, but for what the state of a switch-over carries.
    fn hand_over(&mut self, epoch: EpochId);

    /// All output leaves, and nothing is held any more.
    fn pass(&mut self);

    /// Runs on, if it stood for a seal.
    fn release(&mut self);

    /// Whether the guest stands for a seal that was its last.
    fn stands(&self) -> bool;

    /// Whether output leaves at once.
    fn is_free(&self) -> bool;
}

/// A machine as a backup of the model has it.
pub trait Replicated: Vm {
    /// What a backup has of it.
    type Image: Clone + Debug + PartialEq + Eq + Hash + Default;

    /// Brings a copy or an epoch into an image.
    fn receive(image: &mut Self::Image, content: &Self::Content);

    /// Runs what an image holds; its output is free.
    fn start(image: &Self::Image) -> Self;

    /// The same, with output held from the first instant.
    fn start_held(image: &Self::Image) -> Self;

    /// What a machine is that stands for its last seal, as an image.
    fn kept(&self) -> Self::Image;
}
