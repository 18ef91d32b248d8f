//! The output thread: from the gate to the backend.
//!
//! ```text
//!            chunk                          would block, 100 ms without room
//!  waiting ────────▶ writing ──────────────────────────▶ stalled (gate keeps the newest bytes)
//!     ▲                 │ written, or failed                │ room
//!     └─────────────────┴───────────────────────────────────┘
//! ```

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use super::backend::{ClientSlot, Sink, send_now};
use crate::counters::Counter;
use crate::output_gate::{CHUNK_BYTES_MAX, OutputGate};

/// How long a backend may take nothing before it counts as unread; also what a port waits at its
/// end for a reader of its last words.
const PATIENCE_MS: u16 = 100;

/// Runs until the gate is closed and what it released is written, or nobody takes it.
pub(super) fn run(name: &str, gate: &OutputGate, sink: &Sink, stop: &EventFd, errors: &Counter) {
    let mut chunk = Vec::with_capacity(CHUNK_BYTES_MAX);
    while gate.next_chunk(&mut chunk) {
        match write(sink, &chunk) {
            Written::Bytes(len) => gate.consume(len),
            Written::NoReader => gate.lose(chunk.len()),
            Written::Full(on) => {
                if !wait_writable(gate, on.fd(), stop) {
                    return;
                }
            }
            Written::Failed(error) => {
                if errors.get() == 0 {
                    tracing::warn!("Output of {name} is lost, its backend fails: {error}");
                }
                errors.add(1);
                gate.lose(chunk.len());
            }
        }
    }
}

enum Written<'a> {
    Bytes(usize),
    NoReader,
    Full(Full<'a>),
    Failed(io::Error),
}

/// What to wait on until it takes bytes again.
enum Full<'a> {
    Backend(BorrowedFd<'a>),
    Client(Arc<std::os::unix::net::UnixStream>),
}

impl Full<'_> {
    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Backend(fd) => *fd,
            Self::Client(client) => client.as_fd(),
        }
    }
}

fn write<'a>(sink: &'a Sink, bytes: &[u8]) -> Written<'a> {
    let (result, full) = match sink {
        Sink::Stream(file) => {
            let mut file_ref = file;
            (file_ref.write(bytes), Full::Backend(file.as_fd()))
        }
        Sink::SharedSocket(fd) => (send_now(fd.as_fd(), bytes), Full::Backend(fd.as_fd())),
        Sink::Client(slot) => return write_client(slot, bytes),
    };
    match result {
        Ok(0) => Written::Failed(io::ErrorKind::WriteZero.into()),
        Ok(len) => Written::Bytes(len),
        Err(error) => match error.kind() {
            io::ErrorKind::Interrupted => Written::Bytes(0),
            io::ErrorKind::WouldBlock => Written::Full(full),
            _ => Written::Failed(error),
        },
    }
}

fn write_client(slot: &ClientSlot, bytes: &[u8]) -> Written<'static> {
    let Some(client) = slot.get() else { return Written::NoReader };
    match send_now(client.as_fd(), bytes) {
        Ok(len) => Written::Bytes(len),
        Err(error) => match error.kind() {
            io::ErrorKind::Interrupted => Written::Bytes(0),
            io::ErrorKind::WouldBlock => Written::Full(Full::Client(client)),
            // The client left; the input thread sees that too and takes the next one.
            _ => Written::NoReader,
        },
    }
}

/// False when the port ends and nobody made room.
fn wait_writable(gate: &OutputGate, fd: BorrowedFd<'_>, stop: &EventFd) -> bool {
    let mut patience = PollTimeout::from(PATIENCE_MS);
    loop {
        let mut fds =
            [PollFd::new(fd, PollFlags::POLLOUT), PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, patience) {
            Ok(0) => {
                gate.set_stalled();
                patience = PollTimeout::NONE;
            }
            Ok(_) if fds[0].any().unwrap_or(true) => return true,
            Ok(_) => break,
            Err(Errno::EINTR) => {}
            Err(error) => {
                tracing::warn!("Waiting for a reader of output failed: {error}");
                return false;
            }
        }
    }
    let mut last = [PollFd::new(fd, PollFlags::POLLOUT)];
    matches!(poll(&mut last, PATIENCE_MS), Ok(ready) if ready > 0)
}
