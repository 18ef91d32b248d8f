//! Calls to the servers of a cluster: which is asked, for how long, and as whom.

use std::cell::{Cell, RefCell};
use std::time::Duration;

use api::endpoint::EtcdServer;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use ureq::Agent;

use super::Access;
use super::answer::{self, ANSWER_BYTES_MAX, Entry, Place, SwapOutcome};
use super::error::{CallError, EtcdError, FileError, Malformed};
use super::files;

/// Limit for a connection and its handshake: one lost SYN, which is repeated after a second, is
/// within it.
const CONNECT_LIMIT: Duration = Duration::from_millis(1500);
/// Limit for a call, from the name's look-up to the last byte. An election takes etcd some seconds
/// at most; whoever waits for it longer had better ask the next server.
const CALL_LIMIT: Duration = Duration::from_secs(4);
/// Bytes of the head of an answer.
const HEAD_BYTES_MAX: usize = 16 << 10;
/// Statuses of a token that expired, was forgotten, or is not accepted: etcd's gateway maps
/// InvalidArgument, Unauthenticated and PermissionDenied to them.
const TOKEN_STATUSES: [u16; 3] = [400, 401, 403];

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
    agent: Agent,
}

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
        client.agent().map_err(|error| ("arbiter_tls_dir", error))?;
        if let Some(path) = &client.access.credentials {
            files::credentials(path).map_err(|error| ("arbiter_credentials", error))?;
            if client.servers.iter().any(|server| !server.tls) {
                tracing::warn!("arbiter_credentials go over the network as they are: use https:");
            }
        }
        Ok(client)
    }

    fn agent(&self) -> Result<Agent, FileError> {
        let mut config = Agent::config_builder()
            .timeout_global(Some(CALL_LIMIT))
            .timeout_connect(Some(CONNECT_LIMIT))
            .http_status_as_error(false)
            // A redirect is an answer of somebody else.
            .max_redirects(0)
            .max_redirects_will_error(false)
            // What the environment says is meant for browsers, and a proxy may repeat requests.
            .proxy(None)
            .user_agent("understudy")
            .max_response_header_size(HEAD_BYTES_MAX)
            // A connection that died while it lay idle would leave a swap with unknown outcome.
            .max_idle_connections(0)
            .max_idle_connections_per_host(0);
        if self.servers.iter().any(|server| server.tls) {
            config = config.tls_config(files::tls(self.access.tls_dir.as_deref())?);
        }
        Ok(config.build().new_agent())
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
        Ok(Calls { client: self, agent: self.agent().map_err(failed)? })
    }
}

impl Calls<'_> {
    /// What stands under `key`, and the place of the server that said so. Each server is tried once.
    pub(super) fn range(&self, key: &[u8]) -> Result<(usize, Option<Entry>), EtcdError> {
        let body = json!({"key": STANDARD.encode(key)});
        let (count, first) = (self.client.servers.len(), self.client.last.get());
        let mut failures = Vec::new();
        for server in (0..count).map(|turn| (first + turn) % count) {
            let found = self.call(server, "/v3/kv/range", &body, |text| answer::range(text, key));
            let found = found.and_then(|found| {
                self.goes_on(found.place)?;
                Ok(found.entry)
            });
            match found {
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

    /// Puts `value` if the key's last change has `revision`, at this server and once.
    pub(super) fn swap(
        &self,
        server: usize,
        key: &[u8],
        revision: i64,
        value: &[u8],
    ) -> Result<SwapOutcome, EtcdError> {
        let (encoded, value) = (STANDARD.encode(key), STANDARD.encode(value));
        let body = json!({
            "compare": [{
                "key": encoded, "target": "MOD", "result": "EQUAL",
                "mod_revision": revision.to_string(),
            }],
            "success": [{"request_put": {"key": encoded, "value": value}}],
            "failure": [{"request_range": {"key": encoded}}],
        });
        let parse = |text: &[u8]| answer::swap(text, key);
        let token = self.client.token.borrow().clone();
        let swapped = self.post(server, "/v3/kv/txn", &body, token.as_deref(), parse);
        let swapped = swapped.and_then(|swapped| {
            self.goes_on(swapped.place)?;
            Ok(swapped.outcome)
        });
        swapped.map_err(|error| {
            // Whatever the token was good for: the read that follows logs in.
            self.client.token.replace(None);
            // It may be the one that hangs: the read that follows begins with the next.
            self.client.last.set((server + 1) % self.client.servers.len());
            EtcdError::Unknown(self.client.servers[server].clone(), error)
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

    /// A call that may be repeated: with a new token where the old one is not accepted.
    fn call<T>(
        &self,
        server: usize,
        path: &str,
        body: &Value,
        parse: impl Fn(&[u8]) -> Result<T, Malformed>,
    ) -> Result<T, CallError> {
        if self.client.access.credentials.is_none() {
            return self.post(server, path, body, None, parse);
        }
        let token = self.client.token.borrow().clone();
        if let Some(token) = token {
            match self.post(server, path, body, Some(&token), &parse) {
                Err(CallError::Status { status, .. }) if TOKEN_STATUSES.contains(&status) => {
                    self.client.token.replace(None);
                }
                answered => return answered,
            }
        }
        let token = self.login(server)?;
        self.client.token.replace(Some(token.clone()));
        self.post(server, path, body, Some(&token), parse)
    }

    fn login(&self, server: usize) -> Result<String, CallError> {
        let Some(path) = &self.client.access.credentials else { return Ok(String::new()) };
        let (name, password) = files::credentials(path)?;
        let body = json!({"name": name, "password": password});
        self.post(server, "/v3/auth/authenticate", &body, None, answer::token).map_err(|error| {
            match error {
                CallError::Status { .. } => CallError::Login(Box::new(error)),
                other => other,
            }
        })
    }

    fn post<T>(
        &self,
        server: usize,
        path: &str,
        body: &Value,
        token: Option<&str>,
        parse: impl Fn(&[u8]) -> Result<T, Malformed>,
    ) -> Result<T, CallError> {
        let url = format!("{}{path}", self.client.servers[server]);
        let mut request = self.agent.post(url).content_type("application/json");
        request = request.header("connection", "close");
        if let Some(token) = token {
            request = request.header("authorization", token);
        }
        let mut response = request.send(body.to_string())?;
        let status = response.status().as_u16();
        let body = response.body_mut().with_config().limit(ANSWER_BYTES_MAX).read_to_vec()?;
        if status != 200 {
            return Err(CallError::Status { status, reason: answer::refusal(&body) });
        }
        Ok(parse(&body)?)
    }
}
