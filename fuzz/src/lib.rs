//! What the fuzz targets do with their inputs. Each module is one target: an input, and `run`, which
//! panics when the code under test does something that it must not do.
//!
//! What always holds: an input has the same outcome each time. Devices have no threads here: their
//! steps are taken by [`blk`], [`net`] and [`rng`] in the order that the input says.

pub mod blk;
pub mod guest;
#[cfg(feature = "machine")]
pub mod http;
pub mod net;
pub mod options;
pub mod pci;
pub mod rng;
#[cfg(feature = "machine")]
pub mod state;
pub mod wire;

/// Turns that a device gets at a time. A guest may keep its device busy for ever, by answers that
/// are new requests; that is its own loss, and no finding.
pub const TURNS_MAX: usize = 64;
