//! The stream between primary and backup: frames of any kind with any payload, and what a broken
//! line makes of them.
//!
//! Beside "no panic": frames that are whole are read as they were written; what decodes is encoded
//! and decoded again to the same; what is within the limits is taken and what is not is refused; no
//! length makes the reader take memory that no byte came for.

use api::replication::RDMA_DEPTH;
use arbitrary::Arbitrary;
use replication::disk::{CHANGE_BYTES_MAX, DISKS_MAX, Operation, SECTOR_BYTES};
use replication::encode::{delta, lz4};
use replication::ids::{EpochId, Generation, PAGE_SIZE, PageIndex};
use replication::protocol::backup::Handover;
use replication::wire::{
    Base, CHANGE_HEAD_BYTES, CONNECTIONS_MAX, ChangeHead, Encoding, End, FrameReader, FrameWriter,
    HEADER_BYTES, Kind, MAGIC, Message, Offer, PagesHeader, RAW_PAGES_MAX, RETURN_BYTES_MAX,
    RUNS_MAX, Run, Runs, SUM_GROUPS_MAX, Seal, SessionId, VERSION, Verbs, WireError, WireRegion,
    decode_pages_header, decode_sums, encode_pages_header, encode_sums, staged_bytes, unpack,
};

use crate::guest::{Blob, Rest};
use crate::reach::reached;

/// Frames whose payload was taken.
pub const PLACES: &[&str] = &[
    "wire: Hello",
    "wire: Offer with regions and disks",
    "wire: Welcome",
    "wire: Abort",
    "wire: Seal with pages and a state",
    "wire: Ack",
    "wire: an empty message",
    "wire: Paired or HandedOver",
    "wire: Pages",
    "wire: contents of a delta",
    "wire: contents of an LZ4 block",
    "wire: End",
    "wire: Change",
    "wire: Progress",
    "wire: Refuse",
    "wire: WindowOpen",
    "wire: WindowNone",
    "wire: Sums",
    "wire: Verbs",
    "wire: three frames read, then a broken one",
    "wire: a length within its cap",
    "wire: a length past its cap",
];

const KINDS: [Kind; 25] = [
    Kind::Hello,
    Kind::Offer,
    Kind::Welcome,
    Kind::Abort,
    Kind::Paired,
    Kind::Resync,
    Kind::ResyncReady,
    Kind::Seal,
    Kind::Ack,
    Kind::Heartbeat,
    Kind::Stop,
    Kind::StopDone,
    Kind::HandedOver,
    Kind::Pages,
    Kind::End,
    Kind::Change,
    Kind::Progress,
    Kind::Refuse,
    Kind::WindowAsk,
    Kind::WindowOpen,
    Kind::WindowNone,
    Kind::WindowEnd,
    Kind::WindowClosed,
    Kind::Sums,
    Kind::Verbs,
];
/// Sizes of the disks that changes are for.
const DISKS: [u64; 2] = [1 << 20, SECTOR_BYTES];

#[derive(Arbitrary, Debug)]
pub enum Input {
    /// Good frames, and then something happens to their bytes.
    Frames { session: u64, changes: Vec<(u16, u8)>, cut: Option<u16>, frames: Rest<Frame> },
    /// A header alone, whose length is about the cap of its kind.
    Header { kind: u8, below: u8, above: u32 },
    /// Bytes of nobody.
    Bytes(Rest<u8>),
}

#[derive(Arbitrary, Debug)]
pub struct Frame {
    body: Body,
    /// Pages of the memory.
    universe: u16,
    /// What happens to the payload before its checksum is made.
    dents: Vec<(u16, u8)>,
}

/// Payloads that are right but for their numbers, and some that are nothing.
#[derive(Arbitrary, Debug)]
enum Body {
    Bytes {
        kind: u8,
        payload: Blob,
    },
    Hello {
        ids: [u8; 32],
        connection: u8,
        connections: u8,
    },
    Offer {
        arbiter: bool,
        rdma: bool,
        base: Option<[u64; 4]>,
        reversed: bool,
        way_back: String,
        regions: Vec<(u64, u32)>,
        disks: Vec<(u8, u32)>,
        text: Blob,
    },
    Seal {
        numbers: [u64; 3],
        handover: u8,
        pages: Vec<u64>,
        state: Blob,
    },
    /// Some runs end about the end of the memory; the second number is of the encoding.
    Pages {
        epoch: u64,
        runs: Vec<(u16, u8, u8, bool)>,
    },
    /// Whole frames of pages that changed a little.
    Contents {
        epoch: u8,
        pages: Vec<(u16, u8, PageChange)>,
    },
    /// Groups ascend but for one in eight.
    Sums {
        groups: Vec<(u8, u64)>,
    },
    Verbs {
        endpoint: [u8; 29],
        ring: [u8; 16],
        chunks: u16,
    },
    Change {
        epoch: u64,
        disk: u8,
        operation: u8,
        sectors: [u16; 2],
        odd: u8,
        data: u8,
    },
}

