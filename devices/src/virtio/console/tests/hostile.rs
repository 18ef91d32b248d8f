//! A guest that attacks: it costs it its output or its device, and nobody else anything.

use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;
use std::thread;

use proptest::prelude::*;

use super::*;
use crate::output_gate::GATE_BYTES_MAX;

/// After whatever was done to it, the device still works.
#[track_caller]
fn assert_works(bench: &mut Bench) {
    bench.transmit.next_descriptor = 0;
    bench.print(b"fine");
    assert_eq!(bench.hear(4), b"fine");
    bench.transmit.wait_used(1);
    assert_eq!(bench.heard.reset_count(), 0);
}

#[test]
fn a_chain_that_is_no_output_is_answered_and_dropped() {
    let end = u64::try_from(MEMORY_BYTES).unwrap();
    let chains: [&[(u64, u32, u16)]; 7] = [
        &[(BUFFERS, 0, 0)],
        &[(BUFFERS, 100, 0), (BUFFERS, 0, 0)],
        &[(BUFFERS, 100, WRITE)],
        &[(BUFFERS, 100, 0), (BUFFERS, 100, WRITE)],
        &[(end - 10, 100, 0)],
        &[(BUFFERS, 12, 0), (u64::MAX - 4, 100, 0)],
        &[(BUFFERS, u32::MAX, 0), (BUFFERS, u32::MAX, 0)],
    ];
    let mut bench = Bench::new();
    for chain in chains {
        bench.transmit.next_descriptor = 0;
        bench.transmit.add(chain);
        bench.transmit.kick();
        assert_eq!(bench.transmit.wait_used(1), [(0, 0)], "{chain:?}");
    }
    assert_eq!(bench.counter("output_errors"), 7);
    assert_works(&mut bench);
}

#[test]
fn a_chain_that_does_not_end_is_dropped() {
    let mut bench = Bench::new();
    let table = BUFFERS + 0x8000;
    let cases: [&[Descriptor]; 3] = [
        &[(BUFFERS, 40, NEXT, 0)],
        &[(BUFFERS, 40, NEXT, 1), (BUFFERS, 1, NEXT, 0)],
        &[(BUFFERS, 40, NEXT, QUEUE_SIZE + 5)],
    ];
    for case in cases {
        for (slot, descriptor) in (0u16..).zip(case) {
            bench.transmit.descriptor(slot, *descriptor);
        }
        bench.transmit.offer(0);
        bench.transmit.kick();
        assert_eq!(bench.transmit.wait_used(1), [(0, 0)]);
    }
    // A loop in a table of its own, which was not even on offer.
    write_descriptor(&bench.memory, table, 0, (BUFFERS, 50, NEXT, 1));
    write_descriptor(&bench.memory, table, 1, (BUFFERS, 1, NEXT, 0));
    bench.transmit.descriptor(0, (table, 32, INDIRECT, 0));
    bench.transmit.offer(0);
    bench.transmit.kick();
    assert_eq!(bench.transmit.wait_used(1), [(0, 0)]);
    assert_eq!(bench.counter("output_errors"), 4);
    assert_works(&mut bench);
}

/// The same megabytes again and again: 64 times what the gate may hold.
#[test]
fn a_huge_chain_takes_neither_memory_nor_anybody_s_time() {
    let mut bench = Bench::new();
    bench.console.gate().hold();
    let part = (BUFFERS, u32::try_from(MEMORY_BYTES).unwrap() - 0x10_0000, 0);
    bench.transmit.add(&[part; 16]);
    bench.transmit.kick();
    let gate = Arc::clone(bench.console.gate());
    wait_for("the gate is throttled", || gate.throttled());
    settle();
    assert!(gate.held_bytes() <= GATE_BYTES_MAX);
    assert_eq!(bench.counter("output_dropped_bytes"), 0);
    // It is parked, saved and reset in the middle.
    bench.console.park();
    assert!(state_of(&bench.console).pending_output.len() <= GATE_BYTES_MAX);
    bench.console.unpark();
    bench.restart_rings();
    bench.console.gate().discard();
    bench.print(b"gone");
    bench.transmit.wait_used(1);
    assert_eq!(bench.heard.reset_count(), 0);
}

#[test]
fn a_ring_that_makes_no_sense_stops_the_device_until_its_reset() {
    type Attack = fn(&mut Ring);
    let attacks: [Attack; 2] = [
        |ring| {
            let avail = ring.avail.wrapping_add(QUEUE_SIZE + 1);
            ring.set_avail(avail);
        },
        |ring| ring.offer(QUEUE_SIZE),
    ];
    for attack in attacks {
        for index in [RECEIVE, TRANSMIT] {
            let mut bench = Bench::new();
            let ring = if index == RECEIVE { &mut bench.receive } else { &mut bench.transmit };
            attack(ring);
            ring.kick();
            bench.say(b"x");
            wait_for("the device gives up", || bench.heard.reset_count() == 1);
            // It answers nothing more, on no queue.
            bench.receive.kick();
            bench.transmit.kick();
            settle();
            assert_eq!((bench.receive.take_used(), bench.transmit.take_used()), (vec![], vec![]));
            assert_eq!(bench.heard.reset_count(), 1, "said once");
            // And works again after its reset, with the input that it had no buffer for.
            bench.restart_rings();
            bench.offer(3, 16);
            assert_eq!(bench.receive.wait_used(1), [(0, 1)]);
            bench.print(b"fine");
            assert_eq!(bench.hear(4), b"fine");
        }
    }
}

