//! A backup that keeps to the frames and does what a test tells it: the primary must come out of
//! it with a guest that runs, and with an error that says why.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use api::replication::{Compression, Cow, ReplicateData, ReplicationState};
use uuid::Uuid;

use super::pair::Primary;
use super::{Workers, cpu_ticks, replicate, small_machine};
use crate::error::Error;
use crate::ids::{EpochId, Generation, PAGE_SIZE, PageIndex};
use crate::observer::Event;
use crate::ownership::{Arbiter, FileArbiter, HostId, HostIdentity, Record, Standing, VmId};
use crate::protocol::backup::Handover;
use crate::testing::{Machine, counters, memory};
use crate::wire::{FrameReader, FrameWriter, Message, Seal, SessionId, Welcome, WireError};

const G1: Generation = Generation(1);
const STAGING_BYTES: u64 = 256 << 20;

pub(super) struct Fake {
    listener: TcpListener,
}

/// A primary that was welcomed.
pub(super) struct Session {
    reader: FrameReader<TcpStream>,
    writer: FrameWriter<TcpStream>,
    pub(super) data: Vec<TcpStream>,
}

impl Fake {
    pub(super) fn start() -> Self {
        Self { listener: TcpListener::bind("127.0.0.1:0").unwrap() }
    }

    pub(super) fn url(&self) -> String {
        format!("tcp:{}", self.listener.local_addr().unwrap())
    }

    /// Protects `machine` aside: the call returns only once there is an answer.
    pub(super) fn protect(
        &self,
        machine: &Arc<Machine>,
        change: impl FnOnce(&mut ReplicateData),
    ) -> JoinHandle<Result<Primary, Error>> {
        let mut options = replicate(&self.url(), None);
        options.connections = 1;
        // What is to fill a socket must not shrink on its way.
        options.compression = Compression::None;
        change(&mut options);
        let machine = Arc::clone(machine);
        std::thread::spawn(move || Primary::with(&machine, options, HostIdentity::random()))
    }

    pub(super) fn greeted(&self) -> (FrameReader<TcpStream>, SessionId) {
        let (stream, _) = self.listener.accept().unwrap();
        let mut reader = FrameReader::new(stream, None);
        let hello = Message::receive(&mut reader, &mut Vec::new()).unwrap();
        assert!(matches!(hello, Message::Hello(_)), "{hello:?}");
        let session = reader.session().unwrap();
        (reader, session)
    }

    pub(super) fn welcome() -> Message {
        Self::welcome_with(STAGING_BYTES)
    }

    pub(super) fn welcome_with(staging_bytes: u64) -> Message {
        Message::Welcome(Welcome {
            host: Uuid::new_v4(),
            staging_bytes,
            heartbeat_ms: 200,
            timeout_ms: 5000,
            has_base: false,
        })
    }

    /// Welcomes a primary and takes its one data connection.
    pub(super) fn session(&self) -> Session {
        self.session_with(STAGING_BYTES)
    }

    pub(super) fn session_with(&self, staging_bytes: u64) -> Session {
        let (mut reader, session) = self.greeted();
        let offer = Message::receive(&mut reader, &mut Vec::new()).unwrap();
        assert!(matches!(offer, Message::Offer(_)), "{offer:?}");
        let mut writer = FrameWriter::new(reader.get_ref().try_clone().unwrap(), session);
        Self::welcome_with(staging_bytes).send(&mut writer).unwrap();
        let (data, _) = self.greeted();
        let data = vec![data.get_ref().try_clone().unwrap()];
        Session { reader, writer, data }
    }
}

impl Session {
    /// Reads away whatever comes on the data connections.
    pub(super) fn drain(&self) {
        for stream in &self.data {
            let mut stream = stream.try_clone().unwrap();
            std::thread::spawn(move || {
                let mut buffer = vec![0; 1 << 20];
                while matches!(stream.read(&mut buffer), Ok(1..)) {}
            });
        }
    }

