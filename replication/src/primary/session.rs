//! From an address to a session that the backup accepted.
//!
//! ```text
//! primary                          backup
//!   control: Hello(0), Offer  ->
//!                             <-   Welcome, or Abort with the reason
//!   data n:  Hello(n)         ->   (n = 1 ... connections)
//!   bell:    Hello(n + 1)     ->   (its end says that the primary's process died)
//!   disks:   Hello(n + 2)     ->   (if there are any)
//! ```

use std::time::{Duration, Instant};

use api::replication::{ReplicateData, TIMEOUT_MS_MAX};
use crossbeam_channel::{RecvTimeoutError, bounded, unbounded};
use uuid::Uuid;

use super::patience::WORD_TIMEOUTS;
use crate::disk::DISKS_MAX;
use crate::engine::control::Greeted;
use crate::engine::spawn;
use crate::error::Error;
use crate::guest::{DESCRIPTION_BYTES_MAX, Guest};
use crate::ids::PAGE_SIZE;
use crate::ownership::{HostId, HostIdentity};
use crate::ram::Ram;
use crate::transport::{Destination, Stream, Timed, TransportError, is_late, rdma};
use crate::wire::{
    Base, FrameReader, FrameWriter, Hello, Message, Offer, REGIONS_MAX, RETURN_BYTES_MAX,
    SessionId, Welcome, WireError, WireRegion,
};

/// Shortest wait for a sign of the backup. While it builds the machine, and memory of hundreds of
/// GiB takes its time, its heart beats, so the wait is for one beat.
const SIGN_WAIT_MIN: Duration = Duration::from_secs(1);

/// The least of the machine's memory that a backup makes in a second. Its heart is heard for so much longer than
/// a word counts.
const BUILD_BYTES_S_MIN: u64 = 256 << 20;

/// What was agreed, and the connections.
pub(super) struct Session {
    pub(super) id: SessionId,
    pub(super) control: Greeted,
    pub(super) data: Vec<FrameWriter<Box<dyn Stream>>>,
    pub(super) disks: Option<FrameWriter<Box<dyn Stream>>>,
    /// With RDMA.
    pub(super) lender: Option<rdma::Lender>,
    pub(super) backup: HostId,
    pub(super) welcome: Welcome,
}

/// The memory's layout as the peers compare it.
pub(crate) fn layout(ram: &Ram) -> Vec<WireRegion> {
    let regions = ram.regions().iter();
    regions.map(|region| WireRegion { start: region.start.0, pages: region.pages }).collect()
}

/// Makes the connections beside the control connection.
#[derive(Clone)]
struct Caller {
    destination: Destination,
    session: SessionId,
    identity: HostIdentity,
    connections: u32,
    timeout: Duration,
}

impl Caller {
    fn hello(&self, connection: u32) -> Message {
        let HostIdentity { host, vm } = self.identity;
        let connections = self.connections;
        Message::Hello(Hello { vm: vm.0, host: host.0, connection, connections })
    }

    fn connect(&self, connection: u32) -> Result<FrameWriter<Box<dyn Stream>>, Error> {
        let stream = self.destination.connect(self.timeout).map_err(Error::Transport)?;
        let mut writer = FrameWriter::new(stream, self.session);
        self.hello(connection).send(&mut writer).map_err(Error::Wire)?;
        Ok(writer)
    }

    /// `asks` is called before the device is.
    fn connect_data(
        &self,
        connection: u32,
        adapter: Option<&rdma::Adapter>,
        asks: impl FnOnce(),
    ) -> Result<FrameWriter<Box<dyn Stream>>, Error> {
        let writer = self.connect(connection)?;
        let Some(adapter) = adapter else { return Ok(writer) };
        asks();
        adapter.write_by(writer).map_err(|error| match error {
            rdma::SetupError::Device(error) => Error::Transport(error),
            rdma::SetupError::Wire(error) => Error::Wire(error),
        })
    }
}

