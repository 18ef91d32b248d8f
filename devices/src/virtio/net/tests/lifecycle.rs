//! Attaching, activating, saving, restoring, announcing.

use std::os::fd::OwnedFd;

use vm_memory::{GuestMemoryBackend, MmapRegion};

use super::*;
use crate::virtio::net::announce::PAUSES_MS;
use crate::virtio::net::features::GUEST_ANNOUNCE;
use crate::virtio::net::frame::announcement;

fn state_of(net: &Net) -> NetState {
    match net.save() {
        DeviceState::Net(state) => state,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_device_is_what_its_options_say() {
    let net = Net::new(NetOptions { mtu: Some(1400), ..options(2) }).unwrap();
    assert_eq!((net.id(), net.device_type()), ("_net0", DeviceType::Net));
    assert_eq!(net.queue_sizes(), [QUEUE_SIZE; 5]);
    assert_eq!(net.features().count_ones(), 20);
    let mut config = [0; 14];
    net.read_config(0, &mut config);
    assert_eq!(config, [0x52, 0x54, 0, 0x12, 0x34, 0x56, 1, 0, 2, 0, 0x78, 5, 0, 0]);
    net.write_config(0, &[0xff; 6]);
    net.read_config(0, &mut config[..1]);
    assert_eq!(config[0], 0x52);
}

#[test]
fn options_that_cannot_be_are_refused() {
    assert!(Net::new(options(0)).is_err());
    assert!(Net::new(options(257)).is_err());
    assert!(Net::new(NetOptions { queue_size: 0, ..options(1) }).is_err());
    assert!(Net::new(NetOptions { queue_size: 100, ..options(1) }).is_err());
    let error = Net::new(NetOptions { mtu: Some(67), ..options(1) }).unwrap_err();
    assert_eq!(error.to_string(), "Network device _net0: an MTU of 67 is less than 68");
}

#[test]
fn a_device_without_a_tap_cannot_be_activated() {
    let bench = Bench::idle(options(1));
    let net = Net::new(options(1)).unwrap();
    let refused = net.activate(bench.activation(0));
    assert!(matches!(refused, Err(ActivateError::NotAttached)));
    let mut few = bench.activation(0);
    few.queues.remove(1);
    let refused = bench.net.activate(few);
    assert!(matches!(refused, Err(ActivateError::Queues { found: 2, needed: 2 })));
    // A take-over that never came: nothing was attached, and the device ends.
    net.announce();
    net.park();
    net.save();
    net.unpark();
}

/// A take-over asks again until its devices have what they need.
#[test]
fn a_tap_that_could_not_be_had_is_asked_for_again() {
    let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    let tap = TapSource::Descriptors(vec![null()]);
    let net = Net::new(NetOptions { tap, ..options(1) }).unwrap();
    for _ in 0..2 {
        let refused = net.attach().unwrap_err().to_string();
        assert!(refused.contains("not bound to a tap"), "{refused}");
    }
}

#[test]
fn threads_that_could_not_all_be_started_are_started_again() {
    let mut bench = Bench::idle(options(2));
    bench.net = Net::new(options(2)).unwrap();
    let taps: Vec<_> = bench.taps.iter().map(|tap| Arc::clone(tap) as _).collect();
    let refused = bench.net.start(&taps, |shared, index, taps| match index {
        0 => {
            let started = Worker::spawn(shared, index, taps);
            // It waits for the tap, as one that has worked for a while.
            settle();
            started
        }
        _ => Err(io::ErrorKind::OutOfMemory.into()),
    });
    assert!(refused.unwrap_err().to_string().contains("Cannot start a thread"));
    bench.net.start(&taps, Worker::spawn).unwrap();
    bench.activate(bench.net.features() & !features::EVENT_IDX);
    bench.send(0, &frame(1, 60));
    assert_eq!(bench.worlds[0].receive(), frame(1, 60));
    bench.offer(0, BUFFERS + 0x20_0000, 2048);
    bench.worlds[0].send(&frame(2, 60));
    bench.receive[0].wait_used(1);
}

#[test]
fn threads_are_named_and_end_with_the_device() {
    let bench = Bench::new(2);
    let names = || -> Vec<String> {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let names = tasks
            .filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).ok());
        names.map(|name| name.trim().to_owned()).collect()
    };
    wait_for("the threads", || {
        ["_net0_qp0", "_net0_qp1"].iter().all(|name| names().iter().any(|found| found == name))
    });
    bench.net.park();
    // Parked and all: it ends.
    drop(bench);
}

