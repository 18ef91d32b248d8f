//! The receiver threads, one for each data connection: frames in, staged parts out.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded};
use thiserror::Error;

use super::apply::{ApplyError, apply, memory_of};
use super::disks::ImageError;
use super::staging::{Budget, Needs, Part, cost_bytes};
use super::suspects::Suspects;
use crate::capture::cow::{GROUP_PAGES, Share};
use crate::checking::reach;
use crate::engine::control::listening;
use crate::engine::heard::{Heard, Listening};
use crate::engine::spawn;
use crate::engine::status::Counters;
use crate::error::Error;
use crate::ids::{EpochId, PAGE_SIZE, PageIndex};
use crate::protocol::primary::IN_FLIGHT_MAX;
use crate::ram::Ram;
use crate::transport::{Stream, TransportError, rdma};
use crate::wire::{
    ConnectionPart, Encoding, End, FRAME_PAGES_MAX, FrameReader, Header, Kind, PagesHeader,
    RAW_PAGES_MAX, Run, Verbs, WireError, decode_pages_header, decode_sums, staged_bytes, unpack,
};

/// Why a data connection ended.
#[derive(Debug, Error)]
pub(super) enum ReceiveError {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("Epoch {epoch} exceeds the staging of {bytes} bytes")]
    Full { epoch: EpochId, bytes: u64 },
    #[error("Epoch {0} has pages twice")]
    Repeats(EpochId),
    #[error("Pages of epoch {found} arrived before the end of epoch {current}")]
    Mixed { current: EpochId, found: EpochId },
    #[error(
        "Pages from {first} on arrived on data connection {found}, and are of another one's groups"
    )]
    Foreign { first: PageIndex, found: usize },
    #[error("Pages of a first copy arrived after a committed epoch")]
    LateCopy,
    #[error("{pages} pages of the copy are not as the primary has them, the first is {first}")]
    Differs { pages: u64, first: PageIndex },
    #[error("Epoch {0} ended before those before it were acknowledged")]
    Ahead(EpochId),
    #[error("The end of epoch {0} does not match what arrived")]
    Mismatch(EpochId),
    #[error("The primary offered to send by {offered} and sent {sent}")]
    Transport { offered: &'static str, sent: &'static str },
    /// Of this host.
    #[error(transparent)]
    Device(TransportError),
    #[error("Cannot write to the image")]
    Apply(#[from] ApplyError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("This host has no memory for the image's pages from {0} on")]
    NoMemory(PageIndex),
}

impl ReceiveError {
    /// Whether this is the loss of a peer rather than something that it should not have sent.
    pub(super) fn is_loss(&self) -> bool {
        matches!(self, Self::Wire(error) if error.is_loss())
    }
}

/// What the receivers of a session share with the engine.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) ram: Ram,
    /// The image is that of a committed epoch from the start: no copy goes over it before one anew is
    /// told of.
    pub(super) is_whole: bool,
    pub(super) budget: Budget,
    /// Grows each time the primary copies anew: pages straight into the image are allowed until
    /// the connection carried the end of an epoch of this round.
    pub(super) round: Arc<AtomicU64>,
    pub(super) heard: Heard,
    pub(super) counters: Arc<Counters>,
    /// Where data comes by RDMA.
    pub(super) rdma: Option<rdma::Adapter>,
}

/// A part on its way to the engine, which drops this when it takes the part: as many as may be in
/// flight are as much as a primary may send ahead, since it waits for acknowledgements.
pub(super) struct OnItsWay(Arc<AtomicU64>);

impl OnItsWay {
    /// How many are, of one connection.
    pub(super) fn none() -> Arc<AtomicU64> {
        Arc::default()
    }

    /// One more, if there may be.
    pub(super) fn another(under_way: &Arc<AtomicU64>) -> Option<Self> {
        let more = |count: u64| (count < IN_FLIGHT_MAX).then_some(count + 1);
        let counted = under_way.fetch_update(Ordering::AcqRel, Ordering::Acquire, more);
        counted.is_ok().then(|| Self(Arc::clone(under_way)))
    }
}

