//! A small blocking client: HTTP/1.1 over a UNIX socket, one request at a time.
//!
//! What enters from the server is bounded: a head of [`HEAD_BYTES_MAX`], a body of
//! [`BODY_BYTES_MAX`]. A server that breaks the rules yields an error, never a panic.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Bytes of a status line with its headers.
pub const HEAD_BYTES_MAX: usize = 64 << 10;
/// Bytes of an answer's body.
pub const BODY_BYTES_MAX: usize = 64 << 20;

/// The methods of the interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    Get,
    Put,
}

/// Why a request has no answer that counts as success.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("Cannot connect to the API socket {path}")]
    Connect { path: PathBuf, source: io::Error },
    #[error("Cannot send the request")]
    Send(#[source] io::Error),
    #[error("Cannot receive the answer")]
    Receive(#[source] io::Error),
    #[error("Answer ends too early")]
    Truncated,
    #[error("Answer is too large")]
    TooLarge,
    #[error("Answer is malformed: {0}")]
    Malformed(&'static str),
    #[error("Server answered {status} {reason}")]
    Refused {
        status: u16,
        reason: String,
        /// What the server says went wrong, outermost cause first.
        chain: Vec<String>,
    },
}

/// An answer of any status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    pub reason: String,
    pub body: String,
}

impl Answer {
    /// Whether the server did what was asked.
    #[must_use]
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }
}

/// The body of an answer that says that it was done.
fn success(answer: Answer) -> Result<String, ClientError> {
    if answer.is_success() {
        return Ok(answer.body);
    }
    // A server of another kind may say it otherwise.
    let chain = serde_json::from_str(&answer.body).unwrap_or_else(|_| match answer.body {
        body if body.is_empty() => Vec::new(),
        body => vec![body],
    });
    Err(ClientError::Refused { status: answer.status, reason: answer.reason, chain })
}

/// A connection to a VMM.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    /// Bytes that have come and are not used yet.
    bytes: Vec<u8>,
}

