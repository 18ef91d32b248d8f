//! From the tap to the guest.

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::*;
use crate::virtio::net::features::{GUEST_CSUM, GUEST_TSO4, MRG_RXBUF};
use crate::virtio::net::frame::FRAME_BYTES_MAX;

/// `frame` as the guest sees it, spread over `buffers`.
fn delivered(mut frame: Vec<u8>, buffers: u8) -> Vec<u8> {
    frame[10] = buffers;
    frame
}

#[test]
fn a_frame_reaches_the_guest() {
    let mut bench = Bench::new(1);
    let head = bench.offer(0, BUFFERS, 2048);
    bench.worlds[0].send(&frame(1, 300));
    assert_eq!(bench.receive[0].wait_used(1), [(u32::from(head), 312)]);
    assert_eq!(bench.read(BUFFERS, 312), delivered(frame(1, 300), 1));
    wait_for("the interrupt", || bench.heard.count(0) == 1);
    assert_eq!((bench.counter("rx_frames"), bench.counter("rx_bytes")), (1, 300));
    // The device's write is known to be one.
    let region = bench.memory.iter().next().unwrap();
    assert!(region.bitmap().dirty_at(usize::try_from(BUFFERS).unwrap()));
}

#[test]
fn reception_is_not_held_back() {
    let mut bench = Bench::new(1);
    bench.net.gate().hold();
    bench.offer(0, BUFFERS, 2048);
    bench.worlds[0].send(&frame(1, 300));
    bench.receive[0].wait_used(1);
}

#[test]
fn a_large_frame_is_spread_over_buffers_that_appear_together() {
    let mut bench = Bench::new(1);
    // Too few at first: nothing is used.
    let first = bench.offer(0, BUFFERS, 1000);
    bench.worlds[0].send(&frame(7, 2988));
    settle();
    assert_eq!(bench.receive[0].used_index(), 0);
    let second =
        bench.receive[0].add(&[(BUFFERS + 4000, 300, WRITE), (BUFFERS + 5000, 200, WRITE)]);
    bench.receive[0].kick();
    settle();
    assert_eq!(bench.receive[0].used_index(), 0);
    let third = bench.offer(0, BUFFERS + 8000, 4000);
    // The index jumps: a driver never sees a part.
    wait_for("used buffers", || bench.receive[0].used_index() != 0);
    assert_eq!(bench.receive[0].used_index(), 3);
    let used = bench.receive[0].take_used();
    let heads = [first, second, third].map(u32::from);
    assert_eq!(used, [(heads[0], 1000), (heads[1], 500), (heads[2], 1500)]);
    let mut found = bench.read(BUFFERS, 1000);
    found.extend(bench.read(BUFFERS + 4000, 300));
    found.extend(bench.read(BUFFERS + 5000, 200));
    found.extend(bench.read(BUFFERS + 8000, 1500));
    assert_eq!(found, delivered(frame(7, 2988), 3));
    assert_eq!(bench.heard.count(0), 1);
}

#[test]
fn the_doorbell_is_asked_for_behind_buffers_that_do_not_suffice() {
    let mut bench = Bench::with_features(options(1), u64::MAX);
    bench.offer(0, BUFFERS, 1000);
    bench.offer(0, BUFFERS + 1000, 1000);
    bench.worlds[0].send(&frame(7, 2900));
    wait_for("the device waits for a third buffer", || bench.receive[0].avail_event() == 2);
    bench.offer(0, BUFFERS + 2000, 1000);
    bench.receive[0].wait_used(3);
}

#[test]
fn a_frame_needs_one_buffer_without_mergeable_buffers() {
    let mut bench = Bench::with_features(options(1), !(features::EVENT_IDX | MRG_RXBUF));
    let head = bench.offer(0, BUFFERS, 1000);
    bench.offer(0, BUFFERS + 2000, 1000);
    bench.worlds[0].send(&frame(7, 1400));
    wait_for("the frame is dropped", || bench.counter("rx_dropped") == 1);
    bench.worlds[0].send(&frame(8, 900));
    assert_eq!(bench.receive[0].wait_used(1), [(u32::from(head), 912)], "the buffer was kept");
    assert_eq!(bench.read(BUFFERS, 912), delivered(frame(8, 900), 1));
}

#[test]
fn the_largest_frame_passes_and_a_larger_one_does_not() {
    let mut bench = Bench::new(1);
    bench.offer(0, BUFFERS, 1 << 17);
    let len = FRAME_BYTES_MAX - HEADER_BYTES;
    bench.worlds[0].send(&frame(3, len + 1));
    wait_for("the frame is dropped", || bench.counter("rx_dropped") == 1);
    bench.worlds[0].send(&frame(4, len));
    bench.receive[0].wait_used(1);
    assert_eq!(bench.read(BUFFERS, FRAME_BYTES_MAX), delivered(frame(4, len), 1));
}

