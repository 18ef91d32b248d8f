//! What the sender threads put on a connection.

use std::time::Duration;

use api::replication::Cow;
use vm_memory::GuestAddress;

use super::*;
use crate::capture::cow::Freezer;
use crate::capture::cow::protect::ProtectFreezer;
use crate::ram::Mapping;
use crate::testing::Plain;
use crate::transport::memory;
use crate::wire::{FRAME_PAGES_MAX, FrameReader, Grant, GroupSums, SessionId, decode_sums};

/// Senders over `ram`, what they report, and the peer's end.
fn start(
    ram: &Ram,
    compression: Compression,
) -> (Senders, Receiver<u64>, FrameReader<Box<dyn Stream>>) {
    let (ours, theirs) = memory::pair().unwrap();
    let session = SessionId(1);
    let (done, sent) = unbounded();
    let counters = Arc::<Counters>::default();
    let writer = FrameWriter::new(ours, session);
    let deliver = move |report: Sent| done.send(report.unwrap()).is_ok();
    let senders = Senders::start(vec![writer], ram, compression, &counters, deliver).unwrap();
    (senders, sent, FrameReader::new(theirs, Some(session)))
}

fn ram(pages: usize) -> Ram {
    let mapping = Mapping::from_ranges(&[(GuestAddress(0), pages * PAGE_SIZE)]).unwrap();
    Ram::new(Arc::new(mapping))
}

/// Lengths of the frames of pages until the stream or an epoch ends.
fn frames(reader: &mut FrameReader<Box<dyn Stream>>) -> Vec<usize> {
    let mut lengths = vec![];
    while let Ok(header) = reader.begin() {
        let mut payload = Vec::new();
        reader.read_rest(&mut payload).unwrap();
        reader.finish(&header).unwrap();
        if header.kind == Kind::End {
            break;
        }
        assert_eq!(header.kind, Kind::Pages);
        lengths.push(payload.len());
    }
    lengths
}

/// Nothing more is sent before the backup acknowledged, so nothing else would find out.
#[test]
fn a_failure_after_the_last_write_is_told() {
    let (ours, _theirs) = memory::pair().unwrap();
    // It learns only when it is asked that nothing arrived.
    let flushed = || Err(io::ErrorKind::ConnectionReset.into());
    let stream: Box<dyn Stream> = Box::new(Plain { flushed, ..Plain::new(ours) });
    let writer = FrameWriter::new(stream, SessionId(1));
    let (done, sent) = unbounded();
    let deliver = move |report: Sent| done.send(report.map_err(|_| ())).is_ok();
    let ram = ram(1);
    let counters = Arc::default();
    let senders = Senders::start(vec![writer], &ram, Compression::None, &counters, deliver);
    let senders = senders.unwrap();
    let source = Source::Live(Arc::new(PageSet::new(1)));
    senders.send(&Job { number: 7, epoch: EpochId(1), source });
    let next = || sent.recv_timeout(Duration::from_secs(10));
    assert_eq!((next(), next()), (Ok(Ok(7)), Ok(Err(()))));
    senders.close().into_iter().for_each(|thread| thread.join().unwrap());
}

/// A peer that sees no byte takes the sender for dead, and a big memory is mostly untouched.
#[test]
fn an_empty_memory_is_sent_in_many_frames() {
    const FRAMES: usize = 5;
    let ram = ram(FRAMES * FRAME_PAGES_MAX);
    let mut pages = PageSet::new(ram.pages());
    (0..ram.pages()).for_each(|page| pages.insert(PageIndex(page)));
    let (senders, sent, mut reader) = start(&ram, Compression::None);
    let source = Source::Live(Arc::new(pages));
    senders.send(&Job { number: 7, epoch: EpochId(0), source });
    assert_eq!(sent.recv(), Ok(7));
    let threads = senders.close();
    assert_eq!(frames(&mut reader).len(), FRAMES);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

/// Pages that come one at a time, as scattered ones do.
struct Scattered(Vec<(PageIndex, Page)>);

impl Frozen for Scattered {
    fn next<'a>(
        &'a self,
        _: Share,
        cursor: &mut Cursor,
        _: &'a mut [Page],
        batch: &mut Vec<Piece<'a>>,
    ) {
        batch.extend(self.0.get(cursor.0).map(|(page, bytes)| (*page, bytes)));
        cursor.0 += 1;
    }
}

