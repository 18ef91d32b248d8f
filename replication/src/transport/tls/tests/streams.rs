//! Two ends that admitted each other.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use proptest::prelude::*;

use super::super::stream::{PIECE_BYTES, TlsStream};
use super::{PATIENCE, narrow, pair, pair_over, tcp};
use crate::tests::Random;
use crate::transport::{Stream, is_late};

/// Bytes that no two places share by chance.
fn content(seed: u64, count: usize) -> Vec<u8> {
    let mut random = Random(seed);
    (0..count).map(|_| random.next().to_le_bytes()[0]).collect()
}

fn second(stream: &TlsStream) -> Box<dyn Stream> {
    stream.duplicate().unwrap()
}

/// What `body` returns, unless it takes for ever.
fn in_time<T: Send + 'static>(body: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, end) = mpsc::channel();
    std::thread::spawn(move || done.send(body()));
    end.recv_timeout(PATIENCE).expect("it waits for ever")
}

/// Writes all of it in pieces, some as several slices, and changes keys now and then.
fn write_pieces(mut stream: TlsStream, bytes: &[u8], seed: u64, longest: u64) {
    let mut random = Random(seed);
    let mut at = 0;
    while at < bytes.len() {
        let end = bytes.len().min(at + 1 + usize::try_from(random.next() % longest).unwrap());
        let middle = at + usize::try_from(random.next() % (end - at) as u64).unwrap();
        let slices = [&bytes[at..middle], &[], &bytes[middle..end]].map(IoSlice::new);
        at += stream.write_vectored(&slices).unwrap();
        if random.next().is_multiple_of(16) {
            stream.change_keys();
        }
    }
    stream.finish();
}

/// Reads to the end in pieces.
fn read_pieces(mut stream: TlsStream, seed: u64, longest: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut bytes = Vec::new();
    loop {
        let from = bytes.len();
        bytes.resize(from + 1 + usize::try_from(random.next() % longest).unwrap(), 0);
        let count = stream.read(&mut bytes[from..]).unwrap();
        bytes.truncate(from + count);
        if count == 0 {
            return bytes;
        }
    }
}

fn handle(stream: &TlsStream) -> TlsStream {
    stream.another()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Both directions at once, two threads at each end, through sockets that hold little.
    #[test]
    fn bytes_arrive_as_they_were_sent(
        seed in any::<u64>(),
        counts in (0_usize..1_500_000, 0_usize..1_500_000),
        longest in (1_u64..400_000, 1_u64..400_000),
    ) {
        // Short pieces of many bytes take long and show no more.
        let count = |bytes: usize, longest: u64| bytes.min(usize::try_from(longest).unwrap() * 2000);
        let outward = content(seed, count(counts.0, longest.0.min(longest.1)));
        let backward = content(!seed, count(counts.1, longest.0.min(longest.1)));
        let (ours, theirs) = pair_over(narrow());
        let (there, back) = (outward.clone(), backward.clone());
        let (came, came_back) = in_time(move || {
            std::thread::scope(|scope| {
                let (write, answer) = (handle(&ours), handle(&theirs));
                scope.spawn(move || write_pieces(write, &there, seed ^ 1, longest.0));
                scope.spawn(move || write_pieces(answer, &back, seed ^ 2, longest.1));
                let came = scope.spawn(move || read_pieces(theirs, seed ^ 3, longest.0));
                let came_back = scope.spawn(move || read_pieces(ours, seed ^ 4, longest.1));
                (came.join().unwrap(), came_back.join().unwrap())
            })
        });
        prop_assert!(came == outward && came_back == backward);
    }
}