/// What makes a page of one whose bytes are all the same, and of which encoding it becomes.
#[derive(Arbitrary, Debug)]
struct PageChange {
    encoding: u8,
    bytes: Vec<(u16, u8)>,
}

/// A payload, and whether it is to be taken as long as nobody touches it.
struct Payload {
    kind: Kind,
    bytes: Vec<u8>,
    good: Option<bool>,
}

impl Payload {
    fn of(message: &Message, good: bool) -> Self {
        let mut writer = FrameWriter::new(Vec::new(), SessionId(1));
        message.send(&mut writer).expect("less than the cap");
        let bytes = writer.get_ref()[HEADER_BYTES..].to_vec();
        Self { kind: message.kind(), bytes, good: Some(good) }
    }
}

impl Frame {
    fn payload(&self) -> Payload {
        let mut payload = self.body.payload(self.universe.into());
        for (at, value) in &self.dents {
            if let Some(byte) = payload.bytes.get_mut(usize::from(*at)) {
                *byte ^= value;
                payload.good = None;
            }
        }
        payload
    }
}

impl Body {
    fn payload(&self, universe: u64) -> Payload {
        match self {
            Self::Bytes { kind, payload } => {
                let kind = KINDS[usize::from(*kind) % KINDS.len()];
                Payload { kind, bytes: payload.0.clone(), good: None }
            }
            Self::Hello { ids, connection, connections } => {
                let numbers = [u32::from(*connection), u32::from(*connections)];
                let mut bytes = ids.to_vec();
                numbers.iter().for_each(|number| bytes.extend(number.to_le_bytes()));
                let known = (1..=CONNECTIONS_MAX).contains(&numbers[1]);
                // The control connection, those for data, the bell, the disks'.
                let good = known && numbers[0] <= numbers[1] + 2;
                Payload { kind: Kind::Hello, bytes, good: Some(good) }
            }
            Self::Offer { arbiter, rdma, base, reversed, way_back, regions, disks, text } => {
                let size = |(odd, sectors): &(u8, u32)| {
                    u64::from(*sectors) * SECTOR_BYTES + u64::from(odd.is_multiple_of(8))
                };
                let good =
                    disks.len() <= DISKS_MAX && disks.iter().all(|(odd, _)| !odd.is_multiple_of(8));
                let has_epochs =
                    |[_, _, committed, sealed]: &[u64; 4]| *committed > 0 && committed <= sealed;
                let good = good && way_back.len() <= RETURN_BYTES_MAX;
                let good = good && base.as_ref().map_or(!reversed, has_epochs);
                let base = base.map(|[session, generation, committed, sealed]| Base {
                    session,
                    generation: Generation(generation),
                    committed: EpochId(committed),
                    sealed: EpochId(sealed),
                });
                let region = |(start, pages): &(u64, u32)| WireRegion {
                    start: *start,
                    pages: u64::from(*pages),
                };
                let offer = Offer {
                    page_bytes: 4096,
                    heartbeat_ms: 1,
                    timeout_ms: 2,
                    arbiter: *arbiter,
                    rdma: *rdma,
                    base,
                    reversed: *reversed,
                    way_back: way_back.clone(),
                    fallback: String::new(),
                    regions: regions.iter().map(region).collect(),
                    disks: disks.iter().map(size).collect(),
                    description: text.0.clone(),
                };
                Payload::of(&Message::Offer(offer), good)
            }
            Self::Seal { numbers: [epoch, generation, changes], handover, pages, state } => {
                let good = u32::try_from(pages.len()).is_ok_and(|count| count <= CONNECTIONS_MAX);
                let seal = Seal {
                    epoch: EpochId(*epoch),
                    generation: Generation(*generation),
                    handover: match handover % 3 {
                        0 => Handover::No,
                        1 => Handover::Leave,
                        _ => Handover::Reverse,
                    },
                    pages: pages.clone(),
                    changes: *changes,
                    state: state.0.clone(),
                };
                Payload::of(&Message::Seal(seal), good)
            }
            Self::Pages { epoch, runs } => {
                let run = |(first, count, encoding, last): &(u16, u8, u8, bool)| {
                    let (before, past) = (u64::from(*first % 64), u64::from(*count % 4));
                    // One in nine is of an encoding that there is not.
                    let encoding = u32::from(*encoding % 9 / 2);
                    if *last {
                        // Ends two pages before the end of the memory up to one past it.
                        let count = (before + past).saturating_sub(2);
                        (universe.saturating_sub(before), count, encoding)
                    } else {
                        ((*first).into(), (*count).into(), encoding)
                    }
                };
                pages_payload(*epoch, &runs.iter().map(run).collect::<Vec<_>>(), universe)
            }
            Self::Contents { epoch, pages } => contents_payload(*epoch, pages, universe),
            Self::Sums { groups } => sums_payload(groups, universe),
            Self::Verbs { endpoint, ring, chunks } => {
                let chunks = u32::from(*chunks);
                let bytes = [&endpoint[..], &chunks.to_le_bytes(), ring].concat();
                Payload { kind: Kind::Verbs, bytes, good: Some(RDMA_DEPTH.contains(&chunks)) }
            }
            Self::Change { .. } => self.change(),
        }
    }