/// Connects, makes the offer, and waits for the backup's word. `adapter` makes what asks the device,
/// with the patience of both sides: the longer of their time-outs.
pub(super) fn open(
    offer: Offer,
    destination: &Destination,
    options: &ReplicateData,
    identity: HostIdentity,
    adapter: Option<impl FnOnce(Duration) -> rdma::Adapter>,
) -> Result<Session, Error> {
    let timeout = Duration::from_millis(options.timeout_ms);
    let has_disks = !offer.disks.is_empty();
    let stream = destination.connect(timeout).map_err(Error::Transport)?;
    let (session, _) = Uuid::new_v4().as_u64_pair();
    let session = SessionId(session);
    let connections = options.connections;
    let destination = destination.clone();
    let caller = Caller { destination, session, identity, connections, timeout };
    let io = |error| Error::Wire(WireError::Io(error));
    let patience = timeout.max(SIGN_WAIT_MIN);
    let limit = timeout * WORD_TIMEOUTS + building(&offer);
    let until = Instant::now() + limit;
    let timed = Timed { stream: stream.duplicate().map_err(io)?, until, each: patience };
    let mut reader = FrameReader::new(timed, Some(session));
    let mut writer = FrameWriter::new(stream, session);
    // A backup that refuses may close before it has read all: its reason is worth more than the
    // failure to write.
    let written =
        caller.hello(0).send(&mut writer).and_then(|()| Message::Offer(offer).send(&mut writer));
    let welcome = match first_word(&mut reader) {
        Ok(Message::Welcome(welcome)) => welcome,
        Ok(Message::Abort(reason)) => return Err(Error::Refused(reason)),
        Ok(Message::Refuse(reason)) => return Err(Error::Unfit(reason)),
        Ok(other) => {
            let found = other.kind();
            return Err(Error::Wire(WireError::Unexpected { found, expected: "a welcome" }));
        }
        Err(WireError::Io(error)) if is_late(&error) && Instant::now() >= until => {
            let seconds = limit.as_secs_f32();
            return Err(Error::Failed(format!(
                "The backup lives, and neither takes nor refuses the VM within {seconds:.1} s"
            )));
        }
        Err(WireError::Io(error)) if is_late(&error) => {
            let silent_ms = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
            return Err(Error::Silent { silent_ms });
        }
        Err(error @ WireError::Tls) => return Err(Error::Wire(error)),
        Err(error) => return Err(Error::Wire(written.err().unwrap_or(error))),
    };
    written.map_err(Error::Wire)?;
    let heartbeat = Duration::from_millis(options.heartbeat_ms);
    let theirs = u64::from(welcome.timeout_ms).min(TIMEOUT_MS_MAX);
    let agreed = timeout.max(Duration::from_millis(theirs));
    let adapter = adapter.map(|make| make(agreed));
    let lender = adapter.clone().map(rdma::Adapter::lender);
    let falls_back = adapter.is_some() && options.fallback;
    let data =
        data_connections(&caller, adapter, heartbeat, &mut writer).map_err(
            |error| match explained(error, (&mut reader, &mut writer), patience) {
                error if falls_back && is_of_rdma(&error) => Error::NoRdma(Box::new(error)),
                error => error,
            },
        )?;
    let disks = has_disks.then(|| caller.connect(connections + 2)).transpose()?;
    let bell = caller.hello(connections + 1);
    super::bell::start(caller.destination, session, bell, timeout);
    let control = Greeted { reader: reader.map(|timed| timed.stream), writer };
    Ok(Session { id: session, control, data, disks, lender, backup: HostId(welcome.host), welcome })
}

/// Makes the data connections beside the engine, whose heart beats meanwhile: there may be many, and a
/// device may hang. What it has when it is given up is dropped there, since that may hang as well.
fn data_connections(
    caller: &Caller,
    adapter: Option<rdma::Adapter>,
    heartbeat: Duration,
    control: &mut FrameWriter<Box<dyn Stream>>,
) -> Result<Vec<FrameWriter<Box<dyn Stream>>>, Error> {
    let patience = adapter.as_ref().map(rdma::Adapter::write_patience);
    // When a connection asks the device is told, and when it is made; all of them change hands at once,
    // and only if somebody takes them.
    let (tell, told) = unbounded();
    let (give, take) = bounded(0);
    let caller = caller.clone();
    spawn("repl-setup", None, move || {
        let each = (1..=caller.connections).map(|number| {
            let asks = || {
                let _ = tell.send(true);
            };
            let made = caller.connect_data(number, adapter.as_ref(), asks);
            // Nobody listens: the next one is in vain.
            made.and_then(|made| tell.send(false).map(|()| made).map_err(|_| given_up()))
        });
        let all = each.collect::<Result<Vec<_>, Error>>();
        drop(give.send(all));
    })?;
    // Since when the device has been asked. What TCP takes has its own limits.
    let mut asked = None;
    loop {
        // A connection that fails is noticed by who makes the others.
        let _ = Message::Heartbeat.send(control);
        match take.recv_timeout(heartbeat) {
            Ok(all) => return all,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Err(given_up()),
        }
        if let Some(asks) = told.try_iter().last() {
            asked = asks.then(Instant::now);
        }
        if let (Some(asked), Some(patience)) = (asked, patience)
            && asked.elapsed() > patience
        {
            let patience_ms = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
            return Err(Error::Transport(TransportError::Hung { patience_ms }));
        }
    }
}

