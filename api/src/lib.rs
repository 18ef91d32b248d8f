//! What a client of the VMM sees: types, option syntax, validation, a small client.
//!
//! | module | holds |
//! |---|---|
//! | [`client`] | a blocking client |
//! | [`config`] | a VM's configuration and the bodies of requests |
//! | [`endpoint`] | where a peer or an arbiter is |
//! | [`flag`] | the values of command line flags |
//! | [`invalid`] | what can be wrong with a configuration |
//! | [`option`] | the syntax `key=value,key=value` |
//! | [`replication`] | the replication surface |
//! | [`response`] | answers, and the version |
#![forbid(unsafe_code)]

pub mod client;
pub mod config;
pub mod endpoint;
pub mod flag;
pub mod invalid;
pub mod option;
pub mod replication;
pub mod response;
