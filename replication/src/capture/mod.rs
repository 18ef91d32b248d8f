//! From a running guest to the pages of an epoch.
//!
//! - [`dirty`]: the pages that were written since the last seal;
//! - [`epoch`]: when to seal; `stretch`: how much later where nobody waits;
//! - [`brake`]: how a copy catches up with a guest that writes faster than it gets on;
//! - [`cow`]: their bytes as they were at the seal.

pub mod brake;
pub mod cow;
pub mod dirty;
pub mod epoch;
mod stretch;
