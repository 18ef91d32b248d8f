//! Clients of the key-value server in a protected guest, and whether what they saw can be true.
//!
//! - [`history`]: the operations of all clients in one order of events
//! - [`client`]: one connection, one operation at a time
//! - [`crowd`]: many clients on threads of their own
//! - [`linear`]: whether a history is that of one register for each key
//! - [`zones`]: the same by the values' zones in time, without a search
//! - [`log`]: whether the server's log on disk has every write that was acknowledged
//! - [`judge`]: all checks of what was seen
//! - [`violation`]: what a correct server never shows
//! - [`figures`]: what the clients felt: silence, latency
//! - [`round`]: one round: a pair, a crowd, a blow, the verdict

pub mod client;
pub mod crowd;
pub mod figures;
pub mod history;
pub mod judge;
pub mod linear;
pub mod log;
pub mod round;

pub mod violation;
pub mod zones;
