//! How a data connection becomes one by RDMA.
//!
//! Enters: what was asked for, and a TCP connection on which the primary has greeted. Leaves: one end
//! of a connection by RDMA, or why there is none, and whose fault that is. Always holds: a device is
//! opened once for all connections of a session; nobody waits for a device for longer than the
//! patience that was given, since what asks it is a thread of its own ([`aside`]).

use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ::rdma::{
    Access, Buffer, ConnectOptions, Depths, Library, Origin, Place, ProtectionDomain, QueuePair,
    Remote, RequestList, Wanted,
};
use api::replication::{RDMA_DEPTH, RDMA_DEPTH_DEFAULT, RdmaPath};
use thiserror::Error;

use super::aside::{aside, drop_aside};
use super::flight::Flight;
use super::kept::{Finds, Kept};
use super::lent::Lent;
use super::opening::Opening;
use super::pace::Pace;
use super::pieces::LendError;
use super::registrar::Registrar;
use super::ring::{Incoming, Outgoing, RING_BYTES};
use super::{CREDIT_BYTES, Device, End, Pairs, Parts, Reader, Writer, lock};
use crate::checking::is_broken;
use crate::error::chain;
use crate::ram::Ram;
use crate::transport::{Stream, TransportError, is_late};
use crate::wire::{FrameReader, FrameWriter, Kind, SessionId, Verbs, WireError};

/// How long a device may take to say what it is, when nothing else waits for it yet.
pub(crate) const CHECK_PATIENCE: Duration = Duration::from_secs(5);
/// Chunks that read guest memory before a queue pair fails for a test.
const FAILS_AFTER: u32 = 20;
/// Chunks that come before a backup's queue pair is gone for a test: a first copy straight into its memory is over by
/// then.
const GONE_AFTER: u32 = 200;
/// Segments of a request that are of use: a frame's scattered pages, and what stands between them.
const SEGMENTS_MAX: u32 = 16;
/// How long the peer, or the device, may take for one connection, at least.
const SETUP_PATIENCE_MIN: Duration = Duration::from_secs(1);
/// How long a device tries before it gives up a peer that does not answer, at least. The protocol's own
/// silence is what usually ends a session.
const RETRY_PATIENCE_MIN: Duration = Duration::from_millis(500);

/// Why a connection by RDMA was not made.
#[derive(Debug, Error)]
pub(crate) enum SetupError {
    /// This host's own device.
    #[error(transparent)]
    Device(#[from] TransportError),
    /// The peer, or the connection to it.
    #[error(transparent)]
    Wire(#[from] WireError),
}

impl From<::rdma::Error> for SetupError {
    fn from(error: ::rdma::Error) -> Self {
        match error {
            // Of this host's own endpoint nothing is checked: the peer has said what cannot be.
            ::rdma::Error::Endpoint { .. } => {
                let what = "queue pair";
                Self::Wire(WireError::Malformed { kind: Kind::Verbs, what })
            }
            error => Self::Device(TransportError::Rdma(error)),
        }
    }
}

/// What the options ask for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) device: Option<String>,
    pub(crate) port: Option<u8>,
    pub(crate) gid_index: Option<u8>,
    /// Within the option's range.
    pub(crate) depth: Option<u32>,
}

/// In unit tests, a device that is none: data goes on by the TCP connection that it began with. With a blank and a
/// number behind it, it registers so many pieces of memory (`fake.rs`), otherwise none. With "fails" behind it, it
/// writes nothing.
pub(crate) const FAKE: &str = "no device at all";

impl Asked {
    fn is_fake(&self) -> bool {
        cfg!(test) && self.device.as_deref().is_some_and(|device| device.starts_with(FAKE))
    }

    #[cfg(test)]
    fn fails(&self) -> bool {
        self.is_fake() && self.device.as_deref().is_some_and(|device| device.ends_with(" fails"))
    }

    #[cfg(test)]
    fn plan(&self) -> Option<super::fake::Plan> {
        super::fake::Plan::parse(self.device.as_deref()?.strip_prefix(FAKE)?.strip_prefix(' ')?)
    }

    fn wanted(&self) -> Wanted {
        let Self { device, port, gid_index, .. } = self.clone();
        Wanted { device, port, gid_index, local: None }
    }

