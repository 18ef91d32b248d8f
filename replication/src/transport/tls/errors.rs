//! Why there is no TLS connection, in words that say whose certificate it is and what to do.

use std::fmt;
use std::io;

use rustls::{AlertDescription, CertificateError};
use thiserror::Error;

/// What a peer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Primary,
    Backup,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Primary => "primary",
            Self::Backup => "backup",
        })
    }
}

/// Why a peer was not admitted, or did not admit this side.
#[derive(Debug, Error)]
pub enum HandshakeError {
    #[error("The {0} speaks no TLS: give tls_dir to both sides, or to neither")]
    Plain(Side),
    #[error("The {peer} did not finish the TLS handshake within {patience_ms} ms")]
    Late { peer: Side, patience_ms: u128 },
    #[error("The {0} ended the connection in the middle of the TLS handshake")]
    Gone(Side),
    #[error("What was expected to be a {0} speaks TLS, and not for this program")]
    Foreign(Side),
    #[error("The {peer}'s certificate is refused: {reason}")]
    Theirs { peer: Side, reason: String },
    #[error("The {peer} refuses this side's certificate: {reason}")]
    Ours { peer: Side, reason: &'static str },
    #[error("The TLS handshake with the {peer} failed")]
    Protocol { peer: Side, source: rustls::Error },
    #[error("The connection to the {peer} failed in the TLS handshake")]
    Io { peer: Side, source: io::Error },
}

impl HandshakeError {
    /// What TLS says, for people.
    pub(super) fn of(peer: Side, error: rustls::Error) -> Self {
        match error {
            rustls::Error::InvalidCertificate(error) => {
                Self::Theirs { peer, reason: certificate(&error) }
            }
            rustls::Error::NoCertificatesPresented => {
                Self::Theirs { peer, reason: "it has none".to_owned() }
            }
            rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol)
            | rustls::Error::NoApplicationProtocol => Self::Foreign(peer),
            rustls::Error::AlertReceived(alert) => match refusal(alert) {
                Some(reason) => Self::Ours { peer, reason },
                None => Self::Protocol { peer, source: error },
            },
            source => Self::Protocol { peer, source },
        }
    }
}

const DATES: &str = "or the clock is wrong";

/// What is wrong with a certificate; of this side's own files, too.
pub(super) fn certificate(error: &CertificateError) -> String {
    use CertificateError::{
        BadSignature, Expired, ExpiredContext, InvalidPurpose, InvalidPurposeContext,
        NotValidForName, NotValidForNameContext, NotValidYet, NotValidYetContext, UnknownIssuer,
    };
    match error {
        Expired | ExpiredContext { .. } => format!("it has expired, {DATES}"),
        NotValidYet | NotValidYetContext { .. } => format!("it is not valid yet, {DATES}"),
        // An authority of the same name with another key is another one.
        UnknownIssuer | BadSignature => "it is not of the authority of ca-cert.pem".to_owned(),
        NotValidForName | NotValidForNameContext { .. } => {
            "the host of destination_url is not among its names (subjectAltName)".to_owned()
        }
        InvalidPurpose | InvalidPurposeContext { .. } => {
            "its use (extendedKeyUsage) is another".to_owned()
        }
        other => other.to_string(),
    }
}

/// What an alert says of this side's certificate (RFC 8446, 6.2); `None` if it is about something else.
fn refusal(alert: AlertDescription) -> Option<&'static str> {
    Some(match alert {
        AlertDescription::UnknownCA | AlertDescription::DecryptError => {
            "it is not of the authority of the peer's ca-cert.pem"
        }
        AlertDescription::CertificateExpired => "it is out of its dates, or the peer's clock is",
        AlertDescription::CertificateRequired => "it has none",
        AlertDescription::UnsupportedCertificate => "its use (extendedKeyUsage) is another",
        AlertDescription::CertificateRevoked => "it is revoked",
        AlertDescription::BadCertificate => {
            "it is not for the name by which it was called, or is damaged"
        }
        AlertDescription::CertificateUnknown | AlertDescription::AccessDenied => {
            "it gives no reason"
        }
        _ => return None,
    })
}
