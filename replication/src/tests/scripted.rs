//! A primary that keeps to the frames and breaks the protocol: what it sends is well formed, and
//! must neither be acknowledged nor reach the image.

use std::net::TcpStream;

use uuid::Uuid;

use super::pair::Backup;
use crate::ids::{EpochId, Generation, PAGE_SIZE, PageIndex};
use crate::observer::Event;
use crate::wire::{
    ConnectionPart, End, FrameReader, FrameWriter, Hello, Kind, Message, Offer, Runs, Seal,
    SessionId, WireRegion, encode_pages_header,
};

const SESSION: SessionId = SessionId(42);
const PAGES: u64 = 600;
const G1: Generation = Generation(1);

struct Script {
    backup: Backup,
    writer: FrameWriter<TcpStream>,
    reader: FrameReader<TcpStream>,
    data: FrameWriter<TcpStream>,
    sum: ConnectionPart,
}

impl Script {
    /// Welcomed, with one data connection, and paired.
    fn start() -> Self {
        let backup = Backup::start(None);
        let connect = || TcpStream::connect(("127.0.0.1", backup.port())).unwrap();
        let control = connect();
        let mut reader = FrameReader::new(control.try_clone().unwrap(), Some(SESSION));
        let mut writer = FrameWriter::new(control, SESSION);
        let (vm, host) = (Uuid::new_v4(), Uuid::new_v4());
        let hello = |connection| Message::Hello(Hello { vm, host, connection, connections: 1 });
        hello(0).send(&mut writer).unwrap();
        let description = [0u64.to_le_bytes(), PAGES.to_le_bytes()].concat();
        let regions = vec![WireRegion { start: 0, pages: PAGES }];
        let (heartbeat_ms, timeout_ms, page_bytes) = (200, 5000, 4096);
        let arbiter = false;
        let offer = Offer { page_bytes, heartbeat_ms, timeout_ms, arbiter, regions, description };
        Message::Offer(offer).send(&mut writer).unwrap();
        let welcome = next(&mut reader);
        assert!(matches!(welcome, Message::Welcome(_)), "{welcome:?}");
        let mut data = FrameWriter::new(connect(), SESSION);
        hello(1).send(&mut data).unwrap();
        Message::Paired(G1).send(&mut writer).unwrap();
        Self { backup, writer, reader, data, sum: ConnectionPart::default() }
    }

    fn pages(&mut self, epoch: u64, pages: std::ops::Range<u64>) {
        let mut runs = Runs::default();
        let count = pages.end - pages.start;
        pages.for_each(|page| assert!(runs.push(PageIndex(page), false)));
        let mut head = Vec::new();
        encode_pages_header(EpochId(epoch), &runs, &mut head);
        let content = vec![0xAB; usize::try_from(count).unwrap() * PAGE_SIZE];
        if let Ok(crc) = self.data.write(Kind::Pages, &[&head, &content]) {
            self.sum.add(count, crc);
        }
    }

    fn end(&mut self, epoch: u64) {
        let part = std::mem::take(&mut self.sum);
        let end = End { epoch: EpochId(epoch), part };
        self.data.write(Kind::End, &[&end.encode()]).unwrap();
    }

    fn seal(&mut self, epoch: u64, generation: u64, pages: u64) {
        let seal = Seal {
            epoch: EpochId(epoch),
            generation: Generation(generation),
            handover: false,
            pages: vec![pages],
            state: b"sum:\0\0\0\0".to_vec(),
        };
        Message::Seal(seal).send(&mut self.writer).unwrap();
    }

    /// The backup's next words are an abort that contains `text`; one error was told.
    fn aborted(mut self, text: &str) {
        let word = next(&mut self.reader);
        let Message::Abort(reason) = &word else { panic!("{word:?}") };
        assert!(reason.contains(text), "{reason}");
        let is_failed = |event: &Event| matches!(event, Event::ReceiveFailed { .. });
        self.backup.events.wait(is_failed).unwrap();
        let events = self.backup.events.events();
        assert_eq!(events.iter().filter(|event| is_failed(event)).count(), 1, "{events:?}");
        assert!(self.backup.log.started.lock().unwrap().is_none());
    }

    fn acked(&mut self, epoch: u64) {
        let word = next(&mut self.reader);
        assert_eq!(word, Message::Ack { epoch: EpochId(epoch), generation: G1 });
    }
}

fn next(reader: &mut FrameReader<TcpStream>) -> Message {
    loop {
        match Message::receive(reader, &mut Vec::new()).unwrap() {
            Message::Heartbeat => {}
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
    script.end(2);
    script.seal(2, 1, 0);
    script.aborted("where 1 was due");
    let mut script = Script::start();
    script.end(1);
    script.seal(1, 1, 0);
    script.acked(1);
    script.seal(1, 1, 0);
    script.aborted("where 2 was due");
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
    // 4 MiB are 1024 pages: the same ones sent twice fill them.
    for round in 0..17 {
        let from = (round % 8) * 64;
        script.pages(1, from..from + 64);
    }
    script.aborted("exceeds the staging");
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
