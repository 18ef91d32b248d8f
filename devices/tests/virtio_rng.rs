//! virtio-rng with rings that a script writes.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use devices::virtio::device::{
    ActivateError, Activation, ActiveQueue, GuestMemory, Interrupt, VirtioDevice,
};
use devices::virtio::rng::{Rng, STOCK_BYTES};
use proptest::prelude::*;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const SIZE: u16 = 16;
const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const BUFFER: u64 = 0x1_0000;
const WRITE: u16 = 2;
const NEXT: u16 = 1;
/// What a test waits for at most; nothing depends on how long it takes.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Default)]
struct Lines {
    queue: AtomicUsize,
    needs_reset: AtomicUsize,
}

impl Interrupt for Lines {
    fn queue(&self, _index: u16) {
        self.queue.fetch_add(1, Ordering::SeqCst);
    }

    fn config(&self) {}

    fn needs_reset(&self, _why: &str) {
        self.needs_reset.fetch_add(1, Ordering::SeqCst);
    }
}

struct Guest {
    memory: Arc<GuestMemory>,
    rng: Rng,
    doorbell: EventFd,
    lines: Arc<Lines>,
    available: u16,
}

impl Guest {
    fn new(source: &Path) -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let rng = Rng::new("__rng", source.into()).unwrap();
        rng.attach().unwrap();
        Self {
            memory: Arc::new(memory),
            rng,
            doorbell: EventFd::new(EFD_NONBLOCK).unwrap(),
            lines: Arc::default(),
            available: 0,
        }
    }

    fn activation(&self) -> Activation {
        let mut queue = Queue::new(SIZE).unwrap();
        queue.try_set_desc_table_address(GuestAddress(DESC)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(AVAIL)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
        queue.set_ready(true);
        let doorbell = self.doorbell.try_clone().unwrap();
        Activation {
            memory: Arc::clone(&self.memory),
            features: 1 << 32,
            queues: vec![ActiveQueue { index: 0, queue, doorbell }],
            interrupt: Arc::clone(&self.lines) as _,
        }
    }

    fn activate(&self) {
        self.rng.activate(self.activation()).unwrap();
    }

    fn describe(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = GuestAddress(DESC + 16 * u64::from(index));
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.memory.write_slice(&bytes, at).unwrap();
    }

    fn offer(&mut self, head: u16) {
        let slot = u64::from(self.available % SIZE);
        self.memory.write_obj(head, GuestAddress(AVAIL + 4 + 2 * slot)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.memory.write_obj(self.available, GuestAddress(AVAIL + 2)).unwrap();
        self.doorbell.write(1).unwrap();
    }

    fn used(&self) -> u16 {
        self.memory.read_obj(GuestAddress(USED + 2)).unwrap()
    }

    fn used_len(&self, slot: u64) -> u32 {
        self.memory.read_obj(GuestAddress(USED + 4 + 8 * slot + 4)).unwrap()
    }

    fn bytes(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(BUFFER)).unwrap();
        bytes
    }
}

fn wait(what: &str, mut until: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !until() {
        assert!(begin.elapsed() < PATIENCE, "waited for {what}");
        sleep(Duration::from_millis(1));
    }
}

