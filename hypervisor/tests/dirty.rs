//! The dirty log misses nothing, and harvesting re-arms it.

mod common;

use common::{Machine, PAGES, SLOT, WORDS, pages, run_to_out};

/// inc dword [edi]; out 0x42, al; inc dword [esi]; out 0x42, al; jmp back to the start
const TWO_PAGES: &[u8] = &[0xff, 0x07, 0xe6, 0x42, 0xff, 0x06, 0xe6, 0x42, 0xeb, 0xf6];

fn with_pages(first: u64, second: u64) -> Machine {
    let mut machine = Machine::new(1, TWO_PAGES);
    let mut state = machine.vcpus[0].save().unwrap();
    (state.regs.0.rdi, state.regs.0.rsi) = (first * 4096, second * 4096);
    machine.vcpus[0].restore(&state).unwrap();
    machine
}

#[test]
fn a_harvest_reports_what_was_written_since_the_last() {
    let mut machine = with_pages(300, 511);
    let first = machine.harvest();
    if machine.vm.capabilities().initially_set {
        assert_eq!(first.len(), PAGES, "all of a new slot counts as dirty");
    }
    assert!(machine.harvest().is_empty());
    run_to_out(&mut machine.vcpus[0]);
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
    let mut machine = with_pages(200, 201);
    if !machine.vm.capabilities().manual_dirty_log {
        // Reading alone re-arms there, in one step.
        return;
    }
    machine.harvest();
    run_to_out(&mut machine.vcpus[0]);
    let mut words = [0; WORDS];
    machine.vm.dirty_log(SLOT, &mut words).unwrap();
    assert!(pages(&words).contains(&200));
    run_to_out(&mut machine.vcpus[0]);
    machine.vm.clear_dirty_log(SLOT, 192, 64, &words[3..4]).unwrap();
    let left = machine.harvest();
    assert!(left.contains(&201), "{left:?}");
    assert!(!left.contains(&200), "{left:?}");
}

#[test]
fn bitmaps_of_another_length_are_refused() {
    let machine = Machine::new(1, &[]);
    assert!(machine.vm.dirty_log(SLOT, &mut [0; WORDS - 1]).is_err());
    assert!(machine.vm.harvest_dirty_log(SLOT, &mut [0; WORDS + 1]).is_err());
    assert!(machine.vm.dirty_log(SLOT + 1, &mut [0; WORDS]).is_err());
    assert!(machine.vm.clear_dirty_log(SLOT, 0, 65, &[0]).is_err());
}
