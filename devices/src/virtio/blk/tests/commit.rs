//! Output commit.

use super::*;

fn holding(image: &Arc<TestImage>) -> (Rig, Arc<AtomicUsize>) {
    let rig = Rig::on(image, 1);
    let calls = Arc::<AtomicUsize>::default();
    let counted = Arc::clone(&calls);
    rig.disk.set_waker(Arc::new(move || {
        counted.fetch_add(1, Ordering::SeqCst);
    }));
    (rig, calls)
}

/// As the engine ends an epoch.
fn seal(rig: &Rig, epoch: u64) {
    rig.disk.park();
    rig.disk.seal(epoch);
    rig.disk.unpark();
}

fn held(requests: usize, bytes: u64) -> Held {
    Held { requests, bytes }
}

#[test]
fn a_change_reaches_the_image_when_its_epoch_is_committed() {
    let image = TestImage::new();
    let (mut rig, calls) = holding(&image);
    let before = rig.drivers[0].write(0, &[1; 512]);
    assert_eq!(rig.drivers[0].end(before), (OK, 1));
    assert_eq!(calls.load(Ordering::SeqCst), 0);
    rig.disk.hold();

    let first = rig.drivers[0].write(0, &[2; 512]);
    let flush = rig.drivers[0].send(FLUSH, 0, &[], 0);
    until("the write is held", || rig.disk.open() == held(2, 512));
    assert_eq!(calls.load(Ordering::SeqCst), 1);
    seal(&rig, 1);
    let second = rig.drivers[0].range(DISCARD, 8, 8, 0);
    until("the discard is held", || rig.disk.open() == held(1, 0));
    assert_eq!(calls.load(Ordering::SeqCst), 2);
    seal(&rig, 2);
    let third = rig.drivers[0].range(WRITE_ZEROES, 16, 8, 0);
    until("the zeroes are held", || rig.disk.open() == held(1, 0));
    assert_eq!(rig.disk.held(), held(4, 512));

    rig.disk.commit(0);
    thread::sleep(MOMENT);
    assert_eq!(image.begun(), [Op::Write(0, 512)]);
    rig.disk.park();
    let heads = [first, flush, second, third].map(|sent| sent.head);
    assert_eq!(rig.state().queues[0].in_flight, heads);
    rig.disk.unpark();

    rig.disk.commit(1);
    assert_eq!(rig.drivers[0].answers(2).len(), 2);
    assert_eq!([first, flush].map(|sent| rig.drivers[0].status(sent)), [OK; 2]);
    assert_eq!(image.sector(0), 2);
    thread::sleep(MOMENT);
    assert_eq!(image.begun().len(), 3);
    rig.disk.commit(2);
    assert_eq!(rig.drivers[0].end(second), (OK, 1));
    assert_eq!(image.begun()[3..], [Op::Discard(8 * 512, 8 * 512)]);
    rig.disk.commit(2);
    thread::sleep(MOMENT);
    assert_eq!(rig.drivers[0].unseen(), 0);
    rig.disk.pass();
    assert_eq!(rig.drivers[0].end(third), (OK, 1));
    assert_eq!(rig.disk.held(), Held::default());
    assert_eq!((rig.counter("held_ops"), rig.counter("held_bytes")), (4, 512));
    let free = rig.drivers[0].write(0, &[3; 512]);
    assert_eq!(rig.drivers[0].end(free), (OK, 1));
}

#[test]
fn reads_pass_but_never_a_held_write_of_what_they_read() {
    let image = TestImage::new();
    image.bytes.lock().unwrap().fill(1);
    let (mut rig, _) = holding(&image);
    rig.disk.hold();
    let driver = &mut rig.drivers[0];
    let write = driver.write(10, &[2; 1024]);
    let behind = driver.read(11, 1024);
    let beside = driver.read(12, 512);
    // Whoever is beside the write is answered.
    assert_eq!(driver.end(beside), (OK, 513));
    assert_eq!(driver.bytes(beside.data, 512), [1; 512]);
    thread::sleep(MOMENT);
    assert_eq!((driver.unseen(), driver.status(behind)), (0, UNTOUCHED));
    seal(&rig, 1);
    rig.disk.commit(1);
    let driver = &mut rig.drivers[0];
    assert_eq!(
        driver.answers(2).iter().map(|used| used.0).collect::<Vec<_>>(),
        [write.head, behind.head]
    );
    let bytes = driver.bytes(behind.data, 1024);
    assert_eq!((&bytes[..512], &bytes[512..]), (&[2; 512][..], &[1; 512][..]));
}