impl Client {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    ///
    /// Nobody listens there, or it may not be used.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path)
            .map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
        Ok(Self { stream, bytes: Vec::new() })
    }

    /// How long a single read or write may take; without a limit where `None`.
    ///
    /// # Errors
    ///
    /// The timeout is zero.
    pub fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream.set_read_timeout(timeout)?;
        self.stream.set_write_timeout(timeout)
    }

    /// Makes a request, as `vm.info`, and gives the body of a successful answer.
    ///
    /// # Errors
    ///
    /// The server refuses, or cannot be talked to.
    pub fn call(
        &mut self,
        method: Method,
        name: &str,
        body: Option<&str>,
    ) -> Result<String, ClientError> {
        self.exchange(method, name, body).and_then(success)
    }

    /// Makes a request and gives the answer, whatever its status.
    ///
    /// # Errors
    ///
    /// The server cannot be talked to.
    pub fn exchange(
        &mut self,
        method: Method,
        name: &str,
        body: Option<&str>,
    ) -> Result<Answer, ClientError> {
        self.exchange_by(method, name, body, |mut stream, bytes| stream.write(bytes))
    }

    /// The same as [`Client::call`] with a first write by `write`, which may send more than bytes,
    /// and says how many of them it has sent.
    ///
    /// # Errors
    ///
    /// The server refuses, or cannot be talked to.
    pub fn call_by(
        &mut self,
        method: Method,
        name: &str,
        body: Option<&str>,
        write: impl FnOnce(&UnixStream, &[u8]) -> io::Result<usize>,
    ) -> Result<String, ClientError> {
        self.exchange_by(method, name, body, write).and_then(success)
    }

    fn exchange_by(
        &mut self,
        method: Method,
        name: &str,
        body: Option<&str>,
        write: impl FnOnce(&UnixStream, &[u8]) -> io::Result<usize>,
    ) -> Result<Answer, ClientError> {
        let method = match method {
            Method::Get => "GET",
            Method::Put => "PUT",
        };
        let mut text = format!(
            "{method} /api/v1/{name} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
        );
        if let Some(body) = body {
            text.push_str("Content-Type: application/json\r\n");
            text.push_str(&format!("Content-Length: {}\r\n\r\n", body.len()));
            text.push_str(body);
        } else {
            text.push_str("Content-Length: 0\r\n\r\n");
        }
        // A server that refuses early stops reading: what it answers says more than the write
        // that failed.
        let bytes = text.as_bytes();
        let sent = write(&self.stream, bytes)
            .and_then(|count| self.stream.write_all(bytes.get(count..).unwrap_or_default()));
        match (sent, self.receive()) {
            (_, Ok(answer)) => Ok(answer),
            (Err(error), Err(_)) => Err(ClientError::Send(error)),
            (Ok(()), Err(error)) => Err(error),
        }
    }

    fn receive(&mut self) -> Result<Answer, ClientError> {
        loop {
            let head = self.receive_head()?;
            // Interim answers (100 Continue) come before the one that counts.
            if !(100..200).contains(&head.status) {
                let body = self.receive_body(&head)?;
                return Ok(Answer { status: head.status, reason: head.reason, body });
            }
        }
    }

    fn receive_head(&mut self) -> Result<Head, ClientError> {
        let end = loop {
            if let Some(end) = find(&self.bytes, b"\r\n\r\n") {
                break end;
            }
            if self.bytes.len() > HEAD_BYTES_MAX {
                return Err(ClientError::TooLarge);
            }
            if self.fill()? == 0 {
                return Err(ClientError::Truncated);
            }
        };
        let rest = self.bytes.split_off(end + 4);
        let head = std::mem::replace(&mut self.bytes, rest);
        let text = std::str::from_utf8(&head[..end])
            .map_err(|_| ClientError::Malformed("its head is no text"))?;
        Head::parse(text)
    }

    fn receive_body(&mut self, head: &Head) -> Result<String, ClientError> {
        let bytes = match head.length {
            _ if head.status == 204 || head.status == 304 => Vec::new(),
            Some(length) if length > BODY_BYTES_MAX => return Err(ClientError::TooLarge),
            Some(length) => {
                while self.bytes.len() < length {
                    if self.fill()? == 0 {
                        return Err(ClientError::Truncated);
                    }
                }
                let rest = self.bytes.split_off(length);
                std::mem::replace(&mut self.bytes, rest)
            }
            // Without a length the answer goes on to the end of the connection.
            None => {
                while self.fill()? != 0 {
                    if self.bytes.len() > BODY_BYTES_MAX {
                        return Err(ClientError::TooLarge);
                    }
                }
                std::mem::take(&mut self.bytes)
            }
        };
        String::from_utf8(bytes).map_err(|_| ClientError::Malformed("its body is no text"))
    }

    fn fill(&mut self) -> Result<usize, ClientError> {
        let mut chunk = [0; 16 << 10];
        loop {
            match self.stream.read(&mut chunk) {
                Ok(count) => {
                    self.bytes.extend_from_slice(&chunk[..count]);
                    return Ok(count);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(ClientError::Receive(error)),
            }
        }
    }
}

/// What matters of an answer's head.
#[derive(Debug, PartialEq, Eq)]
struct Head {
    status: u16,
    reason: String,
    length: Option<usize>,
}