fn given_up() -> Error {
    Error::Failed("The data connections were given up".to_owned())
}

/// Whether this host's own RDMA device is the reason.
fn is_of_device(error: &Error) -> bool {
    use TransportError::{Hung, Rdma, Stuck};
    matches!(error, Error::Transport(Rdma(_) | Hung { .. } | Stuck { .. }))
}

/// Whether data might go by TCP to a backup where it did not come to go by RDMA: the device of either side
/// is the reason, or what lies between them.
fn is_of_rdma(error: &Error) -> bool {
    let is_silent = matches!(error, Error::Wire(WireError::Io(error)) if is_late(error));
    is_of_device(error) || is_silent || matches!(error, Error::Refused(_))
}

/// Why the data connections were not made: this side's reason is told to the backup; else the backup's own counts
/// for more than a connection that it closed, and is on its way or comes soon.
fn explained(
    error: Error,
    (reader, writer): (&mut FrameReader<Timed>, &mut FrameWriter<Box<dyn Stream>>),
    patience: Duration,
) -> Error {
    if is_of_device(&error) {
        // A backup that is gone needs no reason.
        let _ = Message::Abort(error.chain()).send(writer);
        return error;
    }
    reader.get_mut().until = Instant::now() + patience;
    let mut payload = Vec::new();
    loop {
        match Message::receive(reader, &mut payload) {
            Ok(Message::Abort(reason)) => return Error::Refused(reason),
            Ok(Message::Heartbeat | Message::Progress(_)) => {}
            _ => return error,
        }
    }
}

/// How long a backup may take to build the machine, beside all else.
fn building(offer: &Offer) -> Duration {
    let pages = offer.regions.iter().fold(0, |sum: u64, region| sum.saturating_add(region.pages));
    Duration::from_secs(pages.saturating_mul(PAGE_SIZE as u64) / BUILD_BYTES_S_MIN)
}

/// The first message that is no heartbeat: a backup that builds the machine proves its life.
fn first_word(reader: &mut FrameReader<Timed>) -> Result<Message, WireError> {
    let mut payload = Vec::new();
    loop {
        match Message::receive(reader, &mut payload)? {
            Message::Heartbeat | Message::Progress(_) => {}
            word => return Ok(word),
        }
    }
}

/// What the backup is told of the guest.
pub(super) fn offer(
    guest: &mut impl Guest,
    options: &ReplicateData,
    (rdma, fallback): (bool, Option<&str>),
    base: Option<Base>,
    reversed: bool,
) -> Result<Offer, Error> {
    let description =
        guest.describe().map_err(|source| Error::Guest { what: "describe the VM", source })?;
    if description.len() > DESCRIPTION_BYTES_MAX {
        let bytes = description.len();
        return Err(Error::Failed(format!("The VM's description has {bytes} bytes, too many")));
    }
    let regions = layout(&guest.ram());
    if regions.len() > REGIONS_MAX {
        return Err(Error::Memory(format!("{} regions are too many", regions.len())));
    }
    let disks = guest.disks().map(|disks| disks.sizes_bytes()).unwrap_or_default();
    if disks.len() > DISKS_MAX {
        return Err(Error::Failed(format!("{} disks are too many", disks.len())));
    }
    let ms = |ms: u64| u32::try_from(ms).unwrap_or(u32::MAX);
    let way_back = way_back(options)?;
    Ok(Offer {
        page_bytes: u32::try_from(PAGE_SIZE).expect("a page is small"),
        heartbeat_ms: ms(options.heartbeat_ms),
        timeout_ms: ms(options.timeout_ms),
        arbiter: options.arbiter.is_some(),
        rdma,
        fallback: fallback.unwrap_or_default().to_owned(),
        base,
        reversed,
        regions,
        disks,
        way_back,
        description,
    })
}

/// How the backup protects the VM after a switch-over: as this host does, the other way round.
fn way_back(options: &ReplicateData) -> Result<String, Error> {
    let Some(return_url) = &options.return_url else { return Ok(String::new()) };
    let back = ReplicateData {
        destination_url: return_url.clone(),
        return_url: Some(options.destination_url.clone()),
        // Files of this host are nobody else's.
        arbiter_tls_dir: None,
        arbiter_credentials: None,
        tls_dir: None,
        ..options.clone()
    };
    let invalid = |reason: String| Error::Option { option: "return_url", reason };
    let text = serde_json::to_string(&back).map_err(|error| invalid(error.to_string()))?;
    if text.len() > RETURN_BYTES_MAX {
        return Err(invalid(format!("the options have {} bytes, too many", text.len())));
    }
    Ok(text)
}