#[test]
fn a_commit_while_parked_waits_for_the_end_of_the_park() {
    let image = TestImage::new();
    let (mut rig, _) = holding(&image);
    rig.disk.hold();
    let sent = rig.drivers[0].write(0, &[7; 512]);
    until("the write is held", || rig.disk.open().requests == 1);
    rig.disk.park();
    rig.disk.seal(5);
    rig.disk.commit(5);
    thread::sleep(MOMENT);
    assert!(image.begun().is_empty());
    rig.disk.unpark();
    assert_eq!(rig.drivers[0].end(sent), (OK, 1));
}

#[test]
fn what_is_discarded_never_reaches_the_image() {
    let image = TestImage::new();
    let (mut rig, _) = holding(&image);
    rig.disk.hold();
    rig.drivers[0].write(0, &[1; 512]);
    until("the write is held", || rig.disk.open().requests == 1);
    seal(&rig, 1);
    rig.drivers[0].write(1, &[1; 512]);
    until("the write is held", || rig.disk.open().requests == 1);
    rig.disk.discard();
    rig.drivers[0].write(2, &[1; 512]);
    rig.disk.commit(9);
    rig.disk.pass();
    rig.disk.hold();
    rig.disk.pass();
    thread::sleep(MOMENT);
    assert!(image.begun().is_empty());
    assert_eq!((rig.disk.held(), rig.drivers[0].unseen()), (Held::default(), 0));
}

#[test]
fn what_was_released_and_has_not_begun_is_discarded_too() {
    let image = TestImage::new();
    let (mut rig, _) = holding(&image);
    image.block();
    // All threads of the pool hang, more wait in it, and one waits behind another.
    for at in 0..8 {
        rig.drivers[0].write(at, &[1; 512]);
    }
    rig.drivers[0].write(0, &[2; 512]);
    until("the requests are taken", || rig.disk.queue_positions()[0].next_avail == 9);
    until("the host's I/O", || image.begun().len() == 4);
    rig.disk.discard();
    image.unblock();
    until("the end of the host's I/O", || image.ended.load(Ordering::SeqCst) == 4);
    thread::sleep(MOMENT);
    assert_eq!(image.begun().len(), 4);
}

#[test]
fn a_discarded_disk_gives_its_image_up_while_its_machine_is_still_there() {
    let file = file();
    let mut rig = Rig::on_file(config(&file));
    let sent = rig.drivers[0].write(0, &[1; 512]);
    assert_eq!(rig.drivers[0].end(sent), (OK, 1));
    let other = Rig::bare(config(&file));
    assert!(other.disk.claim().err().unwrap().what.contains("another process holds its lock"));
    rig.disk.discard();
    until("the end of the lock", || other.disk.claim().is_ok());
    // Final: it does not take it back.
    drop(other);
    assert!(rig.disk.claim().err().unwrap().what.contains("attached before"));
    assert!(rig.disk.attach().is_err());
    assert!(rig.disk.read_image(0, &mut [0; 512]).is_err());
}

#[test]
fn an_image_is_kept_for_what_the_host_still_does_and_no_longer() {
    let image = TestImage::new();
    let (mut rig, _) = holding(&image);
    image.block();
    rig.drivers[0].write(0, &[1; 512]);
    until("the host's I/O", || image.begun().len() == 1);
    // Its end is to be answered, which a parked disk does not do.
    rig.disk.park();
    rig.disk.discard();
    thread::sleep(MOMENT);
    assert!(Arc::strong_count(&image) > 1, "the host writes to it");
    image.unblock();
    until("the end of its use", || Arc::strong_count(&image) == 1);
}

#[test]
fn a_reset_drops_what_is_held() {
    let image = TestImage::new();
    let (mut rig, _) = holding(&image);
    rig.disk.hold();
    rig.drivers[0].write(0, &[1; 512]);
    until("the write is held", || rig.disk.open().requests == 1);
    rig.disk.reset();
    assert_eq!(rig.disk.held(), Held::default());
    rig.disk.seal(1);
    rig.disk.commit(1);
    rig.disk.pass();
    thread::sleep(MOMENT);
    assert!(image.begun().is_empty());
}
