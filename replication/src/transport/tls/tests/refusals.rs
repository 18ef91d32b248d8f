//! Peers that get nowhere, and what is said of it on either side.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::client::ResolvesClientCert;
use rustls::pki_types::UnixTime;
use rustls::sign::CertifiedKey;
use rustls::time_provider::TimeProvider;

use super::super::testing::Authority;
use super::super::{Client, Deadline, Server};
use super::{Outcome, PATIENCE, admit, client, pair_over, server, shake, tcp};
use crate::error::chain;
use crate::wire::{FrameReader, FrameWriter, Message, SessionId, WireError};

/// What a side says that was refused, or refused.
fn line(outcome: Outcome) -> String {
    outcome.err().map(|error| chain(&error)).unwrap_or_default()
}

fn lines(client: &Client, server: &Server) -> [String; 2] {
    let (ours, theirs) = shake(client, server, tcp());
    [line(ours), line(theirs)]
}

/// A clock that is far ahead.
#[derive(Debug)]
struct Ahead;

impl TimeProvider for Ahead {
    fn current_time(&self) -> Option<UnixTime> {
        // The year 4707; certificates of tests end in 4000.
        Some(UnixTime::since_unix_epoch(Duration::from_secs(1 << 36).mul_f32(1.257)))
    }
}

#[test]
fn both_sides_of_one_authority_admit_each_other() {
    let directory = Authority::new().directory();
    let said = lines(&client(directory.path()), &server(directory.path()));
    assert_eq!(said, ["", ""]);
    let by_name = Client::load(directory.path(), "localhost").unwrap();
    assert_eq!(lines(&by_name, &server(directory.path())), ["", ""]);
}

#[test]
fn another_authority_is_refused_by_either_side() {
    other_authority(Authority::named("others"));
    other_authority(Authority::new());
}

fn other_authority(theirs: Authority) {
    let ours = Authority::new();
    let (here, there) = (ours.directory(), theirs.directory());
    assert_eq!(
        lines(&client(here.path()), &server(there.path())),
        [
            "The backup's certificate is refused: it is not of the authority of ca-cert.pem",
            "The primary refuses this side's certificate: it is not of the authority of the peer's \
             ca-cert.pem",
        ]
    );
    // A primary that trusts the backup's authority and has its own certificate of another one.
    let own = client(here.path());
    let mut config = (*client(there.path()).config).clone();
    config.client_auth_cert_resolver = Arc::clone(&own.config.client_auth_cert_resolver);
    let mixed = Client { config: Arc::new(config), name: own.name };
    assert_eq!(
        lines(&mixed, &server(there.path())),
        [
            "The backup refuses this side's certificate: it is not of the authority of the peer's \
             ca-cert.pem",
            "The primary's certificate is refused: it is not of the authority of ca-cert.pem",
        ]
    );
}

#[derive(Debug)]
struct NoCertificate;

impl ResolvesClientCert for NoCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

#[test]
fn a_primary_without_a_certificate_is_refused() {
    let directory = Authority::new().directory();
    let Client { config, name } = client(directory.path());
    let mut config = (*config).clone();
    config.client_auth_cert_resolver = Arc::new(NoCertificate);
    let bare = Client { config: Arc::new(config), name };
    assert_eq!(
        lines(&bare, &server(directory.path())),
        [
            "The backup refuses this side's certificate: it has none",
            "The primary's certificate is refused: it has none",
        ]
    );
}

#[test]
fn an_expired_certificate_is_refused_by_either_side() {
    let directory = Authority::new().directory();
    let (valid, server) = (client(directory.path()), server(directory.path()));
    let mut config = (*valid.config).clone();
    config.time_provider = Arc::new(Ahead);
    let ahead = Client { config: Arc::new(config), name: valid.name.clone() };
    let expired = "it has expired, or the clock is wrong";
    let dates = "it is out of its dates, or the peer's clock is";
    assert_eq!(
        lines(&ahead, &server),
        [
            format!("The backup's certificate is refused: {expired}"),
            format!("The primary refuses this side's certificate: {dates}"),
        ]
    );
    let mut config = (*server.config).clone();
    config.time_provider = Arc::new(Ahead);
    let ahead = Server { config: Arc::new(config) };
    assert_eq!(
        lines(&valid, &ahead),
        [
            format!("The backup refuses this side's certificate: {dates}"),
            format!("The primary's certificate is refused: {expired}"),
        ]
    );
}

#[test]
fn a_backup_under_another_name_is_refused() {
    let directory = Authority::new().directory();
    for host in ["127.0.0.2", "other.example"] {
        let other = Client::load(directory.path(), host).unwrap();
        assert_eq!(
            lines(&other, &server(directory.path())),
            [
                "The backup's certificate is refused: the host of destination_url is not among its names \
                 (subjectAltName)",
                "The primary refuses this side's certificate: it is not for the name by which it was \
                 called, or is damaged",
            ]
        );
    }
}

