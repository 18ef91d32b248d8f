//! The messages of the control connection, and the greeting of every connection.

use std::io::{Read, Write};

use uuid::Uuid;

use super::{CONNECTIONS_MAX, FrameReader, FrameWriter, Kind, WireError};
use crate::disk::{DISKS_MAX, SECTOR_BYTES};
use crate::guest::{DESCRIPTION_BYTES_MAX, STATE_BYTES_MAX};
use crate::ids::{EpochId, Generation};
use crate::protocol::backup::Handover;

/// Most bytes of the reason of an abort or a refusal; longer ones are cut.
pub const ABORT_BYTES_MAX: usize = 4096;
/// Most bytes of what the backup is told of a switch-over's way back.
pub const RETURN_BYTES_MAX: usize = 16 << 10;
/// Most memory regions of a VM.
pub const REGIONS_MAX: usize = 4096;
/// Most pieces of memory that a backup opens: 1024, and one more for each region.
pub const GRANTS_MAX: usize = 1024 + REGIONS_MAX;
pub(super) const GRANT_BYTES: usize = 20;
pub(super) const DESCRIPTION_SLACK_BYTES: usize =
    128 + ABORT_BYTES_MAX + RETURN_BYTES_MAX + REGIONS_MAX * 16 + DISKS_MAX * 8;
pub(super) const SEAL_SLACK_BYTES: usize = 64 + CONNECTIONS_MAX as usize * 8;

/// First frame of every connection, from the primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The VM, named at its first protection.
    pub vm: Uuid,
    /// The primary's process.
    pub host: Uuid,
    /// 0 is the control connection, data connections follow, then the bell, then that of the disks.
    pub connection: u32,
    /// Number of data connections of the session.
    pub connections: u32,
}

/// A region of guest memory as the peers compare it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WireRegion {
    /// Guest physical address of the first byte.
    pub start: u64,
    pub pages: u64,
}

/// The image that a backup may have of an earlier session, and what the primary knows about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    /// The session that left it.
    pub session: u64,
    /// The generation of that session's epochs.
    pub generation: Generation,
    /// The last epoch that was acknowledged, and the last one that was sealed: the image has to be
    /// that of one from the first to the last.
    pub committed: EpochId,
    pub sealed: EpochId,
}

impl Base {
    /// Whether the primary knows in which pages an image differs that has this epoch.
    #[must_use]
    pub fn fits(&self, session: u64, generation: Generation, committed: EpochId) -> bool {
        session == self.session
            && generation == self.generation
            && (self.committed..=self.sealed).contains(&committed)
    }
}

/// What the primary brings; follows the greeting of the control connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    pub page_bytes: u32,
    pub heartbeat_ms: u32,
    pub timeout_ms: u32,
    /// Whether an arbiter decides; both sides must say the same.
    pub arbiter: bool,
    /// Whether data connections are by RDMA; both sides must say the same, unless there is a `fallback`.
    pub rdma: bool,
    /// Why data comes by TCP this time although the primary's URL is `rdma:`; empty if it does not.
    pub fallback: String,
    pub regions: Vec<WireRegion>,
    /// Sizes in bytes of the disks that are to be replicated: whole sectors.
    pub disks: Vec<u64>,
    /// What the copy could go on from, instead of from nothing.
    pub base: Option<Base>,
    /// The pair stands already, with the base as its last committed epoch: a switch-over made it of
    /// this side and its old primary, which is the backup. Nothing is copied, epochs follow at once.
    pub reversed: bool,
    /// How the backup is to protect the VM once it was handed over: the options of a primary, in JSON;
    /// empty if it is not to.
    pub way_back: String,
    /// Opaque to replication.
    pub description: Vec<u8>,
}

/// The backup accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// The backup's process.
    pub host: Uuid,
    /// Most bytes of pages of one epoch.
    pub staging_bytes: u64,
    pub heartbeat_ms: u32,
    pub timeout_ms: u32,
    /// Whether it has the offer's base: memory is copied from there on.
    pub has_base: bool,
}

/// A piece of the backup's memory that the primary's device may write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    pub pages: u64,
    /// In the backup's process.
    pub address: u64,
    pub key: u32,
}

/// What one data connection carried of an epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConnectionPart {
    pub frames: u64,
    pub pages: u64,
    /// CRC-32 over the checksums of the frames, in order.
    pub digest: u32,
}

