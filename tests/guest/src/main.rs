//! The test guest: a PVH kernel that says on the serial port what it sees of its own machine.
//!
//! ```text
//! PVH entry ─ boot.s, ring 0 ─> bsp_main, ring 3 ─> map memory, start the APs ─> run::run
//!                                                        └─ SIPI ─> ap_main ────────┘
//! ```
//!
//! Enters: the kernel command line (`guest_logic::cmdline`), a byte `q` on the serial port that
//! asks for the verdict. Leaves: report lines on the serial port, a power-off. Only boot.s runs in
//! ring 0; everything in Rust runs in ring 3, natively even where a software KVM emulates ring 0.

#![no_std]
#![no_main]

/// The way in and what ring 0 left for us.
mod boot;
/// Time, from the TSC.
mod clock;
/// memcpy and its kin, which the compiler calls.
mod intrinsics;
/// The local APIC: starting processors, waking up.
mod lapic;
/// The page tables.
mod map;
/// PCI functions with a virtio device.
mod pci;
/// Memory that devices may write, and what lives as long as the guest.
mod pool;
/// Input, output and the ways to end.
mod port;
/// The loop that every processor is in, and the end of it.
mod run;
/// The serial port.
mod serial;
/// What processors know of each other.
mod shared;
/// Starting the other processors.
mod smp;
/// virtio devices: queues, the network card, the disk.
mod virtio;
/// The workloads.
mod workload;
/// What is settled before the processors begin.
mod world;

use core::panic::PanicInfo;

use crate::serial::say;

/// The first processor, in ring 3.
#[unsafe(no_mangle)]
extern "C" fn bsp_main(_index: u64) -> ! {
    let mut text = [0; world::COMMAND_LINE_MAX];
    let world = match world::build(&mut text) {
        Ok(world) => world,
        Err(error) => {
            say!("ERROR {error}");
            port::power_off();
        }
    };
    say!(
        "understudy-guest {} vcpus={} memory_mib={} workload={} tsc_khz={}",
        env!("CARGO_PKG_VERSION"),
        world.vcpus,
        world.memory_mib,
        world.config.workloads,
        world.clock.khz(),
    );
    if let Err(error) = smp::start_all(world) {
        say!("ERROR {error}");
        port::power_off();
    }
    say!("ready vcpus={}", world.vcpus);
    run::run(world, 0);
}

/// Every other processor, in ring 3.
extern "C" fn ap_main(index: u64) -> ! {
    let world = world::get();
    let index = u32::try_from(index).unwrap_or(u32::MAX);
    smp::arrived(world, index);
    if index >= world.participants {
        boot::park();
    }
    run::run(world, index);
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    serial::say_unlocked(format_args!("PANIC {info}"));
    port::power_off();
}
