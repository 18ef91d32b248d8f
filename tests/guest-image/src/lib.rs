//! The test guest's image: building this crate builds it (see `tests/guest/README.md` for what
//! it does and says). Scripts find the same file at `target/guest/understudy-guest`.

#![forbid(unsafe_code)]

/// The PVH ELF, by its absolute path.
pub const PATH: &str = env!("GUEST_IMAGE");
