//! How long epochs last where nobody waits for them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use api::replication::{Compression, ReplicateData, ReplicationInfo};

use super::pair::{Backup, Primary, Proxy};
use super::{Random, replicate, until};
use crate::ids::{PAGE_SIZE, PageIndex};
use crate::observer::Event;
use crate::ownership::HostIdentity;
use crate::testing::{Machine, memory};

const PAGES: u64 = 1024;
/// Of an epoch that no test waits for.
const LONG_MS: u64 = 3000;

/// A guest that writes a page and says nothing, until the machine is off.
fn compute(machine: &Arc<Machine>) -> std::thread::JoinHandle<()> {
    let machine = Arc::clone(machine);
    std::thread::spawn(move || {
        let mut turn = 0u8;
        while machine.run(|ram| ram.write_page(PageIndex(1), &[turn; PAGE_SIZE])).is_some() {
            turn = turn.wrapping_add(1);
            std::thread::sleep(Duration::from_micros(500));
        }
    })
}

/// Protects a guest that computes, and waits until its epochs last `interval_ms`.
fn stretched(
    interval_ms: u64,
    change: impl FnOnce(&mut ReplicateData),
) -> (Backup, Arc<Machine>, Primary, std::thread::JoinHandle<()>) {
    let backup = Backup::start(None);
    let machine = Machine::new(memory(&[(0, PAGES)]));
    let mut options = replicate(&backup.url(), None);
    change(&mut options);
    let primary = Primary::with(&machine, options, HostIdentity::random()).unwrap();
    primary.events.wait(|event| *event == Event::Synced).unwrap();
    let guest = compute(&machine);
    until(|| primary.handle.info(), |info| info.epoch_interval_us == interval_ms * 1000);
    (backup, machine, primary, guest)
}

#[test]
fn a_guest_that_only_computes_is_sealed_less_often_until_it_speaks() {
    let (backup, machine, primary, guest) = stretched(40, |_| {});
    let sealed = |info: &ReplicationInfo| info.epoch_sealed;
    let (before, began) = (sealed(&primary.handle.info()), Instant::now());
    std::thread::sleep(Duration::from_millis(500));
    // Slower than that it may be, on a busy host; faster it is not.
    let epochs = sealed(&primary.handle.info()) - before;
    let most = u64::try_from(began.elapsed().as_millis()).unwrap() / 40 + 2;
    assert!((1..=most).contains(&epochs), "{epochs} epochs where {most} were due at most");
    machine.work(0, PageIndex(2), 7).unwrap();
    until(|| primary.handle.info(), |info| info.epoch_interval_us == 5000);
    machine.power_off();
    guest.join().unwrap();
    assert_eq!(backup.wrong(), Vec::<String>::new());
}

#[test]
fn output_of_a_long_epoch_does_not_wait_for_its_end() {
    let (_backup, machine, primary, guest) =
        stretched(LONG_MS, |options| options.epoch_max_ms = Some(LONG_MS));
    let began = Instant::now();
    machine.work(0, PageIndex(2), 7).unwrap();
    until(|| primary.handle.info(), |_| machine.released_count() == 1);
    assert!(began.elapsed() < Duration::from_millis(LONG_MS / 2), "{:?}", began.elapsed());
    machine.power_off();
    guest.join().unwrap();
}

/// What the guest writes is watched: an epoch that grows does not last until it is too large.
#[test]
fn a_long_epoch_ends_when_the_guest_begins_to_write() {
    let (_backup, machine, primary, guest) =
        stretched(LONG_MS, |options| options.epoch_max_ms = Some(LONG_MS));
    let before = primary.handle.info().epoch_sealed;
    let began = Instant::now();
    // 4 MiB of staging: 128 pages are an eighth.
    machine.run(|ram| {
        (2..300).for_each(|page| assert!(ram.write_page(PageIndex(page), &[9; PAGE_SIZE])));
    });
    until(|| primary.handle.info(), |info| info.epoch_sealed > before);
    assert!(began.elapsed() < Duration::from_millis(LONG_MS / 2), "{:?}", began.elapsed());
    until(|| primary.handle.info(), |info| info.epoch_interval_us < LONG_MS * 1000);
    machine.power_off();
    guest.join().unwrap();
}

