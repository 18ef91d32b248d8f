//! The log of changes.

use super::*;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Logged {
    Write(u64, u8, usize),
    Zero(u64, u64, bool),
    Discard(u64, u64),
    Flush,
}

/// A log with so much room.
struct TestLog {
    list: Mutex<Vec<Logged>>,
    room: Mutex<u64>,
    refused: AtomicUsize,
}

impl TestLog {
    fn new(room: u64) -> Arc<Self> {
        let refused = AtomicUsize::new(0);
        Arc::new(Self { list: Mutex::default(), room: Mutex::new(room), refused })
    }

    fn list(&self) -> Vec<Logged> {
        self.list.lock().unwrap().clone()
    }
}

impl WriteLog for TestLog {
    fn reserve(&self, bytes: u64) -> bool {
        let mut room = self.room.lock().unwrap();
        let Some(left) = room.checked_sub(bytes) else {
            self.refused.fetch_add(1, Ordering::SeqCst);
            return false;
        };
        *room = left;
        true
    }

    fn release(&self, bytes: u64) {
        *self.room.lock().unwrap() += bytes;
    }

    fn record(&self, change: &Change<'_>) {
        self.list.lock().unwrap().push(match *change {
            Change::Write { offset, data } => Logged::Write(offset, data[0], data.len()),
            Change::Zero { offset, len, unmap } => Logged::Zero(offset, len, unmap),
            Change::Discard { offset, len } => Logged::Discard(offset, len),
            Change::Flush => Logged::Flush,
        });
    }
}

const ROOM: u64 = 64 << 20;

fn logging(image: &Arc<TestImage>, room: u64) -> (Rig, Arc<TestLog>) {
    let rig = Rig::on(image, 1);
    let log = TestLog::new(room);
    rig.disk.set_write_log(Some(Arc::<TestLog>::clone(&log)));
    (rig, log)
}

#[test]
fn changes_are_logged_in_the_order_in_which_the_host_ends_them() {
    let image = TestImage::new();
    let (mut rig, log) = logging(&image, ROOM);
    let driver = &mut rig.drivers[0];
    driver.write(0, &[1; 512]);
    driver.read(100, 512);
    driver.write(0, &[2; 512]);
    driver.range(WRITE_ZEROES, 0, 8, 1);
    driver.range(DISCARD, 0, 8, 0);
    driver.write(7, &[3; 512]);
    driver.answers(6);
    driver.send(FLUSH, 0, &[], 0);
    driver.answers(1);
    let expected = [
        Logged::Write(0, 1, 512),
        Logged::Write(0, 2, 512),
        Logged::Zero(0, 4096, true),
        Logged::Discard(0, 4096),
        Logged::Write(7 * 512, 3, 512),
        Logged::Flush,
    ];
    assert_eq!(log.list(), expected);
    assert_eq!((image.sector(6), image.sector(7)), (0xdd, 3));
    assert_eq!((rig.counter("logged_ops"), rig.counter("logged_bytes")), (6, 3 * 512));
    // All that was set aside was given back.
    until("the room", || *log.room.lock().unwrap() == ROOM);
    rig.disk.set_write_log(None);
    let sent = rig.drivers[0].write(0, &[1; 512]);
    rig.drivers[0].end(sent);
    assert_eq!(log.list().len(), 6);
}

#[test]
fn a_change_is_logged_with_its_answer_never_without_it_and_never_between() {
    let image = TestImage::new();
    let (mut rig, log) = logging(&image, ROOM);
    image.block();
    let sent = rig.drivers[0].write(0, &[1; 512]);
    until("the host's I/O", || image.begun().len() == 1);
    rig.disk.park();
    assert_eq!(rig.state().queues[0].in_flight, [sent.head]);
    image.unblock();
    until("its end", || image.ended.load(Ordering::SeqCst) == 1);
    thread::sleep(MOMENT);
    // In flight in this state, so not in the log before it.
    assert_eq!((log.list(), rig.drivers[0].unseen()), (vec![], 0));
    rig.disk.unpark();
    assert_eq!(rig.drivers[0].end(sent), (OK, 1));
    assert_eq!(log.list(), [Logged::Write(0, 1, 512)]);
}

#[test]
fn what_was_given_before_a_reset_is_logged_when_it_ends() {
    let image = TestImage::new();
    let (mut rig, log) = logging(&image, ROOM);
    image.block();
    rig.drivers[0].write(3, &[1; 512]);
    until("the host's I/O", || image.begun().len() == 1);
    rig.disk.reset();
    image.unblock();
    until("its record", || log.list() == [Logged::Write(3 * 512, 1, 512)]);
}

#[test]
fn a_guest_that_changes_its_buffer_changes_neither_image_nor_log_alone() {
    let image = TestImage::new();
    let (mut rig, log) = logging(&image, ROOM);
    image.block();
    let sent = rig.drivers[0].write(0, &[1; 512]);
    until("the host's I/O", || image.begun().len() == 1);
    rig.memory.write_slice(&[9; 512], GuestAddress(sent.data)).unwrap();
    image.unblock();
    rig.drivers[0].end(sent);
    assert_eq!((image.sector(0), log.list()), (1, vec![Logged::Write(0, 1, 512)]));
}

