//! Disks whose images are on both sides.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use api::replication::{ReceiveReplicaData, ReplicationState};

use super::pair::{Backup, Primary, Proxy};
use super::{LAYOUT, Random, Workers, receive_options, replicate, until};
use crate::disk::Operation;
use crate::error::Error;
use crate::ids::PageIndex;
use crate::observer::Event;
use crate::ownership::{Arbiter, FileArbiter, HostIdentity, Standing};
use crate::testing::{Machine, MemoryBuilder, MemoryDisks, MemoryImage, Request, memory};

/// The last block of each is not whole.
const SIZES: [usize; 2] = [(3 << 20) + 512 * 7, 150 * 1024];
const STAGING: u64 = 9 << 20;

fn is_synced(event: &Event) -> bool {
    *event == Event::Synced
}

fn is_failed(event: &Event) -> bool {
    matches!(event, Event::ReceiveFailed { .. })
}

/// An image in which some stretches are zero.
fn content(len: usize, seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut bytes = vec![0; len];
    for chunk in bytes.chunks_mut(40_000) {
        if !random.next().is_multiple_of(3) {
            chunk.fill(u8::try_from(random.next() % 255).unwrap());
        }
    }
    bytes
}

pub(super) struct Pair {
    pub(super) disks: Arc<MemoryDisks>,
    pub(super) machine: Arc<Machine>,
    pub(super) images: Vec<Arc<MemoryImage>>,
    pub(super) backup: Backup,
}

fn options(arbiter: Option<&Path>) -> ReceiveReplicaData {
    ReceiveReplicaData { staging_size: STAGING, ..receive_options(arbiter) }
}

/// A machine with disks, and a backup whose images contain something else.
fn pair(arbiter: Option<&Path>, seed: u64) -> Pair {
    pair_with(options(arbiter), seed)
}

fn pair_with(options: ReceiveReplicaData, seed: u64) -> Pair {
    let disks = MemoryDisks::new(SIZES.iter().map(|len| content(*len, seed)).collect());
    let machine = Machine::with_disks(memory(&LAYOUT), Some(Arc::clone(&disks)));
    let images: Vec<_> =
        SIZES.iter().map(|len| MemoryImage::new(content(*len, seed ^ 99))).collect();
    let builder = MemoryBuilder { images: images.clone(), ..MemoryBuilder::default() };
    let backup = Backup::with(builder, options);
    Pair { disks, machine, images, backup }
}

/// Threads of the guest that use the disks, each a part of its own, until the machine is off.
struct Users(Vec<JoinHandle<()>>);

impl Users {
    fn start(pair: &Pair, count: usize, seed: u64) -> Self {
        let start = |user: usize| {
            let (disks, machine) = (Arc::clone(&pair.disks), Arc::clone(&pair.machine));
            let mut random = Random(seed.wrapping_mul(31) ^ (user as u64 + 1));
            std::thread::spawn(move || {
                while disks.request(&machine, &request(&mut random, user, count)).is_some() {
                    std::thread::sleep(std::time::Duration::from_micros(random.next() % 300));
                }
            })
        };
        Self((0..count).map(start).collect())
    }

    fn join(self) {
        self.0.into_iter().for_each(|user| user.join().unwrap());
    }
}

fn request(random: &mut Random, user: usize, users: usize) -> Request {
    let disk = usize::from(random.next().is_multiple_of(4));
    let operation = match random.next() % 10 {
        0 => Operation::Zero { unmap: true },
        1 => Operation::Discard,
        2 => Operation::Flush,
        _ => Operation::Write,
    };
    let sectors = (SIZES[disk] / 512) as u64;
    let (first, part) = (sectors / users as u64 * user as u64, sectors / users as u64);
    let most = if random.next().is_multiple_of(8) { 2048 } else { 40 };
    let len = 1 + random.next() % part.min(most);
    let from = first + random.next() % (part - len + 1);
    let range = if operation == Operation::Flush { 0..0 } else { from * 512..(from + len) * 512 };
    Request { disk, operation, range, fill: u8::try_from(random.next() % 256).unwrap() }
}