/// A guest that writes noise to all of its `pages` again and again, as fast as it can at first and one in each
/// `nap` once it is protected, until the machine is off. How long it stood at most.
fn noisy(machine: &Arc<Machine>, pages: u64, nap: Duration) -> std::thread::JoinHandle<Duration> {
    let machine = Arc::clone(machine);
    std::thread::spawn(move || {
        let (mut longest, mut last, mut page) = (Duration::ZERO, Instant::now(), 0);
        let mut noise = Random(7);
        let mut write = |page| {
            let mut bytes = [0; PAGE_SIZE];
            bytes.chunks_mut(8).for_each(|word| word.copy_from_slice(&noise.next().to_le_bytes()));
            machine.run(|ram| ram.write_page(PageIndex(page), &bytes))
        };
        while write(page).is_some() {
            if machine.is_tracking() && !nap.is_zero() {
                std::thread::sleep(nap);
            }
            longest = longest.max(last.elapsed());
            (last, page) = (Instant::now(), (page + 1) % pages);
        }
        longest
    })
}

/// A guest that writes all of its memory again and again, some times faster than the link carries it,
/// stands in small turns while it becomes protected, and not for as long as its memory takes.
#[test]
fn a_copy_catches_up_with_a_guest_that_writes_faster_than_the_link() {
    const PAGES: u64 = 8192;
    const LINK_BYTES_S: u64 = 8 << 20;
    let backup = Backup::start(None);
    let link = Proxy::slow(backup.port(), LINK_BYTES_S);
    let machine = Machine::new(memory(&[(0, PAGES)]));
    let writer = noisy(&machine, PAGES, Duration::from_micros(100));
    // All of it is written before it is copied.
    while machine.ram().written() < PAGES {
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut options = replicate(&link.url(), None);
    (options.connections, options.compression) = (1, Compression::None);
    options.timeout_ms = 20_000;
    let primary = Primary::with(&machine, options, HostIdentity::random()).unwrap();
    primary.events.wait(|event| *event == Event::Synced).unwrap();
    until(|| primary.handle.info(), |info| info.epoch_committed > 2);
    let info = primary.handle.info();
    machine.power_off();
    let longest = writer.join().unwrap();
    // The memory takes 4 s, and once took as long with the guest standing.
    assert!(longest < Duration::from_millis(2000), "the guest stood for {longest:?}");
    assert!(info.throttled_us > 0, "{info:?}");
    assert_eq!(backup.wrong(), Vec::<String>::new());
}

/// The guest stands for most of the time in which a copy catches up with it: whoever ends the replication then
/// ends that, too.
#[test]
fn a_stop_in_a_copy_leaves_the_guest_running() {
    const PAGES: u64 = 2048;
    let backup = Backup::start(None);
    let link = Proxy::slow(backup.port(), 4 << 20);
    let machine = Machine::new(memory(&[(0, PAGES)]));
    let writer = noisy(&machine, PAGES, Duration::ZERO);
    while machine.ram().written() < PAGES {
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut options = replicate(&link.url(), None);
    (options.connections, options.compression) = (1, Compression::None);
    options.timeout_ms = 20_000;
    let primary = Primary::with(&machine, options, HostIdentity::random()).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while machine.is_running() {
        assert!(Instant::now() < deadline, "the guest was never slowed");
        std::thread::sleep(Duration::from_micros(200));
    }
    assert!(primary.handle.info().epoch_sealed == 0, "it is a copy that it stands for");
    primary.handle.stop().unwrap();
    primary.handle.join();
    assert!(machine.is_running(), "the guest stands");
    machine.power_off();
    writer.join().unwrap();
}
