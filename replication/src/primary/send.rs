//! The sender threads, one for each data connection.
//!
//! Enters: jobs. Leaves: frames. A page of the guest's live memory is read once, into a buffer of
//! one frame, so that what is sent is what was checksummed; a frozen page that is not encoded goes
//! out from where it was kept, without a copy.
//!
//! Where a connection reads guest memory itself ([`Stream::gathers`]), pages that nobody writes leave
//! from there: those that are protected, which stay so until the peer's device has them, and those of a
//! guest that stands. Their checksum is that of the bytes that are in memory until then. In a copy, pages may go
//! by such a connection without a frame and without a copy, straight into the backup's memory ([`Straight`]).

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use api::replication::Compression;
use crossbeam_channel::{Receiver, Sender, unbounded};

use crate::capture::cow::{Cursor, Frozen, GROUP_PAGES, Group, Loan, Page, Piece, Share};
use crate::checking::{Delays, is_broken};
use crate::encode::{Encoder, is_zero};
use crate::engine::spawn;
use crate::engine::status::Counters;
use crate::error::Error;
use crate::ids::{EpochId, PAGE_SIZE, PageIndex};
use crate::page_set::bits;
use crate::ram::{PageBuffer, PageSet, Ram};
use crate::transport::rdma::{PLACED_PAGES_MAX, Window};
use crate::transport::{Lease, Part, Stream};
use crate::wire::{
    ConnectionPart, Encoding, End, FrameWriter, Kind, RAW_PAGES_MAX, Runs, SUM_GROUPS_MAX,
    WireError, encode_pages_header, encode_sums,
};

/// Where the bytes of a job come from.
#[derive(Clone)]
pub(super) enum Source {
    /// Memory as it is when it is sent.
    Live(Arc<PageSet>),
    /// The same, and nobody writes it before the job is out.
    Still(Arc<PageSet>),
    /// Memory as it was at the seal.
    Frozen(Arc<dyn Frozen>),
    /// Memory as it is, by the device straight into the backup's.
    Straight(Arc<Straight>),
}

/// Pages that the device writes straight into the backup's memory.
pub(super) struct Straight {
    pub(super) pages: Arc<PageSet>,
    pub(super) window: Arc<Window>,
    /// Nothing was written there yet: it reads as zero.
    pub(super) is_zero: bool,
}

/// Pages to send on every connection.
#[derive(Clone)]
pub(super) struct Job {
    /// Numbers the reports.
    pub(super) number: u64,
    /// 0 is the first copy, which has no end marker.
    pub(super) epoch: EpochId,
    pub(super) source: Source,
}

/// What a sender reports: its job is out, or its connection failed.
pub(super) type Sent = Result<u64, WireError>;

/// The sender threads.
pub(super) struct Senders {
    jobs: Vec<Sender<Job>>,
    closers: Vec<Box<dyn Stream>>,
    threads: Vec<JoinHandle<()>>,
}

impl Senders {
    pub(super) fn start(
        writers: Vec<FrameWriter<Box<dyn Stream>>>,
        ram: &Ram,
        compression: Compression,
        counters: &Arc<Counters>,
        deliver: impl Fn(Sent) -> bool + Clone + Send + 'static,
    ) -> Result<Self, Error> {
        let of = writers.len();
        let mut senders = Self { jobs: vec![], closers: vec![], threads: vec![] };
        for (index, writer) in writers.into_iter().enumerate() {
            let closer = writer.get_ref().duplicate();
            senders.closers.push(closer.map_err(|error| Error::Wire(WireError::Io(error)))?);
            let (jobs, queue) = unbounded();
            senders.jobs.push(jobs);
            let share = Share { index, of };
            let sender = OneSender::new(share, ram, writer, compression, counters);
            let deliver = deliver.clone();
            let body = move || sender.run(&queue, deliver);
            senders.threads.push(spawn("repl-send", Some(index), body)?);
        }
        Ok(senders)
    }

