//! Status codes and the bytes of an answer.

use std::fmt::Write as _;

use crate::request::{Failure, FailureKind};

/// The status codes that we send, with the standard's own phrases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Ok,
    NoContent,
    BadRequest,
    NotFound,
    RequestTimeout,
    Conflict,
    LengthRequired,
    BodyTooLarge,
    ExpectationFailed,
    HeadersTooLarge,
    Internal,
    Unavailable,
}

impl Status {
    fn line(self) -> &'static str {
        match self {
            Self::Ok => "200 OK",
            Self::NoContent => "204 No Content",
            Self::BadRequest => "400 Bad Request",
            Self::NotFound => "404 Not Found",
            Self::RequestTimeout => "408 Request Timeout",
            Self::Conflict => "409 Conflict",
            Self::LengthRequired => "411 Length Required",
            Self::BodyTooLarge => "413 Content Too Large",
            Self::ExpectationFailed => "417 Expectation Failed",
            Self::HeadersTooLarge => "431 Request Header Fields Too Large",
            Self::Internal => "500 Internal Server Error",
            Self::Unavailable => "503 Service Unavailable",
        }
    }
}

impl From<FailureKind> for Status {
    fn from(kind: FailureKind) -> Self {
        match kind {
            FailureKind::BadRequest => Self::BadRequest,
            FailureKind::NotFound => Self::NotFound,
            FailureKind::Conflict => Self::Conflict,
            FailureKind::Internal => Self::Internal,
        }
    }
}

/// What tells a client to go on and send the body that it announced.
pub(super) const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// An answer on its way out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Response {
    status: Status,
    body: String,
}

impl Response {
    /// Success with nothing to say.
    pub(super) fn no_content() -> Self {
        Self { status: Status::NoContent, body: String::new() }
    }

    /// Success with a JSON text, or with an empty body where a client expects 200 all the same.
    pub(super) fn ok(body: String) -> Self {
        Self { status: Status::Ok, body }
    }

    /// A failure as a JSON array of its causes, outermost first.
    pub(super) fn failure(status: Status, chain: &[String]) -> Self {
        let body = serde_json::to_string(chain).expect("an array of strings is always JSON");
        Self { status, body }
    }

    /// The bytes to send.
    pub(super) fn encode(&self, keep_alive: bool) -> Vec<u8> {
        let connection = if keep_alive { "keep-alive" } else { "close" };
        let mut text = format!(
            "HTTP/1.1 {}\r\nServer: Cloud Hypervisor API\r\nConnection: {connection}\r\n",
            self.status.line()
        );
        if !self.body.is_empty() {
            text.push_str("Content-Type: application/json\r\n");
        }
        // RFC 9110, 8.6: a 204 has no Content-Length, every other answer of ours has one.
        if self.status != Status::NoContent {
            write!(text, "Content-Length: {}\r\n", self.body.len())
                .expect("writing to a string cannot fail");
        }
        text.push_str("\r\n");
        text.push_str(&self.body);
        text.into_bytes()
    }
}

impl From<&Failure> for Response {
    fn from(failure: &Failure) -> Self {
        Self::failure(failure.kind.into(), &failure.chain)
    }
}
