//! The values of command line flags: option text in, configuration out.
//!
//! | module | holds |
//! |---|---|
//! | `device` | `--disk`, `--net`, `--rng`, `--serial`, `--console` |
//! | `machine` | `--cpus`, `--memory`, `--platform` |
//! | `process` | `--api-socket`, `--event-monitor`, `--restore` |
//! | `replication` | `--replicate`, `--receive-replica` |
//!
//! Only the syntax is checked here; whether the values make sense is for `validate` to say.

mod device;
mod machine;
mod process;
mod replication;
#[cfg(test)]
mod tests;

pub use device::{console, disk, net, rng};
pub use machine::{cpus, memory, platform};
pub use process::{Place, api_socket, event_monitor, restore};