    /// Without threads: who sends takes the jobs, one queue for each of `count` connections.
    #[cfg(any(test, feature = "testing"))]
    pub(super) fn simulated(count: usize) -> (Self, Vec<Receiver<Job>>) {
        let (jobs, queues) = (0..count).map(|_| unbounded()).unzip();
        (Self { jobs, closers: vec![], threads: vec![] }, queues)
    }

    /// Number of connections.
    pub(super) fn count(&self) -> usize {
        self.jobs.len()
    }

    /// Gives the same job to all.
    pub(super) fn send(&self, job: &Job) {
        for sender in &self.jobs {
            // A sender that is gone has reported why.
            let _ = sender.send(job.clone());
        }
    }

    /// Ends all connections at once.
    pub(super) fn close(self) -> Vec<JoinHandle<()>> {
        self.closers.iter().for_each(|stream| stream.close());
        self.threads
    }

    /// As [`Senders::close`], and calls `then` once none of the threads reads guest memory any more: what they
    /// have sent by then is all that they send. A connection that is closed may take more for a while (by RDMA
    /// nobody looks at the TCP connection as long as there is room). A thread that hangs in a device reads on
    /// for all that is known, and `then` is not called.
    pub(super) fn close_and(self, then: impl FnOnce() + Send + 'static) -> Result<(), Error> {
        let threads = self.close();
        let body = move || {
            for thread in threads {
                if thread.join().is_err() {
                    tracing::error!("A sender panicked");
                }
            }
            then();
        };
        spawn("repl-ended", None, body).map(drop)
    }
}

/// Groups of pages that go straight together, and their checksums.
#[derive(Default)]
struct Placing {
    /// Those that lie side by side are one run, so that a WRITE is as large as may be.
    runs: Vec<(PageIndex, u64)>,
    pages: usize,
    sums: Vec<u8>,
    groups: usize,
}

impl Placing {
    fn add(&mut self, group: Group) {
        for (first, count) in group.runs() {
            match self.runs.last_mut() {
                Some((last, pages)) if last.0 + *pages == first.0 => *pages += count,
                _ => self.runs.push((first, count)),
            }
            self.pages += usize::try_from(count).unwrap_or(0);
        }
    }

    /// Whether another group may be too much.
    fn is_full(&self) -> bool {
        self.pages + GROUP_PAGES > PLACED_PAGES_MAX || self.groups == SUM_GROUPS_MAX
    }
}

/// What one of the threads does.
pub(super) struct OneSender {
    share: Share,
    ram: Ram,
    writer: FrameWriter<Box<dyn Stream>>,
    pub(super) encoder: Encoder,
    counters: Arc<Counters>,
    runs: Runs,
    head: Vec<u8>,
    /// Bytes of the writer that the counters know.
    counted: u64,
    /// What was waited for room for the next frame.
    waited: Duration,
    delays: Delays,
}

impl OneSender {
    pub(super) fn new(
        share: Share,
        ram: &Ram,
        writer: FrameWriter<Box<dyn Stream>>,
        compression: Compression,
        counters: &Arc<Counters>,
    ) -> Self {
        Self {
            share,
            ram: ram.clone(),
            writer,
            encoder: Encoder::new(compression, share.of),
            counters: Arc::clone(counters),
            runs: Runs::default(),
            head: Vec::new(),
            counted: 0,
            waited: Duration::ZERO,
            delays: Delays::from_environment(),
        }
    }

    /// Room for the pages of a frame, and for those of a group.
    pub(super) fn scratch() -> PageBuffer {
        PageBuffer::touched(RAW_PAGES_MAX.max(GROUP_PAGES))
    }

    fn run(mut self, queue: &Receiver<Job>, deliver: impl Fn(Sent) -> bool) {
        let mut scratch = Self::scratch();
        for job in queue {
            let sent = self.send(job, &mut scratch);
            let failed = sent.is_err();
            if !deliver(sent) || failed {
                return;
            }
            // Where a write returns before the peer's host has the bytes, a failure shows only now.
            if let Err(error) = self.writer.flush() {
                deliver(Err(error));
                return;
            }
        }
    }

