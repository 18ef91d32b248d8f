//! Where a machine is in its history, and what of that has left.
//!
//! A history is a line of positions, one for each interval between seals; a machine that a backup
//! starts is a new incarnation that goes on from the position it has. Output is produced in every
//! interval. What a position holds needs no bytes: a state contains what came before it.

use replication::ids::EpochId;
use replication::protocol::backup::Handover;

use crate::vm::{Replicated, Vm};

/// A point in a machine's history: the state at the seal that ended this interval.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    pub incarnation: u16,
    pub at: u16,
    /// Its state carries output that is the next host's to say.
    pub handover: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Guest {
    pub incarnation: u16,
    /// The state that it began with.
    pub from: Position,
    /// The interval that it is in.
    pub open: u16,
    /// What each epoch in flight covers.
    tags: Vec<(EpochId, u16)>,
    held: bool,
    stands: bool,
    /// The last interval whose output has left, of what a state can carry (a console, disks).
    pub said: u16,
    /// The same of frames, which no state carries.
    pub frames: u16,
}

impl Guest {
    /// A machine that was never protected.
    #[must_use]
    pub fn new() -> Self {
        Self::from(Position::default())
    }

    fn from(from: Position) -> Self {
        let open = from.at + 1;
        let (said, frames) = (open, open);
        let incarnation = from.incarnation;
        Self { incarnation, from, open, tags: vec![], held: false, stands: false, said, frames }
    }

    /// The state at the end of the interval, which this is.
    pub fn interval(&mut self, epoch: EpochId, handover: bool) -> Position {
        let at = self.open;
        self.tags.push((epoch, at));
        self.open += 1;
        self.stands = handover;
        if !self.held {
            self.release_all();
        }
        Position { incarnation: self.incarnation, at, handover }
    }

    fn release_all(&mut self) {
        (self.said, self.frames) = (self.open, self.open);
    }
}

impl Default for Guest {
    fn default() -> Self {
        Self::new()
    }
}

impl Vm for Guest {
    type Content = Position;

    fn copy(&mut self) -> Option<Position> {
        None
    }

    fn seal(&mut self, epoch: EpochId, handover: Handover) -> Position {
        self.interval(epoch, handover != Handover::No)
    }

    fn hold(&mut self) {
        self.held = true;
    }

    fn commit(&mut self, epoch: EpochId) {
        for (_, at) in self.tags.iter().filter(|(tag, _)| *tag <= epoch) {
            self.said = self.said.max(*at);
            self.frames = self.frames.max(*at);
        }
        self.tags.retain(|(tag, _)| *tag > epoch);
    }

    fn hand_over(&mut self, epoch: EpochId) {
        for (_, at) in self.tags.iter().filter(|(tag, _)| *tag <= epoch) {
            self.frames = self.frames.max(*at);
        }
    }

    fn pass(&mut self) {
        self.held = false;
        self.tags.clear();
        self.release_all();
    }

    fn release(&mut self) {
        self.stands = false;
    }

    fn stands(&self) -> bool {
        self.stands
    }

    fn is_free(&self) -> bool {
        !self.held
    }
}

impl Replicated for Guest {
    type Image = Position;

    fn receive(image: &mut Position, content: &Position) {
        *image = *content;
    }

    fn start(image: &Position) -> Self {
        // Which incarnation it is the ghost says, who sees all of them.
        Self::from(*image)
    }

    fn start_held(image: &Position) -> Self {
        Self { held: true, said: 0, frames: 0, ..Self::from(*image) }
    }

    fn kept(&self) -> Position {
        assert!(self.stands, "it stands for its last seal");
        Position { incarnation: self.incarnation, at: self.open - 1, handover: true }
    }
}
