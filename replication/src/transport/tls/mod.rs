//! TLS 1.3 over TCP, with certificates on both sides.
//!
//! ```text
//! primary                                        backup
//!   ClientHello                           ->
//!                                         <-     ServerHello ... its certificate, Finished
//!   verifies it: authority, dates, name
//!   its own certificate, Finished         ->
//!                                                verifies it: authority, dates
//!                                         <-     a byte: the primary is admitted
//!   Hello ...                             ->
//! ```
//!
//! Enters: a directory of certificates, and TCP connections. Leaves: [`Stream`](super::Stream)s, or in
//! words why there is none. Always holds: nothing that a peer sends is taken for a frame, and nothing is
//! sent to it that is one, before its certificate was verified ([`handshake`]); a side with TLS never goes on
//! without. The byte makes both sides know it: TLS 1.3 lets a client finish before the server has seen its
//! certificate, and the reason of a refusal would come in the middle of the greeting.
//!
//! Which host owns the VM is no matter of TLS: certificates have dates, so this host's clock decides who is
//! admitted, and nothing else. A certificate that expires ends no session.

mod credentials;
mod errors;
mod handshake;
mod stream;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::sync::{Mutex, MutexGuard, PoisonError};

pub(crate) use credentials::{Client, CredentialError, Server};
pub use errors::{HandshakeError, Side};
pub(crate) use handshake::Deadline;

/// What both sides call this protocol (RFC 7301): a certificate of the same authority that serves something
/// else, or is meant for it, opens nothing here.
const PROTOCOL: &[u8] = b"understudy-replication";

/// The backup's word that the primary is admitted.
const ADMITTED: u8 = 1;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
