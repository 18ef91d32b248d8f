//! The workloads: each has one worker a processor, which does bounded pieces of it.

mod compute;
mod dirty;
pub mod kv;
mod verify;

pub use compute::Compute;
pub use dirty::Dirty;
pub use kv::Kv;
pub use verify::Verify;
