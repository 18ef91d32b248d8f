//! What the fuzz targets do with their inputs. Each module is one target: an input, and `run`, which
//! panics when the code under test does something that it must not do.
//!
//! What always holds: an input has the same outcome each time. Devices have no threads here: their
//! steps are taken by [`blk`], [`net`], [`rng`] and [`console`] in the order that the input says.

pub mod blk;
pub mod console;
pub mod etcd;
pub mod guest;
#[cfg(feature = "machine")]
pub mod http;
pub mod net;
pub mod options;
pub mod pci;
pub mod reach;
pub mod rng;
pub mod seeds;
#[cfg(feature = "machine")]
pub mod state;
pub mod wire;

use arbitrary::{Arbitrary, Unstructured};

/// Turns that a device gets at a time. A guest may keep its device busy for ever, by answers that
/// are new requests; that is its own loss, and no finding.
pub const TURNS_MAX: usize = 16;

/// A target as it can be run without libFuzzer: on any toolchain, under a debugger, in tests.
#[derive(Clone, Copy)]
pub struct Target {
    pub name: &'static str,
    /// Takes an input as libFuzzer writes it to a file.
    pub run: fn(&[u8]),
    /// What a corpus that is worth something gets to, see [`reach`].
    pub places: &'static [&'static str],
}

/// All targets of this build.
pub const TARGETS: &[Target] = &[
    Target { name: "blk", run: |bytes| made_of(bytes, blk::run), places: blk::PLACES },
    Target { name: "net", run: |bytes| made_of(bytes, net::run), places: net::PLACES },
    Target { name: "rng", run: |bytes| made_of(bytes, rng::run), places: rng::PLACES },
    Target { name: "console", run: |bytes| made_of(bytes, console::run), places: console::PLACES },
    Target { name: "pci", run: |bytes| made_of(bytes, pci::run), places: pci::PLACES },
    Target { name: "wire", run: |bytes| made_of(bytes, wire::run), places: wire::PLACES },
    Target { name: "options", run: options::run, places: options::PLACES },
    Target { name: "etcd", run: etcd::run, places: etcd::PLACES },
    #[cfg(feature = "machine")]
    Target { name: "state", run: state::run, places: state::PLACES },
    #[cfg(feature = "machine")]
    Target { name: "http", run: http::run, places: http::PLACES },
];

/// Makes the input of `bytes` as `libfuzzer_sys::fuzz_target` does.
fn made_of<T: for<'a> Arbitrary<'a>>(bytes: &[u8], run: fn(T)) {
    if bytes.len() < T::size_hint(0).0 {
        return;
    }
    if let Ok(input) = T::arbitrary_take_rest(Unstructured::new(bytes)) {
        run(input);
    }
}
