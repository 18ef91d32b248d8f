//! A machine that is let go of.
//!
//! Whoever lets go of it last ends its threads, closes its images and frees its memory, which storage that
//! hangs may hold up for ten seconds a disk. The control loop leaves that to a thread of its own. Always holds:
//! a client is answered that its VM has ended once that thread is done.

use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;

use super::Answer;
use crate::machine::Machine;

/// A client, and what it is told.
pub(super) type Told = Option<(Sender<Answer>, Answer)>;

/// How long a VM that is booted waits for the machine before it.
const PATIENCE: Duration = Duration::from_secs(1);

/// The machine that was here last, or what is left of it. A protection that has not ended may have it still.
#[derive(Default)]
pub(super) struct Leaving {
    presence: Weak<()>,
    thread: Option<JoinHandle<()>>,
}

impl Leaving {
    /// Lets go of `machine`, and tells a client then, if one waits.
    pub(super) fn begin(machine: Arc<Machine>, told: Told) -> Self {
        let presence = machine.presence();
        let tell = told.clone();
        let let_go = move || {
            drop(machine);
            // A client that went away has no use for its answer.
            drop(tell.map(|(reply, answer)| reply.send(answer)));
        };
        let thread = std::thread::Builder::new().name("let-go".into()).spawn(let_go);
        if let Err(error) = &thread {
            // It went with what the thread was to do.
            tracing::warn!(%error, "no thread lets go of a machine: the control loop has done that");
            drop(told.map(|(reply, answer)| reply.send(answer)));
        }
        Self { presence, thread: thread.ok() }
    }

    /// For a process that ends: sockets are to be gone by then.
    pub(super) fn join(&mut self) {
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("The thread that lets go of a machine has panicked");
        }
    }

    /// Whether nothing of it is left, which is waited for a moment.
    pub(super) fn is_over(&self) -> bool {
        let until = Instant::now() + PATIENCE;
        while self.presence.strong_count() > 0 {
            if Instant::now() >= until {
                return false;
            }
            // Memory is freed by a call that nobody can wait for.
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }
}
