//! The threads of a control connection. Nothing bulky travels there except machine state, so
//! acknowledgements and heartbeats never wait behind pages.
//!
//! The writer proves with heartbeats that the process lives, whatever its engine is busy with. The
//! reader waits while the engine has not dealt with what it read before: a peer cannot fill this
//! side's memory, and one that keeps to the protocol is never slowed.

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};

use super::heard::{Heard, Listening};
use super::spawn;
use crate::error::Error;
use crate::transport::Stream;
use crate::wire::{FrameReader, FrameWriter, Message, WireError};

/// Messages read ahead of the engine. Two epochs are in flight, so their seals and the few words
/// around them are all that a peer may have sent.
const AHEAD_MAX: usize = 6;

/// A place in the engine's queue; free again when this is dropped.
#[derive(Debug)]
pub(crate) struct Credit(Sender<()>);

#[cfg(any(test, feature = "testing"))]
impl Credit {
    /// Of a reader that never waits.
    pub(crate) fn unlimited() -> Self {
        Self(bounded(0).0)
    }
}

impl Drop for Credit {
    fn drop(&mut self) {
        // A reader that is gone needs no place, and there is room for all places.
        let _ = self.0.try_send(());
    }
}

/// A stream that was greeted, with the places of both directions kept.
pub(crate) struct Greeted {
    pub(crate) reader: FrameReader<Box<dyn Stream>>,
    pub(crate) writer: FrameWriter<Box<dyn Stream>>,
}

/// A control connection whose threads run.
#[derive(Debug)]
pub(crate) struct Control {
    outgoing: Sender<Message>,
    closer: Closer,
    /// Disconnected once the writer has ended.
    written: Receiver<()>,
    threads: Vec<JoinHandle<()>>,
}

struct Closer(Box<dyn Stream>);

impl std::fmt::Debug for Closer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Closer")
    }
}

/// How long the sides wait for what matters to liveness.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    pub(crate) heartbeat: Duration,
    /// Bound on a blocked write, and on what the peer still sends after this side's last word.
    pub(crate) linger: Duration,
}

/// What a side has done for the other so far, as it says with its heartbeats: bytes taken, applied
/// or written. Only that it grows is of meaning.
#[derive(Clone, Default)]
pub(crate) struct Progress {
    /// `None`: this side's heartbeats say nothing of it.
    pub(crate) ours: Option<Arc<dyn Fn() -> u64 + Send + Sync>>,
    pub(crate) theirs: Arc<AtomicU64>,
}

impl Control {
    /// Starts reader and writer. `deliver` gets every message but heartbeats, then the error that
    /// ended the stream; it returns `false` when nobody listens any more. The credit is dropped
    /// when the message was dealt with.
    pub(crate) fn start(
        greeted: Greeted,
        pace: Pace,
        heard: Heard,
        progress: Progress,
        deliver: impl FnMut(Result<Message, WireError>, Credit) -> bool + Send + 'static,
    ) -> Result<Self, Error> {
        let setup = |error| Error::Wire(WireError::Io(error));
        let Greeted { reader, writer } = greeted;
        let Progress { ours, theirs } = progress;
        let closer = Closer(writer.get_ref().duplicate().map_err(setup)?);
        writer.get_ref().set_read_timeout(None).map_err(setup)?;
        writer.get_ref().set_write_timeout(Some(pace.linger)).map_err(setup)?;
        let (outgoing, queue) = unbounded();
        let (ends, ended) = bounded(0);
        let (writes, written) = bounded(0);
        let threads = vec![
            spawn("repl-ctl", None, move || {
                read(listening(reader, heard), &theirs, deliver);
                drop::<Sender<()>>(ends);
            })?,
            spawn("repl-beat", None, move || {
                write(writer, &queue, &ended, pace, ours.as_deref());
                drop::<Sender<()>>(writes);
            })?,
        ];
        Ok(Self { outgoing, closer, written, threads })
    }

