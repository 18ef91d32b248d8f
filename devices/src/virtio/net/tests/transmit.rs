//! From the guest to the tap, past the gate.

use super::*;

#[test]
fn a_frame_goes_straight_out_in_pass_mode() {
    let mut bench = Bench::new(1);
    let sent = frame(1, 100);
    let head = bench.send(0, &sent);
    assert_eq!(bench.worlds[0].receive(), sent);
    assert_eq!(bench.transmit[0].wait_used(1), [(u32::from(head), 0)]);
    assert_eq!(bench.heard.count(1), 1);
    assert_eq!((bench.counter("tx_frames"), bench.counter("tx_bytes")), (1, 100));
}

#[test]
fn a_frame_is_gathered_from_a_chain_and_an_indirect_table() {
    let mut bench = Bench::new(1);
    let sent = frame(9, 3000);
    bench.write(BUFFERS, &sent);
    let parts = [(0u64, 12u32), (12, 1000), (1012, 1), (1013, 1999)];
    let chain: Vec<_> = parts.iter().map(|(at, len)| (BUFFERS + at, *len, 0)).collect();
    bench.transmit[0].add(&chain);
    bench.transmit[0].kick();
    assert_eq!(bench.worlds[0].receive(), sent);

    let table = BUFFERS + 0x8000;
    for (slot, (at, len)) in (0u16..).zip(parts) {
        let flags = if slot < 3 { NEXT } else { 0 };
        write_descriptor(&bench.memory, table, slot, (BUFFERS + at, len, flags, slot + 1));
    }
    bench.transmit[0].add(&[(table, 4 * 16, INDIRECT)]);
    bench.transmit[0].kick();
    assert_eq!(bench.worlds[0].receive(), sent);
    bench.transmit[0].wait_used(2);
}

#[test]
fn nothing_of_an_epoch_leaves_before_its_commit() {
    let mut bench = Bench::new(2);
    bench.net.gate().hold();
    for seed in 0..3 {
        bench.send(0, &frame(seed, 60));
    }
    bench.send(1, &frame(10, 60));
    // Answered at once, though they wait.
    bench.transmit[0].wait_used(3);
    bench.transmit[1].wait_used(1);
    bench.net.park();
    bench.net.gate().seal(7);
    bench.net.unpark();
    bench.send(0, &frame(3, 60));
    bench.transmit[0].wait_used(1);
    settle();
    assert_eq!(bench.worlds[0].try_receive(), None);
    bench.net.gate().commit(6);
    settle();
    assert_eq!(bench.worlds[0].try_receive(), None);
    assert_eq!(bench.net.gate().held_bytes(), 5 * 72);
    // Also while the device is parked: what is committed leaves.
    bench.net.park();
    bench.net.gate().commit(7);
    // The second pair is not in use by the driver, so its queue of the tap is disabled and its
    // frame leaves by the first; pairs do not wait for each other.
    let mut left: Vec<_> = (0..4).map(|_| bench.worlds[0].receive()).collect();
    left.retain(|sent| *sent != frame(10, 60));
    assert_eq!(left, [0, 1, 2].map(|seed| frame(seed, 60)));
    bench.net.unpark();
    settle();
    assert_eq!(bench.worlds[0].try_receive(), None);
    assert_eq!(bench.net.gate().open_bytes(), 72);
    assert_eq!(bench.counter("tx_held_frames"), 5);
}

#[test]
fn a_parked_device_takes_nothing_from_the_guest() {
    let mut bench = Bench::new(1);
    bench.net.gate().hold();
    bench.net.park();
    bench.send(0, &frame(1, 60));
    settle();
    assert_eq!((bench.transmit[0].used_index(), bench.net.gate().open_bytes()), (0, 0));
    bench.net.unpark();
    bench.transmit[0].wait_used(1);
    assert_eq!(bench.net.gate().open_bytes(), 72);
}

#[test]
fn a_full_gate_stops_the_guest_and_resumes_it() {
    let limits = Limits { frames: 4, ..Limits::default() };
    let mut bench = Bench::with_features(NetOptions { limits, ..options(1) }, !features::EVENT_IDX);
    bench.net.gate().hold();
    for seed in 0..10 {
        bench.send(0, &frame(seed, 60));
    }
    bench.transmit[0].wait_used(4);
    settle();
    assert_eq!(bench.transmit[0].take_used(), []);
    assert_eq!(bench.net.gate().held_bytes(), 4 * 72);
    for epoch in 1..=3 {
        bench.net.gate().seal(epoch);
        bench.net.gate().commit(epoch);
        let taken = if epoch == 3 { 0 } else { 4.min(10 - 4 * epoch) };
        bench.transmit[0].wait_used(usize::try_from(taken).unwrap());
    }
    for seed in 0..10 {
        assert_eq!(bench.worlds[0].receive(), frame(seed, 60), "order");
    }
    assert!(bench.counter("tx_gate_full") >= 2);
}