#[test]
fn a_frame_that_no_ring_can_take_is_dropped() {
    let mut bench = Bench::new(1);
    for slot in 0..u64::from(QUEUE_SIZE) {
        bench.offer(0, BUFFERS + 64 * slot, 64);
    }
    bench.worlds[0].send(&frame(3, 1100));
    wait_for("the frame is dropped", || bench.counter("rx_dropped") == 1);
    bench.worlds[0].send(&frame(4, 1000));
    assert_eq!(bench.receive[0].wait_used(16).len(), 16);
}

#[test]
fn frames_stay_in_the_tap_while_there_are_no_buffers() {
    let mut bench = Bench::new(1);
    for seed in 0..5 {
        bench.worlds[0].send(&frame(seed, 100));
    }
    settle();
    assert_eq!(bench.taps[0].reads.load(Ordering::SeqCst), 0);
    for seed in 0..5 {
        bench.offer(0, BUFFERS, 2048);
        bench.receive[0].wait_used(1);
        assert_eq!(bench.read(BUFFERS, 112), delivered(frame(seed, 100), 1));
    }
}

#[test]
fn a_guest_is_spared_what_it_cannot_receive() {
    let wanted = !(features::EVENT_IDX | GUEST_TSO4);
    let mut bench = Bench::with_features(options(1), wanted);
    let negotiated = bench.net.features() & wanted & 0b111_1000_0010;
    wait_for("the tap knows it too", || {
        bench.taps[0].offloads.lock().unwrap().is_some_and(|set| set.bits() == negotiated)
    });
    assert_eq!(negotiated & GUEST_CSUM, GUEST_CSUM);
    bench.offer(0, BUFFERS, 2048);
    let mut tso = frame(1, 100);
    tso[..2].copy_from_slice(&[1, 1]);
    bench.worlds[0].send(&tso);
    wait_for("the frame is dropped", || bench.counter("rx_dropped") == 1);
    let mut tso6 = frame(1, 100);
    tso6[..2].copy_from_slice(&[1, 4]);
    bench.worlds[0].send(&tso6);
    bench.receive[0].wait_used(1);
    assert_eq!(bench.read(BUFFERS, 112), delivered(tso6, 1));
}

#[test]
fn a_frame_that_was_read_when_the_device_was_parked_is_kept() {
    let mut bench = Bench::new(1);
    // One buffer for a frame that needs two: it waits in the VMM.
    bench.offer(0, BUFFERS, 1000);
    bench.worlds[0].send(&frame(1, 1400));
    wait_for("the frame is read", || bench.taps[0].reads.load(Ordering::SeqCst) > 0);
    settle();
    bench.net.park();
    bench.offer(0, BUFFERS + 1000, 1000);
    bench.worlds[0].send(&frame(2, 100));
    settle();
    let reads = bench.taps[0].reads.load(Ordering::SeqCst);
    assert_eq!(bench.receive[0].used_index(), 0, "a parked device is still");
    bench.net.unpark();
    bench.receive[0].wait_used(2);
    assert_eq!(bench.read(BUFFERS, 1412), delivered(frame(1, 1400), 2));
    bench.offer(0, BUFFERS, 1000);
    bench.receive[0].wait_used(1);
    assert_eq!(bench.read(BUFFERS, 112), delivered(frame(2, 100), 1));
    assert!(bench.taps[0].reads.load(Ordering::SeqCst) > reads);
}

#[test]
fn parking_again_and_again_loses_no_frame() {
    let mut bench = Bench::new(1);
    for slot in 0..8 {
        bench.offer(0, BUFFERS + 0x1000 * slot, 2048);
    }
    let mut received = Vec::new();
    for round in 0..200u8 {
        bench.worlds[0].send(&frame(round, 60));
        bench.net.park();
        let index = bench.receive[0].used_index();
        thread::yield_now();
        assert_eq!(bench.receive[0].used_index(), index, "a parked device is still");
        bench.net.unpark();
        wait_for("the frame", || {
            for (head, len) in bench.receive[0].take_used() {
                assert_eq!(len, 72);
                let address = BUFFERS + 0x1000 * u64::from(head % 8);
                received.push(bench.read(address, 72)[HEADER_BYTES]);
                let again = bench.receive[0].next_descriptor;
                assert_eq!(u32::from(again % 8), head % 8, "in order");
                bench.offer(0, address, 2048);
            }
            received.len() == usize::from(round) + 1
        });
    }
    let expected: Vec<u8> = (0..200u8).map(|round| frame(round, 60)[HEADER_BYTES]).collect();
    assert_eq!(received, expected);
}
