//! Newtypes for numbers that must never be swapped.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Bytes of a guest page; the granule of dirty tracking and of the wire.
pub const PAGE_SIZE: usize = 4096;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        pub struct $name(pub u64);

        impl $name {
            /// The number after this one.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number! {
    /// An epoch: ids are consecutive from 1; 0 means "none yet".
    EpochId
}
number! {
    /// An ownership generation: grows by one at each change of the arbiter's record.
    Generation
}
number! {
    /// A page by its place in the dense numbering of [`crate::ram::Ram`].
    PageIndex
}
