//! The event monitor: what happens to the VM, as JSON objects in a file, a pipe or a socket.
//!
//! What enters is an event from any thread of the VMM. What leaves is text: a pretty-printed
//! object `{timestamp, source, event, properties}`, then an empty line. What always holds: whoever
//! reports an event never waits for whoever reads it. When the reader is slow, events wait in a
//! bounded queue; when that is full, they are dropped and counted. The reader is told how many, by
//! an event of its own, once it has read what waited.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;
use serde_json::{Value, json};

/// Events that may wait for the reader.
const QUEUE_EVENTS_MAX: usize = 256;

/// The monitor cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum EventError {
    #[error("Cannot open the event monitor {path}")]
    Open { path: PathBuf, source: io::Error },
    #[error("Cannot start the event monitor")]
    Start(#[source] io::Error),
}

/// Since the monitor was set up.
#[derive(Debug, Serialize)]
struct Timestamp {
    secs: u64,
    nanos: u32,
}

impl Timestamp {
    fn since(start: Instant) -> Self {
        let elapsed = start.elapsed();
        Self { secs: elapsed.as_secs(), nanos: elapsed.subsec_nanos() }
    }
}

#[derive(Debug, Serialize)]
struct Event {
    timestamp: Timestamp,
    source: &'static str,
    event: &'static str,
    properties: Option<Value>,
}

#[derive(Debug)]
enum Message {
    Event(Event),
    /// Answered when all before it is written.
    Flush(Sender<()>),
}

/// Events that nobody will read.
#[derive(Debug, Default)]
struct Lost {
    dropped: AtomicU64,
    /// Of these, the ones that the reader was told of.
    told: AtomicU64,
}

#[derive(Debug)]
struct Shared {
    queue: Sender<Message>,
    start: Instant,
    lost: Arc<Lost>,
}

/// Where events are reported. Cheap to clone; the default one does nothing.
#[derive(Clone, Debug, Default)]
pub struct EventMonitor(Option<Arc<Shared>>);

impl EventMonitor {
    /// A monitor that nobody reads.
    #[must_use]
    pub fn disabled() -> Self {
        Self(None)
    }

    /// Writes to the file or FIFO at `path`; a file is made or emptied.
    ///
    /// # Errors
    ///
    /// The file cannot be opened, or no thread be started.
    pub fn to_path(path: &Path) -> Result<Self, EventError> {
        // For reading too: a FIFO that nobody reads yet then opens at once instead of holding up
        // the VMM until somebody does.
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)
            .map_err(|source| EventError::Open { path: path.to_owned(), source })?;
        Self::start(file)
    }

    /// Writes to a descriptor.
    ///
    /// # Errors
    ///
    /// No thread can be started.
    pub fn to_descriptor(descriptor: OwnedFd) -> Result<Self, EventError> {
        Self::start(File::from(descriptor))
    }

    fn start(sink: File) -> Result<Self, EventError> {
        let (queue, events) = bounded(QUEUE_EVENTS_MAX);
        let (start, lost) = (Instant::now(), Arc::new(Lost::default()));
        let writer = Writer { sink, start, lost: Arc::clone(&lost) };
        thread::Builder::new()
            .name("event-monitor".to_owned())
            .spawn(move || writer.run(&events))
            .map_err(EventError::Start)?;
        Ok(Self(Some(Arc::new(Shared { queue, start, lost }))))
    }

    /// Reports an event. Never waits.
    pub fn emit(&self, source: &'static str, event: &'static str, properties: Option<Value>) {
        let Some(shared) = &self.0 else { return };
        let event = Event { timestamp: Timestamp::since(shared.start), source, event, properties };
        let Err(error) = shared.queue.try_send(Message::Event(event)) else { return };
        let before = shared.lost.dropped.fetch_add(1, Ordering::Relaxed);
        // The first of a run; of a sink that is gone, the writer has said so.
        let is_first = before == shared.lost.told.load(Ordering::Relaxed);
        if is_first && matches!(error, TrySendError::Full(_)) {
            tracing::warn!("Event monitor's reader is too slow: events are dropped");
        }
    }

    /// Events that were lost because the reader was too slow, or gone.
    #[cfg(test)]
    fn dropped(&self) -> u64 {
        self.0.as_ref().map_or(0, |shared| shared.lost.dropped.load(Ordering::Relaxed))
    }

    /// Waits until everything reported so far is written, for `patience` at most, and says
    /// whether it is. For the end of the process, so that the last events are not lost.
    pub fn flush(&self, patience: Duration) -> bool {
        let Some(shared) = &self.0 else { return true };
        let (done, waiting) = bounded(1);
        let deadline = Instant::now() + patience;
        shared.queue.send_deadline(Message::Flush(done), deadline).is_ok()
            && waiting.recv_deadline(deadline).is_ok()
    }
}