impl ConnectionPart {
    /// Counts one more frame of `pages` pages whose checksum is `crc`.
    pub fn add(&mut self, pages: u64, crc: u32) {
        self.frames += 1;
        self.pages += pages;
        let mut hasher = crc32fast::Hasher::new_with_initial(self.digest);
        hasher.update(&crc.to_le_bytes());
        self.digest = hasher.finalize();
    }
}

/// Closes an epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seal {
    pub epoch: EpochId,
    pub generation: Generation,
    /// Whether this is the last epoch of a planned switch-over, and of which kind.
    pub handover: Handover,
    /// Pages of the epoch on each data connection.
    pub pages: Vec<u64>,
    /// Changes of disks in the epoch.
    pub changes: u64,
    /// Machine state, opaque to replication.
    pub state: Vec<u8>,
}

/// A message of the control connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    Hello(Hello),
    Offer(Offer),
    Welcome(Welcome),
    /// The sender ends the session and says why.
    Abort(String),
    /// The backup does not serve this primary, and will not as long as neither changes: why. In a session:
    /// it acknowledges neither the pair that it was told, nor the last epoch of a switch-over.
    Refuse(String),
    /// The arbiter's record says PAIR with this generation (without an arbiter: the session's).
    Paired(Generation),
    /// The primary owns the VM alone and copies anew; the replica is worthless from here on.
    Resync,
    ResyncReady,
    Seal(Seal),
    Ack {
        epoch: EpochId,
        generation: Generation,
    },
    Heartbeat,
    /// A heartbeat of a backup that says how many bytes it has taken, applied or written in all, so
    /// that one that is slow is told from one that does nothing.
    Progress(u64),
    /// Protection ends; the replica is to be discarded.
    Stop,
    StopDone,
    /// The backup owns the VM since this generation and runs it: alone, or (`reversed`) as the primary
    /// of a pair whose backup the old primary is.
    HandedOver {
        generation: Generation,
        reversed: bool,
    },
    /// The primary wants to write a copy straight into the backup's memory; numbered from 1 on.
    WindowAsk(u64),
    /// The backup has opened more of its memory for the copy of this number, in the order of its pages.
    WindowOpen {
        number: u64,
        grants: Vec<Grant>,
    },
    /// It does not open any, or any more: why. What is open stays so until `WindowEnd`.
    WindowNone {
        number: u64,
        reason: String,
    },
    /// The primary has written what it writes so, all of which has arrived.
    WindowEnd(u64),
    /// The backup's memory is its own again.
    WindowClosed(u64),
}

