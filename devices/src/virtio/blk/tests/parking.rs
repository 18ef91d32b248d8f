//! Parking, saving, restoring and resetting while the host is at work.

use super::*;
use crate::virtio::device::{QueuePosition, StateError};

#[test]
fn parking_does_not_wait_for_the_host() {
    let image = TestImage::new();
    let mut rig = Rig::on(&image, 2);
    image.block();
    let reads: Vec<_> = rig.drivers.iter_mut().map(|driver| driver.read(0, 4096)).collect();
    let write = rig.drivers[0].write(9, &[5; 512]);
    until("the host's I/O", || image.begun().len() == 3);
    // Returns; a device that drained its requests would never.
    rig.disk.park();
    image.unblock();
    until("the end of the host's I/O", || image.ended.load(Ordering::SeqCst) == 3);
    thread::sleep(MOMENT);
    let late = rig.drivers[1].write(12, &[6; 512]);
    thread::sleep(MOMENT);
    for (driver, read) in rig.drivers.iter().zip(&reads) {
        assert_eq!((driver.used_index(), driver.status(*read)), (0, UNTOUCHED));
    }
    assert_eq!(rig.irq.queues.load(Ordering::SeqCst), 0);
    let state = rig.state();
    let heads: Vec<_> = state.queues.iter().map(|queue| queue.in_flight.clone()).collect();
    assert_eq!(heads, [vec![reads[0].head, write.head], vec![reads[1].head]]);
    let position = |index, next_avail| QueuePosition { index, next_avail, next_used: 0 };
    assert_eq!(rig.disk.queue_positions(), [position(0, 2), position(1, 1)]);
    rig.disk.unpark();
    rig.drivers[0].answers(2);
    rig.drivers[1].answers(2);
    assert_eq!(rig.drivers[0].status(write), OK);
    assert_eq!(rig.drivers[1].status(late), OK);
    assert_eq!(image.sector(12), 6);
    rig.disk.park();
    assert!(rig.state().queues.iter().all(|queue| queue.in_flight.is_empty()));
    rig.disk.unpark();
}

#[test]
fn requests_in_flight_are_carried_out_by_the_replica_once_each() {
    let image = TestImage::new();
    let mut rig = Rig::on(&image, 2);
    // Some that are answered before.
    for driver in &mut rig.drivers {
        let sent = driver.write(0, &[1; 512]);
        driver.end(sent);
    }
    image.block();
    let mut sent = Vec::new();
    for (at, driver) in rig.drivers.iter_mut().enumerate() {
        let first = 100 * (u64::try_from(at).unwrap() + 1);
        // Two that overlap, a read of the second, and others.
        sent.push((at, driver.write(first, &[0x11; 1024])));
        sent.push((at, driver.write(first + 1, &[0x22; 1024])));
        sent.push((at, driver.read(first + 2, 512)));
        sent.push((at, driver.send(FLUSH, 0, &[], 0)));
        sent.push((at, driver.range(WRITE_ZEROES, first + 50, 8, 1)));
    }
    // Those behind others are in flight too.
    until("the requests are taken", || {
        rig.disk.queue_positions().iter().all(|position| position.next_avail == 6)
    });
    until("the host's I/O", || image.begun().len() == 2 + 2 * 3);
    rig.disk.park();
    // Offered, not taken: the replica finds it in the ring.
    for (at, driver) in rig.drivers.iter_mut().enumerate() {
        sent.push((at, driver.write(1000, &[0x33; 512])));
    }
    let state = rig.disk.save();
    let bytes = postcard::to_stdvec(&state).unwrap();
    assert_eq!(postcard::from_bytes::<DeviceState>(&bytes).unwrap(), state);

    let other = TestImage::new();
    let mut backup = replica(&rig, &state, &other);
    // Parked, so nothing happens, and the state is the same again.
    thread::sleep(MOMENT);
    assert!(other.begun().is_empty());
    assert_eq!(backup.disk.save(), state);
    backup.disk.unpark();
    for (at, driver) in backup.drivers.iter_mut().enumerate() {
        let mut heads: Vec<_> = driver.answers(6).iter().map(|(head, _)| *head).collect();
        heads.sort_unstable();
        let mine = sent.iter().filter(|(of, _)| *of == at);
        let mut expected: Vec<_> = mine.map(|(_, sent)| sent.head).collect();
        expected.sort_unstable();
        assert_eq!(heads, expected);
    }
    thread::sleep(MOMENT);
    for (at, sent) in &sent {
        let driver = &backup.drivers[*at];
        assert_eq!((driver.unseen(), driver.status(*sent)), (0, OK));
    }
    for (first, read) in [(100, sent[2]), (200, sent[7])] {
        assert_eq!([0, 1, 2].map(|at| other.sector(first + at)), [0x11, 0x22, 0x22]);
        assert_eq!(backup.drivers[read.0].bytes(read.1.data, 512), [0x22; 512]);
    }
    assert_eq!(other.sector(1000), 0x33);
    // The disk that was left behind goes on too, as after a snapshot.
    image.unblock();
    rig.disk.unpark();
    rig.drivers.iter_mut().for_each(|driver| drop(driver.answers(6)));
}

