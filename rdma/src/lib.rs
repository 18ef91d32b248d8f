//! RDMA verbs, over libibverbs, which is loaded when it is needed: a host without it runs the same binary,
//! and hears what is missing when it asks for RDMA.
//!
//! Enters: the address from which a peer is reached; memory that is mapped; requests. Leaves: a connection
//! that reads and writes the peer's memory without the peer's processor; completions. Always holds: a device
//! accesses memory of a [`MemoryRegion`] only, and only until that is dropped.
//!
//! ```text
//! Library <-- Context <-- ProtectionDomain <-- MemoryRegion     <-- : holds, and is dropped before
//!                ^               ^
//!                |               +------------ QueuePair ----+
//!                |                                           |
//!                +-- CompletionChannel <-- CompletionQueue <-+
//! ```
//!
//! Everything holds what it was made of (`Arc`), so any order of drops is right. The order that matters is
//! the caller's: a region is dropped before its memory is unmapped.
//!
//! - [`Library`]: libibverbs, or why it is not there; [`Library::devices`] is what this host has;
//! - [`Wanted`]: which device, port and GID to use;
//! - [`Context`]: an opened device and its events; [`ProtectionDomain`], [`MemoryRegion`];
//! - [`Buffer`]: a region with memory of its own; [`LentMemory`]: one of a guest's memory, to be read, or to be written
//!   by a peer. Of either the mapping stays for ever where a device does not give it back;
//! - [`CompletionChannel`], [`CompletionQueue`], [`Completion`];
//! - [`QueuePair`]: a reliable connection; [`Endpoint`]: what its ends tell each other;
//! - [`RequestList`]: what is posted at once.
//!
//! **What is unsafe.** Only [`MemoryRegion::register`], whose promise holds for all that is done with the
//! region, and which [`Buffer`] keeps for memory of its own, [`LentMemory`] for a guest's. Posting is safe: a segment is a piece of a region, and a device checks each key that it is given
//! against what is registered now, so a request that outlives its region fails and touches nothing. That
//! what is to be sent does not change before its completion is a matter of what arrives, not of memory
//! safety: the device reads it as it reads a guest's memory, at its own time.
//!
//! **Forking.** Regions are meant to be of shared mappings (a memfd), which a fork leaves as they are. Of a
//! private one a child's existence may move pages away from under the device (ibv_fork_init(3)).
//!
//! The verbs are those of the InfiniBand Architecture Specification, volume 1, chapter 11, as
//! `infiniband/verbs.h` has them.

mod abi;
mod buffer;
mod choose;
mod completion;
mod context;
mod devices;
mod endpoint;
mod error;
mod lent;
mod library;
mod memory;
mod queue_pair;
mod work;

pub use buffer::Buffer;
pub use choose::{Place, Wanted};
pub use completion::{Completion, CompletionChannel, CompletionQueue, Failure, Outcome, Status};
pub use context::{Context, DeviceLimits, Event, PortAttributes, PortChange};
pub use devices::{Device, Gid, GidEntry, GidKind, LinkLayer, Port, PortState};
pub use endpoint::{ConnectOptions, Depths, Endpoint, Origin};
pub use error::Error;
pub use lent::LentMemory;
pub use library::{BUILT_IN, Library};
pub use memory::{Access, MemoryRegion, ProtectionDomain, Remote, Segment};
pub use queue_pair::QueuePair;
pub use work::{Operation, Request, RequestList};
