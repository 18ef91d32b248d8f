//! Directories with something missing, or wrong.

use std::fs;
use std::path::Path;

use super::super::testing::{Authority, Dates, Use};
use super::super::{Client, CredentialError, Server};
use crate::error::chain;

/// What is said about a directory, by the primary and by the backup.
fn said(directory: &Path) -> [String; 2] {
    let line =
        |error: CredentialError| chain(&error).replace(&format!("{}/", directory.display()), "");
    [
        Client::load(directory, "127.0.0.1").map(drop).map_err(line),
        Server::load(directory).map(drop).map_err(line),
    ]
    .map(|outcome| outcome.err().unwrap_or_default())
}

/// The same about either side's own files, whose names begin with `$`.
fn both(text: &str) -> [String; 2] {
    ["client", "server"].map(|role| text.replace('$', role))
}

#[test]
fn every_file_that_is_missing_is_named() {
    for (file, text) in [
        ("ca-cert.pem", "Cannot read 'ca-cert.pem': No such file or directory (os error 2)"),
        ("$-cert.pem", "Cannot read '$-cert.pem': No such file or directory (os error 2)"),
        ("$-key.pem", "Cannot read '$-key.pem': No such file or directory (os error 2)"),
    ] {
        let directory = Authority::new().directory();
        assert_eq!(said(directory.path()), ["", ""]);
        for name in both(file) {
            let _ = fs::remove_file(directory.path().join(name));
        }
        assert_eq!(said(directory.path()), both(text));
    }
}

#[test]
fn every_file_that_is_no_such_is_named() {
    let long = "x".repeat((1 << 20) + 1);
    for content in ["", long.as_str()] {
        for (file, text) in [
            ("ca-cert.pem", "'ca-cert.pem' is no file of 1 to 1048576 bytes"),
            ("$-cert.pem", "'$-cert.pem' is no file of 1 to 1048576 bytes"),
            ("$-key.pem", "'$-key.pem' is no file of 1 to 1048576 bytes"),
        ] {
            let directory = Authority::new().directory();
            for name in both(file) {
                fs::write(directory.path().join(name), content).unwrap();
            }
            assert_eq!(said(directory.path()), both(text));
        }
    }
    let directory = Authority::new().directory();
    fs::write(directory.path().join("ca-cert.pem"), "what is this").unwrap();
    assert_eq!(said(directory.path()), both("'ca-cert.pem' has no certificate"));
    let directory = Authority::new().directory();
    let half = "-----BEGIN CERTIFICATE-----\nAAAA\n";
    fs::write(directory.path().join("ca-cert.pem"), half).unwrap();
    let lines = said(directory.path());
    assert!(
        lines.iter().all(|line| line.starts_with("'ca-cert.pem' is no PEM file: ")),
        "{lines:?}"
    );
    let directory = Authority::new().directory();
    for name in both("$-key.pem") {
        let certificate = directory.path().join("ca-cert.pem");
        fs::copy(certificate, directory.path().join(name)).unwrap();
    }
    for (line, begin) in said(directory.path()).iter().zip(both("'$-key.pem' has no private key")) {
        assert!(line.starts_with(&begin), "{line}");
    }
}

/// A pipe that nobody writes to, and a directory.
#[test]
fn what_is_no_file_holds_nobody_up() {
    let directory = Authority::new().directory();
    let pipe = directory.path().join("ca-cert.pem");
    fs::remove_file(&pipe).unwrap();
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRUSR).unwrap();
    assert_eq!(said(directory.path()), both("'ca-cert.pem' is no file of 1 to 1048576 bytes"));
    fs::remove_file(&pipe).unwrap();
    fs::create_dir(&pipe).unwrap();
    assert_eq!(said(directory.path()), both("'ca-cert.pem' is no file of 1 to 1048576 bytes"));
}

#[test]
fn a_certificate_that_a_peer_would_refuse_is_refused_at_once() {
    let authority = Authority::new();
    let directory = authority.directory();
    let issue = |authority: &Authority, dates| {
        authority.issue(directory.path(), Use::Server, dates);
        authority.issue(directory.path(), Use::Client, dates);
    };
    let clock = "or the clock is wrong";
    issue(&authority, Dates::Expired);
    let expected = format!("'$-cert.pem' cannot be used: it has expired, {clock}");
    assert_eq!(said(directory.path()), both(&expected));
    issue(&authority, Dates::NotYet);
    let expected = format!("'$-cert.pem' cannot be used: it is not valid yet, {clock}");
    assert_eq!(said(directory.path()), both(&expected));
    for other in [Authority::new(), Authority::named("others")] {
        issue(&other, Dates::Valid);
        let expected = "'$-cert.pem' cannot be used: it is not of the authority of ca-cert.pem";
        assert_eq!(said(directory.path()), both(expected));
    }
    issue(&authority, Dates::Valid);
    assert_eq!(said(directory.path()), ["", ""]);
}

#[test]
fn a_certificate_is_for_one_side() {
    let directory = Authority::new().directory();
    for what in ["cert", "key"] {
        let [client, server] =
            ["client", "server"].map(|role| directory.path().join(format!("{role}-{what}.pem")));
        let held = fs::read(&client).unwrap();
        fs::copy(&server, &client).unwrap();
        fs::write(&server, held).unwrap();
    }
    let expected = "'$-cert.pem' cannot be used: its use (extendedKeyUsage) is another";
    assert_eq!(said(directory.path()), both(expected));
}

#[test]
fn a_key_of_another_certificate_is_refused() {
    let authority = Authority::new();
    let (directory, other) = (authority.directory(), authority.directory());
    for name in both("$-key.pem") {
        fs::copy(other.path().join(&name), directory.path().join(&name)).unwrap();
    }
    assert_eq!(said(directory.path()), both("'$-cert.pem' does not belong to the key beside it"));
}

#[test]
fn a_host_that_no_certificate_can_name_is_refused() {
    let directory = Authority::new().directory();
    for host in ["", "a b", "-"] {
        let error = Client::load(directory.path(), host).unwrap_err().to_string();
        let end = "is neither a host's name nor an IP address that a certificate could have";
        assert_eq!(error, format!("'{host}' {end}"));
    }
    for host in ["b", "b.example", "10.0.0.2", "::1"] {
        Client::load(directory.path(), host).unwrap();
    }
}
