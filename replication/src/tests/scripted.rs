//! A primary that keeps to the frames and breaks the protocol: what it sends is well formed, and
//! must neither be acknowledged nor reach an image that may run.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::pair::Backup;
use crate::ids::{EpochId, Generation, PAGE_SIZE, PageIndex};
use crate::observer::Event;
use crate::protocol::backup::Handover;
use crate::wire::{
    ConnectionPart, Encoding, End, FrameReader, FrameWriter, HEADER_BYTES, Hello, Kind, Message,
    Offer, Runs, Seal, SessionId, WireRegion, encode_pages_header,
};

pub(super) const SESSION: SessionId = SessionId(42);
const PAGES: u64 = 1200;
const G1: Generation = Generation(1);

pub(super) struct Script {
    pub(super) backup: Backup,
    pub(super) vm: Uuid,
    pub(super) host: Uuid,
    pub(super) writer: FrameWriter<TcpStream>,
    pub(super) reader: FrameReader<TcpStream>,
    pub(super) data: FrameWriter<TcpStream>,
    sum: ConnectionPart,
}

/// What a primary says first.
pub(super) fn offer() -> Offer {
    let description = [0u64.to_le_bytes(), PAGES.to_le_bytes()].concat();
    let regions = vec![WireRegion { start: 0, pages: PAGES }];
    let (heartbeat_ms, timeout_ms, page_bytes) = (200, 5000, 4096);
    Offer {
        page_bytes,
        heartbeat_ms,
        timeout_ms,
        arbiter: false,
        rdma: false,
        base: None,
        reversed: false,
        regions,
        disks: vec![],
        way_back: String::new(),
        fallback: String::new(),
        description,
    }
}

pub(super) fn connect(backup: &Backup) -> TcpStream {
    TcpStream::connect(("127.0.0.1", backup.port())).unwrap()
}

/// Greets as `vm` in a session of its own; returns what the backup says.
pub(super) fn greet(
    backup: &Backup,
    session: SessionId,
    names: (Uuid, Uuid),
    offer: Offer,
) -> (FrameWriter<TcpStream>, FrameReader<TcpStream>, Message) {
    greet_for(1, backup, session, names, offer)
}

/// As [`greet`], for so many data connections.
fn greet_for(
    connections: u32,
    backup: &Backup,
    session: SessionId,
    (vm, host): (Uuid, Uuid),
    offer: Offer,
) -> (FrameWriter<TcpStream>, FrameReader<TcpStream>, Message) {
    let control = connect(backup);
    let mut reader = FrameReader::new(control.try_clone().unwrap(), Some(session));
    let mut writer = FrameWriter::new(control, session);
    let hello = Hello { vm, host, connection: 0, connections };
    Message::Hello(hello).send(&mut writer).unwrap();
    Message::Offer(offer).send(&mut writer).unwrap();
    let word = next(&mut reader);
    (writer, reader, word)
}

impl Script {
    /// Welcomed, with one data connection, and paired.
    pub(super) fn start() -> Self {
        let mut script = Self::greeted(Backup::start(None), offer());
        script.say(&Message::Paired(G1));
        script
    }

    /// Welcomed, with one data connection.
    pub(super) fn greeted(backup: Backup, offer: Offer) -> Self {
        Self::again(backup, SESSION, (Uuid::new_v4(), Uuid::new_v4()), offer)
    }

    pub(super) fn again(
        backup: Backup,
        session: SessionId,
        names: (Uuid, Uuid),
        offer: Offer,
    ) -> Self {
        Self::one_of(1, 1, backup, session, names, offer)
    }

    /// Welcomed, with data connection `connection` of `connections`.
    pub(super) fn one_of(
        connection: u32,
        connections: u32,
        backup: Backup,
        session: SessionId,
        (vm, host): (Uuid, Uuid),
        offer: Offer,
    ) -> Self {
        let greeted = greet_for(connections, &backup, session, (vm, host), offer);
        let (writer, reader, welcome) = greeted;
        assert!(matches!(welcome, Message::Welcome(_)), "{welcome:?}");
        let mut data = FrameWriter::new(connect(&backup), session);
        let hello = Hello { vm, host, connection, connections };
        Message::Hello(hello).send(&mut data).unwrap();
        let sum = ConnectionPart::default();
        Self { backup, vm, host, writer, reader, data, sum }
    }

