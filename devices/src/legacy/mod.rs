//! Small PC devices that kernels expect to find.

/// Clock of a PC at ports 0x70 and 0x71.
pub mod cmos;
/// Progress codes at port 0x80.
pub mod debug_port;
/// Keyboard controller at ports 0x60 to 0x64, as far as a reset needs it.
pub mod i8042;
