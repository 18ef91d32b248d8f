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
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use super::backend::{ClientSlot, Sink, send_now};
use crate::counters::Counter;
use crate::output_gate::{CHUNK_BYTES_MAX, OutputGate};

/// How long a backend may take nothing before it counts as unread; also what a port waits at its
/// end, in all, for a reader of its last words: whoever ends the VM waits for it.
const PATIENCE_MS: u16 = 100;

/// Runs until the gate is closed and what it released is written, or nobody takes it.
pub(super) fn run(name: &str, gate: &OutputGate, sink: &Sink, stop: &EventFd, errors: &Counter) {
    let mut chunk = Vec::with_capacity(CHUNK_BYTES_MAX);
    let mut ends_at = None;
    while gate.next_chunk(&mut chunk) {
        match write(sink, &chunk) {
            Written::Bytes(len) => gate.consume(len),
            Written::NoReader => gate.lose(chunk.len()),
            Written::Full(on) => {
                if !wait_writable(gate, on.fd(), stop, &mut ends_at) {
                    break;
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
    // Nobody takes what is left, if anything is.
    while gate.next_chunk(&mut chunk) {
        gate.lose(chunk.len());
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

/// False when the port ends and nobody made room in time. `ends_at` is set when its end is first
/// seen: a reader that takes a little now and then gets no more time than one that takes nothing.
fn wait_writable(
    gate: &OutputGate,
    fd: BorrowedFd<'_>,
    stop: &EventFd,
    ends_at: &mut Option<Instant>,
) -> bool {
    let mut patience = PollTimeout::from(PATIENCE_MS);
    let end = loop {
        if let Some(end) = *ends_at {
            break end;
        }
        let mut fds =
            [PollFd::new(fd, PollFlags::POLLOUT), PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, patience) {
            Ok(0) => {
                gate.set_stalled();
                patience = PollTimeout::NONE;
            }
            Ok(_) if fds[1].any().unwrap_or(true) => {
                *ends_at = Some(Instant::now() + Duration::from_millis(PATIENCE_MS.into()));
            }
            Ok(_) => return true,
            Err(Errno::EINTR) => {}
            Err(error) => {
                tracing::warn!("Waiting for a reader of output failed: {error}");
                return false;
            }
        }
    };
    let left = end.saturating_duration_since(Instant::now());
    let mut last = [PollFd::new(fd, PollFlags::POLLOUT)];
    let patience = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
    !left.is_zero() && matches!(poll(&mut last, patience), Ok(ready) if ready > 0)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;
    use std::time::{Duration, Instant};

    use nix::fcntl::OFlag;
    use nix::unistd::pipe2;

    use super::*;
    use crate::console::new_event;
    use crate::counters::Counters;

    /// One chunk in less than the patience: it never seems to stand still.
    const READER_PAUSE: Duration = Duration::from_millis(30);

    #[test]
    fn a_reader_that_is_slow_does_not_keep_the_end_waiting() {
        let (reader, writer) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
        let (gate, stop, errors) = (OutputGate::new(), new_event().unwrap(), Counter::default());
        let sink = Sink::Stream(File::from(writer));
        let output = vec![b'x'; 512 << 10];
        gate.write(&output);
        gate.close();
        stop.write(1).unwrap();
        let ended = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                let (mut reader, mut bytes) = (File::from(reader), [0; CHUNK_BYTES_MAX]);
                while !ended.load(Ordering::SeqCst) {
                    thread::sleep(READER_PAUSE);
                    // Nothing to read is no error here.
                    if reader.read(&mut bytes).is_ok_and(|len| len == 0) {
                        break;
                    }
                }
            });
            let start = Instant::now();
            run("test", &gate, &sink, &stop, &errors);
            let waited = start.elapsed();
            ended.store(true, Ordering::SeqCst);
            assert!(waited < Duration::from_secs(1), "{waited:?}");
        });
        let counters = gate.counters();
        let count = |name| counters.iter().find(|(found, _)| *found == name).unwrap().1;
        let (written, lost) = (count("output_written_bytes"), count("output_dropped_bytes"));
        assert_eq!(written + lost, output.len() as u64);
        assert!(written > 0 && lost > 0, "{written} {lost}");
    }
}