    pub(super) fn say(&mut self, message: &Message) {
        message.send(&mut self.writer).unwrap();
    }

    pub(super) fn pages(&mut self, epoch: u64, pages: std::ops::Range<u64>) {
        let count = usize::try_from(pages.end - pages.start).unwrap();
        self.frame(epoch, &[(pages, Encoding::Raw)], &vec![0xAB; count * PAGE_SIZE]);
    }

    pub(super) fn frame(
        &mut self,
        epoch: u64,
        pages: &[(std::ops::Range<u64>, Encoding)],
        contents: &[u8],
    ) {
        let mut runs = Runs::default();
        for (pages, encoding) in pages {
            let pages = pages.clone().map(PageIndex);
            pages.for_each(|page| assert!(runs.push(page, *encoding)));
        }
        let mut head = Vec::new();
        encode_pages_header(EpochId(epoch), &runs, &mut head);
        if let Ok(crc) = self.data.write(Kind::Pages, &[&head, contents]) {
            self.sum.add(runs.pages(), crc);
        }
    }

    /// The pages so far were of a copy.
    pub(super) fn forget_pages(&mut self) {
        self.sum = ConnectionPart::default();
    }

    pub(super) fn end(&mut self, epoch: u64) {
        let part = std::mem::take(&mut self.sum);
        let end = End { epoch: EpochId(epoch), part };
        self.data.write(Kind::End, &[&end.encode()]).unwrap();
    }

    pub(super) fn seal(&mut self, epoch: u64, generation: u64, pages: u64) {
        let seal = Seal {
            epoch: EpochId(epoch),
            generation: Generation(generation),
            handover: Handover::No,
            pages: vec![pages],
            changes: 0,
            state: b"sum:\0\0\0\0".to_vec(),
        };
        Message::Seal(seal).send(&mut self.writer).unwrap();
    }

    /// The backup's next words are an abort that contains `text`; one error was told.
    pub(super) fn aborted(mut self, text: &str) {
        self.hears_abort(text);
    }

    pub(super) fn hears_abort(&mut self, text: &str) {
        let word = next(&mut self.reader);
        let Message::Abort(reason) = &word else { panic!("{word:?}") };
        assert!(reason.contains(text), "{reason}");
        let is_failed = |event: &Event| matches!(event, Event::ReceiveFailed { .. });
        self.backup.events.wait(is_failed).unwrap();
        let events = self.backup.events.events();
        assert_eq!(events.iter().filter(|event| is_failed(event)).count(), 1, "{events:?}");
        assert!(self.backup.log.started.lock().unwrap().is_none());
    }

    pub(super) fn acked(&mut self, epoch: u64) {
        let word = next(&mut self.reader);
        assert_eq!(word, Message::Ack { epoch: EpochId(epoch), generation: G1 });
    }
}

pub(super) fn next(reader: &mut FrameReader<TcpStream>) -> Message {
    loop {
        match Message::receive(reader, &mut Vec::new()).unwrap() {
            Message::Heartbeat | Message::Progress(_) => {}
            word => return word,
        }
    }
}

#[test]
fn a_page_count_that_does_not_match_is_no_epoch() {
    let mut script = Script::start();
    script.pages(1, 3..5);
    script.end(1);
    script.seal(1, 1, 3);
    script.aborted("has 2 pages");
}

#[test]
fn epochs_are_consecutive() {
    let mut script = Script::start();
    script.end(3);
    script.aborted("where 1 was due");
    let mut script = Script::start();
    script.end(1);
    script.seal(1, 1, 0);
    script.acked(1);
    script.seal(1, 1, 0);
    script.aborted("where 2 was due");
}

#[test]
fn an_epoch_that_is_whole_before_the_one_that_is_due_waits_for_it() {
    let mut script = Script::start();
    script.seal(1, 1, 2);
    script.seal(2, 1, 1);
    script.pages(1, 3..5);
    script.end(1);
    script.acked(1);
    script.pages(2, 4..5);
    script.end(2);
    script.acked(2);
    // The other way round: all pages, then the seals.
    script.end(3);
    script.end(4);
    script.seal(4, 1, 0);
    script.seal(3, 1, 0);
    script.acked(3);
    script.acked(4);
    script.seal(5, 1, 0);
    script.seal(5, 1, 0);
    script.aborted("sealed twice");
}