#[test]
fn scattered_pages_that_changed_a_little_share_a_frame() {
    const PAGES: u64 = 160;
    let (senders, _sent, mut reader) = start(&ram(1), Compression::Delta);
    for (epoch, count) in [(1, 160), (2, 3)] {
        let mut content = [7; PAGE_SIZE];
        content[9] = u8::try_from(epoch).unwrap();
        let pages = (0..PAGES).map(|page| (PageIndex(page * 65), content)).collect();
        let source = Source::Frozen(Arc::new(Scattered(pages)));
        senders.send(&Job { number: epoch, epoch: EpochId(epoch), source });
        let lengths = frames(&mut reader);
        assert_eq!(lengths.len(), count, "epoch {epoch}");
        // Of 64 pages: a run, a length, a range of a byte.
        assert!(epoch == 1 || lengths[0] == 16 + 64 * (16 + 2 + 3), "{lengths:?}");
    }
    senders.close().into_iter().for_each(|thread| thread.join().unwrap());
}

/// Pages of an epoch, some of them empty, over a stream that reads guest memory.
#[test]
fn raw_pages_leave_from_memory_and_the_others_are_let_go() {
    const PAGES: u64 = 200;
    let ram = ram(usize::try_from(PAGES).unwrap());
    let content = |page: u64| {
        let byte = u8::try_from(page).unwrap();
        if page.is_multiple_of(3) { [0; PAGE_SIZE] } else { [byte; PAGE_SIZE] }
    };
    let mut set = PageSet::new(PAGES);
    for page in (0..PAGES).filter(|page| !page.is_multiple_of(5)) {
        assert!(ram.write_page(PageIndex(page), &content(page)));
        set.insert(PageIndex(page));
    }
    let long = Duration::from_secs(600);
    let mut freezer = ProtectFreezer::new(&ram, Cow::Protect, long).unwrap();
    let (set, none) = (Arc::new(set), PageSet::new(PAGES));
    let frozen = freezer.freeze(&ram, &set, &none).unwrap();
    let (ours, theirs) = memory::pair().unwrap();
    let lent = crate::testing::Lent::default();
    let stream: Box<dyn Stream> =
        Box::new(Plain { lent: Some(Arc::clone(&lent)), ..Plain::new(ours) });
    let writer = FrameWriter::new(stream, SessionId(1));
    let (done, sent) = unbounded();
    let deliver = move |report: Sent| done.send(report.unwrap()).is_ok();
    let counters = Arc::default();
    let senders = Senders::start(vec![writer], &ram, Compression::None, &counters, deliver);
    let senders = senders.unwrap();
    let mut reader = FrameReader::new(theirs, Some(SessionId(1)));
    let reads = std::thread::spawn(move || frames(&mut reader));
    senders.send(&Job { number: 1, epoch: EpochId(1), source: Source::Frozen(frozen) });
    assert_eq!(sent.recv(), Ok(1));
    let raw = |page: &PageIndex| !page.0.is_multiple_of(3);
    let expected: Vec<_> = set.iter().filter(raw).collect();
    let told: Vec<PageIndex> =
        lent.lock().unwrap().iter().flat_map(|(pages, _)| pages.clone()).collect();
    assert_eq!(told, expected);
    // Empty pages are free, the others wait for the device.
    for page in set.iter().filter(|page| !raw(page)) {
        assert!(ram.write_page(page, &[1; PAGE_SIZE]));
    }
    assert_eq!(freezer.kept().faults, 0);
    let (wrote, written) = unbounded();
    let writes = ram.clone();
    let writer = std::thread::spawn(move || {
        for page in expected {
            assert!(writes.write_page(page, &[1; PAGE_SIZE]));
            wrote.send(page).unwrap();
        }
    });
    while freezer.kept().faults == 0 {
        std::thread::yield_now();
    }
    assert!(written.is_empty(), "the first one waits");
    lent.lock().unwrap().clear();
    writer.join().unwrap();
    assert_eq!(reads.join().unwrap().len(), 3, "a batch is a frame");
    senders.close().into_iter().for_each(|thread| thread.join().unwrap());
}

