//! Guest memory of a simulated machine: real pages, in two regions, in more than one group of 64, so that
//! several connections have a share.

use replication::ids::{PAGE_SIZE, PageIndex};
use replication::ram::Ram;
use replication::testing::memory;
use vm_memory::Bytes;

pub const PAGES: usize = 72;
const REGIONS: [(u64, u64); 2] = [(0, 9), (0x10_0000, 63)];

/// All of a memory's bytes.
pub type Snapshot = Vec<[u8; PAGE_SIZE]>;

#[must_use]
pub fn new() -> Ram {
    memory(&REGIONS)
}

fn address(ram: &Ram, page: usize, word: usize) -> vm_memory::GuestAddress {
    let page = ram.address(PageIndex(page as u64)).expect("a page of the machine");
    vm_memory::GuestAddress(page.0 + word as u64 * 8)
}

/// A word of a page.
///
/// # Panics
/// If there is no such page or word.
#[must_use]
pub fn read(ram: &Ram, page: usize, word: usize) -> u64 {
    ram.mapping().read_obj(address(ram, page, word)).expect("a word of a page")
}

/// Writes a word, as a guest does.
///
/// # Panics
/// If there is no such page or word.
pub fn write(ram: &Ram, page: usize, word: usize, value: u64) {
    ram.mapping().write_obj(value, address(ram, page, word)).expect("a word of a page");
}

/// Changes a page in a way that `value` decides: a little, all of it, to something that is easily
/// compressed, or to nothing.
///
/// # Panics
/// If there is no such page.
pub fn scribble(ram: &Ram, page: usize, value: u64) {
    let mut bytes = [0; PAGE_SIZE];
    let mut dice = value;
    match value % 8 {
        0 => {}
        1 => {
            let (words, _) = bytes.as_chunks_mut();
            for word in words {
                dice = dice.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
                *word = (dice ^ dice >> 29).to_le_bytes();
            }
        }
        2 => bytes.fill(value.to_le_bytes()[1] | 1),
        _ => {
            let [_, low, high, ..] = value.to_le_bytes();
            let word = usize::from(u16::from_le_bytes([low, high])) % (PAGE_SIZE / 8);
            return write(ram, page, word, value);
        }
    }
    assert!(ram.write_page(PageIndex(page as u64), &bytes), "a page of the machine");
}

/// Memory as it is.
///
/// # Panics
/// Never: there are these pages.
#[must_use]
pub fn snapshot(ram: &Ram) -> Snapshot {
    let mut pages = vec![[0; PAGE_SIZE]; PAGES];
    for (page, bytes) in (0..).zip(&mut pages) {
        assert!(ram.read_page(PageIndex(page), bytes), "a page of the machine");
    }
    pages
}

/// Makes memory again what it was.
///
/// # Panics
/// Never: there are these pages.
pub fn restore(ram: &Ram, from: &Snapshot) {
    for (page, bytes) in (0..).zip(from) {
        assert!(ram.write_page(PageIndex(page), bytes), "a page of the machine");
    }
}

/// The first page that is not as it was.
///
/// # Panics
/// Never: there are these pages.
#[must_use]
pub fn differs(ram: &Ram, from: &Snapshot) -> Option<usize> {
    let mut bytes = [0; PAGE_SIZE];
    from.iter().zip(0..).position(|(then, page)| {
        assert!(ram.read_page(PageIndex(page), &mut bytes), "a page of the machine");
        bytes != *then
    })
}

/// The same of memory that was itself kept.
#[must_use]
pub fn differ(one: &Snapshot, other: &Snapshot) -> Option<usize> {
    one.iter().zip(other).position(|(one, other)| one != other)
}
