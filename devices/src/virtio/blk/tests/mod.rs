//! The device without KVM and without a transport: a driver of its own writes real rings in plain
//! memory, the image is a temporary file or one in memory that fails and blocks at will.

mod commit;
mod failover;
mod hostile;
mod log;
mod parking;
mod requests;
mod schedule;

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::layout::*;
use super::*;
use crate::virtio::device::{Activation, ActiveQueue, GuestMemory, Interrupt, VirtioDevice};
use crate::virtio::state::DeviceState;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// No status of the specification.
const UNTOUCHED: u8 = 0xee;

const SIZE: u16 = 32;
const IMAGE_BYTES: usize = 4 << 20;
const MEMORY_BYTES: usize = 16 << 20;
/// Rings below, data above; each queue has its part.
const QUEUE_BYTES: u64 = 1 << 22;
const DATA: u64 = 0x10000;

/// Long enough for a loaded machine; a test that waits that long has failed.
const PATIENCE: Duration = Duration::from_secs(20);
/// Long enough for what shall not happen to happen nearly always if it could.
const MOMENT: Duration = Duration::from_millis(60);

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "{what} did not happen");
        thread::sleep(Duration::from_micros(200));
    }
}

#[derive(Default)]
struct Irq {
    queues: AtomicUsize,
    resets: Mutex<Vec<String>>,
}

impl Interrupt for Irq {
    fn queue(&self, _index: u16) {
        self.queues.fetch_add(1, Ordering::SeqCst);
    }
    fn config(&self) {}
    fn needs_reset(&self, why: &str) {
        self.resets.lock().unwrap().push(why.into());
    }
}

/// A driver's side of one queue.
struct Driver {
    memory: Arc<GuestMemory>,
    index: u16,
    base: u64,
    next_descriptor: u16,
    available: u16,
    seen: u16,
    data: u64,
    doorbell: EventFd,
}

/// A request that was made available.
#[derive(Clone, Copy, Debug)]
struct Sent {
    head: u16,
    data: u64,
    status: u64,
}

impl Driver {
    fn new(memory: &Arc<GuestMemory>, index: u16) -> Self {
        let base = u64::from(index) * QUEUE_BYTES + 0x1000;
        let doorbell = EventFd::new(EFD_NONBLOCK).unwrap();
        let memory = Arc::clone(memory);
        let data = u64::from(index) * QUEUE_BYTES + DATA;
        Self { memory, index, base, next_descriptor: 0, available: 0, seen: 0, data, doorbell }
    }

    fn available_ring(&self) -> u64 {
        self.base + 0x1000
    }

    fn used_ring(&self) -> u64 {
        self.base + 0x2000
    }

    fn queue(&self) -> Queue {
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_size(SIZE);
        let low = |address: u64| Some(u32::try_from(address).unwrap());
        queue.set_desc_table_address(low(self.base), Some(0));
        queue.set_avail_ring_address(low(self.available_ring()), Some(0));
        queue.set_used_ring_address(low(self.used_ring()), Some(0));
        queue.set_ready(true);
        assert!(queue.is_valid(self.memory.as_ref()));
        queue
    }

    fn active(&self) -> ActiveQueue {
        let doorbell = self.doorbell.try_clone().unwrap();
        ActiveQueue { index: self.index, queue: self.queue(), doorbell }
    }

