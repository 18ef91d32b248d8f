//! A machine of two vCPUs at most and 2 MiB of memory, for guests of a few hand-made bytes.
#![allow(dead_code, reason = "each test file uses its part")]

use std::sync::atomic::{AtomicU32, Ordering};

use hypervisor::dirty::RING_ENTRIES;
use hypervisor::{Exit, Hypervisor, Tracking, Vcpu, Vm, Written};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::signal::{Killable, register_signal_handler};

pub const MEMORY_SIZE: u64 = 2 << 20;
pub const PAGES: usize = 512;
pub const WORDS: usize = PAGES / 64;
/// Where the guest's code starts, in 32-bit protected mode.
pub const ENTRY: u64 = 0x1000;
pub const SLOT: u32 = 0;

pub struct Machine {
    pub vcpus: Vec<Vcpu>,
    pub vm: Vm,
    pub memory: GuestMemoryMmap,
}

pub fn open() -> Hypervisor {
    Hypervisor::open().unwrap_or_else(|error| panic!("This test needs KVM: {error}"))
}

impl Machine {
    /// A machine whose first vCPU stands before `code`.
    pub fn new(vcpus: u32, code: &[u8]) -> Self {
        Self::tracked(vcpus, code, Tracking::Bitmap)
    }

    pub fn tracked(vcpus: u32, code: &[u8], tracking: Tracking) -> Self {
        Self::with_memory(vcpus, code, tracking, MEMORY_SIZE)
    }

    pub fn with_memory(vcpus: u32, code: &[u8], tracking: Tracking, bytes: u64) -> Self {
        let hypervisor = open();
        let mut vm = hypervisor.create_vm().unwrap();
        if tracking == Tracking::Ring {
            vm.use_rings(RING_ENTRIES).unwrap();
        }
        vm.create_irqchip().unwrap();
        let size = usize::try_from(bytes).unwrap();
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), size)]).unwrap();
        let host = memory.get_host_address(GuestAddress(0)).unwrap() as u64;
        // SAFETY: fields drop in order, so the memory outlives the VM; it is accessed through
        // vm-memory, which allows for a guest that writes.
        unsafe { vm.set_memory(SLOT, 0, bytes, host, true) }.unwrap();
        memory.write_slice(code, GuestAddress(ENTRY)).unwrap();
        let cpuid = hypervisor.supported_cpuid().unwrap();
        let mut made = Vec::new();
        for id in 0..vcpus {
            let mut vcpu = vm.create_vcpu(id).unwrap();
            vcpu.configure_cpuid(&cpuid, vcpus).unwrap();
            vcpu.setup_lapic_lints().unwrap();
            made.push(vcpu);
        }
        made[0].setup_pvh(ENTRY, 0x7000).unwrap();
        Self { vcpus: made, vm, memory }
    }

    /// A machine with this one's memory contents, its vCPUs yet to be loaded.
    pub fn twin(&self) -> Self {
        let count = u32::try_from(self.vcpus.len()).unwrap();
        let twin = Self::new(count, &[]);
        let mut bytes = vec![0; usize::try_from(MEMORY_SIZE).unwrap()];
        self.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        twin.memory.write_slice(&bytes, GuestAddress(0)).unwrap();
        twin
    }

    pub fn word(&self, address: u64) -> u32 {
        self.memory.read_obj(GuestAddress(address)).unwrap()
    }

    /// A word that the guest writes meanwhile.
    pub fn shared_word(&self, address: u64) -> &AtomicU32 {
        let pointer = self.memory.get_host_address(GuestAddress(address)).unwrap();
        // SAFETY: an aligned word inside the mapping, which `self` keeps.
        unsafe { AtomicU32::from_ptr(pointer.cast()) }
    }

    /// Pages that a harvest reports.
    pub fn harvest(&self) -> Vec<usize> {
        let mut words = [0; WORDS];
        let mut note = |written: Written| {
            assert_eq!((written.slot, written.first_page % 64), (SLOT, 0));
            words[usize::try_from(written.first_page / 64).unwrap()] |= written.word;
        };
        self.vm.dirty_log().harvest(&mut note).unwrap();
        pages(&words)
    }
}

pub fn pages(words: &[u64]) -> Vec<usize> {
    (0..words.len() * 64).filter(|page| words[page / 64] >> (page % 64) & 1 == 1).collect()
}

/// Runs to the next write of one byte to a port.
pub fn run_to_out(vcpu: &mut Vcpu) -> (u16, u8) {
    loop {
        match vcpu.run().unwrap() {
            Exit::IoOut { port, size: 1, data } => return (port, data[0]),
            Exit::Interrupted | Exit::Again => {}
            other => panic!("unexpected exit: {other:?}"),
        }
    }
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// The signal of these tests, with a handler that does nothing: it only ends KVM_RUN.
pub fn install_kick() {
    register_signal_handler(vmm_sys_util::signal::SIGRTMIN(), on_kick).unwrap();
}

pub fn kick<T>(thread: &std::thread::JoinHandle<T>) {
    thread.kill(vmm_sys_util::signal::SIGRTMIN()).unwrap();
}

/// Waits until the guest has changed a word.
pub fn wait_for_change(word: &AtomicU32) {
    let before = word.load(Ordering::SeqCst);
    while word.load(Ordering::SeqCst) == before {
        std::thread::yield_now();
    }
}
