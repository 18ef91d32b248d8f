//! One connection to the server, one operation at a time.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use guest_logic::kv::{self, FRAME_BYTES, Request, Response, STOP_KEY, Status};

use super::history::{Event, Kind, Operation, Returned, Sequence};
use super::violation::Violation;

/// An odd factor makes of each id another value, and never zero.
const SCATTER: u64 = 0x9e37_79b9_7f4a_7c15;

/// A connected client and what it saw.
pub struct Client {
    number: u32,
    stream: TcpStream,
    sequence: Arc<Sequence>,
    silence_limit: Duration,
    asked: u64,
    operations: Vec<Operation>,
}

impl Client {
    /// Connects from the calling thread's network namespace. Numbers are unique in a history.
    pub fn connect(
        number: u32,
        address: SocketAddr,
        silence_limit: Duration,
        sequence: &Arc<Sequence>,
    ) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&address, silence_limit)
            .with_context(|| format!("Client {number} cannot connect to {address}"))?;
        stream.set_nodelay(true)?;
        Ok(Self {
            number,
            stream,
            sequence: Arc::clone(sequence),
            silence_limit,
            asked: 0,
            operations: Vec::new(),
        })
    }

    /// Reads a key.
    pub fn get(&mut self, key: u32) -> Result<u64, Violation> {
        self.operate(key, Kind::Get)
    }

    /// Writes a value that nobody else writes.
    pub fn put(&mut self, key: u32) -> Result<(), Violation> {
        let value = self.next_id().wrapping_mul(SCATTER);
        self.operate(key, Kind::Put(value)).map(|_| ())
    }

    /// Has the guest powered off. No part of the history.
    pub fn stop(&mut self) -> Result<(), Violation> {
        let id = self.next_id();
        let operation = kv::Operation::Stop;
        self.exchange(Request { operation, key: STOP_KEY, value: 0, id }).map(|_| ())
    }

    /// Whether the connection is open, and nothing came on it that answers nothing.
    pub fn check_idle(&self) -> Result<(), Violation> {
        let client = self.number;
        let failed = |source| Violation::Connection { client, source };
        self.stream.set_nonblocking(true).map_err(failed)?;
        let peeked = self.stream.peek(&mut [0]);
        self.stream.set_nonblocking(false).map_err(failed)?;
        match peeked {
            Ok(0) => Err(Violation::Closed { client }),
            Ok(_) => Err(Violation::Surplus { client }),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
            Err(source) => Err(failed(source)),
        }
    }

    /// Everything that it asked, in order.
    #[must_use]
    pub fn into_operations(self) -> Vec<Operation> {
        self.operations
    }

    /// The same, and it begins a new list.
    pub fn take_operations(&mut self) -> Vec<Operation> {
        std::mem::take(&mut self.operations)
    }

    /// The keys that it has to do with.
    #[must_use]
    pub fn keys(&self) -> BTreeSet<u32> {
        self.operations.iter().map(|operation| operation.key).collect()
    }

    fn next_id(&self) -> u64 {
        (u64::from(self.number) + 1) << 32 | self.asked
    }

    fn operate(&mut self, key: u32, kind: Kind) -> Result<u64, Violation> {
        let id = self.next_id();
        let (operation, value) = match kind {
            Kind::Get => (kv::Operation::Get, 0),
            Kind::Put(value) => (kv::Operation::Put, value),
        };
        let invoked = Event::now(&self.sequence);
        let at = self.operations.len();
        let client = self.number;
        self.operations.push(Operation { client, id, key, kind, invoked, returned: None });
        let response = self.exchange(Request { operation, key, value, id })?;
        let event = Event::now(&self.sequence);
        if response.key != key || (kind != Kind::Get && response.value != value) {
            return Err(Violation::Echo { client, id });
        }
        self.operations[at].returned = Some(Returned { event, value: response.value });
        Ok(response.value)
    }

    fn exchange(&mut self, request: Request) -> Result<Response, Violation> {
        let client = self.number;
        self.asked += 1;
        self.stream
            .write_all(&request.encode())
            .map_err(|source| Violation::Connection { client, source })?;
        let bytes = self.receive()?;
        let response = Response::decode(&bytes).map_err(|_| Violation::NoResponse { client })?;
        if response.id != request.id {
            let (asked, answered) = (request.id, response.id);
            return Err(Violation::OutOfSequence { client, asked, answered });
        }
        if response.status != Status::Ok {
            return Err(Violation::Refused { client, id: request.id, status: response.status });
        }
        Ok(response)
    }

    /// One frame; the limit is for all of it.
    fn receive(&mut self) -> Result<[u8; FRAME_BYTES], Violation> {
        let client = self.number;
        let until = Instant::now() + self.silence_limit;
        let mut bytes = [0; FRAME_BYTES];
        let mut have = 0;
        while have < FRAME_BYTES {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let limit_ms = self.silence_limit.as_millis();
                return Err(Violation::Silent { client, limit_ms });
            }
            let result = self
                .stream
                .set_read_timeout(Some(left))
                .and_then(|()| self.stream.read(&mut bytes[have..]));
            match result {
                Ok(0) => return Err(Violation::Closed { client }),
                Ok(count) => have += count,
                Err(error) if is_passing(error.kind()) => {}
                Err(source) => return Err(Violation::Connection { client, source }),
            }
        }
        Ok(bytes)
    }
}

/// Of a read that may be tried again: its time was up, or a signal came.
fn is_passing(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}