    /// Whether this host could do it at all, before anything else is begun.
    ///
    /// # Errors
    /// [`TransportError::Rdma`]: no library, or no such device; [`TransportError::Hung`].
    pub(crate) fn check(&self) -> Result<(), TransportError> {
        if self.is_fake() {
            return Ok(());
        }
        let wanted = self.wanted();
        let choice = aside(CHECK_PATIENCE, move || {
            Library::load().and_then(|library| library.open(&wanted, None))
        })?;
        choice.map(drop).map_err(TransportError::Rdma)
    }
}

/// A device that was opened, for all connections of a session.
struct Opened {
    domain: Arc<ProtectionDomain>,
    place: Place,
    chunks: u32,
    /// Segments of a request that are asked for.
    segments: u32,
    pairs: Arc<Pairs>,
    /// What is registered in the domain since an earlier session, until it is lent.
    kept: Mutex<Option<Kept>>,
}

impl Opened {
    fn new(wanted: &Wanted, depth: Option<u32>, kept: Option<Kept>) -> Result<Self, ::rdma::Error> {
        let library = Library::load()?;
        let kept = kept.filter(Kept::is_usable);
        let domain = kept.as_ref().and_then(Kept::domain);
        let (context, place) = library.open(wanted, domain.as_ref().map(|old| old.context()))?;
        let domain = domain.filter(|domain| Arc::ptr_eq(domain.context(), &context));
        // That of another device, or of one that is opened anew, ends here.
        let kept = Mutex::new(kept.filter(|_| domain.is_some()));
        let limits = context.limits()?;
        let chunks = chunks(depth, limits.requests_max, limits.completions_max, &place.device)?;
        let domain = domain.map_or_else(|| ProtectionDomain::new(&context), Ok)?;
        let segments = limits.segments_max.clamp(1, SEGMENTS_MAX);
        Ok(Self { domain, place, chunks, segments, pairs: Arc::default(), kept })
    }

    fn device(&self) -> Result<Device, ::rdma::Error> {
        Device::new(&self.domain, completions(self.chunks), &self.pairs)
    }

    fn pair(
        &self,
        device: &Device,
        access: Access,
        send_segments: u32,
    ) -> Result<QueuePair, ::rdma::Error> {
        let depths = Depths {
            sends: sends(self.chunks),
            receives: self.chunks,
            send_segments,
            receive_segments: 1,
            inline_bytes: 0,
        };
        let origin = Origin { port: self.place.port, gid_index: self.place.gid_index, access };
        let queue = &device.completions;
        let pair = QueuePair::new(&self.domain, queue, queue, &depths, origin)?;
        self.pairs.add(&pair);
        Ok(pair)
    }

    /// One whose requests gather as many segments as the device has room for in all of them.
    fn gathering_pair(&self, device: &Device) -> Result<QueuePair, ::rdma::Error> {
        let mut segments = self.segments;
        loop {
            match self.pair(device, Access::LOCAL_READ, segments) {
                Err(error @ ::rdma::Error::Device { .. }) if segments > 1 => {
                    tracing::debug!("{segments} segments are too many: {}", chain(&error));
                    segments /= 2;
                }
                made => return made,
            }
        }
    }
}

/// A chunk is two requests at most, and each of them completes.
pub(super) fn sends(chunks: u32) -> u32 {
    2 * chunks
}

/// Completions of requests and of receives, with room to spare: a queue that runs over is lost.
fn completions(chunks: u32) -> u32 {
    4 * chunks
}

/// The depth that was asked for, or as much of the default as the device holds.
fn chunks(
    depth: Option<u32>,
    requests_max: u32,
    completions_max: u32,
    device: &str,
) -> Result<u32, ::rdma::Error> {
    let most = (requests_max / sends(1)).min(completions_max / completions(1));
    let chunks = depth.unwrap_or(RDMA_DEPTH_DEFAULT.min(most));
    if chunks > most || chunks < *RDMA_DEPTH.start() {
        let what = format!("rdma_depth is {chunks}, the device {device} holds {most} at most");
        return Err(::rdma::Error::Option { what });
    }
    Ok(chunks)
}

/// How long a device may take where the session gives a silent peer `timeout`.
fn patience(timeout: Duration) -> Duration {
    timeout.max(SETUP_PATIENCE_MIN)
}

/// What a session's data connections share.
#[derive(Clone)]
pub(crate) struct Adapter(Arc<Shared>);

struct Shared {
    asked: Asked,
    timeout: Duration,
    report: Box<dyn Fn(RdmaPath) + Send + Sync>,
    opening: Opening<Opened>,
    lent: Arc<Lent>,
    finds: Finds,
}

impl Drop for Shared {
    fn drop(&mut self) {
        // Closing a device asks it.
        if let Some(opened) = self.opening.take() {
            drop_aside(patience(self.timeout), opened);
        }
    }
}

impl Adapter {
    /// Nothing is opened yet: which device it is depends on how the peer is reached. `timeout` is the session's,
    /// and `report` hears what each connection uses. `finds` is what the VM's last session left.
    pub(crate) fn new(
        asked: Asked,
        timeout: Duration,
        report: impl Fn(RdmaPath) + Send + Sync + 'static,
        finds: Finds,
    ) -> Self {
        let (report, opening) = (Box::new(report), Opening::new());
        let lent = Arc::default();
        Self(Arc::new(Shared { asked, timeout, report, opening, lent, finds }))
    }