impl Drop for OnItsWay {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What a receiver delivers.
pub(super) type Delivery = Result<(Part, OnItsWay), ReceiveError>;

/// A data connection whose thread runs.
pub(super) struct DataConnection {
    /// Parts that were applied go back to be filled again.
    pub(super) spare: Sender<Part>,
    closer: Box<dyn Stream>,
    /// None where somebody else reads in its place.
    thread: Option<JoinHandle<()>>,
}

impl DataConnection {
    /// Starts the thread of the connection whose pages are `share`; `deliver` gets each part and the
    /// error at the end.
    pub(super) fn start(
        share: Share,
        reader: FrameReader<Box<dyn Stream>>,
        shared: Shared,
        deliver: impl FnMut(Delivery) -> bool + Send + 'static,
    ) -> Result<Self, Error> {
        let (mut connection, receiver) = Self::around(share, reader, shared)?;
        let thread = spawn("repl-recv", Some(share.index), move || receiver.run(deliver))?;
        connection.thread = Some(thread);
        Ok(connection)
    }

    /// A connection without its thread, and what that would do.
    pub(super) fn around(
        share: Share,
        reader: FrameReader<Box<dyn Stream>>,
        shared: Shared,
    ) -> Result<(Self, Receiving), Error> {
        let io = |error| Error::Wire(WireError::Io(error));
        let closer = reader.get_ref().duplicate().map_err(io)?;
        closer.set_read_timeout(None).map_err(io)?;
        // Those in flight, and one that is being filled.
        let (spare, spares) = bounded(3);
        let receiver = Receiving::new(share, reader, shared, spares);
        Ok((Self { spare, closer, thread: None }, receiver))
    }

    /// Ends the connection; the thread follows.
    pub(super) fn close(self) -> Option<JoinHandle<()>> {
        self.closer.close();
        self.thread
    }
}

/// The pages of a frame as they are staged, each whole.
#[derive(Default)]
struct Frame {
    runs: Vec<Run>,
    bytes: Vec<u8>,
}

/// What one of the threads does.
pub(super) struct Receiving {
    reader: FrameReader<Listening<Box<dyn Stream>>>,
    share: Share,
    /// Of the share: an epoch has none of them twice.
    pages: u64,
    shared: Shared,
    spares: Receiver<Part>,
    needs: Needs,
    part: Part,
    header: PagesHeader,
    /// Room for the encoded pages of a copy.
    unpacked: Frame,
    /// Frames come by RDMA.
    by_rdma: bool,
    /// The round whose copy is over on this connection.
    closed_round: Option<u64>,
    suspects: Suspects,
    counted: u64,
    /// Parts that the engine has not taken.
    under_way: Arc<AtomicU64>,
}

impl Receiving {
    /// Parts that were applied come back by `spares`.
    pub(super) fn new(
        share: Share,
        reader: FrameReader<Box<dyn Stream>>,
        shared: Shared,
        spares: Receiver<Part>,
    ) -> Self {
        Self {
            reader: listening(reader, shared.heard.clone()),
            share,
            pages: share.pages_of(shared.ram.pages()),
            by_rdma: shared.rdma.as_ref().is_some_and(rdma::Adapter::is_fake),
            closed_round: shared.is_whole.then_some(0),
            shared,
            spares,
            needs: Needs::default(),
            part: Part::default(),
            unpacked: Frame::default(),
            header: PagesHeader::default(),
            suspects: Suspects::default(),
            counted: 0,
            under_way: OnItsWay::none(),
        }
    }

    /// Room for the contents of a frame.
    pub(super) fn scratch() -> Vec<u8> {
        vec![0; RAW_PAGES_MAX * PAGE_SIZE]
    }

    fn run(mut self, mut deliver: impl FnMut(Delivery) -> bool) {
        let mut scratch = Self::scratch();
        while self.step(&mut scratch, &mut deliver) {}
    }

