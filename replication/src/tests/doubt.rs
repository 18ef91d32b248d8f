//! A guest while nobody can say whose its VM is.

use std::sync::Arc;
use std::time::Duration;

use api::replication::{Cow, RdmaPin, ReplicateData, ReplicationInfo, ReplicationState};
use uuid::Uuid;

use super::fake_backup::{Fake, Session, large_machine, soon, write_all};
use super::pair::Primary;
use crate::error::Error;
use crate::ids::{Generation, PAGE_SIZE};
use crate::observer::Event;
use crate::ownership::{Arbiter, FileArbiter, HostId, Record, Standing};
use crate::testing::Machine;

/// A protected machine whose arbiter goes away.
struct Doubt {
    records: tempfile::TempDir,
    fake: Fake,
    machine: Arc<Machine>,
}

impl Doubt {
    fn new() -> Self {
        let records = tempfile::tempdir().unwrap();
        std::fs::create_dir(records.path().join("here")).unwrap();
        Self { records, fake: Fake::start(), machine: large_machine() }
    }

    /// Protected, with nothing under way.
    fn protected(
        &self,
        with: impl FnOnce(&mut ReplicateData),
        session: impl FnOnce(&Fake) -> Session,
    ) -> (Primary, Session) {
        let url = format!("file:{}", self.records.path().join("here").display());
        let primary = self.fake.protect(&self.machine, |options| {
            options.arbiter = Some(url);
            with(options);
        });
        let mut session = session(&self.fake);
        session.protects();
        let primary = primary.join().unwrap().unwrap();
        primary.events.wait(|event| *event == Event::Synced).unwrap();
        (primary, session)
    }

    /// Protected, with an epoch of nearly all pages under way.
    fn begin(
        &self,
        with: impl FnOnce(&mut ReplicateData),
        session: impl FnOnce(&Fake) -> Session,
    ) -> (Primary, Session) {
        let (primary, mut session) = self.protected(with, session);
        write_all(&self.machine, 1);
        while session.seal().pages[0] < 8000 {}
        (primary, session)
    }

    fn arbiter_moves(&self, from: &str, to: &str) {
        let path = |name| self.records.path().join(name);
        std::fs::rename(path(from), path(to)).unwrap();
    }

    /// The guest runs, unheard, while nobody says whose it is.
    fn runs_in_doubt(&self, primary: &Primary) {
        let is_suspended = |info: &ReplicationInfo| info.state == ReplicationState::Suspended;
        super::until(|| primary.handle.info(), is_suspended);
        soon(|| self.machine.is_running());
        assert!(self.machine.is_holding());
    }
}

/// Also where a person asked for a switch-over whose last epoch is not sealed yet: the backup has nothing of it.
#[test]
fn a_guest_that_waits_for_room_does_not_wait_for_the_arbiter() {
    for hands_over in [false, true] {
        let doubt = Doubt::new();
        // Room for all of memory once, and not twice.
        let room = 10_000 * PAGE_SIZE as u64;
        let (primary, session) = doubt.begin(
            |_| {},
            |fake| {
                let session = fake.session_with(room);
                session.drain();
                session
            },
        );
        write_all(&doubt.machine, 2);
        soon(|| !doubt.machine.is_running());
        doubt.arbiter_moves("here", "away");
        std::thread::scope(|scope| {
            let asked = hands_over.then(|| {
                let asked = scope.spawn(|| primary.handle.failover(false));
                primary.events.wait(is_handing_over).unwrap();
                asked
            });
            drop(session);
            doubt.runs_in_doubt(&primary);
            // Whoever asked does not wait for the arbiter either.
            asked.map(|asked| asked.join().unwrap().unwrap_err());
        });
        doubt.arbiter_moves("away", "here");
        primary.handle.join();
        assert!(doubt.machine.is_running() && !doubt.machine.is_holding());
    }
}

fn drained(fake: &Fake) -> Session {
    let session = fake.session();
    session.drain();
    session
}

fn is_handing_over(event: &Event) -> bool {
    matches!(event, Event::FailoverStarted { .. })
}

/// The last epoch of a switch-over is none, and the arbiter is away.
#[test]
fn a_switch_over_whose_last_epoch_cannot_be_captured_is_told_as_that_at_once() {
    let doubt = Doubt::new();
    let (primary, _session) = doubt.protected(|_| {}, drained);
    doubt.arbiter_moves("here", "away");
    doubt.machine.refuse_captures();
    let error = primary.handle.failover(false).unwrap_err().to_string();
    assert!(error.contains("A vCPU cannot be read"), "{error}");
    let told = primary.events.events();
    assert!(told.iter().any(|event| matches!(event, Event::FailoverFailed { .. })), "{told:?}");
    doubt.runs_in_doubt(&primary);
    doubt.arbiter_moves("away", "here");
    primary.handle.join();
    assert!(doubt.machine.is_running() && !doubt.machine.is_holding());
}

