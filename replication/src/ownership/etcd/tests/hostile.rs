//! Whoever answers instead of etcd.

use std::io::Write;
use std::net::TcpListener;
use std::time::{Duration, Instant};

use etcd_server::answer as http;

use super::proxy::read_request;
use super::*;
use crate::ownership::etcd::answer;

const JSON: &str = "application/json";

/// Serves `answers`, one a connection, on a port of its own.
fn server(answers: Vec<Vec<u8>>) -> Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}", listener.local_addr()?);
    std::thread::spawn(move || -> Result<()> {
        for answer in answers {
            let (mut stream, _) = listener.accept()?;
            read_request(&mut stream)?;
            // Who has heard enough hangs up.
            let _ = stream.write_all(&answer);
        }
        Ok(())
    });
    Ok(url)
}

/// What one answer to a read is taken for.
fn read_of(answer: impl Into<Vec<u8>>) -> Result<String> {
    let arbiter = arbiter(&format!("etcd:{}/{KEY}", server(vec![answer.into()])?))?;
    match arbiter.read() {
        Ok(record) => Ok(format!("{record:?}")),
        Err(error) => {
            let known = matches!(&error, ArbiterError::Etcd(EtcdError::NoAnswer(_)));
            ensure!(known, "{error}");
            Ok(error.to_string())
        }
    }
}