/// What two epochs in flight take of the staging together is bounded, and free again after each.
#[test]
fn epochs_in_flight_share_the_staging() {
    let mut script = Script::start();
    // 4 MiB are 1024 pages: 500 and 500 fit, again and again.
    for epoch in 1..5 {
        for from in (0..448).step_by(64) {
            script.pages(epoch, from..from + 64);
        }
        script.end(epoch);
        if epoch > 1 {
            script.seal(epoch - 1, 1, 448);
            script.acked(epoch - 1);
        }
    }
    for from in (0..512).step_by(64) {
        script.pages(5, from..from + 64);
    }
    // 448 of the fourth and these 576 are all there is.
    script.pages(5, 0..64);
    script.pages(5, 0..64);
    script.aborted("exceeds the staging");
}

#[test]
fn an_end_that_does_not_match_its_pages_is_refused() {
    let mut script = Script::start();
    script.pages(1, 3..5);
    script.sum.digest ^= 1;
    script.end(1);
    script.aborted("does not match what arrived");
}

#[test]
fn a_generation_that_was_not_paired_is_refused() {
    let mut script = Script::start();
    script.end(1);
    script.seal(1, 2, 0);
    script.aborted("belongs to generation 2");
}

#[test]
fn an_epoch_larger_than_the_staging_is_refused() {
    let mut script = Script::start();
    // 4 MiB are 1024 pages.
    for from in (0..17).map(|frame| frame * 64) {
        script.pages(1, from..from + 64);
    }
    script.aborted("exceeds the staging");
}

#[test]
fn an_epoch_of_more_pages_than_the_memory_has_is_refused() {
    let mut script = Script::start();
    // What takes no staging is bounded too: applying it takes time.
    for _ in 0..2 {
        script.frame(1, &[(0..601, Encoding::Zero)], &[]);
    }
    script.aborted("has pages twice");
}

/// Zeroes cost nothing on the wire, and whoever ends a session waits for those that are under way.
#[test]
fn a_frame_of_a_copy_with_more_pages_than_a_frame_may_have_is_refused() {
    let mut script = Script::start();
    let mut runs = Runs::default();
    assert!(runs.push(PageIndex(0), Encoding::Zero));
    let mut head = Vec::new();
    encode_pages_header(EpochId(0), &runs, &mut head);
    // After the epoch, the number of runs, and the run's first page.
    head[24..28].copy_from_slice(&1025u32.to_le_bytes());
    script.data.write(Kind::Pages, &[&head]).unwrap();
    script.aborted("number of pages of a copy");
}

/// Whoever held the memory for the session lets go of it before the machine runs.
#[test]
fn data_connections_have_ended_before_a_machine_starts() {
    let mut script = Script::start();
    script.pages(1, 3..5);
    script.end(1);
    script.seal(1, 1, 2);
    script.acked(1);
    script.end(2);
    let (epoch, state) = (EpochId(2), b"sum:\0\0\0\0".to_vec());
    let last = Seal {
        epoch,
        generation: G1,
        handover: Handover::Leave,
        pages: vec![0],
        changes: 0,
        state,
    };
    let log = Arc::clone(&script.backup.log);
    let starting = log.starting.lock().unwrap();
    script.say(&Message::Seal(last));
    script.acked(2);
    // The machine is about to start, and cannot.
    let mut data = script.data.get_ref();
    data.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    assert_eq!(data.read(&mut [0]).unwrap(), 0);
    drop(starting);
    let word = next(&mut script.reader);
    assert!(matches!(word, Message::HandedOver { reversed: false, .. }), "{word:?}");
}

/// A backup that sets aside so much, and a primary whose memory has so many pages.
fn sizes(staging_bytes: u64, pages: u64) -> Script {
    let mut options = super::receive_options(None);
    options.staging_size = staging_bytes;
    let backup = Backup::with(crate::testing::MemoryBuilder::default(), options);
    let description = [0u64.to_le_bytes(), pages.to_le_bytes()].concat();
    let regions = vec![WireRegion { start: 0, pages }];
    let mut script = Script::greeted(backup, Offer { regions, description, ..offer() });
    script.say(&Message::Paired(G1));
    script
}

