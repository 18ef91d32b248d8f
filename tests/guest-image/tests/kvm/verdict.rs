//! The guest's verdict can fail: each test changes memory behind the guest's back, in one of the
//! ways in which a replica could be wrong, and wants to see just that reported.

use crate::machine::{Ended, Machine};
use guest_logic::machine::PAGE_SIZE;
use guest_logic::page::{self, PageId, WORDS};
use guest_logic::table::Entries;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

const SEED: u64 = 5;
const OPTIONS: &str = "workload=verify seed=5 verify_mib=4 verify_rate=400 tick_ms=20";

/// A machine whose working area has been filled, paused.
fn filled(vcpus: u64) -> Machine {
    let mut machine = Machine::start(vcpus, 256, OPTIONS);
    machine.wait_for("verify filled");
    machine.pause(u64::MAX);
    machine
}

/// Lets the machine go on and asks for its verdict, which is to be a failure of this kind.
fn expect_failure(mut machine: Machine, kind: &str, address: Option<u64>) {
    machine.resume();
    machine.type_in("q");
    assert_eq!(machine.wait_for_end(), Ended::PowerOff, "{machine}");
    println!("{}", machine.lines.join("\n"));
    let failed = machine.lines.iter().find(|line| line.starts_with("VERIFY FAILED"));
    let failed = failed.unwrap_or_else(|| panic!("nothing was found: {machine}"));
    assert!(failed.contains(&format!("kind={kind}")), "{machine}");
    if let Some(address) = address {
        assert!(failed.contains(&format!("addr={address:#x} ")), "{machine}");
    }
    assert!(machine.lines.last().unwrap().starts_with("VERDICT failed n="), "{machine}");
}

fn read_page(machine: &Machine, address: u64) -> Box<page::Page> {
    let mut bytes = [0; WORDS * 8];
    machine.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
    let mut page = Box::new([0; WORDS]);
    for (word, bytes) in page.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = u64::from_le_bytes(bytes.try_into().unwrap());
    }
    page
}

fn write_page(machine: &Machine, address: u64, page: &page::Page) {
    let bytes: Vec<u8> = page.iter().flat_map(|word| word.to_le_bytes()).collect();
    machine.memory.write_slice(&bytes, GuestAddress(address)).unwrap();
}

fn pages(machine: &Machine) -> impl Iterator<Item = u64> {
    let end = machine.memory.last_addr().0;
    (0..end / PAGE_SIZE).map(|index| index * PAGE_SIZE)
}

/// Address and generation of every page of the working area, recognised by its content.
fn working_area(machine: &Machine) -> Vec<(PageId, u32)> {
    let judged = pages(machine).filter_map(|address| {
        let page = read_page(machine, address);
        let owner = u32::try_from(page[1] & 0xffff_ffff).ok()?;
        let id = PageId { address, owner, seed: SEED };
        let generation = u32::try_from(page[2]).ok()?;
        page::holds(&page, id, generation).then_some((id, generation))
    });
    judged.collect()
}

/// A page that no vCPU was just writing: one in the middle of its owner's share.
fn some_page(machine: &Machine) -> (PageId, u32) {
    let area = working_area(machine);
    assert!(area.len() >= 1020, "{} pages", area.len());
    area[area.len() / 2]
}

#[test]
fn a_flipped_bit_is_torn() {
    for vcpus in [1, 2, 4] {
        let machine = filled(vcpus);
        let (id, _) = some_page(&machine);
        let mut page = read_page(&machine, id.address);
        page[WORDS - 1] ^= 1 << 63;
        write_page(&machine, id.address, &page);
        expect_failure(machine, "torn", Some(id.address));
    }
}

#[test]
fn half_of_an_older_page_is_torn() {
    let machine = filled(2);
    let (id, generation) = some_page(&machine);
    let mut page = read_page(&machine, id.address);
    let mut older = [0; WORDS];
    page::write(&mut older, id, generation + 1);
    page[WORDS / 2..].copy_from_slice(&older[WORDS / 2..]);
    write_page(&machine, id.address, &page);
    expect_failure(machine, "torn", Some(id.address));
}

#[test]
fn an_older_page_is_stale() {
    let mut machine = filled(2);
    let before = working_area(&machine);
    // Until some page has been written again.
    let (id, generation) = loop {
        machine.resume();
        machine.wait_for("verify ok");
        machine.pause(u64::MAX);
        let now = working_area(&machine);
        let rewritten = before.iter().find(|(id, generation)| {
            now.iter().any(|(now_id, now)| now_id == id && now > generation)
        });
        if let Some(rewritten) = rewritten {
            break *rewritten;
        }
    };
    let mut page = [0; WORDS];
    page::write(&mut page, id, generation);
    write_page(&machine, id.address, &page);
    expect_failure(machine, "stale", Some(id.address));
}