fn source(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn pipe(folder: &tempfile::TempDir) -> (PathBuf, File) {
    let path = folder.path().join("pipe");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let writer = File::options().read(true).write(true).open(&path).unwrap();
    (path, writer)
}

#[test]
fn buffers_are_filled_from_the_source_and_no_byte_comes_twice() {
    let bytes: Vec<u8> = (0..=255u8).cycle().take(64).collect();
    let file = source(&bytes);
    let mut guest = Guest::new(file.path());
    guest.activate();
    guest.describe(0, BUFFER, 8, WRITE | NEXT, 1);
    guest.describe(1, BUFFER + 8, 24, WRITE, 0);
    guest.offer(0);
    wait("the first buffer", || guest.used() == 1);
    assert_eq!(guest.used_len(0), 32);
    let mut seen = guest.bytes(32);
    guest.describe(2, BUFFER, 4096, WRITE, 0);
    guest.offer(2);
    wait("the second buffer", || guest.used() == 2);
    assert_eq!(guest.used_len(1), 32, "what is left");
    seen.extend(guest.bytes(32));
    seen.sort_unstable();
    assert_eq!(seen, bytes);
    assert_eq!(guest.lines.queue.load(Ordering::SeqCst), 2);
    // The source is at its end: the buffer waits.
    guest.offer(2);
    let failed = || {
        let counters = guest.rng.counters();
        counters.iter().any(|(name, value)| *name == "source_errors" && *value > 0)
    };
    wait("the end of the source", failed);
    assert_eq!(guest.used(), 2);
}

#[test]
fn one_buffer_gets_a_bounded_share() {
    let mut guest = Guest::new(Path::new("/dev/urandom"));
    guest.activate();
    guest.describe(0, BUFFER, 0x8_0000, WRITE, 0);
    guest.offer(0);
    wait("the buffer", || guest.used() == 1);
    assert_eq!(usize::try_from(guest.used_len(0)), Ok(STOCK_BYTES));
    assert_ne!(guest.bytes(64), [0; 64]);
}

#[test]
fn a_parked_device_touches_nothing_and_goes_on_afterwards() {
    let mut guest = Guest::new(Path::new("/dev/urandom"));
    guest.rng.park();
    guest.activate();
    guest.describe(0, BUFFER, 32, WRITE, 0);
    guest.offer(0);
    sleep(Duration::from_millis(50));
    assert_eq!((guest.used(), guest.bytes(32)), (0, vec![0; 32]));
    let position = guest.rng.queue_positions();
    assert_eq!((position[0].next_avail, position[0].next_used), (0, 0));
    guest.rng.unpark();
    wait("the buffer", || guest.used() == 1);
    guest.rng.park();
    let position = guest.rng.queue_positions();
    assert_eq!((position[0].next_avail, position[0].next_used), (1, 1));
}

#[test]
fn a_reset_waits_neither_for_the_source_nor_for_an_unpark() {
    let folder = tempfile::tempdir().unwrap();
    let (path, mut writer) = pipe(&folder);
    let mut guest = Guest::new(&path);
    guest.describe(0, BUFFER, 32, WRITE, 0);
    for round in 0..3 {
        guest.activate();
        guest.available = 0;
        guest.offer(0);
        sleep(Duration::from_millis(10));
        guest.rng.park();
        guest.rng.reset();
        guest.rng.unpark();
        assert_eq!(guest.used(), 0, "round {round}: nothing to give");
    }
    writer.write_all(&[7; 32]).unwrap();
    sleep(Duration::from_millis(20));
    assert_eq!(guest.bytes(32), [0; 32], "nothing is active");
    guest.available = 0;
    guest.activate();
    guest.offer(0);
    wait("the buffer", || guest.used() == 1);
    assert_eq!(guest.bytes(32), [7; 32]);
    // Dropped while parked and with nothing to give.
    guest.offer(0);
    guest.rng.park();
}

#[test]
fn an_empty_pipe_is_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let (path, mut writer) = pipe(&folder);
    let mut guest = Guest::new(&path);
    guest.activate();
    guest.describe(0, BUFFER, 32, WRITE, 0);
    guest.offer(0);
    sleep(Duration::from_millis(20));
    assert_eq!(guest.used(), 0);
    writer.write_all(&[9; 32]).unwrap();
    wait("the buffer", || guest.used() == 1);
    assert_eq!(guest.bytes(32), [9; 32]);
}

#[test]
fn a_source_that_is_not_there_is_an_error_that_names_it() {
    let rng = Rng::new("__rng", "/no/such/source".into()).unwrap();
    assert!(rng.attach().unwrap_err().to_string().contains("/no/such/source"));
    let guest = Guest::new(Path::new("/dev/urandom"));
    let result = rng.activate(guest.activation());
    assert!(matches!(result, Err(ActivateError::NotAttached)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Rings of random bytes end in answers or in NEEDS_RESET, and after a reset the device works.
    #[test]
    fn garbage_in_the_rings_is_survived(
        table in prop::collection::vec(any::<u8>(), 16 * usize::from(SIZE)),
        sane in prop::collection::vec(any::<bool>(), usize::from(SIZE)),
        heads in prop::collection::vec(any::<u16>(), usize::from(SIZE)),
        index in prop_oneof![0u16..=SIZE, any::<u16>()],
    ) {
        let mut guest = Guest::new(Path::new("/dev/urandom"));
        guest.memory.write_slice(&table, GuestAddress(DESC)).unwrap();
        for (at, sane) in (0u16..).zip(sane) {
            if sane {
                guest.describe(at, BUFFER, 64, WRITE | NEXT, (at + 1) % SIZE);
            }
        }
        for (at, head) in (0u64..).zip(heads) {
            let head = if head % 3 == 0 { head } else { head % SIZE };
            guest.memory.write_obj(head, GuestAddress(AVAIL + 4 + 2 * at)).unwrap();
        }
        guest.memory.write_obj(index, GuestAddress(AVAIL + 2)).unwrap();
        guest.doorbell.write(1).unwrap();
        guest.activate();
        wait("an end", || {
            guest.lines.needs_reset.load(Ordering::SeqCst) > 0 || guest.used() >= index.min(SIZE)
        });
        guest.rng.reset();
        for address in [AVAIL, USED] {
            guest.memory.write_slice(&[0; 64], GuestAddress(address)).unwrap();
        }
        guest.activate();
        guest.describe(0, BUFFER, 16, WRITE, 0);
        guest.offer(0);
        wait("the buffer", || guest.used() == 1);
    }
}
