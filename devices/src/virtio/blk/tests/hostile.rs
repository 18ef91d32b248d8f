//! A guest that wants to hurt: nothing it writes panics, hangs the disk for good, or is read or
//! written outside of its memory and its image.

use proptest::prelude::*;

use super::*;

/// A chain's descriptors, and its answer: status and length.
type Case = (&'static str, Vec<(u64, u32, u16)>, (u8, u32));

/// A chain that was offered gets `(status, length)`.
fn answer_of(rig: &mut Rig, head: u16, status: u64) -> (u8, u32) {
    let driver = &mut rig.drivers[0];
    driver.offer(head);
    driver.kick();
    driver.end(Sent { head, data: 0, status })
}

fn still_works(rig: &mut Rig, queue: usize) {
    let driver = &mut rig.drivers[queue];
    let sent = driver.write(1, &[0x42; 512]);
    assert_eq!(driver.end(sent), (OK, 1));
}

#[test]
fn chains_that_are_wrong_are_answered() {
    let image = TestImage::new();
    let mut rig = Rig::on(&image, 1);
    let driver = &mut rig.drivers[0];
    let (header, data) = (driver.header(OUT, 0), driver.place(&[1; 512]));
    let status = driver.place(&[UNTOUCHED]);
    let wild = u64::try_from(MEMORY_BYTES).unwrap();
    let h = (header, 16, 0);
    let s = (status, 1, WRITE);
    // With a status byte: an error. Without one: given back with nothing written.
    let io_error = (IOERR, 1);
    let nothing = (UNTOUCHED, 0);
    let cases: Vec<Case> = vec![
        ("the header is writable", vec![(header, 16, WRITE), s], io_error),
        ("the header is short", vec![(header, 15, 0), s], io_error),
        ("only a status", vec![s], io_error),
        ("no status", vec![h, (data, 512, 0)], nothing),
        ("only a header", vec![h], nothing),
        ("an empty status", vec![h, (data, 512, 0), (status, 0, WRITE)], nothing),
        ("everything is empty", vec![(header, 0, 0), (status, 0, WRITE)], nothing),
        ("the header is wild", vec![(wild, 16, 0), (data, 512, 0), s], io_error),
        ("the data is wild", vec![h, (wild - 511, 512, 0), s], io_error),
        ("the data wraps", vec![h, (u64::MAX - 10, 512, 0), s], io_error),
        ("the status is wild", vec![h, (data, 512, 0), (wild, 1, WRITE)], nothing),
        ("the status wraps", vec![h, (data, 512, 0), (u64::MAX, 2, WRITE)], nothing),
        ("out of order", vec![h, s, (data, 512, 0), s], io_error),
        ("more than 4 GiB", vec![h, (data, u32::MAX, 0), (data, u32::MAX, 0), s], io_error),
        ("a table inside", vec![h, (data, 32, INDIRECT), s], nothing),
    ];
    for (what, parts, expected) in cases {
        let driver = &mut rig.drivers[0];
        driver.put(status, UNTOUCHED);
        let head = driver.chain(&parts);
        assert_eq!(answer_of(&mut rig, head, status), expected, "{what}");
    }
    assert!(image.begun().is_empty());
    still_works(&mut rig, 0);
    assert!(rig.irq.resets.lock().unwrap().is_empty());
}

#[test]
fn chains_that_never_end_are_answered() {
    let image = TestImage::new();
    let mut rig = Rig::on(&image, 1);
    let driver = &mut rig.drivers[0];
    let status = driver.place(&[UNTOUCHED]);
    let base = driver.base;
    // A loop of two, and a descriptor outside of the table.
    driver.store(base, 0, Descriptor::new(status, 1, NEXT | WRITE, 1));
    driver.store(base, 1, Descriptor::new(status, 1, NEXT | WRITE, 0));
    // What lies behind the table looks like a descriptor, and is none.
    driver.store(base, 2, Descriptor::new(status, 1, NEXT | WRITE, SIZE));
    driver.store(base, SIZE, Descriptor::new(status, 1, WRITE, 0));
    // Tables: one that names itself, one that loops, one of a wrong size, one in no memory, a
    // long one, and one that is followed by something.
    let table = driver.room(16 * 1024);
    driver.store(base, 3, Descriptor::new(table, 16, INDIRECT, 0));
    driver.store(table, 0, Descriptor::new(table, 16, INDIRECT, 0));
    let looping = table + 16;
    driver.store(base, 4, Descriptor::new(looping, 32, INDIRECT, 0));
    driver.store(looping, 0, Descriptor::new(status, 1, NEXT | WRITE, 0));
    driver.store(base, 5, Descriptor::new(looping, 33, INDIRECT, 0));
    driver.store(base, 6, Descriptor::new(looping, 0, INDIRECT, 0));
    driver.store(base, 7, Descriptor::new(u64::MAX - 7, 32, INDIRECT, 0));
    let long = table + 256;
    driver.store(base, 8, Descriptor::new(long, 16 * 300, INDIRECT, 0));
    for at in 0..300 {
        driver.store(long, at, Descriptor::new(status, 1, NEXT | WRITE, at + 1));
    }
    driver.store(base, 9, Descriptor::new(looping, 32, INDIRECT | NEXT, 0));
    driver.store(base, 10, Descriptor::new(looping, 16 * 65536, INDIRECT, 0));
    for head in [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10] {
        assert_eq!(answer_of(&mut rig, head, status), (UNTOUCHED, 0), "{head}");
    }
    rig.drivers[0].next_descriptor = 0;
    still_works(&mut rig, 0);
    assert_eq!(rig.counter("errors"), 11);
}

/// As many segments as the disk says that a request may have, all in one table: what Linux makes.
#[test]
fn the_longest_request_fits_a_table() {
    let image = TestImage::new();
    let mut rig = Rig::on(&image, 1);
    let driver = &mut rig.drivers[0];
    let (header, data) = (driver.header(IN, 0), driver.place(&[0; 512 * 254]));
    let status = driver.place(&[UNTOUCHED]);
    let (base, table) = (driver.base, driver.room(16 * 256));
    driver.store(table, 0, Descriptor::new(header, 16, NEXT, 1));
    for at in 1..255 {
        let segment = data + 512 * u64::from(at - 1);
        driver.store(table, at, Descriptor::new(segment, 512, NEXT | WRITE, at + 1));
    }
    driver.store(table, 255, Descriptor::new(status, 1, WRITE, 0));
    driver.store(base, 0, Descriptor::new(table, 16 * 256, INDIRECT, 0));
    assert_eq!(answer_of(&mut rig, 0, status), (OK, 512 * 254 + 1));
}

/// Does `spoil` to the ring of queue 0; the disk stops, and works again after a reset.
fn stops(spoil: impl FnOnce(&mut Driver)) {
    let image = TestImage::new();
    let mut rig = Rig::on(&image, 2);
    still_works(&mut rig, 0);
    image.block();
    let pending = rig.drivers[1].write(5, &[1; 512]);
    until("the host's I/O", || image.begun().len() == 2);
    spoil(&mut rig.drivers[0]);
    rig.drivers[0].kick();
    until("the request for a reset", || !rig.irq.resets.lock().unwrap().is_empty());
    image.unblock();
    rig.drivers[1].write(6, &[1; 512]);
    thread::sleep(MOMENT);
    assert_eq!(rig.irq.resets.lock().unwrap().len(), 1);
    assert_eq!(rig.drivers[1].status(pending), UNTOUCHED);
    rig.disk.park();
    let state = rig.state();
    rig.disk.unpark();
    assert!(state.stopped && state.queues.iter().all(|queue| queue.in_flight.is_empty()));
    rig.disk.reset();
    rig.memory = memory();
    rig.drivers = (0..2).map(|index| Driver::new(&rig.memory, index)).collect();
    rig.activate();
    still_works(&mut rig, 0);
    still_works(&mut rig, 1);
}

#[test]
fn a_ring_that_makes_no_sense_stops_the_disk_until_its_reset() {
    stops(|driver| driver.put(driver.available_ring() + 2, driver.available + SIZE + 1));
    stops(|driver| driver.offer(SIZE));
    stops(|driver| driver.offer(u16::MAX));
}

#[test]
fn a_chain_that_is_in_flight_is_not_taken_again() {
    let image = TestImage::new();
    let mut rig = Rig::on(&image, 1);
    image.block();
    let sent = rig.drivers[0].write(0, &[1; 512]);
    until("the host's I/O", || image.begun().len() == 1);
    rig.drivers[0].offer(sent.head);
    rig.drivers[0].kick();
    until("the request for a reset", || !rig.irq.resets.lock().unwrap().is_empty());
    image.unblock();
    thread::sleep(MOMENT);
    assert_eq!(image.begun().len(), 1);
}

#[test]
fn data_over_the_rings_hurts_the_guest_only() {
    let image = TestImage::new();
    image.bytes.lock().unwrap().fill(0xff);
    let mut rig = Rig::on(&image, 2);
    // The disk writes 0xff over the descriptors, the rings and the status of queue 0.
    let driver = &mut rig.drivers[0];
    let header = driver.header(IN, 0);
    let base = driver.base;
    let head = driver.chain(&[(header, 16, 0), (base, 0x3000, WRITE), (base, 1, WRITE)]);
    driver.offer(head);
    driver.kick();
    until("the host's I/O", || image.ended.load(Ordering::SeqCst) == 1);
    thread::sleep(MOMENT);
    rig.drivers[0].kick();
    thread::sleep(MOMENT);
    rig.disk.reset();
    rig.memory = memory();
    rig.drivers = (0..2).map(|index| Driver::new(&rig.memory, index)).collect();
    rig.activate();
    still_works(&mut rig, 0);
    still_works(&mut rig, 1);
}

/// An address that is often one of few, so that things overlap.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => (0u64..0x40).prop_map(|at| DATA + at * 64),
        1 => (0u64..0x400).prop_map(|at| 0x1000 + at * 16),
        1 => Just(u64::try_from(MEMORY_BYTES).unwrap() - 8),
        1 => any::<u64>(),
    ]
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![
        2 => Just(1u32),
        3 => Just(16u32),
        3 => Just(512u32),
        1 => (0u32..64).prop_map(|at| at * 16),
        1 => 0u32..70_000,
        1 => any::<u32>(),
    ]
}