impl Message {
    /// The kind of frame that carries this.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Hello(_) => Kind::Hello,
            Self::Offer(_) => Kind::Offer,
            Self::Welcome(_) => Kind::Welcome,
            Self::Abort(_) => Kind::Abort,
            Self::Refuse(_) => Kind::Refuse,
            Self::Paired(_) => Kind::Paired,
            Self::Resync => Kind::Resync,
            Self::ResyncReady => Kind::ResyncReady,
            Self::Seal(_) => Kind::Seal,
            Self::Ack { .. } => Kind::Ack,
            Self::Heartbeat => Kind::Heartbeat,
            Self::Progress(_) => Kind::Progress,
            Self::Stop => Kind::Stop,
            Self::StopDone => Kind::StopDone,
            Self::HandedOver { .. } => Kind::HandedOver,
            Self::WindowAsk(_) => Kind::WindowAsk,
            Self::WindowOpen { .. } => Kind::WindowOpen,
            Self::WindowNone { .. } => Kind::WindowNone,
            Self::WindowEnd(_) => Kind::WindowEnd,
            Self::WindowClosed(_) => Kind::WindowClosed,
        }
    }

    /// Writes this as one frame.
    ///
    /// # Errors
    /// As [`FrameWriter::write`].
    pub fn send<W: Write>(&self, to: &mut FrameWriter<W>) -> Result<(), WireError> {
        let mut head = Vec::new();
        let tail = self.encode(&mut head);
        to.write(self.kind(), &[&head, tail]).map(|_| ())
    }

    /// Reads one frame. `payload` is a buffer to reuse.
    ///
    /// # Errors
    /// Any [`WireError`].
    pub fn receive<R: Read>(
        from: &mut FrameReader<R>,
        payload: &mut Vec<u8>,
    ) -> Result<Self, WireError> {
        let header = from.read(payload)?;
        Self::decode(header.kind, payload)
    }

    /// Reads one frame if it is of `kind`: of any other nothing is read but the header.
    ///
    /// # Errors
    /// [`WireError::Unexpected`] with `what` was due; any other [`WireError`].
    pub fn receive_only<R: Read>(
        kind: Kind,
        what: &'static str,
        from: &mut FrameReader<R>,
        payload: &mut Vec<u8>,
    ) -> Result<Self, WireError> {
        let header = from.begin()?;
        if header.kind != kind {
            return Err(WireError::Unexpected { found: header.kind, expected: what });
        }
        payload.clear();
        from.read_rest(payload)?;
        from.finish(&header)?;
        Self::decode(kind, payload)
    }

    /// Appends the small part to `out` and returns the large one, which follows it.
    fn encode<'a>(&'a self, out: &mut Vec<u8>) -> &'a [u8] {
        let mut tail: &[u8] = &[];
        match self {
            Self::Hello(hello) => {
                out.extend(hello.vm.as_bytes());
                out.extend(hello.host.as_bytes());
                out.extend(hello.connection.to_le_bytes());
                out.extend(hello.connections.to_le_bytes());
            }
            Self::Offer(offer) => {
                out.extend(offer.page_bytes.to_le_bytes());
                out.extend(offer.heartbeat_ms.to_le_bytes());
                out.extend(offer.timeout_ms.to_le_bytes());
                out.push(u8::from(offer.arbiter));
                out.push(u8::from(offer.rdma));
                out.push(u8::from(offer.base.is_some()));
                if let Some(base) = &offer.base {
                    out.extend(base.session.to_le_bytes());
                    out.extend(base.generation.0.to_le_bytes());
                    out.extend(base.committed.0.to_le_bytes());
                    out.extend(base.sealed.0.to_le_bytes());
                }
                out.push(u8::from(offer.reversed));
                out.extend((offer.regions.len() as u64).to_le_bytes());
                for region in &offer.regions {
                    out.extend(region.start.to_le_bytes());
                    out.extend(region.pages.to_le_bytes());
                }
                out.extend((offer.disks.len() as u64).to_le_bytes());
                offer.disks.iter().for_each(|size| out.extend(size.to_le_bytes()));
                for text in [&offer.way_back[..], cut(&offer.fallback)] {
                    out.extend((text.len() as u64).to_le_bytes());
                    out.extend(text.as_bytes());
                }
                tail = &offer.description;
            }
            Self::Welcome(welcome) => {
                out.extend(welcome.host.as_bytes());
                out.extend(welcome.staging_bytes.to_le_bytes());
                out.extend(welcome.heartbeat_ms.to_le_bytes());
                out.extend(welcome.timeout_ms.to_le_bytes());
                out.push(u8::from(welcome.has_base));
            }
            Self::Abort(reason) | Self::Refuse(reason) => tail = cut(reason).as_bytes(),
            Self::Paired(generation) => out.extend(generation.0.to_le_bytes()),
            Self::HandedOver { generation, reversed } => {
                out.extend(generation.0.to_le_bytes());
                out.push(u8::from(*reversed));
            }
            Self::Progress(number)
            | Self::WindowAsk(number)
            | Self::WindowEnd(number)
            | Self::WindowClosed(number) => out.extend(number.to_le_bytes()),
            Self::WindowOpen { number, grants } => {
                out.extend(number.to_le_bytes());
                out.extend((grants.len() as u64).to_le_bytes());
                for grant in grants {
                    out.extend(grant.pages.to_le_bytes());
                    out.extend(grant.address.to_le_bytes());
                    out.extend(grant.key.to_le_bytes());
                }
            }
            Self::WindowNone { number, reason } => {
                out.extend(number.to_le_bytes());
                tail = cut(reason).as_bytes();
            }
            Self::Seal(seal) => {
                out.extend(seal.epoch.0.to_le_bytes());
                out.extend(seal.generation.0.to_le_bytes());
                out.push(handover_code(seal.handover));
                out.extend((seal.pages.len() as u64).to_le_bytes());
                seal.pages.iter().for_each(|pages| out.extend(pages.to_le_bytes()));
                out.extend(seal.changes.to_le_bytes());
                tail = &seal.state;
            }
            Self::Ack { epoch, generation } => {
                out.extend(epoch.0.to_le_bytes());
                out.extend(generation.0.to_le_bytes());
            }
            Self::Resync | Self::ResyncReady | Self::Heartbeat | Self::Stop | Self::StopDone => {}
        }
        tail
    }

    /// [`Message::receive`] without the frame.
    ///
    /// # Errors
    /// [`WireError::Malformed`] and [`WireError::Unexpected`].
    #[cfg(feature = "fuzzing")]
    pub fn from_payload(kind: Kind, payload: &[u8]) -> Result<Self, WireError> {
        Self::decode(kind, payload)
    }

    /// The message in a payload whose checksum was good.
    pub(super) fn decode(kind: Kind, payload: &[u8]) -> Result<Self, WireError> {
        let mut from = Fields { kind, rest: payload };
        let message = match kind {
            Kind::Hello => Self::Hello(decode_hello(&mut from)?),
            Kind::Offer => Self::Offer(decode_offer(&mut from)?),
            Kind::Welcome => Self::Welcome(Welcome {
                host: from.uuid()?,
                staging_bytes: from.u64()?,
                heartbeat_ms: from.u32()?,
                timeout_ms: from.u32()?,
                has_base: from.flag()?,
            }),
            Kind::Abort => Self::Abort(from.text()),
            Kind::Refuse => Self::Refuse(from.text()),
            Kind::Paired => Self::Paired(Generation(from.u64()?)),
            Kind::HandedOver => {
                Self::HandedOver { generation: Generation(from.u64()?), reversed: from.flag()? }
            }
            Kind::Seal => Self::Seal(decode_seal(&mut from)?),
            Kind::Ack => {
                Self::Ack { epoch: EpochId(from.u64()?), generation: Generation(from.u64()?) }
            }
            Kind::Resync => Self::Resync,
            Kind::ResyncReady => Self::ResyncReady,
            Kind::Heartbeat => Self::Heartbeat,
            Kind::Progress => Self::Progress(from.u64()?),
            Kind::Stop => Self::Stop,
            Kind::StopDone => Self::StopDone,
            Kind::WindowAsk => Self::WindowAsk(from.u64()?),
            Kind::WindowOpen => {
                Self::WindowOpen { number: from.u64()?, grants: decode_grants(&mut from)? }
            }
            Kind::WindowNone => Self::WindowNone { number: from.u64()?, reason: from.text() },
            Kind::WindowEnd => Self::WindowEnd(from.u64()?),
            Kind::WindowClosed => Self::WindowClosed(from.u64()?),
            Kind::Pages | Kind::End | Kind::Change | Kind::Verbs | Kind::Sums => {
                return Err(WireError::Unexpected { found: kind, expected: "a control message" });
            }
        };
        from.end()?;
        Ok(message)
    }
}