    /// Sends this connection's share of a job. What was frozen is free when this returns.
    pub(super) fn send(&mut self, job: Job, scratch: &mut PageBuffer) -> Sent {
        self.encoder.begin(job.epoch);
        self.encoder.arrived(|| self.writer.get_ref().delivery());
        let scratch = scratch.all_mut();
        match &job.source {
            Source::Live(pages) => self.send_live(job.epoch, pages, false, scratch)?,
            // The guest goes on once this is out: nothing of its memory may be under way then.
            Source::Still(pages) => {
                self.send_live(job.epoch, pages, self.writer.get_ref().gathers(), scratch)?;
                self.writer.flush()?;
            }
            Source::Frozen(frozen) if self.writer.get_ref().gathers() => {
                self.send_lent(job.epoch, frozen.as_ref(), scratch)?;
            }
            Source::Frozen(frozen) => self.send_frozen(job.epoch, frozen.as_ref(), scratch)?,
            Source::Straight(straight) => self.send_straight(straight, &mut scratch[0])?,
        }
        Ok(job.number)
    }

    fn send_live(
        &mut self,
        epoch: EpochId,
        pages: &PageSet,
        from_memory: bool,
        scratch: &mut [[u8; PAGE_SIZE]],
    ) -> Result<(), WireError> {
        let mut part = ConnectionPart::default();
        let mut raw: Vec<PageIndex> = Vec::with_capacity(RAW_PAGES_MAX);
        for page in self.share.pages(pages) {
            if self.runs.is_full() {
                self.flush(epoch, &kept(&raw, scratch, from_memory), vec![], &mut part)?;
                raw.clear();
            }
            let buffer = &mut scratch[raw.len()];
            assert!(self.ram.read_page(page, buffer), "a dirty set is over the memory");
            let encoding = self.encoder.encode(page, buffer);
            assert!(self.runs.push(page, encoding), "a frame that is not full has room");
            if encoding == Encoding::Raw {
                raw.push(page);
            }
        }
        self.flush(epoch, &kept(&raw, scratch, from_memory), vec![], &mut part)?;
        if from_memory {
            // A backup that has the end of the epoch has it whole: by then nothing of it is read any more,
            // whatever becomes of the guest, the connection and the device.
            self.writer.flush()?;
        }
        self.end(epoch, part)
    }

    /// Writes pages into the backup's memory, and says what their checksums are. Returns when they are there: what
    /// the guest writes after this is not under way any more, and the engine's next harvest finds all that it
    /// wrote before.
    fn send_straight(&mut self, straight: &Straight, scratch: &mut Page) -> Result<(), WireError> {
        let mut placing = Placing::default();
        for group in self.share.groups(&straight.pages) {
            // The device is at the groups before meanwhile.
            let (mut sums, mut sent) = (Vec::with_capacity(GROUP_PAGES), group);
            for (page, bit) in group.iter().zip(bits(group.pages)) {
                assert!(self.ram.read_page(page, scratch), "a dirty set is over the memory");
                sums.push(crc32fast::hash(&scratch[..]));
                if straight.is_zero && is_zero(scratch) {
                    sent.pages &= !(1 << bit);
                }
            }
            if !(is_broken("place") && group.number % 16 == 3) {
                placing.add(sent);
            }
            encode_sums(group.number as u64, group.pages, sums.into_iter(), &mut placing.sums);
            placing.groups += 1;
            let (bytes, sent) = (group.len() * PAGE_SIZE as u64, sent.len() * PAGE_SIZE as u64);
            let counters = &self.counters;
            for (count, bytes) in [
                (&counters.straight_bytes, sent),
                (&counters.from_memory_bytes, sent),
                (&counters.wire_bytes, sent),
                (&counters.raw_bytes, bytes),
            ] {
                count.fetch_add(bytes, Ordering::Relaxed);
            }
            counters.synced_pages.fetch_add(group.len(), Ordering::Relaxed);
            if placing.is_full() {
                self.place(straight, &mut placing)?;
            }
        }
        self.place(straight, &mut placing)?;
        self.writer.flush()
    }

