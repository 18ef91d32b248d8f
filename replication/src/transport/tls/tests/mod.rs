//! Two ends over the loopback, and peers that are none.

mod credentials;
mod refusals;
mod streams;

use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};

use super::stream::TlsStream;
use super::testing::Authority;
use super::{Client, Deadline, HandshakeError, Server};

/// Longer than any handshake takes, also beside a build.
const PATIENCE: Duration = Duration::from_secs(30);

fn tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (ours, listener.accept().unwrap().0)
}

/// A connection whose two ends hold little, so that writers soon wait.
fn narrow() -> (TcpStream, TcpStream) {
    let (ours, theirs) = tcp();
    for stream in [&ours, &theirs] {
        setsockopt(stream, sockopt::SndBuf, &(16 << 10)).unwrap();
        setsockopt(stream, sockopt::RcvBuf, &(16 << 10)).unwrap();
    }
    (ours, theirs)
}

fn client(directory: &Path) -> Client {
    Client::load(directory, "127.0.0.1").unwrap()
}

fn server(directory: &Path) -> Server {
    Server::load(directory).unwrap()
}

type Outcome = Result<TlsStream, HandshakeError>;

/// Admits who comes on a thread of its own.
fn admit(server: Server, socket: TcpStream, patience: Duration) -> JoinHandle<Outcome> {
    std::thread::spawn(move || server.admit(socket, Deadline::after(patience)))
}

/// Both ends' outcomes, the primary's first.
fn shake(client: &Client, server: &Server, sockets: (TcpStream, TcpStream)) -> (Outcome, Outcome) {
    let admitted = admit(server.clone(), sockets.1, PATIENCE);
    let greeted = client.greet(sockets.0, Deadline::after(PATIENCE));
    (greeted, admitted.join().unwrap())
}

/// Two ends of one authority, the primary's first.
fn pair_over(sockets: (TcpStream, TcpStream)) -> (TlsStream, TlsStream) {
    let directory = Authority::new().directory();
    let (ours, theirs) = shake(&client(directory.path()), &server(directory.path()), sockets);
    (ours.unwrap(), theirs.unwrap())
}

fn pair() -> (TlsStream, TlsStream) {
    pair_over(tcp())
}
