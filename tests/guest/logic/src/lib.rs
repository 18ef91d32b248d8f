//! What the test guest decides, apart from the machine it runs on: so that the checks whose word
//! the demo relies on are themselves tested on the host, where a byte is easily flipped.
//!
//! Nothing here touches hardware, allocates or panics on what it is given.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

/// The ACPI tables, as far as a list of processors needs them.
pub mod acpi;
/// The kernel command line.
pub mod cmdline;
/// Which guest-physical memory is free, and its pages by number.
pub mod free;
/// What the key-value server says on the wire and writes on disk.
pub mod kv;
/// A line of text in a fixed buffer.
pub mod line;
/// Ports and addresses that the guest and the VMM agree on.
pub mod machine;
/// The order in which pages are visited.
pub mod order;
/// How many pages are due by now.
pub mod pace;
/// The content of a page, and the check of it.
pub mod page;
/// Pages that two processors share.
pub mod pair;
/// Reading structures out of physical memory.
pub mod physical;
/// Small generators of pseudo-random numbers.
pub mod random;
/// The longest time in which a processor did not run.
pub mod standstill;
/// PVH's start info.
pub mod start_info;
/// Arithmetic with a known result.
pub mod sum;
/// The generations that a processor remembers of its pages.
pub mod table;
/// What is typed on the serial port.
pub mod typed;