#[test]
fn cut_at_random_moments_an_image_is_a_committed_state() {
    const CUTS: u64 = 12;
    let mut random = Random(0xD15C);
    let (mut backups, mut primaries) = (0, 0);
    for seed in 0..CUTS {
        let dir = tempfile::tempdir().unwrap();
        let pair = pair(Some(dir.path()), seed);
        let proxy = Proxy::plain(pair.backup.port());
        let users = Users::start(&pair, 3, seed);
        let workers = Workers::start(&pair.machine, 1, seed);
        let primary = Primary::start(&pair.machine, &proxy.url(), Some(dir.path())).unwrap();
        primary.events.wait(is_synced).unwrap();
        let more = primary.handle.info().epoch_committed + random.next() % 12;
        until(|| primary.handle.info(), |info| info.epoch_committed >= more);
        proxy.cut();
        primary.handle.join();
        assert!(!pair.disks.is_journalled(), "seed {seed}");
        let owner = FileArbiter::new(dir.path().to_owned()).read().unwrap().unwrap();
        if owner.standing == (Standing::Solo { owner: primary.handle.identity().host }) {
            primaries += 1;
            let lost = |event: &Event| matches!(event, Event::OwnershipLost { .. });
            pair.backup.events.wait(lost).unwrap();
            let state = ReplicationState::Disconnected;
            until(|| pair.backup.handle.info(), |info| info.state == state);
            // What is left there is overwritten by the next protection.
            let options = replicate(&pair.backup.url(), Some(dir.path()));
            let again = Primary::with(&pair.machine, options, primary.handle.identity()).unwrap();
            again.events.wait(is_synced).unwrap();
            // By the primary: claimed by the backup, it could find that the primary was faster.
            again.handle.failover(false).unwrap();
            again.handle.join();
        } else {
            backups += 1;
        }
        pair.backup.handle.join();
        assert_eq!(pair.backup.handle.info().state, ReplicationState::TakenOver, "seed {seed}");
        assert!(pair.machine.is_destroyed(), "seed {seed}");
        users.join();
        workers.join();
        // The replica has compared its images with what the machine state says.
        assert_eq!(pair.backup.wrong(), Vec::<String>::new(), "seed {seed}");
        assert!(pair.images.iter().all(|image| image.flushes.load(Ordering::Acquire) > 0));
    }
    assert_eq!(backups + primaries, CUTS);
}

#[test]
fn a_switch_over_hands_over_the_disks() {
    for seed in 0..5 {
        let pair = pair(None, seed);
        let users = Users::start(&pair, 2, seed);
        let primary = Primary::start(&pair.machine, &pair.backup.url(), None).unwrap();
        primary.events.wait(is_synced).unwrap();
        primary.handle.failover(false).unwrap();
        pair.backup.handle.join();
        primary.handle.join();
        assert!(pair.machine.is_destroyed());
        users.join();
        assert_eq!(pair.backup.wrong(), Vec::<String>::new());
        assert!(!pair.disks.is_journalled());
    }
}

#[test]
fn a_first_copy_of_a_quiet_disk_is_the_disk() {
    for flushes in [true, false] {
        quiet_copy(flushes);
    }
}

fn quiet_copy(flushes: bool) {
    let pair = pair(None, 5);
    pair.disks.unflushable.store(!flushes, Ordering::Release);
    let primary = Primary::start(&pair.machine, &pair.backup.url(), None).unwrap();
    primary.events.wait(is_synced).unwrap();
    for (disk, image) in pair.images.iter().enumerate() {
        assert!(image.bytes() == pair.disks.image(disk), "disk {disk}");
    }
    let info = primary.handle.info();
    assert!(info.bytes_raw >= SIZES[1] as u64);
    assert!((info.sync_progress - 1.0).abs() < f64::EPSILON);
    primary.handle.stop().unwrap();
    primary.handle.join();
    assert!(!pair.disks.is_journalled());
}

/// It is marked already, so what takes the mark must not believe that it is a hole still.
#[test]
fn what_is_written_as_a_copy_begins_is_no_hole() {
    let disks = MemoryDisks::new(SIZES.iter().map(|len| vec![0; *len]).collect());
    let machine = Machine::with_disks(memory(&LAYOUT), Some(Arc::clone(&disks)));
    let range = 2 << 20..(2 << 20) + 512;
    let write = Request { disk: 0, operation: Operation::Write, range, fill: 7 };
    let (of, guest) = (Arc::clone(&disks), Arc::clone(&machine));
    let late = move || of.request(&guest, &write).expect("the guest runs");
    *disks.after_flush.lock().unwrap() = Some(Box::new(late));
    let pair = Pair { disks, machine, ..pair(None, 5) };
    let primary = Primary::start(&pair.machine, &pair.backup.url(), None).unwrap();
    primary.events.wait(is_synced).unwrap();
    assert_eq!(pair.disks.image(0)[2 << 20], 7);
    for (disk, image) in pair.images.iter().enumerate() {
        assert!(image.bytes() == pair.disks.image(disk), "disk {disk}");
    }
    primary.handle.stop().unwrap();
    primary.handle.join();
}

