//! The files of `arbiter_tls_dir` and `arbiter_credentials`.

use std::error::Error;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};
use ureq::tls::{Certificate, ClientCert, PrivateKey, RootCerts, TlsConfig, TlsProvider};

use super::error::FileError;

const CA: &str = "ca-cert.pem";
const CERTIFICATE: &str = "client-cert.pem";
const KEY: &str = "client-key.pem";
/// Bytes of a file with certificates or a key; a host's whole set has about 220 KiB.
const PEM_BYTES_MAX: u64 = 1 << 20;
/// Bytes of a file with user and password.
const CREDENTIALS_BYTES_MAX: u64 = 4096;

fn read(path: &Path, max: u64) -> Result<Vec<u8>, FileError> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(max + 1).read_to_end(&mut bytes))
        .map_err(|error| FileError::Read(path.to_owned(), error))?;
    if bytes.len() as u64 > max {
        return Err(FileError::TooLong { path: path.to_owned(), max });
    }
    Ok(bytes)
}

fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>, FileError> {
    match read(path, PEM_BYTES_MAX) {
        Err(FileError::Read(_, error)) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        read => read.map(Some),
    }
}

fn unusable(path: &Path, reason: impl Into<String>) -> FileError {
    FileError::Unusable { path: path.to_owned(), reason: reason.into() }
}

/// User and password.
pub(super) fn credentials(path: &Path) -> Result<(String, String), FileError> {
    let bytes = read(path, CREDENTIALS_BYTES_MAX)?;
    let line = String::from_utf8(bytes).map_err(|_| unusable(path, "is no text"))?;
    let line = line.strip_suffix('\n').unwrap_or(&line);
    let line = line.strip_suffix('\r').unwrap_or(line);
    match line.split_once(':') {
        Some((user, password)) if !user.is_empty() && !line.contains(char::is_control) => {
            Ok((user.to_owned(), password.to_owned()))
        }
        _ => Err(unusable(path, "must be one line, <user>:<password>")),
    }
}

fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, FileError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(found) if found.is_empty() => Err(unusable(path, "holds no certificate")),
        Ok(found) => Ok(found),
        Err(error) => Err(unusable(path, format!("is no PEM: {error}"))),
    }
}

/// The authorities that count: those of the folder, or else this system's.
fn roots(dir: Option<&Path>) -> Result<Vec<CertificateDer<'static>>, FileError> {
    let own = dir.map(|dir| dir.join(CA));
    let pem = own.as_deref().map(read_if_there).transpose()?.flatten();
    if let (Some(path), Some(pem)) = (own, pem) {
        return certificates(&path, &pem);
    }
    let found = rustls_native_certs::load_native_certs().certs;
    if found.is_empty() { Err(FileError::NoRoots) } else { Ok(found) }
}

/// What this side shows to servers that ask for it.
struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    /// The same, as the HTTP client wants it.
    theirs: PrivateKey<'static>,
}

fn identity(dir: &Path) -> Result<Option<Identity>, FileError> {
    let (chain_path, key_path) = (dir.join(CERTIFICATE), dir.join(KEY));
    match (read_if_there(&chain_path)?, read_if_there(&key_path)?) {
        (None, None) => Ok(None),
        (Some(_), None) => Err(unusable(&key_path, format!("is missing, {CERTIFICATE} is there"))),
        (None, Some(_)) => Err(unusable(&chain_path, format!("is missing, {KEY} is there"))),
        (Some(chain), Some(key)) => {
            let chain = certificates(&chain_path, &chain)?;
            let none = |error: &dyn Error| unusable(&key_path, format!("holds no key: {error}"));
            let theirs = PrivateKey::from_pem(&key).map_err(|error| none(&error))?;
            let key = PrivateKeyDer::from_pem_slice(&key).map_err(|error| none(&error))?;
            Ok(Some(Identity { chain, key, theirs }))
        }
    }
}

/// How servers are verified, and what they are shown.
pub(super) fn tls(dir: Option<&Path>) -> Result<TlsConfig, FileError> {
    let roots = roots(dir)?;
    let identity = dir.map(identity).transpose()?.flatten();
    if let Some(dir) = dir
        && identity.is_none()
        && !dir.join(CA).is_file()
    {
        return Err(unusable(dir, format!("has neither {CA} nor {CERTIFICATE} and {KEY}")));
    }
    let provider = Arc::new(ring::default_provider());
    check(dir.unwrap_or(Path::new("")), Arc::clone(&provider), &roots, identity.as_ref())?;
    let authorities: Vec<_> =
        roots.iter().map(|root| Certificate::from_der(root).to_owned()).collect();
    let mut config = TlsConfig::builder()
        .provider(TlsProvider::Rustls)
        .unversioned_rustls_crypto_provider(provider)
        .root_certs(RootCerts::new_with_certs(&authorities));
    if let Some(Identity { chain, theirs, .. }) = identity {
        let chain: Vec<_> =
            chain.iter().map(|part| Certificate::from_der(part).to_owned()).collect();
        config = config.client_cert(Some(ClientCert::new_with_certs(&chain, theirs)));
    }
    Ok(config.build())
}

/// The HTTP client takes for granted that certificates and key fit each other, and panics where
/// they do not.
fn check(
    dir: &Path,
    provider: Arc<CryptoProvider>,
    roots: &[CertificateDer<'static>],
    identity: Option<&Identity>,
) -> Result<(), FileError> {
    let mut store = RootCertStore::empty();
    let (usable, _) = store.add_parsable_certificates(roots.iter().cloned());
    if usable == 0 {
        return Err(unusable(&dir.join(CA), "holds no certificate that can be used"));
    }
    let Some(Identity { chain, key, .. }) = identity else { return Ok(()) };
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| unusable(dir, error.to_string()))?
        .with_root_certificates(store)
        .with_client_auth_cert(chain.clone(), key.clone_key());
    config.map(drop).map_err(|error| {
        unusable(&dir.join(KEY), format!("and {CERTIFICATE} cannot be used: {error}"))
    })
}
