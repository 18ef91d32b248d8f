//! Epoch replication of a virtual machine. Read the modules in the order in which data flows:
//!
//! - [`guest`]: what a VMM implements to be protected, or to be a backup;
//! - [`capture`]: the dirty set, when to seal, and the bytes of a page as they were at the seal;
//! - [`disk`]: the changes of disks, for a copy of their images;
//! - [`encode`]: pages as fewer bytes;
//! - [`wire`]: frames, messages and pages as bytes;
//! - [`transport`]: how bytes reach the peer;
//! - [`protocol`]: the pure state machines of both sides and of a claim for ownership;
//! - [`primary`]: the threads that protect a guest;
//! - [`backup`]: the threads that receive, stage, commit, apply, take over;
//! - [`handover`]: what outlives a planned switch-over;
//! - [`output`]: the rule that output follows;
//! - [`ownership`]: the arbiter;
//! - [`observer`]: what a VMM is told meanwhile.
#![forbid(unsafe_code)]

pub mod backup;
pub mod capture;
pub mod checking;
pub mod disk;
pub mod encode;
mod engine;
mod error;
pub mod guest;
pub mod handover;
pub mod ids;
mod log;
pub mod observer;
pub mod output;
pub mod ownership;
mod page_set;
pub mod primary;
pub mod protocol;
pub mod ram;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;
pub mod transport;
pub mod wire;

pub use error::{Error, ErrorKind, chain};
pub use observer::{Event, Observer};
pub use ownership::{HostId, HostIdentity, Known, VmId};
/// Whether this build speaks RDMA.
pub use rdma::BUILT_IN as HAS_RDMA;
