//! The driver's side of a device, for tests: rings in guest memory, and what an interrupt tells.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::device::{ActiveQueue, GuestMemory, Interrupt};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

pub const QUEUE_SIZE: u16 = 16;
/// Where buffers of the tests lie; rings lie below.
pub const BUFFERS: u64 = 0x10_0000;
pub const MEMORY_BYTES: usize = 8 << 20;

/// Waits for what other threads do. The limit only ends a test that has failed.
#[track_caller]
pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(20), "never happened: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Long enough for a thread to do what it must not do.
pub fn settle() {
    thread::sleep(Duration::from_millis(50));
}

/// What the driver has heard.
#[derive(Default)]
pub struct Heard {
    pub queues: Mutex<Vec<u16>>,
    pub config: AtomicUsize,
    pub resets: Mutex<Vec<String>>,
}

impl Heard {
    pub fn count(&self, queue: u16) -> usize {
        self.queues.lock().unwrap().iter().filter(|heard| **heard == queue).count()
    }

    pub fn reset_count(&self) -> usize {
        self.resets.lock().unwrap().len()
    }
}

impl Interrupt for Heard {
    fn queue(&self, index: u16) {
        self.queues.lock().unwrap().push(index);
    }

    fn config(&self) {
        self.config.fetch_add(1, Ordering::SeqCst);
    }

    fn needs_reset(&self, why: &str) {
        self.resets.lock().unwrap().push(why.to_owned());
    }
}

/// The driver's side of a queue. The crate's own mock lays its rings over each other.
pub struct Ring {
    memory: Arc<GuestMemory>,
    pub index: u16,
    base: u64,
    pub next_descriptor: u16,
    pub avail: u16,
    pub seen: u16,
    doorbell: EventFd,
}

impl Ring {
    pub fn new(memory: &Arc<GuestMemory>, index: u16) -> Self {
        let base = 0x1000 * 4 * (u64::from(index) + 1);
        Self {
            memory: Arc::clone(memory),
            index,
            base,
            next_descriptor: 0,
            avail: 0,
            seen: 0,
            doorbell: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
        }
    }

    fn avail_ring(&self) -> u64 {
        self.base + 0x1000
    }

    fn used_ring(&self) -> u64 {
        self.base + 0x2000
    }

    /// As the transport hands it to the device.
    pub fn active(&self) -> ActiveQueue {
        let low = |address: u64| Some(u32::try_from(address).unwrap());
        let mut queue = Queue::new(QUEUE_SIZE).unwrap();
        queue.set_desc_table_address(low(self.base), None);
        queue.set_avail_ring_address(low(self.avail_ring()), None);
        queue.set_used_ring_address(low(self.used_ring()), None);
        queue.set_ready(true);
        assert!(queue.is_valid(&*self.memory));
        let doorbell = self.doorbell.try_clone().unwrap();
        doorbell.write(1).unwrap();
        ActiveQueue { index: self.index, queue, doorbell }
    }

    pub fn descriptor(&self, slot: u16, (address, len, flags, next): Descriptor) {
        write_descriptor(&self.memory, self.base, slot, (address, len, flags, next));
    }

    /// Makes a chain of `(address, length, flags)` available, and its head known.
    pub fn add(&mut self, parts: &[(u64, u32, u16)]) -> u16 {
        let head = self.next_descriptor;
        for (place, (address, len, flags)) in parts.iter().enumerate() {
            let slot = self.next_descriptor;
            self.next_descriptor = (self.next_descriptor + 1) % QUEUE_SIZE;
            let more = if place + 1 < parts.len() { NEXT } else { 0 };
            self.descriptor(slot, (*address, *len, flags | more, self.next_descriptor));
        }
        self.offer(head);
        head
    }

    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.avail % QUEUE_SIZE);
        self.write(self.avail_ring() + 4 + 2 * slot, head);
        self.set_avail(self.avail.wrapping_add(1));
    }

    pub fn set_avail(&mut self, index: u16) {
        self.avail = index;
        self.memory.store(index, GuestAddress(self.avail_ring() + 2), Ordering::Release).unwrap();
    }

    /// The driver wants to hear of the used buffer `index`, or (flags) of none.
    pub fn set_used_event(&self, index: u16) {
        self.write(self.avail_ring() + 4 + 2 * u64::from(QUEUE_SIZE), index);
    }

    pub fn set_avail_flags(&self, flags: u16) {
        self.write(self.avail_ring(), flags);
    }

    /// Whether the device wants to hear of more, without and with event indices.
    pub fn used_flags(&self) -> u16 {
        self.read(self.used_ring())
    }

    pub fn avail_event(&self) -> u16 {
        self.read(self.used_ring() + 4 + 8 * u64::from(QUEUE_SIZE))
    }

    pub fn kick(&self) {
        self.doorbell.write(1).unwrap();
    }

    pub fn used_index(&self) -> u16 {
        self.memory.load(GuestAddress(self.used_ring() + 2), Ordering::Acquire).unwrap()
    }

    /// Buffers that came back since the last call: heads and lengths.
    pub fn take_used(&mut self) -> Vec<(u32, u32)> {
        let mut used = Vec::new();
        let index = self.used_index();
        while self.seen != index {
            let slot = u64::from(self.seen % QUEUE_SIZE);
            let element: [u32; 2] =
                self.memory.read_obj(GuestAddress(self.used_ring() + 4 + 8 * slot)).unwrap();
            used.push((element[0], element[1]));
            self.seen = self.seen.wrapping_add(1);
        }
        used
    }

    #[track_caller]
    pub fn wait_used(&mut self, count: usize) -> Vec<(u32, u32)> {
        let mut used = Vec::new();
        wait_for("used buffers", || {
            used.extend(self.take_used());
            used.len() >= count
        });
        assert_eq!(used.len(), count);
        used
    }

    fn write(&self, address: u64, value: u16) {
        self.memory.write_obj(value, GuestAddress(address)).unwrap();
    }

    fn read(&self, address: u64) -> u16 {
        self.memory.read_obj(GuestAddress(address)).unwrap()
    }
}

/// Address, length, flags, next.
pub type Descriptor = (u64, u32, u16, u16);

pub fn write_descriptor(
    memory: &GuestMemory,
    table: u64,
    slot: u16,
    (address, len, flags, next): Descriptor,
) {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    memory.write_slice(&bytes, GuestAddress(table + 16 * u64::from(slot))).unwrap();
}

pub fn guest_memory() -> Arc<GuestMemory> {
    let memory: GuestMemory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap();
    Arc::new(memory)
}