/// Descending, no page continues the one before: each is a run of its own.
fn single(
    pages: std::ops::Range<u64>,
    encoding: Encoding,
) -> Vec<(std::ops::Range<u64>, Encoding)> {
    pages.rev().map(|page| (page..page + 1, encoding)).collect()
}

/// Zero pages have no contents, but the runs that say so are kept until the epoch is applied.
#[test]
fn runs_of_zero_pages_are_staged_at_what_they_take() {
    // 1 MiB is 65536 runs.
    let mut script = sizes(1 << 20, 70_000);
    for from in (0..257).map(|frame| frame * 256) {
        script.frame(1, &single(from..from + 256, Encoding::Zero), &[]);
    }
    script.aborted("exceeds the staging");
}

#[test]
fn an_epoch_that_fits_when_its_pages_are_counted_is_never_refused() {
    // 1 MiB is 256 pages, however they come.
    let mut script = sizes(1 << 20, 1200);
    for from in (0..256).step_by(64) {
        script.frame(1, &single(from..from + 64, Encoding::Raw), &vec![0xAB; 64 * PAGE_SIZE]);
    }
    script.end(1);
    script.seal(1, 1, 256);
    script.acked(1);
    script.frame(2, &single(0..256, Encoding::Zero), &[]);
    script.end(2);
    script.seal(2, 1, 256);
    script.acked(2);
}

/// On two connections a page could come twice, and what the image has would be chance.
#[test]
fn a_page_of_another_connection_s_group_is_refused() {
    for epoch in [0, 1] {
        for (connection, foreign) in [(1, 64..65), (1, 0..65), (2, 128..129), (2, 64..129)] {
            let backup = Backup::start(None);
            let names = (Uuid::new_v4(), Uuid::new_v4());
            let mut script = Script::one_of(connection, 2, backup, SESSION, names, offer());
            // Those of its own groups are welcome.
            let own = u64::from(connection - 1) * 64;
            script.pages(epoch, own..own + 64);
            let text =
                format!("Pages from {} on arrived on data connection {connection}", foreign.start);
            script.frame(epoch, &[(foreign, Encoding::Zero)], &[]);
            script.aborted(&text);
        }
    }
}

#[test]
fn an_epoch_of_more_pages_than_a_connection_has_is_refused() {
    let backup = Backup::start(None);
    let names = (Uuid::new_v4(), Uuid::new_v4());
    let mut script = Script::one_of(2, 2, backup, SESSION, names, offer());
    // Of 1200 pages, 19 groups of which the last is short, the second has 9 groups.
    for _ in 0..9 {
        script.frame(1, &[(64..128, Encoding::Zero)], &[]);
    }
    script.frame(1, &[(192..193, Encoding::Zero)], &[]);
    script.aborted("has pages twice");
}

#[test]
fn pages_of_a_first_copy_never_follow_a_committed_epoch() {
    let mut script = Script::start();
    script.pages(0, 0..10);
    script.sum = ConnectionPart::default();
    script.end(1);
    script.seal(1, 1, 0);
    script.acked(1);
    script.pages(0, 0..10);
    script.aborted("after a committed epoch");
}

#[test]
fn two_epochs_at_once_are_refused() {
    let mut script = Script::start();
    script.pages(1, 0..1);
    script.pages(2, 0..1);
    script.aborted("before the end of epoch 1");
}

#[test]
fn the_last_generation_is_refused() {
    let mut script = Script::greeted(Backup::start(None), offer());
    script.say(&Message::Paired(Generation(u64::MAX)));
    script.aborted("last generation");
}

#[test]
fn paces_that_nobody_could_keep_are_refused() {
    let backup = Backup::start(None);
    for (heartbeat_ms, timeout_ms) in [(0, 5000), (200, u32::MAX), (200, 200)] {
        let names = (Uuid::new_v4(), Uuid::new_v4());
        let offer = Offer { heartbeat_ms, timeout_ms, ..offer() };
        let (_, _, word) = greet(&backup, SESSION, names, offer);
        let Message::Refuse(reason) = word else { panic!("{word:?}") };
        assert!(reason.contains("_ms' is invalid"), "{reason}");
    }
    assert_eq!(backup.log.built.load(std::sync::atomic::Ordering::Acquire), 0);
}

