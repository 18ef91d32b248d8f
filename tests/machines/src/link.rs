//! A link between a primary and its backup that a test cuts, heals and slows.
//!
//! ```text
//!   primary ── front ──▶ this ── back ──▶ backup
//! ```
//!
//! A cut is seen by the primary at once, and by the backup when the link heals: so it is the primary
//! that wins the VM, and a backup's old session ends beside the new attempt.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};

/// Bytes that are passed on at a time.
const CHUNK_BYTES: usize = 16 << 10;

#[derive(Default)]
struct Shared {
    /// Front and back of each connection.
    streams: Mutex<Vec<[TcpStream; 2]>>,
    cut: AtomicBool,
    over: AtomicBool,
    /// 0: as fast as it goes.
    bytes_s: AtomicU64,
    passed: AtomicU64,
}

/// See the module's documentation.
pub struct Link {
    port: u16,
    shared: Arc<Shared>,
}

impl Link {
    /// A link to `backup`, `tcp:127.0.0.1:<port>`.
    pub fn to(backup: &str) -> Result<Self> {
        let port = backup.rsplit_once(':').context("no port")?.1.parse()?;
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let own = listener.local_addr()?.port();
        let shared = Arc::<Shared>::default();
        let all = Arc::clone(&shared);
        std::thread::spawn(move || {
            for front in listener.incoming() {
                if all.over.load(Ordering::Acquire) {
                    return;
                }
                if let Ok(front) = front {
                    // Nobody listens there: the caller sees its connection end.
                    let _ = all.connect(front, port);
                }
            }
        });
        Ok(Self { port: own, shared })
    }

    /// Where a primary calls.
    #[must_use]
    pub fn url(&self) -> String {
        format!("tcp:127.0.0.1:{}", self.port)
    }

    /// Passes so many bytes a second on each connection from now on; 0 is as many as go.
    pub fn limit(&self, bytes_s: u64) {
        self.shared.bytes_s.store(bytes_s, Ordering::Release);
    }

    /// Bytes that went to the backup so far.
    #[must_use]
    pub fn passed(&self) -> u64 {
        self.shared.passed.load(Ordering::Acquire)
    }

    /// The primary sees its connections end; the backup hears nothing more. New ones end at once.
    pub fn cut(&self) {
        self.shared.cut.store(true, Ordering::Release);
        for [front, _] in self.shared.streams().iter() {
            let _ = front.shutdown(Shutdown::Both);
        }
    }

    /// The backup's old connections end, and new ones are let through.
    pub fn heal(&self) {
        self.shared.end();
        self.shared.cut.store(false, Ordering::Release);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Release);
        self.shared.end();
        // Wakes the listener, which sees that it is over.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

impl Shared {
    fn streams(&self) -> std::sync::MutexGuard<'_, Vec<[TcpStream; 2]>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self) {
        for stream in self.streams().drain(..).flatten() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn connect(self: &Arc<Self>, front: TcpStream, port: u16) -> Result<()> {
        if self.cut.load(Ordering::Acquire) {
            return Ok(());
        }
        let back = TcpStream::connect(("127.0.0.1", port))?;
        front.set_nodelay(true)?;
        back.set_nodelay(true)?;
        let mut streams = self.streams();
        streams.push([front.try_clone()?, back.try_clone()?]);
        let ends = [(front.try_clone()?, back.try_clone()?, true), (back, front, false)];
        if self.cut.load(Ordering::Acquire) {
            // Cut in this moment: as all others.
            let _ = ends[0].0.shutdown(Shutdown::Both);
        }
        drop(streams);
        for (from, to, forth) in ends {
            let shared = Arc::clone(self);
            std::thread::spawn(move || shared.pump(from, to, forth));
        }
        Ok(())
    }

    fn pump(&self, mut from: TcpStream, mut to: TcpStream, forth: bool) {
        let mut buffer = vec![0; CHUNK_BYTES];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            let bytes_s = self.bytes_s.load(Ordering::Acquire);
            if let Some(ns) = (count as u64 * 1_000_000_000).checked_div(bytes_s) {
                std::thread::sleep(Duration::from_nanos(ns));
            }
            if to.write_all(&buffer[..count]).is_err() {
                break;
            }
            if forth {
                self.passed.fetch_add(count as u64, Ordering::AcqRel);
            }
        }
        let _ = from.shutdown(Shutdown::Read);
        // The backup hears of a cut when the link heals.
        if !(forth && self.cut.load(Ordering::Acquire)) {
            let _ = to.shutdown(Shutdown::Write);
        }
    }
}