#[test]
fn of_a_write_that_failed_the_log_has_what_the_image_has() {
    let image = TestImage::new();
    let (mut rig, log) = logging(&image, ROOM);
    image.bytes.lock().unwrap()[..512].fill(5);
    *image.broken.lock().unwrap() = Some(Op::Write(0, 512));
    let sent = rig.drivers[0].write(0, &[1; 512]);
    assert_eq!(rig.drivers[0].end(sent), (IOERR, 1));
    assert_eq!(log.list(), [Logged::Write(0, 5, 512)]);
    *image.broken.lock().unwrap() = Some(Op::Flush);
    let sent = rig.drivers[0].send(FLUSH, 0, &[], 0);
    assert_eq!(rig.drivers[0].end(sent), (IOERR, 1));
    assert_eq!(log.list().len(), 1, "a flush that failed made nothing durable");
}

#[test]
fn a_full_log_lets_reads_through_and_changes_when_there_is_room() {
    let image = TestImage::new();
    let (mut rig, log) = logging(&image, 0);
    let driver = &mut rig.drivers[0];
    let write = driver.write(0, &[1; 512]);
    let flush = driver.send(FLUSH, 0, &[], 0);
    let read = driver.read(100, 512);
    assert_eq!(driver.end(read), (OK, 513));
    thread::sleep(MOMENT);
    assert_eq!((driver.status(write), driver.status(flush)), (UNTOUCHED, UNTOUCHED));
    assert_eq!(image.begun(), [Op::Read(100 * 512, 512)]);
    assert!(log.refused.load(Ordering::SeqCst) > 0);
    // In flight meanwhile: a replica carries them out itself.
    rig.disk.park();
    assert_eq!(rig.state().queues[0].in_flight, [write.head, flush.head]);
    rig.disk.unpark();
    *log.room.lock().unwrap() = ROOM;
    rig.disk.wake();
    assert_eq!(rig.drivers[0].answers(2).len(), 2);
    assert_eq!(log.list().len(), 2);
}

#[test]
fn a_driver_that_cannot_flush_has_each_write_made_durable_on_both_sides() {
    let image = TestImage::new();
    let file = file();
    let mut rig = Rig::bare(config(&file));
    rig.attach(&image);
    let features = rig.disk.features() & !(1 << 9);
    rig.activate_with(features);
    let log = TestLog::new(ROOM);
    rig.disk.set_write_log(Some(Arc::<TestLog>::clone(&log)));
    let sent = rig.drivers[0].write(0, &[1; 512]);
    assert_eq!(rig.drivers[0].end(sent), (OK, 1));
    assert_eq!(log.list(), [Logged::Write(0, 1, 512), Logged::Flush]);
}

#[test]
fn a_held_change_is_logged_when_it_was_released() {
    let image = TestImage::new();
    let (mut rig, log) = logging(&image, ROOM);
    rig.disk.hold();
    let sent = rig.drivers[0].write(0, &[1; 512]);
    until("the write is held", || rig.disk.open().requests == 1);
    assert!(log.list().is_empty());
    rig.disk.pass();
    rig.drivers[0].end(sent);
    assert_eq!(log.list().len(), 1);
}

#[test]
fn an_image_can_be_claimed_written_and_read_before_there_is_a_guest() {
    let file = file();
    let rig = Rig::bare(config(&file));
    let data: Vec<u8> = (0..3_000_000_u32).map(|at| u8::try_from(at % 251).unwrap()).collect();
    let data = &data[..IMAGE_BYTES.min(2 << 20) / 2];
    assert!(rig.disk.write_image(0, data).is_err(), "it is not open");
    rig.disk.claim().unwrap();
    // Nobody else writes it from here on, and a replica finds out before it does.
    let other = Rig::bare(config(&file));
    assert!(other.disk.claim().err().unwrap().what.contains("another process holds its lock"));
    rig.disk.write_image(512, data).unwrap();
    rig.disk.zero_image(1024, 512, true).unwrap();
    rig.disk.flush_image().unwrap();
    let mut read = vec![1; data.len()];
    rig.disk.read_image(512, &mut read).unwrap();
    assert!(read[..512] == data[..512] && read[512..1024].iter().all(|byte| *byte == 0));
    assert!(read[1024..] == data[1024..]);
    // And the disk works on it.
    rig.disk.attach().unwrap();
    drop(rig);
    other.disk.claim().unwrap();
}

#[test]
fn a_hole_is_known_without_reading() {
    let file = file();
    let rig = Rig::bare(config(&file));
    rig.disk.claim().unwrap();
    let len = u64::try_from(IMAGE_BYTES).unwrap();
    assert_eq!(rig.disk.image_bytes(), len);
    assert_eq!(rig.disk.hole_bytes(4096), len - 4096);
    rig.disk.write_image(len - 4096, &[1; 512]).unwrap();
    // As far as the file system says it; never past the data.
    assert!(rig.disk.hole_bytes(0) <= len - 4096);
    assert_eq!(rig.disk.hole_bytes(len - 4096), 0);
}
