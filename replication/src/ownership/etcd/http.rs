//! Calls to one server: as whom, for how long, and whether it answers.

use std::path::PathBuf;
use std::time::Duration;

use api::endpoint::EtcdServer;
use serde_json::json;
use ureq::Agent;

use super::Access;
use super::answer::{self, ANSWER_BYTES_MAX};
use super::error::{CallError, FileError};
use super::files;

/// Limit for a connection and its handshake: one lost SYN, which is repeated after a second, is
/// within it.
const CONNECT_LIMIT: Duration = Duration::from_millis(1500);
/// Limit for a call, from the name's look-up to the last byte. An election takes etcd some seconds
/// at most.
pub(super) const CALL_LIMIT: Duration = Duration::from_secs(4);
/// Bytes of the head of an answer.
const HEAD_BYTES_MAX: usize = 16 << 10;
/// Statuses of a token that expired, was forgotten, or is not accepted: etcd's gateway maps
/// InvalidArgument, Unauthenticated and PermissionDenied to them.
const TOKEN_STATUSES: [u16; 3] = [400, 401, 403];

/// Who calls, with certificates as they were when it was made.
#[derive(Clone, Debug)]
pub(super) struct Caller {
    agent: Agent,
    credentials: Option<PathBuf>,
}

/// What a call came to, and the token that is good from now on.
pub(super) struct Called {
    pub(super) result: Result<Vec<u8>, CallError>,
    pub(super) token: Option<String>,
}

impl Caller {
    pub(super) fn new(servers: &[EtcdServer], access: &Access) -> Result<Self, FileError> {
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
        if servers.iter().any(|server| server.tls) {
            config = config.tls_config(files::tls(access.tls_dir.as_deref())?);
        }
        Ok(Self { agent: config.build().new_agent(), credentials: access.credentials.clone() })
    }

    /// A call that may be repeated: with a new token where the old one is not accepted.
    pub(super) fn call(
        &self,
        server: &EtcdServer,
        path: &str,
        body: &str,
        token: Option<String>,
    ) -> Called {
        let Some(credentials) = &self.credentials else {
            return Called { result: self.post(server, path, body, None), token };
        };
        if let Some(token) = token {
            match self.post(server, path, body, Some(&token)) {
                Err(CallError::Status { status, .. }) if TOKEN_STATUSES.contains(&status) => {}
                result => return Called { result, token: Some(token) },
            }
        }
        match files::credentials(credentials) {
            Err(error) => Called { result: Err(error.into()), token: None },
            Ok((name, password)) => match self.login(server, &name, &password) {
                Err(error) => Called { result: Err(error), token: None },
                Ok(token) => {
                    let result = self.post(server, path, body, Some(&token));
                    Called { result, token: Some(token) }
                }
            },
        }
    }

    fn login(&self, server: &EtcdServer, name: &str, password: &str) -> Result<String, CallError> {
        let body = json!({"name": name, "password": password}).to_string();
        let text = self.post(server, "/v3/auth/authenticate", &body, None);
        let text = text.map_err(|error| match error {
            CallError::Status { .. } => CallError::Login(Box::new(error)),
            other => other,
        })?;
        Ok(answer::token(&text)?)
    }

    /// One request, sent once; the answer's body.
    pub(super) fn post(
        &self,
        server: &EtcdServer,
        path: &str,
        body: &str,
        token: Option<&str>,
    ) -> Result<Vec<u8>, CallError> {
        let url = format!("{server}{path}");
        let mut request = self.agent.post(url).content_type("application/json");
        request = request.header("connection", "close");
        if let Some(token) = token {
            request = request.header("authorization", token);
        }
        let mut response = request.send(body)?;
        let status = response.status().as_u16();
        let body = response.body_mut().with_config().limit(ANSWER_BYTES_MAX).read_to_vec()?;
        if status != 200 {
            return Err(CallError::Status { status, reason: answer::refusal(&body) });
        }
        Ok(body)
    }
}
