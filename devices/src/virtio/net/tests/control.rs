//! Commands of the driver, and what they do to the tap.

use super::*;
use crate::virtio::net::features::{GUEST_CSUM, GUEST_TSO4, MQ};

const COMMAND: u64 = BUFFERS;
const ANSWER: u64 = BUFFERS + 0x1000;

impl Bench {
    /// Gives a command and returns its answer.
    fn command(&mut self, bytes: &[u8]) -> u8 {
        self.write(COMMAND, bytes);
        self.write(ANSWER, &[0xee]);
        let len = u32::try_from(bytes.len()).unwrap();
        self.control.add(&[(COMMAND, 2, 0), (COMMAND + 2, len - 2, 0), (ANSWER, 1, WRITE)]);
        self.control.kick();
        let used = self.control.wait_used(1);
        assert_eq!(used[0].1, 1);
        self.read(ANSWER, 1)[0]
    }

    fn pairs(&mut self, pairs: u16) -> u8 {
        let [low, high] = pairs.to_le_bytes();
        self.command(&[4, 0, low, high])
    }

    fn guest_offloads(&mut self, set: u64) -> u8 {
        let mut bytes = vec![5, 0];
        bytes.extend(set.to_le_bytes());
        self.command(&bytes)
    }

    fn enabled(&self) -> Vec<bool> {
        self.taps.iter().map(|tap| *tap.enabled.lock().unwrap()).collect()
    }
}

#[test]
fn the_driver_uses_one_pair_until_it_asks_for_more() {
    let mut bench = Bench::new(3);
    wait_for("one queue of the tap is in use", || bench.enabled() == [true, false, false]);
    bench.offer(1, BUFFERS + 0x2000, 2048);
    bench.worlds[1].send(&frame(1, 60));
    settle();
    assert_eq!(bench.receive[1].used_index(), 0);
    assert_eq!(bench.pairs(2), 0);
    assert_eq!(bench.enabled(), [true, true, false]);
    bench.receive[1].wait_used(1);
    for pairs in [0, 4, u16::MAX] {
        assert_eq!(bench.pairs(pairs), 1);
    }
    assert_eq!(bench.enabled(), [true, true, false]);
    assert_eq!(bench.pairs(1), 0);
    assert_eq!(bench.enabled(), [true, false, false]);
    assert_eq!(bench.counter("control_commands"), 2);
    assert_eq!(bench.counter("control_errors"), 3);
}

#[test]
fn the_control_queue_is_the_third_without_several_pairs() {
    let mut bench = Bench::idle(options(2));
    let features = bench.net.features() & !(features::EVENT_IDX | MQ);
    bench.control = Ring::new(&bench.memory, 2);
    let mut activation = bench.activation(features);
    activation.queues.retain(|queue| queue.index < 2);
    activation.queues.push(bench.control.active());
    bench.net.activate(activation).unwrap();
    assert_eq!(bench.guest_offloads(0), 0);
    assert_eq!(bench.pairs(2), 1, "not negotiated");
}

#[test]
fn the_guest_chooses_what_it_receives() {
    let mut bench = Bench::new(1);
    let tap = Arc::clone(&bench.taps[0]);
    let known = || tap.offloads.lock().unwrap().map(GuestOffloads::bits);
    wait_for("what was negotiated", || known().is_some_and(|bits| bits & GUEST_TSO4 != 0));
    assert_eq!(bench.guest_offloads(GUEST_CSUM), 0);
    assert_eq!(known(), Some(GUEST_CSUM), "done before it is answered");
    assert_eq!(bench.guest_offloads(1 << 40), 1);
    assert_eq!(known(), Some(GUEST_CSUM));
    // A host that refuses is no success.
    tap.offloads_errno.store(libc::EINVAL, Ordering::SeqCst);
    assert_eq!(bench.guest_offloads(0), 1);
    bench.net.park();
    let DeviceState::Net(state) = bench.net.save() else { panic!() };
    assert_eq!(state.guest_offloads, Some(GUEST_CSUM));
}

#[test]
fn what_is_no_command_is_an_error() {
    let mut bench = Bench::new(2);
    for bytes in [
        &[0, 0, 1][..],
        &[1, 1, 0, 0, 0, 0, 0, 0],
        &[4, 0, 2],
        &[4, 0, 2, 0, 0],
        &[4, 7, 2, 0],
        &[5, 0, 0, 0],
        &[0xff; 4000],
    ] {
        assert_eq!(bench.command(bytes), 1, "{bytes:?}");
    }
    assert_eq!(bench.heard.reset_count(), 0);
    assert_eq!(bench.pairs(2), 0);
}

#[test]
fn a_command_without_room_for_its_answer_is_given_back() {
    let mut bench = Bench::new(1);
    bench.write(COMMAND, &[3, 0]);
    let chains: [&[(u64, u32, u16)]; 4] = [
        &[(COMMAND, 2, 0)],
        &[(ANSWER, 1, WRITE), (COMMAND, 2, 0)],
        &[(COMMAND, 2, 0), (u64::MAX - 8, 4, WRITE)],
        &[(COMMAND, 0, 0), (ANSWER, 1, WRITE)],
    ];
    for chain in chains {
        let head = bench.control.add(chain);
        bench.control.kick();
        assert_eq!(bench.control.wait_used(1), [(u32::from(head), 0)]);
    }
    assert_eq!(bench.counter("control_errors"), 4);
    assert_eq!(bench.command(&[3, 0, 0]), 1);
    assert_eq!(bench.heard.reset_count(), 0);
}

#[test]
fn a_command_that_is_not_answered_is_carried_out_by_the_replica() {
    let mut primary = Bench::new(2);
    primary.net.park();
    primary.write(COMMAND, &[4, 0, 2, 0]);
    primary.control.add(&[(COMMAND, 4, 0), (ANSWER, 1, WRITE)]);
    primary.control.kick();
    settle();
    assert_eq!(primary.control.used_index(), 0);
    let state = primary.net.save();

    let mut replica = Bench::idle(options(2));
    replica.net.park();
    replica.net.restore(&state).unwrap();
    replica.memory = Arc::clone(&primary.memory);
    std::mem::swap(&mut replica.control, &mut primary.control);
    replica.activate(primary.net.features() & !features::EVENT_IDX);
    replica.net.unpark();
    replica.control.wait_used(1);
    assert_eq!(replica.read(ANSWER, 1), [0]);
    assert_eq!(replica.enabled(), [true, true]);
}
