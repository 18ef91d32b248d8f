use std::io::Read;

use proptest::prelude::*;
use uuid::Uuid;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::*;
use crate::ids::{EpochId, Generation, PAGE_SIZE, PageIndex};
use crate::protocol::backup::Handover;
use crate::ram::Slice;

const SESSION: SessionId = SessionId(0x5E55_1013);

fn any_uuid() -> impl Strategy<Value = Uuid> {
    any::<u128>().prop_map(Uuid::from_u128)
}

fn any_message() -> impl Strategy<Value = Message> {
    let bytes = || prop::collection::vec(any::<u8>(), 0..300);
    let region =
        (any::<u64>(), any::<u64>()).prop_map(|(start, pages)| WireRegion { start, pages });
    let sizes = prop::collection::vec((0..1u64 << 50).prop_map(|sectors| sectors * 512), 0..4);
    let regions = prop::collection::vec(region, 0..5);
    let base = prop::option::of((any::<[u64; 2]>(), 1..u64::MAX, any::<u64>()).prop_map(
        |([session, generation], committed, more)| Base {
            session,
            generation: Generation(generation),
            committed: EpochId(committed),
            sealed: EpochId(committed.saturating_add(more)),
        },
    ));
    let flags = (any::<[bool; 2]>(), base, "\\PC{0,40}", "\\PC{0,40}");
    let offer = (any::<[u32; 3]>(), flags, regions, sizes, bytes());
    let pages = prop::collection::vec(any::<u64>(), 0..9);
    let kinds = vec![Handover::No, Handover::Leave, Handover::Reverse];
    let seal = (any::<[u64; 3]>(), prop::sample::select(kinds), pages, bytes());
    prop_oneof![
        (any_uuid(), any_uuid(), 1..=CONNECTIONS_MAX).prop_map(|(vm, host, connections)| {
            Message::Hello(Hello { vm, host, connection: connections, connections })
        }),
        offer.prop_map(
            |(
                [page_bytes, heartbeat_ms, timeout_ms],
                ([arbiter, rdma], base, way_back, fallback),
                regions,
                disks,
                description,
            )| {
                Message::Offer(Offer {
                    page_bytes,
                    heartbeat_ms,
                    timeout_ms,
                    arbiter,
                    rdma,
                    fallback,
                    base,
                    reversed: rdma && base.is_some(),
                    regions,
                    disks,
                    way_back,
                    description,
                })
            }
        ),
        (any_uuid(), any::<u64>(), any::<[u32; 2]>(), any::<bool>()).prop_map(
            |(host, staging_bytes, [heartbeat_ms, timeout_ms], has_base)| {
                Message::Welcome(Welcome {
                    host,
                    staging_bytes,
                    heartbeat_ms,
                    timeout_ms,
                    has_base,
                })
            }
        ),
        "\\PC{0,80}".prop_map(Message::Abort),
        "\\PC{0,80}".prop_map(Message::Refuse),
        any::<u64>().prop_map(|generation| Message::Paired(Generation(generation))),
        seal.prop_map(|([epoch, generation, changes], handover, pages, state)| {
            let (epoch, generation) = (EpochId(epoch), Generation(generation));
            Message::Seal(Seal { epoch, generation, handover, pages, changes, state })
        }),
        any::<[u64; 2]>().prop_map(|[epoch, generation]| Message::Ack {
            epoch: EpochId(epoch),
            generation: Generation(generation),
        }),
        Just(Message::Heartbeat),
        any::<u64>().prop_map(Message::Progress),
        Just(Message::Stop),
        Just(Message::StopDone),
        Just(Message::Resync),
        any::<u64>().prop_map(Message::WindowAsk),
        (any::<u64>(), prop::collection::vec(any::<([u64; 2], u32)>(), 0..9)).prop_map(
            |(number, grants)| {
                let grant =
                    |([pages, address], key): ([u64; 2], u32)| Grant { pages, address, key };
                Message::WindowOpen { number, grants: grants.into_iter().map(grant).collect() }
            }
        ),
        (any::<u64>(), "\\PC{0,80}")
            .prop_map(|(number, reason)| Message::WindowNone { number, reason }),
        any::<u64>().prop_map(Message::WindowEnd),
        any::<u64>().prop_map(Message::WindowClosed),
        Just(Message::ResyncReady),
        (any::<u64>(), any::<bool>()).prop_map(|(generation, reversed)| Message::HandedOver {
            generation: Generation(generation),
            reversed
        }),
    ]
}