    /// See [`FAKE`].
    pub(crate) fn is_fake(&self) -> bool {
        self.0.asked.is_fake()
    }

    fn patience(&self) -> Duration {
        patience(self.0.timeout)
    }

    /// The session's device: the one whose address the first connection has.
    fn opened(&self, tcp: &dyn Stream) -> Result<Arc<Opened>, TransportError> {
        self.0.opening.get(self.patience(), || {
            let wanted = Wanted { local: tcp.local_address(), ..self.0.asked.wanted() };
            Opened::new(&wanted, self.0.asked.depth, self.0.finds.take())
        })
    }

    /// The device of the connections that were made.
    fn made(&self) -> Result<Arc<Opened>, TransportError> {
        let none = || Err(::rdma::Error::Option { what: "no device is opened".to_owned() });
        self.0.opening.get(self.patience(), none)
    }

    /// What an earlier session has registered with the device of the connections that were made.
    fn kept(&self) -> Option<Kept> {
        #[cfg(test)]
        if self.0.asked.plan().is_some() {
            return self.0.finds.take();
        }
        lock(&self.made().ok()?.kept).take()
    }

    /// That of the device of the connections that were made.
    pub(super) fn registrar(&self) -> Result<Registrar, TransportError> {
        #[cfg(test)]
        if let Some(plan) = self.0.asked.plan() {
            return Ok(Registrar::Fake(Arc::new(plan)));
        }
        Ok(Registrar::Device(Arc::clone(&self.made()?.domain)))
    }

    /// What lends guest memory to the connections that were made.
    pub(crate) fn lender(self) -> Lender {
        Lender { adapter: Some(self) }
    }

    fn options(&self) -> ConnectOptions {
        let defaults = ConnectOptions::default();
        let tries = u32::from(defaults.retries) + 1;
        let patience = self.0.timeout.max(RETRY_PATIENCE_MIN);
        ConnectOptions { timeout: ConnectOptions::timeout_of(patience / tries), ..defaults }
    }

    /// Says what a connection uses, here and in the log; returns how many chunks may be under way.
    fn agreed(&self, opened: &Opened, ours: &Verbs, theirs: &Verbs, verb: &str) -> usize {
        let Place { device, port, gid_index, gid, .. } = &opened.place;
        let mtu_bytes = ours.endpoint.mtu_bytes.min(theirs.endpoint.mtu_bytes);
        let depth = ours.chunks.min(theirs.chunks);
        tracing::info!(
            "data {verb} by RDMA: device {device}, port {port}, GID {gid_index} ({gid}), MTU {mtu_bytes}, \
             depth {depth}"
        );
        (self.0.report)(RdmaPath {
            device: device.clone(),
            port: *port,
            gid_index: *gid_index,
            gid: gid.to_string(),
            mtu_bytes,
            depth,
            registered_bytes: 0,
            from_memory_bytes: 0,
            straight_bytes: 0,
        });
        usize::try_from(depth).unwrap_or(usize::MAX)
    }

