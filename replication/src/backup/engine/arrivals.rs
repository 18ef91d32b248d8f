//! Who comes: a primary's control connection, its data connections, and what a session is built of.
//!
//! Enters: streams that were greeted. Leaves: the engine's session and the threads that read for it,
//! or a refusal. Always holds: a stream that is not of the present session, or that it has already,
//! is closed and changes nothing.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use api::replication::ReplicateData;

use super::{Base, Built, Engine, Input, Opening, Session};
use crate::backup::accept::Arrival;
use crate::backup::commit::Gather;
use crate::backup::disks::{DiskConnection, DiskDelivery, Images};
use crate::backup::receive::Shared;
use crate::backup::staging::Budget;
use crate::capture::cow::Share;
use crate::checking::reach;
use crate::engine::clock;
use crate::engine::control::{Control, Greeted, Pace, Progress};
use crate::engine::heard::Heard;
use crate::engine::spawn;
use crate::error::Error;
use crate::guest::{Replica, ReplicaBuilder};
use crate::ids::PAGE_SIZE;
use crate::observer::Event as Told;
use crate::ownership::{HostId, VmId};
use crate::primary::{layout, validate_paces};
use crate::protocol::backup::{Event, State};
use crate::ram::Ram;
use crate::transport::{Stream, rdma};
use crate::wire::{FrameReader, FrameWriter, Hello, Message, Offer, SessionId, Welcome};

/// Longest wait of a primary for the end of the session before.
const WAIT_MAX: Duration = Duration::from_millis(500);

/// A primary that greeted.
pub(super) struct Caller {
    greeted: Greeted,
    hello: Hello,
    offer: Offer,
    peer: String,
}

impl<B: ReplicaBuilder> Engine<B> {
    pub(super) fn arrival(&mut self, arrival: Arrival) {
        match arrival {
            Arrival::Control { greeted, hello, offer, peer } => {
                self.called(Box::new(Caller { greeted: *greeted, hello, offer: *offer, peer }));
            }
            Arrival::Data { reader, hello } => self.data(reader, hello),
            Arrival::Stray { peer, error } => {
                let line = format!("A connection from {peer} was refused: {error}");
                let is_news = self.strangers.is_news(&error, clock::now());
                self.sent_away(&line, is_news);
            }
            Arrival::Broken(error) => {
                self.session_failed(&error);
                self.deaf = Some(error);
            }
        }
    }

    /// Somebody was sent away, as anybody may have himself, as often as he likes: neither log and events are full of
    /// that, nor does it hide what the session at hand, or what is left of it, says.
    fn sent_away(&mut self, line: &str, is_news: bool) {
        if !is_news {
            return tracing::debug!("{line}");
        }
        if self.machine.state() == State::Idle {
            self.status.failed(line);
        }
        self.observer.event(Told::ReceiveFailed { error: line.to_owned() });
    }

    /// Where nobody can connect any more there is nothing to wait for.
    pub(super) fn stop_if_deaf(&mut self) {
        if self.machine.state() == State::Idle
            && let Some(error) = self.deaf.take()
        {
            self.status.failed(&error);
            self.step(Event::StopAsked);
        }
    }

    /// Why this primary cannot be served; `None` if it can.
    fn refusal(&self, hello: &Hello, offer: &Offer) -> Option<Refusal> {
        let vm = self.identity().vm;
        let is_ours = VmId(hello.vm) == vm;
        let state = self.machine.state();
        match state {
            State::Heir => return self.refusal_by_heir(hello, offer),
            _ if offer.reversed => {
                // Nor will it become that: its primary waits for nothing here.
                let what = "This host is not the backup of such a pair: it is copied to anew";
                return Some(Refusal::Lasting(what.to_owned()));
            }
            // Its images and taps would be the first VM's, where ids are the same.
            State::Idle if self.only.is_some_and(|only| only != VmId(hello.vm)) => {
                let what = "This host listens for the VM that it handed over, and for no other \
                            (return_url): say vm.stop-replication here, then vm.receive-replica";
                return Some(Refusal::Lasting(what.to_owned()));
            }
            State::Idle => {}
            State::Orphan if is_ours => {}
            State::Orphan => {
                let what = format!("This host holds the replica of VM {vm}: stop it first");
                return Some(Refusal::Lasting(what));
            }
            // The session that its primary has left already, or a claim that it won.
            _ if is_ours => {
                let what = match state {
                    State::Claiming | State::Starting => "a take-over is under way (TakingOver)",
                    _ => "an earlier session has not ended here",
                };
                return Some(Refusal::Passing(format!("This host serves this VM already: {what}")));
            }
            _ => {
                let what = format!("This host serves another primary (VM {vm})");
                // What only copies is worth nothing yet, and may be anybody's.
                return Some(match state {
                    State::Syncing => Refusal::Passing(what),
                    _ => Refusal::Lasting(what),
                });
            }
        }
        self.misfit(offer).map(Refusal::Lasting)
    }