/// Fills the connection until a writer waits.
fn fill(stream: &mut dyn Stream) {
    stream.set_write_timeout(None).unwrap();
    let socket = stream.readiness().unwrap();
    let mut fds = [PollFd::new(socket, PollFlags::POLLOUT)];
    // A socket that is not ready for some time has a writer that waits.
    while poll(&mut fds, PollTimeout::from(200_u16)).unwrap() > 0 {
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A writer that waits holds up no reader, and the other way round: each end writes far more than the
/// connection holds before it reads a byte.
#[test]
fn both_directions_full_are_no_deadlock() {
    const BYTES: usize = 4 << 20;
    let (ours, theirs) = pair_over(narrow());
    let came = in_time(move || {
        std::thread::scope(|scope| {
            for end in [&ours, &theirs] {
                let mut writer = handle(end);
                scope.spawn(move || {
                    writer.write_all(&content(5, BYTES)).unwrap();
                    writer.finish();
                });
            }
            fill(&mut handle(&ours));
            fill(&mut handle(&theirs));
            // Both change keys while both writers wait: nobody waits for the answer either.
            ours.change_keys();
            theirs.change_keys();
            let readers =
                [ours, theirs].map(|end| scope.spawn(move || read_pieces(end, 7, 70_000)));
            readers.map(|reader| reader.join().unwrap())
        })
    });
    assert!(came.iter().all(|bytes| *bytes == content(5, BYTES)));
}

#[test]
fn closing_wakes_a_reader_and_a_writer() {
    let (ours, theirs) = pair_over(narrow());
    let (read, written) = in_time(move || {
        std::thread::scope(|scope| {
            let (mut reader, mut writer) = (handle(&ours), handle(&ours));
            let read = scope.spawn(move || reader.read(&mut [0; 8]));
            let written = scope.spawn(move || writer.write_all(&content(1, 8 << 20)));
            fill(&mut handle(&ours));
            ours.close();
            (read.join().unwrap(), written.join().unwrap())
        })
    });
    assert_eq!(read.unwrap(), 0, "as of a socket");
    assert_eq!(written.unwrap_err().kind(), ErrorKind::BrokenPipe);
    drop(theirs);
}

/// A peer that never reads: the writer gives up in time and holds no more than a piece; nothing follows
/// half a record.
#[test]
fn a_peer_that_never_reads_costs_a_piece() {
    let (mut ours, theirs) = pair_over(narrow());
    ours.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    let bytes = content(1, 8 << 20);
    let error = ours.write_all(&bytes).unwrap_err();
    assert!(is_late(&error), "{error}");
    let held = ours.held_bytes();
    assert!(held > 0 && held < PIECE_BYTES + (PIECE_BYTES >> 4), "{held}");
    assert_eq!(ours.write(&bytes).unwrap_err().kind(), ErrorKind::BrokenPipe);
    // The other end finds a cut, not an end.
    drop(ours);
    let error = in_time(move || {
        let mut theirs = theirs;
        theirs.read_to_end(&mut Vec::new()).unwrap_err()
    });
    assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
}

/// What `read_to_end` says at the other end of a connection that `end` has ended.
fn after(end: impl FnOnce(TlsStream, TcpStream)) -> (Vec<u8>, io::Result<usize>) {
    let sockets = tcp();
    let raw = sockets.0.try_clone().unwrap();
    let (ours, mut theirs) = pair_over(sockets);
    end(ours, raw);
    in_time(move || {
        let mut bytes = Vec::new();
        let read = theirs.read_to_end(&mut bytes);
        (bytes, read)
    })
}

#[test]
fn an_end_that_is_meant_is_an_end() {
    let ends: [fn(&TlsStream); 3] = [TlsStream::finish, TlsStream::close, |_| {}];
    for end in ends {
        let (bytes, read) = after(|mut ours, _| {
            ours.write_all(b"word").unwrap();
            end(&ours);
        });
        assert_eq!((bytes.as_slice(), read.unwrap()), (b"word".as_slice(), 4));
    }
}

#[test]
fn a_cut_is_a_loss() {
    let cut = |raw: &TcpStream| raw.shutdown(Shutdown::Write).unwrap();
    // Between two records, and in the middle of one.
    let torn: [&[u8]; 2] = [&[], &[23, 3, 3, 0, 64, 1, 2, 3]];
    for half in torn {
        let (bytes, read) = after(|mut ours, mut raw| {
            ours.write_all(b"word").unwrap();
            raw.write_all(half).unwrap();
            cut(&raw);
            std::mem::forget(ours);
        });
        assert_eq!(bytes, b"word");
        let error = read.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
        assert!(error.to_string().contains("cut off"), "{error}");
        assert!(crate::wire::WireError::Io(error).is_loss());
    }
}

/// Whoever is on the path changes a byte.
#[test]
fn a_record_that_was_changed_is_a_loss() {
    for at in [5, 20, 1000] {
        let (to, from) = tcp();
        let (ours, theirs) = tcp();
        // The primary speaks to `ours`; what it says is passed on to the backup's socket.
        let (mut passing, mut into) = (theirs.try_clone().unwrap(), to.try_clone().unwrap());
        let (mut back, mut into_back) = (to, theirs);
        let (changes, changed) = mpsc::channel::<()>();
        std::thread::spawn(move || {
            let mut bytes = vec![0; 64 << 10];
            while let Ok(count @ 1..) = passing.read(&mut bytes) {
                if changed.try_recv().is_ok() {
                    bytes[at] ^= 1;
                }
                if into.write_all(&bytes[..count]).is_err() {
                    return;
                }
            }
        });
        std::thread::spawn(move || io::copy(&mut back, &mut into_back));
        let (mut primary, mut backup) = pair_over((ours, from));
        primary.write_all(b"before").unwrap();
        let mut word = [0; 6];
        backup.read_exact(&mut word).unwrap();
        changes.send(()).unwrap();
        primary.write_all(&content(1, 2000)).unwrap();
        let (error, _backup) = in_time(move || (backup.read(&mut [0; 64]).unwrap_err(), backup));
        assert_eq!(error.kind(), ErrorKind::ConnectionAborted, "{error}");
        assert!(crate::wire::WireError::Io(error).is_loss());
        // The other side hears why, at once.
        let error = in_time(move || primary.read(&mut [0; 64]).unwrap_err());
        assert!(error.to_string().contains("BadRecordMac"), "{error}");
    }
}

/// A descriptor says nothing of what was taken from it before.
#[test]
fn what_has_come_is_read_without_waiting() {
    let (mut ours, mut theirs) = pair();
    let mut word = [0; 4];
    let none = theirs.read_arrived(&mut word).unwrap_err();
    assert_eq!(none.kind(), ErrorKind::WouldBlock);
    assert!(!theirs.has_read_ahead());
    for _ in 0..3 {
        ours.write_all(b"one, two").unwrap();
    }
    let ready = |stream: &TlsStream| {
        let mut fds = [PollFd::new(stream.readiness().unwrap(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(1000_u16)).unwrap() > 0
    };
    let mut came: Vec<u8> = Vec::new();
    while came.len() < 24 {
        assert!(theirs.has_read_ahead() || ready(&theirs), "something has come");
        match theirs.read_arrived(&mut word) {
            Ok(count) => came.extend(&word[..count]),
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }
    assert_eq!(came, b"one, two".repeat(3));
    assert_eq!(theirs.read_arrived(&mut word).unwrap_err().kind(), ErrorKind::WouldBlock);
    assert!(!theirs.has_read_ahead());
    // A change of keys is nothing to read.
    ours.change_keys();
    assert!(ready(&theirs));
    assert_eq!(theirs.read_arrived(&mut word).unwrap_err().kind(), ErrorKind::WouldBlock);
    ours.finish();
    assert!(ready(&theirs));
    assert_eq!(theirs.read_arrived(&mut word).unwrap(), 0);
}

#[test]
fn a_reader_waits_no_longer_than_it_was_told() {
    let (_ours, mut theirs) = pair();
    theirs.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let error = in_time(move || theirs.read(&mut [0; 4]).unwrap_err());
    assert!(is_late(&error), "{error}");
}

#[test]
fn guest_memory_is_read_into() {
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
    let (mut ours, mut theirs) = pair();
    let ram = crate::testing::memory(&[(0, 40)]);
    let sent = content(9, 39 << 12);
    let all = sent.clone();
    let writer = std::thread::spawn(move || ours.write_all(&all));
    let room = ram.mapping().get_slice(GuestAddress(100), sent.len()).unwrap();
    let mut done = 0;
    while done < room.len() {
        done += theirs.read_memory(&room.offset(done).unwrap()).unwrap();
    }
    writer.join().unwrap().unwrap();
    let mut bytes = vec![0; sent.len()];
    ram.mapping().read_slice(&mut bytes, GuestAddress(100)).unwrap();
    assert!(bytes == sent);
    assert_eq!(theirs.read_memory(&room).unwrap(), 0, "the end");
}

/// A second handle goes on when the first one is dropped, and the last one ends it.
#[test]
fn handles_are_of_one_stream() {
    let (ours, mut theirs) = pair();
    let mut other = second(&ours);
    drop(ours);
    other.write_all(b"word").unwrap();
    let mut word = [0; 4];
    theirs.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"word");
    assert!(other.local_address().is_some() && other.readiness().is_some());
    drop(other);
    assert_eq!(in_time(move || theirs.read(&mut word).unwrap()), 0);
}