fn decode_hello(from: &mut Fields<'_>) -> Result<Hello, WireError> {
    let hello = Hello {
        vm: from.uuid()?,
        host: from.uuid()?,
        connection: from.u32()?,
        connections: from.u32()?,
    };
    if hello.connections == 0
        || hello.connections > CONNECTIONS_MAX
        || hello.connection > hello.connections + 2
    {
        return from.malformed("connection number");
    }
    Ok(hello)
}

fn decode_offer(from: &mut Fields<'_>) -> Result<Offer, WireError> {
    let page_bytes = from.u32()?;
    let heartbeat_ms = from.u32()?;
    let timeout_ms = from.u32()?;
    let arbiter = from.flag()?;
    let rdma = from.flag()?;
    let base = if from.flag()? { Some(decode_base(from)?) } else { None };
    let reversed = from.flag()?;
    if reversed && base.is_none() {
        return from.malformed("reversed pair without its epoch");
    }
    let count = from.count(REGIONS_MAX)?;
    let mut regions = Vec::with_capacity(count);
    for _ in 0..count {
        regions.push(WireRegion { start: from.u64()?, pages: from.u64()? });
    }
    let count = from.count(DISKS_MAX)?;
    let mut disks = Vec::with_capacity(count);
    for _ in 0..count {
        disks.push(from.u64()?);
    }
    if disks.iter().any(|size| !size.is_multiple_of(SECTOR_BYTES)) {
        return from.malformed("size of a disk");
    }
    let way_back = from.short_text(RETURN_BYTES_MAX)?;
    let fallback = from.short_text(ABORT_BYTES_MAX)?;
    let description = std::mem::take(&mut from.rest);
    if description.len() > DESCRIPTION_BYTES_MAX {
        return from.malformed("description too long");
    }
    let description = description.to_vec();
    Ok(Offer {
        page_bytes,
        heartbeat_ms,
        timeout_ms,
        arbiter,
        rdma,
        fallback,
        base,
        reversed,
        regions,
        disks,
        way_back,
        description,
    })
}

