//! The VMM: builds the machine, owns the control loop, binds everything.
//!
//! - [`boot`]: kernels into guest memory
//! - [`control`]: the control loop, which owns the VM's life
//! - [`cpu`]: vCPU threads
//! - [`device_manager`]: which devices a machine has, and where
//! - [`event`]: the event monitor
//! - [`ha`]: the machine as replication sees it
//! - [`http`]: the REST interface's server
//! - [`machine`]: one VM, and who may stop it
//! - [`memory`]: guest memory
//! - [`options`]: what the command line asks for
//! - [`progress`]: progress of long waits
//! - [`request`]: what clients ask of the control loop
//! - [`snapshot`]: to a directory and back
//! - [`tracking`]: how the pages that the guest writes are found

pub mod boot;
pub mod control;
pub mod cpu;
pub mod device_manager;
pub mod event;
pub mod ha;
pub mod http;
pub mod machine;
pub mod memory;
pub mod options;
pub mod progress;
pub mod request;
pub mod snapshot;
pub mod tracking;

pub use control::{Error, block_signals, run};
pub use devices::console::tty::restore_terminal;
pub use options::Options;
