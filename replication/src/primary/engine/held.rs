//! The guest, while an engine has it.

use std::ops::{Deref, DerefMut};

/// Lent for a session, or, where a simulator has several engines in one thread, the engine's own.
pub(in crate::primary) enum Held<'g, G> {
    Lent(&'g mut G),
    #[cfg(any(test, feature = "testing"))]
    Owned(Box<G>),
}

impl<G> Deref for Held<'_, G> {
    type Target = G;

    fn deref(&self) -> &G {
        match self {
            Self::Lent(guest) => guest,
            #[cfg(any(test, feature = "testing"))]
            Self::Owned(guest) => guest,
        }
    }
}

impl<G> DerefMut for Held<'_, G> {
    fn deref_mut(&mut self) -> &mut G {
        match self {
            Self::Lent(guest) => guest,
            #[cfg(any(test, feature = "testing"))]
            Self::Owned(guest) => guest,
        }
    }
}