    fn change(&self) -> Payload {
        let Self::Change { epoch, disk, operation, sectors, odd, data } = self else {
            unreachable!("called for changes only")
        };
        let write = Operation::Write;
        let zero = [false, true].map(|unmap| Operation::Zero { unmap });
        let operations = [write, zero[0], zero[1], Operation::Discard, Operation::Flush];
        let operation = operations[usize::from(*operation) % operations.len()];
        // Now and then wrong.
        let (odd, data) = (odd.is_multiple_of(8), !data.is_multiple_of(8));
        let [offset, len] = sectors.map(u64::from);
        // About the end of the large disk, and of the small one.
        let offset = if offset % 4 == 0 { 2040 + offset / 4 % 10 } else { offset % 2050 };
        let offset = offset * SECTOR_BYTES;
        // Mostly a few: what is carried takes time.
        let len = if len < 0x2000 { len % 2050 } else { len % 9 } * SECTOR_BYTES;
        let offset = offset + u64::from(odd);
        let (epoch, disk) = (EpochId(*epoch), u32::from(*disk % 4));
        let mut bytes = ChangeHead { epoch, disk, operation, offset, len }.encode().to_vec();
        let carried = if data { len.min(8 << 10) } else { 0 };
        bytes.resize(CHANGE_HEAD_BYTES + usize::try_from(carried).expect("small"), 0x77);
        let size = usize::try_from(disk).ok().and_then(|disk| DISKS.get(disk));
        let inside = match operation {
            Operation::Flush => offset == 0 && len == 0,
            _ => !odd && len > 0 && size.is_some_and(|size| offset + len <= *size),
        };
        let wanted = if operation == write { len } else { 0 };
        let good = size.is_some() && inside && carried == wanted;
        Payload { kind: Kind::Change, bytes, good: Some(good) }
    }
}

/// As [`encode_pages_header`] would write it, without its checks.
fn pages_payload(epoch: u64, runs: &[(u64, u64, u32)], universe: u64) -> Payload {
    let mut bytes = epoch.to_le_bytes().to_vec();
    bytes.extend((runs.len() as u64).to_le_bytes());
    let (mut with_content, mut good) = (0, (1..=RUNS_MAX).contains(&runs.len()));
    for (first, count, encoding) in runs {
        bytes.extend(first.to_le_bytes());
        bytes.extend(u32::try_from(*count).expect("small").to_le_bytes());
        bytes.extend(encoding.to_le_bytes());
        good &= *count > 0 && first + *count <= universe;
        good &= match encoding {
            2 => epoch > 0,
            0 | 1 | 3 => true,
            _ => false,
        };
        with_content += if *encoding == 0 { 0 } else { usize::try_from(*count).expect("small") };
    }
    good &= with_content <= RAW_PAGES_MAX;
    Payload { kind: Kind::Pages, bytes, good: Some(good) }
}