    pub(super) fn next(&mut self) -> Message {
        loop {
            match Message::receive(&mut self.reader, &mut Vec::new()).unwrap() {
                Message::Heartbeat | Message::Progress(_) => {}
                word => return word,
            }
        }
    }

    pub(super) fn seal(&mut self) -> Seal {
        loop {
            match self.next() {
                Message::Seal(seal) => return seal,
                Message::Paired(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    pub(super) fn say(&mut self, message: &Message) {
        message.send(&mut self.writer).unwrap();
    }

    pub(super) fn ack(&mut self, seal: &Seal) {
        self.say(&Message::Ack { epoch: seal.epoch, generation: seal.generation });
    }

    /// Acknowledges the first epoch.
    pub(super) fn protects(&mut self) {
        let seal = self.seal();
        assert_eq!(seal.epoch, EpochId(1));
        self.ack(&seal);
    }

    /// Whether something else than heartbeats comes within `time`.
    pub(super) fn hears_within(&mut self, time: Duration) -> Option<Message> {
        let until = Instant::now() + time;
        self.reader.get_ref().set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        while Instant::now() < until {
            match Message::receive(&mut self.reader, &mut Vec::new()) {
                Ok(Message::Heartbeat | Message::Progress(_)) | Err(WireError::Io(_)) => {}
                Ok(word) => return Some(word),
                Err(error) => panic!("{error}"),
            }
        }
        self.reader.get_ref().set_read_timeout(None).unwrap();
        None
    }

    /// A heart that beats, whatever the test does.
    pub(super) fn beat(self) -> JoinHandle<()> {
        let Self { reader, mut writer, data } = self;
        std::thread::spawn(move || {
            while Message::Heartbeat.send(&mut writer).is_ok() {
                std::thread::sleep(Duration::from_millis(20));
            }
            drop((reader, data));
        })
    }
}

fn is_failed(event: &Event) -> bool {
    matches!(event, Event::Failed { .. })
}

fn is_degraded(event: &Event) -> bool {
    matches!(event, Event::Degraded { .. })
}

/// Memory that no socket buffer holds.
pub(super) fn large_machine() -> Arc<Machine> {
    Machine::new(memory(&[(0, 8192)]))
}

pub(super) fn write_all(machine: &Machine, fill: u8) {
    machine.run(|ram| {
        for page in 1..ram.pages() {
            assert!(ram.write_page(PageIndex(page), &[fill; PAGE_SIZE]));
        }
    });
}

fn hurried(options: &mut ReplicateData) {
    (options.heartbeat_ms, options.timeout_ms) = (50, 300);
}

/// Thirty time-outs are 4.5 s.
fn very_hurried(options: &mut ReplicateData) {
    (options.heartbeat_ms, options.timeout_ms) = (50, 150);
}

/// A backup whose device fails closes the data connection, and says why on the control connection.
#[test]
fn a_data_connection_that_fails_is_explained_by_the_backup() {
    let fake = Fake::start();
    let machine = small_machine();
    let protecting = fake.protect(&machine, |_| {});
    let (mut reader, session) = fake.greeted();
    Message::receive(&mut reader, &mut Vec::new()).unwrap();
    // Nobody takes the data connection.
    drop(fake);
    let mut writer = FrameWriter::new(reader.get_ref().try_clone().unwrap(), session);
    Fake::welcome().send(&mut writer).unwrap();
    Message::Heartbeat.send(&mut writer).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    Message::Abort("there is no such device".to_owned()).send(&mut writer).unwrap();
    let error = protecting.join().unwrap().err().unwrap();
    assert_eq!(error.to_string(), "The backup refused the replica: there is no such device");
    assert!(machine.is_running() && !machine.is_holding());
}

/// As long as a data connection is not made, be it that a device hangs, this side must not seem dead.
#[test]
fn the_heart_beats_while_data_connections_are_made() {
    let fake = Fake::start();
    let machine = small_machine();
    let protecting = fake.protect(&machine, |options| options.heartbeat_ms = 20);
    let (mut reader, session) = fake.greeted();
    Message::receive(&mut reader, &mut Vec::new()).unwrap();
    // One connection waits to be taken, and there is no room for another.
    nix::sys::socket::listen(&fake.listener, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
    let waits = TcpStream::connect(fake.listener.local_addr().unwrap()).unwrap();
    let mut writer = FrameWriter::new(reader.get_ref().try_clone().unwrap(), session);
    Fake::welcome().send(&mut writer).unwrap();
    for _ in 0..5 {
        assert_eq!(Message::receive(&mut reader, &mut Vec::new()).unwrap(), Message::Heartbeat);
    }
    assert!(!protecting.is_finished());
    drop((waits, fake, reader, writer));
    assert!(protecting.join().unwrap().is_err());
}

#[test]
fn one_that_accepts_and_never_welcomes_is_given_up() {
    let fake = Fake::start();
    let machine = small_machine();
    let primary = fake.protect(&machine, hurried);
    let connection = fake.greeted();
    // Here or to the observer, as the two limits fall.
    let error = match primary.join().unwrap() {
        Err(error) => error.chain(),
        Ok(primary) => match primary.events.wait(is_failed) {
            Some(Event::Failed { error }) => error,
            other => panic!("{other:?}"),
        },
    };
    assert!(error.contains("silent for 1000 ms"), "{error}");
    assert!(machine.is_running() && !machine.is_tracking());
    drop(connection);
}

/// Its heart beats, and it is ready for nothing.
#[test]
fn one_that_only_lives_when_it_is_greeted_is_given_up() {
    let fake = Fake::start();
    let machine = small_machine();
    let primary = fake.protect(&machine, very_hurried);
    let (mut reader, session) = fake.greeted();
    Message::receive(&mut reader, &mut Vec::new()).unwrap();
    let mut writer = FrameWriter::new(reader.get_ref().try_clone().unwrap(), session);
    let beats = std::thread::spawn(move || {
        while Message::Heartbeat.send(&mut writer).is_ok() {
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    let primary = primary.join().unwrap().unwrap();
    let Some(Event::Failed { error }) = primary.events.wait(is_failed) else { panic!("not told") };
    assert!(error.contains("neither takes nor refuses the VM within 4.5 s"), "{error}");
    assert!(machine.is_running() && !machine.is_tracking());
    beats.join().unwrap();
}

#[test]
fn one_that_builds_for_longer_than_the_timeout_is_waited_for() {
    let fake = Fake::start();
    let machine = small_machine();
    let primary = fake.protect(&machine, hurried);
    let (mut reader, session) = fake.greeted();
    Message::receive(&mut reader, &mut Vec::new()).unwrap();
    let mut writer = FrameWriter::new(reader.get_ref().try_clone().unwrap(), session);
    for _ in 0..15 {
        Message::Heartbeat.send(&mut writer).unwrap();
        std::thread::sleep(Duration::from_millis(100));
    }
    Fake::welcome().send(&mut writer).unwrap();
    let data = fake.greeted();
    let primary = primary.join().unwrap().unwrap();
    primary.handle.stop().unwrap();
    assert!(!primary.events.events().iter().any(is_failed));
    drop(data);
}

#[test]
fn one_of_another_version_is_named() {
    let fake = Fake::start();
    let machine = small_machine();
    let primary = fake.protect(&machine, |_| {});
    let (mut reader, session) = fake.greeted();
    Message::receive(&mut reader, &mut Vec::new()).unwrap();
    let mut bytes = Vec::new();
    Fake::welcome().send(&mut FrameWriter::new(&mut bytes, session)).unwrap();
    bytes[4] = 77;
    reader.get_ref().write_all(&bytes).unwrap();
    let error = primary.join().unwrap().err().expect("another version");
    assert!(matches!(error, Error::Wire(WireError::Version { theirs: 77 })), "{error:?}");
    assert!(machine.is_running() && !machine.is_tracking());
}

#[test]
fn one_that_lives_but_takes_nothing_is_given_up() {
    let fake = Fake::start();
    let machine = large_machine();
    write_all(&machine, 1);
    let primary = fake.protect(&machine, hurried);
    let beats = fake.session().beat();
    let primary = primary.join().unwrap().unwrap();
    let failed = primary.events.wait(is_failed);
    let Some(Event::Failed { error }) = failed else { panic!("nobody was told") };
    assert!(error.contains("neither takes nor acknowledges"), "{error}");
    primary.handle.join();
    assert!(machine.is_running() && !machine.is_holding() && !machine.is_tracking());
    beats.join().unwrap();
}

/// A backup whose disk is slow: it takes nothing for longer than one that is dead, but says that it
/// goes on with what it has. Then it stops.
#[test]
fn one_that_is_slow_is_waited_for_as_long_as_it_says_that_it_goes_on() {
    let fake = Fake::start();
    let machine = large_machine();
    write_all(&machine, 1);
    let primary = fake.protect(&machine, hurried);
    let Session { reader, mut writer, data } = fake.session();
    let primary = primary.join().unwrap().unwrap();
    // Four time-outs are 1200 ms.
    let until = Instant::now() + Duration::from_millis(3000);
    let mut bytes = 0;
    while Instant::now() < until {
        bytes += 1;
        Message::Progress(bytes).send(&mut writer).unwrap();
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(!primary.events.events().iter().any(is_failed), "{:?}", primary.events.events());
    while Message::Progress(bytes).send(&mut writer).is_ok() {
        std::thread::sleep(Duration::from_millis(20));
    }
    let Some(Event::Failed { error }) = primary.events.wait(is_failed) else { panic!("not told") };
    assert!(error.contains("neither takes nor acknowledges"), "{error}");
    primary.handle.join();
    drop((reader, data));
}

/// Says ten times in each time-out that it goes on, and does nothing else.
fn only_says_so(session: Session) -> JoinHandle<()> {
    let Session { reader, mut writer, data } = session;
    std::thread::spawn(move || {
        let mut bytes = 0;
        while Message::Progress(bytes).send(&mut writer).is_ok() {
            bytes += 1;
            std::thread::sleep(Duration::from_millis(15));
        }
        drop((reader, data));
    })
}

#[test]
fn one_that_takes_nothing_and_says_that_it_goes_on_is_given_up() {
    let fake = Fake::start();
    let machine = large_machine();
    write_all(&machine, 1);
    let primary = fake.protect(&machine, very_hurried);
    let words = only_says_so(fake.session());
    let primary = primary.join().unwrap().unwrap();
    let Some(Event::Failed { error }) = primary.events.wait(is_failed) else { panic!("not told") };
    assert!(error.contains("says that it goes on"), "{error}");
    primary.handle.join();
    assert!(machine.is_running() && !machine.is_holding() && !machine.is_tracking());
    words.join().unwrap();
}

#[test]
fn one_that_acknowledges_nothing_and_says_that_it_goes_on_is_given_up() {
    let fake = Fake::start();
    let machine = small_machine();
    let primary = fake.protect(&machine, very_hurried);
    let session = fake.session();
    session.drain();
    let words = only_says_so(session);
    let primary = primary.join().unwrap().unwrap();
    let degraded = primary.events.wait(is_degraded);
    let Some(Event::Degraded { reason, .. }) = degraded else { panic!("nobody was told") };
    assert!(reason.contains("says that it goes on"), "{reason}");
    primary.handle.join();
    assert!(machine.is_running() && !machine.is_holding());
    words.join().unwrap();
}

#[test]
fn one_that_lives_but_acknowledges_nothing_is_given_up() {
    let fake = Fake::start();
    let machine = small_machine();
    let primary = fake.protect(&machine, hurried);
    let session = fake.session();
    session.drain();
    let beats = session.beat();
    let primary = primary.join().unwrap().unwrap();
    let degraded = primary.events.wait(is_degraded);
    let Some(Event::Degraded { reason, .. }) = degraded else { panic!("nobody was told") };
    assert!(reason.contains("neither takes nor acknowledges"), "{reason}");
    primary.handle.join();
    assert!(machine.is_running() && !machine.is_holding());
    beats.join().unwrap();
}

/// A device fails, or one connection of several, and the host lives: the primary says which it was, before
/// it would give up a backup that does nothing.
#[test]
fn one_whose_data_connection_ends_while_its_heart_beats_is_lost() {
    let fake = Fake::start();
    let machine = small_machine();
    let primary = fake.protect(&machine, hurried);
    let mut session = fake.session();
    session.drain();
    let primary = primary.join().unwrap().unwrap();
    session.protects();
    session.data[0].shutdown(Shutdown::Both).unwrap();
    let beats = session.beat();
    // What the guest writes is what its sender stumbles over.
    let workers = Workers::start(&machine, 1, 7);
    let degraded = primary.events.wait(is_degraded);
    let Some(Event::Degraded { reason, .. }) = degraded else { panic!("nobody was told") };
    assert!(reason.contains("The connection failed"), "{reason}");
    primary.handle.join();
    assert!(machine.is_running() && !machine.is_holding());
    machine.power_off();
    workers.join();
    beats.join().unwrap();
}

#[test]
fn one_that_is_lost_during_the_first_copy_leaves_the_guest_as_it_was() {
    let fake = Fake::start();
    let machine = large_machine();
    write_all(&machine, 1);
    let primary = fake.protect(&machine, |_| {});
    let session = fake.session();
    let primary = primary.join().unwrap().unwrap();
    drop(session);
    primary.events.wait(is_failed).expect("it was told");
    primary.handle.join();
    assert!(machine.is_running() && !machine.is_holding() && !machine.is_tracking());
    assert_eq!(primary.handle.info().state, ReplicationState::Stopped);
}

#[test]
fn one_that_dies_with_epochs_in_flight_costs_no_output() {
    for arbiter in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let fake = Fake::start();
        let machine = small_machine();
        let url = format!("file:{}", dir.path().display());
        let primary = fake.protect(&machine, |options| {
            options.arbiter = arbiter.then_some(url);
        });
        let mut session = fake.session();
        session.drain();
        session.protects();
        let primary = primary.join().unwrap().unwrap();
        primary.events.wait(|event| *event == Event::Synced).unwrap();
        let workers = Workers::start(&machine, 3, 4);
        // As many as may be in flight, and never more.
        assert_eq!(session.seal().epoch, EpochId(2));
        assert_eq!(session.seal().epoch, EpochId(3));
        let more = session.hears_within(Duration::from_millis(200));
        assert!(more.is_none(), "{more:?}");
        let info = primary.handle.info();
        assert_eq!((info.epoch_sealed, info.epoch_committed), (3, 1));
        drop(session);
        primary.handle.join();
        assert!(machine.is_running() && !machine.is_holding());
        machine.power_off();
        workers.join();
        // Every word that the guest said has left, what was in flight among it.
        assert_eq!(machine.released()[..3], counters(machine.ram())[..3]);
    }
}

/// Acknowledges what comes until it is told of a copy anew. From then on it only says how often it said something.
fn never_gets_ready(session: Session, word: impl Fn(u64) -> Message + Send + 'static) {
    session.drain();
    let Session { mut reader, mut writer, data } = session;
    let (heard, hears) = crossbeam_channel::unbounded();
    std::thread::spawn(move || {
        while let Ok(message) = Message::receive(&mut reader, &mut Vec::new()) {
            heard.send(message).unwrap();
        }
    });
    std::thread::spawn(move || {
        let (mut said, mut is_told) = (0, false);
        loop {
            let answer = match hears.recv_timeout(Duration::from_millis(15)) {
                Ok(Message::Seal(Seal { epoch, generation, .. })) if !is_told => {
                    Message::Ack { epoch, generation }
                }
                Ok(Message::Resync) => {
                    is_told = true;
                    continue;
                }
                Ok(_) => continue,
                Err(_) if is_told => word(said),
                Err(_) => Message::Heartbeat,
            };
            said += 1;
            if answer.send(&mut writer).is_err() {
                break;
            }
        }
        drop(data);
    });
}

/// It was told of a copy anew, lives on, and never says that it is ready for that.
#[test]
fn one_that_never_gets_ready_for_a_copy_anew_is_given_up_and_called_again() {
    type Case = (fn(&mut ReplicateData), fn(u64) -> Message, &'static str);
    let cases: [Case; 2] = [
        (hurried, |_| Message::Heartbeat, "does not get ready for a copy anew"),
        (very_hurried, Message::Progress, "says that it goes on"),
    ];
    for (pace, word, reason) in cases {
        let fake = Fake::start();
        let machine = large_machine();
        let primary = fake.protect(&machine, |options| {
            pace(options);
            options.reconnect = true;
        });
        never_gets_ready(fake.session_with(4 << 20), word);
        let primary = primary.join().unwrap().unwrap();
        primary.events.wait(|event| *event == Event::Synced).unwrap();
        fake.listener.set_nonblocking(true).unwrap();
        // More than the backup takes in an epoch.
        write_all(&machine, 1);
        let is_so = |event: &Event| matches!(event, Event::Degraded { reason: why, .. } if why.contains(reason));
        assert!(primary.events.wait(is_so).is_some(), "{:?}", primary.events.events());
        soon(|| fake.listener.accept().is_ok());
        primary.handle.stop().unwrap();
        assert!(machine.is_running() && !machine.is_holding());
    }
}

#[test]
fn one_that_is_ready_for_a_copy_unasked_is_lost() {
    let fake = Fake::start();
    let machine = small_machine();
    let primary = fake.protect(&machine, |_| {});
    let mut session = fake.session();
    session.drain();
    session.protects();
    let primary = primary.join().unwrap().unwrap();
    primary.events.wait(|event| *event == Event::Synced).unwrap();
    let failed = std::thread::scope(|scope| {
        let asked = scope.spawn(|| primary.handle.failover(false));
        while session.seal().handover == Handover::No {}
        session.say(&Message::ResyncReady);
        asked.join().unwrap()
    });
    assert!(failed.unwrap_err().to_string().contains("not told of"));
    primary.events.wait(|event| matches!(event, Event::Undecided { .. })).unwrap();
    assert_eq!(primary.handle.info().state, ReplicationState::Suspended);
    primary.handle.stop().unwrap();
    assert!(machine.is_running() && !machine.is_holding());
}

#[test]
fn one_that_is_lost_before_the_last_epoch_of_a_switch_over_has_nothing_to_run() {
    let fake = Fake::start();
    let machine = small_machine();
    let primary = fake.protect(&machine, |_| {});
    let mut session = fake.session();
    session.drain();
    session.protects();
    let primary = primary.join().unwrap().unwrap();
    primary.events.wait(|event| *event == Event::Synced).unwrap();
    machine.work(0, PageIndex(3), 1).unwrap();
    // This one is in flight, so the last one cannot be sealed.
    assert_eq!(session.seal().handover, Handover::No);
    let failed = std::thread::scope(|scope| {
        let asked = scope.spawn(|| primary.handle.failover(false));
        primary.events.wait(|event| matches!(event, Event::FailoverStarted { .. })).unwrap();
        drop(session);
        asked.join().unwrap()
    });
    failed.unwrap_err();
    primary.handle.join();
    let told = primary.events.events();
    assert!(told.iter().any(is_degraded), "{told:?}");
    assert!(!told.iter().any(|event| matches!(event, Event::Undecided { .. })), "{told:?}");
    assert!(machine.is_running() && !machine.is_holding());
}

#[test]
fn an_acknowledgement_before_all_is_sent_seals_no_empty_epoch() {
    let fake = Fake::start();
    let machine = large_machine();
    let primary = fake.protect(&machine, |options| options.cow = Cow::Off);
    let mut session = fake.session();
    // The first copy is all zero: it needs no reading.
    session.protects();
    let primary = primary.join().unwrap().unwrap();
    primary.events.wait(|event| *event == Event::Synced).unwrap();
    write_all(&machine, 3);
    let full = loop {
        let seal = session.seal();
        session.ack(&seal);
        if seal.pages[0] > 8000 {
            break seal;
        }
    };
    let word = session.hears_within(Duration::from_millis(600));
    assert_eq!(word.map(|word| word.kind()), None, "after epoch {}", full.epoch);
    assert!(!machine.is_running(), "its pages are still being sent");
    session.drain();
    machine.work(0, PageIndex(3), 1).unwrap();
    let seal = session.seal();
    assert_eq!(seal.epoch, full.epoch.next());
    session.ack(&seal);
    primary.handle.stop().unwrap();
    // One pause for each epoch; the last may have ended with the protection.
    let (pauses, sealed) = (primary.handle.pauses(), primary.handle.info().epoch_sealed);
    assert!((sealed - 1..=sealed).contains(&pauses), "{pauses} pauses in {sealed} epochs");
}

/// Waits for what comes by itself.
pub(super) fn soon(is_so: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < Duration::from_secs(60), "it does not come about");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_record_of_another_vm_leaves_one_that_was_never_protected_alone() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start();
    let machine = large_machine();
    write_all(&machine, 1);
    let url = format!("file:{}", dir.path().display());
    let primary = fake.protect(&machine, |options| options.arbiter = Some(url));
    let session = fake.session();
    let primary = primary.join().unwrap().unwrap();
    // While this one copies, another VM is protected with the same directory.
    let standing = Standing::Solo { owner: HostId(Uuid::new_v4()) };
    let other = Record { generation: G1, vm: VmId(Uuid::new_v4()), standing };
    let arbiter = FileArbiter::new(dir.path().to_owned());
    arbiter.compare_and_swap(Generation(0), &other).unwrap();
    session.drain();
    let failed = primary.events.wait(is_failed);
    let Some(Event::Failed { error }) = failed else { panic!("{:?}", primary.events.events()) };
    assert!(error.contains(&other.to_string()), "{error}");
    assert!(machine.is_running() && !machine.is_holding() && !machine.is_destroyed());
    drop(session);
    primary.handle.join();
}

#[test]
fn a_pending_claim_costs_no_processor_time_though_the_backup_is_silent() {
    let dir = tempfile::tempdir().unwrap();
    let records = dir.path().join("records");
    std::fs::create_dir(&records).unwrap();
    let fake = Fake::start();
    let machine = small_machine();
    let url = format!("file:{}", records.display());
    let primary = fake.protect(&machine, |options| {
        hurried(options);
        options.arbiter = Some(url);
    });
    let mut session = fake.session();
    session.drain();
    session.protects();
    let primary = primary.join().unwrap().unwrap();
    primary.events.wait(|event| *event == Event::Synced).unwrap();
    let away = dir.path().join("away");
    std::fs::rename(&records, &away).unwrap();
    std::thread::scope(|scope| {
        let stop = scope.spawn(|| primary.handle.stop());
        primary.events.wait(|event| matches!(event, Event::Undecided { .. })).unwrap();
        let before = cpu_ticks("repl-engine");
        std::thread::sleep(Duration::from_millis(1500));
        let spent = cpu_ticks("repl-engine") - before;
        assert!(spent < 15, "{spent} ticks of 10 ms while nothing happened");
        std::fs::rename(&away, &records).unwrap();
        // Whoever asked may have lost patience; the claim goes on.
        drop(stop.join().unwrap());
    });
    primary.events.wait(|event| *event == Event::Stopped).unwrap();
    assert!(machine.is_running() && !machine.is_holding());
}
