//! Binds the machine to replication: as a [`Guest`](replication::guest::Guest) that is protected,
//! and as a [`Replica`](replication::guest::Replica) that waits for its take-over.
//!
//! The engine's threads call in here; what the control loop must learn comes out as
//! [`Notice`](crate::control::Notice)s.

mod codec;
mod description;
mod disks;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod overrides;
mod protected;
mod replica;

pub use overrides::Overrides;
pub use protected::{ProtectedVm, holds};
pub use replica::{Kept, ReplicaVms, check_host};
