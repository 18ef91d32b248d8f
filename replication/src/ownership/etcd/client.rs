//! Calls to the servers of a cluster: which is asked, when the next is asked beside it, and what one
//! answer says about another.

use std::cell::{Cell, RefCell};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use api::endpoint::EtcdServer;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::Access;
use super::answer::{self, Entry, Found, Place, SwapOutcome};
use super::error::{CallError, EtcdError, FileError};
use super::files;
use super::http::{Called, Caller};

/// After this a server that is silent has the next one asked beside it. Some times of what a server
/// that lives takes for a read, and little beside the time-out that a take-over begins with.
const NEXT_AFTER: Duration = Duration::from_millis(50);

/// The servers, and what was learnt about them.
#[derive(Debug)]
pub(super) struct Client {
    servers: Vec<EtcdServer>,
    access: Access,
    /// Place of the server that answered last: the next operation begins there.
    last: Cell<usize>,
    /// Of the answer that came last: another cluster, or an earlier time, is none of ours.
    place: Cell<Option<Place>>,
    token: RefCell<Option<String>>,
}

/// One operation: certificates as they are now.
pub(super) struct Calls<'a> {
    client: &'a Client,
    caller: Caller,
}

/// A server's place, and what it says.
type Answer = (usize, Called<Found>);

impl Client {
    /// As [`super::EtcdArbiter::new`].
    pub(super) fn new(
        servers: Vec<EtcdServer>,
        access: Access,
    ) -> Result<Self, (&'static str, FileError)> {
        let client = Self {
            servers,
            access,
            last: Cell::new(0),
            place: Cell::new(None),
            token: RefCell::new(None),
        };
        client.caller().map_err(|error| ("arbiter_tls_dir", error))?;
        if let Some(path) = &client.access.credentials {
            files::credentials(path).map_err(|error| ("arbiter_credentials", error))?;
            if client.servers.iter().any(|server| !server.tls) {
                tracing::warn!("arbiter_credentials go over the network as they are: use https:");
            }
        }
        Ok(client)
    }

    fn caller(&self) -> Result<Caller, FileError> {
        Caller::new(&self.servers, &self.access)
    }

    /// Asks this server first.
    #[cfg(test)]
    pub(super) fn begin_with(&self, server: usize) {
        self.last.set(server);
    }

    #[cfg(test)]
    pub(super) fn token(&self) -> Option<String> {
        self.token.borrow().clone()
    }

    #[cfg(test)]
    pub(super) fn set_token(&self, token: &str) {
        self.token.replace(Some(token.to_owned()));
    }

    /// Begins an operation.
    pub(super) fn calls(&self) -> Result<Calls<'_>, EtcdError> {
        let failed = |error| {
            let failure = |server: &EtcdServer| (server.clone(), CallError::File(error));
            EtcdError::NoAnswer(self.servers.first().map(failure).into_iter().collect())
        };
        Ok(Calls { client: self, caller: self.caller().map_err(failed)? })
    }
}