    /// Why an offer cannot be taken, whoever makes it.
    pub(super) fn misfit(&self, offer: &Offer) -> Option<String> {
        if let Err(reason) = self.way_back(offer) {
            return Some(reason);
        }
        if offer.page_bytes as usize != PAGE_SIZE {
            Some(format!("Pages of {} bytes are not supported", offer.page_bytes))
        } else if let Err(error) =
            validate_paces(offer.heartbeat_ms.into(), offer.timeout_ms.into())
        {
            Some(error.to_string())
        } else if offer.arbiter != self.asker.exists() {
            let (here, there) = if offer.arbiter { ("no", "an") } else { ("an", "no") };
            Some(format!("This side has {here} arbiter, the primary has {there} arbiter"))
        } else {
            mismatch(self.rdma.is_some(), offer.rdma, &offer.fallback, self.options.fallback)
        }
    }

    /// The primary's options for the way back, with what is this host's own: how it gets at the arbiter
    /// and at its device.
    fn way_back(&self, offer: &Offer) -> Result<Option<ReplicateData>, String> {
        if offer.way_back.is_empty() {
            return Ok(None);
        }
        let unusable = |why: String| format!("The options of return_url are not usable: {why}");
        let theirs: ReplicateData =
            serde_json::from_str(&offer.way_back).map_err(|error| unusable(error.to_string()))?;
        let own = &self.options;
        let is_rdma = theirs.destination_url.starts_with("rdma:");
        let data = ReplicateData {
            reconnect: true,
            arbiter: own.arbiter.clone(),
            arbiter_tls_dir: own.arbiter_tls_dir.clone(),
            arbiter_credentials: own.arbiter_credentials.clone(),
            tls_dir: own.tls_dir.clone(),
            rdma_device: own.rdma_device.clone().filter(|_| is_rdma),
            rdma_port: own.rdma_port.filter(|_| is_rdma),
            rdma_gid_index: own.rdma_gid_index.filter(|_| is_rdma),
            rdma_depth: own.rdma_depth.filter(|_| is_rdma),
            fallback: own.fallback && is_rdma,
            ..theirs
        };
        match data.validate().first() {
            None => Ok(Some(data)),
            Some(invalid) => Err(unusable(invalid.line())),
        }
    }

    /// A first call is not repeated, and the session that it meets may be one that is just being let go: one
    /// caller at a time waits for that, well within its own patience.
    fn called(&mut self, caller: Box<Caller>) {
        let Caller { hello, offer, .. } = &*caller;
        let is_passing = matches!(self.refusal(hello, offer), Some(Refusal::Passing(_)));
        let may_end = matches!(self.machine.state(), State::Syncing | State::Replica);
        if is_passing && may_end && self.waiting.is_none() {
            let patience = WAIT_MAX.min(Duration::from_millis(offer.timeout_ms.into()) / 2);
            self.waiting = Some((caller, clock::now() + patience));
            return;
        }
        self.control(*caller);
    }

    /// Whoever waits is served, or hears why not.
    pub(super) fn admit_waiting(&mut self) {
        if let Some((caller, _)) = self.waiting.take() {
            self.control(*caller);
        }
    }

