//! Virtio devices (virtio 1.2), one folder or file each, and what they have in common.
//!
//! ```text
//!   guest ──registers──▶ transport (crate::pci) ──activate, reset──▶ device
//!     │                                                               │ workers
//!     └──── rings in guest memory ◀──────── Turnstile ───────────────┘
//! ```
//!
//! What always holds:
//!
//! - Whoever touches guest memory, a ring or a device's state holds a [`turnstile::Pass`], and
//!   holds none while it waits for the host's disk or network. So [`device::VirtioDevice::park`]
//!   returns after a request's worth of copying, whatever the host does (by RDMA, a page that is read as it is written is
//!   waited for until its send completes).
//! - Host I/O works on buffers of the VMM. Guest memory is read and written under a pass only,
//!   through the one mapping, whose bitmap sees the writes.
//! - A request that was taken from a ring and not answered is *in flight*: its head is part of the
//!   saved state, and a restored device carries it out again.
//! - Nothing that a guest writes panics or takes memory without a bound. A device whose rings make
//!   no sense stops and says so by DEVICE_NEEDS_RESET; the rest goes on.

/// Disks.
pub mod blk;
/// Console.
pub mod console;
/// What a device implements for its transport.
pub mod device;
/// Network card.
pub mod net;
/// Rings, as a device sees them.
mod ring;
/// Random bytes.
pub mod rng;
/// Saved forms.
pub mod state;
/// A driver for tests.
#[cfg(test)]
mod testing;
/// Parks workers at a request boundary.
pub mod turnstile;

/// An error with its causes.
fn chain_of(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}
