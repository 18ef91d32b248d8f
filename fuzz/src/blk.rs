//! virtio-blk: arbitrary rings, chains and requests, host I/O that ends late or fails, resets,
//! parks, saved states and hosts that go.
//!
//! Beside "no panic": the host is asked for nothing outside of the image, for no change of one that
//! is read only, and for none before its epoch's commit; what was taken is in flight or answered;
//! a state that was saved can be restored; after a reset a request is carried out.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use arbitrary::Arbitrary;
use devices::virtio::blk::{
    BlkConfig, BlkQueueState, BlkState, Disk, Done, Engine, Io, Operation, SECTOR_BYTES,
};
use devices::virtio::device::{QueuePosition, VirtioDevice};
use devices::virtio::state::DeviceState;

use crate::TURNS_MAX;
use crate::guest::{Guest, GuestAct, Length, Place, Rest, SIZE_MAX, Slot, WRITE};
use crate::reach::{reached, reached_all};

const QUEUES: u16 = 2;
const IMAGE_BYTES: usize = 64 << 10;
/// Types of requests (virtio 1.2, 5.2.6).
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// Counters of the disk, and what becomes of states.
pub const PLACES: &[&str] = &[
    "read_ops",
    "write_ops",
    "flush_ops",
    "discard_ops",
    "write_zeroes_ops",
    "errors",
    "held_ops",
    "blk: a ring that makes no sense",
    "blk: saved with requests in flight",
    "blk: taken over with requests in flight",
    "blk: a made-up state with requests in flight is taken",
    "blk: a made-up state is refused",
    "blk: reset with requests in flight",
];

#[derive(Arbitrary, Debug)]
pub struct Input {
    readonly: bool,
    held: bool,
    features: u64,
    places: [Option<Place>; QUEUES as usize],
    acts: Rest<Act>,
}

#[derive(Arbitrary, Debug)]
enum Act {
    Guest(GuestAct),
    Request(Request),
    Turn,
    /// The host ends an I/O: the oldest or the youngest.
    End {
        youngest: bool,
        fails: bool,
    },
    Reset,
    /// Parks, saves, and goes on.
    Save,
    /// The host is lost: another disk goes on from the state.
    TakeOver,
    /// The disk meets a state that a peer has made up.
    Hostile {
        capacity: u16,
        stopped: bool,
        queues: Vec<HostileQueue>,
    },
    Seal,
    Commit,
    Pass,
}

#[derive(Arbitrary, Debug)]
struct HostileQueue {
    index: u8,
    next_avail: u16,
    next_used: u16,
    in_flight: Vec<Slot>,
}

/// A request that is nearly right.
#[derive(Arbitrary, Debug)]
struct Request {
    queue: bool,
    kind: u8,
    sector: Sector,
    len: Length,
    /// Sectors of a discard or write zeroes, and its flags.
    range: (Length, u8),
    /// Now and then a request has what another kind has.
    shape: u8,
    kick: bool,
}

#[derive(Arbitrary, Debug)]
enum Sector {
    Near(u8),
    /// Before the end.
    Last(u8),
    Any(u64),
}

/// What the host does, by hand.
struct Host {
    image: Mutex<Vec<u8>>,
    jobs: Mutex<VecDeque<(Io, Done)>>,
    readonly: bool,
    /// Nothing was committed yet of what was held from the beginning.
    holds: AtomicBool,
}

fn range(offset: u64, len: u64) -> std::ops::Range<usize> {
    let end = offset.checked_add(len).expect("no overflow");
    assert!(end <= IMAGE_BYTES as u64, "{len} bytes at {offset} are outside of the image");
    offset as usize..end as usize
}

impl Host {
    /// Ends an I/O. False if there is none.
    fn end(&self, youngest: bool, fails: bool) -> bool {
        let mut jobs = self.jobs.lock().unwrap();
        let job = if youngest { jobs.pop_back() } else { jobs.pop_front() };
        drop(jobs);
        let Some((mut io, done)) = job else { return false };
        if fails {
            done(io, Err(std::io::ErrorKind::Other.into()));
            return true;
        }
        let mut image = self.image.lock().unwrap();
        let len = io.buffer.bytes().len() as u64;
        match io.operation {
            Operation::Read => io.buffer.bytes_mut().copy_from_slice(&image[range(io.offset, len)]),
            Operation::Write { .. } => {
                image[range(io.offset, len)].copy_from_slice(io.buffer.bytes());
            }
            Operation::Zero { len, .. } | Operation::Discard { len } => {
                image[range(io.offset, len)].fill(0);
            }
            Operation::Flush => {}
        }
        drop(image);
        done(io, Ok(()));
        true
    }
}

