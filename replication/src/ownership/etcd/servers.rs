//! The servers of a cluster, over the network: who is asked at the same time is asked by threads.

use std::cell::RefCell;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use api::endpoint::EtcdServer;

use super::error::{CallError, FileError};
use super::gateway::{Gateway, Heard, Round};
use super::http::{Called, Caller};
use super::{Access, files};

/// Where they are, and how they are talked to.
#[derive(Debug)]
pub struct Servers {
    servers: Vec<EtcdServer>,
    access: Access,
    /// Of the user's last login.
    pub(super) token: RefCell<Option<String>>,
}

/// A server's place, and what its call came to.
type Answer = (usize, Called);

/// Of one operation.
struct Calls<'a> {
    of: &'a Servers,
    caller: Caller,
    /// None once nobody else is asked: the channel ends with the last of the threads.
    sender: RefCell<Option<Sender<Answer>>>,
    answers: Receiver<Answer>,
}

impl Servers {
    /// As [`super::EtcdArbiter::new`].
    pub(super) fn new(
        servers: Vec<EtcdServer>,
        access: Access,
    ) -> Result<Self, (&'static str, FileError)> {
        let servers = Self { servers, access, token: RefCell::new(None) };
        servers.caller().map_err(|error| ("arbiter_tls_dir", error))?;
        if let Some(path) = &servers.access.credentials {
            files::credentials(path).map_err(|error| ("arbiter_credentials", error))?;
            if servers.servers.iter().any(|server| !server.tls) {
                tracing::warn!("arbiter_credentials go over the network as they are: use https:");
            }
        }
        Ok(servers)
    }

    fn caller(&self) -> Result<Caller, FileError> {
        Caller::new(&self.servers, &self.access)
    }
}

impl Gateway for Servers {
    fn servers(&self) -> &[EtcdServer] {
        &self.servers
    }

    fn begin(&self) -> Result<Box<dyn Round + '_>, FileError> {
        let (sender, answers) = channel();
        let sender = RefCell::new(Some(sender));
        Ok(Box::new(Calls { of: self, caller: self.caller()?, sender, answers }))
    }
}

impl Round for Calls<'_> {
    /// From a thread of its own, which ends with the call's limits, whoever still waits for it.
    fn ask(&self, server: usize, path: &str, body: &str) {
        let Some(answered) = self.sender.borrow().clone() else { return };
        let (caller, token) = (self.caller.clone(), self.of.token.borrow().clone());
        let url = self.of.servers[server].clone();
        let (path, body) = (path.to_owned(), body.to_owned());
        let call = move || {
            let called = caller.call(&url, &path, &body, token);
            // Nobody waits any more where another server was faster.
            let _ = answered.send((server, called));
        };
        let thread = std::thread::Builder::new().name("repl-etcd".to_owned());
        if let Err(error) = thread.spawn(call) {
            tracing::warn!("{} was not asked who owns the VM: {error}", self.of.servers[server]);
        }
    }

    fn hear(&self, within: Option<Duration>) -> Heard {
        let heard = match within {
            Some(within) => self.answers.recv_timeout(within),
            None => {
                self.sender.replace(None);
                self.answers.recv().map_err(|_| RecvTimeoutError::Disconnected)
            }
        };
        match heard {
            Ok((server, Called { result, token })) => {
                if self.of.access.credentials.is_some() {
                    self.of.token.replace(token);
                }
                Heard::Answer(server, result)
            }
            Err(RecvTimeoutError::Timeout) => Heard::Silence,
            Err(RecvTimeoutError::Disconnected) => Heard::Nobody,
        }
    }

    fn post(&self, server: usize, path: &str, body: &str) -> Result<Vec<u8>, CallError> {
        let token = self.of.token.borrow().clone();
        let answer = self.caller.post(&self.of.servers[server], path, body, token.as_deref());
        if answer.is_err() {
            // Whatever the token was good for: the read that follows logs in.
            self.of.token.replace(None);
        }
        answer
    }
}