#[test]
fn a_restored_device_goes_on_where_the_saved_one_was() {
    let mut primary = Bench::new(2);
    primary.send(0, &frame(1, 60));
    primary.offer(0, BUFFERS + 0x20_0000, 2048);
    primary.offer(0, BUFFERS + 0x20_1000, 2048);
    primary.worlds[0].send(&frame(2, 60));
    primary.transmit[0].wait_used(1);
    primary.receive[0].wait_used(1);
    primary.net.announce();
    wait_for("the guest is asked", || primary.heard.config.load(Ordering::SeqCst) == 1);
    // A frame that waits in the ring, and one that waits in the gate.
    primary.net.gate().hold();
    primary.send(0, &frame(3, 60));
    primary.transmit[0].wait_used(1);
    primary.net.park();
    primary.send(0, &frame(4, 60));
    let state = primary.net.save();
    let NetState { active_pairs, announce, queues, .. } = state_of(&primary.net);
    assert_eq!((active_pairs, announce), (1, true));
    assert_eq!(queues, primary.net.queue_positions());
    let positions: Vec<_> = queues.iter().map(|q| (q.index, q.next_avail, q.next_used)).collect();
    assert_eq!(positions, [(0, 1, 1), (1, 2, 2), (2, 0, 0), (3, 0, 0), (4, 0, 0)]);

    let mut replica =
        Bench::idle(NetOptions { mac: "02:00:00:00:00:01".parse().unwrap(), ..options(2) });
    replica.net.park();
    replica.net.restore(&state).unwrap();
    assert_eq!(replica.net.save(), state, "also before its activation");
    replica.memory = Arc::clone(&primary.memory);
    std::mem::swap(&mut replica.transmit, &mut primary.transmit);
    std::mem::swap(&mut replica.receive, &mut primary.receive);
    replica.activate(primary.net.features() & !features::EVENT_IDX);
    assert_eq!(replica.net.save(), state);
    let mut config = [0; 8];
    replica.net.read_config(0, &mut config);
    assert_eq!(config, [0x52, 0x54, 0, 0x12, 0x34, 0x56, 3, 0], "the address the guest knows");
    settle();
    assert_eq!(replica.worlds[0].try_receive(), None, "parked");
    replica.net.unpark();
    assert_eq!(replica.worlds[0].receive(), frame(4, 60), "what was in the ring");
    replica.transmit[0].wait_used(1);
    replica.worlds[0].send(&frame(5, 60));
    replica.receive[0].wait_used(1);
    assert_eq!(replica.read(BUFFERS + 0x20_1000 + 12, 60), frame(5, 60)[12..]);
    // A reset forgets.
    replica.net.reset();
    replica.net.park();
    let after = state_of(&replica.net);
    assert_eq!((after.announce, after.queues.len()), (false, 0));
}

/// A guest that does nothing is not sealed: so what ends each epoch, a park, writes nothing.
#[test]
fn an_idle_card_dirties_no_page_from_epoch_to_epoch() {
    for wanted in [u64::MAX, !features::EVENT_IDX] {
        let mut bench = Bench::with_features(options(2), wanted);
        bench.send(0, &frame(1, 60));
        bench.transmit[0].wait_used(1);
        // The world says something that the guest has no buffer for; and its second pair has one.
        bench.worlds[0].send(&frame(2, 60));
        bench.offer(1, BUFFERS + 0x20_0000, 2048);
        bench.write(BUFFERS, &[3, 0]);
        bench.control.add(&[(BUFFERS, 2, 0), (BUFFERS + 16, 1, WRITE)]);
        bench.control.kick();
        bench.control.wait_used(1);
        settle();
        // Not the trait's, which has no drain.
        let memory = Arc::clone(&bench.memory);
        let written = MmapRegion::bitmap(memory.iter().next().unwrap());
        written.drain(|_, _| ());
        for _ in 0..5 {
            bench.net.park();
            bench.net.unpark();
            settle();
        }
        assert_eq!(written.count(), 0, "{wanted:#x}");
        // And it hears its doorbells still.
        bench.send(0, &frame(3, 60));
        bench.transmit[0].wait_used(1);
        bench.offer(0, BUFFERS + 0x20_1000, 2048);
        bench.receive[0].wait_used(1);
        assert_eq!(bench.read(BUFFERS + 0x20_1000 + 12, 60), frame(2, 60)[12..]);
        bench.control.add(&[(BUFFERS, 2, 0), (BUFFERS + 16, 1, WRITE)]);
        bench.control.kick();
        bench.control.wait_used(1);
    }
}

