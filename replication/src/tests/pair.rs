//! A primary and a backup, and what a test may do to the wire between them.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use api::replication::{ReceiveReplicaData, ReplicateData};
use nix::sys::socket::{setsockopt, sockopt};

use super::{receive_options, replicate};
use crate::backup::{BackupHandle, receive_at};
use crate::error::Error;
use crate::ownership::{HostIdentity, Known};
use crate::primary::{PrimaryHandle, protect};
use crate::testing::{Machine, MemoryBuilder, MemoryGuest, Recorder, ReplicaLog};
use crate::transport::Address;

/// A backup that listens on a port of its own.
pub(crate) struct Backup {
    pub(crate) handle: BackupHandle,
    pub(crate) events: Arc<Recorder>,
    pub(crate) log: Arc<ReplicaLog>,
}

impl Backup {
    pub(crate) fn start(arbiter: Option<&Path>) -> Self {
        Self::with(MemoryBuilder::default(), receive_options(arbiter))
    }

    pub(crate) fn with(builder: MemoryBuilder, options: ReceiveReplicaData) -> Self {
        let events = Arc::new(Recorder::default());
        let log = Arc::clone(&builder.log);
        let address = Address::Tcp { host: "127.0.0.1".to_owned(), port: 0 };
        let identity = HostIdentity::random();
        let handle = receive_at(builder, &address, options, identity, events.clone()).unwrap();
        Self { handle, events, log }
    }

    pub(crate) fn url(&self) -> String {
        self.handle.local_address().to_string()
    }

    pub(crate) fn port(&self) -> u16 {
        match self.handle.local_address() {
            Address::Tcp { port, .. } => *port,
            other => panic!("{other}"),
        }
    }

    /// What is wrong with what the replica saw.
    pub(crate) fn wrong(&self) -> Vec<String> {
        self.log.wrong.lock().unwrap().clone()
    }
}

/// A primary that protects a machine.
pub(crate) struct Primary {
    pub(crate) handle: PrimaryHandle,
    pub(crate) events: Arc<Recorder>,
}

impl Primary {
    pub(crate) fn start(
        machine: &Arc<Machine>,
        url: &str,
        arbiter: Option<&Path>,
    ) -> Result<Self, Error> {
        Self::with(machine, replicate(url, arbiter), HostIdentity::random())
    }

    pub(crate) fn with(
        machine: &Arc<Machine>,
        options: ReplicateData,
        identity: HostIdentity,
    ) -> Result<Self, Error> {
        Self::knowing(machine, options, identity, &Known::default())
    }

    /// Of a process that may have protected the machine before.
    pub(crate) fn knowing(
        machine: &Arc<Machine>,
        options: ReplicateData,
        identity: HostIdentity,
        known: &Known,
    ) -> Result<Self, Error> {
        let events = Arc::new(Recorder::default());
        let guest = MemoryGuest(Arc::clone(machine));
        let handle = protect(guest, options, identity, known, events.clone())?;
        Ok(Self { handle, events })
    }
}

/// Stands between the two, and cuts or changes what passes.
pub(crate) struct Proxy {
    port: u16,
    streams: Arc<Mutex<Vec<TcpStream>>>,
    cut: Arc<AtomicBool>,
    over: Arc<AtomicBool>,
}

/// Gets the number of the connection, the offset of the bytes in it, and the bytes.
pub(crate) type Tamper = Arc<dyn Fn(usize, u64, &mut Vec<u8>) + Send + Sync>;

impl Proxy {
    pub(crate) fn start(backup: u16, tamper: Tamper) -> Self {
        Self::at(TcpListener::bind("127.0.0.1:0").unwrap(), backup, tamper)
    }

    /// A link that carries so many bytes a second on each connection and keeps few of them.
    pub(crate) fn slow(backup: u16, bytes_s: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        setsockopt(&listener, sockopt::RcvBuf, &(32 << 10)).unwrap();
        let nap = move |bytes: usize| Duration::from_nanos(bytes as u64 * 1_000_000_000 / bytes_s);
        Self::at(
            listener,
            backup,
            Arc::new(move |_, _, bytes| std::thread::sleep(nap(bytes.len()))),
        )
    }