impl Engine for Host {
    fn submit(&self, io: Io, done: Done) {
        let len = match io.operation {
            Operation::Zero { len, .. } | Operation::Discard { len } => len,
            _ => io.buffer.bytes().len() as u64,
        };
        range(io.offset, len);
        assert!(
            io.offset.is_multiple_of(SECTOR_BYTES) && len.is_multiple_of(SECTOR_BYTES),
            "{io:?}"
        );
        if io.operation != Operation::Read {
            assert!(!self.readonly || io.operation == Operation::Flush, "{io:?}");
            assert!(!self.holds.load(Ordering::Relaxed), "an uncommitted change: {io:?}");
        }
        self.jobs.lock().unwrap().push_back((io, done));
    }

    fn close(&self, _patience: Duration) -> bool {
        let jobs = std::mem::take(&mut *self.jobs.lock().unwrap());
        drop(jobs);
        true
    }
}

struct Rig {
    disk: Disk,
    host: Arc<Host>,
    guest: Guest,
    features: u64,
    active: bool,
    /// By queue: taken, less answered, less in flight. Nothing changes it.
    balance: Vec<u16>,
    epoch: u64,
    /// The guest keeps its disk busy, or nobody knows what its state was.
    lost: bool,
}

/// A file of the image's size, for what the disk looks at when it is made.
fn image_path() -> &'static str {
    static FILE: OnceLock<(tempfile::NamedTempFile, String)> = OnceLock::new();
    let (_, path) = FILE.get_or_init(|| {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        file.as_file().set_len(IMAGE_BYTES as u64).expect("its size");
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file.as_file()));
        // Only the descriptor is needed: nothing stays behind, however the fuzzer ends.
        std::fs::remove_file(file.path()).expect("its name");
        (file, path)
    });
    path
}

fn disk(host: &Arc<Host>, held: bool) -> Disk {
    let disk = Disk::new(BlkConfig {
        id: "_disk0".to_owned(),
        path: image_path().into(),
        readonly: host.readonly,
        num_queues: QUEUES,
        queue_size: SIZE_MAX,
        ..BlkConfig::default()
    });
    let disk = disk.expect("a good configuration");
    disk.work_by_hand();
    disk.attach_engine(Arc::clone(host) as Arc<dyn Engine>).expect("the first");
    if held {
        disk.hold();
    }
    disk
}

/// A disk without a driver, whose host does nothing.
pub fn idle() -> Disk {
    let host = Arc::new(Host {
        image: Mutex::default(),
        jobs: Mutex::default(),
        readonly: false,
        holds: AtomicBool::new(false),
    });
    disk(&host, false)
}

impl Rig {
    fn new(input: &Input) -> Self {
        let host = Arc::new(Host {
            image: Mutex::new(vec![0; IMAGE_BYTES]),
            jobs: Mutex::default(),
            readonly: input.readonly,
            holds: AtomicBool::new(input.held),
        });
        let mut rig = Self {
            disk: disk(&host, input.held),
            host,
            guest: Guest::new(input.places),
            features: input.features,
            active: false,
            balance: Vec::new(),
            epoch: 0,
            lost: false,
        };
        rig.activate();
        rig.balance = rig.balances();
        rig
    }

    fn activate(&mut self) {
        let activation = self.guest.activation(self.features & self.disk.features());
        self.disk.activate(activation).expect("a disk that is attached");
        self.active = true;
    }

    /// False if the guest keeps its disk busy.
    fn turn(&mut self) -> bool {
        let idle = (0..TURNS_MAX).any(|_| !self.disk.turn());
        self.lost |= !idle;
        idle
    }

    fn state(&self) -> BlkState {
        let DeviceState::Block(state) = self.disk.save() else { panic!("another device's state") };
        state
    }

