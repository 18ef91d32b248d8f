//! The device with a driver of the tests on one side and a socket's client on the other.

mod hostile;
mod lifecycle;
mod streams;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::device::Interrupt;
pub(super) use crate::virtio::testing::*;

const INPUT: u64 = BUFFERS + 0x40_0000;

/// A device, its client, and a driver.
struct Bench {
    console: Console,
    heard: Arc<Heard>,
    memory: Arc<crate::virtio::device::GuestMemory>,
    receive: Ring,
    transmit: Ring,
    client: UnixStream,
    _folder: tempfile::TempDir,
}

impl Bench {
    /// Without an active driver. The client is there, and what it says is not read yet.
    fn idle() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console");
        let console = Console::open("__console", &PortMode::Socket(path.clone())).unwrap();
        let client = UnixStream::connect(&path).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let memory = guest_memory();
        let (receive, transmit) = (Ring::new(&memory, RECEIVE), Ring::new(&memory, TRANSMIT));
        let heard = Arc::default();
        Self { console, heard, memory, receive, transmit, client, _folder: folder }
    }

    /// Active, and its client has been heard.
    fn new() -> Self {
        let mut bench = Self::idle();
        bench.activate(0);
        bench.say(b"?");
        bench.offer(0, 16);
        assert_eq!(bench.receive.wait_used(1), [(0, 1)]);
        bench.restart_rings();
        bench
    }

    fn activation(&self, features: u64) -> Activation {
        let mut queues = vec![self.receive.active(), self.transmit.active()];
        for queue in &mut queues {
            queue.queue.set_event_idx(features & EVENT_IDX != 0);
        }
        Activation {
            memory: Arc::clone(&self.memory),
            features,
            queues,
            interrupt: Arc::clone(&self.heard) as Arc<dyn Interrupt>,
        }
    }

    fn activate(&self, features: u64) {
        self.console.activate(self.activation(features)).unwrap();
    }

    /// As a driver that begins anew.
    fn restart_rings(&mut self) {
        self.console.reset();
        self.memory.write_slice(&[0; 0x10_0000], GuestAddress(0)).unwrap();
        self.receive = Ring::new(&self.memory, RECEIVE);
        self.transmit = Ring::new(&self.memory, TRANSMIT);
        self.activate(0);
    }

    /// The guest prints `text`, from a place of its own for each of 16 chains.
    fn print(&mut self, text: &[u8]) {
        let address = BUFFERS + (u64::from(self.transmit.avail % QUEUE_SIZE) << 16);
        self.memory.write_slice(text, GuestAddress(address)).unwrap();
        self.transmit.add(&[(address, u32::try_from(text.len()).unwrap(), 0)]);
        self.transmit.kick();
    }

    /// The guest offers a buffer for input, in one of 16 places.
    fn offer(&mut self, place: u64, len: u32) {
        self.receive.add(&[(INPUT + (place << 12), len, WRITE)]);
        self.receive.kick();
    }

    fn input(&self, place: u64, len: usize) -> Vec<u8> {
        self.bytes(INPUT + (place << 12), len)
    }

    fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// The client says something.
    fn say(&mut self, text: &[u8]) {
        self.client.write_all(text).unwrap();
    }

    /// The client reads.
    #[track_caller]
    fn hear(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.client.read_exact(&mut bytes).expect("the client hears something");
        bytes
    }

    /// The client hears nothing, for a while.
    #[track_caller]
    fn hears_nothing(&mut self) {
        self.client.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let error = self.client.read(&mut [0; 16]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
        self.client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    }

    fn counter(&self, name: &str) -> u64 {
        self.console.counters().into_iter().find(|(found, _)| *found == name).unwrap().1
    }
}

fn state_of(console: &Console) -> ConsoleState {
    match console.save() {
        DeviceState::Console(state) => state,
        other => panic!("{other:?}"),
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0u8..251).cycle().take(len).collect()
}