#[test]
fn a_state_that_is_not_the_device_s_is_refused() {
    let bench = Bench::idle(options(2));
    bench.net.park();
    let good = state_of(&bench.net);
    let refused = |change: fn(&mut NetState)| {
        let mut state = good.clone();
        change(&mut state);
        let refused = bench.net.restore(&DeviceState::Net(state));
        assert!(matches!(refused, Err(StateError::Unusable(_))), "{refused:?}");
    };
    refused(|state| state.active_pairs = 0);
    refused(|state| state.active_pairs = 3);
    refused(|state| state.guest_offloads = Some(1 << 50));
    refused(|state| state.mac = [0xff; 6]);
    refused(|state| state.queues = vec![QueuePosition { index: 9, next_avail: 0, next_used: 0 }]);
    refused(|state| state.queues = vec![QueuePosition::default(); 2]);
    assert_eq!(bench.net.restore(&DeviceState::Stateless), Err(StateError::Kind));
    bench.net.restore(&DeviceState::Net(good.clone())).unwrap();
    bench.activate(0);
    let active = bench.net.restore(&DeviceState::Net(good));
    assert!(matches!(active, Err(StateError::Unusable(_))));
}

#[test]
fn a_state_survives_both_encodings() {
    let state = DeviceState::Net(NetState {
        mac: [2, 0, 0, 0, 0, 1],
        guest_offloads: Some(2),
        active_pairs: 3,
        announce: true,
        queues: vec![QueuePosition { index: 1, next_avail: 65535, next_used: 7 }],
    });
    let json = serde_json::to_string(&state).unwrap();
    assert_eq!(serde_json::from_str::<DeviceState>(&json).unwrap(), state);
    let bytes = postcard::to_stdvec(&state).unwrap();
    assert_eq!(postcard::from_bytes::<DeviceState>(&bytes).unwrap(), state);
}

#[test]
fn after_a_take_over_the_world_is_told_and_the_guest_asked() {
    let mut bench = Bench::new(1);
    // Neither the gate nor a parked device delays it.
    bench.net.gate().hold();
    bench.net.park();
    let start = Instant::now();
    bench.net.announce();
    assert!(start.elapsed() < Duration::from_millis(40), "the caller does not wait");
    let expected = announcement(MAC.parse().unwrap());
    assert_eq!(bench.worlds[0].receive(), expected);
    assert_eq!(bench.heard.config.load(Ordering::SeqCst), 0);
    bench.net.unpark();
    wait_for("the guest is asked", || bench.heard.config.load(Ordering::SeqCst) == 1);
    let status = || {
        let mut status = [0];
        bench.net.read_config(6, &mut status);
        status[0]
    };
    assert_eq!(status(), 3);
    for _ in PAUSES_MS {
        assert_eq!(bench.worlds[0].receive(), expected);
    }
    assert!(start.elapsed() >= Duration::from_millis(50 + 150 + 250 + 350 + 450));
    settle();
    assert_eq!(bench.worlds[0].try_receive(), None);
    assert_eq!(bench.counter("announcements"), 6);
    // The guest has done so.
    bench.write(BUFFERS, &[3, 0]);
    bench.control.add(&[(BUFFERS, 2, 0), (BUFFERS + 16, 1, WRITE)]);
    bench.control.kick();
    bench.control.wait_used(1);
    let mut status = [0];
    bench.net.read_config(6, &mut status);
    assert_eq!(status[0], 1);
}

#[test]
fn a_guest_that_cannot_announce_is_not_asked() {
    let bench = Bench::with_features(options(1), !(features::EVENT_IDX | GUEST_ANNOUNCE));
    bench.net.announce();
    bench.worlds[0].receive();
    settle();
    assert_eq!(bench.heard.config.load(Ordering::SeqCst), 0);
    let mut status = [0];
    bench.net.read_config(6, &mut status);
    assert_eq!(status[0], 1);
}

#[test]
fn where_nothing_may_leave_yet_only_the_guest_is_asked() {
    let bench = Bench::new(1);
    bench.net.gate().hold();
    bench.net.announce_to_guest();
    wait_for("the guest is asked", || bench.heard.config.load(Ordering::SeqCst) == 1);
    settle();
    assert_eq!(bench.worlds[0].try_receive(), None, "nothing passes the gate");
    assert_eq!(bench.counter("announcements"), 0);
    // With the first output that leaves.
    bench.net.announce();
    assert_eq!(bench.worlds[0].receive(), announcement(MAC.parse().unwrap()));
}
