//! The REST interface: HTTP/1.1 and JSON over a UNIX socket.
//!
//! What enters is whatever a client writes. What leaves towards the control loop is a
//! [`Call`](crate::request::Call) whose body has been parsed; what leaves towards the client is one
//! response for one request, in order.
//!
//! | module | holds |
//! |---|---|
//! | `connection` | one client: read, route, wait for the answer, write |
//! | `descriptors` | receiving bytes together with descriptors |
//! | `head` | request line and headers, and what they mean |
//! | `incoming` | the bounded buffer of one connection |
//! | `response` | status codes and the bytes of an answer |
//! | `route` | which path is which request |
//! | `server` | the listening thread and the limit on clients |
//! | `socket` | claiming and removing the socket's file |
//!
//! What always holds: memory is bounded by [`CONNECTIONS_MAX`] × ([`BODY_BYTES_MAX`] and the
//! answer), descriptors by [`CONNECTIONS_MAX`] × those of two messages; every read and write has a
//! deadline, so a client that is slow, silent or broken holds up its own connection and nothing
//! else; a connection closes after any request whose end is not known for certain.

mod connection;
mod descriptors;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod head;
mod incoming;
mod response;
mod route;
mod server;
mod socket;
#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;

pub use descriptors::inherit;
pub use server::{HttpServer, serve};

/// Clients that are served at a time; a further one gets 503.
pub const CONNECTIONS_MAX: usize = 10;
/// Bytes of a request's body; a longer one gets 413 and is not read.
pub const BODY_BYTES_MAX: u64 = 4 << 20;
/// Bytes of a request line with its headers; a longer one gets 431.
pub const HEAD_BYTES_MAX: usize = 16 << 10;

/// The interface cannot be offered.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    #[error("API socket {0} is in use by another process")]
    InUse(PathBuf),
    #[error("{0} exists and is no socket")]
    NotSocket(PathBuf),
    #[error("Cannot examine the API socket {path}")]
    Examine { path: PathBuf, source: io::Error },
    #[error("Cannot remove the stale API socket {path}")]
    RemoveStale { path: PathBuf, source: io::Error },
    #[error("Cannot listen on the API socket {path}")]
    Bind { path: PathBuf, source: io::Error },
    #[error("Descriptor given as API socket is no listening UNIX socket")]
    NotListening(#[source] io::Error),
    #[error("Cannot start the HTTP server")]
    Start(#[source] io::Error),
}