fn decode_grants(from: &mut Fields<'_>) -> Result<Vec<Grant>, WireError> {
    let count = from.count(GRANTS_MAX)?;
    let mut grants = Vec::with_capacity(count);
    for _ in 0..count {
        grants.push(Grant { pages: from.u64()?, address: from.u64()?, key: from.u32()? });
    }
    Ok(grants)
}

fn decode_base(from: &mut Fields<'_>) -> Result<Base, WireError> {
    let base = Base {
        session: from.u64()?,
        generation: Generation(from.u64()?),
        committed: EpochId(from.u64()?),
        sealed: EpochId(from.u64()?),
    };
    if base.committed.0 == 0 || base.committed > base.sealed {
        return from.malformed("epochs of a base");
    }
    Ok(base)
}

fn handover_code(handover: Handover) -> u8 {
    match handover {
        Handover::No => 0,
        Handover::Leave => 1,
        Handover::Reverse => 2,
    }
}

fn decode_seal(from: &mut Fields<'_>) -> Result<Seal, WireError> {
    let epoch = EpochId(from.u64()?);
    let generation = Generation(from.u64()?);
    let handover = match from.take::<1>()? {
        [0] => Handover::No,
        [1] => Handover::Leave,
        [2] => Handover::Reverse,
        _ => return from.malformed("kind of a switch-over"),
    };
    let count = from.count(CONNECTIONS_MAX as usize)?;
    let mut pages = Vec::with_capacity(count);
    for _ in 0..count {
        pages.push(from.u64()?);
    }
    let changes = from.u64()?;
    let state = std::mem::take(&mut from.rest);
    if state.len() > STATE_BYTES_MAX {
        return from.malformed("state too long");
    }
    Ok(Seal { epoch, generation, handover, pages, changes, state: state.to_vec() })
}

/// Cuts a reason to the cap, at a character.
fn cut(reason: &str) -> &str {
    let mut end = reason.len().min(ABORT_BYTES_MAX);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    &reason[..end]
}

/// Takes fields off a payload; every method fails rather than reading past the end.
pub(super) struct Fields<'a> {
    pub(super) kind: Kind,
    pub(super) rest: &'a [u8],
}

impl Fields<'_> {
    pub(super) fn malformed<T>(&self, what: &'static str) -> Result<T, WireError> {
        Err(WireError::Malformed { kind: self.kind, what })
    }

    pub(super) fn take<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        match self.rest.split_first_chunk::<N>() {
            Some((field, rest)) => {
                self.rest = rest;
                Ok(*field)
            }
            None => self.malformed("too short"),
        }
    }

    fn flag(&mut self) -> Result<bool, WireError> {
        match self.take::<1>()? {
            [0] => Ok(false),
            [1] => Ok(true),
            _ => self.malformed("flag"),
        }
    }

    pub(super) fn u32(&mut self) -> Result<u32, WireError> {
        self.take().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, WireError> {
        self.take().map(u64::from_le_bytes)
    }

    fn count(&mut self, most: usize) -> Result<usize, WireError> {
        let count = self.u64()?;
        match usize::try_from(count) {
            Ok(count) if count <= most => Ok(count),
            _ => self.malformed("count"),
        }
    }

    /// A text with its length before it.
    fn short_text(&mut self, most: usize) -> Result<String, WireError> {
        let count = self.count(most)?;
        let Some((text, rest)) = self.rest.split_at_checked(count) else {
            return self.malformed("too short");
        };
        self.rest = rest;
        match String::from_utf8(text.to_vec()) {
            Ok(text) => Ok(text),
            Err(_) => self.malformed("text"),
        }
    }

    /// All that is left, for people to read.
    fn text(&mut self) -> String {
        String::from_utf8_lossy(std::mem::take(&mut self.rest)).into_owned()
    }

    fn uuid(&mut self) -> Result<Uuid, WireError> {
        self.take().map(Uuid::from_bytes)
    }

    pub(super) fn end(&self) -> Result<(), WireError> {
        if self.rest.is_empty() { Ok(()) } else { self.malformed("bytes left over") }
    }
}
