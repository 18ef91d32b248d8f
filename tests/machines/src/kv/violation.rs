//! What a correct server, alive or taken over, never shows its clients.

use std::io;

use guest_logic::kv::{BadRecord, Status};
use thiserror::Error;

/// One finding. Sequence numbers are those of the history's order of events.
#[derive(Debug, Error)]
pub enum Violation {
    #[error("Client {client}: its connection failed")]
    Connection {
        client: u32,
        #[source]
        source: io::Error,
    },
    #[error("Client {client}: the server closed the connection")]
    Closed { client: u32 },
    #[error("Client {client}: no answer within {limit_ms} ms")]
    Silent { client: u32, limit_ms: u128 },
    #[error("Client {client}: asked {asked:#x} and was answered {answered:#x}")]
    OutOfSequence { client: u32, asked: u64, answered: u64 },
    #[error("Client {client}: bytes came that answer nothing")]
    Surplus { client: u32 },
    #[error("Client {client}: the answer is not a response")]
    NoResponse { client: u32 },
    #[error("Client {client}: the server refused request {id:#x}: {status:?}")]
    Refused { client: u32, id: u64, status: Status },
    #[error("Client {client}: the answer to request {id:#x} speaks of another key or value")]
    Echo { client: u32, id: u64 },
    #[error("Key {key}: not linearizable:\n{operations}")]
    NotLinearizable { key: u32, operations: String },
    #[error("Key {key}: the search for a linearization took too long")]
    Undecided { key: u32 },
    #[error("Log: record {number} is damaged")]
    Damaged {
        number: u64,
        #[source]
        source: BadRecord,
    },
    #[error("Log: record {number} is missing, a later one is there")]
    Hole { number: u64 },
    #[error("Log: the acknowledged write of {value:#x} to key {key} is missing")]
    Lost { key: u32, value: u64 },
    #[error("Log: record {number} is of a write that was logged before")]
    Twice { number: u64 },
    #[error("Log: record {number} is of no write that a client asked for")]
    Stranger { number: u64 },
    #[error("Log: record {number} was acknowledged before one in front of it was asked for")]
    Order { number: u64 },
    #[error("Log: {value:#x} was read from key {key}, which the log says it did not have then")]
    Read { key: u32, value: u64 },
}

impl Violation {
    /// The finding and its causes in one line or, of a history, a few.
    #[must_use]
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text.push_str(&format!(": {error}"));
            cause = error.source();
        }
        text
    }
}