    fn save(&self) -> BlkState {
        self.disk.park();
        let state = self.state();
        for queue in &state.queues {
            assert!(queue.in_flight.len() <= usize::from(SIZE_MAX), "{state:?}");
        }
        let bytes = postcard::to_stdvec(&state).expect("a state that can be encoded");
        assert_eq!(postcard::from_bytes::<BlkState>(&bytes).as_ref(), Ok(&state));
        self.disk.unpark();
        if state.queues.iter().any(|queue| !queue.in_flight.is_empty()) {
            reached("blk: saved with requests in flight");
        }
        state
    }

    fn balances(&self) -> Vec<u16> {
        let balance = |queue: &BlkQueueState| {
            let QueuePosition { next_avail, next_used, .. } = queue.position;
            let in_flight = u16::try_from(queue.in_flight.len()).expect("bounded");
            next_avail.wrapping_sub(next_used).wrapping_sub(in_flight)
        };
        self.save().queues.iter().map(balance).collect()
    }

    fn check(&mut self) {
        if self.active && !self.lost && !self.guest.must_reset() {
            assert_eq!(self.balances(), self.balance, "a request was lost or answered twice");
        }
    }

    /// What the transport does with a state.
    fn go_on(&mut self, state: &BlkState, positions: &[QueuePosition]) {
        if state.stopped {
            // The driver finds a device that waits for its reset.
            self.disk.reset();
            self.reset();
        } else if self.active {
            self.guest.set_positions(positions);
            self.activate();
        }
    }

    fn take_over(&mut self) {
        self.disk.park();
        reached_all(self.disk.counters());
        let (state, positions) = (self.state(), self.disk.queue_positions());
        if self.active && state.queues.iter().any(|queue| !queue.in_flight.is_empty()) {
            reached("blk: taken over with requests in flight");
        }
        let host = Arc::new(Host {
            image: Mutex::new(std::mem::take(&mut *self.host.image.lock().unwrap())),
            jobs: Mutex::default(),
            readonly: self.host.readonly,
            holds: AtomicBool::new(false),
        });
        let next = disk(&host, false);
        next.restore(&DeviceState::Block(state.clone())).expect("the state of another disk");
        // The lost host's jobs go with its disk, before anybody misses their image.
        (self.disk, self.host) = (next, host);
        self.go_on(&state, &positions);
    }

    fn hostile(&mut self, state: &BlkState) {
        self.host.holds.store(false, Ordering::Relaxed);
        self.disk.pass();
        self.disk.reset();
        self.active = false;
        let positions: Vec<_> = state.queues.iter().map(|queue| queue.position).collect();
        if self.disk.restore(&DeviceState::Block(state.clone())).is_ok() {
            assert!(self.disk.capacity_bytes() <= IMAGE_BYTES as u64);
            if state.queues.iter().any(|queue| !queue.in_flight.is_empty()) {
                reached("blk: a made-up state with requests in flight is taken");
            }
            self.active = true;
            self.go_on(state, &positions);
            self.lost = true;
        } else {
            reached("blk: a made-up state is refused");
            self.reset();
        }
    }

    fn reset(&mut self) {
        if !self.host.jobs.lock().unwrap().is_empty() {
            reached("blk: reset with requests in flight");
        }
        self.disk.reset();
        self.guest.heard.resets.lock().unwrap().clear();
        // The driver sets its queues up as they were.
        self.activate();
        self.balance = self.balances();
        self.lost = false;
    }

    fn request(&mut self, request: &Request) {
        let at = usize::from(request.queue);
        let sectors = (IMAGE_BYTES as u64) / SECTOR_BYTES;
        let sector = match request.sector {
            Sector::Near(sector) => sector.into(),
            Sector::Last(before) => sectors.saturating_sub(before.into()),
            Sector::Any(sector) => sector,
        };
        let kind = [IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, u32::from(request.kind)]
            [usize::from(request.kind % 7)];
        let header = self.guest.place(at, &header(kind, sector));
        let mut parts = vec![(header, 16, 0)];
        let wrong = request.shape.is_multiple_of(16);
        if matches!(kind, DISCARD | WRITE_ZEROES) != wrong {
            let (sectors, flags) = request.range;
            let mut bytes = sector.to_le_bytes().to_vec();
            bytes.extend(sectors.0.to_le_bytes());
            bytes.extend(u32::from(flags & (request.shape % 4)).to_le_bytes());
            parts.push((self.guest.place(at, &bytes), 16, 0));
        } else if kind != FLUSH {
            let mut len = request.len.0 % 0x1_0000;
            if !request.shape.is_multiple_of(8) {
                len = len.next_multiple_of(512);
            }
            let room = self.guest.room(at, usize::try_from(len).expect("small"));
            parts.push((room, len, if kind == OUT { 0 } else { WRITE }));
        }
        parts.push((self.guest.room(at, 1), 1, WRITE));
        let head = self.guest.chain(at, &parts);
        self.guest.offer(at, head);
        if request.kick {
            self.turn();
        }
    }

