//! What a primary must not send on the disks' connection: refused, and never in the image.

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use api::replication::ReplicationState;
use uuid::Uuid;

use super::pair::Backup;
use super::receive_options;
use super::scripted::{Script, connect, greet, offer};
use crate::disk::{CHANGE_BYTES_MAX, COPY_BYTES_MAX, Operation};
use crate::ids::{EpochId, Generation};
use crate::protocol::backup::Handover;
use crate::testing::{MemoryBuilder, MemoryImage};
use crate::wire::{
    ChangeHead, ConnectionPart, End, FrameWriter, Hello, Kind, Message, Offer, Seal, SessionId,
};

const SIZE: u64 = 2 << 20;
const PIECE: u64 = 4 << 20;
const SESSION: SessionId = SessionId(42);
const WRITE: ChangeHead =
    ChangeHead { epoch: EpochId(1), disk: 0, operation: Operation::Write, offset: 512, len: 512 };

struct DiskScript {
    script: Script,
    disks: FrameWriter<std::net::TcpStream>,
    image: Arc<MemoryImage>,
    sum: ConnectionPart,
}

impl DiskScript {
    fn start() -> Self {
        Self::of(SIZE)
    }

    /// With a disk of so many bytes.
    fn of(size: u64) -> Self {
        let image = MemoryImage::new(vec![7; usize::try_from(size).unwrap()]);
        let builder =
            MemoryBuilder { images: vec![Arc::clone(&image)], ..MemoryBuilder::default() };
        let backup = Backup::with(builder, receive_options(None));
        let offer = Offer { disks: vec![size], ..offer() };
        let (vm, host) = (Uuid::new_v4(), Uuid::new_v4());
        let mut script = Script::again(backup, SESSION, (vm, host), offer);
        script.say(&Message::Paired(Generation(1)));
        let mut disks = FrameWriter::new(connect(&script.backup), SESSION);
        let hello = Hello { vm, host, connection: 3, connections: 1 };
        Message::Hello(hello).send(&mut disks).unwrap();
        Self { script, disks, image, sum: ConnectionPart::default() }
    }

    fn change(&mut self, head: ChangeHead, data: &[u8]) {
        if let Ok(crc) = self.disks.write(Kind::Change, &[&head.encode(), data]) {
            self.sum.add(1, crc);
        }
    }

    fn end(&mut self, epoch: u64) {
        let end = End { epoch: EpochId(epoch), part: std::mem::take(&mut self.sum) };
        self.disks.write(Kind::End, &[&end.encode()]).unwrap();
    }

    /// An epoch without pages.
    fn seal(&mut self, epoch: u64, changes: u64) {
        self.script.end(epoch);
        let (epoch, generation) = (EpochId(epoch), Generation(1));
        let state = b"sum:\0\0\0\0".to_vec();
        let seal =
            Seal { epoch, generation, handover: Handover::No, pages: vec![0], changes, state };
        self.script.say(&Message::Seal(seal));
    }

    /// One error that contains `text`, and an image as it was.
    fn refused(self, text: &str) {
        self.script.aborted(text);
        assert!(self.image.bytes().iter().all(|byte| *byte == 7));
    }
}

#[test]
fn what_lies_outside_of_a_disk_is_refused_in_a_copy_and_in_an_epoch() {
    for epoch in [EpochId(0), EpochId(1)] {
        let write = ChangeHead { epoch, ..WRITE };
        let bad = [
            (ChangeHead { disk: 1, ..write }, "number of a disk"),
            (ChangeHead { offset: SIZE, ..write }, "outside the disk"),
            (ChangeHead { offset: u64::MAX - 511, ..write }, "outside the disk"),
            (ChangeHead { offset: 100, ..write }, "outside the disk"),
            (ChangeHead { len: 1024, ..write }, "length of the data"),
            (ChangeHead { operation: Operation::Discard, ..write }, "length of the data"),
            (ChangeHead { operation: Operation::Flush, ..write }, "outside the disk"),
        ];
        for (head, text) in bad {
            let mut script = DiskScript::start();
            script.change(head, &[1; 512]);
            script.refused(text);
        }
    }
}

#[test]
fn an_unknown_operation_and_a_frame_that_is_none_are_refused() {
    let mut script = DiskScript::start();
    let mut head = WRITE.encode();
    head[12] = 9;
    script.disks.write(Kind::Change, &[&head, &[1; 512]]).unwrap();
    script.refused("operation");
    let mut script = DiskScript::start();
    script.disks.write(Kind::Change, &[&[0; 16]]).unwrap();
    script.refused("too short");
    let mut script = DiskScript::start();
    script.disks.write(Kind::Heartbeat, &[]).unwrap();
    script.refused("where a change was due");
}

/// A frame of 32 bytes is work for as long as its range takes.
#[test]
fn a_piece_of_a_copy_that_is_too_long_is_refused() {
    let size = COPY_BYTES_MAX + 512;
    for operation in [Operation::Zero { unmap: false }, Operation::Discard] {
        let mut script = DiskScript::of(size);
        script.change(
            ChangeHead { epoch: EpochId(0), operation, offset: 0, len: size, ..WRITE },
            &[],
        );
        script.refused("length of a piece of a copy");
    }
}