#[test]
fn a_primary_whose_url_is_of_another_kind_hears_why() {
    let backup = Backup::start(None);
    let offer = Offer { rdma: true, ..offer() };
    let names = (Uuid::new_v4(), Uuid::new_v4());
    let (_, _, word) = greet(&backup, SESSION, names, offer);
    let Message::Refuse(reason) = word else { panic!("{word:?}") };
    assert!(
        reason.contains("destination_url is rdma: and the backup's receiver_url is not"),
        "{reason}"
    );
    assert_eq!(backup.log.built.load(std::sync::atomic::Ordering::Acquire), 0);
}

/// The offer said that pages come by TCP.
#[test]
fn a_queue_pair_that_nobody_offered_is_refused() {
    let mut script = Script::start();
    script.data.write(Kind::Verbs, &[&[0; 49]]).unwrap();
    script.aborted("sent a queue pair");
}

#[test]
fn a_greeting_for_the_same_vm_does_not_end_its_session() {
    let mut script = Script::start();
    script.end(1);
    script.seal(1, 1, 0);
    script.acked(1);
    let other = SessionId(43);
    for host in [script.host, Uuid::new_v4()] {
        let (_, _, word) = greet(&script.backup, other, (script.vm, host), offer());
        let Message::Abort(reason) = word else { panic!("{word:?}") };
        assert!(reason.contains("serves this VM already"), "{reason}");
    }
    // Nor does a data connection or a bell of a session that is not this one.
    for connection in [1, 2] {
        let mut data = FrameWriter::new(connect(&script.backup), other);
        let (vm, host) = (script.vm, script.host);
        let hello = Hello { vm, host, connection, connections: 1 };
        Message::Hello(hello).send(&mut data).unwrap();
        assert_eq!(data.get_ref().read(&mut [0; 1]).unwrap_or(0), 0, "it was closed");
    }
    script.end(2);
    script.seal(2, 1, 0);
    script.acked(2);
}

/// Its caller may be the one that is just being let go, and does not call again.
#[test]
fn a_first_call_waits_for_the_end_of_the_session_before() {
    let mut script = Script::start();
    script.end(1);
    script.seal(1, 1, 0);
    script.acked(1);
    let next = std::thread::scope(|scope| {
        let names = (script.vm, script.host);
        let backup = &script.backup;
        let greeted = scope.spawn(move || greet(backup, SessionId(43), names, offer()).2);
        // Long enough to be there, and not for as long as it may wait.
        std::thread::sleep(Duration::from_millis(150));
        Message::Stop.send(&mut script.writer).unwrap();
        assert_eq!(next(&mut script.reader), Message::StopDone);
        greeted.join().unwrap()
    });
    assert!(matches!(next, Message::Welcome(_)), "{next:?}");
}

/// Epoch last sealed, last committed, and whether the copy is over.
fn shown(info: &api::replication::ReplicationInfo) -> (u64, u64, bool) {
    (info.epoch_sealed, info.epoch_committed, info.sync_progress >= 1.0)
}

#[test]
fn what_a_backup_shows_is_of_the_present_session() {
    use api::replication::ReplicationState::{Disconnected, Protected, Syncing};
    let mut script = Script::start();
    script.pages(0, 0..10);
    script.forget_pages();
    script.end(1);
    script.seal(1, 1, 0);
    script.acked(1);
    let is = |script: &Script, state| {
        super::until(|| script.backup.handle.info(), |info| info.state == state)
    };
    assert_eq!(shown(&is(&script, Protected)), (1, 1, true));
    // What a copy anew goes over is no committed epoch.
    script.say(&Message::Resync);
    assert_eq!(next(&mut script.reader), Message::ResyncReady);
    let info = is(&script, Syncing);
    assert_eq!((info.epoch_committed, info.sync_progress), (0, 0.0));
    script.say(&Message::Paired(Generation(2)));
    script.end(2);
    script.seal(2, 2, 0);
    let acked = Message::Ack { epoch: EpochId(2), generation: Generation(2) };
    assert_eq!(next(&mut script.reader), acked);
    assert_eq!(shown(&is(&script, Protected)), (2, 2, true));
    script.say(&Message::Stop);
    assert_eq!(next(&mut script.reader), Message::StopDone);
    let info = is(&script, Disconnected);
    assert_eq!((info.epoch_sealed, info.epoch_committed, info.sync_progress), (0, 0, 0.0));
    let names = (script.vm, script.host);
    let mut script = Script::again(script.backup, SessionId(44), names, offer());
    assert_eq!(shown(&is(&script, Syncing)), (0, 0, false));
    script.say(&Message::Paired(G1));
    script.end(1);
    script.seal(1, 1, 0);
    script.acked(1);
    assert_eq!(shown(&is(&script, Protected)), (1, 1, true));
}

