//! The dirty log misses nothing, and harvesting re-arms it.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{Machine, PAGES, SLOT, WORDS, pages, run_to_out};
use hypervisor::dirty::{RING_ENTRIES, rings_are_sound};
use hypervisor::{Exit, Tracking, VmError, Written};

/// inc dword [edi]; out 0x42, al; inc dword [esi]; out 0x42, al; jmp back to the start
const TWO_PAGES: &[u8] = &[0xff, 0x07, 0xe6, 0x42, 0xff, 0x06, 0xe6, 0x42, 0xeb, 0xf6];

/// Both ways of keeping the log, as far as this KVM has them.
fn trackings() -> Vec<Tracking> {
    let capabilities = common::open().capabilities().clone();
    let both = [Tracking::Bitmap, Tracking::Ring];
    both.into_iter().filter(|tracking| tracking.is_possible(&capabilities)).collect()
}

fn with_pages(first: u64, second: u64, tracking: Tracking) -> Machine {
    let mut machine = Machine::tracked(1, TWO_PAGES, tracking);
    let mut state = machine.vcpus[0].save().unwrap();
    (state.regs.0.rdi, state.regs.0.rsi) = (first * 4096, second * 4096);
    machine.vcpus[0].restore(&state).unwrap();
    machine
}

#[test]
fn a_harvest_reports_what_was_written_since_the_last() {
    for tracking in trackings() {
        let machine = with_pages(300, 511, tracking);
        assert_eq!(machine.vm.dirty_log().tracking(), tracking);
        reports_what_was_written(machine);
    }
}

fn reports_what_was_written(mut machine: Machine) {
    let first = machine.harvest();
    if machine.vm.dirty_log().begins_full() {
        assert_eq!(first.len(), PAGES, "all of a new slot counts as dirty");
    }
    assert!(machine.harvest().is_empty());
    let count = |machine: &Machine| machine.vm.dirty_log().written().unwrap();
    let counts = count(&machine) == Some(0);
    run_to_out(&mut machine.vcpus[0]);
    // Looking changes nothing: the harvest names them all the same.
    assert!(!counts || count(&machine) >= Some(1) && count(&machine) <= Some(3));
    let second = machine.harvest();
    assert!(second.contains(&300), "{second:?}");
    assert!(!second.contains(&511), "{second:?}");
    run_to_out(&mut machine.vcpus[0]);
    let third = machine.harvest();
    assert!(third.contains(&511), "{third:?}");
    assert!(!third.contains(&300), "re-armed by the harvest before: {third:?}");
    for _ in 0..10 {
        run_to_out(&mut machine.vcpus[0]);
        run_to_out(&mut machine.vcpus[0]);
        let both = machine.harvest();
        assert!(both.contains(&300) && both.contains(&511), "{both:?}");
    }
}

#[test]
fn a_write_between_reading_and_clearing_is_not_lost() {
    let mut machine = with_pages(200, 201, Tracking::Bitmap);
    if !machine.vm.capabilities().manual_dirty_log {
        eprintln!("skipped: this KVM has no manual re-arming; reading alone re-arms, in one step");
        return;
    }
    machine.harvest();
    run_to_out(&mut machine.vcpus[0]);
    let mut words = [0; WORDS];
    machine.vm.read_bitmap(SLOT, &mut words).unwrap();
    assert!(pages(&words).contains(&200));
    run_to_out(&mut machine.vcpus[0]);
    machine.vm.clear_bitmap(SLOT, 192, 64, &words[3..4]).unwrap();
    let left = machine.harvest();
    assert!(left.contains(&201), "{left:?}");
    assert!(!left.contains(&200), "{left:?}");
}

#[test]
fn bitmaps_of_another_length_are_refused() {
    let machine = Machine::new(1, &[]);
    assert!(machine.vm.read_bitmap(SLOT, &mut [0; WORDS - 1]).is_err());
    assert!(machine.vm.read_bitmap(SLOT, &mut [0; WORDS + 1]).is_err());
    assert!(machine.vm.read_bitmap(SLOT + 1, &mut [0; WORDS]).is_err());
    assert!(machine.vm.clear_bitmap(SLOT, 0, 65, &[0]).is_err());
}

const FIRST: u32 = 1 << 20;
const MANY: u32 = RING_ENTRIES * 2;