#[test]
fn an_image_of_another_size_is_refused_before_a_byte_is_written() {
    for (images, text) in [
        (vec![1 << 20], "replicates 2 disks, the replica has 1"),
        (vec![SIZES[0], SIZES[1] + 512], "must be of the same size"),
    ] {
        let pair = pair(None, 1);
        let images: Vec<_> = images.iter().map(|len| MemoryImage::new(vec![7; *len])).collect();
        let builder = MemoryBuilder { images: images.clone(), ..MemoryBuilder::default() };
        let backup = Backup::with(builder, options(None));
        let error = Primary::start(&pair.machine, &backup.url(), None).err().expect("refused");
        assert!(matches!(&error, Error::Refused(reason) if reason.contains(text)), "{error}");
        assert!(images.iter().all(|image| image.bytes().iter().all(|byte| *byte == 7)));
        assert!(pair.machine.is_running() && !pair.disks.is_journalled());
    }
}

#[test]
fn a_staging_without_room_for_disks_is_refused() {
    let pair = pair(None, 1);
    let builder = MemoryBuilder { images: pair.images.clone(), ..MemoryBuilder::default() };
    let backup = Backup::with(builder, receive_options(None));
    let error = Primary::start(&pair.machine, &backup.url(), None).err().expect("refused");
    assert!(error.to_string().contains("staging_size"), "{error}");
    assert!(pair.machine.is_running() && !pair.disks.is_journalled());
}

#[test]
fn an_image_that_cannot_be_written_ends_the_backup_and_not_the_guest() {
    for arbiter in [true, false] {
        for at in [0, 3, 400] {
            let dir = tempfile::tempdir().unwrap();
            let arbiter = arbiter.then_some(dir.path());
            let pair = pair(arbiter, 8);
            pair.images[0].changes_left.store(at, Ordering::Release);
            let users = Users::start(&pair, 2, 8);
            let primary = Primary::start(&pair.machine, &pair.backup.url(), arbiter).unwrap();
            let told = pair.backup.events.wait(is_failed);
            let Some(Event::ReceiveFailed { error }) = told else { panic!("nobody was told") };
            assert!(error.contains("image of disk 0"), "{error}");
            assert!(error.contains("No space left"), "{error}");
            primary.handle.join();
            let info = primary.handle.info();
            assert!(info.last_error.unwrap().contains("image of disk 0"));
            assert!(pair.machine.is_running() && !pair.machine.is_holding());
            assert!(!pair.disks.is_journalled());
            let state = ReplicationState::Disconnected;
            until(|| pair.backup.handle.info(), |info| info.state == state);
            assert!(pair.backup.handle.failover(true).is_err());
            assert!(pair.backup.log.started.lock().unwrap().is_none());
            pair.machine.power_off();
            users.join();
        }
    }
}

/// An image that fails while the backup is about to take over: the primary goes on.
#[test]
fn a_backup_whose_image_fails_at_last_claims_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let pair = pair(Some(dir.path()), 8);
    let primary = Primary::start(&pair.machine, &pair.backup.url(), Some(dir.path())).unwrap();
    primary.events.wait(is_synced).unwrap();
    pair.images[0].changes_left.store(0, Ordering::Release);
    let busy = pair.images[0].busy.lock().unwrap();
    let write = Request { disk: 0, operation: Operation::Write, range: 0..512, fill: 1 };
    pair.disks.request(&pair.machine, &write).unwrap();
    let seen = primary.handle.info().epoch_committed;
    pair.machine.work(0, PageIndex(3), 1).unwrap();
    until(|| primary.handle.info(), |info| info.epoch_committed > seen);
    let failed = std::thread::scope(|scope| {
        let asked = scope.spawn(|| pair.backup.handle.failover(false));
        pair.backup.events.wait(|event| matches!(event, Event::FailoverStarted { .. })).unwrap();
        drop(busy);
        asked.join().unwrap()
    });
    assert!(failed.unwrap_err().to_string().contains("image of disk 0"));
    primary.handle.join();
    assert!(pair.machine.is_running() && !pair.machine.is_holding());
    let owner = FileArbiter::new(dir.path().to_owned()).read().unwrap().unwrap();
    assert_eq!(owner.standing, Standing::Solo { owner: primary.handle.identity().host });
}

