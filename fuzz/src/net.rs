//! virtio-net: arbitrary rings of all kinds of queues, commands, frames of the world, a tap that
//! fails, held frames, resets, parks and saved states.
//!
//! Beside "no panic": no frame that is none reaches the tap, and none before its epoch's commit; a
//! state that was saved can be restored; after a reset frames go both ways.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use arbitrary::Arbitrary;
use devices::virtio::device::{QueuePosition, VirtioDevice};
use devices::virtio::net::by_hand::Hand;
use devices::virtio::net::frame::{FRAME_BYTES_MAX, FRAME_BYTES_MIN, HEADER_BYTES};
use devices::virtio::net::gate::Limits;
use devices::virtio::net::state::NetState;
use devices::virtio::net::tap::{TapQueue, TapSettings, TapSource};
use devices::virtio::net::{GuestOffloads, Net, NetOptions, Offloads};
use devices::virtio::state::DeviceState;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::TURNS_MAX;
use crate::guest::{Blob, EVENT_IDX, Guest, GuestAct, Length, Place, Rest, SIZE_MAX, WRITE};
use crate::reach::{reached, reached_all};

const PAIRS_MAX: u16 = 2;
/// VIRTIO_NET_F_MQ.
const MQ: u64 = 1 << 22;
/// Classes of commands (virtio 1.2, 5.1.6.5).
const CLASS_MQ: u8 = 4;
const CLASS_GUEST_OFFLOADS: u8 = 5;

/// Counters of the card, and what becomes of states.
pub const PLACES: &[&str] = &[
    "rx_frames",
    "rx_dropped",
    "tx_frames",
    "tx_dropped",
    "tx_errors",
    "tx_held_frames",
    "tx_gate_full",
    "net: a ring that makes no sense",
    "net: a command changed the state",
    "net: taken over while active",
    "net: a made-up state is taken",
    "net: a made-up state is refused",
];

#[derive(Arbitrary, Debug)]
pub struct Input {
    two_pairs: bool,
    held: bool,
    features: u64,
    places: [Option<Place>; 2 * PAIRS_MAX as usize + 1],
    acts: Rest<Act>,
}

#[derive(Arbitrary, Debug)]
enum Act {
    Guest(GuestAct),
    Send {
        pair: bool,
        header: [u8; HEADER_BYTES],
        len: Length,
        split: u8,
    },
    Buffer {
        pair: bool,
        len: Length,
        count: u8,
    },
    Command {
        class: u8,
        command: u8,
        data: Blob,
        answer: bool,
    },
    /// Commands that the device knows.
    Pairs(u8),
    GuestOffloads(u8),
    /// A frame comes from the world; most have a header that any driver takes.
    Frame {
        pair: bool,
        header: [u8; HEADER_BYTES],
        plain: u8,
        len: Length,
    },
    /// What the tap says to writes and settings from now on.
    Tap {
        full: bool,
        broken: bool,
        stiff: bool,
    },
    Turn,
    Reset,
    Save,
    TakeOver,
    Hostile {
        mac: [u8; 6],
        offloads: Option<u64>,
        pairs: u8,
        announce: bool,
        /// As the device's own would be: its address, its queues.
        near: bool,
        queues: Vec<Position>,
    },
    Announce,
    Seal,
    Commit,
    Pass,
}

#[derive(Arbitrary, Debug)]
struct Position {
    index: u8,
    next_avail: u16,
    next_used: u16,
}

/// A tap's queue without a tap.
struct FakeTap {
    /// Readable while frames wait; writable always.
    event: EventFd,
    frames: Mutex<VecDeque<Vec<u8>>>,
    sent: Mutex<Vec<Vec<u8>>>,
    full: AtomicBool,
    broken: AtomicBool,
    stiff: AtomicBool,
    /// Nothing was committed yet of what was held from the beginning.
    holds: AtomicBool,
}

impl FakeTap {
    fn new(held: bool) -> Arc<Self> {
        Arc::new(Self {
            event: EventFd::new(EFD_NONBLOCK).expect("a descriptor"),
            frames: Mutex::default(),
            sent: Mutex::default(),
            full: AtomicBool::new(false),
            broken: AtomicBool::new(false),
            stiff: AtomicBool::new(false),
            holds: AtomicBool::new(held),
        })
    }

    fn give(&self, frame: Vec<u8>) {
        let mut frames = self.frames.lock().unwrap();
        if frames.len() < 64 {
            frames.push_back(frame);
            self.event.write(1).expect("an event");
        }
    }

