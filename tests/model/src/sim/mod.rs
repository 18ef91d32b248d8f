//! The simulator: long runs of the engines that ship, with time, memory, clients and faults, each decided
//! by a seed, which reproduces it exactly.

pub mod cluster;
pub mod coverage;
pub mod driver;
pub mod etcd;
pub mod host;
pub mod machine;
pub mod memory;
pub mod oracle;
pub mod plan;
pub mod replica;
pub mod run;
pub mod state;
pub mod storage;
pub mod total;
