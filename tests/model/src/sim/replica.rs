//! What a simulated host builds for a primary: memory, and in the end the machine that goes on from it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use api::replication::ReplicateData;
use replication::guest::{self, GuestError, ReplicaBuilder};
use replication::ram::{PageSet, Ram};

use super::machine::{DESCRIPTION, Machine};
use super::memory::{self, PAGES, Snapshot};
use super::state::State;
use crate::broken::Broken;
use crate::guest::Position;

/// What a host has for its backup, and what is seen of that from outside.
#[derive(Debug, Default)]
pub struct Site {
    /// The machine will not start.
    pub is_doomed: bool,
    /// The host lacks what the machine needs, and knows it.
    pub is_lacking: bool,
    /// Memory of a machine that was handed over from here, for the next replica.
    kept: Option<Ram>,
    /// Of the replica that was built last.
    ram: Option<Ram>,
    looked: Looked,
    started: Option<Machine>,
    broken: Option<Broken>,
}

/// Which epochs a backup has looked at since its turn began.
#[derive(Debug, Default)]
pub struct Looked {
    /// Those that others followed, with memory as it was before the next.
    pub passed: Vec<(Position, Snapshot)>,
    pub last: Option<Position>,
}

impl Looked {
    /// In their order.
    pub fn all(&self) -> impl Iterator<Item = (Position, Option<&Snapshot>)> {
        let passed = self.passed.iter().map(|(position, memory)| (*position, Some(memory)));
        passed.chain(self.last.map(|position| (position, None)))
    }
}

impl Site {
    /// A turn of the engine begins.
    pub fn turns(&mut self) {
        self.looked = Looked::default();
    }

    pub fn looked(&mut self) -> Looked {
        std::mem::take(&mut self.looked)
    }

    /// The machine that was started, once.
    pub fn started(&mut self) -> Option<Machine> {
        self.started.take()
    }

    /// Memory of the replica.
    #[must_use]
    pub fn ram(&self) -> Option<Ram> {
        self.ram.clone()
    }
}

/// All clones are the same site.
#[derive(Clone, Debug, Default)]
pub struct Shared(Arc<Mutex<Site>>);

impl Shared {
    /// A host that had the machine whose memory is `kept`, or none.
    #[must_use]
    pub fn new(kept: Option<Ram>, broken: Option<Broken>) -> Self {
        Self(Arc::new(Mutex::new(Site { kept, broken, ..Site::default() })))
    }

    pub fn lock(&self) -> MutexGuard<'_, Site> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Builds replicas.
#[derive(Debug)]
pub struct Builder(pub Shared);

impl ReplicaBuilder for Builder {
    type Replica = Replica;

    fn build(&mut self, description: &[u8]) -> Result<Replica, GuestError> {
        if description != DESCRIPTION {
            return Err("another machine than this simulator's".into());
        }
        let mut site = self.0.lock();
        let ram = site.kept.take().unwrap_or_else(memory::new);
        site.ram = Some(ram.clone());
        drop(site);
        Ok(Replica { ram, site: self.0.clone(), is_tracked: false, last: None, older: None })
    }
}

/// A machine that does not run yet.
#[derive(Debug)]
pub struct Replica {
    ram: Ram,
    site: Shared,
    is_tracked: bool,
    /// For one broken rule: the state that was looked at last, and the one before with its memory.
    last: Option<State>,
    older: Option<(State, Snapshot)>,
}

impl guest::Replica for Replica {
    type State = State;

    fn ram(&self) -> Ram {
        self.ram.clone()
    }

    fn parse(&mut self, state: &[u8]) -> Result<State, GuestError> {
        let state = State::parse(state)?;
        let mut site = self.site.lock();
        if let Some(passed) = site.looked.last.replace(state.position) {
            site.looked.passed.push((passed, memory::snapshot(&self.ram)));
        }
        if site.broken == Some(Broken::StartOlder) {
            let last = self.last.replace(state.clone());
            self.older = last.map(|last| (last, memory::snapshot(&self.ram)));
        }
        Ok(state)
    }

    fn ready(&mut self) -> Result<(), GuestError> {
        match self.site.lock().is_lacking {
            true => Err("what the machine needs is in use".into()),
            false => Ok(()),
        }
    }

    fn track(&mut self) -> Result<(), GuestError> {
        self.is_tracked = true;
        self.forget_written();
        Ok(())
    }

    fn start(self, state: State, held: Option<&ReplicateData>) -> Result<(), GuestError> {
        let mut site = self.site.lock();
        if site.is_doomed {
            return Err("this host cannot start anything".into());
        }
        if self.is_tracked {
            self.forget_written();
        }
        let is_held = held.is_some() && site.broken != Some(Broken::SpeaksBeforeReached);
        let state = match &self.older {
            Some((older, snapshot)) => {
                memory::restore(&self.ram, snapshot);
                older
            }
            None => &state,
        };
        site.started = Some(Machine::started(state, self.ram.clone(), is_held));
        Ok(())
    }
}

impl Replica {
    /// What was written up to now is of no interest.
    fn forget_written(&self) {
        self.ram.drain_written(&mut PageSet::new(PAGES as u64));
    }
}
