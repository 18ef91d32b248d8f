//! Calls to the servers of a cluster: which is asked, when the next is asked beside it, and what one
//! answer says about another.

use std::cell::Cell;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::answer::{self, Entry, Place, SwapOutcome};
use super::error::{CallError, EtcdError};
use super::gateway::{Gateway, Heard, Round};

/// After this a server that is silent has the next one asked beside it. Some times of what a server
/// that lives takes for a read, and little beside the time-out that a take-over begins with.
const NEXT_AFTER: Duration = Duration::from_millis(50);

/// The servers, and what was learnt about them.
#[derive(Debug)]
pub(super) struct Client<G> {
    pub(super) gateway: G,
    pub(super) learnt: Cell<Learnt>,
}

/// What one operation leaves to the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Learnt {
    /// Place of the server that answered last: the next operation begins there.
    pub last: usize,
    /// Of the answer that came last: another cluster, or an earlier time, is none of ours.
    pub place: Option<Place>,
}

/// One operation.
pub(super) struct Calls<'a, G> {
    client: &'a Client<G>,
    round: Box<dyn Round + 'a>,
}

impl<G: Gateway> Client<G> {
    pub(super) fn new(gateway: G) -> Self {
        Self { gateway, learnt: Cell::default() }
    }

    /// Begins an operation.
    pub(super) fn calls(&self) -> Result<Calls<'_, G>, EtcdError> {
        let failed = |error| {
            let first = self.gateway.servers().first().cloned();
            let failure = first.map(|server| (server, CallError::File(error)));
            EtcdError::NoAnswer(failure.into_iter().collect())
        };
        Ok(Calls { client: self, round: self.gateway.begin().map_err(failed)? })
    }

    /// The next operation begins with this server.
    pub(super) fn begin_with(&self, server: usize) {
        self.learnt.set(Learnt { last: server, ..self.learnt.get() });
    }
}

impl<G: Gateway> Calls<'_, G> {
    /// What stands under `key`, and the place of the server that said so. Each server is asked once,
    /// the one that answered last first; the next beside it as soon as it fails or is silent for
    /// [`NEXT_AFTER`]. The first usable answer counts.
    pub(super) fn range(&self, key: &[u8]) -> Result<(usize, Option<Entry>), EtcdError> {
        let servers = self.client.gateway.servers();
        let (count, first) = (servers.len(), self.client.learnt.get().last);
        let mut turns = (0..count).map(|turn| (first + turn) % count);
        let body = json!({"key": STANDARD.encode(key)}).to_string();
        let mut failures = Vec::new();
        while let Some((server, answer)) = self.next_answer(&body, &mut turns) {
            match answer.and_then(|text| self.found(&text, key)) {
                Ok(entry) => {
                    self.client.begin_with(server);
                    return Ok((server, entry));
                }
                Err(error) => {
                    let server = &servers[server];
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
        body: &str,
        turns: &mut impl Iterator<Item = usize>,
    ) -> Option<(usize, Result<Vec<u8>, CallError>)> {
        loop {
            let next = turns.next();
            if let Some(server) = next {
                self.round.ask(server, "/v3/kv/range", body);
            }
            match self.round.hear(next.map(|_| NEXT_AFTER)) {
                Heard::Answer(server, answer) => return Some((server, answer)),
                Heard::Silence => {}
                Heard::Nobody => return None,
            }
        }
    }

    /// What a read's answer is worth.
    fn found(&self, text: &[u8], key: &[u8]) -> Result<Option<Entry>, CallError> {
        let found = answer::range(text, key)?;
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
        let body = transaction(key, revision, value).to_string();
        let answer = self.round.post(server, "/v3/kv/txn", &body);
        answer.and_then(|text| self.swapped(&text, key)).map_err(|error| {
            let servers = self.client.gateway.servers();
            // It may be the one that hangs: the read that follows begins with the next.
            self.client.begin_with((server + 1) % servers.len());
            EtcdError::Unknown(servers[server].clone(), error)
        })
    }

    /// What a swap's answer is worth.
    fn swapped(&self, text: &[u8], key: &[u8]) -> Result<SwapOutcome, CallError> {
        let swapped = answer::swap(text, key)?;
        self.goes_on(swapped.place)?;
        Ok(swapped.outcome)
    }

    /// Whether an answer continues what this process knows of the cluster: revisions only grow, and
    /// whatever was answered before is contained in a linearizable answer.
    fn goes_on(&self, found: Place) -> Result<(), CallError> {
        let learnt = self.client.learnt.get();
        match learnt.place {
            Some(known) if known.cluster != found.cluster => {
                Err(CallError::OtherCluster { known: known.cluster, found: found.cluster })
            }
            Some(known) if known.revision > found.revision => {
                Err(CallError::WentBack { known: known.revision, found: found.revision })
            }
            _ => {
                self.client.learnt.set(Learnt { place: Some(found), ..learnt });
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
