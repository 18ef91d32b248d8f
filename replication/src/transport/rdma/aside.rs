//! Threads that ask a device, so that nobody else has to: one that hangs keeps whoever asks it, in the
//! kernel, and for as long as it likes.
//!
//! Enters: what is to be asked, and how long to wait. Leaves: the answer, or that there was none. Always
//! holds: what comes too late is dropped by the thread that has it, and no more than [`LEFT_MAX`]
//! threads that were left behind ask for anything: whoever tries again and again does not use up the host.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, bounded};

use crate::transport::TransportError;

const LEFT_MAX: usize = 8;

/// Threads that were left behind and have not come back.
static LEFT: AtomicUsize = AtomicUsize::new(0);

/// No answer within that time.
pub(super) fn hung(patience: Duration) -> TransportError {
    let patience_ms = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
    TransportError::Hung { patience_ms }
}

/// Has a thread of its own do `work`.
///
/// # Errors
/// [`TransportError::Hung`], [`TransportError::Stuck`], [`TransportError::Setup`] without a thread.
pub(super) fn aside<T: Send + 'static>(
    patience: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, TransportError> {
    let left = LEFT.load(Ordering::Acquire);
    if left >= LEFT_MAX {
        return Err(TransportError::Stuck { threads: left });
    }
    begin(patience, work)
}

/// Drops `value`, which may ask a device, and waits for that no longer than `patience`.
pub(super) fn drop_aside<T: Send + 'static>(patience: Duration, value: T) {
    if let Err(error) = begin(patience, move || drop(value)) {
        tracing::warn!("giving back what a connection by RDMA had: {error}");
    }
}

/// As [`aside`], for what gives back to a device what it has: that is not refused because of threads that
/// were left behind.
///
/// # Errors
/// As [`aside`], but for [`TransportError::Stuck`].
pub(super) fn give_back<T: Send + 'static>(
    patience: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, TransportError> {
    begin(patience, work)
}

fn begin<T: Send + 'static>(
    patience: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, TransportError> {
    // A rendezvous: either the caller takes the result or, having left, never sees it.
    let (give, take) = bounded(0);
    let body = move || {
        if let Err(late) = give.send(work()) {
            drop(late);
            LEFT.fetch_sub(1, Ordering::AcqRel);
        }
    };
    std::thread::Builder::new()
        .name("repl-verbs".to_owned())
        .spawn(body)
        .map_err(TransportError::Setup)?;
    take.recv_timeout(patience).map_err(|error| match error {
        RecvTimeoutError::Timeout => {
            // Before the thread can find that nobody listens.
            LEFT.fetch_add(1, Ordering::AcqRel);
            hung(patience)
        }
        RecvTimeoutError::Disconnected => {
            TransportError::Setup(std::io::Error::other("the thread that asks the device panicked"))
        }
    })
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread::{self, ThreadId};

    use super::*;

    const SHORT: Duration = Duration::from_millis(20);
    const LONG: Duration = Duration::from_secs(60);

    /// Waits before it is gone, and says which thread dropped it.
    struct Queue(mpsc::Receiver<()>, mpsc::Sender<ThreadId>);

    impl Drop for Queue {
        fn drop(&mut self) {
            let _ = self.0.recv();
            let _ = self.1.send(thread::current().id());
        }
    }

    #[test]
    fn nobody_waits_for_a_device_that_hangs() {
        let ((hang, hangs), (told, dropped)) = (mpsc::channel(), mpsc::channel());
        let (answer, answers) = mpsc::channel::<()>();
        let late = aside(SHORT, move || {
            let _ = answers.recv();
            Queue(hangs, told)
        });
        let error = late.err().unwrap();
        assert_eq!(error.to_string(), "The RDMA device did not answer within 20 ms");
        drop((answer, hang));
        // Giving back what it made may hang as well.
        assert_ne!(dropped.recv().unwrap(), thread::current().id());
        assert_eq!(aside(LONG, || 7).unwrap(), 7);
    }

    #[test]
    fn nobody_waits_for_a_device_that_takes_nothing_back() {
        let ((hang, hangs), (told, dropped)) = (mpsc::channel(), mpsc::channel());
        drop_aside(SHORT, Queue(hangs, told));
        assert!(dropped.try_recv().is_err(), "it is not gone yet");
        drop(hang);
        assert_ne!(dropped.recv().unwrap(), thread::current().id());
    }

    #[test]
    fn threads_that_were_left_behind_are_few() {
        let hangs: Vec<_> = (0..LEFT_MAX)
            .map(|_| {
                let (hang, hangs) = mpsc::channel::<()>();
                let late = aside(SHORT, move || hangs.recv().is_ok());
                assert!(matches!(late, Err(TransportError::Hung { .. })));
                hang
            })
            .collect();
        let refused = aside(LONG, || 7).unwrap_err();
        assert!(matches!(refused, TransportError::Stuck { threads: LEFT_MAX }), "{refused}");
        drop(hangs);
        while LEFT.load(Ordering::Acquire) > 0 {
            thread::yield_now();
        }
        assert_eq!(aside(LONG, || 7).unwrap(), 7);
    }
}