    fn control(&mut self, caller: Caller) {
        let Caller { greeted: Greeted { reader, writer }, hello, mut offer, peer } = caller;
        if let Some(refusal) = self.refusal(&hello, &offer) {
            let reason = refusal.tell(writer);
            let line = format!("A primary at {peer} was refused: {reason}");
            let is_news = self.refused.is_news(&reason, clock::now());
            self.sent_away(&line, is_news);
            return self.was_left(&hello, &offer);
        }
        if self.machine.state() != State::Heir {
            // Of an heir the pair stands, and its new primary has looked at the same record.
            self.asker.begin_anew();
        }
        self.step(Event::Accepted);
        self.way_back = self.way_back(&offer).unwrap_or_default();
        self.identity.lock().unwrap_or_else(PoisonError::into_inner).vm = VmId(hello.vm);
        let id = reader.session().unwrap_or(SessionId(0));
        let heartbeat_ms = self.options.heartbeat_ms.min(offer.heartbeat_ms.into());
        // The more patient side sets the pace: it knows how its network behaves.
        let timeout_ms = self.options.timeout_ms.max(offer.timeout_ms.into());
        let timeout = Duration::from_millis(timeout_ms);
        let pace = Pace { heartbeat: Duration::from_millis(heartbeat_ms), linger: timeout };
        let heard = Heard::new();
        self.sessions += 1;
        let number = self.sessions;
        let control = match self.listen(Greeted { reader, writer }, pace, &heard) {
            Ok(control) => control,
            Err(error) => return self.step(Event::Lost(error.chain())),
        };
        if !offer.rdma && !offer.fallback.is_empty() {
            tracing::warn!("data comes by TCP, not by RDMA: {}", offer.fallback);
        }
        self.observer.event(Told::ReceiveStarted { peer: peer.clone() });
        let built = Built {
            primary: HostId(hello.host),
            vm: VmId(hello.vm),
            session: id,
            description: vec![],
        };
        let is_heir = self.machine.state() == State::Heir;
        let prepared =
            if is_heir { self.prepare_heir(built) } else { self.prepare(built, &mut offer) };
        let (ram, has_base) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => {
                control.send(Message::Abort(error.chain()));
                drop(control.finish());
                return self.step(Event::Lost(error.chain()));
            }
        };
        control.send(Message::Welcome(Welcome {
            host: self.identity().host.0,
            staging_bytes: self.options.staging_size,
            heartbeat_ms: u32::try_from(heartbeat_ms).unwrap_or(u32::MAX),
            timeout_ms: u32::try_from(timeout_ms).unwrap_or(u32::MAX),
            has_base,
        }));
        reach("accepted");
        // Building may have taken longer than the timeout.
        heard.now();
        let connections = usize::try_from(hello.connections).unwrap_or(0);
        self.session = Some(Session {
            number,
            id,
            primary: HostId(hello.host),
            control,
            data: (0..connections).map(|_| None).collect(),
            disks: None,
            bell: None,
            shared: self.share(ram, heard, timeout, offer.rdma, is_heir),
            opening: Opening::default(),
            gather: Gather::new(connections, !offer.disks.is_empty()),
            timeout,
            last_word: false,
        });
        // It may be there by the time that it is needed: a person has until then to see to it.
        let lacks = self.lacks();
        if let Some(lacks) = &lacks {
            tracing::warn!("{lacks}");
        }
        let mut gathered = self.status.lock();
        gathered.info.peer = Some(peer);
        if !is_heir {
            gathered.info.epoch_sealed = 0;
        }
        gathered.info.rdma = None;
        gathered.info.last_error = lacks;
        if self.rdma.is_some() {
            let has_tls = self.options.tls_dir.is_some();
            gathered.info.transport = Some(carrier(offer.rdma, has_tls).to_owned());
            gathered.info.fallback_reason = (!offer.rdma).then_some(offer.fallback);
        }
        drop(gathered);
    }

    /// Has the present session's control connection read and written.
    fn listen(&self, greeted: Greeted, pace: Pace, heard: &Heard) -> Result<Control, Error> {
        let (number, deliver) = (self.sessions, self.inputs.clone());
        let counters = Arc::clone(&self.status.counters);
        let progress =
            Progress { ours: Some(Arc::new(move || counters.done())), ..Progress::default() };
        self.crew.control(greeted, pace, heard.clone(), progress, move |word, credit| {
            let input = match word {
                Ok(message) => Input::Message(number, message, credit),
                Err(error) => Input::Lost(number, error),
            };
            deliver.send(input).is_ok()
        })
    }

    fn share(
        &self,
        ram: Ram,
        heard: Heard,
        timeout: Duration,
        by_rdma: bool,
        is_whole: bool,
    ) -> Shared {
        let adapter = self.rdma.clone().filter(|_| by_rdma).map(|asked| {
            let status = self.status.clone();
            let report = move |path| status.lock().info.rdma = Some(path);
            // The image is opened for the time of a copy only.
            rdma::Adapter::new(asked, timeout, report, rdma::Finds::default())
        });
        Shared {
            ram,
            is_whole,
            budget: Budget::new(self.options.staging_size),
            round: Arc::new(AtomicU64::new(0)),
            heard,
            counters: Arc::clone(&self.status.counters),
            rdma: adapter,
        }
    }

    /// The replica of a session: what was kept of an earlier one of the same VM, if that is what the
    /// primary would go on from, or a new one. Its memory, and whether it was kept.
    fn prepare(&mut self, built: Built, offer: &mut Offer) -> Result<(Ram, bool), Error> {
        // Whatever does not fit makes room first: its memory and sockets.
        let is_same = |base: &Base<_>| self.builder.is_same(&base.description, &offer.description);
        let kept = self.base.take().filter(|base| base.fits(&built, offer) && is_same(base));
        let kept = kept.map(|base| base.replica);
        let has_base = kept.is_some();
        let ram = self.build(kept, offer)?;
        let description = std::mem::take(&mut offer.description);
        self.built = Some(Built { description, ..built });
        Ok((ram, has_base))
    }

    fn build(&mut self, kept: Option<B::Replica>, offer: &Offer) -> Result<Ram, Error> {
        let mut replica = match kept {
            Some(mut replica) => {
                self.builder.reuse(&mut replica);
                replica
            }
            None => self
                .builder
                .build(&offer.description)
                .map_err(|source| Error::Guest { what: "build the replica", source })?,
        };
        let ram = replica.ram();
        if layout(&ram) != offer.regions {
            let pages =
                offer.regions.iter().fold(0, |sum: u64, region| sum.saturating_add(region.pages));
            let found = ram.pages();
            return Err(Error::Memory(format!(
                "the primary has {pages} pages in {} regions, the replica {found} in {}",
                offer.regions.len(),
                ram.regions().len()
            )));
        }
        self.open_images(&mut replica, &offer.disks)?;
        let pages = ram.pages().max(1);
        let counters = &self.status.counters;
        counters.synced_pages.store(0, Ordering::Relaxed);
        counters.to_sync_pages.store(pages, Ordering::Relaxed);
        counters.synced_disk_bytes.store(0, Ordering::Relaxed);
        counters.to_sync_disk_bytes.store(offer.disks.iter().sum(), Ordering::Relaxed);
        self.replica = Some(replica);
        Ok(ram)
    }

    /// Disks of other sizes than the primary's are refused before a byte of them is written.
    fn open_images(&mut self, replica: &mut B::Replica, sizes: &[u64]) -> Result<(), Error> {
        if sizes.is_empty() {
            return Ok(());
        }
        let opened = replica.open_disks();
        let disks = opened.map_err(|source| Error::Guest { what: "open the images", source })?;
        if disks.len() != sizes.len() {
            let (theirs, ours) = (sizes.len(), disks.len());
            let what = format!("The primary replicates {theirs} disks, the replica has {ours}");
            return Err(Error::Failed(what));
        }
        for (at, (disk, theirs)) in disks.iter().zip(sizes).enumerate() {
            let ours = disk.size_bytes();
            if ours != *theirs {
                return Err(Error::Failed(format!(
                    "Disk {at} has {theirs} bytes at the primary and its image here has {ours}: \
                     they must be of the same size"
                )));
            }
        }
        let (number, deliver) = (self.sessions, self.inputs.clone());
        let tell = move |done| {
            // An engine that has ended has let go of the images.
            let _ = deliver.send(Input::Images(number, done));
        };
        let limit = self.options.staging_size / 4;
        self.images = Some((number, Images::start(disks, limit, &self.status.counters, tell)?));
        Ok(())
    }

    fn data(&mut self, reader: FrameReader<Box<dyn Stream>>, hello: Hello) {
        let vm = self.identity().vm;
        let Some(session) = &mut self.session else { return };
        let index = usize::try_from(hello.connection).unwrap_or(0).wrapping_sub(1);
        let known = reader.session() == Some(session.id)
            && VmId(hello.vm) == vm
            && HostId(hello.host) == session.primary;
        if known && index == session.data.len() && session.bell.is_none() {
            return self.hang_bell(reader);
        }
        if known && index == session.data.len() + 1 && session.disks.is_none() {
            return self.disk_data(reader);
        }
        if !known || !matches!(session.data.get(index), Some(None)) {
            // Of an older session, or a stranger: its stream closes with the reader.
            return;
        }
        let (number, deliver) = (session.number, self.inputs.clone());
        let share = Share { index, of: session.data.len() };
        let shared = session.shared.clone();
        let started = self.crew.data(share, reader, shared, move |part| {
            let input = match part {
                Ok((part, taken)) => Input::Part(number, index, part, taken),
                Err(error) => Input::DataLost(number, error),
            };
            deliver.send(input).is_ok()
        });
        match started {
            Ok(connection) => session.data[index] = Some(connection),
            Err(error) => self.step(Event::Bad(error.chain())),
        }
    }

    /// The disks' connection, where there are disks.
    fn disk_data(&mut self, reader: FrameReader<Box<dyn Stream>>) {
        let (Some(session), Some((_, images))) = (&mut self.session, &self.images) else { return };
        let (number, deliver) = (session.number, self.inputs.clone());
        let (disks, shared) = (images.disks().to_vec(), session.shared.clone());
        let started = DiskConnection::start(reader, disks, shared, move |part: DiskDelivery| {
            let input = match part {
                Ok((part, taken)) => Input::DiskPart(number, part, taken),
                Err(error) => Input::DataLost(number, error),
            };
            deliver.send(input).is_ok()
        });
        match started {
            Ok(connection) => session.disks = Some(connection),
            Err(error) => self.step(Event::Bad(error.chain())),
        }
    }

    /// Waits beside the engine for the end of the primary's process.
    fn hang_bell(&mut self, mut reader: FrameReader<Box<dyn Stream>>) {
        let Some(session) = &mut self.session else { return };
        let stream = reader.get_mut();
        // No bell is no harm: the other connections end too, only later.
        let Ok(handle) = stream.set_read_timeout(None).and_then(|()| stream.duplicate()) else {
            return;
        };
        let (number, deliver) = (session.number, self.inputs.clone());
        let body = move || {
            let mut nothing = [0; 64];
            while matches!(reader.get_mut().read(&mut nothing), Ok(1..)) {}
            // An engine that has ended wants no news.
            let _ = deliver.send(Input::Bell(number));
        };
        match spawn("repl-bell", None, body) {
            Ok(_) => session.bell = Some(handle),
            Err(error) => tracing::debug!("no bell: {}", error.chain()),
        }
    }
}

