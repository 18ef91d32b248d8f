//! Certificates.

use std::fs;
use std::path::Path;

use etcd_server::Tls;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair,
};

use super::*;

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority(name: &str) -> Result<Authority> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, name);
    Ok(CertifiedIssuer::self_signed(params, KeyPair::generate()?)?)
}

/// Writes a certificate for `names`, and its key.
fn issue(by: &Authority, names: &[String], certificate: &Path, key: &Path) -> Result<()> {
    let mut params = CertificateParams::new(names.to_vec())?;
    // etcd's gateway is a client of its own server, with the server's certificate.
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.distinguished_name.push(DnType::CommonName, "a test");
    let pair = KeyPair::generate()?;
    fs::write(certificate, params.signed_by(&pair, by)?.pem())?;
    Ok(fs::write(key, pair.serialize_pem())?)
}

/// A server with a certificate for `names`, and the folder that a client needs.
fn secured(by: &Authority, names: &[String], folder: &Path) -> Result<Cluster> {
    let dir = folder.join("tls");
    fs::create_dir(&dir)?;
    fs::write(dir.join("ca-cert.pem"), by.pem())?;
    issue(by, &["client".to_owned()], &dir.join("client-cert.pem"), &dir.join("client-key.pem"))?;
    let tls = Tls {
        ca: dir.join("ca-cert.pem"),
        certificate: folder.join("server-cert.pem"),
        key: folder.join("server-key.pem"),
    };
    issue(by, names, &tls.certificate, &tls.key)?;
    Cluster::start_with(1, Some(tls))
}

fn access(dir: &Path) -> Access {
    Access { tls_dir: Some(dir.to_owned()), ..Access::default() }
}

#[test]
fn both_sides_show_certificates() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let ca = authority("ours")?;
    // The address is not known before the cluster is; it is made of the process's id.
    let names = [etcd_server::own_address().to_string()];
    let cluster = secured(&ca, &names, folder.path())?;
    let (url, dir) = (cluster.arbiter(KEY), folder.path().join("tls"));
    let arbiter = arbiter_with(&url, access(&dir))?;
    let vm = vm();
    assert_eq!(arbiter.compare_and_swap(Generation(0), &solo(1, vm))?, Outcome::Won);
    // Without a certificate of ours the server does not talk.
    let no_identity = folder.path().join("no-identity");
    fs::create_dir(&no_identity)?;
    fs::copy(dir.join("ca-cert.pem"), no_identity.join("ca-cert.pem"))?;
    assert!(arbiter_with(&url, access(&no_identity))?.read().is_err());
    // A server of another authority, and one of none that this system knows, is not believed.
    let stranger = authority("theirs")?;
    let wrong = folder.path().join("wrong");
    fs::create_dir(&wrong)?;
    for name in ["client-cert.pem", "client-key.pem"] {
        fs::copy(dir.join(name), wrong.join(name))?;
    }
    for with_own_roots in [false, true] {
        if with_own_roots {
            fs::write(wrong.join("ca-cert.pem"), stranger.pem())?;
        }
        let error = match arbiter_with(&url, access(&wrong)) {
            Ok(arbiter) => arbiter.read().unwrap_err().to_string(),
            // A host without any roots says so.
            Err(error) => error.to_string(),
        };
        let told = error.contains("UnknownIssuer") || error.contains("root certificates");
        assert!(told, "{error}");
    }
    assert_eq!(arbiter.read()?.map(|record| record.generation), Some(Generation(1)));
    // Certificates that are renewed in place are used at once.
    fs::remove_file(dir.join("client-key.pem"))?;
    let error = arbiter.read().unwrap_err().to_string();
    assert!(error.contains("client-key.pem"), "{error}");
    let (certificate, key) = (dir.join("client-cert.pem"), dir.join("client-key.pem"));
    issue(&ca, &["renewed".to_owned()], &certificate, &key)?;
    assert_eq!(arbiter.compare_and_swap(Generation(1), &solo(2, vm))?, Outcome::Won);
    Ok(())
}

#[test]
fn a_server_has_the_name_by_which_it_is_called() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cluster = secured(&authority("ours")?, &["elsewhere".to_owned()], folder.path())?;
    let arbiter = arbiter_with(&cluster.arbiter(KEY), access(&folder.path().join("tls")))?;
    let error = arbiter.read().unwrap_err().to_string();
    assert!(error.contains("not valid for name"), "{error}");
    Ok(())
}

#[test]
fn files_that_cannot_be_used_are_named() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    let ca = authority("ours")?;
    let open = || arbiter_with("etcd:https://127.0.0.1:1", access(dir)).unwrap_err().to_string();
    let (certificate, key) = (dir.join("client-cert.pem"), dir.join("client-key.pem"));
    let neither = open();
    assert!(neither.contains("ca-cert.pem") || neither.contains("root certificates"), "{neither}");
    for damage in ["", "no PEM", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
        fs::write(dir.join("ca-cert.pem"), damage)?;
        assert!(open().contains("ca-cert.pem"), "{damage}: {}", open());
    }
    fs::write(dir.join("ca-cert.pem"), ca.pem())?;
    issue(&ca, &[], &certificate, &key)?;
    // A key that is another certificate's.
    fs::write(&key, KeyPair::generate()?.serialize_pem())?;
    assert!(open().contains("client-key.pem"), "{}", open());
    fs::write(&key, "")?;
    assert!(open().contains("client-key.pem"), "{}", open());
    fs::remove_file(&certificate)?;
    assert!(open().contains("client-cert.pem"), "{}", open());
    fs::remove_file(&key)?;
    arbiter_with("etcd:https://127.0.0.1:1", access(dir))?;
    Ok(())
}