/// A frame as a primary would make it, contents and all.
fn contents_payload(epoch: u8, pages: &[(u16, u8, PageChange)], universe: u64) -> Payload {
    let (mut runs, mut contents) = (Runs::default(), Vec::new());
    let (mut good, mut compressor) = (true, lz4::Compressor::default());
    for (number, fill, change) in pages.iter().take(8) {
        let mut old = [*fill; PAGE_SIZE];
        let mut new = old;
        for (at, byte) in &change.bytes {
            new[usize::from(*at) % PAGE_SIZE] = *byte;
        }
        let mut content = Vec::new();
        let encoding = match change.encoding % 4 {
            0 => Encoding::Zero,
            1 if delta::diff(&mut old, &new, &mut content) => Encoding::Delta,
            2 if compressor.compress(&new, &mut content) => Encoding::Lz4,
            _ => Encoding::Raw,
        };
        match encoding {
            Encoding::Zero => {}
            Encoding::Raw => contents.extend(new),
            Encoding::Delta | Encoding::Lz4 => {
                let length = u16::try_from(content.len()).expect("less than a page");
                contents.extend(length.to_le_bytes());
                contents.extend(content);
            }
        }
        assert!(runs.push(PageIndex(u64::from(*number)), encoding), "a few pages fit");
        good &= u64::from(*number) < universe && (epoch > 0 || encoding != Encoding::Delta);
    }
    let mut bytes = Vec::new();
    encode_pages_header(EpochId(epoch.into()), &runs, &mut bytes);
    bytes.extend(contents);
    Payload { kind: Kind::Pages, bytes, good: Some(good && !runs.is_empty()) }
}

/// As a primary would make it, but for the numbers of its groups.
fn sums_payload(groups: &[(u8, u64)], universe: u64) -> Payload {
    let (mut bytes, mut number, mut good) = (Vec::new(), 0, true);
    for (at, (step, pages)) in groups.iter().enumerate() {
        let ascends = !step.is_multiple_of(8);
        number += u64::from(*step / 8) + u64::from(at > 0 && ascends);
        good &= at == 0 || ascends || *step >= 8;
        let end = number * 64 + u64::from(64 - pages.leading_zeros());
        good &= *pages != 0 && end <= universe;
        let sums = (0..pages.count_ones()).map(|sum| sum ^ u32::from(*step));
        encode_sums(number, *pages, sums, &mut bytes);
    }
    good &= groups.len() <= SUM_GROUPS_MAX;
    Payload { kind: Kind::Sums, bytes, good: Some(good) }
}

pub fn run(input: Input) {
    match input {
        Input::Frames { session, frames, changes, cut } => {
            let payloads: Vec<_> = frames.0.iter().map(Frame::payload).collect();
            for (frame, payload) in frames.0.iter().zip(&payloads) {
                taken(payload, frame.universe.into());
            }
            stream(SessionId(session), &payloads, &changes, cut);
        }
        Input::Header { kind, below, above } => {
            // Mostly by a few bytes.
            let above = if above < 1 << 24 { above } else { above % 4 };
            header(KINDS[usize::from(kind) % KINDS.len()], below % 4, above);
        }
        Input::Bytes(bytes) => {
            for session in [None, Some(SessionId(0))] {
                read_all(&bytes.0, session);
            }
        }
    }
}

/// A length is refused before a payload is waited for.
fn header(kind: Kind, below: u8, above: u32) {
    let cap = u32::try_from(kind.cap()).expect("less than 4 GiB");
    let length = cap.saturating_sub(below.into()).saturating_add(above);
    let mut bytes = [0; HEADER_BYTES];
    bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
    bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
    bytes[6] = kind as u8;
    bytes[8..12].copy_from_slice(&length.to_le_bytes());
    let begun = FrameReader::new(&bytes[..], None).begin();
    assert_eq!(begun.is_ok(), length <= cap, "{kind:?} of {length} bytes: {begun:?}");
    reached(if begun.is_ok() {
        "wire: a length within its cap"
    } else {
        "wire: a length past its cap"
    });
}

/// A payload whose checksum was good, of a peer that is not.
fn taken(payload: &Payload, universe: u64) {
    let Payload { kind, bytes, good } = payload;
    let taken = match kind {
        Kind::Pages => pages(bytes, universe),
        Kind::End => end(bytes),
        Kind::Change => change(bytes),
        Kind::Sums => sums(bytes, universe),
        Kind::Verbs => verbs(bytes),
        kind => message(*kind, bytes),
    };
    assert!(good.is_none_or(|good| good == taken), "{kind:?}: taken {taken}, good {good:?}");
}

fn end(bytes: &[u8]) -> bool {
    let Ok(end) = End::decode(bytes) else { return false };
    assert_eq!(end.encode(), bytes);
    reached("wire: End");
    true
}

