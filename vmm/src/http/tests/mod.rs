//! The server against a control loop that answers from a script.

mod clients;
mod description;
mod files;
mod parsing;
mod requests;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam_channel::{Receiver, unbounded};
use tempfile::TempDir;

use super::connection::Patience;
use super::server::{HttpServer, serve_with};
use crate::options::ApiSocket;
use crate::request::{Call, Failure, Reply, Request};

/// Nothing in these tests may hang for ever; nothing in them depends on the length of this.
const HANG: Duration = Duration::from_secs(60);

/// What the control loop answers.
type Script = fn(&Request) -> Result<Reply, Failure>;

/// A server, its control loop, and a record of what reached it.
struct Bed {
    server: Option<HttpServer>,
    control: Option<JoinHandle<()>>,
    /// The requests as `Debug` prints them, and how many descriptors came with each.
    seen: Arc<Mutex<Vec<(String, usize)>>>,
    path: PathBuf,
    _directory: TempDir,
}

impl Bed {
    fn new(script: Script) -> Self {
        Self::with_patience(script, Patience::default())
    }

    fn with_patience(script: Script, patience: Patience) -> Self {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("api.sock");
        let (calls, receiver) = unbounded();
        let server = serve_with(ApiSocket::Path(path.clone()), calls, patience).unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let record = Arc::clone(&seen);
        let control = thread::spawn(move || control_loop(&receiver, script, &record));
        Self { server: Some(server), control: Some(control), seen, path, _directory: directory }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(HANG)).unwrap();
        stream.set_write_timeout(Some(HANG)).unwrap();
        stream
    }

    /// Sends `bytes` on a connection of their own and gives all that comes back.
    fn exchange(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        // The server may have refused before all is written.
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        read_all(&mut stream)
    }

    fn seen(&self) -> Vec<(String, usize)> {
        self.seen.lock().unwrap().clone()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        drop(self.server.take());
        if let Some(control) = self.control.take()
            && control.join().is_err()
        {
            eprintln!("The control loop has failed");
        }
    }
}

fn control_loop(calls: &Receiver<Call>, script: Script, record: &Mutex<Vec<(String, usize)>>) {
    for call in calls {
        record.lock().unwrap().push((format!("{:?}", call.request), call.fds.len()));
        // The client may be gone.
        let _ = call.reply.send(script(&call.request));
    }
}

fn read_all(stream: &mut UnixStream) -> String {
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(count) => bytes.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break,
            Err(error) => panic!("{error} after {:?}", String::from_utf8_lossy(&bytes)),
        }
    }
    String::from_utf8(bytes).unwrap()
}

/// Reads one answer: its status and its body.
fn read_answer(stream: &mut UnixStream) -> (u16, String) {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        assert_eq!(
            stream.read(&mut byte).unwrap(),
            1,
            "after {:?}",
            String::from_utf8_lossy(&head)
        );
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let status = head["HTTP/1.1 ".len()..][..3].parse().unwrap();
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("Content-Length: "))
        .map_or(0, |length| length.parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).unwrap();
    (status, String::from_utf8(body).unwrap())
}

fn put(path: &str, body: &str) -> Vec<u8> {
    format!("PUT /api/v1/{path} HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len())
        .into_bytes()
}

fn get(path: &str) -> Vec<u8> {
    format!("GET /api/v1/{path} HTTP/1.1\r\nHost: localhost\r\n\r\n").into_bytes()
}

fn status_of(answer: &str) -> &str {
    answer.lines().next().unwrap_or("no answer at all")
}

fn body_of(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").map_or("", |(_, body)| body)
}