/// The same authority's certificates, for another service.
#[test]
fn tls_for_something_else_is_refused() {
    let directory = Authority::new().directory();
    let foreign =
        |side| format!("What was expected to be a {side} speaks TLS, and not for this program");
    for protocols in [vec![], vec![b"h2".to_vec()]] {
        let Client { config, name } = client(directory.path());
        let mut config = (*config).clone();
        config.alpn_protocols.clone_from(&protocols);
        let other = Client { config: Arc::new(config), name };
        let [_, said] = lines(&other, &server(directory.path()));
        assert!(said == foreign("primary") || protocols.len() == 1, "{said}");
        assert!(!said.is_empty());
        let mut config = (*server(directory.path()).config).clone();
        config.alpn_protocols = protocols;
        let other = Server { config: Arc::new(config) };
        let [said, _] = lines(&client(directory.path()), &other);
        assert_eq!(said, foreign("backup"));
    }
}

/// A hello of TLS 1.2 and no more: version, random, no session, one suite, no compression, and what RFC 5246
/// and 8422 want of extensions.
fn hello_of_1_2() -> Vec<u8> {
    let groups = [0, 10, 0, 4, 0, 2, 0, 29];
    let signatures = [0, 13, 0, 4, 0, 2, 4, 3];
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.extend([0, 0, 2, 0xc0, 0x2b, 1, 0]);
    body.extend([0, 16]);
    body.extend(groups.iter().chain(&signatures));
    let length = u8::try_from(body.len()).unwrap();
    let mut hello = vec![22, 3, 1, 0, length + 4, 1, 0, 0, length];
    hello.extend(body);
    hello
}

/// What the backup says of a primary that says `bytes`, then ends or waits; and what that one hears.
fn stranger(bytes: &[u8], ends: bool, patience: Duration) -> (String, Vec<u8>) {
    let directory = Authority::new().directory();
    let (mut ours, theirs) = tcp();
    let admitted = admit(server(directory.path()), theirs, patience);
    let _ = ours.write_all(bytes);
    if ends {
        ours.shutdown(Shutdown::Write).unwrap();
    }
    let said = line(admitted.join().unwrap());
    let mut heard = Vec::new();
    let _ = ours.read_to_end(&mut heard);
    (said, heard)
}

#[test]
fn tls_1_2_is_refused() {
    let (said, heard) = stranger(&hello_of_1_2(), false, PATIENCE);
    assert!(
        said.starts_with("The TLS handshake with the primary failed: peer is incompatible"),
        "{said}"
    );
    // A fatal alert: protocol_version.
    assert_eq!(heard, [21, 3, 3, 0, 2, 2, 70]);
}

#[test]
fn garbage_is_refused_with_an_alert() {
    // Whether there is an alert: of a message without end TLS says nothing.
    let begins: [(&[u8], bool); 6] = [
        (b"GET / HTTP/1.1\r\n\r\n", true),
        (&[0; 64], true),
        (&[0xff; 4096], true),
        // A record of more bytes than a record has; a handshake message that is no hello; one without end.
        (&[22, 3, 1, 0xff, 0xff, 1, 0, 0, 0], true),
        (&[22, 3, 1, 0, 4, 20, 0, 0, 0], true),
        (&[22, 3, 1, 0, 4, 1, 0xff, 0xff, 0xff], false),
    ];
    for (bytes, has_alert) in begins {
        let (said, heard) = stranger(bytes, false, PATIENCE);
        assert!(
            said.starts_with("The TLS handshake with the primary failed: "),
            "{said}: {bytes:?}"
        );
        let alert: &[u8] = if has_alert { &[21, 3, 3, 0, 2, 2] } else { &[] };
        assert_eq!(&heard[..alert.len()], alert, "{bytes:?}");
        assert_eq!(heard.len(), if has_alert { 7 } else { 0 }, "{bytes:?}");
    }
}

#[test]
fn a_peer_that_stops_in_the_middle_is_given_up() {
    const SHORT: Duration = Duration::from_millis(300);
    let hello = hello_of_1_2();
    for bytes in [&[][..], &hello[..3], &hello[..40]] {
        let began = Instant::now();
        let (said, _) = stranger(bytes, false, SHORT);
        assert_eq!(said, "The primary did not finish the TLS handshake within 300 ms");
        assert!(began.elapsed() >= SHORT);
        let (said, _) = stranger(bytes, true, PATIENCE);
        assert_eq!(said, "The primary ended the connection in the middle of the TLS handshake");
    }
}

/// Before a certificate was verified anybody on the path could say it: it counts for nothing.
#[test]
fn a_farewell_in_the_middle_is_no_end() {
    const SHORT: Duration = Duration::from_millis(300);
    let farewell = [21, 3, 3, 0, 2, 1, 0];
    let (said, _) = stranger(&farewell, false, SHORT);
    assert_eq!(said, "The primary did not finish the TLS handshake within 300 ms");
    for bytes in [farewell.repeat(9), [&farewell[..], &[0; 4096]].concat()] {
        let (said, _) = stranger(&bytes, false, PATIENCE);
        assert!(said.starts_with("The TLS handshake with the primary failed: "), "{said}");
    }
}