    /// Without threads: who carries messages takes them, and `closer` is closed with the connection.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn simulated(closer: Box<dyn Stream>) -> (Self, Receiver<Message>) {
        let (outgoing, queue) = unbounded();
        let closer = Closer(closer);
        (Self { outgoing, closer, written: bounded(0).1, threads: vec![] }, queue)
    }

    /// Queues a message; lost if the connection is.
    pub(crate) fn send(&self, message: Message) {
        // The writer is gone only when the reader reports, or will, why.
        let _ = self.outgoing.send(message);
    }

    /// Sends what is queued, then closes; the peer still reads all of it.
    pub(crate) fn finish(self) -> Vec<JoinHandle<()>> {
        self.threads
    }

    /// As [`Control::finish`], and waits until the peer has read all and closed in turn, for
    /// `limit` at most.
    pub(crate) fn finish_within(self, limit: Duration) {
        let Self { outgoing, closer, written, threads } = self;
        drop(outgoing);
        // Nothing is ever sent: the wait ends with the writer, or the patience.
        let _ = written.recv_timeout(limit);
        closer.0.close();
        drop(threads);
    }

    /// Ends both directions at once.
    pub(crate) fn close(self) -> Vec<JoinHandle<()>> {
        self.closer.0.close();
        self.threads
    }
}

fn read(
    mut reader: FrameReader<Listening<Box<dyn Stream>>>,
    progress: &AtomicU64,
    mut deliver: impl FnMut(Result<Message, WireError>, Credit) -> bool,
) {
    let mut payload = Vec::new();
    let (free, places) = bounded(AHEAD_MAX);
    (0..AHEAD_MAX).for_each(|_| free.send(()).expect("this end holds both"));
    loop {
        let Some(message) = hear(&mut reader, &mut payload, progress) else { continue };
        let ended = message.is_err();
        places.recv().expect("this end holds both");
        let wanted = deliver(message, Credit(free.clone()));
        if ended {
            return;
        }
        if !wanted {
            break;
        }
    }
    // Bytes left unread would turn this side's last words into a reset: read them away.
    while reader.read(&mut payload).is_ok() {}
}

/// Reads a message; `None` for one that is nothing but a sign of life.
pub(crate) fn hear<R: Read>(
    reader: &mut FrameReader<R>,
    payload: &mut Vec<u8>,
    progress: &AtomicU64,
) -> Option<Result<Message, WireError>> {
    match Message::receive(reader, payload) {
        Ok(Message::Heartbeat) => None,
        Ok(Message::Progress(bytes)) => {
            progress.store(bytes, Ordering::Relaxed);
            None
        }
        other => Some(other),
    }
}

fn write(
    mut writer: FrameWriter<Box<dyn Stream>>,
    queue: &Receiver<Message>,
    reader: &Receiver<()>,
    pace: Pace,
    progress: Option<&(dyn Fn() -> u64 + Send + Sync)>,
) {
    loop {
        let message = match queue.recv_timeout(pace.heartbeat) {
            Ok(message) => message,
            Err(RecvTimeoutError::Timeout) => {
                progress.map_or(Message::Heartbeat, |done| Message::Progress(done()))
            }
            Err(RecvTimeoutError::Disconnected) => break,
        };
        if message.send(&mut writer).is_err() {
            // The reader sees the same and reports it; a stream broken one way only is closed so
            // that it does.
            writer.get_ref().close();
            return;
        }
    }
    writer.get_ref().finish();
    // Reading on is bounded: a peer that does not close in turn must not keep a thread.
    let _ = reader.recv_timeout(pace.linger);
    writer.get_ref().close();
}

/// Bytes of a data connection that count as a sign of life.
pub(crate) fn listening(
    reader: FrameReader<Box<dyn Stream>>,
    heard: Heard,
) -> FrameReader<Listening<Box<dyn Stream>>> {
    reader.map(|stream| Listening::new(stream, heard))
}