#[test]
fn a_primary_that_is_lost_during_the_first_copy_leaves_nothing() {
    let mut script = Script::greeted(Backup::start(None), offer());
    script.pages(0, 0..10);
    let Script { backup, writer, reader, data, .. } = script;
    drop((writer, reader, data));
    backup.events.wait(|event| matches!(event, Event::ReceiveFailed { .. })).unwrap();
    let state = api::replication::ReplicationState::Disconnected;
    super::until(|| backup.handle.info(), |info| info.state == state);
    assert!(backup.handle.failover(true).is_err());
    let next = Script::again(backup, SessionId(44), (Uuid::new_v4(), Uuid::new_v4()), offer());
    assert_eq!(next.backup.wrong(), Vec::<String>::new());
}

/// Changes each byte that comes after so many.
struct Corrupting {
    tcp: TcpStream,
    good: usize,
}

impl Write for Corrupting {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let mut bytes = bytes.to_vec();
        bytes.iter_mut().skip(self.good).for_each(|byte| *byte ^= 1);
        self.good = self.good.saturating_sub(bytes.len());
        self.tcp.write_all(&bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.tcp.flush()
    }
}

/// Its pages are in the image by then.
#[test]
fn a_copy_with_a_wrong_checksum_leaves_nothing_to_start_from() {
    for (is_anew, encoding) in
        [(false, Encoding::Raw), (true, Encoding::Raw), (true, Encoding::Lz4)]
    {
        let mut script = Script::start();
        script.pages(0, 0..10);
        if is_anew {
            script.sum = ConnectionPart::default();
            script.end(1);
            script.seal(1, 1, 0);
            script.acked(1);
            script.say(&Message::Resync);
            while !matches!(next(&mut script.reader), Message::ResyncReady) {}
        }
        let mut runs = Runs::default();
        (10..12).for_each(|page| assert!(runs.push(PageIndex(page), encoding)));
        let mut head = Vec::new();
        encode_pages_header(EpochId(0), &runs, &mut head);
        let contents = match encoding {
            Encoding::Raw => vec![1; 2 * PAGE_SIZE],
            _ => [200u16.to_le_bytes().as_slice(), &[1; 200]].concat().repeat(2),
        };
        let good = HEADER_BYTES + head.len();
        let same = FrameWriter::new(script.data.get_ref().try_clone().unwrap(), SESSION);
        let data = std::mem::replace(&mut script.data, same);
        let mut data = data.map(|tcp| Corrupting { tcp, good });
        data.write(Kind::Pages, &[&head, &contents]).unwrap();
        script.hears_abort("checksum");
        let state = api::replication::ReplicationState::Disconnected;
        super::until(|| script.backup.handle.info(), |info| info.state == state);
        assert!(script.backup.handle.failover(true).is_err());
    }
}

#[test]
fn a_backup_is_shown_as_free_once_it_is() {
    let script = Script::greeted(Backup::start(None), offer());
    let Script { backup, writer, reader, data, .. } = script;
    let log = std::sync::Arc::clone(&backup.log);
    let guard = log.busy.lock().unwrap();
    drop((writer, reader, data));
    let state = api::replication::ReplicationState::Disconnected;
    super::until(|| backup.handle.info(), |info| info.last_error.is_some());
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert_ne!(backup.handle.info().state, state, "the replica is still there");
    drop(guard);
    super::until(|| backup.handle.info(), |info| info.state == state);
    assert_eq!(log.alive.load(std::sync::atomic::Ordering::Acquire), 0);
}
