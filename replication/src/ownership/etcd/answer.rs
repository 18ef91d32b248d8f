//! What etcd's JSON gateway answers. Enters: a body of at most [`ANSWER_BYTES_MAX`] bytes, of a
//! server, a proxy or a stranger. Leaves: what the claim needs of it, or why it is no answer.
//!
//! The gateway writes protobuf's JSON: 64-bit numbers as text, bytes as base64, and leaves out what
//! is zero, false or empty. So most is optional here, and an answer is told from any other object by
//! its header. Both spellings of names are taken, since gateways differ.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer};

use super::error::Malformed;
use crate::ids::Generation;
use crate::ownership::Record;

/// Bytes of an answer that are read. A record has about 200.
pub const ANSWER_BYTES_MAX: u64 = 64 << 10;
/// Bytes of a token: etcd's own have some 25, signed ones some hundred.
const TOKEN_BYTES_MAX: usize = 4096;
/// Characters of a refusal that are repeated.
const REFUSAL_CHARS_MAX: usize = 200;

/// What stands under a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Of the cluster's last change to this key; 1 or more.
    pub revision: i64,
    pub value: Vec<u8>,
}

/// Where and when an answer was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The cluster's id.
    pub cluster: u64,
    /// Of the cluster's last change to any key; 1 or more.
    pub revision: i64,
}

/// Answer to a range of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    pub place: Place,
    pub entry: Option<Entry>,
}

/// Answer to a compare-and-swap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Swapped {
    pub place: Place,
    pub outcome: SwapOutcome,
}

/// Whether the put took place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SwapOutcome {
    Done,
    /// This stands.
    Refused(Option<Entry>),
}

#[derive(Deserialize)]
struct Header {
    #[serde(alias = "clusterId", deserialize_with = "number")]
    cluster_id: u64,
    #[serde(deserialize_with = "number")]
    revision: u64,
}

#[derive(Deserialize)]
struct Pair {
    #[serde(default)]
    key: String,
    #[serde(alias = "modRevision", deserialize_with = "number")]
    mod_revision: u64,
    #[serde(default)]
    value: String,
}

#[derive(Deserialize)]
struct RangeAnswer {
    header: Header,
    #[serde(default)]
    kvs: Vec<Pair>,
}

#[derive(Deserialize)]
struct SwapAnswer {
    header: Header,
    #[serde(default)]
    succeeded: bool,
    #[serde(default)]
    responses: Vec<Response>,
}

#[derive(Deserialize)]
struct Response {
    #[serde(default, alias = "responseRange")]
    response_range: Option<Inner>,
}

#[derive(Deserialize)]
struct Inner {
    #[serde(default)]
    kvs: Vec<Pair>,
}

#[derive(Deserialize)]
struct LoginAnswer {
    token: String,
}

#[derive(Deserialize)]
struct Refusal {
    #[serde(default)]
    message: String,
    #[serde(default)]
    error: String,
}

/// A 64-bit number as protobuf's JSON has it, or as it is.
fn number<'a, D: Deserializer<'a>>(from: D) -> Result<u64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        Number(u64),
        Text(String),
    }
    match Either::deserialize(from)? {
        Either::Number(number) => Ok(number),
        Either::Text(text) => text.parse().map_err(serde::de::Error::custom),
    }
}

fn json<'a, T: Deserialize<'a>>(text: &'a [u8]) -> Result<T, Malformed> {
    serde_json::from_slice(text).map_err(|error| Malformed(error.to_string()))
}

fn revision(number: u64) -> Result<i64, Malformed> {
    let revision = i64::try_from(number).ok().filter(|revision| *revision > 0);
    revision.ok_or_else(|| Malformed("it has an impossible revision".to_owned()))
}

fn place(header: &Header) -> Result<Place, Malformed> {
    Ok(Place { cluster: header.cluster_id, revision: revision(header.revision)? })
}

/// The only entry of a list, for the key that was asked.
fn only(pairs: Vec<Pair>, key: &[u8]) -> Result<Option<Entry>, Malformed> {
    let mut pairs = pairs.into_iter();
    let Some(pair) = pairs.next() else { return Ok(None) };
    if pairs.next().is_some() {
        return Err(Malformed("it has several entries of one key".to_owned()));
    }
    let bytes = |text: &str| {
        STANDARD.decode(text).map_err(|error| Malformed(format!("it has bad base64: {error}")))
    };
    if bytes(&pair.key)? != key {
        return Err(Malformed("it is about another key".to_owned()));
    }
    Ok(Some(Entry { revision: revision(pair.mod_revision)?, value: bytes(&pair.value)? }))
}

/// Reads the answer to a range.
///
/// # Errors
/// [`Malformed`].
pub fn range(text: &[u8], key: &[u8]) -> Result<Found, Malformed> {
    let RangeAnswer { header, kvs } = json(text)?;
    Ok(Found { place: place(&header)?, entry: only(kvs, key)? })
}

/// Reads the answer to a transaction that puts, or else ranges.
///
/// # Errors
/// [`Malformed`].
pub fn swap(text: &[u8], key: &[u8]) -> Result<Swapped, Malformed> {
    let SwapAnswer { header, succeeded, mut responses } = json(text)?;
    let outcome = if succeeded {
        SwapOutcome::Done
    } else {
        // What is false is left out, so an object that is only cut short must not say so.
        match (responses.pop(), responses.is_empty()) {
            (Some(Response { response_range: Some(inner) }), true) => {
                SwapOutcome::Refused(only(inner.kvs, key)?)
            }
            _ => return Err(Malformed("it refuses and does not say what stands".to_owned())),
        }
    };
    Ok(Swapped { place: place(&header)?, outcome })
}

/// Reads the answer to a login: a token that fits a header.
///
/// # Errors
/// [`Malformed`].
pub fn token(text: &[u8]) -> Result<String, Malformed> {
    let LoginAnswer { token } = json(text)?;
    let fits = (1..=TOKEN_BYTES_MAX).contains(&token.len())
        && token.bytes().all(|byte| byte.is_ascii_graphic());
    if fits { Ok(token) } else { Err(Malformed("its token fits no header".to_owned())) }
}

/// What a server that refuses says, fit for a line of the log.
#[must_use]
pub fn refusal(text: &[u8]) -> String {
    let said = match serde_json::from_slice(text) {
        Ok(Refusal { message, .. }) if !message.is_empty() => message,
        Ok(Refusal { error, .. }) if !error.is_empty() => error,
        _ => String::from_utf8_lossy(text).into_owned(),
    };
    let line: String = said
        .chars()
        .take(REFUSAL_CHARS_MAX)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    if line.trim().is_empty() { "it does not say why".to_owned() } else { line }
}

/// Reads a record.
///
/// # Errors
/// What is wrong with it, in words.
pub fn record(value: &[u8]) -> Result<Record, String> {
    let record: Record = serde_json::from_slice(value).map_err(|error| error.to_string())?;
    // Before the first there is none, and after the last no other.
    if record.generation == Generation(0) || record.generation == Generation(u64::MAX) {
        return Err(format!("it says generation {}", record.generation));
    }
    Ok(record)
}
