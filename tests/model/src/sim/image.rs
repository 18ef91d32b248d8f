//! What a backup has of a machine: memory into which what ships stages and applies, and the state of the last
//! epoch.

use std::cell::RefCell;
use std::hash::{Hash, Hasher};
use std::rc::Rc;

use replication::backup::simulated::{Broken as ReceptionBroken, Reception};
use replication::ids::{EpochId, Generation};
use replication::primary::simulated::Terms;
use replication::ram::Ram;

use super::memory;
use crate::broken::Broken;
use crate::guest::Position;

/// What the seal of an epoch says; its pages travel by connections of their own.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Content {
    /// How many go by each.
    pub pages: Vec<u64>,
    /// The machine's state, as bytes.
    pub state: Vec<u8>,
}

/// A machine's state.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    pub position: Position,
    /// What its console has not said.
    pub console: Vec<u8>,
    /// Of which epoch and pair it is.
    pub epoch: EpochId,
    pub generation: Generation,
}

impl State {
    /// # Errors
    /// It is none.
    pub fn parse(bytes: &[u8], epoch: EpochId, generation: Generation) -> Result<Self, String> {
        let &[a, b, c, d, handover, ref console @ ..] = bytes else {
            return Err("a machine state that is too short".to_owned());
        };
        let (incarnation, at) = (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
        let position = Position { incarnation, at, handover: handover != 0 };
        Ok(Self { position, console: console.to_vec(), epoch, generation })
    }
}

#[derive(Debug)]
struct Inner {
    ram: Ram,
    terms: Option<Terms>,
    reception: Option<Reception>,
}

/// All clones are the same image, as all who write memory write the same.
#[derive(Clone, Debug)]
pub struct Image {
    pub state: Option<State>,
    inner: Rc<RefCell<Inner>>,
}

impl Default for Image {
    fn default() -> Self {
        Self::around(memory::new(), None, None)
    }
}

impl PartialEq for Image {
    fn eq(&self, other: &Self) -> bool {
        self.state == other.state && Rc::ptr_eq(&self.inner, &other.inner)
    }
}

impl Eq for Image {}

impl Hash for Image {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        self.state.hash(hasher);
    }
}

impl Image {
    fn around(ram: Ram, state: Option<State>, terms: Option<Terms>) -> Self {
        let inner = Inner { ram, terms, reception: None };
        Self { state, inner: Rc::new(RefCell::new(inner)) }
    }

    /// Of a machine that stands for its last seal.
    #[must_use]
    pub fn of(ram: Ram, state: State, terms: Terms) -> Self {
        Self::around(ram, Some(state), Some(terms))
    }

    #[must_use]
    pub fn ram(&self) -> Ram {
        self.inner.borrow().ram.clone()
    }

    /// Of the session that wrote it last.
    #[must_use]
    pub fn terms(&self) -> Option<Terms> {
        self.inner.borrow().terms
    }

    /// A session begins; `is_whole`: with an epoch that is committed.
    pub fn open(&self, terms: Terms, is_whole: bool, broken: Option<Broken>) {
        let mut inner = self.inner.borrow_mut();
        let breaks = ReceptionBroken { applies_early: broken == Some(Broken::AppliedBeforeItsEnd) };
        inner.terms = Some(terms);
        inner.reception = Some(Reception::open(inner.ram.clone(), terms, is_whole, breaks));
    }

    /// Nobody writes it any more.
    pub fn end(&self) {
        self.inner.borrow_mut().reception = None;
    }

    /// Does something with what receives.
    pub fn with<T>(&self, act: impl FnOnce(&mut Reception) -> T) -> Option<T> {
        self.inner.borrow_mut().reception.as_mut().map(act)
    }

    /// Applies the epoch that is whole.
    pub fn receive(&mut self, content: &Content) {
        let Some((epoch, generation)) = self.with(|reception| reception.verified()).flatten()
        else {
            return;
        };
        self.with(|reception| reception.apply(epoch));
        self.state = State::parse(&content.state, epoch, generation).ok();
    }
}
