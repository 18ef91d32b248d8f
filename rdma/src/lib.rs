//! RDMA verbs over libibverbs, which is loaded when it is needed.

mod abi;
mod error;
mod library;

pub use error::Error;
pub use library::Library;
