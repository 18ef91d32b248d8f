//! Starting the other processors, one after the other (Intel SDM 3A, 9.4).

use core::fmt;
use core::ptr::with_exposed_provenance_mut;
use core::sync::atomic::Ordering;

use guest_logic::machine::PAGE_SIZE;

use crate::boot::{self, CpuBlock, RING3_STACK_SIZE, TSS_SIZE};
use crate::world::World;
use crate::{ap_main, lapic, shared};

/// Where the trampoline is put. Whatever the VMM had here has been read by then.
const TRAMPOLINE_PAGE: u8 = 8;
const RING0_STACK_SIZE: u64 = 4096;
const TSS_PAGES: u64 = (TSS_SIZE as u64).div_ceil(PAGE_SIZE);
/// A page for the block and the end of the ring-0 stack, the stacks, the TSS.
pub const PAGES_PER_CPU: u64 =
    1 + RING0_STACK_SIZE / PAGE_SIZE + RING3_STACK_SIZE / PAGE_SIZE + TSS_PAGES;

/// How long one attempt may take, and how many there are. A second start-up message does nothing
/// to a processor that the first one reached.
const ATTEMPT_NS: u64 = 100_000_000;
const ATTEMPTS: u32 = 100;
const INIT_NS: u64 = 200_000;

#[derive(Debug)]
pub struct NotStarted {
    index: u32,
    lapic_id: u8,
    own: u32,
}

impl fmt::Display for NotStarted {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { index, lapic_id, own } = self;
        write!(formatter, "vCPU {index} (APIC {lapic_id}) did not start; this is APIC {own}")
    }
}

/// Starts processors until there are `world.vcpus`.
pub fn start_all(world: &World) -> Result<(), NotStarted> {
    let own = lapic::id();
    let others = world.processors.ids().iter().filter(|id| u32::from(**id) != own);
    if world.vcpus > 1 {
        copy_trampoline();
    }
    for (index, lapic_id) in (1..world.vcpus).zip(others) {
        prepare(world, index);
        start(world, index, *lapic_id)?;
    }
    Ok(())
}

/// Called by a processor that has come up.
pub fn arrived(world: &World, index: u32) {
    if index < world.participants {
        lapic::enable();
    }
    shared::of(index).online.store(1, Ordering::Release);
}

fn copy_trampoline() {
    let code = boot::trampoline();
    let place = with_exposed_provenance_mut::<u8>(usize::from(TRAMPOLINE_PAGE) << 12);
    // SAFETY: the page is mapped and below what `Free` hands out; the code is shorter than it.
    unsafe { place.copy_from_nonoverlapping(code.as_ptr(), code.len()) };
}

/// Lays out a processor's memory: block | ring-0 stack, number | ring-3 stack | TSS.
fn prepare(world: &World, index: u32) {
    let start = world.cpu_memory + u64::from(index - 1) * PAGES_PER_CPU * PAGE_SIZE;
    let ring0_stack = start + RING0_STACK_SIZE;
    let ring3_start = ring0_stack + PAGE_SIZE;
    let ring3_stack = ring3_start + RING3_STACK_SIZE;
    let address = usize::try_from(start).unwrap_or_default();
    let at = |place: u64| {
        let offset = usize::try_from(place - start).unwrap_or_default();
        with_exposed_provenance_mut::<u8>(address + offset)
    };
    let size = usize::try_from(PAGES_PER_CPU * PAGE_SIZE).unwrap_or_default();
    // SAFETY: world.rs took this memory for the processor out of the free memory, and the
    // processor does not run yet.
    unsafe {
        at(start).write_bytes(0, size);
        at(ring0_stack).cast::<u64>().write(u64::from(index));
        let tss_selector = boot::describe_tss(index, at(ring3_stack), ring0_stack);
        let entry = ap_main as extern "C" fn(u64) -> !;
        at(ring0_stack + 64).cast::<CpuBlock>().write(CpuBlock {
            ring0_stack,
            ring3_stack,
            tss_selector,
            index: u64::from(index),
            entry: entry as usize as u64,
        });
    }
    boot::set_ap_block(ring0_stack + 64);
}

fn start(world: &World, index: u32, lapic_id: u8) -> Result<(), NotStarted> {
    let online = || shared::of(index).online.load(Ordering::Acquire) == 1;
    lapic::send_init(lapic_id);
    world.clock.spin(INIT_NS);
    for _ in 0..ATTEMPTS {
        lapic::send_startup(lapic_id, TRAMPOLINE_PAGE);
        let until_ns = world.clock.now_ns() + ATTEMPT_NS;
        while world.clock.now_ns() < until_ns {
            if online() {
                return Ok(());
            }
            core::hint::spin_loop();
        }
    }
    Err(NotStarted { index, lapic_id, own: lapic::id() })
}