fn bytes_of(messages: &[Message]) -> Vec<u8> {
    let mut writer = FrameWriter::new(Vec::new(), SESSION);
    messages.iter().for_each(|message| message.send(&mut writer).unwrap());
    writer.get_ref().clone()
}

/// Everything that can be read, and the error at the end.
fn read_all(bytes: &[u8]) -> (Vec<Message>, WireError) {
    let mut reader = FrameReader::new(bytes, Some(SESSION));
    let mut payload = Vec::new();
    let mut messages = Vec::new();
    loop {
        match Message::receive(&mut reader, &mut payload) {
            Ok(message) => messages.push(message),
            Err(error) => return (messages, error),
        }
    }
}

proptest! {
    #[test]
    fn what_is_sent_arrives(messages in prop::collection::vec(any_message(), 0..8)) {
        let (read, end) = read_all(&bytes_of(&messages));
        prop_assert_eq!(read, messages);
        prop_assert!(matches!(end, WireError::Closed));
    }

    #[test]
    fn a_flipped_bit_is_seen(
        messages in prop::collection::vec(any_message(), 1..5),
        at in any::<prop::sample::Index>(),
        bit in 0u8..8,
    ) {
        let mut bytes = bytes_of(&messages);
        let at = at.index(bytes.len());
        bytes[at] ^= 1u8 << bit;
        let (read, end) = read_all(&bytes);
        prop_assert!(read.len() < messages.len());
        prop_assert_eq!(&read[..], &messages[..read.len()]);
        prop_assert!(!matches!(end, WireError::Closed), "{}", end);
    }

    #[test]
    fn a_cut_is_seen(
        messages in prop::collection::vec(any_message(), 1..5),
        at in any::<prop::sample::Index>(),
    ) {
        let bytes = bytes_of(&messages);
        let (read, end) = read_all(&bytes[..at.index(bytes.len())]);
        prop_assert!(read.len() < messages.len());
        prop_assert!(matches!(end, WireError::Closed | WireError::Truncated));
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        let (read, _) = read_all(&bytes);
        prop_assert!(read.is_empty());
    }

    #[test]
    fn random_payloads_never_panic(kind in 1u8..=24, bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let all = [
            Kind::Hello, Kind::Offer, Kind::Welcome, Kind::Abort, Kind::Paired, Kind::Resync,
            Kind::ResyncReady, Kind::Seal, Kind::Ack, Kind::Heartbeat, Kind::Stop,
            Kind::StopDone, Kind::HandedOver, Kind::Pages, Kind::End, Kind::Change,
            Kind::Progress, Kind::Refuse, Kind::WindowAsk, Kind::WindowOpen, Kind::WindowNone,
            Kind::WindowEnd, Kind::WindowClosed, Kind::Sums,
        ];
        let _ = Message::decode(all[usize::from(kind) - 1], &bytes);
        let _ = End::decode(&bytes);
        let _ = decode_sums(&bytes, 1000);
        let mut rest = &bytes[..];
        let _ = decode_pages_header(1000, &mut PagesHeader::default(), |into| {
            match rest.split_at_checked(into.len()) {
                Some((head, tail)) => { into.copy_from_slice(head); rest = tail; Ok(true) }
                None => Ok(false),
            }
        });
    }

    #[test]
    fn runs_hold_what_was_pushed(
        pages in prop::collection::vec((0u64..500, any_encoding()), 0..200),
    ) {
        let mut runs = Runs::default();
        let mut taken = Vec::new();
        for (page, encoding) in pages {
            let was_full = runs.is_full();
            if runs.push(PageIndex(page), encoding) {
                taken.push((page, encoding));
            } else {
                prop_assert!(was_full);
            }
        }
        let flat: Vec<_> = runs.as_slice().iter().flat_map(|run| {
            (0..u64::from(run.count)).map(|at| (run.first.0 + at, run.encoding))
        }).collect();
        prop_assert_eq!(&flat, &taken);
        if runs.is_empty() { return Ok(()); }
        let mut head = Vec::new();
        encode_pages_header(EpochId(7), &runs, &mut head);
        let decoded = decode_head(&head).unwrap();
        prop_assert_eq!(decoded.epoch, EpochId(7));
        prop_assert_eq!(&decoded.runs[..], runs.as_slice());
        prop_assert_eq!(decoded.pages(), taken.len() as u64);
        let count = |wanted: Encoding| taken.iter().filter(|(_, found)| *found == wanted).count();
        let raw = count(Encoding::Raw) * PAGE_SIZE;
        let encoded = count(Encoding::Delta) + count(Encoding::Lz4);
        prop_assert_eq!(decoded.raw_bytes(), raw);
        prop_assert_eq!(decoded.has_encoded(), encoded > 0);
        prop_assert!(decoded.fits(raw + 2 * encoded) && decoded.fits(raw + encoded * PAGE_SIZE));
        prop_assert!(!decoded.fits(raw + encoded * PAGE_SIZE + 1));
        prop_assert!(raw + encoded == 0 || !decoded.fits(raw + 2 * encoded - 1));
    }
}