/// A session that ends waits for the piece at hand, not for the whole change.
#[test]
fn a_session_that_ends_while_an_image_is_zeroed_holds_nobody_up() {
    let size = 4 * PIECE;
    let mut script = DiskScript::of(size);
    let operation = Operation::Zero { unmap: false };
    let image = Arc::clone(&script.image);
    let busy = image.busy.lock().unwrap();
    script.change(ChangeHead { epoch: EpochId(0), operation, offset: 0, len: size, ..WRITE }, &[]);
    super::until(
        || script.script.backup.handle.info(),
        |_| image.waiting.load(Ordering::Acquire) > 0,
    );
    // Again, which ends the session.
    script.script.say(&Message::Paired(Generation(1)));
    // Closed: the receiver was told so before.
    let mut closed = script.disks.get_ref();
    assert_eq!(closed.read(&mut [0]).unwrap(), 0);
    drop(busy);
    let DiskScript { script: Script { backup, .. }, .. } = script;
    super::until(|| backup.handle.info(), |info| info.state == ReplicationState::Disconnected);
    let bytes = image.bytes();
    let piece = usize::try_from(PIECE).unwrap();
    assert!(bytes[..piece].iter().all(|byte| *byte == 0));
    assert!(bytes[piece..].iter().all(|byte| *byte == 7), "more than the piece at hand");
    // The next one is served.
    let names = (Uuid::new_v4(), Uuid::new_v4());
    let offer = Offer { disks: vec![size], ..offer() };
    let (_, _, word) = greet(&backup, SessionId(43), names, offer);
    assert!(matches!(word, Message::Welcome(_)), "{word:?}");
}

#[test]
fn a_copy_never_follows_a_committed_epoch() {
    let mut script = DiskScript::start();
    script.end(1);
    script.seal(1, 0);
    script.script.acked(1);
    script.change(ChangeHead { epoch: EpochId(0), ..WRITE }, &[1; 512]);
    script.refused("after a committed epoch");
}

#[test]
fn a_copy_within_an_epoch_and_two_epochs_at_once_are_refused() {
    let mut script = DiskScript::start();
    script.change(WRITE, &[1; 512]);
    script.change(ChangeHead { epoch: EpochId(0), ..WRITE }, &[1; 512]);
    script.refused("after a committed epoch");
    let mut script = DiskScript::start();
    script.change(WRITE, &[1; 512]);
    script.change(ChangeHead { epoch: EpochId(2), ..WRITE }, &[1; 512]);
    script.refused("before the end of epoch 1");
}

#[test]
fn an_epoch_is_not_whole_without_all_its_changes() {
    let mut script = DiskScript::start();
    script.change(WRITE, &[1; 512]);
    script.end(1);
    script.seal(1, 2);
    script.refused("has 1 changes of disks, its seal says 2");
    let mut script = DiskScript::start();
    script.change(WRITE, &[1; 512]);
    script.sum.digest ^= 1;
    script.end(1);
    script.refused("does not match what arrived");
}

#[test]
fn changes_are_counted_against_the_staging() {
    let mut script = DiskScript::start();
    let len = CHANGE_BYTES_MAX as u64;
    // 4 MiB, with what each costs beside its data.
    for _ in 0..4 {
        script.change(ChangeHead { offset: 0, len, ..WRITE }, &vec![1; CHANGE_BYTES_MAX]);
    }
    script.refused("exceeds the staging");
    let mut script = DiskScript::start();
    for _ in 0..(4 << 20) / crate::disk::CHANGE_COST_BYTES + 1 {
        let head = ChangeHead { operation: Operation::Discard, ..WRITE };
        script.change(head, &[]);
    }
    script.refused("exceeds the staging");
}

#[test]
fn what_is_staged_is_not_in_the_image_before_its_epoch_is_acknowledged() {
    let mut script = DiskScript::start();
    script.change(ChangeHead { epoch: EpochId(0), offset: 0, ..WRITE }, &[3; 512]);
    script.sum = ConnectionPart::default();
    script.change(WRITE, &[4; 512]);
    script.end(1);
    // The copy is, since it came before.
    super::until(|| script.script.backup.handle.info(), |_| script.image.bytes()[0] == 3);
    std::thread::sleep(std::time::Duration::from_millis(100));
    assert_eq!(script.image.bytes()[512], 7);
    script.seal(1, 1);
    script.script.acked(1);
    super::until(|| script.script.backup.handle.info(), |_| script.image.bytes()[512] == 4);
}

#[test]
fn an_offer_with_disks_of_half_a_sector_is_refused() {
    let mut bytes = Vec::new();
    let mut writer = FrameWriter::new(&mut bytes, SESSION);
    Message::Offer(Offer { disks: vec![100], ..offer() }).send(&mut writer).unwrap();
    let mut reader = crate::wire::FrameReader::new(&bytes[..], Some(SESSION));
    let error = Message::receive(&mut reader, &mut Vec::new()).unwrap_err();
    assert!(error.to_string().contains("size of a disk"), "{error}");
}
