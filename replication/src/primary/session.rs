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

use std::io;
use std::time::Duration;

use api::replication::ReplicateData;
use uuid::Uuid;

use crate::disk::DISKS_MAX;
use crate::engine::control::Greeted;
use crate::error::Error;
use crate::guest::{DESCRIPTION_BYTES_MAX, Guest};
use crate::ids::PAGE_SIZE;
use crate::ownership::{HostId, HostIdentity};
use crate::ram::Ram;
use crate::transport::{Address, Stream, connect, rdma};
use crate::wire::{
    FrameReader, FrameWriter, Hello, Message, Offer, REGIONS_MAX, SessionId, Welcome, WireError,
    WireRegion,
};

/// Shortest wait for a sign of the backup. While it builds the machine, and memory of hundreds of
/// GiB takes its time, its heart beats, so the wait is for one beat.
const SIGN_WAIT_MIN: Duration = Duration::from_secs(1);

/// What was agreed, and the connections.
pub(super) struct Session {
    pub(super) control: Greeted,
    pub(super) data: Vec<FrameWriter<Box<dyn Stream>>>,
    pub(super) disks: Option<FrameWriter<Box<dyn Stream>>>,
    pub(super) backup: HostId,
    pub(super) welcome: Welcome,
}

/// The memory's layout as the peers compare it.
pub(crate) fn layout(ram: &Ram) -> Vec<WireRegion> {
    let regions = ram.regions().iter();
    regions.map(|region| WireRegion { start: region.start.0, pages: region.pages }).collect()
}

/// Connects, offers the guest, and waits for the backup's word.
pub(super) fn open(
    guest: &mut impl Guest,
    address: &Address,
    options: &ReplicateData,
    identity: HostIdentity,
) -> Result<Session, Error> {
    let timeout = Duration::from_millis(options.timeout_ms);
    let offer = offer(guest, options)?;
    let has_disks = !offer.disks.is_empty();
    let stream = connect(address, timeout).map_err(Error::Transport)?;
    let (session, _) = Uuid::new_v4().as_u64_pair();
    let session = SessionId(session);
    let hello = |connection| {
        let HostIdentity { host, vm } = identity;
        let connections = options.connections;
        Message::Hello(Hello { vm: vm.0, host: host.0, connection, connections })
    };
    let io = |error| Error::Wire(WireError::Io(error));
    let patience = timeout.max(SIGN_WAIT_MIN);
    stream.set_read_timeout(Some(patience)).map_err(io)?;
    let reader = FrameReader::new(stream.duplicate().map_err(io)?, Some(session));
    let mut control = Greeted { reader, writer: FrameWriter::new(stream, session) };
    // A backup that refuses may close before it has read all: its reason is worth more than the
    // failure to write.
    let written = hello(0)
        .send(&mut control.writer)
        .and_then(|()| Message::Offer(offer).send(&mut control.writer));
    let welcome = match first_word(&mut control.reader) {
        Ok(Message::Welcome(welcome)) => welcome,
        Ok(Message::Abort(reason)) => return Err(Error::Refused(reason)),
        Ok(other) => {
            let found = other.kind();
            return Err(Error::Wire(WireError::Unexpected { found, expected: "a welcome" }));
        }
        Err(WireError::Io(error)) if is_late(&error) => {
            let silent_ms = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
            return Err(Error::Silent { silent_ms });
        }
        Err(error) => return Err(Error::Wire(written.err().unwrap_or(error))),
    };
    written.map_err(Error::Wire)?;
    let further = |connection| {
        let stream = connect(address, timeout).map_err(Error::Transport)?;
        let mut writer = FrameWriter::new(stream, session);
        hello(connection).send(&mut writer).map_err(Error::Wire)?;
        Ok(writer)
    };
    let by_rdma = matches!(address, Address::Rdma { .. });
    let carries = |writer| {
        if by_rdma { rdma::write_by(writer, timeout).map_err(Error::Wire) } else { Ok(writer) }
    };
    let data = (1..=options.connections).map(|number| further(number).and_then(carries));
    let data = data.collect::<Result<_, Error>>()?;
    let disks = has_disks.then(|| further(options.connections + 2)).transpose()?;
    let bell = hello(options.connections + 1);
    super::bell::start(address.clone(), session, bell, timeout);
    Ok(Session { control, data, disks, backup: HostId(welcome.host), welcome })
}

fn is_late(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// The first message that is no heartbeat: a backup that builds the machine proves its life.
fn first_word(reader: &mut FrameReader<Box<dyn Stream>>) -> Result<Message, WireError> {
    let mut payload = Vec::new();
    loop {
        match Message::receive(reader, &mut payload)? {
            Message::Heartbeat | Message::Progress(_) => {}
            word => return Ok(word),
        }
    }
}

fn offer(guest: &mut impl Guest, options: &ReplicateData) -> Result<Offer, Error> {
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
    Ok(Offer {
        page_bytes: u32::try_from(PAGE_SIZE).expect("a page is small"),
        heartbeat_ms: ms(options.heartbeat_ms),
        timeout_ms: ms(options.timeout_ms),
        arbiter: options.arbiter.is_some(),
        regions,
        disks,
        description,
    })
}
