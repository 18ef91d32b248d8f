//! A guest that attacks: what it does costs it its frames or its device, and nobody else anything.

use proptest::prelude::*;

use super::*;
use crate::virtio::net::frame::FRAME_BYTES_MAX;

/// After whatever was done to it, the queue still works.
fn assert_transmits(bench: &mut Bench) {
    bench.transmit[0].next_descriptor = 0;
    bench.send(0, &frame(42, 64));
    assert_eq!(bench.worlds[0].receive(), frame(42, 64));
    assert_eq!(bench.heard.reset_count(), 0);
}

#[test]
fn a_chain_that_is_no_frame_is_answered_and_dropped() {
    let max = u32::try_from(FRAME_BYTES_MAX).unwrap();
    let end = u64::try_from(MEMORY_BYTES).unwrap();
    let chains: [&[(u64, u32, u16)]; 10] = [
        // Nothing, less than a header, a header alone.
        &[(BUFFERS, 0, 0)],
        &[(BUFFERS, 11, 0)],
        &[(BUFFERS, 12, 0)],
        &[(BUFFERS, 100, 0), (BUFFERS, 0, 0)],
        // Written by the device.
        &[(BUFFERS, 100, WRITE)],
        &[(BUFFERS, 100, 0), (BUFFERS, 100, WRITE)],
        // Elsewhere.
        &[(end - 10, 100, 0)],
        &[(BUFFERS, 12, 0), (u64::MAX - 4, 100, 0)],
        // Too long.
        &[(BUFFERS, max, 0), (BUFFERS, 1, 0)],
        &[(BUFFERS, u32::MAX, 0), (BUFFERS, u32::MAX, 0), (BUFFERS, u32::MAX, 0)],
    ];
    let mut bench = Bench::new(1);
    for chain in chains {
        bench.transmit[0].next_descriptor = 0;
        bench.transmit[0].add(chain);
        bench.transmit[0].kick();
        assert_eq!(bench.transmit[0].wait_used(1), [(0, 0)], "{chain:?}");
    }
    assert_eq!(bench.counter("tx_errors"), 10);
    assert_eq!(bench.worlds[0].try_receive(), None);
    assert_transmits(&mut bench);
}

#[test]
fn a_chain_that_does_not_end_is_dropped() {
    let mut bench = Bench::new(1);
    let outside = QUEUE_SIZE + 5;
    let cases: [&[Descriptor]; 3] = [
        &[(BUFFERS, 40, NEXT, 0)],
        &[(BUFFERS, 40, NEXT, 1), (BUFFERS, 1, NEXT, 0)],
        &[(BUFFERS, 40, NEXT, outside)],
    ];
    for case in cases {
        for (slot, descriptor) in (0u16..).zip(case) {
            bench.transmit[0].descriptor(slot, *descriptor);
        }
        bench.transmit[0].offer(0);
        bench.transmit[0].kick();
        assert_eq!(bench.transmit[0].wait_used(1), [(0, 0)]);
    }
    assert_eq!(bench.counter("tx_errors"), 3);
    assert_transmits(&mut bench);
}

#[test]
fn an_indirect_table_that_makes_no_sense_is_dropped() {
    let mut bench = Bench::new(1);
    let table = BUFFERS + 0x8000;
    let memory = Arc::clone(&bench.memory);
    let cases: [(Descriptor, &[Descriptor]); 6] = [
        // No table, half a descriptor, a table elsewhere.
        ((table, 0, INDIRECT, 0), &[]),
        ((table, 24, INDIRECT, 0), &[(BUFFERS, 50, 0, 0)]),
        ((u64::MAX - 64, 32, INDIRECT, 0), &[]),
        // A table in a table, a loop, more than the queue is long.
        ((table, 32, INDIRECT, 0), &[(BUFFERS, 50, NEXT, 1), (table, 32, INDIRECT, 0)]),
        ((table, 32, INDIRECT, 0), &[(BUFFERS, 50, NEXT, 1), (BUFFERS, 1, NEXT, 0)]),
        ((table, 16 * 65_535, INDIRECT, 0), &[(BUFFERS, 1, NEXT, 0)]),
    ];
    for (head, entries) in cases {
        for (slot, entry) in (0u16..).zip(entries) {
            write_descriptor(&memory, table, slot, *entry);
        }
        bench.transmit[0].descriptor(0, head);
        bench.transmit[0].offer(0);
        bench.transmit[0].kick();
        assert_eq!(bench.transmit[0].wait_used(1), [(0, 0)], "{head:?}");
    }
    assert_eq!(bench.counter("tx_errors"), 6);
    assert_transmits(&mut bench);
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
        for queue in 0..3 {
            let mut bench = Bench::new(1);
            let bench = &mut bench;
            let ring = match queue {
                0 => &mut bench.receive[0],
                1 => &mut bench.transmit[0],
                _ => &mut bench.control,
            };
            attack(ring);
            bench.worlds[0].send(&frame(1, 60));
            ring.kick();
            wait_for("the device gives up", || bench.heard.reset_count() == 1);
            // It answers nothing more, on no queue.
            let mut rings = [&mut bench.receive[0], &mut bench.transmit[0], &mut bench.control];
            rings.iter().for_each(|ring| ring.kick());
            settle();
            assert!(rings.iter_mut().all(|ring| ring.take_used().is_empty()));
            assert_eq!(bench.heard.reset_count(), 1, "said once");
            // And works again after its reset.
            bench.net.reset();
            bench.memory.write_slice(&[0; 0x10_0000], GuestAddress(0)).unwrap();
            bench.transmit[0] = Ring::new(&bench.memory, 1);
            bench.receive[0] = Ring::new(&bench.memory, 0);
            bench.control = Ring::new(&bench.memory, 2);
            bench.activate(bench.net.features() & !features::EVENT_IDX);
            bench.send(0, &frame(42, 64));
            assert_eq!(bench.worlds[0].receive(), frame(42, 64));
        }
    }
}

