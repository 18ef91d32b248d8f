//! The page tables: memory is mapped to itself, open to ring 3, in pages of 2 MiB (Intel SDM 3A,
//! 4.5). boot.s maps the first 16 MiB; the rest is added here, from ring 3, since the tables
//! themselves are mapped too. Entries are only ever added, so no TLB needs to be told.

use core::ptr::{NonNull, with_exposed_provenance_mut};

use guest_logic::machine::PAGE_SIZE;
use guest_logic::physical::Physical;

use crate::boot;

/// Where the memory ends that boot.s has mapped; tables are taken from below it.
pub const LOW_END: u64 = 16 << 20;
const LARGE: u64 = 2 << 20;

const OPEN: u64 = 0x7;
const UNCACHED: u64 = 0x18;
const LARGE_PAGE: u64 = 0x80;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const PHYSICAL_END: u64 = 1 << 47;

type Table = [u64; 512];

/// The tables and the memory that further ones are taken from.
pub struct Map {
    next: u64,
}

/// No memory for tables is left, or the address is beyond what they can name.
#[derive(Debug)]
pub struct NotMapped;

impl Map {
    /// There is to be one of these: it owns the tables.
    pub fn new() -> Self {
        Self { next: boot::end_of_image() }
    }

    /// Maps `start..start + length`, rounded out to whole large pages.
    pub fn add(&mut self, start: u64, length: u64) -> Result<(), NotMapped> {
        let end = start.checked_add(length).filter(|end| *end <= PHYSICAL_END).ok_or(NotMapped)?;
        let mut address = start / LARGE * LARGE;
        while address < end {
            let directory = self.directory(address)?;
            set(directory, address >> 21, address | OPEN | LARGE_PAGE);
            address += LARGE;
        }
        Ok(())
    }

    /// Maps one small page of device registers.
    pub fn add_device(&mut self, address: u64) -> Result<(), NotMapped> {
        let directory = self.directory(address)?;
        let table = self.below(directory, address >> 21)?;
        set(table, address >> 12, (address & ADDRESS) | OPEN | UNCACHED);
        Ok(())
    }

    /// Maps the small pages of `start..start + length` as device registers.
    pub fn add_devices(&mut self, start: u64, length: u64) -> Result<(), NotMapped> {
        let end = start.checked_add(length).filter(|end| *end <= PHYSICAL_END).ok_or(NotMapped)?;
        let mut address = start / PAGE_SIZE * PAGE_SIZE;
        while address < end {
            self.add_device(address)?;
            address += PAGE_SIZE;
        }
        Ok(())
    }

    fn directory(&mut self, address: u64) -> Result<NonNull<Table>, NotMapped> {
        let pointers = self.below(boot::top_table(), address >> 39)?;
        self.below(pointers, address >> 30)
    }

    /// The table that an entry names, made if there is none.
    fn below(&mut self, table: NonNull<Table>, index: u64) -> Result<NonNull<Table>, NotMapped> {
        let entry = get(table, index);
        if entry & 1 != 0 {
            if entry & LARGE_PAGE != 0 {
                return Err(NotMapped);
            }
            return table_at(entry & ADDRESS);
        }
        let address = self.next;
        if address + PAGE_SIZE > LOW_END {
            return Err(NotMapped);
        }
        self.next += PAGE_SIZE;
        let made = table_at(address)?;
        // SAFETY: the page is mapped, lies behind the image, and was handed out only now.
        unsafe { made.as_ptr().write_bytes(0, 1) };
        set(table, index, address | OPEN);
        Ok(made)
    }
}

fn table_at(address: u64) -> Result<NonNull<Table>, NotMapped> {
    let address = usize::try_from(address).map_err(|_| NotMapped)?;
    NonNull::new(with_exposed_provenance_mut(address)).ok_or(NotMapped)
}

fn place(table: NonNull<Table>, index: u64) -> *mut u64 {
    let index = usize::try_from(index & 511).unwrap_or(0);
    table.as_ptr().cast::<u64>().wrapping_add(index)
}

fn get(table: NonNull<Table>, index: u64) -> u64 {
    // SAFETY: tables are below LOW_END, thus mapped, and an index is below 512. The processor
    // sets bits in entries, hence volatile.
    unsafe { place(table, index).read_volatile() }
}

fn set(table: NonNull<Table>, index: u64, entry: u64) {
    // SAFETY: as for `get`.
    unsafe { place(table, index).write_volatile(entry) }
}

/// Physical memory through the map, for reading what the VMM has left there.
pub struct Mapped {
    map: core::cell::RefCell<Map>,
}

impl Mapped {
    pub fn new(map: Map) -> Self {
        Self { map: core::cell::RefCell::new(map) }
    }

    pub fn into_map(self) -> Map {
        self.map.into_inner()
    }
}

impl Physical for Mapped {
    fn read(&self, address: u64, buffer: &mut [u8]) -> bool {
        let length = buffer.len() as u64;
        if self.map.borrow_mut().add(address, length).is_err() {
            return false;
        }
        let Ok(address) = usize::try_from(address) else { return false };
        for (offset, byte) in buffer.iter_mut().enumerate() {
            // SAFETY: the range was mapped just now. What is behind it nobody vouches for, but
            // any bytes will do: they are only parsed.
            *byte = unsafe {
                with_exposed_provenance_mut::<u8>(address.wrapping_add(offset)).read_volatile()
            };
        }
        true
    }
}
