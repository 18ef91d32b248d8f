//! The listening thread and the limit on clients.

use std::collections::{HashMap, VecDeque};
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::connection::{self, Patience};
use super::response::{Response, Status};
use super::socket::{self, SocketFile};
use super::{CONNECTIONS_MAX, HttpError};
use crate::options::ApiSocket;
use crate::request::Call;

/// How many refused clients are kept, and how long, so that they can read why: a client that is
/// still writing when we close never gets to read.
const REFUSED_MAX: usize = 32;
const REFUSED_KEPT: Duration = Duration::from_secs(1);

/// A running server. Dropping it ends it: no new clients, idle ones cut off, answers under way
/// written out (for 2 s at most), the socket's file removed.
#[derive(Debug)]
pub struct HttpServer {
    clients: Arc<Clients>,
    /// Closing our end tells the listening thread to end.
    stop: Option<UnixStream>,
    listening: Option<JoinHandle<()>>,
    file: Option<SocketFile>,
    farewell: Duration,
}

/// The clients that are being served.
#[derive(Debug, Default)]
struct Clients {
    table: Mutex<Table>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Table {
    next: u64,
    streams: HashMap<u64, UnixStream>,
    closing: bool,
}

impl Clients {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for one more client, if there is one.
    fn enter(&self, stream: &UnixStream) -> Option<u64> {
        let mut table = self.lock();
        if table.closing || table.streams.len() >= CONNECTIONS_MAX {
            return None;
        }
        let stream = stream.try_clone().ok()?;
        let id = table.next;
        table.next += 1;
        table.streams.insert(id, stream);
        Some(id)
    }

    fn leave(&self, id: u64) {
        self.lock().streams.remove(&id);
        self.changed.notify_all();
    }

    /// Lets nobody in any more and waits until those inside are gone, for `patience` at most.
    fn close(&self, patience: Duration) {
        let mut table = self.lock();
        table.closing = true;
        for stream in table.streams.values() {
            // Whoever waits for a request sees its end; whoever is written to is not disturbed.
            let _ = stream.shutdown(Shutdown::Read);
        }
        let _ = self
            .changed
            .wait_timeout_while(table, patience, |table| !table.streams.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(listening) = self.listening.take() {
            let _ = listening.join();
        }
        // From here on a new process may listen at the same path.
        self.file.take();
        self.clients.close(self.farewell);
    }
}

/// Serves the interface at `socket`; requests go to `calls`.
///
/// # Errors
///
/// The socket cannot be had, or no thread be started.
pub fn serve(socket: ApiSocket, calls: Sender<Call>) -> Result<HttpServer, HttpError> {
    serve_with(socket, calls, Patience::default())
}

/// [`serve`] with a patience of the caller's.
pub(super) fn serve_with(
    socket: ApiSocket,
    calls: Sender<Call>,
    patience: Patience,
) -> Result<HttpServer, HttpError> {
    let (listener, file) = match socket {
        ApiSocket::Path(path) => {
            let (listener, file) = socket::bind(&path)?;
            (listener, Some(file))
        }
        ApiSocket::Descriptor(descriptor) => (socket::adopt(descriptor)?, None),
    };
    // A client may be gone between poll and accept.
    listener.set_nonblocking(true).map_err(HttpError::Start)?;
    let (stop, stopped) = UnixStream::pair().map_err(HttpError::Start)?;
    let clients = Arc::new(Clients::default());
    let refused = VecDeque::new();
    let front =
        Front { listener, stopped, clients: Arc::clone(&clients), calls, patience, refused };
    let listening = thread::Builder::new()
        .name("http-server".to_owned())
        .spawn(move || front.run())
        .map_err(HttpError::Start)?;
    let farewell = patience.farewell;
    Ok(HttpServer { clients, stop: Some(stop), listening: Some(listening), file, farewell })
}

/// What the listening thread owns.
struct Front {
    listener: UnixListener,
    /// Becomes readable, at its end, when the server ends.
    stopped: UnixStream,
    clients: Arc<Clients>,
    calls: Sender<Call>,
    patience: Patience,
    refused: VecDeque<(Instant, UnixStream)>,
}

impl Front {
    fn run(mut self) {
        loop {
            match self.wait() {
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => {
                    tracing::error!(%error, "HTTP server cannot wait for clients");
                    return;
                }
            }
            while self.refused.front().is_some_and(|(since, _)| since.elapsed() >= REFUSED_KEPT) {
                self.refused.pop_front();
            }
            match self.listener.accept() {
                Ok((stream, _)) => self.admit(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    tracing::warn!(%error, "Cannot accept an API client");
                    // Out of descriptors, most likely: poll would return at once, again and
                    // again, until some client leaves.
                    self.pause();
                }
            }
        }
    }

    /// Waits for a client, for a refused one to go, or for the end, and says whether it is that.
    fn wait(&self) -> nix::Result<bool> {
        let mut descriptors = [
            PollFd::new(self.stopped.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
        ];
        let timeout = match self.refused.front() {
            Some((since, _)) => {
                let left = REFUSED_KEPT.saturating_sub(since.elapsed()).as_millis() + 1;
                PollTimeout::from(u16::try_from(left).unwrap_or(u16::MAX))
            }
            None => PollTimeout::NONE,
        };
        match poll(&mut descriptors, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error),
        }
        Ok(descriptors[0].any().unwrap_or(false))
    }

    /// Waits a moment, or for the end of the server.
    fn pause(&self) {
        let mut stop = [PollFd::new(self.stopped.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut stop, PollTimeout::from(100_u16));
    }

    fn admit(&mut self, stream: UnixStream) {
        let Some(id) = self.clients.enter(&stream) else {
            self.refuse(stream);
            return;
        };
        let clients = Arc::clone(&self.clients);
        let calls = self.calls.clone();
        let patience = self.patience;
        let spawned = thread::Builder::new().name("http-client".to_owned()).spawn(move || {
            connection::run(&stream, &calls, patience);
            drop(stream);
            clients.leave(id);
        });
        if let Err(error) = spawned {
            tracing::warn!(%error, "Cannot serve an API client");
            self.clients.leave(id);
        }
    }

    /// Says no without waiting for anything: what does not fit into the socket is not sent.
    fn refuse(&mut self, mut stream: UnixStream) {
        let message = format!("{CONNECTIONS_MAX} clients are being served already");
        let bytes = Response::failure(Status::Unavailable, &[message]).encode(false);
        let sent = stream
            .set_nonblocking(true)
            .and_then(|()| stream.write_all(&bytes))
            .and_then(|()| stream.shutdown(Shutdown::Write));
        if sent.is_ok() {
            if self.refused.len() >= REFUSED_MAX {
                self.refused.pop_front();
            }
            self.refused.push_back((Instant::now(), stream));
        }
    }
}