    fn put<T: vm_memory::ByteValued>(&self, address: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(address)).unwrap();
    }

    fn get<T: vm_memory::ByteValued>(&self, address: u64) -> T {
        self.memory.read_obj(GuestAddress(address)).unwrap()
    }

    fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn room(&mut self, len: usize) -> u64 {
        let at = self.data;
        self.data += u64::try_from(len).unwrap().next_multiple_of(16);
        assert!(self.data <= (u64::from(self.index) + 1) * QUEUE_BYTES);
        at
    }

    fn place(&mut self, bytes: &[u8]) -> u64 {
        let at = self.room(bytes.len());
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        at
    }

    fn store(&self, table: u64, index: u16, descriptor: Descriptor) {
        self.put(table + u64::from(index) * 16, descriptor);
    }

    /// Writes a chain of (address, length, flags) and gives its head.
    fn chain(&mut self, parts: &[(u64, u32, u16)]) -> u16 {
        let head = self.next_descriptor;
        for (at, (address, len, flags)) in parts.iter().enumerate() {
            let next = (self.next_descriptor + 1) % SIZE;
            let more = if at + 1 < parts.len() { NEXT } else { 0 };
            let descriptor = Descriptor::new(*address, *len, flags | more, next);
            self.store(self.base, self.next_descriptor, descriptor);
            self.next_descriptor = next;
        }
        head
    }

    fn offer(&mut self, head: u16) {
        let slot = self.available_ring() + 4 + u64::from(self.available % SIZE) * 2;
        self.put(slot, head);
        self.available = self.available.wrapping_add(1);
        self.put(self.available_ring() + 2, self.available);
    }

    fn kick(&self) {
        self.doorbell.write(1).unwrap();
    }

    fn header(&mut self, kind: u32, sector: u64) -> u64 {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.place(&header)
    }

    /// A request with `out` for the device and room for `room` bytes from it; not yet offered.
    fn build(&mut self, kind: u32, sector: u64, out: &[u8], room: usize) -> Sent {
        let mut parts = vec![(self.header(kind, sector), 16, 0)];
        let mut data = 0;
        if !out.is_empty() {
            data = self.place(out);
            parts.push((data, u32::try_from(out.len()).unwrap(), 0));
        }
        if room > 0 {
            data = self.room(room);
            parts.push((data, u32::try_from(room).unwrap(), WRITE));
        }
        let status = self.place(&[UNTOUCHED]);
        parts.push((status, 1, WRITE));
        let head = self.chain(&parts);
        Sent { head, data, status }
    }

    fn send(&mut self, kind: u32, sector: u64, out: &[u8], room: usize) -> Sent {
        let sent = self.build(kind, sector, out, room);
        self.offer(sent.head);
        self.kick();
        sent
    }

    fn write(&mut self, sector: u64, bytes: &[u8]) -> Sent {
        self.send(OUT, sector, bytes, 0)
    }

    fn read(&mut self, sector: u64, len: usize) -> Sent {
        self.send(IN, sector, &[], len)
    }

    /// A request with one range of discard or write zeroes.
    fn range(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> Sent {
        self.send(kind, 0, &range_bytes(sector, sectors, flags), 0)
    }

    fn used_index(&self) -> u16 {
        self.get(self.used_ring() + 2)
    }

    fn unseen(&self) -> u16 {
        self.used_index().wrapping_sub(self.seen)
    }

    /// Waits for `count` answers: head and length of each.
    fn answers(&mut self, count: u16) -> Vec<(u16, u32)> {
        until("an answer", || self.unseen() >= count);
        let mut answers = Vec::new();
        for _ in 0..count {
            let at = self.used_ring() + 4 + u64::from(self.seen % SIZE) * 8;
            let head = u16::try_from(self.get::<u32>(at)).unwrap();
            answers.push((head, self.get(at + 4)));
            self.seen = self.seen.wrapping_add(1);
        }
        answers
    }

    fn status(&self, sent: Sent) -> u8 {
        self.get(sent.status)
    }

    /// Waits for the answer of the only request there is: status and length.
    fn end(&mut self, sent: Sent) -> (u8, u32) {
        let answers = self.answers(1);
        assert_eq!(answers[0].0, sent.head);
        (self.status(sent), answers[0].1)
    }
}

fn range_bytes(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

/// A machine with one disk.
struct Rig {
    memory: Arc<GuestMemory>,
    irq: Arc<Irq>,
    drivers: Vec<Driver>,
    disk: Disk,
}

fn memory() -> Arc<GuestMemory> {
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap())
}

fn file() -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(u64::try_from(IMAGE_BYTES).unwrap()).unwrap();
    file
}

fn config(file: &NamedTempFile) -> BlkConfig {
    BlkConfig {
        id: "_disk0".into(),
        path: file.path().into(),
        queue_size: SIZE,
        ..BlkConfig::default()
    }
}

impl Rig {
    /// A disk that is not attached.
    fn bare(config: BlkConfig) -> Self {
        let memory = memory();
        let drivers = (0..config.num_queues).map(|index| Driver::new(&memory, index)).collect();
        Self { irq: Arc::default(), drivers, disk: Disk::new(config).unwrap(), memory }
    }

    fn activate(&self) {
        self.activate_with(self.disk.features());
    }

    fn activate_with(&self, features: u64) {
        let queues = self.drivers.iter().map(Driver::active).collect();
        let interrupt = Arc::clone(&self.irq);
        let memory = Arc::clone(&self.memory);
        self.disk.activate(Activation { memory, features, queues, interrupt }).unwrap();
        self.drivers.iter().for_each(Driver::kick);
    }

    fn on_file(config: BlkConfig) -> Self {
        let rig = Self::bare(config);
        rig.disk.attach().unwrap();
        rig.activate();
        rig
    }

    /// With an image in memory; the file behind the configuration gives its size only.
    fn on(image: &Arc<TestImage>, num_queues: u16) -> Self {
        let file = file();
        let rig = Self::bare(BlkConfig { num_queues, ..config(&file) });
        rig.attach(image);
        rig.activate();
        rig
    }

