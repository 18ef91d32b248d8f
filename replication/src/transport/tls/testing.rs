//! Certificates for tests.

use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    date_time_ymd,
};
use tempfile::TempDir;

/// An authority that is trusted by whoever has its directory.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: String,
}

/// What a certificate is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    Server,
    Client,
}

impl Use {
    /// As files are named after it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::Client => "client",
        }
    }
}

/// Whether a certificate is in its dates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dates {
    Valid,
    Expired,
    NotYet,
}

impl Authority {
    pub(crate) fn new() -> Self {
        Self::named("tests")
    }

    /// Names are no matter: two authorities of one name are two.
    pub(crate) fn named(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), certificate }
    }

    /// A directory with what either side needs; its server is `localhost` and `127.0.0.1`.
    pub(crate) fn directory(&self) -> TempDir {
        let directory = tempfile::tempdir().unwrap();
        self.trust(directory.path());
        self.issue(directory.path(), Use::Server, Dates::Valid);
        self.issue(directory.path(), Use::Client, Dates::Valid);
        directory
    }

    /// Makes this the authority of a directory.
    pub(crate) fn trust(&self, directory: &Path) {
        std::fs::write(directory.join("ca-cert.pem"), &self.certificate).unwrap();
    }

    /// Puts a certificate and its key into a directory.
    pub(crate) fn issue(&self, directory: &Path, purpose: Use, dates: Dates) {
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name.push(DnType::CommonName, purpose.name());
        params.extended_key_usages = vec![match purpose {
            Use::Server => ExtendedKeyUsagePurpose::ServerAuth,
            Use::Client => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        (params.not_before, params.not_after) = match dates {
            Dates::Valid => (date_time_ymd(2020, 1, 1), date_time_ymd(4000, 1, 1)),
            Dates::Expired => (date_time_ymd(2020, 1, 1), date_time_ymd(2021, 1, 1)),
            Dates::NotYet => (date_time_ymd(3999, 1, 1), date_time_ymd(4000, 1, 1)),
        };
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let write = |what: &str, text: String| {
            let name = format!("{}-{what}.pem", purpose.name());
            std::fs::write(directory.join(name), text).unwrap();
        };
        write("cert", certificate.pem());
        write("key", key.serialize_pem());
    }
}
