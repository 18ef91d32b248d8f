//! Guest memory as devices, the VMM and replication map it.
//!
//! | Module | What is there |
//! |---|---|
//! | [`written`] | which pages the VMM itself wrote, which KVM's dirty log does not see |
#![forbid(unsafe_code)]

pub mod written;

pub use written::WrittenPages;

/// The mapping of a guest's memory.
pub type Mapping = vm_memory::GuestMemoryMmap<WrittenPages>;
