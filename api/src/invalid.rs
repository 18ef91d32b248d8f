//! What can be wrong with a configuration that parses.

use crate::endpoint::EndpointError;

/// One thing that is wrong. Each names the key, as clients write it, that is to be changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    #[error("{key} is missing{}", why(.because))]
    Missing { key: String, because: &'static str },
    #[error("{key} must be {wanted}, not {found}")]
    Value { key: String, wanted: String, found: String },
    #[error("{key} contradicts {other}{}", why(.because))]
    Contradiction { key: String, other: String, because: &'static str },
    #[error("{key} is not supported{}", why(.because))]
    Unsupported { key: String, because: &'static str },
    #[error("{key} starts with __, which is reserved: {id}")]
    ReservedId { key: String, id: String },
    #[error("{key} is used more than once: {id}")]
    Duplicate { key: String, id: String },
    #[error("{key} is malformed")]
    Endpoint { key: String, source: EndpointError },
}

impl Invalid {
    pub(crate) fn missing(key: impl Into<String>, because: &'static str) -> Self {
        Self::Missing { key: key.into(), because }
    }

    pub(crate) fn value(
        key: impl Into<String>,
        wanted: impl Into<String>,
        found: impl ToString,
    ) -> Self {
        Self::Value { key: key.into(), wanted: wanted.into(), found: found.to_string() }
    }

    pub(crate) fn contradiction(
        key: impl Into<String>,
        other: impl Into<String>,
        because: &'static str,
    ) -> Self {
        Self::Contradiction { key: key.into(), other: other.into(), because }
    }

    pub(crate) fn unsupported(key: impl Into<String>, because: &'static str) -> Self {
        Self::Unsupported { key: key.into(), because }
    }

    pub(crate) fn endpoint(key: impl Into<String>, source: EndpointError) -> Self {
        Self::Endpoint { key: key.into(), source }
    }

    /// Whether this is a clash of two things that are right on their own: 409 rather than 400.
    #[must_use]
    pub fn is_conflict(&self) -> bool {
        matches!(self, Self::Duplicate { .. })
    }

    /// The whole message on one line, the cause included.
    #[must_use]
    pub fn line(&self) -> String {
        match self {
            Self::Endpoint { source, .. } => format!("{self}: {source}"),
            other => other.to_string(),
        }
    }
}

/// A reason as it stands behind a message.
fn why(because: &str) -> String {
    if because.is_empty() { String::new() } else { format!(": {because}") }
}
