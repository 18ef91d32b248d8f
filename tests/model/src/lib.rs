//! The ownership and epoch protocol under a model checker and a seeded simulator.
//!
//! Both drive the state machines that ship, `replication::protocol`; nothing of them is copied here.
//!
//! - [`vm`]: what is needed of a machine;
//! - [`host`]: the model's engines of both roles around the shipped machines, without threads and sockets;
//! - [`guest`]: where a machine is in its history, and what of that has left;
//! - [`ghost`]: what an observer outside knows, and what must hold of it;
//! - [`arbiter`]: the record, and how calls can go wrong;
//! - [`broken`]: rules broken on purpose, each of which has to be found;
//! - [`model`]: every order of events, within bounds;
//! - [`sim`]: long runs of the engines that ship, with time, memory and clients, each from a seed;
//! - [`check`]: runs explorations and says what they found.
#![forbid(unsafe_code)]

pub mod arbiter;
pub mod broken;
pub mod check;
pub mod ghost;
pub mod guest;
pub mod host;
pub mod model;
pub mod sim;
pub mod vm;
