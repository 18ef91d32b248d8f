//! What an observer outside knows of both hosts, and what must hold of it. No host looks at this.

use replication::ids::{EpochId, Generation};

use crate::guest::{Guest, Position};
use crate::vm::Vm;

/// A machine that a backup started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Started {
    pub from: Position,
    /// Whether it was the last epoch that this backup acknowledged.
    pub acknowledged: bool,
}

/// How far the output of an incarnation has left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Left {
    /// The last interval, of what a state can carry, and of frames.
    said: u16,
    frames: u16,
}

impl Left {
    fn last(self) -> u16 {
        self.said.max(self.frames)
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Ghost {
    /// By incarnation.
    left: Vec<Left>,
    /// By incarnation: the last interval that left at a commit, and not because all did.
    promised: Vec<u16>,
    pub started: Vec<Started>,
    /// Which host spoke under a generation.
    spoke: Vec<(Generation, usize)>,
    /// The last epoch that each host acknowledged in its present session.
    acked: [Option<EpochId>; 2],
    /// A pair's primary was killed, and this host has to go on.
    pub owes: Option<usize>,
    /// A backup that owns the machine could not start it.
    pub is_start_lost: bool,
}

impl Ghost {
    /// A host has dealt with something: what its machine has let out is seen now.
    pub fn observe(&mut self, at: usize, generation: Option<Generation>, vm: &Guest) {
        let index = usize::from(vm.incarnation);
        if self.left.len() <= index {
            self.left.resize(index + 1, Left::default());
            self.promised.resize(index + 1, 0);
        }
        let before = self.left[index];
        let said = before.said.max(vm.said);
        let frames = before.frames.max(vm.frames);
        let after = Left { said, frames };
        if after != before || vm.is_free() {
            if let Some(generation) = generation
                && !self.spoke.contains(&(generation, at))
            {
                self.spoke.push((generation, at));
                self.spoke.sort_unstable();
            }
            self.left[index] = after;
        }
        if !vm.is_free() {
            self.promised[index] = after.last();
        }
    }

    /// A backup has accepted a primary.
    pub fn accepts(&mut self, at: usize) {
        self.acked[at] = None;
    }

    pub fn acknowledges(&mut self, at: usize, epoch: EpochId) {
        self.acked[at] = self.acked[at].max(Some(epoch));
    }

    /// A backup has started this machine, which is an incarnation of its own.
    pub fn starts(&mut self, at: usize, vm: &mut Guest, epoch: EpochId, handover: bool) {
        let acknowledged = self.acked[at] == Some(epoch);
        let from = Position { handover, ..vm.from };
        self.started.push(Started { from, acknowledged });
        vm.incarnation = u16::try_from(self.started.len()).expect("starts are few");
    }

    fn left(&self, from: Position) -> Left {
        self.left.get(usize::from(from.incarnation)).copied().unwrap_or_default()
    }

    /// Whether a backup has gone on from this machine.
    #[must_use]
    pub fn is_continued(&self, vm: &Guest) -> bool {
        self.started.iter().any(|start| start.from.incarnation == vm.incarnation)
    }

    /// A backup gives up what it has, for a reason of its own host.
    pub fn gives_up(&mut self, at: usize) {
        if self.owes == Some(at) {
            self.owes = None;
        }
    }

    #[must_use]
    pub fn promised(&self) -> &[u16] {
        &self.promised
    }

    /// No machine is continued by two others that were ever heard of.
    #[must_use]
    pub fn is_continued_once(&self) -> bool {
        let twice = |(at, start): (usize, &Started)| {
            let earlier = self.started[..at].iter().enumerate();
            let same = |(before, other): (usize, &Started)| {
                other.from.incarnation == start.from.incarnation && self.was_heard(before + 1)
            };
            earlier.into_iter().any(same)
        };
        let mut heard = self.started.iter().enumerate().filter(|(at, _)| self.was_heard(at + 1));
        !heard.any(twice)
    }

    /// Whether anything of this incarnation ever left.
    fn was_heard(&self, incarnation: usize) -> bool {
        self.left.get(incarnation).is_some_and(|left| left.last() > 0)
    }

    /// All that an incarnation ever let out, before it was followed by another or after, is in the
    /// state from which that one began; and of two machines of which neither is in the other's history, as
    /// of a new host and its old one that went on from before, one was never heard of.
    #[must_use]
    pub fn is_nothing_lost(&self) -> bool {
        (0..self.started.len()).filter(|last| self.was_heard(last + 1)).all(|last| {
            let mut history = vec![last + 1];
            while let Some(start) = history.last().and_then(|of| of.checked_sub(1)) {
                let from = self.started[start].from;
                if self.left(from).last() > from.at {
                    return false;
                }
                history.push(usize::from(from.incarnation));
            }
            (0..=last).all(|other| history.contains(&other) || !self.was_heard(other))
        })
    }

    /// The weaker promise without an arbiter: what was let out because the backup had it.
    #[must_use]
    pub fn is_promise_kept(&self) -> bool {
        self.started
            .iter()
            .all(|start| self.promised[usize::from(start.from.incarnation)] <= start.from.at)
    }

    /// A switch-over's state carries the last interval's output: the new host says it, and only it.
    #[must_use]
    pub fn is_said_once(&self) -> bool {
        let handed = self.started.iter().filter(|start| start.from.handover);
        handed.into_iter().all(|start| self.left(start.from).said < start.from.at)
    }

    /// Every machine was started from the epoch that its host acknowledged last.
    #[must_use]
    pub fn is_acknowledged(&self) -> bool {
        self.started.iter().all(|start| start.acknowledged)
    }

    #[must_use]
    pub fn has_one_speaker(&self) -> bool {
        self.spoke.windows(2).all(|pair| pair[0].0 != pair[1].0)
    }
}
