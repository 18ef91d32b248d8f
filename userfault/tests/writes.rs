//! Real protection of real memory: who writes waits, and what is seen is what was asked for.

use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use userfault::{PAGE_SIZE, Userfault, UserfaultError};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

type Memory = GuestMemoryMmap<()>;

/// Two regions with a hole: pages 0 to 15 and 16 to 23.
fn memory() -> Arc<Memory> {
    let bytes = usize::try_from(PAGE_SIZE).unwrap();
    let ranges = [(GuestAddress(0), 16 * bytes), (GuestAddress(1 << 32), 8 * bytes)];
    Arc::new(Memory::from_ranges(&ranges).unwrap())
}

fn address(page: u64) -> GuestAddress {
    if page < 16 {
        GuestAddress(page * PAGE_SIZE)
    } else {
        GuestAddress((1 << 32) + (page - 16) * PAGE_SIZE)
    }
}

/// The pages that somebody waits for, once there is one.
fn wait_for_faults(userfault: &Userfault) -> Vec<u64> {
    let mut pages = Vec::new();
    while pages.is_empty() {
        userfault.faults(&mut pages).unwrap();
        std::thread::yield_now();
    }
    pages
}

#[test]
fn a_writer_of_a_protected_page_waits_and_is_named() {
    let memory = memory();
    let userfault = Userfault::new(Arc::clone(&memory)).unwrap();
    // Page 3 was never touched, page 4 has content.
    memory.write_obj(7_u64, address(4)).unwrap();
    userfault.protect(3, 2).unwrap();
    for page in [3, 4] {
        let (done, written) = mpsc::channel();
        let writer = Arc::clone(&memory);
        let thread = std::thread::spawn(move || {
            writer.write_obj(9_u64, address(page)).unwrap();
            done.send(()).unwrap();
        });
        assert_eq!(wait_for_faults(&userfault), [page]);
        assert!(written.recv_timeout(Duration::from_millis(20)).is_err(), "it still waits");
        let before: u64 = memory.read_obj(address(page)).unwrap();
        assert_eq!(before, if page == 4 { 7 } else { 0 }, "reading does not wait");
        userfault.unprotect(page, 1).unwrap();
        written.recv_timeout(Duration::from_secs(10)).unwrap();
        thread.join().unwrap();
        assert_eq!(memory.read_obj::<u64>(address(page)).unwrap(), 9);
    }
}

#[test]
fn other_pages_are_written_freely() {
    let memory = memory();
    let userfault = Userfault::new(Arc::clone(&memory)).unwrap();
    userfault.protect(3, 1).unwrap();
    for page in (0..24).filter(|page| *page != 3) {
        memory.write_obj(page, address(page)).unwrap();
    }
    let mut pages = vec![1];
    userfault.faults(&mut pages).unwrap();
    assert!(pages.is_empty());
}

#[test]
fn a_run_goes_over_the_border_of_a_region() {
    let memory = memory();
    let userfault = Userfault::new(Arc::clone(&memory)).unwrap();
    userfault.protect(14, 4).unwrap();
    let writer = Arc::clone(&memory);
    let thread = std::thread::spawn(move || writer.write_obj(9_u64, address(17)).unwrap());
    assert_eq!(wait_for_faults(&userfault), [17]);
    userfault.unprotect(14, 4).unwrap();
    thread.join().unwrap();
    for page in 14..18 {
        memory.write_obj(1_u64, address(page)).unwrap();
    }
}

#[test]
fn the_end_of_protection_lets_everybody_go_on() {
    let memory = memory();
    let userfault = Userfault::new(Arc::clone(&memory)).unwrap();
    userfault.protect(0, 24).unwrap();
    let writer = Arc::clone(&memory);
    let thread = std::thread::spawn(move || writer.write_obj(9_u64, address(20)).unwrap());
    assert_eq!(wait_for_faults(&userfault), [20]);
    drop(userfault);
    thread.join().unwrap();
    (0..24).for_each(|page| memory.write_obj(1_u64, address(page)).unwrap());
}

/// Huge pages are protected whole or not at all. No such page has to be free for this.
#[test]
fn memory_of_huge_pages_is_refused() {
    use std::os::fd::FromRawFd;
    // SAFETY: the call takes a name and flags; the descriptor is ours.
    let file = unsafe {
        let flags = libc::MFD_CLOEXEC | libc::MFD_HUGETLB;
        let fd = libc::memfd_create(c"huge".as_ptr(), flags);
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        std::fs::File::from_raw_fd(fd)
    };
    let bytes = 2 << 20;
    file.set_len(bytes as u64).unwrap();
    let (protection, flags) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_NORESERVE);
    let region =
        MmapRegion::build(Some(FileOffset::new(file, 0)), bytes, protection, flags).unwrap();
    let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
    let memory = Arc::new(Memory::from_regions(vec![region]).unwrap());
    let refused = Userfault::new(memory);
    assert!(matches!(refused, Err(UserfaultError::Granule(_))), "{refused:?}");
}

#[test]
fn pages_that_do_not_exist_are_refused() {
    let userfault = Userfault::new(memory()).unwrap();
    for (first, pages) in [(24, 1), (20, 5), (u64::MAX, 1)] {
        let refused = userfault.protect(first, pages);
        assert!(matches!(refused, Err(UserfaultError::Outside { .. })), "{first} {pages}");
    }
    assert!(matches!(userfault.wake(24), Err(UserfaultError::Outside { .. })));
}
