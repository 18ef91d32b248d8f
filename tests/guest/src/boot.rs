//! The way in (boot.s) and what ring 0 left for us, and the services that it still renders.

use core::arch::{asm, global_asm};
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};

use guest_logic::machine::{LAPIC_ADDRESS, POWER_OFF, SERIAL_PORT, SLEEP_CONTROL_PORT, VCPUS_MAX};

use crate::lapic;

pub const TIMER_VECTOR: u8 = 0x40;
pub const SPURIOUS_VECTOR: u8 = 0xff;

/// The selector of the first processor's TSS; the others follow, 16 bytes each.
const FIRST_TSS: u32 = 0x40;
/// The TSS, its bitmap of 65536 ports, and the byte of ones that must end it.
pub const TSS_SIZE: u32 = 104 + 8192 + 1;
const TSS_BITMAP: u16 = 104;
pub const RING3_STACK_SIZE: u64 = 32 << 10;
/// The first processor's: it builds drivers with their queues, some kilobytes each.
const FIRST_RING3_STACK_SIZE: u64 = 128 << 10;

const SERVICE_WAIT: u32 = 0;
const SERVICE_PARK: u32 = 1;
const SERVICE_TRIPLE_FAULT: u32 = 2;

/// The leaves that boot.s asks for.
const CPUID_LEAVES: usize = 6;

global_asm!(
    include_str!("boot.s"),
    TIMER_VECTOR = const TIMER_VECTOR,
    SPURIOUS_VECTOR = const SPURIOUS_VECTOR,
    FIRST_TSS = const FIRST_TSS,
    TSS_LIMIT = const TSS_SIZE - 1,
    GDT_LIMIT = const FIRST_TSS + 16 * VCPUS_MAX - 1,
    MAX_VCPUS = const VCPUS_MAX,
    CPUID_FACTS = const CPUID_LEAVES,
    SERVICE_WAIT = const SERVICE_WAIT,
    SERVICE_PARK = const SERVICE_PARK,
    SERVICE_TRIPLE_FAULT = const SERVICE_TRIPLE_FAULT,
    LAPIC_EOI = const LAPIC_ADDRESS as usize + lapic::EOI,
    SERIAL_PORT = const SERIAL_PORT,
    SLEEP_PORT = const SLEEP_CONTROL_PORT,
    POWER_OFF = const POWER_OFF,
    RING3_STACK = const FIRST_RING3_STACK_SIZE,
);

#[derive(Clone, Copy)]
#[repr(C)]
struct Leaf {
    leaf: u32,
    eax: u32,
    ebx: u32,
    ecx: u32,
    edx: u32,
}

/// What boot.s wants to know of a processor that it takes to ring 3.
#[repr(C)]
pub struct CpuBlock {
    /// The stack's upper end; the word there is the processor's number.
    pub ring0_stack: u64,
    pub ring3_stack: u64,
    pub tss_selector: u64,
    pub index: u64,
    pub entry: u64,
}

unsafe extern "C" {
    static start_info_address: u64;
    static enabled_xcr0: u64;
    static cpuid_facts: [Leaf; CPUID_LEAVES];
    static ap_trampoline: u8;
    static ap_trampoline_end: u8;
    static ap_block: AtomicU64;
    static image_end: u8;
    static mut boot_pml4: [u64; 512];
    static mut gdt: [u64; FIRST_TSS as usize / 8 + 2 * VCPUS_MAX as usize];
}

#[must_use]
pub fn start_info() -> u64 {
    // SAFETY: boot.s wrote it before ring 3 began, and nobody writes it again.
    unsafe { start_info_address }
}

#[must_use]
pub fn end_of_image() -> u64 {
    (&raw const image_end).addr() as u64
}

#[must_use]
pub fn top_table() -> NonNull<[u64; 512]> {
    // SAFETY: a static's address is not null.
    unsafe { NonNull::new_unchecked(&raw mut boot_pml4) }
}