impl Head {
    fn parse(text: &str) -> Result<Self, ClientError> {
        let mut lines = text.split("\r\n");
        let mut words = lines.next().unwrap_or_default().splitn(3, ' ');
        if !words.next().is_some_and(|version| version.starts_with("HTTP/1.")) {
            return Err(ClientError::Malformed("it is no HTTP/1"));
        }
        let status = words
            .next()
            .filter(|status| status.len() == 3)
            .and_then(|status| status.parse().ok())
            .ok_or(ClientError::Malformed("it has no status"))?;
        let reason = words.next().unwrap_or_default().to_owned();
        let mut length = None;
        for line in lines {
            let (name, value) =
                line.split_once(':').ok_or(ClientError::Malformed("a header has no colon"))?;
            if name.eq_ignore_ascii_case("content-length") {
                let parsed = value.trim().parse();
                length = Some(parsed.map_err(|_| ClientError::Malformed("its length is none"))?);
            } else if name.eq_ignore_ascii_case("transfer-encoding") {
                return Err(ClientError::Malformed("its transfer encoding is unknown"));
            }
        }
        Ok(Self { status, reason, length })
    }
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|window| window == wanted)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    /// What a client makes of a server that answers `bytes` and closes.
    fn ask(bytes: &'static [u8]) -> Result<Answer, ClientError> {
        let (client, mut server) = UnixStream::pair().unwrap();
        let serving = thread::spawn(move || {
            let mut request = Vec::new();
            let mut chunk = [0; 1024];
            while !request.ends_with(b"\r\n\r\n") {
                let count = server.read(&mut chunk).unwrap();
                request.extend_from_slice(&chunk[..count]);
            }
            // The client may have seen enough.
            let _ = server.write_all(bytes);
            String::from_utf8(request).unwrap()
        });
        let mut client = Client { stream: client, bytes: Vec::new() };
        let answer = client.exchange(Method::Get, "vmm.ping", None);
        drop(client);
        let request = serving.join().unwrap();
        assert!(request.starts_with("GET /api/v1/vmm.ping HTTP/1.1\r\n"), "{request}");
        assert!(request.contains("\r\nContent-Length: 0\r\n"), "{request}");
        answer
    }

    #[test]
    fn answers_of_every_shape_are_read() {
        for (bytes, status, body) in [
            (&b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"[..], 200, "{}"),
            (b"HTTP/1.1 200 OK\r\ncontent-length:2\r\n\r\n{}trailing", 200, "{}"),
            (b"HTTP/1.1 204 No Content\r\nServer: x\r\n\r\n", 204, ""),
            (b"HTTP/1.1 200 OK\r\n\r\nto the end", 200, "to the end"),
            (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n", 204, ""),
            (b"HTTP/1.0 404 Not Found\r\nContent-Length: 0\r\n\r\n", 404, ""),
        ] {
            let answer = ask(bytes).unwrap();
            assert_eq!((answer.status, answer.body.as_str()), (status, body));
        }
    }

    #[test]
    fn answers_that_break_the_rules_are_errors() {
        for bytes in [
            &b""[..],
            b"HTTP/1.1 200",
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{}",
            b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n{}",
            b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n{}",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"HTTP/1.1 20 OK\r\n\r\n",
            b"HTTP/1.1 abc OK\r\n\r\n",
            b"HTTP/1.1\r\n\r\n",
            b"SSH-2.0-OpenSSH\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nnonsense\r\n\r\n",
            b"HTTP/1.1 200 \xff\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n\xff",
        ] {
            assert!(ask(bytes).is_err(), "{:?}", String::from_utf8_lossy(bytes));
        }
        let endless = Vec::leak(vec![b'x'; HEAD_BYTES_MAX + (64 << 10)]);
        assert!(matches!(ask(endless), Err(ClientError::TooLarge)));
    }

    #[test]
    fn a_refusal_carries_what_the_server_says() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let serving = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = vec![0; 1024];
            let count = stream.read(&mut request).unwrap();
            let answer: &[u8] =
                b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 9\r\n\r\n[\"a\",\"b\"]";
            stream.write_all(answer).unwrap();
            String::from_utf8(request[..count].to_vec()).unwrap()
        });
        let mut client = Client::connect(&path).unwrap();
        let error = client.call(Method::Put, "vm.create", Some("{ }")).unwrap_err();
        assert_eq!(error.to_string(), "Server answered 500 Internal Server Error");
        let ClientError::Refused { status, chain, .. } = error else { panic!("{error:?}") };
        assert_eq!((status, chain), (500, vec!["a".to_owned(), "b".to_owned()]));
        let request = serving.join().unwrap();
        assert!(request.starts_with("PUT /api/v1/vm.create HTTP/1.1\r\n"), "{request}");
        assert!(request.ends_with("\r\nContent-Length: 3\r\n\r\n{ }"), "{request}");
    }

    #[test]
    fn a_socket_that_nobody_serves_is_named() {
        let error = Client::connect(Path::new("/nonexistent/api.sock")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/api.sock"));
    }
}
