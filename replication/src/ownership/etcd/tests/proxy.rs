//! Between the arbiter and a server: passes requests on, loses answers, or answers by itself.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use super::*;

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Act {
    Pass,
    /// The server has it, and nobody hears of it.
    LoseAnswer,
    /// It never gets there.
    LoseRequest,
    /// The server gets it twice, and the second answer counts.
    Repeat,
}

type Judge = dyn Fn(&str) -> Act + Send;

pub(super) struct Proxy {
    address: SocketAddr,
    ends: Arc<AtomicBool>,
    judge: Arc<Mutex<Box<Judge>>>,
    pub(super) lost: Arc<AtomicU32>,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    pub(super) fn start(server: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let ends = Arc::new(AtomicBool::new(false));
        let lost = Arc::new(AtomicU32::new(0));
        let judge: Arc<Mutex<Box<Judge>>> = Arc::new(Mutex::new(Box::new(|_| Act::Pass)));
        let (theirs, counted, judges) = (Arc::clone(&ends), Arc::clone(&lost), Arc::clone(&judge));
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if theirs.load(Ordering::Acquire) {
                    return;
                }
                // A client that goes away in the middle is its own loss.
                let _ = serve(stream, server, &judges, &counted);
            }
        });
        Ok(Self { address, ends, judge, lost, thread: Some(thread) })
    }

    pub(super) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// From now on `judge` says by its path what becomes of a request.
    pub(super) fn judge(&self, judge: impl Fn(&str) -> Act + Send + 'static) {
        *self.judge.lock().unwrap() = Box::new(judge);
    }

    pub(super) fn lost(&self) -> u32 {
        self.lost.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Release);
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(
    client: std::io::Result<TcpStream>,
    server: SocketAddr,
    judge: &Mutex<Box<Judge>>,
    lost: &AtomicU32,
) -> Result<()> {
    let mut client = client?;
    let request = read_request(&mut client)?;
    let text = String::from_utf8_lossy(&request).into_owned();
    let path = text.split(' ').nth(1).context("no path")?;
    let act = judge.lock().unwrap()(path);
    if act == Act::LoseRequest {
        lost.fetch_add(1, Ordering::Relaxed);
        return Ok(());
    }
    let mut answer = exchange(server, &request)?;
    match act {
        Act::LoseAnswer => {
            lost.fetch_add(1, Ordering::Relaxed);
            return Ok(client.shutdown(Shutdown::Both)?);
        }
        Act::Repeat => answer = exchange(server, &request)?,
        Act::Pass | Act::LoseRequest => {}
    }
    Ok(client.write_all(&answer)?)
}

/// The arbiter asks for the end of the connection behind each answer.
fn exchange(server: SocketAddr, request: &[u8]) -> Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server)?;
    stream.write_all(request)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    ensure!(answer.starts_with(b"HTTP/1.1 "), "the server said nothing");
    Ok(answer)
}

/// Reads a head and as much of a body as it announces.
pub(super) fn read_request(stream: &mut TcpStream) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut piece = [0; 4096];
    loop {
        let text = String::from_utf8_lossy(&bytes).to_lowercase();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
            if body.len() >= length.context("no length")?.trim().parse()? {
                return Ok(bytes);
            }
        }
        let count = stream.read(&mut piece)?;
        ensure!(count > 0, "the client is gone");
        bytes.extend_from_slice(&piece[..count]);
    }
}