/// Each byte comes in time, and all of them would take for ever.
#[test]
fn a_peer_that_drips_is_given_up() {
    const SHORT: Duration = Duration::from_millis(300);
    let directory = Authority::new().directory();
    let (mut ours, theirs) = tcp();
    let admitted = admit(server(directory.path()), theirs, SHORT);
    let began = Instant::now();
    // The begin of a long message: twenty seconds of it.
    let mut bytes = vec![22, 3, 1, 0x40, 0, 1, 0, 0x3f, 0xfc];
    bytes.resize(1 << 10, 0);
    let is_given_up = bytes.into_iter().any(|byte| {
        std::thread::sleep(Duration::from_millis(20));
        admitted.is_finished() || ours.write_all(&[byte]).is_err()
    });
    assert!(is_given_up, "after {:?}", began.elapsed());
    let said = line(admitted.join().unwrap());
    assert_eq!(said, "The primary did not finish the TLS handshake within 300 ms");
}

#[test]
fn a_primary_gives_up_a_silent_backup_in_time() {
    let directory = Authority::new().directory();
    let (ours, _theirs) = tcp();
    let patience = Duration::from_millis(300);
    let said = line(client(directory.path()).greet(ours, Deadline::after(patience)));
    assert_eq!(said, "The backup did not finish the TLS handshake within 300 ms");
}

/// A primary that verified the backup waits for the word that it was verified itself.
#[test]
fn a_backup_that_never_admits_is_given_up() {
    let directory = Authority::new().directory();
    let (ours, theirs) = tcp();
    let mut config = (*server(directory.path()).config).clone();
    config.send_tls13_tickets = 2;
    let silent = std::thread::spawn(move || {
        let mut theirs = theirs;
        let mut session = rustls::ServerConnection::new(Arc::new(config)).unwrap();
        while session.is_handshaking() {
            session.complete_io(&mut theirs).unwrap();
        }
        // Tickets are no such word.
        let _ = session.complete_io(&mut theirs);
        let _ = theirs.read(&mut [0; 64]);
    });
    let patience = Duration::from_secs(1);
    let said = line(client(directory.path()).greet(ours, Deadline::after(patience)));
    assert_eq!(said, "The backup did not finish the TLS handshake within 1000 ms");
    silent.join().unwrap();
}

const PLAIN: &str = "speaks no TLS: give tls_dir to both sides, or to neither";
const TLS: &str =
    "The peer speaks TLS and this side does not: give tls_dir to both sides, or to neither";

/// A peer's end without TLS: what its reader of frames makes of what comes.
fn first_frame(socket: &TcpStream) -> String {
    let mut reader = FrameReader::new(socket.try_clone().unwrap(), None);
    let error: WireError = Message::receive(&mut reader, &mut Vec::new()).unwrap_err();
    error.to_string()
}

#[test]
fn a_primary_without_tls_and_its_backup_say_so() {
    let directory = Authority::new().directory();
    let (ours, theirs) = tcp();
    let admitted = admit(server(directory.path()), theirs, PATIENCE);
    let mut writer = FrameWriter::new(ours.try_clone().unwrap(), SessionId(1));
    // More than a socket holds, so that a backup that closed without reading on would reset it.
    let long = Message::Abort("x".repeat(900));
    (0..100).for_each(|_| drop(long.send(&mut writer)));
    assert_eq!(first_frame(&ours), TLS);
    drop((ours, writer));
    assert_eq!(line(admitted.join().unwrap()), format!("The primary {PLAIN}"));
}

#[test]
fn a_backup_without_tls_and_its_primary_say_so() {
    let directory = Authority::new().directory();
    let (ours, theirs) = tcp();
    let plain = std::thread::spawn(move || {
        let said = first_frame(&theirs);
        let mut writer = FrameWriter::new(theirs.try_clone().unwrap(), SessionId(0));
        Message::Abort(said.clone()).send(&mut writer).unwrap();
        theirs.shutdown(Shutdown::Write).unwrap();
        let _ = (&theirs).read_to_end(&mut Vec::new());
        said
    });
    let said = line(client(directory.path()).greet(ours, Deadline::after(PATIENCE)));
    assert_eq!(said, format!("The backup {PLAIN}"));
    assert_eq!(plain.join().unwrap(), TLS);
}

/// A peer of this protocol that was admitted and then speaks in plain text: it is a damaged record.
#[test]
fn nobody_goes_on_without_tls() {
    let (ours, theirs) = tcp();
    let mut raw = ours.try_clone().unwrap();
    let (_ours, mut theirs) = pair_over((ours, theirs));
    raw.write_all(b"USTD and more, longer than a record's head").unwrap();
    let error = theirs.read(&mut [0; 64]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionAborted, "{error}");
}
