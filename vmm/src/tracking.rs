//! Memory slots, and how the pages that the guest writes are found: KVM's bitmap or its rings.
//!
//! A bitmap is read whole in each epoch, 32 KiB a GiB; a ring has an entry for each written page. So
//! the bitmap is cheaper where memory is small or much of it is written, the rings where memory is
//! large. What reading costs is measured on the machine's own slots before its first vCPU, since KVM
//! does not change its ways after that.

use std::time::{Duration, Instant};

use hypervisor::dirty::{Words, rings_are_sound, words_of};
use hypervisor::{Hypervisor, Tracking, Vm, VmError};
use replication::ids::PAGE_SIZE;

use crate::memory::{Memory, Slot};

/// Makes a machine keep its dirty log so, for tests: `bitmap` or `ring`.
const OVERRIDE: &str = "UNDERSTUDY_TEST_DIRTY_LOG";

/// What a ring's entry costs more than a page of the bitmap, and the pages of an epoch for which
/// rings shall not be dearer. `cargo run --release -p hypervisor --example dirty_cost` printed 42 us
/// by bitmap and 50 us by ring for 1,000 pages of 3 GiB, 147 us and 265 us for 10,000.
const ENTRY_NS: u64 = 20;
const EPOCH_PAGES: u64 = 2048;
/// Reading less than this costs less than any ring: its bitmap is 16 KiB.
const MEASURED_BYTES_MIN: u64 = 512 << 20;
const READS: u32 = 5;

/// Which of the two costs a machine less. It has its memory and no vCPU yet.
///
/// # Errors
/// KVM does not let its bitmap be read.
pub fn choose(hypervisor: &Hypervisor, vm: &Vm, memory: &Memory) -> Result<Tracking, VmError> {
    let can = Tracking::Ring.is_possible(vm.capabilities()) && resets_are_whole();
    match std::env::var(OVERRIDE).as_deref() {
        Ok("ring") => return Ok(Tracking::Ring),
        Ok("bitmap") => return Ok(Tracking::Bitmap),
        _ => {}
    }
    if !can || memory.size() < MEASURED_BYTES_MIN {
        return Ok(Tracking::Bitmap);
    }
    set(vm, memory, true)?;
    let read = reading(vm, memory);
    set(vm, memory, false)?;
    let read = read?;
    let read_us = read.as_micros();
    if read <= Duration::from_nanos(ENTRY_NS * EPOCH_PAGES) {
        tracing::debug!("reading the dirty bitmap takes {read_us} us, less than rings would");
        return Ok(Tracking::Bitmap);
    }
    let sound = rings_are_sound(hypervisor).unwrap_or_else(|error| {
        tracing::info!("dirty rings cannot be tried: {}", replication::chain(&error));
        false
    });
    if !sound {
        tracing::info!(
            "reading the dirty bitmap takes {read_us} us; this KVM's rings would take less, but lose \
             pages when they are full"
        );
        return Ok(Tracking::Bitmap);
    }
    tracing::debug!("reading the dirty bitmap takes {read_us} us, so the dirty log is in rings");
    Ok(Tracking::Ring)
}

/// Whether this kernel re-arms all pages of rings whatever happens. Since 6.17 a pending signal, or a
/// SIGSTOP, ends that in the middle, and up to 64 pages that count as done are not protected.
fn resets_are_whole() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    is_before_6_17(&release)
}

fn is_before_6_17(release: &str) -> bool {
    let mut numbers = release.split(|other: char| !other.is_ascii_digit()).map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) < (6, 17),
        _ => false,
    }
}

/// How long it takes to read the bitmaps of all slots.
fn reading(vm: &Vm, memory: &Memory) -> Result<Duration, VmError> {
    let slots = memory.slots();
    let length = |slot: &Slot| usize::try_from(words_of(slot.size / PAGE_SIZE as u64)).unwrap_or(0);
    let lengths: Vec<_> = slots.iter().map(length).collect();
    let mut room = Words::new(lengths.iter().copied().max().unwrap_or(0));
    let mut least = Duration::MAX;
    for _ in 0..READS {
        let start = Instant::now();
        for (slot, length) in slots.iter().zip(&lengths) {
            let words = room.first_mut(*length).unwrap_or_default();
            vm.read_bitmap(slot.id, words)?;
        }
        least = least.min(start.elapsed());
    }
    Ok(least)
}

/// Tells KVM of all memory, with the dirty log on or off.
pub fn set(vm: &Vm, memory: &Memory, log_dirty: bool) -> Result<(), VmError> {
    for slot in memory.slots() {
        let (address, host) = (slot.guest_address, slot.host_address);
        // SAFETY: whoever owns a machine drops its memory after its vCPUs, so the range stays mapped
        // for as long as anything runs in the VM. A device's thread may keep the VM alive for longer,
        // but it only sends messages.
        unsafe { vm.set_memory(slot.id, address, slot.size, host, log_dirty)? };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_that_stop_in_the_middle_are_known() {
        for before in ["5.10.0-amd64", "6.1.0-37-amd64", "6.12.30+bpo-amd64\n", "6.16.9"] {
            assert!(is_before_6_17(before), "{before}");
        }
        for not in ["6.17.0", "6.18.44-fc", "7.0.1", "", "next", "6"] {
            assert!(!is_before_6_17(not), "{not}");
        }
    }
}