    fn at(listener: TcpListener, backup: u16, tamper: Tamper) -> Self {
        let port = listener.local_addr().unwrap().port();
        let streams: Arc<Mutex<Vec<TcpStream>>> = Arc::default();
        let cut = Arc::new(AtomicBool::new(false));
        let over = Arc::new(AtomicBool::new(false));
        let (all, is_cut, change) = (Arc::clone(&streams), Arc::clone(&cut), tamper);
        let is_over = Arc::clone(&over);
        std::thread::spawn(move || {
            for (number, stream) in listener.incoming().enumerate() {
                let (Ok(one), false) = (stream, is_over.load(Ordering::Acquire)) else { return };
                if is_cut.load(Ordering::Acquire) {
                    continue;
                }
                let Ok(other) = TcpStream::connect(("127.0.0.1", backup)) else { continue };
                let dup = |stream: &TcpStream| stream.try_clone().unwrap();
                // Nothing waits here for an acknowledgement of its peer's kernel.
                [&one, &other].iter().for_each(|stream| stream.set_nodelay(true).unwrap());
                all.lock().unwrap().extend([dup(&one), dup(&other)]);
                let change = Arc::clone(&change);
                let (from, to) = (dup(&one), dup(&other));
                let (there, back) = (Arc::clone(&is_cut), Arc::clone(&is_cut));
                std::thread::spawn(move || pump(from, to, &*change, number, &there));
                std::thread::spawn(move || pump(other, one, &|_, _, _| {}, number, &back));
                if is_cut.load(Ordering::Acquire) {
                    all.lock().unwrap().iter().for_each(|s| drop(s.shutdown(Shutdown::Both)));
                }
            }
        });
        Self { port, streams, cut, over }
    }

    pub(crate) fn plain(backup: u16) -> Self {
        Self::start(backup, Arc::new(|_, _, _| {}))
    }

    pub(crate) fn url(&self) -> String {
        format!("tcp:127.0.0.1:{}", self.port)
    }

    /// Cuts connection `number`, in both directions.
    pub(crate) fn cut_one(&self, number: usize) {
        for stream in self.streams.lock().unwrap().iter().skip(2 * number).take(2) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// As [`Proxy::cut`], and the backup does not learn of it before [`Proxy::heal`].
    pub(crate) fn cut_front(&self) {
        self.cut.store(true, Ordering::Release);
        // Every first one is the primary's; what its end says stays here.
        for pair in self.streams.lock().unwrap().chunks(2) {
            let _ = pair[0].shutdown(Shutdown::Write);
        }
    }

    /// Lets connections through again; the old ones have ended by then.
    pub(crate) fn heal(&self) {
        for stream in self.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
        self.cut.store(false, Ordering::Release);
    }

    /// Cuts every connection, in both directions, at once; new ones end as soon as they are made.
    pub(crate) fn cut(&self) {
        self.cut.store(true, Ordering::Release);
        for stream in self.streams.lock().unwrap().iter() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        self.cut();
        // Wakes the listener, which sees that it is over.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

fn pump(
    mut from: TcpStream,
    mut to: TcpStream,
    change: &(dyn Fn(usize, u64, &mut Vec<u8>) + Send + Sync),
    number: usize,
    is_cut: &AtomicBool,
) {
    let mut buffer = vec![0; 64 << 10];
    let mut offset = 0;
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        let mut bytes = buffer[..count].to_vec();
        change(number, offset, &mut bytes);
        offset += count as u64;
        if to.write_all(&bytes).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Read);
    // Of what is cut one side may be meant not to know.
    if !is_cut.load(Ordering::Acquire) {
        let _ = to.shutdown(Shutdown::Write);
    }
}