    /// Reads a frame and delivers what came of it; whether there may be another one.
    pub(super) fn step(
        &mut self,
        scratch: &mut [u8],
        mut deliver: impl FnMut(Delivery) -> bool,
    ) -> bool {
        match self.frame(scratch) {
            Ok(None) => {}
            Ok(Some(part)) => {
                let Some(on_its_way) = OnItsWay::another(&self.under_way) else {
                    deliver(Err(ReceiveError::Ahead(part.epoch)));
                    return false;
                };
                if !deliver(Ok((part, on_its_way))) {
                    return false;
                }
            }
            Err(error) => {
                // The engine has a handle of its own: without this the peer would hear nothing.
                self.reader.get_mut().inner_mut().close();
                deliver(Err(error));
                return false;
            }
        }
        let new = self.reader.bytes() - self.counted;
        self.counted += new;
        self.shared.counters.wire_bytes.fetch_add(new, Ordering::Relaxed);
        true
    }

    /// Reads a frame; a part is whole once its end is read.
    fn frame(&mut self, scratch: &mut [u8]) -> Result<Option<Part>, ReceiveError> {
        let header = self.reader.begin()?;
        if self.shared.rdma.is_some() && !self.by_rdma && header.kind != Kind::Verbs {
            return Err(ReceiveError::Transport { offered: "RDMA", sent: "by TCP" });
        }
        match header.kind {
            Kind::Pages => self.pages(&header, scratch).map(|()| None),
            Kind::End => self.end(&header).map(Some),
            Kind::Sums => self.sums(&header).map(|()| None),
            Kind::Verbs => self.change_over(&header).map(|()| None),
            found => Err(WireError::Unexpected { found, expected: "pages" }.into()),
        }
    }

    /// What follows comes by RDMA.
    fn change_over(&mut self, header: &Header) -> Result<(), ReceiveError> {
        let Some(adapter) = self.shared.rdma.as_ref().filter(|_| !self.by_rdma) else {
            return Err(ReceiveError::Transport { offered: "TCP", sent: "a queue pair" });
        };
        let mut payload = Vec::new();
        self.reader.read_rest(&mut payload)?;
        self.reader.finish(header)?;
        let theirs = Verbs::decode(&payload)?;
        let tcp = self.reader.get_mut().inner_mut().duplicate().map_err(WireError::Io)?;
        let stream = adapter.read_by(theirs, header.session, tcp).map_err(|error| match error {
            rdma::SetupError::Device(error) => ReceiveError::Device(error),
            rdma::SetupError::Wire(error) => ReceiveError::Wire(error),
        })?;
        *self.reader.get_mut().inner_mut() = stream;
        self.by_rdma = true;
        Ok(())
    }

    fn pages(&mut self, frame: &Header, scratch: &mut [u8]) -> Result<(), ReceiveError> {
        let universe = self.shared.ram.pages();
        let reader = &mut self.reader;
        decode_pages_header(universe, &mut self.header, |into| reader.read_into(into))?;
        let bytes = self.reader.rest();
        if !self.header.fits(bytes) {
            let what = "length of the contents";
            return Err(WireError::Malformed { kind: Kind::Pages, what }.into());
        }
        let is_foreign = |run: &&Run| !self.share.has_run(run.first, run.count.into());
        if let Some(&Run { first, .. }) = self.header.runs.iter().find(is_foreign) {
            // A page that came on two connections would be one or the other by chance.
            return Err(ReceiveError::Foreign { first, found: self.share.index + 1 });
        }
        if self.header.epoch == EpochId(0) {
            return self.straight(frame, &mut scratch[..bytes]);
        }
        self.stage(frame, &mut scratch[..bytes])
    }

    /// Whether a copy may still bring something.
    fn is_copying(&self) -> bool {
        let round = self.shared.round.load(Ordering::Acquire);
        self.closed_round != Some(round) && self.part.epoch == EpochId(0)
    }