    /// The pages first: the checksums arrive after them.
    fn place(&mut self, straight: &Straight, placing: &mut Placing) -> Result<(), WireError> {
        if placing.groups == 0 {
            return Ok(());
        }
        if !placing.runs.is_empty() {
            self.writer.place(&straight.window, &placing.runs)?;
        }
        self.writer.write(Kind::Sums, &[&placing.sums])?;
        self.count();
        placing.runs.clear();
        placing.sums.clear();
        (placing.groups, placing.pages) = (0, 0);
        Ok(())
    }

    fn send_frozen(
        &mut self,
        epoch: EpochId,
        frozen: &dyn Frozen,
        scratch: &mut [Page],
    ) -> Result<(), WireError> {
        let mut part = ConnectionPart::default();
        let mut cursor = Cursor::default();
        loop {
            let mut batch: Vec<Piece<'_>> = Vec::with_capacity(GROUP_PAGES);
            frozen.next(self.share, &mut cursor, scratch, &mut batch);
            if batch.is_empty() {
                break;
            }
            self.delays.at("send");
            let mut kept: Vec<Part<'_>> = Vec::with_capacity(batch.len());
            for (page, bytes) in &batch {
                if self.runs.is_full() {
                    self.flush(epoch, &kept, vec![], &mut part)?;
                    kept.clear();
                }
                let encoding = self.encoder.encode(*page, bytes);
                assert!(self.runs.push(*page, encoding), "a frame that is not full has room");
                if encoding == Encoding::Raw {
                    kept.push(Part::from(&bytes[..]));
                }
            }
            // What is encoded waits for company: a guest's pages are scattered, and a frame for a
            // few bytes costs more than they do.
            if !kept.is_empty() {
                self.flush(epoch, &kept, vec![], &mut part)?;
            }
        }
        self.flush(epoch, &[], vec![], &mut part)?;
        self.end(epoch, part)
    }

    /// As `send_frozen`, but protected pages that are not encoded leave from guest memory.
    fn send_lent(
        &mut self,
        epoch: EpochId,
        frozen: &dyn Frozen,
        scratch: &mut [Page],
    ) -> Result<(), WireError> {
        let mut part = ConnectionPart::default();
        let mut cursor = Cursor::default();
        loop {
            let mut batch: Vec<Piece<'_>> = Vec::with_capacity(GROUP_PAGES);
            let mut loans: Vec<Loan> = Vec::new();
            // Before anything is lent: whoever writes a page that is waits for it to be sent, and until then
            // for nobody.
            let began = Instant::now();
            let may_lend = self.writer.may_lend()?;
            self.waited += began.elapsed();
            if may_lend {
                frozen.lend(self.share, &mut cursor, scratch, &mut batch, &mut loans);
            } else {
                frozen.next(self.share, &mut cursor, scratch, &mut batch);
            }
            if batch.is_empty() {
                break;
            }
            self.delays.at("send");
            // A batch goes in one frame, as its loans do.
            if !self.runs.has_room(batch.len()) {
                self.flush(epoch, &[], vec![], &mut part)?;
            }
            let mut kept: Vec<Part<'_>> = Vec::with_capacity(batch.len());
            let mut lent: Vec<PageIndex> = Vec::with_capacity(batch.len());
            for (page, bytes) in &batch {
                let encoding = self.encoder.encode(*page, bytes);
                assert!(self.runs.push(*page, encoding), "a frame that is not full has room");
                if encoding == Encoding::Raw {
                    let is_lent = loans.iter().any(|loan| loan.has(*page));
                    lent.extend(is_lent.then_some(*page));
                    kept.push(Part { bytes: &bytes[..], page: is_lent.then_some(*page) });
                }
            }
            if !kept.is_empty() {
                // They come in order.
                loans.retain_mut(|loan| loan.retain(|page| lent.binary_search(&page).is_ok()));
                // What was let go may be newer than its checksum.
                not_revoked(frozen)?;
                let leases = loans.into_iter().map(|loan| Box::new(loan) as Lease).collect();
                self.flush(epoch, &kept, leases, &mut part)?;
            }
        }
        self.flush(epoch, &[], vec![], &mut part)?;
        not_revoked(frozen)?;
        self.end(epoch, part)
    }

