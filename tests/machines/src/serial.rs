//! The guest's serial port over the VMM's socket. A thread reads and stamps what comes.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::now_us;

/// Everything that came, with the time of each line's last byte.
#[derive(Default)]
struct Log {
    lines: Vec<(u64, String)>,
    rest: Vec<u8>,
    first_byte_us: Option<u64>,
    ended: bool,
}

/// Silence after which a guest that should not speak is taken at its word.
const SETTLED: Duration = Duration::from_millis(200);

/// A connected serial port.
pub struct Serial {
    input: Box<dyn Write + Send>,
    /// Closed in both directions at the end, which ends the reader too.
    socket: Option<UnixStream>,
    log: Arc<(Mutex<Log>, Condvar)>,
}

impl Serial {
    /// Connects to a socket that a VMM listens on, waiting until it is there.
    pub fn connect(path: &Path, limit: Duration) -> Result<Self> {
        let start = Instant::now();
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) if start.elapsed() > limit => {
                    return Err(error).with_context(|| format!("Cannot open {}", path.display()));
                }
                Err(_) => std::thread::sleep(crate::process::POLL),
            }
        };
        let log = follow(stream.try_clone()?)?;
        Ok(Self { input: Box::new(stream.try_clone()?), socket: Some(stream), log })
    }

    /// Opens a terminal.
    pub fn open(path: &Path) -> Result<Self> {
        let terminal = File::options()
            .read(true)
            .write(true)
            .open(path)
            .with_context(|| format!("Cannot open {}", path.display()))?;
        let log = follow(terminal.try_clone()?)?;
        Ok(Self { input: Box::new(terminal), socket: None, log })
    }

    fn lock(&self) -> MutexGuard<'_, Log> {
        self.log.0.lock().expect("the reader never panics")
    }

    /// Sends input to the guest.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.input.write_all(bytes).context("Cannot write to the serial port")
    }

    /// All complete lines so far.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.lock().lines.iter().map(|(_, line)| line.clone()).collect()
    }

    /// All complete lines, once nothing more has come for a while: of a guest that stands still.
    pub fn settled(&self) -> Result<Vec<String>> {
        let mut before = self.lines();
        loop {
            std::thread::sleep(SETTLED);
            let after = self.lines();
            if after.len() == before.len() {
                return Ok(after);
            }
            ensure!(after.len() < before.len() + 1000, "The guest speaks on and on");
            before = after;
        }
    }

    /// How many lines came so far: to be taken before what is to cause further ones.
    #[must_use]
    pub fn mark(&self) -> usize {
        self.lock().lines.len()
    }

    /// Waits for `count` lines from now on with `text`; the last of them.
    pub fn wait_more(&self, text: &str, count: usize, limit: Duration) -> Result<String> {
        self.wait_after(self.mark(), text, count, limit)
    }

    /// Waits for `count` lines after a mark with `text` in them; the last of them. They need not
    /// begin with it: a guest that is reset may have been in the middle of a line.
    pub fn wait_after(
        &self,
        mark: usize,
        text: &str,
        count: usize,
        limit: Duration,
    ) -> Result<String> {
        let mut next = mark;
        let mut last = String::new();
        for _ in 0..count {
            let (at, _, line) = self.wait_line(text, next, limit, |l| l.contains(text))?;
            (next, last) = (at + 1, line);
        }
        Ok(last)
    }

    /// Asks the test guest to check all of its memory and to end; fails if any of it was ever
    /// found damaged.
    pub fn verdict(&mut self, limit: Duration) -> Result<String> {
        self.send(b"q")?;
        let (_, _, verdict) =
            self.wait_line("the verdict", 0, limit, |line| line.starts_with("VERDICT"))?;
        let bad = |line: &&String| line.contains("FAIL") || line.starts_with("ERROR");
        if let Some(line) = self.lines().iter().find(bad) {
            bail!("The guest complains: {line}");
        }
        ensure!(verdict.starts_with("VERDICT ok"), "The guest says: {verdict}");
        Ok(verdict)
    }

    /// Everything so far, an incomplete line at its end included.
    #[must_use]
    pub fn text(&self) -> String {
        let log = self.lock();
        let mut text: String = log.lines.iter().map(|(_, line)| format!("{line}\n")).collect();
        text.push_str(&String::from_utf8_lossy(&log.rest));
        text
    }

    /// Everything that came, once the other end has closed the port: of a VMM that is gone.
    pub fn whole(&self, limit: Duration) -> Result<String> {
        let log = self.lock();
        let waited = self.log.1.wait_timeout_while(log, limit, |log| !log.ended);
        let (log, _) = waited.expect("the reader never panics");
        ensure!(log.ended, "The serial port is still open after {limit:?}");
        drop(log);
        Ok(self.text())
    }

    /// When the first byte came.
    #[must_use]
    pub fn first_byte_us(&self) -> Option<u64> {
        self.lock().first_byte_us
    }

    /// Waits for a line that `wanted` accepts, from line `from` on: its number, time and text.
    pub fn wait_line(
        &self,
        what: &str,
        from: usize,
        limit: Duration,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<(usize, u64, String)> {
        let start = Instant::now();
        let mut log = self.lock();
        let mut next = from;
        loop {
            while let Some((time_us, line)) = log.lines.get(next) {
                if wanted(line) {
                    return Ok((next, *time_us, line.clone()));
                }
                next += 1;
            }
            let left = limit.saturating_sub(start.elapsed());
            if left.is_zero() || log.ended {
                let ended = if log.ended { " (the port was closed)" } else { "" };
                let tail: Vec<_> =
                    log.lines.iter().rev().take(10).rev().map(|(_, line)| line.as_str()).collect();
                bail!("No line with {what} came{ended}; the last ones:\n{}", tail.join("\n"));
            }
            log = self.log.1.wait_timeout(log, left).expect("the reader never panics").0;
        }
    }
}

impl Drop for Serial {
    fn drop(&mut self) {
        if let Some(socket) = &self.socket {
            // The other end may have closed it already.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

/// Starts the thread that reads.
fn follow(stream: impl Read + Send + 'static) -> Result<Arc<(Mutex<Log>, Condvar)>> {
    let log = Arc::new((Mutex::new(Log::default()), Condvar::new()));
    let shared = Arc::clone(&log);
    std::thread::Builder::new()
        .name("serial-reader".into())
        .spawn(move || read(stream, &shared))?;
    Ok(log)
}

fn read(mut stream: impl Read, shared: &(Mutex<Log>, Condvar)) {
    let mut bytes = [0; 4096];
    loop {
        let count = stream.read(&mut bytes).unwrap_or(0);
        let time_us = now_us();
        let mut log = shared.0.lock().expect("no holder panics");
        if count == 0 {
            log.ended = true;
            shared.1.notify_all();
            return;
        }
        log.first_byte_us.get_or_insert(time_us);
        log.rest.extend_from_slice(&bytes[..count]);
        while let Some(end) = log.rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = log.rest.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            log.lines.push((time_us, line));
        }
        shared.1.notify_all();
    }
}
