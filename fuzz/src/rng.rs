//! virtio-rng: chains that make no sense, resets and parks in the middle.

use std::sync::Arc;

use arbitrary::Arbitrary;
use devices::virtio::device::VirtioDevice;
use devices::virtio::rng::{Rng, STOCK_BYTES};

use crate::TURNS_MAX;
use crate::guest::{Guest, GuestAct, Place, Rest, WRITE};
use crate::reach::{reached, reached_all};

/// Counters of the device, and what its driver made of it.
pub const PLACES: &[&str] = &["bytes", "rng: a ring that makes no sense"];

#[derive(Arbitrary, Debug)]
pub struct Input {
    features: u64,
    place: Option<Place>,
    acts: Rest<Act>,
}

#[derive(Arbitrary, Debug)]
enum Act {
    Guest(GuestAct),
    Turn,
    Park,
    Reset,
}

/// A device without a driver.
pub fn idle() -> Rng {
    let rng = Rng::new("_rng0", "/dev/zero".into()).expect("descriptors");
    rng.work_by_hand();
    rng.attach().expect("/dev/zero");
    rng
}

struct Rig {
    rng: Rng,
    guest: Guest,
    stock: Vec<u8>,
}

impl Rig {
    fn turn(&mut self) {
        for _ in 0..TURNS_MAX {
            let more = self.rng.turn(&mut self.stock);
            assert!(self.stock.len() <= STOCK_BYTES);
            if !more {
                break;
            }
        }
    }

    fn activate(&self, features: u64) {
        let activation = self.guest.activation(features & self.rng.features());
        self.rng.activate(activation).expect("a device that is attached");
    }
}

/// No panic, and after a reset the device serves a driver that makes sense.
pub fn run(input: Input) {
    let mut rig = Rig { rng: idle(), guest: Guest::new([input.place]), stock: Vec::new() };
    rig.activate(input.features);
    for act in &input.acts.0 {
        match act {
            Act::Guest(act) => rig.guest.act(act),
            Act::Turn => rig.turn(),
            Act::Park => {
                rig.rng.park();
                assert!(rig.rng.queue_positions().len() <= 1);
                rig.rng.restore(&rig.rng.save()).expect("its own state");
                rig.rng.unpark();
            }
            Act::Reset => {
                rig.rng.reset();
                rig.guest.heard = Arc::default();
                rig.activate(input.features);
            }
        }
    }
    if !rig.guest.heard.resets.lock().unwrap().is_empty() {
        reached("rng: a ring that makes no sense");
    }
    reached_all(rig.rng.counters());
    rig.rng.reset();
    rig.guest.settle();
    rig.activate(0);
    let room = rig.guest.place(0, &[0xee; 64]);
    let head = rig.guest.chain(0, &[(room, 64, WRITE)]);
    rig.guest.offer(0, head);
    // What is left of the stock may be less than the buffer.
    rig.stock.clear();
    rig.turn();
    assert_eq!(rig.guest.used(0), Some((head.into(), 64)));
    assert_eq!(rig.guest.get(room, 64), [0; 64]);
}
