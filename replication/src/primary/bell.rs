//! The bell: a connection whose only news is its end.
//!
//! The kernel tears down a killed process' memory before it closes its descriptors, and for a VM
//! that takes a tenth of a second and more: so long would a backup not see that the other
//! connections are dead. The bell's descriptor is in the private descriptor table of one thread
//! (`CLONE_FILES` undone by unshare(2)), which closes as soon as that thread dies.
//!
//! The backup closes it when the session ends; a backup that is unreachable lets TCP's keep-alive
//! end it. Without a bell protection works as well, and notices a killed process later.

use std::io::{self, Read};
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};

use crate::engine::spawn;
use crate::transport::{Destination, Stream};
use crate::wire::{FrameWriter, Message, SessionId};

/// First descriptor that is not a standard stream.
const FIRST_FD: i32 = 3;

/// Starts the bell's thread. `hello` is what a data connection after the last one would say.
pub(super) fn start(
    destination: Destination,
    session: SessionId,
    hello: Message,
    timeout: Duration,
) {
    let body = move || {
        if let Err(error) = hang(&destination, session, &hello, timeout) {
            tracing::debug!("no bell: {error}");
        }
    };
    if let Err(error) = spawn("repl-bell", None, body) {
        tracing::debug!("no bell: {}", error.chain());
    }
}

/// From here on this thread must not write to anything that it did not open: the numbers of
/// other descriptors mean something else to it.
fn hang(
    destination: &Destination,
    session: SessionId,
    hello: &Message,
    timeout: Duration,
) -> io::Result<()> {
    unshare(CloneFlags::CLONE_FILES)?;
    close_inherited()?;
    let stream = destination.connect(timeout).map_err(io::Error::other)?;
    stream.keep_alive(timeout)?;
    let mut writer = FrameWriter::new(stream.duplicate()?, session);
    hello.send(&mut writer).map_err(io::Error::other)?;
    wait_for_end(stream);
    Ok(())
}

fn wait_for_end(mut stream: Box<dyn Stream>) {
    let mut nothing = [0; 64];
    while matches!(stream.read(&mut nothing), Ok(1..)) {}
}

/// Closes this thread's copies of all other descriptors: a copy that stayed open would keep
/// files and sockets of the process alive after it closed them.
fn close_inherited() -> io::Result<()> {
    let mut open = Vec::new();
    for entry in std::fs::read_dir("/proc/thread-self/fd")? {
        let name = entry?.file_name();
        if let Some(fd) = name.to_str().and_then(|name| name.parse::<i32>().ok()) {
            open.push(fd);
        }
    }
    for fd in open.into_iter().filter(|fd| *fd >= FIRST_FD) {
        // The listing's own descriptor is among them and closed already.
        let _ = nix::unistd::close(fd);
    }
    Ok(())
}