fn change(bytes: &[u8]) -> bool {
    let Some((head, data)) = bytes.split_first_chunk::<CHANGE_HEAD_BYTES>() else { return false };
    let Ok(change) = ChangeHead::decode(head, &DISKS, data.len()) else { return false };
    assert_eq!(change.encode(), *head);
    let size = DISKS[usize::try_from(change.disk).expect("a disk that is there")];
    let end = change.offset.checked_add(change.len).expect("no overflow");
    assert!(end <= size && data.len() <= CHANGE_BYTES_MAX, "{change:?} is outside of the disk");
    assert!(change.operation != Operation::Write || change.len == data.len() as u64, "{change:?}");
    reached("wire: Change");
    true
}

fn sums(bytes: &[u8], universe: u64) -> bool {
    let Ok(groups) = decode_sums(bytes, universe) else { return false };
    let mut again = Vec::new();
    for group in &groups {
        let pages: Vec<_> = group.iter().collect();
        assert_eq!(pages.len(), usize::try_from(group.pages.count_ones()).expect("at most 64"));
        assert!(pages.iter().all(|(page, _)| page.0 < universe), "{pages:?} of {universe} pages");
        encode_sums(group.group, group.pages, pages.iter().map(|(_, sum)| *sum), &mut again);
    }
    assert_eq!(again, bytes);
    if groups.len() > 1 {
        reached("wire: Sums");
    }
    true
}

fn verbs(bytes: &[u8]) -> bool {
    let Ok(verbs) = Verbs::decode(bytes) else { return false };
    assert_eq!(verbs.encode(), bytes);
    reached("wire: Verbs");
    true
}

/// What a message that was taken is called in [`PLACES`].
fn name(message: &Message) -> Option<&'static str> {
    Some(match message {
        Message::Hello(_) => "wire: Hello",
        Message::Offer(offer) if offer.regions.is_empty() || offer.disks.is_empty() => return None,
        Message::Offer(_) => "wire: Offer with regions and disks",
        Message::Welcome(_) => "wire: Welcome",
        Message::Abort(_) => "wire: Abort",
        Message::Refuse(_) => "wire: Refuse",
        Message::WindowOpen { grants, .. } if grants.is_empty() => return None,
        Message::WindowOpen { .. } => "wire: WindowOpen",
        Message::WindowNone { .. } => "wire: WindowNone",
        Message::Seal(seal) if seal.pages.is_empty() || seal.state.is_empty() => return None,
        Message::Seal(_) => "wire: Seal with pages and a state",
        Message::Ack { .. } => "wire: Ack",
        Message::Paired(_) | Message::HandedOver { .. } => "wire: Paired or HandedOver",
        _ => "wire: an empty message",
    })
}

fn message(kind: Kind, bytes: &[u8]) -> bool {
    let Ok(message) = Message::from_payload(kind, bytes) else { return false };
    name(&message).into_iter().for_each(reached);
    assert_eq!(message.kind(), kind);
    let mut writer = FrameWriter::new(Vec::new(), SessionId(1));
    if let Err(error) = message.send(&mut writer) {
        panic!("decoded and not encoded: {error}");
    }
    let mut reader = FrameReader::new(&writer.get_ref()[..], Some(SessionId(1)));
    let again = Message::receive(&mut reader, &mut Vec::new()).expect("what was sent");
    // A reason is text for people, and cut to a length.
    let is_text = matches!(kind, Kind::Abort | Kind::Refuse | Kind::WindowNone);
    assert!(again == message || is_text, "{message:?} became {again:?}");
    true
}

fn pages(bytes: &[u8], universe: u64) -> bool {
    let mut header = PagesHeader::default();
    let mut rest = bytes;
    let decoded = decode_pages_header(universe, &mut header, |into| {
        let Some((first, last)) = rest.split_at_checked(into.len()) else { return Ok(false) };
        into.copy_from_slice(first);
        rest = last;
        Ok(true)
    });
    if decoded.is_err() {
        return false;
    }
    reached("wire: Pages");
    assert!(header.runs.len() <= RUNS_MAX && header.raw_bytes() <= Kind::Pages.cap());
    let with_content = header.runs.iter().filter(|run| run.encoding != Encoding::Zero);
    let with_content = with_content.map(|run| u64::from(run.count)).sum::<u64>();
    assert!(with_content <= RAW_PAGES_MAX as u64, "{header:?}");
    let mut runs = Runs::default();
    let mut all = true;
    for Run { first, count, encoding } in &header.runs {
        let end = first.0.checked_add(u64::from(*count)).expect("no overflow");
        assert!(end <= universe, "{count} pages from {first:?} are outside of the memory");
        all &= (first.0..end).all(|page| runs.push(PageIndex(page), *encoding));
    }
    let mut encoded = Vec::new();
    encode_pages_header(header.epoch, &runs, &mut encoded);
    assert_eq!(encoded[..8], bytes[..8], "the epoch");
    // Neighbours become one, so it may be shorter; the pages are the same.
    assert!(!all || runs.pages() == header.pages());
    contents(&header, rest, with_content);
    true
}