#[test]
fn a_disk_that_cannot_be_read_is_not_protected_and_the_guest_runs_on() {
    let pair = pair(None, 3);
    pair.disks.broken.store(true, Ordering::Release);
    let primary = Primary::start(&pair.machine, &pair.backup.url(), None).unwrap();
    let failed = primary.events.wait(|event| matches!(event, Event::Failed { .. }));
    let Some(Event::Failed { error }) = failed else { panic!("nobody was told") };
    assert!(error.contains("Cannot read disk 0"), "{error}");
    primary.handle.join();
    assert!(pair.machine.is_running() && !pair.disks.is_journalled());
}

#[test]
fn a_backup_that_is_slow_with_its_images_slows_the_guest_and_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let pair = pair(Some(dir.path()), 4);
    let primary = Primary::start(&pair.machine, &pair.backup.url(), Some(dir.path())).unwrap();
    primary.events.wait(is_synced).unwrap();
    let busy = pair.images[0].busy.lock().unwrap();
    let (disks, machine) = (Arc::clone(&pair.disks), Arc::clone(&pair.machine));
    let ended = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let count = Arc::clone(&ended);
    let user = std::thread::spawn(move || {
        let range = 0..1 << 20;
        let write = Request { disk: 0, operation: Operation::Write, range, fill: 9 };
        while disks.request(&machine, &write).is_some() {
            count.fetch_add(1, Ordering::AcqRel);
            machine.work(0, PageIndex(3), 1);
        }
    });
    // More than the log, the staging and what waits for the image can hold is never taken.
    let mut last = 0;
    loop {
        std::thread::sleep(std::time::Duration::from_millis(300));
        let now = ended.load(Ordering::Acquire);
        if now == last {
            break;
        }
        last = now;
    }
    assert!((1..40).contains(&last), "{last} MiB were taken");
    assert_eq!(primary.handle.info().state, ReplicationState::Protected);
    drop(busy);
    until(|| primary.handle.info(), |_| ended.load(Ordering::Acquire) > last + 20);
    pair.backup.handle.failover(false).unwrap();
    primary.handle.join();
    user.join().unwrap();
    assert_eq!(pair.backup.wrong(), Vec::<String>::new());
}

/// A host that makes durable what was written says nothing meanwhile, and may take its time.
#[test]
fn a_backup_that_flushes_for_long_is_waited_for() {
    let mut receive = options(None);
    (receive.heartbeat_ms, receive.timeout_ms) = (50, 300);
    let pair = pair_with(receive, 21);
    let mut options = replicate(&pair.backup.url(), None);
    (options.heartbeat_ms, options.timeout_ms) = (50, 300);
    let primary = Primary::with(&pair.machine, options, HostIdentity::random()).unwrap();
    primary.events.wait(is_synced).unwrap();
    let flushing = pair.images[0].flushing.lock().unwrap();
    let (disks, machine) = (Arc::clone(&pair.disks), Arc::clone(&pair.machine));
    let ended = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let count = Arc::clone(&ended);
    let user = std::thread::spawn(move || {
        let flush = Request { disk: 0, operation: Operation::Flush, range: 0..0, fill: 0 };
        disks.request(&machine, &flush).unwrap();
        let range = 0..1 << 20;
        let write = Request { disk: 0, operation: Operation::Write, range, fill: 9 };
        while disks.request(&machine, &write).is_some() {
            count.fetch_add(1, Ordering::AcqRel);
        }
    });
    // Nothing more is taken: the backup acknowledges no more, for longer than four time-outs.
    let mut last = u64::MAX;
    loop {
        std::thread::sleep(std::time::Duration::from_millis(300));
        let now = ended.load(Ordering::Acquire);
        if now == last {
            break;
        }
        last = now;
    }
    std::thread::sleep(std::time::Duration::from_millis(2400));
    let info = primary.handle.info();
    assert_eq!(info.state, ReplicationState::Protected, "{info:?}");
    drop(flushing);
    until(|| primary.handle.info(), |_| ended.load(Ordering::Acquire) > last + 20);
    pair.machine.power_off();
    user.join().unwrap();
    assert_eq!(pair.backup.wrong(), Vec::<String>::new());
}

