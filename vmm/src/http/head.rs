//! Request line and headers (RFC 9112), and what they mean to us.

use super::response::Status;
use super::{BODY_BYTES_MAX, HEAD_BYTES_MAX};

/// Headers of a request. Clients send about five.
const HEADERS_MAX: usize = 64;

/// The methods that the interface knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Method {
    Get,
    Put,
    Other,
}

/// A request without its body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) method: Method,
    /// The path alone, without host and query.
    pub(super) path: String,
    /// Bytes of the body that follows, at most [`BODY_BYTES_MAX`].
    pub(super) body_length: usize,
    /// The connection goes on after the answer.
    pub(super) keep_alive: bool,
    /// The client waits for `100 Continue` before it sends the body.
    pub(super) expects_continue: bool,
}

/// Why a head is refused. The connection ends with any of them, since where the next request
/// begins is not known.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum HeadError {
    #[error("Request head is larger than {HEAD_BYTES_MAX} bytes")]
    TooLarge,
    #[error("Request head is malformed: {0}")]
    Malformed(httparse::Error),
    #[error("Request ended within its head")]
    Truncated,
    #[error("Header Content-Length is no number: {0:?}")]
    Length(String),
    #[error("Headers contradict each other about the length of the body")]
    LengthConflict,
    #[error("Request body is larger than {BODY_BYTES_MAX} bytes")]
    BodyTooLarge,
    #[error("Transfer-Encoding is not supported: send a Content-Length")]
    TransferEncoding,
    #[error("Expectation is unknown: {0:?}")]
    Expectation(String),
}

impl HeadError {
    pub(super) fn status(&self) -> Status {
        match self {
            Self::TooLarge => Status::HeadersTooLarge,
            Self::BodyTooLarge => Status::BodyTooLarge,
            Self::TransferEncoding => Status::LengthRequired,
            Self::Expectation(_) => Status::ExpectationFailed,
            _ => Status::BadRequest,
        }
    }
}

/// Parses the head at the start of `bytes`: the head and its length, or nothing where more bytes
/// are needed.
pub(super) fn parse(bytes: &[u8]) -> Result<Option<(Head, usize)>, HeadError> {
    let window = &bytes[..bytes.len().min(HEAD_BYTES_MAX)];
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    let length = match request.parse(window) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) if window.len() == HEAD_BYTES_MAX => {
            return Err(HeadError::TooLarge);
        }
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(error) => return Err(HeadError::Malformed(error)),
    };
    let method = match request.method {
        Some("GET") => Method::Get,
        Some("PUT") => Method::Put,
        _ => Method::Other,
    };
    let mut head = Head {
        method,
        path: path_of(request.path.unwrap_or_default()).to_owned(),
        body_length: 0,
        keep_alive: request.version == Some(1),
        expects_continue: false,
    };
    interpret(request.headers, &mut head)?;
    Ok(Some((head, length)))
}

/// Reads the headers that matter into `head`.
fn interpret(headers: &[httparse::Header<'_>], head: &mut Head) -> Result<(), HeadError> {
    let mut length = None;
    let mut encoded = false;
    for header in headers {
        let value = String::from_utf8_lossy(header.value);
        let value = value.trim();
        if header.name.eq_ignore_ascii_case("content-length") {
            let parsed = parse_length(value)?;
            if length.is_some_and(|known| known != parsed) {
                return Err(HeadError::LengthConflict);
            }
            length = Some(parsed);
        } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
            encoded = true;
        } else if header.name.eq_ignore_ascii_case("connection") {
            for option in value.split(',').map(str::trim) {
                if option.eq_ignore_ascii_case("close") {
                    head.keep_alive = false;
                } else if option.eq_ignore_ascii_case("keep-alive") {
                    head.keep_alive = true;
                }
            }
        } else if header.name.eq_ignore_ascii_case("expect") {
            if !value.eq_ignore_ascii_case("100-continue") {
                return Err(HeadError::Expectation(value.to_owned()));
            }
            head.expects_continue = true;
        }
    }
    match (encoded, length) {
        (true, Some(_)) => Err(HeadError::LengthConflict),
        (true, None) => Err(HeadError::TransferEncoding),
        (false, Some(length)) if length > BODY_BYTES_MAX => Err(HeadError::BodyTooLarge),
        (false, length) => {
            head.body_length = usize::try_from(length.unwrap_or(0))
                .expect("a length within the limit fits any address space");
            Ok(())
        }
    }
}

/// Digits only: the standard library would take a sign as well.
fn parse_length(value: &str) -> Result<u64, HeadError> {
    let digits = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit());
    if !digits {
        return Err(HeadError::Length(value.chars().take(64).collect()));
    }
    // Only too many digits are left to fail, and such a body is certainly too large.
    value.parse().map_err(|_| HeadError::BodyTooLarge)
}

/// The path of a request target in origin form or in absolute form (RFC 9112, 3.2).
fn path_of(target: &str) -> &str {
    let path = match target.split_once("://") {
        Some((scheme, rest)) if !scheme.contains('/') => match rest.find('/') {
            Some(slash) => &rest[slash..],
            None => "/",
        },
        _ => target,
    };
    path.split(['?', '#']).next().unwrap_or_default()
}