impl Calls<'_> {
    /// What stands under `key`, and the place of the server that said so. Each server is asked once,
    /// the one that answered last first; the next beside it as soon as it fails or is silent for
    /// [`NEXT_AFTER`]. The first usable answer counts.
    pub(super) fn range(&self, key: &[u8]) -> Result<(usize, Option<Entry>), EtcdError> {
        let (count, first) = (self.client.servers.len(), self.client.last.get());
        let mut turns = (0..count).map(|turn| (first + turn) % count);
        let (sender, answers) = channel();
        let mut sender = Some(sender);
        let mut failures = Vec::new();
        while let Some((server, called)) = self.next_answer(key, &mut turns, &mut sender, &answers)
        {
            match self.heard(called) {
                Ok(entry) => {
                    self.client.last.set(server);
                    return Ok((server, entry));
                }
                Err(error) => {
                    let server = &self.client.servers[server];
                    tracing::warn!("{server} did not say who owns the VM: {error}");
                    failures.push((server.clone(), error));
                }
            }
        }
        Err(EtcdError::NoAnswer(failures))
    }

    /// Asks one server more, and others until somebody answers; `None` once all have.
    fn next_answer(
        &self,
        key: &[u8],
        turns: &mut impl Iterator<Item = usize>,
        sender: &mut Option<Sender<Answer>>,
        answers: &Receiver<Answer>,
    ) -> Option<Answer> {
        loop {
            if let Some(answered) = sender {
                match turns.next() {
                    Some(server) => self.ask(server, key, answered.clone()),
                    // From now on the channel ends with the last of the threads.
                    None => *sender = None,
                }
            }
            if sender.is_none() {
                return answers.recv().ok();
            }
            match answers.recv_timeout(NEXT_AFTER) {
                Ok(answer) => return Some(answer),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return None,
            }
        }
    }

    /// Asks a server from a thread of its own, which ends with the call's limits, whoever still
    /// waits for it.
    fn ask(&self, server: usize, key: &[u8], answered: Sender<Answer>) {
        let (caller, token) = (self.caller.clone(), self.client.token.borrow().clone());
        let (url, key) = (self.client.servers[server].clone(), key.to_owned());
        let call = move || {
            let body = json!({"key": STANDARD.encode(&key)});
            let parse = |text: &[u8]| answer::range(text, &key);
            let called = caller.call(&url, "/v3/kv/range", &body, token, parse);
            // Nobody waits any more where another server was faster.
            let _ = answered.send((server, called));
        };
        let thread = std::thread::Builder::new().name("repl-etcd".to_owned());
        if let Err(error) = thread.spawn(call) {
            tracing::warn!(
                "{} was not asked who owns the VM: {error}",
                self.client.servers[server]
            );
        }
    }

    /// What a read's answer is worth.
    fn heard(&self, called: Called<Found>) -> Result<Option<Entry>, CallError> {
        if self.client.access.credentials.is_some() {
            self.client.token.replace(called.token);
        }
        let found = called.result?;
        self.goes_on(found.place)?;
        Ok(found.entry)
    }

    /// Puts `value` if the key's last change has `revision`, at this server and once.
    pub(super) fn swap(
        &self,
        server: usize,
        key: &[u8],
        revision: i64,
        value: &[u8],
    ) -> Result<SwapOutcome, EtcdError> {
        let body = transaction(key, revision, value);
        let parse = |text: &[u8]| answer::swap(text, key);
        let token = self.client.token.borrow().clone();
        let url = &self.client.servers[server];
        let swapped = self.caller.post(url, "/v3/kv/txn", &body, token.as_deref(), parse);
        let swapped = swapped.and_then(|swapped| {
            self.goes_on(swapped.place)?;
            Ok(swapped.outcome)
        });
        swapped.map_err(|error| {
            // Whatever the token was good for: the read that follows logs in.
            self.client.token.replace(None);
            // It may be the one that hangs: the read that follows begins with the next.
            self.client.last.set((server + 1) % self.client.servers.len());
            EtcdError::Unknown(url.clone(), error)
        })
    }

    /// Whether an answer continues what this process knows of the cluster: revisions only grow, and
    /// whatever was answered before is contained in a linearizable answer.
    fn goes_on(&self, found: Place) -> Result<(), CallError> {
        match self.client.place.get() {
            Some(known) if known.cluster != found.cluster => {
                Err(CallError::OtherCluster { known: known.cluster, found: found.cluster })
            }
            Some(known) if known.revision > found.revision => {
                Err(CallError::WentBack { known: known.revision, found: found.revision })
            }
            _ => {
                self.client.place.set(Some(found));
                Ok(())
            }
        }
    }
}

/// *If* the key's last change has `revision`, put, *else* say what stands.
fn transaction(key: &[u8], revision: i64, value: &[u8]) -> Value {
    let (key, value) = (STANDARD.encode(key), STANDARD.encode(value));
    json!({
        "compare": [{
            "key": key, "target": "MOD", "result": "EQUAL", "mod_revision": revision.to_string(),
        }],
        "success": [{"request_put": {"key": key, "value": value}}],
        "failure": [{"request_range": {"key": key}}],
    })
}