/// What a backup makes of the contents of a frame: never more than it counted, nor than pages.
fn contents(header: &PagesHeader, contents: &[u8], with_content: u64) {
    let Ok(cost) = staged_bytes(&header.runs, contents) else { return };
    assert!(header.fits(contents.len()), "{} bytes of contents", contents.len());
    assert!(cost as u64 <= with_content * PAGE_SIZE as u64, "{cost} bytes of {with_content} pages");
    let (mut runs, mut staged) = (Vec::new(), Vec::new());
    if unpack(&header.runs, contents, &mut runs, &mut staged).is_err() {
        return;
    }
    assert_eq!(staged.len(), cost);
    for run in &header.runs {
        match run.encoding {
            Encoding::Delta => reached("wire: contents of a delta"),
            Encoding::Lz4 => reached("wire: contents of an LZ4 block"),
            Encoding::Zero | Encoding::Raw => {}
        }
    }
    // Staged once, it is as it stays.
    let (mut again, mut same) = (Vec::new(), Vec::new());
    unpack(&runs, &staged, &mut again, &mut same).expect("what was staged");
    assert!(again == runs && same == staged);
}

/// Reads frames until an error. Those that were read, and the error.
fn read_all(bytes: &[u8], session: Option<SessionId>) -> (Vec<(Kind, Vec<u8>)>, WireError) {
    let mut reader = FrameReader::new(bytes, session);
    let mut read = Vec::new();
    loop {
        let mut payload = Vec::new();
        // In steps, as the receiver of pages does: a length is capped before a payload is read.
        let begun = reader.begin().and_then(|header| {
            assert!(header.length <= header.kind.cap(), "{header:?}");
            reader.read_rest(&mut payload)?;
            reader.finish(&header)?;
            Ok(header)
        });
        match begun {
            Ok(header) => {
                assert_eq!(header.length, payload.len());
                read.push((header.kind, payload));
            }
            Err(error) => {
                assert!(payload.capacity() <= 2 * bytes.len() + (256 << 10), "memory for nothing");
                return (read, error);
            }
        }
    }
}

fn stream(session: SessionId, payloads: &[Payload], changes: &[(u16, u8)], cut: Option<u16>) {
    let mut writer = FrameWriter::new(Vec::new(), session);
    let mut written = Vec::new();
    for Payload { kind, bytes, .. } in payloads {
        match writer.write(*kind, &[bytes]) {
            Ok(_) => written.push((*kind, bytes.clone())),
            Err(error) => assert!(bytes.len() > kind.cap(), "{kind:?}: {error}"),
        }
    }
    let good = writer.get_ref();
    let (read, error) = read_all(good, None);
    assert!(matches!(error, WireError::Closed), "{error}");
    assert_eq!(read, written);
    let mut bad = good.clone();
    if let Some(cut) = cut {
        bad.truncate(bad.len().min(cut.into()));
    }
    for (at, value) in changes {
        if let Some(byte) = bad.get_mut(usize::from(*at)) {
            *byte ^= value;
        }
    }
    let (read, error) = read_all(&bad, Some(session));
    if read.len() >= 3 && !matches!(error, WireError::Closed) {
        reached("wire: three frames read, then a broken one");
    }
    let same = bad.iter().zip(good).take_while(|(one, other)| one == other).count();
    // Every frame before the first wrong byte is read, and none with one such byte alone.
    let mut end = 0;
    let whole = written.iter().take_while(|(_, payload)| {
        end += HEADER_BYTES + payload.len();
        end <= same
    });
    let whole = whole.count();
    assert!(read.len() >= whole, "{} of {whole} good frames", read.len());
    assert_eq!(read[..whole], written[..whole]);
    if changes.len() == 1 && cut.is_none() {
        assert!(read.len() == whole, "a wrong byte was not noticed");
    }
}
