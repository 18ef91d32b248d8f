//! One client: read a request, route it, wait for the control loop's answer, write it.
//!
//! ```text
//!            ┌────────── idle ◄──────────────────────────┐
//!            │ silence    │ first byte                   │ answer written, keep-alive
//!            ▼            ▼                              │
//!          close ◄── reading ──► routed ──► waiting for the control loop
//!            ▲   late    │          │ refused
//!            └── linger ◄┴──────────┘ (only where the request's end is unknown)
//! ```

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, bounded};

use super::head::{self, Head, HeadError};
use super::incoming::{Incoming, ReadError};
use super::response::{CONTINUE, Response, Status};
use super::route::{self, Refusal};
use crate::request::{Call, Reply, Request};

/// How long a client may take for what.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// Silence between two requests.
    pub(super) idle: Duration,
    /// A request from its first byte to its last.
    pub(super) request: Duration,
    /// Accepting an answer.
    pub(super) answer: Duration,
    /// How long a client that is still sending is read after a refusal, so that it gets to read
    /// why: closing at once would break its connection first.
    pub(super) linger: Duration,
    /// How long clients that are being answered may hold up the end of the server.
    pub(super) farewell: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            idle: Duration::from_secs(60),
            request: Duration::from_secs(10),
            answer: Duration::from_secs(10),
            linger: Duration::from_secs(1),
            farewell: Duration::from_secs(2),
        }
    }
}

/// How much of what a refused client sends is read and dropped.
const LINGER_BYTES_MAX: usize = 256 << 20;

/// A request that has come whole.
struct Received {
    head: Head,
    body: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

/// How reading a request ends without one.
enum NoRequest {
    /// The client has nothing more to ask, or cannot be talked to.
    Closed,
    /// The client is told, and the connection ends.
    Refused(Status, String),
}

impl From<HeadError> for NoRequest {
    fn from(error: HeadError) -> Self {
        Self::Refused(error.status(), error.to_string())
    }
}

impl From<ReadError> for NoRequest {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::TimedOut => {
                Self::Refused(Status::RequestTimeout, "Request did not come in time".to_owned())
            }
            ReadError::TooManyDescriptors => Self::Refused(Status::BadRequest, error.to_string()),
            ReadError::Broken(_) => Self::Closed,
        }
    }
}

/// Serves a client until it goes, fails or is refused.
pub(super) fn run(stream: &UnixStream, calls: &Sender<Call>, patience: Patience) {
    let client = Client { stream, patience };
    let mut incoming = Incoming::new();
    loop {
        match client.read_request(&mut incoming) {
            Ok(received) => {
                let keep_alive = received.head.keep_alive;
                let response = answer(received, calls);
                if client.send(&response.encode(keep_alive)).is_err() {
                    return;
                }
                if !keep_alive {
                    return client.linger();
                }
            }
            Err(NoRequest::Closed) => return,
            Err(NoRequest::Refused(status, message)) => {
                let response = Response::failure(status, &[message]);
                if client.send(&response.encode(false)).is_ok() {
                    client.linger();
                }
                return;
            }
        }
    }
}

/// A connection and how patient we are with it.
struct Client<'a> {
    stream: &'a UnixStream,
    patience: Patience,
}

impl Client<'_> {
    fn read_request(&self, incoming: &mut Incoming) -> Result<Received, NoRequest> {
        if incoming.bytes().is_empty() {
            match incoming.fill(self.stream, Instant::now() + self.patience.idle) {
                Ok(0) | Err(ReadError::TimedOut) => return Err(NoRequest::Closed),
                Ok(_) => {}
                Err(error) => return Err(error.into()),
            }
        }
        // One deadline for the whole request: a byte now and then does not extend it.
        let deadline = Instant::now() + self.patience.request;
        let (head, length) = loop {
            if let Some(parsed) = head::parse(incoming.bytes())? {
                break parsed;
            }
            if incoming.fill(self.stream, deadline)? == 0 {
                return Err(HeadError::Truncated.into());
            }
        };
        incoming.take(length);
        if head.expects_continue && incoming.bytes().len() < head.body_length {
            self.send(CONTINUE).map_err(|_| NoRequest::Closed)?;
        }
        while incoming.bytes().len() < head.body_length {
            if incoming.fill(self.stream, deadline)? == 0 {
                let message = format!(
                    "Request body ended after {} of {} bytes",
                    incoming.bytes().len(),
                    head.body_length
                );
                return Err(NoRequest::Refused(Status::BadRequest, message));
            }
        }
        let body = incoming.take(head.body_length);
        let descriptors = incoming.take_descriptors();
        Ok(Received { head, body, descriptors })
    }

    /// Writes all of `bytes` before the deadline, however few the client takes at a time.
    fn send(&self, mut bytes: &[u8]) -> io::Result<()> {
        let mut stream = self.stream;
        let deadline = Instant::now() + self.patience.answer;
        while !bytes.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            stream.set_write_timeout(Some(left))?;
            match stream.write(bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => bytes = &bytes[count..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Ends our side and drops what the client still sends, within limits.
    fn linger(&self) {
        let mut stream = self.stream;
        if stream.shutdown(Shutdown::Write).is_err() {
            return;
        }
        let deadline = Instant::now() + self.patience.linger;
        let mut scrap = vec![0; 64 << 10];
        let mut dropped = 0;
        while dropped < LINGER_BYTES_MAX {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || stream.set_read_timeout(Some(left)).is_err() {
                return;
            }
            match stream.read(&mut scrap) {
                Ok(0) => return,
                Ok(count) => dropped += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }
}

/// Asks the control loop and turns what it says into a response.
fn answer(received: Received, calls: &Sender<Call>) -> Response {
    let Received { head, body, descriptors } = received;
    let request = match route::route(head.method, &head.path, &body, descriptors.len()) {
        Ok(request) => request,
        Err(Refusal { status, chain }) => return Response::failure(status, &chain),
    };
    // The body may be large and the control loop slow.
    drop(body);
    let empty = match request {
        // Clients of Cloud Hypervisor see 200 here, and 204 everywhere else.
        Request::VmmShutdown => Response::ok(String::new()),
        _ => Response::no_content(),
    };
    let (reply, replies) = bounded(1);
    let gone = || {
        let chain = ["The VMM is shutting down".to_owned()];
        Response::failure(Status::Internal, &chain)
    };
    if calls.send(Call { request, fds: descriptors, reply }).is_err() {
        return gone();
    }
    match replies.recv() {
        Ok(Ok(Reply::Empty)) => empty,
        Ok(Ok(Reply::Json(text))) => Response::ok(text),
        Ok(Err(failure)) => Response::from(&failure),
        Err(_) => gone(),
    }
}
