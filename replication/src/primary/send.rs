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
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
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
    pub(super) fn close_and(self, then: impl FnOnce() + Send + 'static) {
        let ended = Arc::new(Mutex::new(Some((self.close(), then))));
        let body = {
            let ended = Arc::clone(&ended);
            move || await_end(&ended)
        };
        if let Err(error) = spawn("repl-ended", None, body) {
            tracing::warn!("senders are waited for here: {}", error.chain());
            await_end(&ended);
        }
    }
}

/// What is called once threads have ended, and these.
type Ended<F> = Mutex<Option<(Vec<JoinHandle<()>>, F)>>;

fn await_end<F: FnOnce()>(ended: &Ended<F>) {
    let taken = ended.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some((threads, then)) = taken else { return };
    for thread in threads {
        if thread.join().is_err() {
            tracing::error!("A sender panicked");
        }
    }
    then();
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
#[path = "send_tests.rs"]
mod tests;