/// What goes straight from a memory of which every third page from page 600 on is zero, as runs, and of how
/// many pages there are checksums.
fn placed(is_zero: bool) -> (Vec<Vec<(u64, u64)>>, u64) {
    const PAGES: u64 = 700;
    let ram = ram(usize::try_from(PAGES).unwrap());
    let mut pages = PageSet::new(PAGES);
    for page in (0..PAGES).filter(|page| *page != 5) {
        let fill = u8::from(page < 600 || !page.is_multiple_of(3));
        assert!(ram.write_page(PageIndex(page), &[fill; PAGE_SIZE]));
        pages.insert(PageIndex(page));
    }
    let (ours, theirs) = memory::pair().unwrap();
    let placed = crate::testing::Placed::default();
    let stream: Box<dyn Stream> =
        Box::new(Plain { placed: Some(Arc::clone(&placed)), ..Plain::new(ours) });
    let writer = FrameWriter::new(stream, SessionId(1));
    let (done, sent) = unbounded();
    let deliver = move |report: Sent| done.send(report.unwrap()).is_ok();
    let counters = Arc::<Counters>::default();
    let senders = Senders::start(vec![writer], &ram, Compression::None, &counters, deliver);
    let senders = senders.unwrap();
    let grant = Grant { pages: PAGES, address: 1 << 30, key: 7 };
    let mut window = Window::new(PAGES);
    assert!(window.widen(&[grant]));
    let window = Arc::new(window);
    let straight = Straight { pages: Arc::new(pages.clone()), window, is_zero };
    let source = Source::Straight(Arc::new(straight));
    senders.send(&Job { number: 1, epoch: EpochId(0), source });
    assert_eq!(sent.recv(), Ok(1));
    senders.close().into_iter().for_each(|thread| thread.join().unwrap());
    let mut reader = FrameReader::new(theirs, Some(SessionId(1)));
    let mut told = 0;
    let mut payload = vec![];
    while let Ok(header) = reader.read(&mut payload) {
        assert_eq!(header.kind, Kind::Sums);
        for (page, sum) in decode_sums(&payload, PAGES).unwrap().iter().flat_map(GroupSums::iter) {
            let mut bytes = [0; PAGE_SIZE];
            assert!(ram.read_page(page, &mut bytes) && pages.contains(page));
            assert_eq!(sum, crc32fast::hash(&bytes));
            told += 1;
        }
    }
    assert_eq!(counters.synced_pages.load(Ordering::Relaxed), PAGES - 1);
    let calls = std::mem::take(&mut *placed.lock().unwrap());
    let runs = |call: &Vec<(PageIndex, u64)>| call.iter().map(|run| (run.0.0, run.1)).collect();
    (calls.iter().map(runs).collect(), told)
}

/// The WRITEs are as large as may be.
#[test]
fn what_goes_straight_goes_a_mebibyte_at_a_time() {
    let (calls, told) = placed(false);
    assert_eq!(calls, [vec![(0, 5), (6, 250)], vec![(256, 256)], vec![(512, 188)]]);
    assert_eq!(told, 699);
}

/// A memory that was registered is all there: what is zero is not sent for that. Its checksums are.
#[test]
fn zero_pages_of_a_first_copy_are_not_sent() {
    let (calls, told) = placed(true);
    let sent: Vec<u64> =
        calls.iter().flatten().flat_map(|(first, count)| *first..first + count).collect();
    let expected: Vec<u64> =
        (0..700).filter(|page| *page != 5 && (*page < 600 || *page % 3 != 0)).collect();
    assert_eq!(sent, expected);
    assert_eq!(told, 699);
}