    fn behave(&self, full: bool, broken: bool, stiff: bool) {
        self.full.store(full, Ordering::Relaxed);
        self.broken.store(broken, Ordering::Relaxed);
        self.stiff.store(stiff, Ordering::Relaxed);
    }

    fn set(&self) -> io::Result<()> {
        if self.stiff.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        Ok(())
    }
}

impl TapQueue for FakeTap {
    fn fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    /// Never broken: the card would read again after some time by the clock.
    fn read(&self, frame: &mut [u8]) -> io::Result<usize> {
        let mut frames = self.frames.lock().unwrap();
        let Some(next) = frames.pop_front() else {
            // The event is spent with the last frame.
            let _ = self.event.read();
            return Err(io::ErrorKind::WouldBlock.into());
        };
        let len = next.len().min(frame.len());
        frame[..len].copy_from_slice(&next[..len]);
        Ok(len)
    }

    fn write(&self, frame: &[u8]) -> io::Result<usize> {
        assert!((FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&frame.len()), "{}", frame.len());
        // The device's own announcement is no output of the guest.
        let announcement = frame.get(24..26) == Some(&[0x80, 0x35]);
        assert!(!self.holds.load(Ordering::Relaxed) || announcement, "an uncommitted frame");
        if self.full.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if self.broken.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.sent.lock().unwrap().push(frame.to_vec());
        Ok(frame.len())
    }

    fn set_offloads(&self, _offloads: GuestOffloads) -> io::Result<()> {
        self.set()
    }

    fn set_enabled(&self, _enabled: bool) -> io::Result<()> {
        self.set()
    }
}

struct Card {
    net: Net,
    hands: Vec<Hand>,
    taps: Vec<Arc<FakeTap>>,
}

impl Card {
    fn new(pairs: u16, held: bool) -> Self {
        let net = Net::new(NetOptions {
            id: "_net0".to_owned(),
            tap: TapSource::Unnamed,
            mac: "52:54:00:12:34:56".parse().expect("an address"),
            mtu: Some(1500),
            host: TapSettings::default(),
            queue_pairs: pairs,
            queue_size: SIZE_MAX,
            offloads: Offloads { csum: true, tso: true, ufo: true },
            limits: Limits { frames: 16, bytes: 2 * FRAME_BYTES_MAX },
        });
        let net = net.expect("a good configuration");
        let taps: Vec<_> = (0..pairs).map(|_| FakeTap::new(held)).collect();
        let queues: Vec<_> = taps.iter().map(|tap| Arc::clone(tap) as Arc<dyn TapQueue>).collect();
        let hands = net.attach_by_hand(&queues).expect("descriptors");
        if held {
            net.gate().hold();
        }
        Self { net, hands, taps }
    }

    fn turn(&mut self) {
        for _ in 0..TURNS_MAX {
            let more = self.hands.iter_mut().fold(false, |more, hand| more | hand.turn());
            if !more {
                break;
            }
        }
    }

    fn release(&self) {
        for tap in &self.taps {
            tap.holds.store(false, Ordering::Relaxed);
        }
    }
}

/// A card without a driver, and its workers.
pub fn idle() -> (Arc<Net>, Vec<Hand>) {
    let card = Card::new(PAIRS_MAX, false);
    (Arc::new(card.net), card.hands)
}

struct Rig {
    card: Card,
    guest: Guest,
    pairs: u16,
    features: u64,
    active: bool,
    epoch: u64,
}

impl Rig {
    fn activate(&mut self) {
        let activation = self.guest.activation(self.features & self.card.net.features());
        self.card.net.activate(activation).expect("a card that is attached");
        self.active = true;
    }

    fn state(&self) -> NetState {
        let DeviceState::Net(state) = self.card.net.save() else { panic!("another's state") };
        state
    }

    fn transmit(&self, pair: bool) -> usize {
        2 * (usize::from(pair) % usize::from(self.pairs)) + 1
    }

    fn frame(&mut self, header: &[u8; HEADER_BYTES], len: Length) -> Vec<u8> {
        let mut frame = header.to_vec();
        let number = usize::try_from(len.0 >> 3).expect("small");
        let len = match len.0 % 8 {
            // About the shortest and the longest that is one.
            0 => FRAME_BYTES_MIN - 2 + number % 4,
            1 => FRAME_BYTES_MAX - 2 + number % 4,
            // Longer than any frame, now and then.
            _ => HEADER_BYTES + number % 70_000,
        };
        frame.resize(len, 0x5a);
        frame
    }

