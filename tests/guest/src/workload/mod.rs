//! The workloads: each has one worker a processor, which does bounded pieces of it.

mod compute;
mod dirty;
mod verify;

pub use compute::Compute;
pub use dirty::Dirty;
pub use verify::Verify;