fn any_encoding() -> impl Strategy<Value = Encoding> {
    prop_oneof![
        Just(Encoding::Zero),
        Just(Encoding::Raw),
        Just(Encoding::Delta),
        Just(Encoding::Lz4)
    ]
}

fn decode_head(head: &[u8]) -> Result<PagesHeader, WireError> {
    let mut rest = head;
    let mut decoded = PagesHeader::default();
    decode_pages_header(500, &mut decoded, |into| {
        let (first, last) = rest.split_at(into.len());
        into.copy_from_slice(first);
        rest = last;
        Ok(true)
    })?;
    Ok(decoded)
}

#[test]
fn a_delta_in_a_first_copy_and_an_unknown_encoding_are_refused() {
    let head = |epoch: u64, encoding| {
        let mut runs = Runs::default();
        assert!(runs.push(PageIndex(7), encoding));
        let mut head = Vec::new();
        encode_pages_header(EpochId(epoch), &runs, &mut head);
        head
    };
    decode_head(&head(1, Encoding::Delta)).unwrap();
    decode_head(&head(0, Encoding::Lz4)).unwrap();
    let error = decode_head(&head(0, Encoding::Delta)).unwrap_err();
    assert!(error.to_string().ends_with("a delta in a first copy"), "{error}");
    let mut unknown = head(1, Encoding::Lz4);
    *unknown.iter_mut().rev().nth(3).unwrap() = 4;
    let error = decode_head(&unknown).unwrap_err();
    assert!(error.to_string().ends_with("malformed: encoding"), "{error}");
}

#[test]
fn frames_out_of_turn_are_named() {
    let one = bytes_of(&[Message::Heartbeat]);
    let (read, error) = read_all(&[one.clone(), one].concat());
    assert_eq!(read.len(), 1);
    assert!(matches!(error, WireError::Sequence { expected: 1, found: 0 }), "{error}");
    let two = bytes_of(&[Message::Heartbeat, Message::Stop]);
    let (read, error) = read_all(&two[HEADER_BYTES..]);
    assert!(read.is_empty() && matches!(error, WireError::Sequence { expected: 0, found: 1 }));
}

#[test]
fn another_session_is_refused() {
    let mut writer = FrameWriter::new(Vec::new(), SessionId(1));
    Message::Stop.send(&mut writer).unwrap();
    assert!(matches!(read_all(writer.get_ref()).1, WireError::Session));
}

#[test]
fn a_length_beyond_the_cap_reads_no_payload() {
    let mut bytes = bytes_of(&[Message::Ack { epoch: EpochId(1), generation: Generation(1) }]);
    bytes[8..12].copy_from_slice(&17u32.to_le_bytes());
    let error = read_all(&bytes).1;
    assert!(matches!(error, WireError::Length { kind: Kind::Ack, length: 17, cap: 16 }));
    let long = vec![0; ABORT_BYTES_MAX * 2];
    let mut writer = FrameWriter::new(Vec::new(), SESSION);
    assert!(matches!(writer.write(Kind::Abort, &[&long]), Err(WireError::Length { .. })));
}

#[test]
fn a_promise_of_many_bytes_allocates_only_what_arrives() {
    let state = vec![7; 100];
    let seal = Seal {
        epoch: EpochId(1),
        generation: Generation(1),
        handover: Handover::No,
        pages: vec![],
        changes: 0,
        state,
    };
    let mut bytes = bytes_of(&[Message::Seal(seal)]);
    bytes[8..12].copy_from_slice(&(60u32 << 20).to_le_bytes());
    let mut reader = FrameReader::new(&bytes[..], Some(SESSION));
    let mut payload = Vec::new();
    assert!(matches!(reader.read(&mut payload), Err(WireError::Truncated)));
    assert!(payload.capacity() <= 1 << 20, "{}", payload.capacity());
}

#[test]
fn an_abort_is_cut_at_a_character() {
    let long = "ä".repeat(ABORT_BYTES_MAX);
    let (read, _) = read_all(&bytes_of(&[Message::Abort(long)]));
    let [Message::Abort(cut)] = &read[..] else { panic!("{read:?}") };
    assert!(cut.len() <= ABORT_BYTES_MAX && cut.chars().all(|c| c == 'ä'));
}