#[test]
fn what_is_no_answer_of_etcd_is_no_answer() -> Result<()> {
    let header = r#""header":{"cluster_id":"7","revision":"3"}"#;
    let entry = |key: &str, revision: &str, value: &str| {
        format!(
            r#"{{{header},"kvs":[{{"key":"{key}","mod_revision":{revision},"value":"{value}"}}]}}"#
        )
    };
    let deep = format!("{{{header},\"kvs\":{}", "[".repeat(30_000));
    let two = format!(
        r#"{{{header},"kvs":[{{"key":"dm0x","mod_revision":"1"}},{{"key":"dm0x","mod_revision":"2"}}]}}"#
    );
    let bodies = [
        // An empty object is no cluster without a key.
        ("{}".to_owned(), "header"),
        (r#"{"kvs":[]}"#.to_owned(), "header"),
        (r#"{"header":{"cluster_id":"x","revision":"3"}}"#.to_owned(), "No answer of etcd"),
        (r#"{"header":{"cluster_id":"-1","revision":"3"}}"#.to_owned(), "No answer of etcd"),
        (r#"{"header":{"cluster_id":"7","revision":"0"}}"#.to_owned(), "impossible revision"),
        (r#"{"header":{"cluster_id":"7"}}"#.to_owned(), "revision"),
        (String::new(), "No answer of etcd"),
        ("<html>Welcome</html>".to_owned(), "No answer of etcd"),
        (format!("{{{header}"), "No answer of etcd"),
        (deep, "No answer of etcd"),
        (two, "several"),
        (entry("dm0y", "\"1\"", ""), "another key"),
        (entry("dm0x", "\"0\"", ""), "revision"),
        (entry("dm0x", "9223372036854775808", ""), "revision"),
        (entry("dm0x", "\"1\"", "***"), "base64"),
        (format!(r#"{{{header},"x":"{}"}}"#, "y".repeat(70_000)), "limit"),
    ];
    for (body, reason) in bodies {
        let said = read_of(http(200, JSON, &body))?;
        assert!(said.contains(reason), "{said} does not say {reason}");
    }
    // The same, well formed.
    assert_eq!(read_of(http(200, JSON, &format!("{{{header}}}")))?, "None");
    Ok(())
}

#[test]
fn other_statuses_are_repeated_in_short() -> Result<()> {
    let long = format!("{{\"error\":\"a\\u0007b {}\",\"code\":14}}", "c".repeat(9000));
    let said = read_of(http(503, JSON, &long))?;
    assert!(said.contains("Status 503: a b ccc") && said.len() < 600, "{said}");
    let said = read_of(http(503, JSON, r#"{"code":2,"message":"no leader"}"#))?;
    assert!(said.contains("Status 503: no leader"), "{said}");
    let said = read_of(http(502, "text/html", "<h1>Bad\r\ngateway</h1>"))?;
    assert!(said.contains("Status 502: <h1>Bad  gateway"), "{said}");
    // A redirect is not followed: there is no second connection to serve.
    let there = server(vec![])?;
    let redirect = format!("HTTP/1.1 307 X\r\nLocation: {there}/\r\nContent-Length: 0\r\n\r\n");
    let said = read_of(redirect)?;
    assert!(said.contains("Status 307"), "{said}");
    for noise in [&b""[..], b"\xff\xff\xff\xff", b"SSH-2.0-x\r\n", b"HTTP/1.1 200 OK\r\n"] {
        read_of(noise)?;
    }
    let head = format!("HTTP/1.1 200 OK\r\nX: {}\r\n\r\n", "y".repeat(100_000));
    read_of(head)?;
    let cut = "HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{\"header\":{\"cluster_id\":\"1\"}}";
    let said = read_of(cut)?;
    assert!(said.contains("No etcd server answered"), "{said}");
    Ok(())
}

#[test]
fn an_answer_that_trickles_is_cut_off() -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("etcd:http://{}/{KEY}", listener.local_addr()?);
    std::thread::spawn(move || -> Result<()> {
        let (mut stream, _) = listener.accept()?;
        read_request(&mut stream)?;
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n")?;
        // Always a byte before any time between two would be over.
        for _ in 0..60_000 {
            stream.write_all(b" ")?;
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    });
    let asked = Instant::now();
    assert!(arbiter(&url)?.read().is_err());
    assert!(asked.elapsed() < Duration::from_secs(60), "{:?}", asked.elapsed());
    Ok(())
}

#[test]
fn a_swap_needs_a_whole_answer() -> Result<()> {
    let nothing = http(200, JSON, r#"{"header":{"cluster_id":"7","revision":"3"}}"#);
    for body in [
        // Refused, and not a word of what stands: it may be cut, or none of etcd's.
        r#"{"header":{"cluster_id":"7","revision":"3"}}"#,
        r#"{"header":{"cluster_id":"7","revision":"3"},"responses":[{}]}"#,
        r#"{"header":{"cluster_id":"7","revision":"3"},"responses":[{"response_range":{}},{"response_range":{}}]}"#,
        r#"{"succeeded":true}"#,
        r#"{"header":{"cluster_id":"8","revision":"3"},"succeeded":true}"#,
        r#"{"header":{"cluster_id":"7","revision":"2"},"succeeded":true}"#,
        "",
    ] {
        let answers = vec![nothing.clone().into(), http(200, JSON, body).into()];
        let arbiter = arbiter(&format!("etcd:{}/{KEY}", server(answers)?))?;
        let error = arbiter.compare_and_swap(Generation(0), &solo(1, vm())).unwrap_err();
        assert!(matches!(error, ArbiterError::Etcd(EtcdError::Unknown(..))), "{body}: {error}");
    }
    // As it should be; both spellings.
    for body in [
        r#"{"header":{"cluster_id":7,"revision":3},"responses":[{"response_range":{"header":{},"kvs":[]}}]}"#,
        r#"{"header":{"clusterId":"7","revision":"3"},"responses":[{"responseRange":{}}]}"#,
    ] {
        let refused = answer::swap(body.as_bytes(), KEY.as_bytes())?;
        assert_eq!(refused.outcome, SwapOutcome::Refused(None), "{body}");
    }
    Ok(())
}

#[test]
fn a_token_fits_a_header() {
    assert_eq!(answer::token(br#"{"token":"abc.12"}"#).unwrap(), "abc.12");
    let long = format!("{{\"token\":\"{}\"}}", "x".repeat(5000));
    for text in [r#"{"token":""}"#, "{}", r#"{"token":"a b"}"#, r#"{"token":"a\r\nX: y"}"#, &long] {
        assert!(answer::token(text.as_bytes()).is_err(), "{text}");
    }
}

/// A backup outlives a cluster: what was learnt of one is for a session.
#[test]
fn another_cluster_is_none_of_ours_within_a_session() -> Result<()> {
    let empty = |cluster: u32| {
        http(200, JSON, &format!(r#"{{"header":{{"cluster_id":"{cluster}","revision":"3"}}}}"#))
    };
    let answers = [7, 8, 8].map(|cluster| empty(cluster).into()).to_vec();
    let arbiter = arbiter(&format!("etcd:{}/{KEY}", server(answers)?))?;
    arbiter.read()?;
    let refused = arbiter.read().map(drop).unwrap_err().to_string();
    assert!(refused.contains("cluster"), "{refused}");
    arbiter.begin_anew();
    assert_eq!(arbiter.read()?, None);
    Ok(())
}