/// What a guest has flushed one by one is made durable at once by a backup that takes over: its clients wait.
#[test]
fn a_take_over_flushes_each_image_and_not_as_often_as_the_guest_did() {
    const FLUSHES: usize = 30;
    let dir = tempfile::tempdir().unwrap();
    let pair = pair(Some(dir.path()), 21);
    let primary = Primary::start(&pair.machine, &pair.backup.url(), Some(dir.path())).unwrap();
    primary.events.wait(is_synced).unwrap();
    let flushing = pair.images[0].flushing.lock().unwrap();
    let flush = Request { disk: 0, operation: Operation::Flush, range: 0..0, fill: 0 };
    for _ in 0..FLUSHES {
        pair.disks.request(&pair.machine, &flush).unwrap();
    }
    let write = Request { disk: 0, operation: Operation::Write, range: 0..512, fill: 1 };
    pair.disks.request(&pair.machine, &write).unwrap();
    let more = primary.handle.info().epoch_sealed + 2;
    until(
        || primary.handle.info(),
        |info| {
            pair.machine.work(0, PageIndex(3), 1);
            info.epoch_committed >= more
        },
    );
    let flushes =
        || -> u64 { pair.images.iter().map(|image| image.flushes.load(Ordering::Acquire)).sum() };
    let before = flushes();
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| pair.backup.handle.failover(false));
        pair.backup.events.wait(|event| matches!(event, Event::FailoverStarted { .. })).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(50));
        drop(flushing);
        asked.join().unwrap().unwrap();
    });
    let new = flushes() - before;
    // That which was under way; those before the claim, and before the start.
    assert!(new <= 1 + 2 * SIZES.len() as u64, "{new} flushes");
    assert_eq!(pair.images[0].bytes()[..512], [1; 512]);
    assert_eq!(pair.backup.wrong(), Vec::<String>::new());
    primary.handle.join();
}

#[test]
fn a_log_that_nobody_reads_holds_nobody_up() {
    let dir = tempfile::tempdir().unwrap();
    let records = dir.path().join("records");
    std::fs::create_dir(&records).unwrap();
    let pair = pair(Some(&records), 11);
    let primary = Primary::start(&pair.machine, &pair.backup.url(), Some(&records)).unwrap();
    primary.events.wait(is_synced).unwrap();
    // Nobody can say who owns the VM, for as long as the storage is away.
    let away = dir.path().join("away");
    std::fs::rename(&records, &away).unwrap();
    pair.backup.handle.stop().unwrap();
    primary.events.wait(|e| matches!(e, Event::Undecided { .. })).unwrap();
    let write = Request { disk: 0, operation: Operation::Write, range: 0..1 << 20, fill: 1 };
    for _ in 0..20 {
        pair.disks.request(&pair.machine, &write).unwrap();
    }
    std::fs::rename(&away, &records).unwrap();
    primary.handle.join();
    assert!(pair.machine.is_running() && !pair.disks.is_journalled());
}

#[test]
fn an_epoch_that_does_not_fit_copies_disks_anew_too() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = options(Some(dir.path()));
    options.staging_size = STAGING;
    let disks = MemoryDisks::new(SIZES.iter().map(|len| content(*len, 2)).collect());
    // More memory than the pages' share of the staging.
    let machine = Machine::with_disks(memory(&[(0, 4096)]), Some(Arc::clone(&disks)));
    let images: Vec<_> = SIZES.iter().map(|len| MemoryImage::new(content(*len, 77))).collect();
    let builder =
        MemoryBuilder { images: images.clone(), lenient: true, ..MemoryBuilder::default() };
    let backup = Backup::with(builder, options);
    let pair = Pair { disks, machine, images, backup };
    let users = Users::start(&pair, 2, 6);
    let mut options = replicate(&pair.backup.url(), Some(dir.path()));
    options.epoch_ms = 50;
    let primary = Primary::with(&pair.machine, options, HostIdentity::random()).unwrap();
    primary.events.wait(is_synced).unwrap();
    for fill in 1..=2u8 {
        // One step: no epoch can be between its writes.
        pair.machine.run(|ram| {
            for page in 1..4096 {
                assert!(ram.write_page(PageIndex(page), &[fill; crate::ids::PAGE_SIZE]));
            }
        });
        let anew = |event: &Event| matches!(event, Event::Resynced);
        primary.events.wait_times(fill.into(), anew).expect("it does not fit");
    }
    // By the primary: claimed by the backup, it could find that the primary was faster.
    primary.handle.failover(false).unwrap();
    primary.handle.join();
    users.join();
    assert_eq!(pair.backup.wrong(), Vec::<String>::new());
}