#[test]
fn what_a_peer_must_not_send_is_no_loss() {
    let io = |kind: std::io::ErrorKind| WireError::Io(kind.into());
    for loss in [WireError::Closed, WireError::Truncated, io(std::io::ErrorKind::ConnectionReset)] {
        assert!(loss.is_loss(), "{loss}");
    }
    for wrong in [io(std::io::ErrorKind::InvalidData), WireError::Session] {
        assert!(!wrong.is_loss(), "{wrong}");
    }
}

/// Gives a few bytes at a time, and none between them.
struct Sluggish<'a> {
    from: &'a [u8],
    interrupted: bool,
}

impl Sluggish<'_> {
    fn read_memory(&mut self, into: &Slice<'_>) -> std::io::Result<usize> {
        self.interrupted = !self.interrupted;
        if self.interrupted {
            return Err(std::io::ErrorKind::Interrupted.into());
        }
        let mut bytes = [0; 5000];
        let count = self.from.read(&mut bytes[..into.len().min(5000)])?;
        into.write_slice(&bytes[..count], 0).unwrap();
        Ok(count)
    }
}

impl std::io::Read for Sluggish<'_> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        self.from.read(into)
    }
}

#[test]
fn a_payload_that_is_read_into_memory_is_checked_like_any_other() {
    const SIZE: usize = 3 * PAGE_SIZE;
    let mut content = [0; SIZE];
    (0u8..).zip(content.chunks_mut(99)).for_each(|(number, bytes)| bytes.fill(number));
    let mut wire = vec![];
    let mut writer = FrameWriter::new(&mut wire, SessionId(1));
    writer.write(Kind::Pages, &[b"head", &content]).unwrap();
    let ram = crate::testing::memory(&[(0, 4)]);
    let read = |wire: &[u8]| {
        let mut reader = FrameReader::new(Sluggish { from: wire, interrupted: false }, None);
        let header = reader.begin()?;
        assert!(reader.read_into(&mut [0; 4])?);
        let whole = ram.mapping().get_slice(GuestAddress(0), 4 * PAGE_SIZE).unwrap();
        assert!(!reader.read_memory(&whole, Sluggish::read_memory)?, "more than there is");
        let memory = whole.subslice(7, SIZE).unwrap();
        assert!(reader.read_memory(&memory, Sluggish::read_memory)?);
        assert_eq!((reader.rest(), reader.bytes()), (0, wire.len() as u64));
        reader.finish(&header)
    };
    read(&wire).unwrap();
    let mut bytes = vec![0; SIZE + 8];
    ram.mapping().read_slice(&mut bytes, GuestAddress(0)).unwrap();
    assert!(bytes[7..][..SIZE] == content && bytes[6] == 0 && bytes[SIZE + 7] == 0);
    for at in [HEADER_BYTES + 4, HEADER_BYTES + 4 + PAGE_SIZE + 904, wire.len() - 1] {
        let mut wire = wire.clone();
        wire[at] ^= 1;
        assert!(matches!(read(&wire), Err(WireError::Checksum { .. })), "byte {at}");
    }
    let cut = read(&wire[..wire.len() - 1]);
    assert!(matches!(cut, Err(WireError::Truncated)), "{cut:?}");
}

/// A peer that speaks TLS is named so, however little of it came; after the first frame it is damage.
#[test]
fn a_peer_that_speaks_tls_is_recognised() {
    let hello = [&[22, 3, 1, 1, 0, 1, 0][..], &[7; 64]].concat();
    let alert = [21, 3, 3, 0, 2, 2, 70];
    let first = |bytes: &[u8]| FrameReader::new(bytes, None).begin().unwrap_err();
    for begin in [&hello[..], &hello[..3], &alert] {
        assert!(matches!(first(begin), WireError::Tls), "{begin:?}");
    }
    for other in [&hello[..2], &[23, 3, 3, 0, 1], &[22, 4, 3, 0, 1]] {
        assert!(matches!(first(other), WireError::Truncated), "{other:?}");
    }
    assert!(!WireError::Tls.is_loss());
    let mut bytes = Vec::new();
    FrameWriter::new(&mut bytes, SessionId(1)).write(Kind::Heartbeat, &[]).unwrap();
    bytes.extend(&hello);
    let mut reader = FrameReader::new(&bytes[..], None);
    reader.read(&mut Vec::new()).unwrap();
    assert!(matches!(reader.begin(), Err(WireError::Magic(_))));
}
