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

/// Bytes of a guest's memory that lie side by side.
pub type Slice<'a> = vm_memory::VolatileSlice<'a, vm_memory::bitmap::BS<'a, WrittenPages>>;