/// mov edi, FIRST; mov ecx, many; again: inc dword [edi]; add edi, 4096; dec ecx; jnz again;
/// out 0x42, al; jmp to the start
fn many_pages(many: u32) -> Vec<u8> {
    let [first, many] = [FIRST, many].map(u32::to_le_bytes);
    let mut code = [&[0xbf], &first[..], &[0xb9], &many[..]].concat();
    code.extend([0xff, 0x07, 0x81, 0xc7, 0, 0x10, 0, 0, 0x49, 0x75, 0xf5, 0xe6, 0x42, 0xeb, 0xe7]);
    code
}

/// Runs to the next write to a port and harvests; the pages from `FIRST` on.
fn round(machine: &mut Machine) -> Result<Vec<u64>, String> {
    // A ring that nobody empties would have it come back for ever.
    for runs in 0.. {
        match machine.vcpus[0].run() {
            Ok(Exit::Again | Exit::Interrupted) => assert!(runs < 100_000, "no way on"),
            Ok(Exit::IoOut { .. }) => break,
            Ok(other) => panic!("{other:?}"),
            Err(error) => return Err(error.to_string()),
        }
    }
    let mut found = vec![];
    let mut note = |written: Written| {
        let bits = (0..64).filter(|bit| written.word >> bit & 1 == 1);
        found.extend(bits.map(|bit| written.first_page + bit));
    };
    machine.vm.dirty_log().harvest(&mut note).map_err(|error| error.to_string())?;
    found.retain(|page| *page >= u64::from(FIRST) / 4096);
    found.sort_unstable();
    Ok(found)
}

/// The guest writes twice as many pages as a ring has entries, in one run. A KVM that stops it in
/// time loses none; one that does not is known beforehand, and its log is an error for good.
#[test]
fn a_full_ring_loses_nothing_in_silence() {
    if !trackings().contains(&Tracking::Ring) {
        eprintln!("skipped: this KVM has no dirty rings");
        return;
    }
    let sound = rings_are_sound(&common::open()).unwrap();
    let memory = u64::from(MANY) * 4096 + (2 << 20);
    let mut machine = Machine::with_memory(1, &many_pages(MANY), Tracking::Ring, memory);
    let first = u64::from(FIRST) / 4096;
    for _ in 0..2 {
        match round(&mut machine) {
            Ok(found) => assert!(found.into_iter().eq(first..first + u64::from(MANY))),
            Err(error) => {
                assert!(!sound, "{error}");
                let later = machine.vm.dirty_log().harvest(&mut |_| ()).unwrap_err();
                assert!(matches!(later, VmError::RingOverflow), "{later}");
                return;
            }
        }
    }
}

/// A signal that is pending ends KVM's reset of rings in the middle (since Linux 6.17), and a thread
/// of ours gets one at any time.
#[test]
fn signals_cut_no_harvest_short() {
    if !trackings().contains(&Tracking::Ring) {
        eprintln!("skipped: this KVM has no dirty rings");
        return;
    }
    common::install_kick();
    let many = RING_ENTRIES / 2;
    let memory = u64::from(MANY) * 4096 + (2 << 20);
    let mut machine = Machine::with_memory(1, &many_pages(many), Tracking::Ring, memory);
    let first = u64::from(FIRST) / 4096;
    let harvester = std::thread::spawn(move || {
        for _ in 0..5 {
            let found = round(&mut machine).unwrap();
            assert!(found.into_iter().eq(first..first + u64::from(many)));
        }
    });
    while !harvester.is_finished() {
        common::kick(&harvester);
        std::thread::sleep(Duration::from_micros(20));
    }
    harvester.join().unwrap();
}

/// What a copy of the memory is that is brought up to date by the pages that harvests name, while
/// the guest runs: the memory, once a harvest found the guest at rest.
#[test]
fn harvests_during_writes_keep_a_copy_true() {
    for tracking in trackings() {
        let mut machine = with_pages(300, 511, tracking);
        machine.harvest();
        let mut vcpu = machine.vcpus.remove(0);
        let mut copy = [300, 511].map(|page| (page, machine.word(page * 4096)));
        let mut update = || {
            let found = machine.harvest();
            for (page, word) in &mut copy {
                if found.contains(&usize::try_from(*page).unwrap()) {
                    *word = machine.word(*page * 4096);
                }
            }
            copy
        };
        for round in 0..300 {
            let over = AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    for _ in 0..round % 7 + 1 {
                        run_to_out(&mut vcpu);
                    }
                    over.store(true, Ordering::Release);
                });
                while !over.load(Ordering::Acquire) {
                    update();
                }
            });
            for (page, word) in update() {
                assert_eq!(word, machine.word(page * 4096), "{tracking:?}, page {page}");
            }
        }
        assert!(copy.iter().all(|(_, word)| *word > 100), "{copy:?}");
    }
}
