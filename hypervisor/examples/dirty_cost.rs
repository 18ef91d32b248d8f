//! What a harvest of the dirty log costs on this host, by bitmap and by rings, for memory of several
//! sizes and several numbers of written pages. Prints medians; asserts nothing about time.
//!
//! `cargo run --release -p hypervisor --example dirty_cost`

use std::time::{Duration, Instant};

use hypervisor::dirty::RING_ENTRIES;
use hypervisor::{Exit, Hypervisor, Tracking, Vcpu, Vm};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const ROUNDS: usize = 21;
const STRIDE: u32 = 8192;
const FIRST: u32 = 4 << 20;

/// mov edi, FIRST; mov ecx, count; again: inc dword [edi]; add edi, STRIDE; dec ecx; jnz again;
/// out 0x42, al; jmp to the start
fn code(count: u32) -> Vec<u8> {
    let mut code = vec![0xbf];
    code.extend(FIRST.to_le_bytes());
    code.push(0xb9);
    code.extend(count.to_le_bytes());
    code.extend([0xff, 0x07, 0x81, 0xc7]);
    code.extend(STRIDE.to_le_bytes());
    code.extend([0x49, 0x75, 0xf5, 0xe6, 0x42, 0xeb, 0xe7]);
    code
}

fn run_to_out(vcpu: &mut Vcpu) -> Result<(), Box<dyn std::error::Error>> {
    loop {
        match vcpu.run()? {
            Exit::IoOut { .. } => return Ok(()),
            Exit::Interrupted | Exit::Again => {}
            other => return Err(format!("unexpected exit: {other:?}").into()),
        }
    }
}

/// Time of a harvest, and the pages that it reported.
fn harvest(vm: &Vm) -> Result<(Duration, u32), Box<dyn std::error::Error>> {
    let mut pages = 0;
    let start = Instant::now();
    vm.dirty_log().harvest(&mut |written| pages += written.word.count_ones())?;
    Ok((start.elapsed(), pages))
}

fn measure(tracking: Tracking, size: usize, count: u32) -> Result<(), Box<dyn std::error::Error>> {
    let hypervisor = Hypervisor::open()?;
    if !tracking.is_possible(hypervisor.capabilities()) {
        println!("{:<7} this KVM cannot", tracking.name());
        return Ok(());
    }
    let mut vm = hypervisor.create_vm()?;
    if tracking == Tracking::Ring {
        vm.use_rings(RING_ENTRIES)?;
    }
    vm.create_irqchip()?;
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), size)])?;
    let host = memory.get_host_address(GuestAddress(0))? as u64;
    // SAFETY: the memory outlives the VM, which nothing runs in when this returns.
    unsafe { vm.set_memory(0, 0, size as u64, host, true)? };
    memory.write_slice(&code(count), GuestAddress(0x1000))?;
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.configure_cpuid(&hypervisor.supported_cpuid()?, 1)?;
    vcpu.setup_pvh(0x1000, 0)?;
    let (mut times, mut runs, mut pages) = (vec![], vec![], 0);
    for _ in 0..ROUNDS {
        let start = Instant::now();
        run_to_out(&mut vcpu)?;
        runs.push(start.elapsed());
        let (time, found) = harvest(&vm)?;
        times.push(time);
        pages = found;
    }
    times.sort();
    runs.sort();
    println!(
        "{:<7} {:>6} MiB, {count:>6} pages written, {pages:>6} reported: harvest {:>9.1?}, run {:>9.1?}",
        tracking.name(),
        size >> 20,
        times[ROUNDS / 2],
        runs[ROUNDS / 2],
    );
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for size in [256 << 20, 1 << 30, 3 << 30] {
        for count in [1, 100, 1000, 10_000] {
            for tracking in [Tracking::Bitmap, Tracking::Ring] {
                measure(tracking, size, count)?;
            }
        }
    }
    Ok(())
}