/// Epochs of a memory whose pages are all protected, over a stream that reads guest memory when there is room.
fn lends_when_there_is_room(is_lent: bool) {
    const PAGES: u64 = 100;
    let ram = ram(usize::try_from(PAGES).unwrap());
    let mut set = PageSet::new(PAGES);
    for page in (0..PAGES).map(PageIndex) {
        assert!(ram.write_page(page, &[7; PAGE_SIZE]));
        set.insert(page);
    }
    let long = Duration::from_secs(600);
    let mut freezer = ProtectFreezer::new(&ram, Cow::Protect, long).unwrap();
    let frozen = freezer.freeze(&ram, &Arc::new(set), &PageSet::new(PAGES)).unwrap();
    let (ours, theirs) = memory::pair().unwrap();
    let lent = crate::testing::Lent::default();
    let ((asks, asked), (answer, answers)) = (unbounded(), unbounded());
    let stream: Box<dyn Stream> = Box::new(Plain {
        lent: Some(Arc::clone(&lent)),
        room: Some((asks, answers)),
        ..Plain::new(ours)
    });
    let writer = FrameWriter::new(stream, SessionId(1));
    let (done, sent) = unbounded();
    let deliver = move |report: Sent| done.send(report.unwrap()).is_ok();
    let counters = Arc::default();
    let senders = Senders::start(vec![writer], &ram, Compression::None, &counters, deliver);
    let senders = senders.unwrap();
    let mut reader = FrameReader::new(theirs, Some(SessionId(1)));
    let reads = std::thread::spawn(move || frames(&mut reader));
    senders.send(&Job { number: 1, epoch: EpochId(1), source: Source::Frozen(frozen) });
    asked.recv().unwrap();
    // The backup has no room, however long that takes; no write of the guest waits for that.
    let (wrote, written) = unbounded();
    let writes = ram.clone();
    std::thread::spawn(move || {
        for page in [0, 63, 64, 99].map(PageIndex) {
            assert!(writes.write_page(page, &[1; PAGE_SIZE]));
            let _ = wrote.send(page);
        }
    });
    for page in [0, 63, 64, 99] {
        let wrote = written.recv_timeout(Duration::from_secs(10));
        assert_eq!(wrote, Ok(PageIndex(page)), "the guest waits for the backup's room");
    }
    (0..20).for_each(|_| answer.send(is_lent).unwrap());
    assert_eq!(sent.recv(), Ok(1));
    let told: u64 = lent.lock().unwrap().iter().map(|(pages, _)| pages.len() as u64).sum();
    assert_eq!(told, if is_lent { PAGES - 4 } else { 0 });
    lent.lock().unwrap().clear();
    // With the bytes that they had at the seal.
    assert_eq!(reads.join().unwrap().len(), 2);
    senders.close().into_iter().for_each(|thread| thread.join().unwrap());
}

/// A backup that has no room for long is no device that hangs.
#[test]
fn nothing_is_lent_before_there_is_room() {
    lends_when_there_is_room(true);
}

#[test]
fn a_link_that_is_too_slow_is_lent_nothing() {
    lends_when_there_is_room(false);
}

/// Pages that were let go while they were looked at.
struct LetGo(Scattered);

impl Frozen for LetGo {
    fn next<'a>(
        &'a self,
        share: Share,
        cursor: &mut Cursor,
        scratch: &'a mut [Page],
        batch: &mut Vec<Piece<'a>>,
    ) {
        self.0.next(share, cursor, scratch, batch);
    }

    fn is_revoked(&self) -> bool {
        true
    }
}