    /// Sends the frame that was gathered; `kept` are its raw pages, and `leases` what keeps those of them
    /// that are in guest memory as they are.
    fn flush(
        &mut self,
        epoch: EpochId,
        kept: &[Part<'_>],
        leases: Vec<Lease>,
        part: &mut ConnectionPart,
    ) -> Result<(), WireError> {
        if self.runs.is_empty() {
            return Ok(());
        }
        encode_pages_header(epoch, &self.runs, &mut self.head);
        let mut parts: Vec<Part<'_>> = Vec::with_capacity(RAW_PAGES_MAX + 1);
        parts.push(Part::from(&self.head[..]));
        self.encoder.contents(kept, &mut parts);
        let began = Instant::now();
        let lent = kept.iter().filter(|part| part.page.is_some()).count() * PAGE_SIZE;
        self.counters.from_memory_bytes.fetch_add(lent as u64, Ordering::Relaxed);
        let crc = self.writer.gather(Kind::Pages, &parts, leases)?;
        let took = began.elapsed() + std::mem::take(&mut self.waited);
        self.encoder.sent(self.writer.bytes() - self.counted, took);
        self.encoder.arrived(|| self.writer.get_ref().delivery());
        let pages = self.runs.pages();
        self.runs.clear();
        part.add(pages, crc);
        let counters = &self.counters;
        counters.raw_bytes.fetch_add(pages * PAGE_SIZE as u64, Ordering::Relaxed);
        if epoch == EpochId(0) {
            counters.synced_pages.fetch_add(pages, Ordering::Relaxed);
        }
        self.count();
        Ok(())
    }

    fn end(&mut self, epoch: EpochId, part: ConnectionPart) -> Result<(), WireError> {
        if epoch != EpochId(0) {
            self.writer.write(Kind::End, &[&End { epoch, part }.encode()])?;
            self.count();
        }
        Ok(())
    }

    fn count(&mut self) {
        let new = self.writer.bytes() - self.counted;
        self.counted += new;
        self.counters.wire_bytes.fetch_add(new, Ordering::Relaxed);
    }
}

/// Fails if pages were let go that a device may read yet.
fn not_revoked(frozen: &dyn Frozen) -> Result<(), WireError> {
    if frozen.is_revoked() {
        let what = "The RDMA device took too long, and the guest went on";
        return Err(WireError::Io(io::Error::new(io::ErrorKind::TimedOut, what)));
    }
    Ok(())
}

/// Raw pages, whose bytes are in `scratch`.
fn kept<'a>(raw: &[PageIndex], scratch: &'a [Page], from_memory: bool) -> Vec<Part<'a>> {
    let parts = raw.iter().zip(scratch);
    parts.map(|(page, bytes)| Part { bytes, page: from_memory.then_some(*page) }).collect()
}

#[cfg(test)]
mod tests {
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
            for (page, sum) in
                decode_sums(&payload, PAGES).unwrap().iter().flat_map(GroupSums::iter)
            {
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
        senders.close_and(move || tell.send(()).unwrap()).unwrap();
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
            std::iter::from_fn(|| reader.read(&mut vec![]).ok().map(|header| header.kind))
                .collect();
        assert_eq!(kinds, [Kind::Pages]);
    }
}
