//! The stream between primary and backup: frames of any kind with any payload, and what a broken
//! line makes of them.
//!
//! Beside "no panic": frames that are whole are read as they were written; what decodes is encoded
//! and decoded again to the same; no length makes the reader take memory that no byte came for.

use arbitrary::Arbitrary;
use replication::wire::{
    End, FrameReader, FrameWriter, HEADER_BYTES, Kind, Message, PagesHeader, RUNS_MAX, Runs,
    SessionId, WireError, decode_pages_header, encode_pages_header,
};

const KINDS: [Kind; 15] = [
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
];

#[derive(Arbitrary, Debug)]
pub enum Input {
    /// Good frames, and then something happens to their bytes.
    Frames { session: u64, frames: Vec<Frame>, changes: Vec<(u16, u8)>, cut: Option<u16> },
    /// Bytes of nobody.
    Bytes(Vec<u8>),
}

#[derive(Arbitrary, Debug)]
pub struct Frame {
    kind: u8,
    payload: Vec<u8>,
    universe: u16,
}

impl Frame {
    fn kind(&self) -> Kind {
        KINDS[usize::from(self.kind) % KINDS.len()]
    }
}

pub fn run(input: Input) {
    match input {
        Input::Frames { session, frames, changes, cut } => {
            frames.iter().for_each(payload);
            stream(SessionId(session), &frames, &changes, cut);
        }
        Input::Bytes(bytes) => {
            for session in [None, Some(SessionId(0))] {
                read_all(&bytes, session);
            }
        }
    }
}

/// A payload whose checksum was good, of a peer that is not.
fn payload(frame: &Frame) {
    match frame.kind() {
        Kind::Pages => pages(&frame.payload, u64::from(frame.universe) % 2048),
        Kind::End => {
            if let Ok(end) = End::decode(&frame.payload) {
                assert_eq!(end.encode(), frame.payload);
            }
        }
        kind => message(kind, &frame.payload),
    }
}

fn message(kind: Kind, bytes: &[u8]) {
    let Ok(message) = Message::from_payload(kind, bytes) else { return };
    assert_eq!(message.kind(), kind);
    let mut writer = FrameWriter::new(Vec::new(), SessionId(1));
    if let Err(error) = message.send(&mut writer) {
        panic!("decoded and not encoded: {error}");
    }
    let mut reader = FrameReader::new(&writer.get_ref()[..], Some(SessionId(1)));
    let again = Message::receive(&mut reader, &mut Vec::new()).expect("what was sent");
    // The reason of an abort is text for people, and cut to a length.
    assert!(again == message || kind == Kind::Abort, "{message:?} became {again:?}");
}

fn pages(bytes: &[u8], universe: u64) {
    let mut header = PagesHeader::default();
    let mut rest = bytes;
    let decoded = decode_pages_header(universe, &mut header, |into| {
        let Some((first, last)) = rest.split_at_checked(into.len()) else { return Ok(false) };
        into.copy_from_slice(first);
        rest = last;
        Ok(true)
    });
    if decoded.is_err() {
        return;
    }
    assert!(header.runs.len() <= RUNS_MAX && header.raw_bytes() <= Kind::Pages.cap());
    let mut runs = Runs::default();
    for run in &header.runs {
        assert!(run.first.0 + u64::from(run.count) <= universe, "{run:?} is outside of the memory");
        for page in run.first.0..run.first.0 + u64::from(run.count) {
            runs.push(replication::ids::PageIndex(page), run.zero);
        }
    }
    let mut encoded = Vec::new();
    encode_pages_header(header.epoch, &runs, &mut encoded);
    assert_eq!(encoded[..8], bytes[..8], "the epoch");
}

/// Reads frames until an error. Those that were read, and the error.
fn read_all(bytes: &[u8], session: Option<SessionId>) -> (Vec<(Kind, Vec<u8>)>, WireError) {
    let mut reader = FrameReader::new(bytes, session);
    let mut read = Vec::new();
    loop {
        let mut payload = Vec::new();
        match reader.read(&mut payload) {
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

fn stream(session: SessionId, frames: &[Frame], changes: &[(u16, u8)], cut: Option<u16>) {
    let mut writer = FrameWriter::new(Vec::new(), session);
    let mut written = Vec::new();
    for frame in frames {
        let kind = frame.kind();
        match writer.write(kind, &[&frame.payload]) {
            Ok(_) => written.push((kind, frame.payload.clone())),
            Err(error) => assert!(frame.payload.len() > kind.cap(), "{kind:?}: {error}"),
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
    let (read, _) = read_all(&bad, Some(session));
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
