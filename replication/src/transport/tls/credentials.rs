//! Certificates and keys, from a directory.
//!
//! Enters: a directory. Leaves: what a side needs for its handshakes, or an error that names the file.
//! Always holds: this side's own certificate is in its dates, of its own authority and fits its key, as far
//! as this host's clock knows: a peer would refuse it later, in fewer words.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::{
    Resumption, VerifierBuilderError, WebPkiServerVerifier,
    verify_server_cert_signed_by_trust_anchor,
};
use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::{cipher_suite, default_provider};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use thiserror::Error;

use super::PROTOCOL;
use super::errors::certificate;

/// Most bytes of a file.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// The permission of everybody to read.
const OTHERS_READ: u32 = 0o004;

/// Why a directory cannot be used.
#[derive(Debug, Error)]
pub(crate) enum CredentialError {
    #[error("Cannot read '{}'", .0.display())]
    Read(PathBuf, #[source] io::Error),
    #[error("'{}' {what}", path.display())]
    Unusable { path: PathBuf, what: String },
    #[error("'{0}' is neither a host's name nor an IP address that a certificate could have")]
    Name(String),
}

/// What a primary needs.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    pub(super) config: Arc<ClientConfig>,
    pub(super) name: ServerName<'static>,
}

impl Client {
    /// Reads what a primary needs that calls its backup `host`.
    ///
    /// # Errors
    /// [`CredentialError`].
    pub(crate) fn load(directory: &Path, host: &str) -> Result<Self, CredentialError> {
        let name = ServerName::try_from(host.to_owned())
            .map_err(|_| CredentialError::Name(host.to_owned()))?;
        let Own { roots, chain, key, path, provider } = Own::read(directory, "client")?;
        let roots = Arc::new(roots);
        verifier_of_clients(&roots, &provider, directory)?
            .verify_client_cert(&chain[0], &chain[1..], UnixTime::now())
            .map_err(|error| unusable(&path, &error))?;
        let verifier = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&provider));
        let verifier = verifier.build().map_err(|error| no_authority(directory, &error))?;
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| unusable(&path, &error))?
            .with_webpki_verifier(verifier)
            .with_client_auth_cert(chain, key)
            .map_err(|error| unusable(&path, &error))?;
        // Each connection shows its certificate anew.
        config.resumption = Resumption::disabled();
        config.alpn_protocols = vec![PROTOCOL.to_vec()];
        Ok(Self { config: Arc::new(config), name })
    }
}

/// What a backup needs.
#[derive(Clone, Debug)]
pub(crate) struct Server {
    pub(super) config: Arc<ServerConfig>,
}

impl Server {
    /// Reads what a backup needs.
    ///
    /// # Errors
    /// [`CredentialError`].
    pub(crate) fn load(directory: &Path) -> Result<Self, CredentialError> {
        let Own { roots, chain, key, path, provider } = Own::read(directory, "server")?;
        let parsed = ParsedCertificate::try_from(&chain[0]);
        let algorithms = provider.signature_verification_algorithms.all;
        // Its names are the primary's to compare: what it is called is known there.
        parsed
            .and_then(|own| {
                let now = UnixTime::now();
                verify_server_cert_signed_by_trust_anchor(
                    &own,
                    &roots,
                    &chain[1..],
                    now,
                    algorithms,
                )
            })
            .map_err(|error| unusable(&path, &error))?;
        let verifier = verifier_of_clients(&Arc::new(roots), &provider, directory)?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| unusable(&path, &error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(|error| unusable(&path, &error))?;
        // Each connection shows its certificate anew.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.alpn_protocols = vec![PROTOCOL.to_vec()];
        Ok(Self { config: Arc::new(config) })
    }
}

const CA: &str = "ca-cert.pem";

/// What a directory has for one side.
struct Own {
    roots: RootCertStore,
    /// At least one; the first is this side's own.
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    /// Of the chain, for errors.
    path: PathBuf,
    provider: Arc<CryptoProvider>,
}

impl Own {
    fn read(directory: &Path, role: &str) -> Result<Self, CredentialError> {
        let ca = directory.join(CA);
        let mut roots = RootCertStore::empty();
        for authority in certificates(&ca)? {
            roots.add(authority).map_err(|error| unusable(&ca, &error))?;
        }
        let path = directory.join(format!("{role}-cert.pem"));
        let chain = certificates(&path)?;
        let key = key(&directory.join(format!("{role}-key.pem")))?;
        Ok(Self { roots, chain, key, path, provider: Arc::new(provider()) })
    }
}

/// All suites of TLS 1.3, the fastest one on processors with AES first: bulk data is what this carries.
fn provider() -> CryptoProvider {
    let cipher_suites = vec![
        cipher_suite::TLS13_AES_128_GCM_SHA256,
        cipher_suite::TLS13_AES_256_GCM_SHA384,
        cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    CryptoProvider { cipher_suites, ..default_provider() }
}

fn verifier_of_clients(
    roots: &Arc<RootCertStore>,
    provider: &Arc<CryptoProvider>,
    directory: &Path,
) -> Result<Arc<dyn ClientCertVerifier>, CredentialError> {
    let builder =
        WebPkiClientVerifier::builder_with_provider(Arc::clone(roots), Arc::clone(provider));
    builder.build().map_err(|error| no_authority(directory, &error))
}

fn no_authority(directory: &Path, error: &VerifierBuilderError) -> CredentialError {
    unfit(&directory.join(CA), format!("cannot be used: {error}"))
}

fn unfit(path: &Path, what: impl Into<String>) -> CredentialError {
    CredentialError::Unusable { path: path.to_owned(), what: what.into() }
}

fn unusable(path: &Path, error: &rustls::Error) -> CredentialError {
    let what = match error {
        rustls::Error::InvalidCertificate(error) => {
            format!("cannot be used: {}", certificate(error))
        }
        rustls::Error::InconsistentKeys(_) => "does not belong to the key beside it".to_owned(),
        error => format!("cannot be used: {error}"),
    };
    unfit(path, what)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, CredentialError> {
    let text = read(path)?.0;
    let all = CertificateDer::pem_slice_iter(&text).collect::<Result<Vec<_>, _>>();
    let all = all.map_err(|error| unfit(path, format!("is no PEM file: {error}")))?;
    if all.is_empty() {
        return Err(unfit(path, "has no certificate"));
    }
    Ok(all)
}

fn key(path: &Path) -> Result<PrivateKeyDer<'static>, CredentialError> {
    let (text, mode) = read(path)?;
    if mode & OTHERS_READ != 0 {
        // Some systems hand keys out in this way, behind a directory that is closed.
        let path = path.display();
        tracing::warn!(
            "every user may read the key '{path}', as far as its own mode says: chmod 600"
        );
    }
    PrivateKeyDer::from_pem_slice(&text).map_err(|error| {
        unfit(
            path,
            format!("has no private key without a password (PKCS#8, SEC1, PKCS#1): {error}"),
        )
    })
}

/// A file's bytes and its mode.
fn read(path: &Path) -> Result<(Vec<u8>, u32), CredentialError> {
    let failed = |error| CredentialError::Read(path.to_owned(), error);
    // A pipe without a writer must not hold anybody up.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file = file.map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    let mut bytes = Vec::new();
    if metadata.is_file() {
        file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    }
    if bytes.is_empty() || bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(unfit(path, format!("is no file of 1 to {FILE_BYTES_MAX} bytes")));
    }
    Ok((bytes, metadata.permissions().mode()))
}