impl<R> Base<R> {
    /// Whether it is what this primary knows the difference to.
    fn fits(&self, built: &Built, offer: &Offer) -> bool {
        let knows = offer
            .base
            .is_some_and(|base| base.fits(self.session.0, self.generation, self.committed));
        knows && self.primary == built.primary && self.vm == built.vm
    }
}

/// What carries a session's data at a receiver of `rdma:`.
fn carrier(by_rdma: bool, has_tls: bool) -> &'static str {
    match (by_rdma, has_tls) {
        (true, false) => "rdma",
        (true, true) => "rdma+tls",
        (false, false) => "tcp",
        (false, true) => "tcp+tls",
    }
}

/// What the primary is told whose data come in another way than this side's do.
fn mismatch(ours: bool, theirs: bool, fell_back: &str, may_fall_back: bool) -> Option<String> {
    const OURS: &str = "the backup's receiver_url";
    const THEIRS: &str = "the primary's destination_url";
    if ours && !theirs && !fell_back.is_empty() {
        let refused = || {
            format!(
                "The primary falls back from RDMA to TCP, and the backup's options have no fallback=on ({fell_back})"
            )
        };
        return (!may_fall_back).then(refused);
    }
    let (is, is_not) = if ours { (OURS, THEIRS) } else { (THEIRS, OURS) };
    let said =
        || format!("Of the URLs {is} is rdma: and {is_not} is not: both must be, or neither");
    (ours != theirs).then(said)
}