/// The writer's thread: ends when every monitor is gone, or when the sink is.
struct Writer {
    sink: File,
    start: Instant,
    lost: Arc<Lost>,
}

impl Writer {
    fn run(&self, events: &Receiver<Message>) {
        if let Err(error) = self.write_all(events) {
            tracing::warn!(%error, "Event monitor is gone, later events are dropped");
        }
    }

    fn write_all(&self, events: &Receiver<Message>) -> io::Result<()> {
        for message in events {
            match message {
                Message::Event(event) => {
                    write_one(&self.sink, &event)?;
                    if events.is_empty() {
                        self.tell_lost()?;
                    }
                }
                Message::Flush(done) => {
                    self.tell_lost()?;
                    // Whoever waited may have lost patience.
                    let _ = done.send(());
                }
            }
        }
        // An event is counted a moment after there was no room for it.
        self.tell_lost()
    }

    /// Tells the reader how many events were dropped since it was told last, if any were.
    fn tell_lost(&self) -> io::Result<()> {
        let dropped = self.lost.dropped.load(Ordering::Relaxed);
        let count = dropped - self.lost.told.swap(dropped, Ordering::Relaxed);
        if count == 0 {
            return Ok(());
        }
        let timestamp = Timestamp::since(self.start);
        let properties = Some(json!({ "count": count }));
        let event = Event { timestamp, source: "vmm", event: "events-dropped", properties };
        write_one(&self.sink, &event)
    }
}

