//! Whether this KVM stops a vCPU before its ring is full.
//!
//! A guest of a dozen instructions writes several times as many pages as its small ring has entries,
//! in one run. A KVM that does what its documentation says stops it several times, and all pages are
//! in the log. One that does not is stopped in time by chance, too: whoever else wants the core may
//! interrupt it (on a busy host up to one run in thirty). So all of many runs have to go well; the
//! first that does not ends it. Takes some ten milliseconds where KVM does not, and about as many
//! where it does, most of them for creating a VM and taking it down.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::exit::Exit;
use crate::system::Hypervisor;
use crate::vcpu::Vcpu;
use crate::vm::{Vm, VmError};

/// KVM keeps up to 576 in reserve (64, and 512 for the log of Intel's processors).
const ENTRIES: u32 = 1024;
const PAGES: u32 = 4 * ENTRIES;
const FIRST_PAGE: u32 = 256;
const PAGE_SIZE: u32 = 4096;
const MEMORY_BYTES: u32 = (FIRST_PAGE + PAGES) * PAGE_SIZE;
const CODE: u64 = 0x1000;
/// How often the guest writes all of its pages.
const ROUNDS: u32 = 16;
/// More than a round of the guest needs, whoever interrupts it.
const RUNS_MAX: u32 = 10_000;

/// mov edi, first; mov ecx, pages; again: inc dword [edi]; add edi, 4096; dec ecx; jnz again;
/// out 0x42, al; jmp to the start
fn code() -> Vec<u8> {
    let [first, pages] = [FIRST_PAGE * PAGE_SIZE, PAGES].map(u32::to_le_bytes);
    let mut code = [&[0xbf], &first[..], &[0xb9], &pages[..]].concat();
    code.extend([0xff, 0x07, 0x81, 0xc7, 0, 0x10, 0, 0, 0x49, 0x75, 0xf5, 0xe6, 0x42, 0xeb, 0xe7]);
    code
}

/// Whether the rings of this KVM can be relied on. It has some ([`crate::Tracking::is_possible`]).
///
/// # Errors
/// KVM gives no VM to try it with.
pub fn rings_are_sound(hypervisor: &Hypervisor) -> Result<bool, VmError> {
    rings_of(ENTRIES, hypervisor)
}

fn rings_of(entries: u32, hypervisor: &Hypervisor) -> Result<bool, VmError> {
    let mut vm = hypervisor.create_vm()?;
    vm.use_rings(entries)?;
    vm.create_irqchip()?;
    let range = (GuestAddress(0), MEMORY_BYTES as usize);
    let Ok(memory) = GuestMemoryMmap::<()>::from_ranges(&[range]) else { return Ok(false) };
    let host = memory.get_host_address(GuestAddress(0)).map(|host| host as u64);
    let (Ok(host), Ok(())) = (host, memory.write_slice(&code(), GuestAddress(CODE))) else {
        return Ok(false);
    };
    // SAFETY: the memory is dropped after the vCPU and the VM, which are local to the call below.
    unsafe { vm.set_memory(0, 0, MEMORY_BYTES.into(), host, true)? };
    let sound = try_out(hypervisor, vm);
    drop(memory);
    sound
}

fn try_out(hypervisor: &Hypervisor, vm: Vm) -> Result<bool, VmError> {
    let mut vcpu = vm.create_vcpu(0)?;
    let cpuid = hypervisor.supported_cpuid()?;
    let ready = vcpu.configure_cpuid(&cpuid, 1).and_then(|()| vcpu.setup_pvh(CODE, 0));
    Ok(ready.is_ok() && (0..ROUNDS).all(|_| loses_nothing(&vm, &mut vcpu)))
}

fn loses_nothing(vm: &Vm, vcpu: &mut Vcpu) -> bool {
    if !writes_all(vcpu) {
        return false;
    }
    let all = u64::from(FIRST_PAGE)..u64::from(FIRST_PAGE + PAGES);
    let mut found = 0;
    let harvested = vm.dirty_log().harvest(&mut |written| {
        // Words of 64 pages do not cross the begin or the end.
        if all.contains(&written.first_page) {
            found += written.word.count_ones();
        }
    });
    harvested.is_ok() && found == PAGES
}

fn writes_all(vcpu: &mut Vcpu) -> bool {
    for _ in 0..RUNS_MAX {
        match vcpu.run() {
            Ok(Exit::IoOut { .. }) => return true,
            Ok(Exit::Interrupted | Exit::Again) => {}
            // A ring that overflowed among them.
            Ok(_) | Err(_) => return false,
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tracking;

    #[test]
    fn the_guest_begins_anew() {
        let code = code();
        let back = code.last().map(|displacement| displacement.cast_signed());
        let end = i8::try_from(code.len()).unwrap();
        assert_eq!(back, Some(-end));
    }

    /// Whatever this KVM does to rings that are nearly full.
    #[test]
    fn rings_that_are_never_full_are_sound() {
        let hypervisor = Hypervisor::open().unwrap();
        if Tracking::Ring.is_possible(hypervisor.capabilities()) {
            assert!(rings_of(4 * PAGES, &hypervisor).unwrap());
        }
    }
}