#[test]
fn a_receive_buffer_that_is_none_stops_the_device() {
    let chains: [&[(u64, u32, u16)]; 5] = [
        &[(BUFFERS, 2048, 0)],
        &[(BUFFERS, 0, WRITE)],
        &[(u64::MAX - 100, 2048, WRITE)],
        &[(BUFFERS, 20, WRITE), (BUFFERS, 2048, 0)],
        &[(BUFFERS, 20, WRITE), (u64::MAX - 100, 2048, WRITE)],
    ];
    for chain in chains {
        let mut bench = Bench::new(1);
        bench.write(BUFFERS, &[0x5a; 20]);
        bench.receive[0].add(chain);
        bench.receive[0].kick();
        bench.worlds[0].send(&frame(1, 60));
        wait_for("the device gives up", || bench.heard.reset_count() == 1);
        assert_eq!(bench.receive[0].used_index(), 0);
        assert_eq!(bench.read(BUFFERS, 20), [0x5a; 20], "nothing is written in part");
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
    let mut bench = Bench::idle(options(1));
    let (lock, calls) = (Arc::default(), Arc::default());
    let mut activation = bench.activation(bench.net.features() & !features::EVENT_IDX);
    activation.interrupt = Arc::new(Locked(Arc::clone(&lock), Arc::clone(&calls)));
    bench.net.activate(activation).unwrap();
    let held = lock.lock().unwrap();
    bench.send(0, &frame(1, 60));
    wait_for("the interrupt", || calls.load(Ordering::SeqCst) == 1);
    let net = &bench.net;
    thread::scope(|scope| {
        let held = held;
        let reset = scope.spawn(|| net.reset());
        wait_for("the reset", || reset.is_finished());
        drop(held);
    });
    // Parking does: nobody interrupts any more.
    net.park();
}

#[test]
fn a_device_is_reset_while_it_works() {
    let mut bench = Bench::new(2);
    let features = bench.net.features() & !features::EVENT_IDX;
    for round in 0..50u8 {
        for seed in 0..8 {
            bench.send(0, &frame(seed, 60));
            // Nobody reads while the device is reset, so the socket may be full.
            let _ = bench.worlds[0].0.send(&frame(seed, 60));
            bench.offer(0, BUFFERS + 0x20_0000, 2048);
        }
        if round % 2 == 0 {
            thread::yield_now();
        }
        bench.net.reset();
        // Nothing of the last activation touches guest memory any more.
        bench.memory.write_slice(&[0x5a; 0x10_0000], GuestAddress(0)).unwrap();
        thread::sleep(Duration::from_micros(200));
        assert!(bench.read(0, 0x10_0000).iter().all(|byte| *byte == 0x5a), "round {round}");
        bench.memory.write_slice(&[0; 0x10_0000], GuestAddress(0)).unwrap();
        for pair in 0..2 {
            bench.transmit[pair] = Ring::new(&bench.memory, bench.transmit[pair].index);
            bench.receive[pair] = Ring::new(&bench.memory, bench.receive[pair].index);
        }
        bench.control = Ring::new(&bench.memory, 4);
        while bench.worlds[0].try_receive().is_some() {}
        bench.activate(features);
    }
    bench.send(0, &frame(200, 64));
    wait_for("it works", || bench.worlds[0].try_receive() == Some(frame(200, 64)));
}

fn garbage() -> impl Strategy<Value = Descriptor> {
    let address = prop_oneof![
        4 => (0..64u64).prop_map(|page| BUFFERS + (page << 12)),
        1 => any::<u64>(),
        1 => 0..0x10_0000u64,
    ];
    let len = prop_oneof![4 => 0..3000u32, 1 => any::<u32>(), 1 => 0..200_000u32];
    (address, len, prop_oneof![4 => 0..8u16, 1 => any::<u16>()], 0..QUEUE_SIZE + 2)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Rings full of garbage on all queues, and traffic: the device ends by itself, whatever it
    /// has made of them.
    #[test]
    fn garbage_in_the_rings_is_survived(
        tables in prop::collection::vec(prop::collection::vec(garbage(), 16), 3),
        heads in prop::collection::vec(0..QUEUE_SIZE + 1, 3..40),
        event_idx in any::<bool>(),
    ) {
        let wanted = if event_idx { u64::MAX } else { !features::EVENT_IDX };
        let mut bench = Bench::with_features(options(1), wanted);
        let Bench { receive, transmit, control, worlds, .. } = &mut bench;
        let mut rings = [&mut receive[0], &mut transmit[0], control];
        for (ring, table) in rings.iter_mut().zip(&tables) {
            for (slot, descriptor) in (0u16..).zip(table) {
                ring.descriptor(slot, *descriptor);
            }
        }
        for (turn, head) in heads.iter().enumerate() {
            rings[turn % 3].offer(*head);
            rings[turn % 3].kick();
            // The socket may be full: nobody reads.
            let _ = worlds[0].0.send(&frame(1, 500));
        }
        bench.net.park();
        bench.net.save();
        bench.net.unpark();
        bench.net.reset();
        prop_assert!(bench.heard.reset_count() <= 1);
    }
}