#[test]
fn a_state_that_makes_no_sense_is_refused() {
    let file = file();
    let disk = Disk::new(BlkConfig { num_queues: 2, ..config(&file) }).unwrap();
    disk.park();
    let DeviceState::Block(good) = disk.save() else { panic!() };
    let queue = |index, in_flight: &[u16]| BlkQueueState {
        position: QueuePosition { index, next_avail: 9, next_used: 7 },
        in_flight: in_flight.into(),
    };
    let with = |queues| BlkState { queues, ..good.clone() };
    let fine = with(vec![queue(0, &[3, 1]), queue(1, &[])]);
    disk.restore(&DeviceState::Block(fine.clone())).unwrap();
    assert_eq!(disk.save(), DeviceState::Block(fine));
    assert_eq!(disk.restore(&DeviceState::Stateless), Err(StateError::Kind));
    let wrong = [
        with(vec![queue(2, &[])]),
        with(vec![queue(1, &[]), queue(0, &[])]),
        with(vec![queue(0, &[]), queue(0, &[])]),
        with(vec![queue(0, &[SIZE])]),
        with(vec![queue(0, &[4, 4])]),
        BlkState { capacity_sectors: good.capacity_sectors + 1, ..good.clone() },
    ];
    for state in wrong {
        let result = disk.restore(&DeviceState::Block(state.clone()));
        assert!(matches!(result, Err(StateError::Unusable(_))), "{state:?}");
    }
    // A larger image does: the guest goes on with what it knows.
    let state = BlkState { capacity_sectors: 8, ..good };
    disk.restore(&DeviceState::Block(state)).unwrap();
    assert_eq!(disk.capacity_bytes(), 4096);
}

#[test]
fn a_reset_leaves_guest_memory_alone() {
    let image = TestImage::new();
    let mut rig = Rig::on(&image, 1);
    image.block();
    let driver = &mut rig.drivers[0];
    let read = driver.read(0, 4096);
    let write = driver.write(0, &[1; 512]);
    let apart = driver.write(100, &[2; 512]);
    until("the host's I/O", || image.begun().len() == 2);
    image.bytes.lock().unwrap().fill(0x99);
    rig.disk.reset();
    // The driver uses its memory for something else now.
    let before = copy(&rig.memory, MEMORY_BYTES >> 22);
    image.unblock();
    until("the end of the host's I/O", || image.ended.load(Ordering::SeqCst) == 2);
    thread::sleep(MOMENT);
    let all = |memory: &GuestMemory| {
        let mut bytes = vec![0; MEMORY_BYTES];
        memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    };
    assert!(all(&before) == all(&rig.memory), "guest memory was written after a reset");
    assert_eq!(rig.irq.queues.load(Ordering::SeqCst), 0);
    // What waited behind the read was never begun.
    assert_eq!(image.begun(), [Op::Read(0, 4096), Op::Write(100 * 512, 512)]);
    let driver = &rig.drivers[0];
    assert_eq!([read, write, apart].map(|sent| driver.status(sent)), [UNTOUCHED; 3]);
}

#[test]
fn a_new_driver_does_not_overtake_the_io_of_the_one_before() {
    let image = TestImage::new();
    let mut rig = Rig::on(&image, 1);
    image.block();
    rig.drivers[0].write(0, &[1; 1024]);
    until("the host's I/O", || image.begun().len() == 1);
    rig.disk.reset();
    rig.memory = memory();
    rig.drivers = vec![Driver::new(&rig.memory, 0)];
    rig.activate();
    let driver = &mut rig.drivers[0];
    let sent = driver.write(1, &[2; 512]);
    thread::sleep(MOMENT);
    assert_eq!(image.begun().len(), 1);
    image.unblock();
    assert_eq!(driver.end(sent), (OK, 1));
    assert_eq!((image.sector(0), image.sector(1)), (1, 2));
}

#[test]
fn resets_at_any_moment_leave_a_disk_that_works() {
    let image = TestImage::new();
    let mut rig = Rig::on(&image, 1);
    for round in 0..200u8 {
        let driver = &mut rig.drivers[0];
        for at in 0..6 {
            driver.write(u64::from(round) + at, &[round; 512]);
        }
        for _ in 0..u32::from(round) * 10 {
            std::hint::spin_loop();
        }
        rig.disk.reset();
        rig.memory = memory();
        let doorbell = rig.drivers[0].doorbell.try_clone().unwrap();
        rig.drivers = vec![Driver::new(&rig.memory, 0)];
        // The same one, as a transport has it: the worker before must not take its signals.
        rig.drivers[0].doorbell = doorbell;
        rig.activate();
        let sent = rig.drivers[0].write(3, &[round; 512]);
        assert_eq!(rig.drivers[0].end(sent), (OK, 1));
        assert_eq!(image.sector(3), round);
    }
}

#[test]
fn a_disk_that_is_parked_can_go_away() {
    let image = TestImage::new();
    let mut rig = Rig::on(&image, 1);
    image.block();
    rig.drivers[0].write(0, &[1; 512]);
    until("the host's I/O", || image.begun().len() == 1);
    rig.disk.park();
    rig.drivers[0].write(9, &[1; 512]);
    image.unblock();
    let Rig { disk, .. } = rig;
    drop(disk);
    // Nobody uses the image any more.
    assert_eq!(Arc::strong_count(&image), 1);
}

#[test]
fn a_disk_that_is_parked_can_be_reset() {
    let image = TestImage::new();
    let mut rig = Rig::on(&image, 1);
    image.block();
    rig.drivers[0].write(0, &[1; 512]);
    until("the host's I/O", || image.begun().len() == 1);
    rig.disk.park();
    image.unblock();
    rig.drivers[0].write(9, &[1; 512]);
    rig.disk.reset();
    rig.activate();
    rig.disk.unpark();
    // The ring was set up again, so both are there again.
    assert_eq!(rig.drivers[0].answers(2).len(), 2);
    assert_eq!(image.sector(9), 1);
}