    fn attach(&self, image: &Arc<TestImage>) {
        let image: Arc<dyn Image> = Arc::<TestImage>::clone(image);
        self.disk.attach_image(&image).unwrap();
    }

    fn counter(&self, name: &str) -> u64 {
        let counters = self.disk.counters();
        counters.into_iter().find(|(found, _)| *found == name).unwrap().1
    }

    fn state(&self) -> BlkState {
        let DeviceState::Block(state) = self.disk.save() else { panic!("not a disk's state") };
        state
    }
}

/// A copy of a machine's memory, as a replica has it, as far as `queues` reach.
fn copy(from: &GuestMemory, queues: usize) -> Arc<GuestMemory> {
    let to = memory();
    let mut bytes = vec![0; queues << 22];
    from.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    to.write_slice(&bytes, GuestAddress(0)).unwrap();
    to
}

/// A machine that goes on from the state and the memory of another.
fn replica(of: &Rig, state: &DeviceState, image: &Arc<TestImage>) -> Rig {
    let file = file();
    let num_queues = u16::try_from(of.drivers.len()).unwrap();
    let mut rig = Rig::bare(BlkConfig { num_queues, ..config(&file) });
    rig.memory = copy(&of.memory, of.drivers.len());
    for (mine, other) in rig.drivers.iter_mut().zip(&of.drivers) {
        mine.memory = Arc::clone(&rig.memory);
        mine.seen = other.seen;
        mine.available = other.available;
        mine.data = other.data;
        mine.next_descriptor = other.next_descriptor;
    }
    rig.attach(image);
    rig.disk.park();
    rig.disk.restore(state).unwrap();
    rig.activate();
    rig
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Op {
    Read(u64, usize),
    Write(u64, usize),
    Zero(u64, u64, bool),
    Discard(u64, u64),
    Flush,
}

/// An image in memory.
struct TestImage {
    bytes: Mutex<Vec<u8>>,
    /// What was begun, in order.
    begun: Mutex<Vec<Op>>,
    ended: AtomicUsize,
    blocked: Mutex<bool>,
    changed: Condvar,
    broken: Mutex<Option<Op>>,
}

impl TestImage {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::new(vec![0; IMAGE_BYTES]),
            begun: Mutex::default(),
            ended: AtomicUsize::new(0),
            blocked: Mutex::new(false),
            changed: Condvar::new(),
            broken: Mutex::default(),
        })
    }

    /// From now on nothing that begins ends.
    fn block(&self) {
        *self.blocked.lock().unwrap() = true;
    }

    fn unblock(&self) {
        *self.blocked.lock().unwrap() = false;
        self.changed.notify_all();
    }

    fn begun(&self) -> Vec<Op> {
        self.begun.lock().unwrap().clone()
    }

    fn sector(&self, sector: usize) -> u8 {
        let bytes = self.bytes.lock().unwrap();
        let sector = &bytes[sector * 512..][..512];
        assert!(sector.iter().all(|byte| *byte == sector[0]), "a torn sector");
        sector[0]
    }

    fn run(&self, op: Op, action: impl FnOnce(&mut [u8])) -> io::Result<()> {
        self.begun.lock().unwrap().push(op.clone());
        let blocked = self.blocked.lock().unwrap();
        drop(self.changed.wait_while(blocked, |blocked| *blocked).unwrap());
        let broken = self.broken.lock().unwrap().as_ref() == Some(&op);
        if !broken {
            action(&mut self.bytes.lock().unwrap());
        }
        self.ended.fetch_add(1, Ordering::SeqCst);
        if broken { Err(io::Error::from_raw_os_error(libc::EIO)) } else { Ok(()) }
    }
}

fn at(offset: u64, len: usize) -> std::ops::Range<usize> {
    let offset = usize::try_from(offset).unwrap();
    offset..offset + len
}

impl Image for TestImage {
    fn len_bytes(&self) -> io::Result<u64> {
        Ok(u64::try_from(IMAGE_BYTES).unwrap())
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let len = bytes.len();
        self.run(Op::Read(offset, len), |image| bytes.copy_from_slice(&image[at(offset, len)]))
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let len = bytes.len();
        self.run(Op::Write(offset, len), |image| image[at(offset, len)].copy_from_slice(bytes))
    }

    fn zero(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let range = at(offset, usize::try_from(len).unwrap());
        self.run(Op::Zero(offset, len, unmap), |image| image[range].fill(0))
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let range = at(offset, usize::try_from(len).unwrap());
        self.run(Op::Discard(offset, len), |image| image[range].fill(0xdd))
    }

    fn flush(&self) -> io::Result<()> {
        self.run(Op::Flush, |_| ())
    }
}