fn write_one(mut sink: &File, event: &Event) -> io::Result<()> {
    let mut text = serde_json::to_vec_pretty(event)?;
    text.extend_from_slice(b"\n\n");
    let mut left = text.as_slice();
    while !left.is_empty() {
        match sink.write(left) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => left = &left[count..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // An inherited descriptor may be non-blocking, and its mode is its maker's to change.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let mut waiting = [PollFd::new(sink.as_fd(), PollFlags::POLLOUT)];
                match poll(&mut waiting, PollTimeout::NONE) {
                    Ok(_) | Err(Errno::EINTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{BufReader, PipeReader, Read, pipe};
    use std::thread;

    use nix::fcntl::{FcntlArg, OFlag, fcntl};

    use super::*;

    /// Nothing in these tests may hang for ever; nothing in them depends on the length of this.
    const HANG: Duration = Duration::from_secs(60);

    fn piped() -> (EventMonitor, PipeReader) {
        let (reader, writer) = pipe().unwrap();
        (EventMonitor::to_descriptor(writer.into()).unwrap(), reader)
    }

    fn parse(text: &str) -> Vec<Value> {
        serde_json::Deserializer::from_str(text).into_iter().map(Result::unwrap).collect()
    }

    #[test]
    fn events_are_written_as_clients_read_them() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("events");
        std::fs::write(&path, "from an earlier run").unwrap();
        let monitor = EventMonitor::to_path(&path).unwrap();
        monitor.emit("vm", "booting", None);
        let other = monitor.clone();
        thread::spawn(move || other.emit("virtio-device", "activated", Some(json!({"id": "a"}))))
            .join()
            .unwrap();
        assert!(monitor.flush(HANG));
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("{\n  \"timestamp\": {\n    \"secs\": 0,\n"), "{text}");
        assert!(text.contains("\n}\n\n{\n") && text.ends_with("\n}\n\n"), "{text}");
        let events = parse(&text);
        assert_eq!(events.len(), 2);
        assert_eq!(events[0]["source"], "vm");
        assert_eq!(events[0]["event"], "booting");
        assert_eq!(events[0].get("properties"), Some(&Value::Null));
        assert_eq!(events[1]["properties"], json!({"id": "a"}));
        assert_eq!(monitor.dropped(), 0);
    }

    #[test]
    fn a_fifo_without_a_reader_holds_nobody_up() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let monitor = EventMonitor::to_path(&path).unwrap();
        monitor.emit("vmm", "starting", None);
        let mut reader = File::open(&path).unwrap();
        assert!(monitor.flush(HANG));
        drop(monitor);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(parse(&text)[0]["event"], "starting");
    }

    #[test]
    fn a_reader_that_sleeps_costs_events_and_no_time() {
        let (monitor, reader) = piped();
        let reader = serde_json::Deserializer::from_reader(BufReader::new(reader));
        let mut events = reader.into_iter::<Value>().map(Result::unwrap);
        let sent = 1 + 10 * u64::try_from(QUEUE_EVENTS_MAX).unwrap();
        let mut told = 0;
        for _ in 0..2 {
            // More than a pipe holds: from here on the writer stands until somebody reads.
            monitor.emit("vm", "paused", Some(json!({ "text": "x".repeat(1 << 20) })));
            for _ in 1..sent {
                monitor.emit("vm", "paused", None);
            }
            let dropped = monitor.dropped() - told;
            assert!(dropped > 0);
            assert!(!monitor.flush(Duration::from_millis(1)));
            // Whatever was not dropped is still read, whole, and then how much was.
            for _ in dropped..sent {
                assert_eq!(events.next().unwrap()["event"], "paused");
            }
            assert!(monitor.flush(HANG));
            monitor.emit("vm", "resumed", None);
            let last = events.next().unwrap();
            assert_eq!(last["source"], "vmm");
            assert_eq!(last["event"], "events-dropped");
            assert_eq!(last["properties"], json!({ "count": dropped }));
            assert_eq!(events.next().unwrap()["event"], "resumed");
            told += dropped;
        }
        drop(monitor);
        assert!(events.next().is_none());
    }

    #[test]
    fn a_non_blocking_descriptor_loses_nothing_that_was_accepted() {
        let (reader, writer) = pipe().unwrap();
        fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        let monitor = EventMonitor::to_descriptor(writer.into()).unwrap();
        let large = json!({ "text": "x".repeat(1 << 20) });
        monitor.emit("vm", "paused", Some(large));
        let mut reader = reader;
        let reading = thread::spawn(move || {
            let mut text = String::new();
            reader.read_to_string(&mut text).unwrap();
            text
        });
        assert!(monitor.flush(HANG));
        drop(monitor);
        assert_eq!(parse(&reading.join().unwrap()).len(), 1);
    }

    #[test]
    fn a_reader_that_leaves_hurts_nobody() {
        let (monitor, reader) = piped();
        drop(reader);
        for _ in 0..1000 {
            monitor.emit("vm", "paused", None);
        }
        assert!(!monitor.flush(HANG));
        monitor.emit("vm", "paused", None);
        assert!(monitor.dropped() > 0);
    }

    #[test]
    fn a_disabled_monitor_does_nothing() {
        let monitor = EventMonitor::default();
        monitor.emit("vm", "paused", None);
        assert!(monitor.flush(Duration::ZERO));
        assert_eq!(monitor.dropped(), 0);
    }
}