/// The protection is ended in the moment in which the backup turns out to own the VM.
#[test]
fn a_stop_that_meets_the_loss_of_the_vm_is_told_of_it() {
    let doubt = Doubt::new();
    let (primary, session) = doubt.protected(|_| {}, drained);
    let (arrive, arrived) = crossbeam_channel::bounded(1);
    let (go_on, goes_on) = crossbeam_channel::bounded::<()>(0);
    doubt.machine.before_destroy(Box::new(move || {
        arrive.send(()).unwrap();
        // Until the test says so, or has failed.
        let _ = goes_on.recv();
    }));
    let standing = Standing::Solo { owner: HostId(Uuid::new_v4()) };
    let vm = primary.handle.identity().vm;
    let theirs = Record { generation: Generation(2), vm, standing };
    FileArbiter::new(doubt.records.path().join("here"))
        .compare_and_swap(Generation(1), &theirs)
        .unwrap();
    drop(session);
    arrived.recv_timeout(Duration::from_secs(60)).unwrap();
    std::thread::scope(|scope| {
        let before = primary.handle.waiting_inputs();
        let stop = scope.spawn(|| primary.handle.stop());
        soon(|| primary.handle.waiting_inputs() > before);
        drop(go_on);
        let error = stop.join().unwrap().unwrap_err();
        assert!(matches!(error, Error::Conflict(_)), "{error}");
    });
    primary.handle.join();
    assert!(doubt.machine.is_destroyed());
}

/// With `cow=off` a guest stands for as long as its memory is sent as it is, and no longer: once nobody reads
/// it any more it runs, unheard.
#[test]
fn a_guest_whose_epoch_is_not_taken_does_not_wait_for_the_arbiter() {
    let doubt = Doubt::new();
    // Nobody reads the data connection.
    let (primary, session) = doubt.begin(|options| options.cow = Cow::Off, Fake::session);
    assert!(!doubt.machine.is_running());
    doubt.arbiter_moves("here", "away");
    drop(session);
    doubt.runs_in_doubt(&primary);
    doubt.arbiter_moves("away", "here");
    primary.handle.join();
    assert!(doubt.machine.is_running() && !doubt.machine.is_holding());
}

/// Without an arbiter the backup may be told by a person to go on from what it took for a whole epoch: as long as
/// one is read from memory the guest stands, whoever ends its protection.
#[test]
fn a_guest_whose_memory_is_read_stands_until_it_is_not() {
    let (fake, machine) = (Fake::start(), large_machine());
    let primary = fake.protect(&machine, |options| options.cow = Cow::Off);
    // Nobody reads the data connection.
    let mut session = fake.session();
    session.protects();
    let primary = primary.join().unwrap().unwrap();
    primary.events.wait(|event| *event == Event::Synced).unwrap();
    write_all(&machine, 1);
    while session.seal().pages[0] < 8000 {}
    std::thread::scope(|scope| {
        let stop = scope.spawn(|| primary.handle.stop());
        let is_asked = |info: &ReplicationInfo| {
            matches!(info.state, ReplicationState::Suspended | ReplicationState::Stopped)
        };
        super::until(|| primary.handle.info(), is_asked);
        assert!(!machine.is_running());
        drop(session);
        stop.join().unwrap().unwrap();
    });
    primary.handle.join();
    assert!(machine.is_running() && !machine.is_holding());
}

/// The same where TCP is to take over from RDMA, and the backup still hears this side.
#[test]
fn a_guest_whose_epoch_cannot_go_by_rdma_does_not_wait_for_the_arbiter() {
    let doubt = Doubt::new();
    let rdma = doubt.fake.url().replace("tcp:", "rdma:");
    let by_rdma = |options: &mut ReplicateData| {
        options.cow = Cow::Off;
        options.destination_url = rdma;
        options.rdma_device = Some(crate::transport::rdma::FAKE.to_owned());
        options.rdma_pin = Some(RdmaPin::Off);
        (options.fallback, options.reconnect) = (true, true);
        (options.heartbeat_ms, options.timeout_ms) = (50, 2000);
    };
    let (primary, mut session) = doubt.begin(by_rdma, Fake::session);
    doubt.arbiter_moves("here", "away");
    // What it had is unread: the sender finds a connection that was reset.
    session.data.clear();
    let beats = session.beat();
    doubt.runs_in_doubt(&primary);
    assert!(!beats.is_finished(), "only once the backup hears nobody any more");
    doubt.arbiter_moves("away", "here");
    soon(|| !doubt.machine.is_holding());
    primary.handle.stop().unwrap();
    assert!(doubt.machine.is_running());
    beats.join().unwrap();
}
