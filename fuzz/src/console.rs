//! virtio-console: chains that make no sense in either direction, output that is held, sealed and
//! committed, resets and take-overs in the middle.

use std::sync::Arc;

use arbitrary::Arbitrary;
use devices::output_gate::GATE_BYTES_MAX;
use devices::virtio::console::{ByHand, Console};
use devices::virtio::device::VirtioDevice;

use crate::TURNS_MAX;
use crate::guest::{Blob, Guest, GuestAct, Place, Rest, WRITE};
use crate::reach::{reached, reached_all};

/// Counters of the device, and what its driver made of it.
pub const PLACES: &[&str] = &[
    "input_bytes",
    "output_errors",
    "console: output is held",
    "console: output leaves with its epoch",
    "console: a state with output",
    "console: a ring that makes no sense",
];

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

#[derive(Arbitrary, Debug)]
pub struct Input {
    features: u64,
    places: [Option<Place>; 2],
    acts: Rest<Act>,
}

#[derive(Arbitrary, Debug)]
enum Act {
    Guest(GuestAct),
    Turn,
    /// From the host.
    Input(Blob),
    /// The host has taken what was released.
    Written,
    Seal,
    Commit {
        behind: u8,
    },
    /// Its state, and another device that goes on from it.
    TakeOver,
    Reset,
}

/// A protected console without a driver.
pub fn idle() -> (Console, ByHand) {
    let (console, worker) = Console::by_hand("__console").expect("descriptors");
    console.gate().hold();
    (console, worker)
}

struct Rig {
    console: Console,
    worker: ByHand,
    guest: Guest,
    epoch: u64,
}

impl Rig {
    fn new(places: [Option<Place>; 2]) -> Self {
        let (console, worker) = idle();
        Self { console, worker, guest: Guest::new(places), epoch: 0 }
    }

    fn turn(&mut self) {
        for _ in 0..TURNS_MAX {
            let more = self.worker.turn();
            let held = self.console.gate().pending().len();
            assert!(held <= GATE_BYTES_MAX, "{held} bytes are held");
            if !more {
                break;
            }
        }
    }

    fn activate(&self, features: u64) {
        let activation = self.guest.activation(features & self.console.features());
        self.console.activate(activation).expect("a device with both queues");
    }

    fn written(&self) {
        let gate = self.console.gate();
        gate.consume(gate.pending().len() - gate.held_bytes());
    }

    fn take_over(&mut self, features: u64) {
        self.console.park();
        let (state, positions) = (self.console.save(), self.console.queue_positions());
        assert!(positions.len() <= 2);
        let pending = self.console.gate().pending();
        if !pending.is_empty() {
            reached("console: a state with output");
        }
        (self.console, self.worker) = idle();
        self.console.restore(&state).expect("its own state");
        assert_eq!(self.console.gate().pending(), pending, "no output is lost");
        self.guest.set_positions(&positions);
        self.activate(features);
    }

    fn act(&mut self, act: &Act, features: u64) {
        match act {
            Act::Guest(act) => self.guest.act(act),
            Act::Turn => self.turn(),
            Act::Input(bytes) => assert!(self.worker.input(&bytes.0) <= bytes.0.len()),
            Act::Written => self.written(),
            Act::Seal => {
                self.epoch += 1;
                if self.console.gate().open_bytes() > 0 {
                    reached("console: output is held");
                }
                self.console.gate().seal(self.epoch);
            }
            Act::Commit { behind } => {
                let before = self.console.gate().held_bytes();
                self.console.gate().commit(self.epoch.saturating_sub(u64::from(*behind)));
                if self.console.gate().held_bytes() < before {
                    reached("console: output leaves with its epoch");
                }
            }
            Act::TakeOver => self.take_over(features),
            Act::Reset => {
                self.console.reset();
                self.guest.heard = Arc::default();
                self.activate(features);
            }
        }
    }
}

/// No panic, no output lost by a take-over, and after a reset the device serves a driver that makes
/// sense.
pub fn run(input: Input) {
    let mut rig = Rig::new(input.places);
    rig.activate(input.features);
    for act in &input.acts.0 {
        rig.act(act, input.features);
    }
    if !rig.guest.heard.resets.lock().unwrap().is_empty() {
        reached("console: a ring that makes no sense");
    }
    reached_all(rig.console.counters());
    rig.console.reset();
    rig.guest.settle();
    rig.console.gate().seal(u64::MAX);
    rig.console.gate().commit(u64::MAX);
    rig.written();
    rig.activate(0);
    let text = rig.guest.place(TRANSMIT, b"hello");
    let head = rig.guest.chain(TRANSMIT, &[(text, 5, 0)]);
    rig.guest.offer(TRANSMIT, head);
    rig.turn();
    assert_eq!(rig.guest.used(TRANSMIT), Some((head.into(), 0)));
    assert_eq!(rig.console.gate().pending(), b"hello");
    let room = rig.guest.place(RECEIVE, &[0xee; 16]);
    let head = rig.guest.chain(RECEIVE, &[(room, 16, WRITE)]);
    rig.guest.offer(RECEIVE, head);
    assert_eq!(rig.worker.input(b"input"), 5);
    assert_eq!(rig.guest.used(RECEIVE), Some((head.into(), 5)));
    assert_eq!(rig.guest.get(room, 5), b"input");
}