/// The TSC's rate in kHz, if CPUID tells: KVM's timing leaf first, then the processor's own.
#[must_use]
pub fn cpuid_tsc_khz() -> Option<u64> {
    let fact = |number: u32| facts().iter().find(|fact| fact.leaf == number).copied();
    let hypervisor = fact(0x4000_0000).filter(|fact| fact.eax >= 0x4000_0010);
    let timing = hypervisor.and_then(|_| fact(0x4000_0010)).filter(|fact| fact.eax != 0);
    if let Some(timing) = timing {
        return Some(u64::from(timing.eax));
    }
    let basic = fact(0).filter(|fact| fact.eax >= 0x15)?;
    let ratio = fact(0x15).filter(|fact| fact.ecx != 0 && basic.eax >= 0x15)?;
    let hertz = u64::from(ratio.ecx) * u64::from(ratio.ebx);
    hertz.checked_div(u64::from(ratio.eax) * 1000).filter(|khz| *khz != 0)
}

/// Whether ring 0 has switched AVX on and the processor has AVX2.
#[must_use]
pub fn has_avx2() -> bool {
    let avx2 = facts().iter().any(|fact| fact.leaf == 7 && fact.ebx & (1 << 5) != 0);
    let basic = facts().iter().any(|fact| fact.leaf == 0 && fact.eax >= 7);
    // SAFETY: boot.s wrote it before ring 3 began; every processor writes the same.
    let enabled = unsafe { enabled_xcr0 } & 4 != 0;
    enabled && basic && avx2
}

fn facts() -> &'static [Leaf; CPUID_LEAVES] {
    // SAFETY: boot.s wrote them before ring 3 began, and nobody writes them again.
    unsafe { &cpuid_facts }
}

/// The code that an AP begins with, to be copied below 1 MiB.
#[must_use]
pub fn trampoline() -> &'static [u8] {
    let start = &raw const ap_trampoline;
    let length = (&raw const ap_trampoline_end).addr() - start.addr();
    // SAFETY: both symbols bound one piece of the image, which is never written.
    unsafe { core::slice::from_raw_parts(start, length) }
}

/// Names the block of the AP that is started next.
pub fn set_ap_block(block: u64) {
    // SAFETY: the symbol is eight aligned bytes that only this function and a starting AP use.
    unsafe { &ap_block }.store(block, Ordering::SeqCst);
}

/// Fills in a TSS and its descriptor; the selector. `tss` has `TSS_SIZE` bytes of zero.
///
/// # Safety
/// The memory is this processor's for good, and no other processor describes its TSS now.
pub unsafe fn describe_tss(index: u32, tss: *mut u8, ring0_stack: u64) -> u64 {
    let base = tss.addr() as u64;
    let limit = u64::from(TSS_SIZE - 1);
    let low = limit | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24 & 0xff) << 56;
    let selector = FIRST_TSS + 16 * index;
    // SAFETY: the caller vouches for the TSS; `index` is below VCPUS_MAX, so the descriptor is
    // within the table, and no processor has loaded it yet.
    unsafe {
        tss.add(4).cast::<u64>().write_unaligned(ring0_stack);
        tss.add(102).cast::<u16>().write_unaligned(TSS_BITMAP);
        tss.add(104 + 8192).write(0xff);
        let descriptor = (&raw mut gdt).cast::<u64>().add(selector as usize / 8);
        descriptor.write_volatile(low);
        descriptor.add(1).write_volatile(base >> 32);
    }
    u64::from(selector)
}

/// Halts until an interrupt has been taken. Ring 0 sees the `hlt` as a fault and does the rest.
pub fn wait_for_interrupt() {
    // SAFETY: boot.s comes back behind the `hlt` with all registers but eax, rcx as they were.
    unsafe {
        asm!("hlt", inout("eax") SERVICE_WAIT => _, out("rcx") _, options(nostack));
    }
}

/// Halts for good, with interrupts off.
pub fn park() -> ! {
    // SAFETY: ring 0 does not come back.
    unsafe { asm!("hlt", in("eax") SERVICE_PARK, options(noreturn, nostack)) }
}

/// Ends the machine the hard way.
pub fn triple_fault() -> ! {
    // SAFETY: ring 0 does not come back.
    unsafe { asm!("hlt", in("eax") SERVICE_TRIPLE_FAULT, options(noreturn, nostack)) }
}