/// Why a primary is not served.
pub(super) enum Refusal {
    /// It may be later, without anybody's doing.
    Passing(String),
    /// Only if somebody changes something.
    Lasting(String),
}

impl Refusal {
    /// Tells the primary, without waiting for it; the reason.
    fn tell(self, mut writer: FrameWriter<Box<dyn Stream>>) -> String {
        let (word, reason) = match self {
            Self::Passing(reason) => (Message::Abort(reason.clone()), reason),
            Self::Lasting(reason) => (Message::Refuse(reason.clone()), reason),
        };
        // A primary that does not read its refusal has lost the connection: it learns that instead.
        let _ = word.send(&mut writer);
        writer.get_ref().finish();
        reason
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_say_rdma_or_neither() {
        let mismatch_of = |ours, theirs| mismatch(ours, theirs, "", true);
        assert_eq!((mismatch_of(true, true), mismatch_of(false, false)), (None, None));
        let refused = [mismatch_of(true, false), mismatch_of(false, true)].map(Option::unwrap);
        let both = "both must be, or neither";
        assert_eq!(
            refused[0],
            format!(
                "Of the URLs the backup's receiver_url is rdma: and the primary's destination_url is \
                 not: {both}"
            )
        );
        assert_eq!(
            refused[1],
            format!(
                "Of the URLs the primary's destination_url is rdma: and the backup's receiver_url is \
                 not: {both}"
            )
        );
    }

    #[test]
    fn falling_back_has_to_be_allowed_here_too() {
        assert_eq!(mismatch(true, false, "no device", true), None);
        let refused = mismatch(true, false, "no device", false).unwrap();
        assert!(refused.ends_with("no fallback=on (no device)"), "{refused}");
        // A receiver of tcp: takes no word for it.
        assert_eq!(mismatch(false, false, "no device", false), None);
        assert!(mismatch(false, true, "no device", true).is_some());
    }
}
