//! The input thread: from the backend to the device.
//!
//! What always holds: at most one buffer of input is in our hands; while the device has no room
//! nothing more is read, so the kernel's buffers and then the sender wait.

use std::fs::File;
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use super::Input;
use super::backend::{ClientSlot, Source};

const BUFFER_BYTES: usize = 1024;
/// Pause before the next accept when the process has no descriptor left.
const ACCEPT_RETRY_MS: u16 = 1000;

/// Runs until `stop` is readable.
pub(super) fn run(name: &str, device: &dyn Input, source: Source, stop: &EventFd) {
    let mut input = Reader { name, device, pending: Vec::new() };
    match source {
        Source::Stream(mut file) => input.stream(&mut file, stop),
        Source::Socket { listener, client } => input.listen(&listener, &client, stop),
    }
}

struct Reader<'a> {
    name: &'a str,
    device: &'a dyn Input,
    /// Read and not yet taken by the device.
    pending: Vec<u8>,
}

/// What a look at the descriptors showed.
enum Woken {
    Stop,
    /// The events of the descriptor that was asked about; none when only the device has room.
    Ready(PollFlags),
}

/// What the sender said last.
enum Received {
    Bytes,
    Nothing,
    End,
}

impl Reader<'_> {
    /// Reads until the end of input, then waits for the stop: a port without input goes on.
    fn stream(&mut self, file: &mut File, stop: &EventFd) {
        let mut open = true;
        loop {
            let blocked = self.deliver();
            let interest = (open && !blocked).then(|| (file.as_fd(), PollFlags::POLLIN));
            match self.wait(stop, interest, PollTimeout::NONE) {
                Woken::Stop => return,
                Woken::Ready(events) if events.is_empty() => {}
                Woken::Ready(_) => open = !matches!(self.receive(file), Received::End),
            }
        }
    }

    /// Accepts one client after the other.
    fn listen(&mut self, listener: &UnixListener, slot: &ClientSlot, stop: &EventFd) {
        let mut timeout = PollTimeout::NONE;
        loop {
            self.deliver();
            let interest = timeout.is_none().then(|| (listener.as_fd(), PollFlags::POLLIN));
            match self.wait(stop, interest, timeout) {
                Woken::Stop => return,
                Woken::Ready(events) if events.is_empty() => {
                    timeout = PollTimeout::NONE;
                    continue;
                }
                Woken::Ready(_) => {}
            }
            match listener.accept() {
                Ok((client, _)) => {
                    let client = Arc::new(client);
                    slot.set(Some(Arc::clone(&client)));
                    let stopped = self.serve(&client, stop);
                    slot.set(None);
                    // The output thread may be waiting for this client to read.
                    let _gone_anyway = client.shutdown(Shutdown::Both);
                    if stopped {
                        return;
                    }
                }
                Err(error) if is_passing(&error) => {}
                Err(error) => {
                    tracing::warn!("The socket of {} accepts nobody: {error}", self.name);
                    timeout = PollTimeout::from(ACCEPT_RETRY_MS);
                }
            }
        }
    }

    /// True when stopped, false when the client left. One that only ended its own sending still
    /// reads.
    fn serve(&mut self, client: &UnixStream, stop: &EventFd) -> bool {
        let mut open = true;
        let mut stream = client;
        loop {
            let blocked = self.deliver();
            let events = if open && !blocked { PollFlags::POLLIN } else { PollFlags::empty() };
            match self.wait(stop, Some((client.as_fd(), events)), PollTimeout::NONE) {
                Woken::Stop => return true,
                Woken::Ready(events) if events.contains(PollFlags::POLLIN) => {
                    open = !matches!(self.receive(&mut stream), Received::End);
                }
                Woken::Ready(events) if !events.is_empty() => return false,
                Woken::Ready(_) => {}
            }
        }
    }

    /// Gives the device what fits; true when something is left.
    fn deliver(&mut self) -> bool {
        if !self.pending.is_empty() {
            let taken = self.device.take(&self.pending);
            self.pending.drain(..taken);
        }
        !self.pending.is_empty()
    }

    /// Only called when the descriptor is readable and nothing is pending.
    fn receive(&mut self, from: &mut impl Read) -> Received {
        let mut buffer = [0; BUFFER_BYTES];
        match from.read(&mut buffer) {
            Ok(0) => Received::End,
            Ok(len) => {
                self.pending.extend_from_slice(&buffer[..len]);
                Received::Bytes
            }
            Err(error) if is_passing(&error) => Received::Nothing,
            Err(error) => {
                tracing::debug!("Input of {} ends: {error}", self.name);
                Received::End
            }
        }
    }

    fn wait(
        &self,
        stop: &EventFd,
        interest: Option<(BorrowedFd<'_>, PollFlags)>,
        timeout: PollTimeout,
    ) -> Woken {
        let room = self.device.room().event();
        let mut fds = vec![
            PollFd::new(stop.as_fd(), PollFlags::POLLIN),
            PollFd::new(room.as_fd(), PollFlags::POLLIN),
        ];
        fds.extend(interest.map(|(fd, events)| PollFd::new(fd, events)));
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => {
                let name = self.name;
                tracing::warn!("Input of {name} ends, it cannot be waited for: {error}");
                return Woken::Stop;
            }
        }
        let events =
            |at: usize| fds.get(at).and_then(PollFd::revents).unwrap_or(PollFlags::empty());
        if !events(1).is_empty() {
            let _reset = room.read();
        }
        if events(0).is_empty() { Woken::Ready(events(2)) } else { Woken::Stop }
    }
}

/// Errors after which the next try may succeed at once.
fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    matches!(error.kind(), ConnectionAborted | Interrupted | WouldBlock)
}
