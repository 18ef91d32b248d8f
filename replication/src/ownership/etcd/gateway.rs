//! What the client needs of the way to a cluster's servers, request by request: the network, or what a
//! simulator has in its place.

use std::io;
use std::time::Duration;

use api::endpoint::EtcdServer;

use super::error::{CallError, FileError};

/// The servers of a cluster. Each has a place in their list, by which it is asked.
pub trait Gateway: Send {
    /// One or more, in the order in which they are asked.
    fn servers(&self) -> &[EtcdServer];

    /// Begins an operation, with certificates as they are now.
    ///
    /// # Errors
    /// A file cannot be used: nobody is asked.
    fn begin(&self) -> Result<Box<dyn Round + '_>, FileError>;
}

/// The requests of one operation. Bodies are JSON; an answer is the body of one whose status is 200.
pub trait Round {
    /// Asks a server and waits for nothing. The request changes nothing, so it may be repeated.
    fn ask(&self, server: usize, path: &str, body: &str);

    /// The answer that comes first of those that were asked. `within`: how long to wait for it; `None`
    /// once nobody else will be asked: until all have answered or failed, and that takes no longer than a
    /// call may.
    fn hear(&self, within: Option<Duration>) -> Heard;

    /// Sends a request once, and waits for its answer.
    ///
    /// # Errors
    /// [`CallError`]: whether it took effect is unknown.
    fn post(&self, server: usize, path: &str, body: &str) -> Result<Vec<u8>, CallError>;
}

/// What a wait for answers came to.
#[derive(Debug)]
pub enum Heard {
    /// Of the server at this place.
    Answer(usize, Result<Vec<u8>, CallError>),
    /// Nobody has answered in time.
    Silence,
    /// Nobody will: all have.
    Nobody,
}

/// A connection that failed.
impl From<io::Error> for CallError {
    fn from(error: io::Error) -> Self {
        ureq::Error::Io(error).into()
    }
}