    fn send(&mut self, at: usize, frame: &[u8], split: u8) {
        let (first, rest) = frame.split_at(usize::from(split).min(frame.len()));
        let mut parts = Vec::new();
        for part in std::iter::once(first).chain(rest.chunks(40_000)) {
            if part.is_empty() {
                continue;
            }
            let place = self.guest.place(at, part);
            parts.push((place, u32::try_from(part.len()).expect("small"), 0));
        }
        let head = self.guest.chain(at, &parts);
        self.guest.offer(at, head);
    }

    fn command(&mut self, class: u8, command: u8, data: &[u8], answer: bool) {
        let many = self.features & self.card.net.features() & MQ != 0;
        let at = if many { 2 * usize::from(self.pairs) } else { 2 };
        let header = self.guest.place(at, &[class % 7, command % 3]);
        let len = data.len().min(256);
        let data = self.guest.place(at, &data[..len]);
        let mut parts = vec![(header, 2, 0)];
        if len > 0 {
            parts.push((data, u32::try_from(len).expect("small"), 0));
        }
        if answer {
            parts.push((self.guest.room(at, 1), 1, WRITE));
        }
        let head = self.guest.chain(at, &parts);
        self.guest.offer(at, head);
    }

    /// What the transport does with a state.
    fn go_on(&mut self, positions: &[QueuePosition]) {
        if self.guest.must_reset() {
            // The driver finds a device that waits for its reset.
            self.reset();
        } else if self.active {
            self.guest.set_positions(positions);
            self.activate();
        }
    }

    fn take_over(&mut self) {
        self.card.net.park();
        reached_all(self.card.net.counters());
        if self.active {
            reached("net: taken over while active");
        }
        let (state, positions) = (self.state(), self.card.net.queue_positions());
        let bytes = postcard::to_stdvec(&state).expect("a state that can be encoded");
        let decoded: NetState = postcard::from_bytes(&bytes).expect("what was encoded");
        assert_eq!(decoded, state);
        let next = Card::new(self.pairs, false);
        next.net.restore(&DeviceState::Net(decoded)).expect("the state of another card");
        self.card = next;
        self.go_on(&positions);
        self.card.net.announce();
    }

    fn hostile(&mut self, state: NetState) {
        self.card.net.reset();
        self.active = false;
        let positions = state.queues.clone();
        if self.card.net.restore(&DeviceState::Net(state)).is_ok() {
            reached("net: a made-up state is taken");
            self.active = true;
            self.go_on(&positions);
        } else {
            reached("net: a made-up state is refused");
            self.reset();
        }
    }

    fn reset(&mut self) {
        self.card.net.reset();
        self.guest.heard.resets.lock().unwrap().clear();
        self.activate();
    }

    fn act(&mut self, act: &Act) {
        match act {
            Act::Guest(act) => self.guest.act(act),
            Act::Send { pair, header, len, split } => {
                let frame = self.frame(header, *len);
                self.send(self.transmit(*pair), &frame, *split);
            }
            Act::Buffer { pair, len, count } => {
                let at = self.transmit(*pair) - 1;
                for _ in 0..=count % 8 {
                    let len = len.0 % 0x1_0000;
                    let room = self.guest.room(at, usize::try_from(len).expect("small"));
                    let head = self.guest.chain(at, &[(room, len, WRITE)]);
                    self.guest.offer(at, head);
                }
            }
            Act::Command { class, command, data, answer } => {
                self.command(*class, *command, &data.0, *answer);
            }
            Act::Pairs(pairs) => self.command(CLASS_MQ, 0, &[pairs % 4, 0], true),
            Act::GuestOffloads(set) => {
                // The bits of GUEST_CSUM to GUEST_UFO, and some beside them.
                let set = u64::from(*set) << 1;
                self.command(CLASS_GUEST_OFFLOADS, 0, &set.to_le_bytes(), true);
            }
            Act::Frame { pair, header, plain, len } => {
                let plain = !plain.is_multiple_of(4);
                let header = if plain { &[0; HEADER_BYTES] } else { header };
                let frame = self.frame(header, *len);
                let tap = usize::from(*pair) % usize::from(self.pairs);
                self.card.taps[tap].give(frame);
            }
            Act::Tap { full, broken, stiff } => {
                self.card.taps.iter().for_each(|tap| tap.behave(*full, *broken, *stiff));
            }
            Act::Turn => self.turn_all(),
            Act::Reset => self.reset(),
            Act::Save => {
                self.card.net.park();
                let state = self.state();
                assert!(state.queues.len() <= self.guest.rings.len(), "{state:?}");
                // A worker that is parked only waits, and may write what was committed.
                self.card.turn();
                assert_eq!(self.state(), state, "changed while parked");
                self.card.net.unpark();
            }
            Act::TakeOver => self.take_over(),
            Act::Hostile { mac, offloads, pairs, announce, near, queues } => {
                let position = |queue: &Position| QueuePosition {
                    index: u16::from(queue.index % 8),
                    next_avail: queue.next_avail,
                    next_used: queue.next_used,
                };
                let mut state = NetState {
                    mac: *mac,
                    guest_offloads: *offloads,
                    active_pairs: u16::from(*pairs % 4),
                    announce: *announce,
                    queues: queues.iter().take(8).map(position).collect(),
                };
                if *near {
                    state.mac = self.state().mac;
                    state.guest_offloads = offloads.map(|set| set & 0x7e);
                    (0..).zip(&mut state.queues).for_each(|(at, queue)| queue.index = at);
                }
                self.hostile(state);
            }
            Act::Announce => self.card.net.announce(),
            Act::Seal => {
                self.epoch += 1;
                self.card.net.park();
                self.card.net.gate().seal(self.epoch);
                self.card.net.unpark();
            }
            Act::Commit => {
                if self.epoch > 0 {
                    self.card.release();
                }
                self.card.net.gate().commit(self.epoch);
            }
            Act::Pass => {
                self.card.release();
                self.card.net.gate().pass();
            }
        }
    }