#[test]
fn a_receive_buffer_that_is_none_stops_the_device() {
    let chains: [&[(u64, u32, u16)]; 5] = [
        &[(BUFFERS, 2048, 0)],
        &[(BUFFERS, 0, WRITE)],
        &[(u64::MAX - 100, 2048, WRITE)],
        &[(BUFFERS, 2, WRITE), (BUFFERS, 2048, 0)],
        &[(BUFFERS, 2, WRITE), (u64::MAX - 100, 2048, WRITE)],
    ];
    for chain in chains {
        let mut bench = Bench::new();
        bench.memory.write_slice(&[0x5a; 4], GuestAddress(BUFFERS)).unwrap();
        bench.receive.add(chain);
        bench.receive.kick();
        bench.say(b"four");
        wait_for("the device gives up", || bench.heard.reset_count() == 1);
        assert_eq!(bench.receive.used_index(), 0);
        assert_eq!(bench.bytes(BUFFERS, 4), [0x5a; 4], "nothing is written in part");
    }
}

/// A transport holds its lock while it resets the device, and takes it to interrupt.
#[test]
fn a_reset_does_not_wait_for_an_interrupt() {
    struct Locked(Arc<Mutex<()>>, Arc<AtomicUsize>);
    impl Interrupt for Locked {
        fn queue(&self, _: u16) {
            self.1.fetch_add(1, Ordering::SeqCst);
            drop(self.0.lock().unwrap());
        }
        fn config(&self) {}
        fn needs_reset(&self, _: &str) {}
    }
    let mut bench = Bench::idle();
    let (lock, calls) = (Arc::default(), Arc::default());
    let mut activation = bench.activation(0);
    activation.interrupt = Arc::new(Locked(Arc::clone(&lock), Arc::clone(&calls)));
    bench.console.activate(activation).unwrap();
    let held = lock.lock().unwrap();
    bench.print(b"x");
    wait_for("the interrupt", || calls.load(Ordering::SeqCst) == 1);
    let console = &bench.console;
    thread::scope(|scope| {
        let held = held;
        let reset = scope.spawn(|| console.reset());
        wait_for("the reset", || reset.is_finished());
        drop(held);
    });
    console.park();
}

#[test]
fn a_device_is_reset_while_it_works() {
    let mut bench = Bench::new();
    for round in 0..50 {
        for place in 0..8 {
            bench.print(b"some output");
            bench.offer(place, 7);
        }
        bench.say(b"some input");
        if round % 2 == 0 {
            thread::yield_now();
        }
        bench.console.reset();
        // Nothing of the last activation touches guest memory any more.
        bench.memory.write_slice(&[0x5a; 0x10_0000], GuestAddress(0)).unwrap();
        thread::sleep(Duration::from_micros(200));
        assert!(bench.bytes(0, 0x10_0000).iter().all(|byte| *byte == 0x5a), "round {round}");
        bench.restart_rings();
    }
    bench.print(b"end");
    let mut heard = Vec::new();
    while !heard.ends_with(b"end") {
        heard.extend(bench.hear(1));
    }
    assert_eq!(bench.heard.reset_count(), 0);
}

fn garbage() -> impl Strategy<Value = Descriptor> {
    let address = prop_oneof![
        4 => (0..64u64).prop_map(|page| BUFFERS + (page << 12)),
        1 => any::<u64>(),
        1 => 0..0x10_0000u64,
    ];
    let len = prop_oneof![4 => 0..3000u32, 1 => any::<u32>(), 1 => 0..0x40_0000u32];
    (address, len, prop_oneof![4 => 0..8u16, 1 => any::<u16>()], 0..QUEUE_SIZE + 2)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Rings full of garbage, and input: the device ends by itself, whatever it has made of them.
    #[test]
    fn garbage_in_the_rings_is_survived(
        tables in prop::collection::vec(prop::collection::vec(garbage(), 16), 2),
        heads in prop::collection::vec(0..QUEUE_SIZE + 1, 2..40),
        event_idx in any::<bool>(),
    ) {
        let mut bench = Bench::idle();
        bench.activate(if event_idx { EVENT_IDX } else { 0 });
        bench.client.set_nonblocking(true).unwrap();
        let Bench { receive, transmit, client, .. } = &mut bench;
        let mut rings = [receive, transmit];
        for (ring, table) in rings.iter_mut().zip(&tables) {
            for (slot, descriptor) in (0u16..).zip(table) {
                ring.descriptor(slot, *descriptor);
            }
        }
        for (turn, head) in heads.iter().enumerate() {
            rings[turn % 2].offer(*head);
            rings[turn % 2].kick();
            // The socket may be full: nobody reads.
            let _ = client.write(b"some input");
        }
        bench.console.park();
        let state = bench.console.save();
        bench.console.unpark();
        bench.console.reset();
        bench.console.restore(&state).unwrap();
        bench.console.reset();
        prop_assert!(bench.heard.reset_count() <= 1);
    }
}
