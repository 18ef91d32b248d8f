//! The device with a driver of the tests on one side and a datagram socket on the other.

mod control;
mod hostile;
mod lifecycle;
pub(super) mod namespace;
mod receive;
mod transmit;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::features::GuestOffloads;
use super::frame::HEADER_BYTES;
use super::*;
use crate::virtio::device::{GuestMemory, Interrupt};
pub(super) use crate::virtio::testing::*;

pub(super) const MAC: &str = "52:54:00:12:34:56";

/// The VMM's end of a tap: one of two datagram sockets.
pub(super) struct FakeTap {
    socket: UnixDatagram,
    /// If not zero, writes fail so.
    pub(super) write_errno: AtomicI32,
    pub(super) writes: AtomicUsize,
    pub(super) reads: AtomicUsize,
    pub(super) offloads: Mutex<Option<GuestOffloads>>,
    pub(super) enabled: Mutex<bool>,
    pub(super) offloads_errno: AtomicI32,
}

impl TapQueue for FakeTap {
    fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    fn read(&self, frame: &mut [u8]) -> io::Result<usize> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        self.socket.recv(frame)
    }

    fn write(&self, frame: &[u8]) -> io::Result<usize> {
        self.writes.fetch_add(1, Ordering::SeqCst);
        match self.write_errno.load(Ordering::SeqCst) {
            0 => self.socket.send(frame),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    fn set_offloads(&self, offloads: GuestOffloads) -> io::Result<()> {
        match self.offloads_errno.load(Ordering::SeqCst) {
            0 => *self.offloads.lock().unwrap() = Some(offloads),
            errno => return Err(io::Error::from_raw_os_error(errno)),
        }
        Ok(())
    }

    fn set_enabled(&self, enabled: bool) -> io::Result<()> {
        *self.enabled.lock().unwrap() = enabled;
        Ok(())
    }
}

/// The world's end of a tap.
pub(super) struct World(UnixDatagram);

impl World {
    /// Sends a frame to the guest: header and contents.
    pub(super) fn send(&self, frame: &[u8]) {
        assert_eq!(self.0.send(frame).unwrap(), frame.len());
    }

    /// The next frame, which must come.
    #[track_caller]
    pub(super) fn receive(&self) -> Vec<u8> {
        let mut received = None;
        wait_for("a frame on the tap", || {
            received = self.try_receive();
            received.is_some()
        });
        received.unwrap()
    }

    pub(super) fn try_receive(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; 1 << 17];
        match self.0.recv(&mut frame) {
            Ok(len) => {
                frame.truncate(len);
                Some(frame)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(error) => panic!("{error}"),
        }
    }
}

pub(super) fn fake_tap() -> (Arc<FakeTap>, World) {
    let (ours, world) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    world.set_nonblocking(true).unwrap();
    let tap = FakeTap {
        socket: ours,
        write_errno: AtomicI32::new(0),
        writes: AtomicUsize::new(0),
        reads: AtomicUsize::new(0),
        offloads: Mutex::new(None),
        enabled: Mutex::new(true),
        offloads_errno: AtomicI32::new(0),
    };
    (Arc::new(tap), World(world))
}

pub(super) fn options(pairs: u16) -> NetOptions {
    NetOptions {
        id: "_net0".to_owned(),
        tap: TapSource::Unnamed,
        mac: MAC.parse().unwrap(),
        mtu: None,
        host: TapSettings::default(),
        queue_pairs: pairs,
        queue_size: QUEUE_SIZE,
        offloads: Offloads { csum: true, tso: true, ufo: true },
        limits: Limits::default(),
    }
}

/// A device, its taps, and a driver.
pub(super) struct Bench {
    pub(super) net: Net,
    pub(super) memory: Arc<GuestMemory>,
    pub(super) heard: Arc<Heard>,
    pub(super) taps: Vec<Arc<FakeTap>>,
    pub(super) worlds: Vec<World>,
    pub(super) receive: Vec<Ring>,
    pub(super) transmit: Vec<Ring>,
    pub(super) control: Ring,
}

impl Bench {
    /// Attached, without an active driver.
    pub(super) fn idle(options: NetOptions) -> Self {
        let pairs = options.queue_pairs;
        let net = Net::new(options).unwrap();
        let (taps, worlds): (Vec<_>, Vec<_>) = (0..pairs).map(|_| fake_tap()).unzip();
        let queues: Vec<_> = taps.iter().map(|tap| Arc::clone(tap) as Arc<dyn TapQueue>).collect();
        net.start(&queues, Worker::spawn).unwrap();
        let memory = guest_memory();
        let ring = |index| Ring::new(&memory, index);
        Self {
            net,
            heard: Arc::default(),
            taps,
            worlds,
            receive: (0..pairs).map(|pair| ring(2 * pair)).collect(),
            transmit: (0..pairs).map(|pair| ring(2 * pair + 1)).collect(),
            control: ring(2 * pairs),
            memory,
        }
    }

    /// Active, with all features but event indices.
    pub(super) fn new(pairs: u16) -> Self {
        Self::with_features(options(pairs), !features::EVENT_IDX)
    }

    pub(super) fn with_features(options: NetOptions, wanted: u64) -> Self {
        let bench = Self::idle(options);
        bench.activate(bench.net.features() & wanted);
        bench
    }

    pub(super) fn activate(&self, features: u64) {
        self.net.activate(self.activation(features)).unwrap();
    }

    pub(super) fn activation(&self, features: u64) -> Activation {
        let mut queues: Vec<_> = self
            .receive
            .iter()
            .zip(&self.transmit)
            .flat_map(|(receive, transmit)| [receive.active(), transmit.active()])
            .collect();
        queues.push(self.control.active());
        Activation {
            memory: Arc::clone(&self.memory),
            features,
            queues,
            interrupt: Arc::clone(&self.heard) as Arc<dyn Interrupt>,
        }
    }

    pub(super) fn counter(&self, name: &str) -> u64 {
        self.net.counters().into_iter().find(|(found, _)| *found == name).unwrap().1
    }

    pub(super) fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub(super) fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// The guest sends `frame` on `pair`, from a place of its own for each of 16 frames.
    pub(super) fn send(&mut self, pair: usize, frame: &[u8]) -> u16 {
        let slot = u64::from(self.transmit[pair].avail % QUEUE_SIZE);
        let address = BUFFERS + (slot << 17) + (u64::try_from(pair).unwrap() << 16);
        self.write(address, frame);
        let len = u32::try_from(frame.len()).unwrap();
        let head = self.transmit[pair].add(&[(address, len, 0)]);
        self.transmit[pair].kick();
        head
    }

    /// The guest offers a receive buffer.
    pub(super) fn offer(&mut self, pair: usize, address: u64, len: u32) -> u16 {
        let head = self.receive[pair].add(&[(address, len, WRITE)]);
        self.receive[pair].kick();
        head
    }
}

/// A frame with a header of zeroes and `len` bytes that depend on `seed`.
pub(super) fn frame(seed: u8, len: usize) -> Vec<u8> {
    let mut frame = vec![0; HEADER_BYTES];
    let pattern = (0u8..251).cycle().map(|byte| byte.wrapping_mul(3).wrapping_add(seed));
    frame.extend(pattern.take(len));
    frame
}