    /// Checksums of pages that the primary's device wrote into the image. They came before this on the same
    /// queue pair, so they are there to be seen.
    fn sums(&mut self, frame: &Header) -> Result<(), ReceiveError> {
        let mut payload = Vec::new();
        self.reader.read_rest(&mut payload)?;
        self.reader.finish(frame)?;
        if !self.is_copying() {
            return Err(ReceiveError::LateCopy);
        }
        let groups = decode_sums(&payload, self.shared.ram.pages())?;
        for sums in &groups {
            if !usize::try_from(sums.group).is_ok_and(|group| self.share.has(group)) {
                let (first, found) =
                    (PageIndex(sums.group * GROUP_PAGES as u64), self.share.index + 1);
                return Err(ReceiveError::Foreign { first, found });
            }
            self.suspects.compare(&self.shared.ram, sums);
            let pages = u64::from(sums.pages.count_ones());
            self.shared.counters.synced_pages.fetch_add(pages, Ordering::Relaxed);
            let bytes = pages * PAGE_SIZE as u64;
            self.shared.counters.raw_bytes.fetch_add(bytes, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Pages of a copy, straight from the stream into the image, where they are before their checksum
    /// is known. Nobody runs what a wrong one leaves there: the end of a session whose copy is not over
    /// discards the image, and the copy is over only once each connection has brought the end of an
    /// epoch after it, which this one then never does.
    fn straight(&mut self, frame: &Header, scratch: &mut [u8]) -> Result<(), ReceiveError> {
        let round = self.shared.round.load(Ordering::Acquire);
        if !self.is_copying() {
            return Err(ReceiveError::LateCopy);
        }
        // Zeroes are long on the wire for nobody, and whoever ends this waits for what is under way.
        if self.header.pages() > FRAME_PAGES_MAX as u64 {
            let what = "number of pages of a copy";
            return Err(WireError::Malformed { kind: Kind::Pages, what }.into());
        }
        self.suspects.replaced(&self.header.runs);
        // A copy anew finds its pages there, and looking for them takes time.
        let is_fresh = round == 0;
        if self.header.has_encoded() {
            self.reader.read_into(scratch)?;
            self.reader.finish(frame)?;
            self.unpack(scratch, is_fresh)?;
        } else {
            self.read_image(is_fresh)?;
            self.reader.finish(frame)?;
        }
        let pages = self.header.pages();
        self.shared.counters.synced_pages.fetch_add(pages, Ordering::Relaxed);
        self.count_raw();
        Ok(())
    }

    /// Pages that are zero, or sent as they are: run by run, in the order in which they come.
    fn read_image(&mut self, is_fresh: bool) -> Result<(), ReceiveError> {
        let (ram, reader) = (&self.shared.ram, &mut self.reader);
        for run in &self.header.runs {
            if is_fresh {
                ram.populate(run.first, run.count.into());
            }
            if run.encoding == Encoding::Zero {
                apply(ram, std::slice::from_ref(run), &[])?;
                continue;
            }
            memory_of(ram, run, |memory| {
                let read = reader.read_memory(memory, |stream, into| stream.read_memory(into));
                read.map(drop).map_err(|error| match error {
                    // No fault of the peer's, nor of the connection.
                    WireError::Io(fault) if fault.raw_os_error() == Some(libc::EFAULT) => {
                        ReceiveError::NoMemory(run.first)
                    }
                    error => error.into(),
                })
            })?;
        }
        Ok(())
    }

    /// Pages of which some are encoded.
    fn unpack(&mut self, contents: &[u8], is_fresh: bool) -> Result<(), ReceiveError> {
        let (ram, Frame { runs, bytes }) = (&self.shared.ram, &mut self.unpacked);
        runs.clear();
        bytes.clear();
        // At most a page for each of the runs' pages, which are few.
        staged_bytes(&self.header.runs, contents)?;
        unpack(&self.header.runs, contents, runs, bytes)?;
        if is_fresh {
            runs.iter().for_each(|run| ram.populate(run.first, run.count.into()));
        }
        Ok(apply(ram, runs, bytes)?)
    }

    fn stage(&mut self, frame: &Header, contents: &mut [u8]) -> Result<(), ReceiveError> {
        let epoch = self.header.epoch;
        if self.part.epoch == EpochId(0) {
            self.part.epoch = epoch;
        } else if self.part.epoch != epoch {
            return Err(ReceiveError::Mixed { current: self.part.epoch, found: epoch });
        }
        let pages = self.part.sum.pages.saturating_add(self.header.pages());
        if pages > self.pages {
            return Err(ReceiveError::Repeats(epoch));
        }
        self.suspects.replaced(&self.header.runs);
        let crc = if self.header.has_encoded() {
            self.reader.read_into(contents)?;
            let crc = self.reader.finish(frame)?;
            self.charge(staged_bytes(&self.header.runs, contents)?)?;
            unpack(&self.header.runs, contents, &mut self.part.runs, &mut self.part.bytes)?;
            crc
        } else {
            self.charge(contents.len())?;
            self.reader.read_into(self.part.room(contents.len()))?;
            self.part.runs.extend_from_slice(&self.header.runs);
            self.reader.finish(frame)?
        };
        self.part.sum.add(self.header.pages(), crc);
        self.count_raw();
        reach("staged");
        Ok(())
    }

    /// Takes from the budget what the frame, with contents of `staged` bytes, is going to take.
    fn charge(&mut self, staged: usize) -> Result<(), ReceiveError> {
        let (budget, bytes) = (&self.shared.budget, cost_bytes(&self.header.runs, staged));
        if !budget.take(bytes) {
            return Err(ReceiveError::Full { epoch: self.part.epoch, bytes: budget.whole() });
        }
        self.part.cost_bytes += bytes;
        Ok(())
    }

    fn end(&mut self, frame: &Header) -> Result<Part, ReceiveError> {
        let mut payload = Vec::new();
        self.reader.read_rest(&mut payload)?;
        self.reader.finish(frame)?;
        let End { epoch, part: sum } = End::decode(&payload)?;
        let empty = self.part.epoch == EpochId(0) && sum == ConnectionPart::default();
        if epoch == EpochId(0) || (self.part.epoch != epoch && !empty) || self.part.sum != sum {
            return Err(ReceiveError::Mismatch(epoch));
        }
        if let Some((pages, first)) = self.suspects.end() {
            return Err(ReceiveError::Differs { pages, first });
        }
        self.part.epoch = epoch;
        self.closed_round = Some(self.shared.round.load(Ordering::Acquire));
        self.needs.saw(&self.part);
        let mut next = self.spares.try_recv().unwrap_or_default();
        next.reuse(&self.needs);
        Ok(std::mem::replace(&mut self.part, next))
    }

    fn count_raw(&self) {
        let bytes = self.header.pages() * PAGE_SIZE as u64;
        self.shared.counters.raw_bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::memory;
    use crate::transport::memory as streams;
    use crate::wire::{FrameWriter, RUNS_MAX, SessionId, encode_sums};

    /// A small frame may name all of memory, run after run: what is too much is looked at no further.
    #[test]
    fn a_frame_that_is_too_large_is_not_worked_at() {
        const PAGES: u64 = 64;
        for (epoch, refused) in [(0u64, "number of pages of a copy"), (1, "has pages twice")] {
            let (ours, theirs) = streams::pair().unwrap();
            let shared = Shared {
                ram: memory(&[(0, PAGES)]),
                is_whole: false,
                budget: Budget::new(1 << 20),
                round: Arc::default(),
                heard: Heard::new(),
                counters: Arc::default(),
                rdma: None,
            };
            let reader = FrameReader::new(theirs, Some(SessionId(1)));
            let (_spare, spares) = bounded(1);
            let share = Share { index: 0, of: 1 };
            let mut receiving = Receiving::new(share, reader, shared, spares);
            let mut primary = FrameWriter::new(ours, SessionId(1));
            let mut sums = vec![];
            encode_sums(0, 0b100, [7].into_iter(), &mut sums);
            primary.write(Kind::Sums, &[&sums]).unwrap();
            let mut head = vec![];
            head.extend(epoch.to_le_bytes());
            head.extend((RUNS_MAX as u64).to_le_bytes());
            for _ in 0..RUNS_MAX {
                head.extend(0u64.to_le_bytes());
                head.extend(u32::try_from(PAGES).unwrap().to_le_bytes());
                head.extend(u32::from(Encoding::Zero as u8).to_le_bytes());
            }
            primary.write(Kind::Pages, &[&head]).unwrap();
            let mut scratch = Receiving::scratch();
            assert!(receiving.frame(&mut scratch).unwrap().is_none());
            let error = receiving.frame(&mut scratch).err().unwrap().to_string();
            assert!(error.contains(refused), "{error}");
            assert_eq!(receiving.suspects.end(), Some((1, PageIndex(2))));
        }
    }
}