#[test]
fn an_empty_page_is_lost() {
    let machine = filled(2);
    let (id, _) = some_page(&machine);
    write_page(&machine, id.address, &[0; WORDS]);
    expect_failure(machine, "lost", Some(id.address));
}

#[test]
fn a_page_in_another_s_place_is_lost() {
    let machine = filled(2);
    let (id, _) = some_page(&machine);
    let other = read_page(&machine, id.address + PAGE_SIZE);
    write_page(&machine, id.address, &other);
    expect_failure(machine, "lost", Some(id.address));
}

/// The address of vCPU 0's table: the page that begins with entries for slots 0, 1 and 2.
fn table(machine: &Machine) -> u64 {
    let entries = Entries::new(0, SEED);
    let is_table = |address: &u64| {
        let page = read_page(machine, *address);
        (0..3).zip(page.iter()).all(|(slot, entry)| entries.decode(slot, *entry).is_ok())
    };
    pages(machine).find(is_table).expect("a table of generations")
}

#[test]
fn a_flipped_bit_of_the_table_is_seen() {
    let machine = filled(2);
    let address = table(&machine);
    let mut page = read_page(&machine, address);
    page[200] ^= 1;
    write_page(&machine, address, &page);
    expect_failure(machine, "table", None);
}

/// A page that went back together with the table's entry for it: only the digest is left to tell.
#[test]
fn a_page_and_its_entry_that_went_back_together_are_seen() {
    let mut machine = filled(1);
    let address = table(&machine);
    let entries = Entries::new(0, SEED);
    let (before, area) = (read_page(&machine, address), working_area(&machine));
    let slot = loop {
        machine.resume();
        machine.wait_for("verify ok");
        machine.pause(u64::MAX);
        let now = read_page(&machine, address);
        if let Some(slot) = (0..WORDS).find(|slot| now[*slot] != before[*slot]) {
            break slot;
        }
    };
    let generation = entries.decode(slot as u64, before[slot]).unwrap();
    // One processor: slots are pages, and the area is listed in the order of addresses.
    let (id, _) = area[slot];
    let mut page = [0; WORDS];
    page::write(&mut page, id, generation);
    write_page(&machine, id.address, &page);
    let mut now = read_page(&machine, address);
    now[slot] = before[slot];
    write_page(&machine, address, &now);
    expect_failure(machine, "table", Some(address));
}

#[test]
fn a_shared_page_that_went_back_is_seen() {
    let mut machine = filled(2);
    (0..10).for_each(|_| {
        machine.resume();
        machine.wait_for("verify ok");
        machine.pause(u64::MAX);
    });
    let pair = pages(&machine).find(|address| {
        let page = read_page(&machine, *address);
        let rest = page[1..256].iter().chain(&page[257..WORDS - 1]);
        page[0] > 1 && page[WORDS - 1].abs_diff(page[0]) <= 1 && rest.sum::<u64>() == 0
    });
    let address = pair.expect("a page of a pair");
    let mut page = read_page(&machine, address);
    page[0] = 1;
    page[WORDS - 1] = 1;
    write_page(&machine, address, &page);
    expect_failure(machine, "pair", Some(address));
}

#[test]
fn a_vcpu_that_stands_still_fails_the_verdict() {
    let mut machine = filled(2);
    machine.resume();
    machine.pause(1 << 1);
    machine.type_in("q");
    assert_eq!(machine.wait_for_end(), Ended::PowerOff, "{machine}");
    assert_eq!(machine.count("ERROR vCPU 1 did not check its pages"), 1, "{machine}");
    assert!(machine.lines.last().unwrap().starts_with("VERDICT failed n="), "{machine}");
}

#[test]
fn damaged_code_is_reported_as_a_fault() {
    let mut machine = filled(1);
    // Behind boot.s, the fault handlers among it; a byte that is no instruction in 64-bit mode.
    machine.memory.write_slice(&[0x06; 0x6000], GuestAddress(0x20_1000)).unwrap();
    machine.resume();
    assert_eq!(machine.wait_for_end(), Ended::PowerOff, "{machine}");
    assert!(machine.lines.last().unwrap().starts_with("FAULT vector=0x6 rip=0x20"), "{machine}");
}