    fn turn_all(&mut self) {
        let said = |state: NetState| (state.mac, state.guest_offloads, state.active_pairs);
        let before = said(self.state());
        self.guest.rings.iter().for_each(|ring| ring.kick());
        self.card.turn();
        if said(self.state()) != before {
            reached("net: a command changed the state");
        }
    }

    /// A frame that a worker had read before the reset goes to a driver that forgets it.
    fn take_leftovers(&mut self) {
        let room = self.guest.room(0, 0x1000);
        for at in (0..2 * usize::from(self.pairs)).step_by(2) {
            for _ in 0..32 {
                let head = self.guest.chain(at, &[(room, 0x1000, WRITE)]);
                self.guest.offer(at, head);
            }
        }
        self.turn_all();
        self.card.net.reset();
        self.guest.settle();
        self.activate();
    }

    /// Frames both ways, by a driver that makes sense.
    fn talk(&mut self) {
        let mut frame = vec![0; HEADER_BYTES];
        frame.extend((0..64).map(|byte| byte ^ 0x33));
        self.send(1, &frame, 20);
        self.turn_all();
        assert_eq!(self.guest.used(1).map(|used| used.1), Some(0), "the frame is not answered");
        assert_eq!(self.card.taps[0].sent.lock().unwrap().last(), Some(&frame));
        let room = self.guest.place(0, &[0xee; 2048]);
        let head = self.guest.chain(0, &[(room, 2048, WRITE)]);
        self.guest.offer(0, head);
        self.turn_all();
        self.card.taps[0].give(frame.clone());
        self.turn_all();
        let used = self.guest.used(0).expect("a frame");
        assert_eq!(used, (head.into(), u32::try_from(frame.len()).expect("small")));
        // The device says over how many buffers the frame is spread.
        frame[10..12].copy_from_slice(&[1, 0]);
        assert_eq!(self.guest.get(room, frame.len()), frame);
    }
}

pub fn run(input: Input) {
    let pairs = if input.two_pairs { PAIRS_MAX } else { 1 };
    let places = input.places.into_iter().take(2 * usize::from(pairs) + 1);
    let mut rig = Rig {
        card: Card::new(pairs, input.held),
        guest: Guest::new(places),
        pairs,
        features: input.features,
        active: false,
        epoch: 0,
    };
    rig.activate();
    for act in &input.acts.0 {
        rig.act(act);
    }
    if rig.guest.must_reset() {
        reached("net: a ring that makes no sense");
    }
    reached_all(rig.card.net.counters());
    // What waited for the guest or for the tap goes.
    rig.card.taps.iter().for_each(|tap| tap.behave(false, false, false));
    rig.card.release();
    rig.card.net.gate().pass();
    rig.card.net.reset();
    rig.card.taps.iter().for_each(|tap| tap.frames.lock().unwrap().clear());
    rig.card.turn();
    rig.guest.settle();
    rig.features = !EVENT_IDX & !MQ;
    rig.activate();
    rig.take_leftovers();
    rig.talk();
}
