//! Bytes both ways, what holds them up, and what ends that.

use super::*;
use crate::output_gate::THROTTLE_BYTES;
use crate::virtio::console::tx::PASS_BYTES_MAX;

#[test]
fn what_the_guest_prints_reaches_the_client_in_order() {
    let mut bench = Bench::new();
    bench.print(b"login: ");
    // Spread over a chain.
    bench.memory.write_slice(b"root\n", GuestAddress(BUFFERS + 0x30_0000)).unwrap();
    bench.transmit.add(&[(BUFFERS + 0x30_0000, 2, 0), (BUFFERS + 0x30_0002, 3, 0)]);
    bench.transmit.kick();
    assert_eq!(bench.hear(12), b"login: root\n");
    assert_eq!(bench.transmit.wait_used(2), [(0, 0), (1, 0)]);
    wait_for("the interrupt", || bench.heard.count(TRANSMIT) >= 1);
    assert_eq!(bench.counter("output_bytes"), 12);
    assert_eq!(bench.counter("output_errors"), 0);
}

#[test]
fn input_fills_one_buffer_after_the_other_and_waits_for_more() {
    let mut bench = Bench::new();
    bench.offer(0, 4);
    bench.receive.add(&[(INPUT + 0x1000, 3, WRITE), (INPUT + 0x2000, 3, WRITE)]);
    bench.receive.kick();
    bench.say(b"abcdefghijklmno");
    assert_eq!(bench.receive.wait_used(2), [(0, 4), (1, 6)]);
    assert_eq!(bench.input(0, 5), b"abcd\0");
    assert_eq!(bench.input(1, 3), b"efg");
    assert_eq!(bench.input(2, 3), b"hij");
    wait_for("the interrupt", || bench.heard.count(RECEIVE) >= 1);
    settle();
    assert_eq!(bench.receive.take_used(), []);
    // The rest comes with the next buffer, and no more of that than there is.
    bench.offer(5, 64);
    assert_eq!(bench.receive.wait_used(1), [(3, 5)]);
    assert_eq!(bench.input(5, 6), b"klmno\0");
    // More than the input thread holds.
    let long = pattern(5000);
    bench.say(&long);
    let mut seen = Vec::new();
    for place in 0..13 {
        bench.offer(place, 400);
        let (_, len) = bench.receive.wait_used(1)[0];
        seen.extend(bench.input(place, len as usize));
    }
    while seen.len() < long.len() {
        bench.offer(0, 400);
        let (_, len) = bench.receive.wait_used(1)[0];
        seen.extend(bench.input(0, len as usize));
    }
    assert_eq!(seen, long);
    assert_eq!(bench.counter("input_bytes"), 1 + 15 + 5000);
}

#[test]
fn input_waits_for_the_driver() {
    let mut bench = Bench::idle();
    bench.say(b"early");
    settle();
    bench.activate(0);
    bench.offer(0, 16);
    assert_eq!(bench.receive.wait_used(1), [(0, 5)]);
    assert_eq!(bench.input(0, 5), b"early");
}

#[test]
fn with_event_indices_both_sides_hear_what_they_asked_for() {
    let mut bench = Bench::idle();
    bench.activate(EVENT_IDX);
    // The driver wants to hear of the second answer, on both queues.
    bench.receive.set_used_event(1);
    bench.transmit.set_used_event(1);
    bench.say(b"in");
    bench.offer(0, 1);
    bench.receive.wait_used(1);
    bench.print(b"o");
    bench.transmit.wait_used(1);
    settle();
    assert_eq!((bench.heard.count(RECEIVE), bench.heard.count(TRANSMIT)), (0, 0));
    wait_for("the doorbell is asked for", || {
        bench.receive.avail_event() == 1 && bench.transmit.avail_event() == 1
    });
    bench.offer(1, 1);
    bench.print(b"ut");
    bench.receive.wait_used(1);
    bench.transmit.wait_used(1);
    wait_for("both", || (bench.heard.count(RECEIVE), bench.heard.count(TRANSMIT)) == (1, 1));
    assert_eq!(bench.hear(3), b"out");
}

#[test]
fn held_output_leaves_when_its_epoch_is_committed() {
    let mut bench = Bench::new();
    bench.console.gate().hold();
    bench.print(b"one ");
    bench.transmit.wait_used(1);
    bench.console.gate().seal(1);
    bench.print(b"two");
    bench.transmit.wait_used(1);
    bench.hears_nothing();
    assert_eq!(bench.console.gate().held_bytes(), 7);
    bench.console.gate().commit(1);
    assert_eq!(bench.hear(4), b"one ");
    bench.hears_nothing();
    bench.console.gate().pass();
    assert_eq!(bench.hear(3), b"two");
    bench.console.gate().discard();
    bench.print(b"never");
    bench.transmit.wait_used(1);
    bench.hears_nothing();
}

/// A guest that prints more than may wait is slowed down by its ring, and loses nothing.
#[test]
fn a_throttled_gate_leaves_the_output_in_the_ring() {
    let mut bench = Bench::new();
    let text = pattern(60_000);
    bench.console.gate().hold();
    let mut printed = 0;
    while !bench.console.gate().throttled() {
        bench.print(&text);
        bench.transmit.wait_used(1);
        printed += 1;
    }
    let held = bench.console.gate().held_bytes();
    assert!((THROTTLE_BYTES..THROTTLE_BYTES + PASS_BYTES_MAX).contains(&held));
    bench.print(&text);
    settle();
    assert_eq!(bench.transmit.take_used(), []);
    assert_eq!(bench.console.gate().held_bytes(), held);
    bench.console.gate().seal(1);
    bench.console.gate().commit(1);
    for _ in 0..printed {
        assert!(bench.hear(text.len()) == text);
    }
    // The room that made is used without another doorbell.
    bench.transmit.wait_used(1);
    bench.console.gate().seal(2);
    bench.console.gate().commit(2);
    assert!(bench.hear(text.len()) == text);
    assert_eq!(bench.counter("output_dropped_bytes"), 0);
}

#[test]
fn a_chain_that_is_longer_than_a_pass_is_taken_in_pieces() {
    let mut bench = Bench::new();
    let text = pattern(0x30_0000);
    bench.memory.write_slice(&text, GuestAddress(BUFFERS)).unwrap();
    bench.console.gate().hold();
    let half = 0x18_0000u32;
    bench.transmit.add(&[(BUFFERS, half, 0), (BUFFERS + u64::from(half), half, 0)]);
    bench.transmit.kick();
    let gate = Arc::clone(bench.console.gate());
    wait_for("the gate is throttled", || gate.throttled());
    settle();
    assert_eq!(gate.held_bytes(), THROTTLE_BYTES);
    assert_eq!(bench.transmit.take_used(), [], "not answered in part");
    gate.pass();
    assert!(bench.hear(text.len()) == text);
    assert_eq!(bench.transmit.wait_used(1), [(0, 0)]);
    assert_eq!(bench.counter("output_bytes"), text.len() as u64);
}

#[test]
fn a_console_that_leads_nowhere_takes_everything() {
    let console = Console::open("__console", &PortMode::Null).unwrap();
    let mut bench = Bench::idle();
    bench.console = console;
    bench.activate(0);
    bench.console.gate().hold();
    for _ in 0..16 {
        bench.transmit.add(&[(BUFFERS, 0x20_0000, 0)]);
    }
    bench.transmit.kick();
    bench.transmit.wait_used(16);
    assert_eq!(bench.counter("output_bytes"), 16 * 0x20_0000);
    assert_eq!(bench.console.gate().held_bytes(), 0);
}
