//! What the server makes of a client's bytes, without a socket and without a control loop.

use super::head::parse;
use super::response::Response;
use super::route::{Refusal, route};
use crate::request::Request;

/// The first request of a connection.
#[derive(Debug)]
pub enum First {
    /// More bytes are needed.
    Incomplete,
    /// The head is refused with this status line.
    Refused { line: String },
    /// The route is refused with this status line. Bytes of head and body.
    Unrouted { head: usize, body: usize, line: String },
    /// For the control loop. Bytes of head and body.
    Request { head: usize, body: usize, request: Request },
}

impl First {
    /// More bytes are needed.
    #[must_use]
    pub fn is_incomplete(&self) -> bool {
        matches!(self, Self::Incomplete)
    }
}

/// Reads the first request in `bytes`, with which so many descriptors came.
#[must_use]
pub fn first(bytes: &[u8], descriptors: usize) -> First {
    let line = |response: Response| {
        let text = String::from_utf8_lossy(&response.encode(false)).into_owned();
        text.lines().next().unwrap_or_default().to_owned()
    };
    let (head, length) = match parse(bytes) {
        Ok(Some(found)) => found,
        Ok(None) => return First::Incomplete,
        Err(error) => {
            let response = Response::failure(error.status(), &[error.to_string()]);
            return First::Refused { line: line(response) };
        }
    };
    let Some(body) = bytes[length..].get(..head.body_length) else { return First::Incomplete };
    match route(head.method, &head.path, body, descriptors) {
        Ok(request) => First::Request { head: length, body: body.len(), request },
        Err(Refusal { status, chain }) => First::Unrouted {
            head: length,
            body: body.len(),
            line: line(Response::failure(status, &chain)),
        },
    }
}