#[test]
fn what_was_let_go_is_not_sent() {
    let (ours, theirs) = memory::pair().unwrap();
    let lent = Some(crate::testing::Lent::default());
    let stream: Box<dyn Stream> = Box::new(Plain { lent, ..Plain::new(ours) });
    let writer = FrameWriter::new(stream, SessionId(1));
    let (done, sent) = unbounded();
    let deliver = move |report: Sent| done.send(report.map_err(|_| ())).is_ok();
    let (ram, counters) = (ram(1), Arc::default());
    let senders = Senders::start(vec![writer], &ram, Compression::None, &counters, deliver);
    let senders = senders.unwrap();
    let pages = (0..3).map(|page| (PageIndex(page), [7; PAGE_SIZE])).collect();
    let source = Source::Frozen(Arc::new(LetGo(Scattered(pages))));
    senders.send(&Job { number: 1, epoch: EpochId(1), source });
    assert_eq!(sent.recv(), Ok(Err(())));
    senders.close().into_iter().for_each(|thread| thread.join().unwrap());
    let mut reader = FrameReader::new(theirs, Some(SessionId(1)));
    assert_eq!(frames(&mut reader).len(), 0);
}

/// By RDMA a connection that is closed takes what there is room for: as long as it does, memory is read.
#[test]
fn a_sender_that_goes_on_after_its_end_is_waited_for() {
    let ram = ram(20);
    let mut pages = PageSet::new(20);
    (0..20).for_each(|page| pages.insert(PageIndex(page)));
    let (ours, _theirs) = memory::pair().unwrap();
    let ((asks, asked), (answer, answers)) = (unbounded(), unbounded());
    let stream: Box<dyn Stream> =
        Box::new(Plain { room: Some((asks, answers)), ..Plain::new(ours) });
    let writer = FrameWriter::new(stream, SessionId(1));
    let counters = Arc::default();
    let senders =
        Senders::start(vec![writer], &ram, Compression::None, &counters, |_| true).unwrap();
    let source = Source::Still(Arc::new(pages));
    senders.send(&Job { number: 7, epoch: EpochId(1), source });
    asked.recv().unwrap();
    let (tell, told) = unbounded();
    senders.close_and(move || tell.send(()).unwrap());
    assert!(told.recv_timeout(Duration::from_millis(200)).is_err(), "it is at it yet");
    answer.send(false).unwrap();
    told.recv_timeout(Duration::from_secs(10)).unwrap();
}

/// With `cow=off` nobody writes before all is out, and nothing is under way then.
#[test]
fn pages_of_a_guest_that_stands_leave_from_memory() {
    let ram = ram(20);
    let mut pages = PageSet::new(20);
    for page in (0..20).map(PageIndex) {
        assert!(ram.write_page(page, &[7; PAGE_SIZE]));
        pages.insert(page);
    }
    let lent = crate::testing::Lent::default();
    let (ours, theirs) = memory::pair().unwrap();
    // What was lent is there until a flush says that it is not read any more.
    let flushed = || Err(io::ErrorKind::ConnectionReset.into());
    let stream: Box<dyn Stream> =
        Box::new(Plain { lent: Some(Arc::clone(&lent)), flushed, ..Plain::new(ours) });
    let writer = FrameWriter::new(stream, SessionId(1));
    let (done, sent) = unbounded();
    let deliver = move |report: Sent| done.send(report.map_err(|_| ())).is_ok();
    let counters = Arc::default();
    let senders = Senders::start(vec![writer], &ram, Compression::None, &counters, deliver);
    let senders = senders.unwrap();
    let source = Source::Still(Arc::new(pages));
    senders.send(&Job { number: 7, epoch: EpochId(1), source });
    assert_eq!(sent.recv(), Ok(Err(())), "it is not out before the flush");
    let told = lent.lock().unwrap().iter().map(|(pages, _)| pages.len()).sum::<usize>();
    assert_eq!(told, 20);
    senders.close().into_iter().for_each(|thread| thread.join().unwrap());
    // A backup that has this to its end must not find in it what is written once the guest runs.
    let mut reader = FrameReader::new(theirs, Some(SessionId(1)));
    let kinds: Vec<Kind> =
        std::iter::from_fn(|| reader.read(&mut vec![]).ok().map(|header| header.kind)).collect();
    assert_eq!(kinds, [Kind::Pages]);
}
