//! The model: every order of events of two hosts, a connection and an arbiter, within bounds.

pub mod config;
pub mod progress;
pub mod properties;
pub mod words;
pub mod world;