#[test]
fn a_tap_that_takes_nothing_is_waited_for() {
    let mut bench = Bench::new(1);
    // Until the socket is full and the ring as well.
    let mut sent = 0u8;
    let mut answered = 0;
    let start = Instant::now();
    while bench.transmit[0].avail.wrapping_sub(bench.transmit[0].used_index()) < QUEUE_SIZE {
        if bench.transmit[0].avail.wrapping_sub(bench.transmit[0].used_index()) < QUEUE_SIZE {
            bench.send(0, &frame(sent, 8000));
            sent = sent.wrapping_add(1);
        }
        answered += bench.transmit[0].take_used().len();
        thread::sleep(Duration::from_micros(200));
        assert!(start.elapsed() < Duration::from_secs(20), "never full: {answered}");
        assert!(sent < 250, "a socket takes less than that");
    }
    settle();
    let writes = bench.taps[0].writes.load(Ordering::SeqCst);
    settle();
    settle();
    // It waits for the socket and does not ask again and again.
    assert_eq!(bench.taps[0].writes.load(Ordering::SeqCst), writes);
    assert!(!bench.net.gate().is_full());
    for seed in 0..sent {
        assert_eq!(bench.worlds[0].receive(), frame(seed, 8000), "frame {seed}");
    }
    assert_eq!(bench.counter("tx_dropped"), 0);
    wait_for("the ring is empty", || bench.transmit[0].used_index() == bench.transmit[0].avail);
}

#[test]
fn a_frame_that_the_host_refuses_is_dropped_and_counted() {
    let mut bench = Bench::new(1);
    for errno in [libc::EIO, libc::ENETDOWN, libc::EINVAL, libc::ENOBUFS] {
        bench.taps[0].write_errno.store(errno, Ordering::SeqCst);
        bench.send(0, &frame(0, 60));
        bench.transmit[0].wait_used(1);
        let dropped = bench.counter("tx_dropped");
        wait_for("the frame is dropped", || bench.net.gate().released_frames() == 0);
        wait_for("it is counted", || bench.counter("tx_dropped") >= dropped.max(1));
    }
    wait_for("all are counted", || bench.counter("tx_dropped") == 4);
    bench.taps[0].write_errno.store(0, Ordering::SeqCst);
    bench.send(0, &frame(5, 60));
    assert_eq!(bench.worlds[0].receive(), frame(5, 60));
}

#[test]
fn the_driver_hears_of_what_it_wants_to_hear() {
    let mut bench = Bench::with_features(options(1), u64::MAX);
    // With event indices: of the second used buffer, not of the first.
    bench.transmit[0].set_used_event(1);
    bench.send(0, &frame(0, 60));
    bench.transmit[0].wait_used(1);
    settle();
    assert_eq!(bench.heard.count(1), 0);
    bench.send(0, &frame(1, 60));
    bench.transmit[0].wait_used(1);
    wait_for("the interrupt", || bench.heard.count(1) == 1);
    wait_for("the device asks for the doorbell", || bench.transmit[0].avail_event() == 2);

    let mut bench = Bench::new(1);
    bench.transmit[0].set_avail_flags(1);
    bench.send(0, &frame(0, 60));
    bench.transmit[0].wait_used(1);
    settle();
    assert_eq!(bench.heard.count(1), 0);
    bench.transmit[0].set_avail_flags(0);
    bench.send(0, &frame(0, 60));
    wait_for("the interrupt", || bench.heard.count(1) == 1);
    wait_for("the doorbell is wanted", || bench.transmit[0].used_flags() == 0);
}

#[test]
fn output_that_begins_to_wait_is_reported() {
    let mut bench = Bench::new(1);
    let (seen, opened) = std::sync::mpsc::channel();
    let seen = Mutex::new(seen);
    bench.net.gate().set_waker(Arc::new(move || seen.lock().unwrap().send(()).unwrap()));
    bench.net.gate().hold();
    bench.send(0, &frame(0, 60));
    opened.recv_timeout(Duration::from_secs(20)).unwrap();
}

#[test]
fn what_is_discarded_is_answered_and_gone() {
    let mut bench = Bench::new(1);
    bench.net.gate().hold();
    bench.send(0, &frame(0, 60));
    bench.transmit[0].wait_used(1);
    bench.net.gate().discard();
    bench.send(0, &frame(1, 60));
    bench.transmit[0].wait_used(1);
    bench.net.gate().pass();
    settle();
    assert_eq!(bench.worlds[0].try_receive(), None);
    assert_eq!(bench.counter("tx_discarded_frames"), 2);
}
