//! What an epoch's share of KVM costs on this host: saving a vCPU, encoding its state, and
//! harvesting the dirty log. Prints; asserts nothing about time.
//!
//! `cargo run --release -p hypervisor --example state_cost`

use std::time::Instant;

use hypervisor::{Hypervisor, VcpuState};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const ROUNDS: u32 = 2000;
const MEMORY_SIZE: usize = 256 << 20;

fn measure(what: &str, mut work: impl FnMut()) {
    work();
    let start = Instant::now();
    for _ in 0..ROUNDS {
        work();
    }
    println!("{what:<44} {:>9.2?}", start.elapsed() / ROUNDS);
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let hypervisor = Hypervisor::open()?;
    println!("{:#?}", hypervisor.capabilities());
    let vm = hypervisor.create_vm()?;
    vm.create_irqchip()?;
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY_SIZE)])?;
    let host = memory.get_host_address(GuestAddress(0))? as u64;
    // SAFETY: the memory outlives the VM, which nothing runs in.
    unsafe { vm.set_memory(0, 0, MEMORY_SIZE as u64, host, true)? };
    memory.write_slice(&[0xf4], GuestAddress(0x1000))?;
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.configure_cpuid(&hypervisor.supported_cpuid()?, 1)?;
    vcpu.setup_pvh(0x1000, 0)?;

    let mut state = vcpu.save()?;
    println!("{} MSRs, {} bytes of XSAVE", state.msrs.len(), state.xsave.0.len());
    for msr in &state.msrs {
        print!("{:x} ", msr.index);
    }
    println!();
    measure("save a vCPU", || vcpu.save_into(&mut state).expect("save"));
    measure("restore a vCPU", || vcpu.restore(&state).expect("restore"));
    measure("save the VM", || {
        vm.save_state().expect("save");
    });
    measure("encode a vCPU (postcard)", || drop(postcard::to_stdvec(&state).expect("encode")));
    let bytes = postcard::to_stdvec(&state)?;
    println!("{} bytes encoded", bytes.len());
    measure("decode a vCPU (postcard)", || {
        let _: VcpuState = postcard::from_bytes(&bytes).expect("decode");
    });
    let mut words = vec![0; MEMORY_SIZE / 4096 / 64];
    let start = Instant::now();
    vm.dirty_log().harvest(&mut |_| ())?;
    println!("first harvest of 256 MiB {:>29.2?}", start.elapsed());
    measure("read the dirty log of 256 MiB, clean", || {
        vm.read_bitmap(0, &mut words).expect("read");
    });
    words.fill(0);
    words[0] = 1;
    measure("clear one page in one word", || {
        vm.clear_bitmap(0, 0, 64, &words[..1]).expect("clear")
    });
    for len in [64usize, 512, 1024] {
        measure(&format!("clear {len} words, one page set"), || {
            vm.clear_bitmap(0, 0, len as u64 * 64, &words[..len]).expect("clear");
        });
    }
    Ok(())
}