    /// Turns the primary's end of a data connection, whose greeting was sent, into one by RDMA. Asks the
    /// device, so not for an engine's thread.
    ///
    /// # Errors
    /// What the device, or the backup, says.
    pub(crate) fn write_by(
        &self,
        mut control: FrameWriter<Box<dyn Stream>>,
    ) -> Result<FrameWriter<Box<dyn Stream>>, SetupError> {
        #[cfg(test)]
        if self.0.asked.fails() {
            let what = "it fails".to_owned();
            return Err(TransportError::Rdma(::rdma::Error::Option { what }).into());
        }
        #[cfg(test)]
        if self.0.asked.plan().is_some() {
            (self.0.report)(super::fake::path());
            let lent = Arc::clone(&self.0.lent);
            let wrap = |stream| super::fake::Writer { stream, lent, posted: vec![] };
            return Ok(control.map(|stream| Box::new(wrap(stream)) as Box<dyn Stream>));
        }
        if self.is_fake() {
            return Ok(control);
        }
        let tcp = control.get_ref().duplicate().map_err(WireError::Io)?;
        tcp.set_read_timeout(Some(self.answer_patience())).map_err(WireError::Io)?;
        let opened = self.opened(tcp.as_ref())?;
        let device = opened.device()?;
        let pair = opened.gathering_pair(&device)?;
        let segments_max = pair.depths().send_segments.clamp(1, SEGMENTS_MAX);
        let ours = Verbs::of(pair.endpoint(), opened.chunks);
        control.write(Kind::Verbs, &[&ours.encode()])?;
        let answer = tcp.duplicate().map_err(WireError::Io)?;
        let theirs = receive(&mut FrameReader::new(answer, Some(control.session())));
        let theirs = theirs.map_err(|error| self.silence(error))?;
        let end = theirs.ring_address.checked_add(RING_BYTES as u64);
        if theirs.ring_bytes as usize != RING_BYTES || end.is_none() {
            let what = "size of the ring";
            return Err(WireError::Malformed { kind: Kind::Verbs, what }.into());
        }
        let local = Buffer::new(&opened.domain, RING_BYTES, Access::LOCAL_READ)?;
        pair.connect(&theirs.endpoint, &self.options())?;
        tcp.set_read_timeout(None).map_err(WireError::Io)?;
        let chunks = self.agreed(&opened, &ours, &theirs, "goes");
        let parts = Parts { pair, device, local };
        let writer = Writer {
            end: End::new(tcp, parts, self.patience()).map_err(WireError::Io)?,
            remote: Remote { address: theirs.ring_address, key: theirs.ring_key },
            ring: Outgoing::new(RING_BYTES, chunks),
            requests: RequestList::default(),
            segments: Vec::new(),
            segments_max: usize::try_from(segments_max).unwrap_or(1),
            flight: Flight::default(),
            pace: Pace::new(self.patience(), Instant::now()),
            // What is asked for, not the fewer chunks that both ends agreed on.
            posted_max: usize::try_from(sends(opened.chunks)).unwrap_or(2),
            lent: Arc::clone(&self.0.lent),
            fails_after: is_broken("queue-pair").then_some(FAILS_AFTER),
            word: Vec::with_capacity(CREDIT_BYTES),
        };
        Ok(control.map(|_| Box::new(writer) as _))
    }

    /// Says what was waited for.
    fn silence(&self, error: WireError) -> WireError {
        match error {
            WireError::Io(late) if is_late(&late) => {
                let ms = self.answer_patience().as_millis();
                let what = format!("The backup did not say within {ms} ms how it does RDMA");
                WireError::Io(io::Error::new(io::ErrorKind::TimedOut, what))
            }
            other => other,
        }
    }

    /// The backup gives up its own device after its patience, and that is to arrive here.
    fn answer_patience(&self) -> Duration {
        2 * self.patience()
    }

    /// How long [`Adapter::write_by`] may take: this device, and the backup's answer.
    pub(crate) fn write_patience(&self) -> Duration {
        self.patience() + self.answer_patience()
    }

    /// Turns the backup's end of a data connection into one by RDMA, after the primary's word for it.
    /// Waits for the device no longer than the session's patience.
    ///
    /// # Errors
    /// What the device, or the primary, says.
    pub(crate) fn read_by(
        &self,
        theirs: Verbs,
        session: SessionId,
        tcp: Box<dyn Stream>,
    ) -> Result<Box<dyn Stream>, SetupError> {
        let this = self.clone();
        let reader = aside(self.patience(), move || this.answer(&theirs, session, tcp))??;
        Ok(Box::new(reader))
    }

