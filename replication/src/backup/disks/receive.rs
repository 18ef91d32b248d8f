//! The receiver of the disks' connection.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use super::{DiskPart, ImageError};
use crate::backup::receive::{OnItsWay, ReceiveError, Shared};
use crate::disk::{CHANGE_BYTES_MAX, Change, ReplicaDisk, carry_out};
use crate::engine::control::listening;
use crate::engine::heard::Listening;
use crate::engine::spawn;
use crate::error::Error;
use crate::ids::EpochId;
use crate::transport::Stream;
use crate::wire::{
    CHANGE_HEAD_BYTES, ChangeHead, ConnectionPart, End, FrameReader, Header, Kind, WireError,
};

/// What the receiver delivers.
pub(in crate::backup) type DiskDelivery = Result<(DiskPart, OnItsWay), ReceiveError>;

/// The disks' connection, whose thread runs.
pub(in crate::backup) struct DiskConnection {
    closer: Box<dyn Stream>,
    ended: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl DiskConnection {
    /// Starts the thread; `deliver` gets each part and the error at the end.
    pub(in crate::backup) fn start(
        reader: FrameReader<Box<dyn Stream>>,
        disks: Vec<Arc<dyn ReplicaDisk>>,
        shared: Shared,
        deliver: impl FnMut(DiskDelivery) -> bool + Send + 'static,
    ) -> Result<Self, Error> {
        let io = |error| Error::Wire(WireError::Io(error));
        let closer = reader.get_ref().duplicate().map_err(io)?;
        closer.set_read_timeout(None).map_err(io)?;
        let ended = Arc::<AtomicBool>::default();
        let receiver = Receiving {
            ended: Arc::clone(&ended),
            reader: listening(reader, shared.heard.clone()),
            sizes: disks.iter().map(|disk| disk.size_bytes()).collect(),
            disks,
            shared,
            part: DiskPart::default(),
            closed_round: None,
            counted: 0,
        };
        let thread = spawn("repl-recv-disk", None, move || receiver.run(deliver))?;
        Ok(Self { closer, ended, thread })
    }

    /// Ends the connection; the thread follows.
    pub(in crate::backup) fn close(self) -> JoinHandle<()> {
        // A change that is being carried out may be long.
        self.ended.store(true, Ordering::Release);
        self.closer.close();
        self.thread
    }
}

struct Receiving {
    reader: FrameReader<Listening<Box<dyn Stream>>>,
    disks: Vec<Arc<dyn ReplicaDisk>>,
    sizes: Vec<u64>,
    shared: Shared,
    /// Nothing is written any more but the piece at hand.
    ended: Arc<AtomicBool>,
    part: DiskPart,
    /// The round whose copy is over.
    closed_round: Option<u64>,
    counted: u64,
}

impl Receiving {
    fn run(mut self, mut deliver: impl FnMut(DiskDelivery) -> bool) {
        let under_way = OnItsWay::none();
        loop {
            match self.frame() {
                Ok(None) => {}
                Ok(Some(part)) => {
                    let Some(on_its_way) = OnItsWay::another(&under_way) else {
                        deliver(Err(ReceiveError::Ahead(part.epoch)));
                        return;
                    };
                    if !deliver(Ok((part, on_its_way))) {
                        return;
                    }
                }
                Err(error) => {
                    deliver(Err(error));
                    return;
                }
            }
            let new = self.reader.bytes() - self.counted;
            self.counted += new;
            self.shared.counters.wire_bytes.fetch_add(new, Ordering::Relaxed);
        }
    }

    fn frame(&mut self) -> Result<Option<DiskPart>, ReceiveError> {
        let header = self.reader.begin()?;
        match header.kind {
            Kind::Change => self.change(&header).map(|()| None),
            Kind::End => self.end(&header).map(Some),
            found => Err(WireError::Unexpected { found, expected: "a change" }.into()),
        }
    }

    fn change(&mut self, frame: &Header) -> Result<(), ReceiveError> {
        let mut head = [0; CHANGE_HEAD_BYTES];
        if !self.reader.read_into(&mut head)? {
            return Err(WireError::Malformed { kind: Kind::Change, what: "too short" }.into());
        }
        let bytes = self.reader.rest();
        let head = ChangeHead::decode(&head, &self.sizes, bytes)?;
        // Before anything is set aside for it.
        if head.epoch == EpochId(0) {
            self.may_copy()?
        } else {
            self.may_stage(&head, bytes)?
        }
        assert!(bytes <= CHANGE_BYTES_MAX, "checked with the head");
        let mut data = vec![0; bytes];
        self.reader.read_into(&mut data)?;
        let crc = self.reader.finish(frame)?;
        let change = head.with(data);
        self.shared.counters.raw_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        if head.epoch == EpochId(0) {
            return self.straight(&change);
        }
        self.part.sum.add(1, crc);
        self.part.changes.push(change);
        Ok(())
    }

    fn may_copy(&self) -> Result<(), ReceiveError> {
        let round = self.shared.round.load(Ordering::Acquire);
        if self.closed_round == Some(round) || self.part.epoch != EpochId(0) {
            return Err(ReceiveError::LateCopy);
        }
        Ok(())
    }

    fn may_stage(&mut self, head: &ChangeHead, bytes: usize) -> Result<(), ReceiveError> {
        let epoch = head.epoch;
        if self.part.epoch == EpochId(0) {
            self.part.epoch = epoch;
        } else if self.part.epoch != epoch {
            return Err(ReceiveError::Mixed { current: self.part.epoch, found: epoch });
        }
        let cost = bytes as u64 + crate::disk::CHANGE_COST_BYTES;
        if !self.shared.budget.take(cost) {
            return Err(ReceiveError::Full { epoch, bytes: self.shared.budget.whole() });
        }
        self.part.cost_bytes += cost;
        Ok(())
    }

    /// A piece of a first copy: into the image. The order of the stream is that of the copy, so all
    /// of it is there before the end of the first epoch is read.
    fn straight(&self, change: &Change) -> Result<(), ReceiveError> {
        let disk = self.disks[change.disk as usize].as_ref();
        let written = carry_out(disk, change, &self.shared.counters.images, &self.ended);
        written.map_err(|source| ImageError { disk: change.disk, source })?;
        if self.ended.load(Ordering::Acquire) {
            return Err(WireError::Closed.into());
        }
        self.shared.counters.synced_disk_bytes.fetch_add(change.len, Ordering::Relaxed);
        Ok(())
    }

    fn end(&mut self, frame: &Header) -> Result<DiskPart, ReceiveError> {
        let mut payload = Vec::new();
        self.reader.read_rest(&mut payload)?;
        self.reader.finish(frame)?;
        let End { epoch, part: sum } = End::decode(&payload)?;
        let empty = self.part.epoch == EpochId(0) && sum == ConnectionPart::default();
        if epoch == EpochId(0) || (self.part.epoch != epoch && !empty) || self.part.sum != sum {
            return Err(ReceiveError::Mismatch(epoch));
        }
        self.part.epoch = epoch;
        self.closed_round = Some(self.shared.round.load(Ordering::Acquire));
        Ok(std::mem::take(&mut self.part))
    }
}