fn descriptor() -> impl Strategy<Value = Descriptor> {
    let flags = prop_oneof![6 => 0u16..4, 1 => 4u16..8, 1 => any::<u16>()];
    let next = prop_oneof![8 => 0..SIZE, 1 => any::<u16>()];
    (address(), length(), flags, next)
        .prop_map(|(address, len, flags, next)| Descriptor::new(address, len, flags, next))
}

fn word() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => prop::sample::select(vec![0u64, 1, 4, 8, 11, 13]),
        1 => 0u64..9000,
        1 => any::<u64>(),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    /// Any descriptors, any heads, any data: another queue works, and after a reset all do. With
    /// parks, saves and a restore in between.
    #[test]
    fn nothing_that_a_guest_writes_hurts(
        descriptors in prop::collection::vec(descriptor(), usize::from(SIZE)),
        words in prop::collection::vec(word(), 512),
        heads in prop::collection::vec(prop_oneof![20 => 0..SIZE, 1 => any::<u16>()], 1..24),
        jump in prop_oneof![9 => Just(0u16), 1 => any::<u16>()],
        held in any::<bool>(),
    ) {
        let image = TestImage::new();
        let mut rig = Rig::on(&image, 2);
        if held {
            rig.disk.hold();
        }
        let driver = &mut rig.drivers[0];
        for (at, value) in words.iter().enumerate() {
            driver.put(DATA + u64::try_from(at).unwrap() * 8, *value);
        }
        for (at, descriptor) in descriptors.iter().enumerate() {
            driver.store(driver.base, u16::try_from(at).unwrap(), *descriptor);
        }
        for head in &heads {
            driver.offer(*head);
        }
        driver.put(driver.available_ring() + 2, driver.available.wrapping_add(jump));
        driver.kick();
        rig.disk.park();
        rig.disk.seal(1);
        let saved = rig.state();
        prop_assert!(saved.queues.iter().all(|q| q.in_flight.len() <= usize::from(SIZE)));
        rig.disk.unpark();
        rig.disk.commit(1);
        rig.disk.pass();
        until("an end", || {
            rig.disk.park();
            let idle = rig.state().queues[0].in_flight.is_empty();
            rig.disk.unpark();
            idle
        });
        // The ring of queue 1 is the guest's own memory too: it may have been written over.
        rig.disk.reset();
        rig.memory = memory();
        rig.drivers = (0..2).map(|index| Driver::new(&rig.memory, index)).collect();
        rig.activate();
        still_works(&mut rig, 0);
        still_works(&mut rig, 1);

        // The same bytes meet a disk that was told they were in flight.
        rig.disk.reset();
        let saved = BlkState { stopped: false, ..saved };
        prop_assert!(rig.disk.restore(&DeviceState::Block(saved)).is_ok());
        rig.activate();
        thread::sleep(Duration::from_millis(1));
    }
}