    fn answer(
        &self,
        theirs: &Verbs,
        session: SessionId,
        tcp: Box<dyn Stream>,
    ) -> Result<Reader, SetupError> {
        let opened = self.opened(tcp.as_ref())?;
        let device = opened.device()?;
        let local = Buffer::new(&opened.domain, RING_BYTES, Access::REMOTE_WRITE)?;
        let pair = opened.pair(&device, Access::REMOTE_WRITE, 1)?;
        let Remote { address, key } = local.remote();
        let ours = Verbs {
            ring_address: address,
            ring_key: key,
            ring_bytes: u32::try_from(RING_BYTES).unwrap_or(0),
            ..Verbs::of(pair.endpoint(), opened.chunks)
        };
        let receives = ours.chunks.min(theirs.chunks);
        pair.post_empty_receives(0, usize::try_from(receives).unwrap_or(0))?;
        pair.connect(&theirs.endpoint, &self.options())?;
        let back = tcp.duplicate().map_err(WireError::Io)?;
        FrameWriter::new(back, session).write(Kind::Verbs, &[&ours.encode()])?;
        let chunks = self.agreed(&opened, &ours, theirs, "comes");
        let parts = Parts { pair, device, local };
        let end = End::new(tcp, parts, self.patience()).map_err(WireError::Io)?;
        let gone_after = is_broken("peer-queue-pair").then_some(GONE_AFTER);
        Ok(Reader { end, ring: Incoming::new(RING_BYTES, chunks), gone_after })
    }
}

/// Lends guest memory to a session's connections, once.
pub(crate) struct Lender {
    adapter: Option<Adapter>,
}

impl Lender {
    /// What is lent, to end it.
    pub(crate) fn lent(&self) -> Arc<Lent> {
        self.adapter.as_ref().map(|adapter| Arc::clone(&adapter.0.lent)).unwrap_or_default()
    }

    /// How long a session waits for a device.
    pub(crate) fn patience(&self) -> Duration {
        self.adapter.as_ref().map_or(SETUP_PATIENCE_MIN, Adapter::patience)
    }

    /// Lends what an earlier session has registered; `false` if there is nothing, or not of this memory.
    pub(crate) fn lend_again(&self, ram: &Ram) -> bool {
        let Some(adapter) = &self.adapter else { return false };
        let Some(kept) = adapter.kept().filter(|kept| kept.is_of(ram)) else { return false };
        adapter.0.lent.lend_again(kept);
        true
    }

    /// Registers all of `ram`, piece by piece, `done` bytes so far. Asks the device, so not for an engine's thread.
    ///
    /// # Errors
    /// [`LendError`]; see [`Lent::give_up`].
    pub(crate) fn lend(&self, ram: &Ram, done: impl FnMut(u64) + Send) -> Result<(), LendError> {
        let Some(adapter) = &self.adapter else { return Err(LendError::Ended) };
        adapter.0.lent.lend(ram, &adapter.registrar()?, done)
    }
}

impl Drop for Lender {
    /// Closing a device asks it, and an engine may be the one that drops this.
    fn drop(&mut self) {
        let adapter = self.adapter.take();
        let body = move || drop(adapter);
        // Without a thread it is done here, when the closure is dropped.
        let _ = std::thread::Builder::new().name("repl-verbs".to_owned()).spawn(body);
    }
}

fn receive(reader: &mut FrameReader<Box<dyn Stream>>) -> Result<Verbs, WireError> {
    let mut payload = Vec::new();
    let header = reader.read(&mut payload)?;
    match header.kind {
        Kind::Verbs => Verbs::decode(&payload),
        found => Err(WireError::Unexpected { found, expected: "an RDMA queue pair" }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_depth_is_what_was_asked_for_or_what_fits() {
        let fit = |depth, requests, completions| {
            chunks(depth, requests, completions, "mlx5_0").map_err(|error| error.to_string())
        };
        assert_eq!(fit(None, 4096, 4096), Ok(64));
        assert_eq!(fit(None, 60, 4096), Ok(30), "the default is no demand");
        assert_eq!(fit(None, 4096, 100), Ok(25));
        assert_eq!(fit(Some(1024), 2048, 4096), Ok(1024));
        let refused = fit(Some(65), 128, 4096).unwrap_err();
        assert!(
            refused.ends_with("rdma_depth is 65, the device mlx5_0 holds 64 at most"),
            "{refused}"
        );
        assert!(fit(Some(1024), 2048, 4095).is_err() && fit(None, 7, 4096).is_err());
    }
}