    fn act(&mut self, act: &Act) {
        match act {
            Act::Guest(act) => self.guest.act(act),
            Act::Request(request) => self.request(request),
            Act::Turn => {
                self.turn();
            }
            Act::End { youngest, fails } => {
                self.host.end(*youngest, *fails);
            }
            Act::Reset => self.reset(),
            Act::Save => self.check(),
            Act::TakeOver => self.take_over(),
            Act::Hostile { capacity, stopped, queues } => {
                let queue = |queue: &HostileQueue| BlkQueueState {
                    position: QueuePosition {
                        index: u16::from(queue.index % 4),
                        next_avail: queue.next_avail,
                        next_used: queue.next_used,
                    },
                    in_flight: queue.in_flight.iter().map(|slot| slot.0).collect(),
                };
                let queues = queues.iter().take(4).map(queue).collect();
                let capacity_sectors = u64::from(*capacity % 150);
                self.hostile(&BlkState { capacity_sectors, stopped: *stopped, queues });
            }
            Act::Seal => {
                self.epoch += 1;
                self.disk.park();
                self.disk.seal(self.epoch);
                self.disk.unpark();
            }
            Act::Commit => {
                if self.epoch > 0 {
                    self.host.holds.store(false, Ordering::Relaxed);
                }
                self.disk.commit(self.epoch);
            }
            Act::Pass => {
                self.host.holds.store(false, Ordering::Relaxed);
                self.disk.pass();
            }
        }
    }

    /// All that was taken is answered in the end.
    fn drain(&mut self) {
        self.host.holds.store(false, Ordering::Relaxed);
        self.disk.pass();
        for _ in 0..TURNS_MAX {
            // A guest that keeps its disk busy would do so for as long as we look.
            if !self.turn() {
                break;
            }
            while self.host.end(false, false) {}
        }
        if self.active && !self.lost && !self.guest.must_reset() {
            let state = self.save();
            let idle = state.queues.iter().all(|queue| queue.in_flight.is_empty());
            assert!(idle || state.stopped, "nothing is under way, and {state:?}");
        }
        self.check();
    }

    /// A request of a driver that makes sense: its status.
    fn ask(&mut self, at: usize, kind: u32, data: u64, len: u32) -> u8 {
        let header = self.guest.place(at, &header(kind, 3));
        let status = self.guest.place(at, &[0xee]);
        let flags = if kind == IN { WRITE } else { 0 };
        let head = self.guest.chain(at, &[(header, 16, 0), (data, len, flags), (status, 1, WRITE)]);
        self.guest.offer(at, head);
        self.turn();
        while self.host.end(false, false) {}
        let used = self.guest.used(at).expect("an answer");
        let written = if kind == IN { len } else { 0 };
        assert!(used.0 == u32::from(head) && (used.1 == written + 1 || used.1 == 1), "{used:?}");
        self.guest.get(status, 1)[0]
    }
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

pub fn run(input: Input) {
    let mut rig = Rig::new(&input);
    for act in &input.acts.0 {
        rig.act(act);
    }
    rig.drain();
    if rig.guest.must_reset() {
        reached("blk: a ring that makes no sense");
    }
    reached_all(rig.disk.counters());
    rig.disk.reset();
    if rig.disk.capacity_bytes() < IMAGE_BYTES as u64 {
        // What a state said of it stays with the disk.
        rig.disk = disk(&rig.host, false);
    }
    rig.guest.settle();
    rig.features = 0;
    rig.activate();
    for at in 0..usize::from(QUEUES) {
        let data = rig.guest.place(at, &[0x42; 512]);
        let written = rig.ask(at, OUT, data, 512);
        assert_eq!(written, u8::from(input.readonly));
        let room = rig.guest.place(at, &[0xee; 512]);
        assert_eq!(rig.ask(at, IN, room, 512), 0);
        if !input.readonly {
            assert_eq!(rig.guest.get(room, 512), [0x42; 512]);
        }
    }
}
