//! The least machine that runs the test guest: RAM, PVH start, a serial port, a power-off port.
//! It lets a test reach into the guest's memory behind the guest's back.

use std::fs::File;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use guest_logic::machine::{POWER_OFF, RESET, RESET_PORT, SERIAL_PORT, SLEEP_CONTROL_PORT};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

const START_INFO: u64 = 0x6000;
const MEMORY_MAP: u64 = 0x7000;
const COMMAND_LINE: u64 = 0x2_0000;
const HOLE_START: u64 = 0xc000_0000;
const HIGH_START: u64 = 0x1_0000_0000;
/// A generous limit for a machine that hangs; nothing is measured by it.
const PATIENCE: Duration = Duration::from_secs(120);

/// How a machine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    PowerOff,
    Reset,
    Shutdown,
    Failed,
}

enum Event {
    Line(String),
    Ended(Ended),
}

#[derive(Default)]
struct Serial {
    line: Vec<u8>,
    input: Vec<u8>,
}

/// What a test asks of the vCPU threads.
#[derive(Default)]
struct Wish {
    stop: AtomicBool,
    /// vCPUs, by bit, that are to stand still, and that do.
    pause: AtomicU64,
    paused: AtomicU64,
}

/// A running machine.
pub struct Machine {
    pub memory: GuestMemoryMmap,
    /// Every line so far.
    pub lines: Vec<String>,
    serial: Arc<Mutex<Serial>>,
    wish: Arc<Wish>,
    events: Receiver<Event>,
    threads: Vec<JoinHandle<()>>,
}

impl Machine {
    /// Starts the guest; `options` is its command line, to which the number of vCPUs is added.
    pub fn start(vcpus: u64, memory_mib: u64, options: &str) -> Self {
        let memory = guest_memory(memory_mib);
        let entry = load(&memory, &format!("{options} vcpus={vcpus}"));
        let kvm = Kvm::new().expect("/dev/kvm is needed for this test");
        let vm = Arc::new(create_vm(&kvm, &memory));
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).expect("supported CPUID");
        let (sender, events) = channel();
        let serial = Arc::new(Mutex::new(Serial::default()));
        let wish = Arc::new(Wish::default());
        install_kick_handler();
        // All of them before the first one runs: it starts the others at once.
        let vcpus: Vec<VcpuFd> = (0..vcpus).map(|id| create_vcpu(&vm, id, &cpuid, entry)).collect();
        let start = |(id, vcpu)| {
            let (serial, wish, sender) = (serial.clone(), wish.clone(), sender.clone());
            let (vm, memory) = (vm.clone(), memory.clone());
            std::thread::spawn(move || {
                run_vcpu(vcpu, id, &serial, &wish, &sender);
                // They must outlive every vCPU.
                drop((vm, memory));
            })
        };
        let threads = (0..).zip(vcpus).map(start).collect();
        Self { memory, lines: Vec::new(), serial, wish, events, threads }
    }

    pub fn type_in(&self, text: &str) {
        self.serial.lock().unwrap().input.extend(text.bytes());
    }

    /// Stops the vCPUs whose bits are set, and waits until they stand still.
    pub fn pause(&self, mask: u64) {
        let mask = mask & ((1 << self.threads.len()) - 1);
        self.wish.pause.store(mask, Ordering::SeqCst);
        while self.wish.paused.load(Ordering::SeqCst) & mask != mask {
            self.kick();
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn resume(&self) {
        self.wish.pause.store(0, Ordering::SeqCst);
        self.threads.iter().for_each(|thread| thread.thread().unpark());
    }

    /// Waits for a line that begins like this.
    pub fn wait_for(&mut self, start: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.next(deadline) {
                Some(Event::Line(line)) if line.starts_with(start) => return line,
                Some(Event::Line(_)) => {}
                Some(Event::Ended(ended)) => panic!("{ended:?} before '{start}': {self}"),
                None => panic!("no '{start}' in time: {self}"),
            }
        }
    }

    /// Waits for the machine's end.
    pub fn wait_for_end(&mut self) -> Ended {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.next(deadline) {
                Some(Event::Line(_)) => {}
                Some(Event::Ended(ended)) => return ended,
                None => panic!("no end in time: {self}"),
            }
        }
    }

    pub fn count(&self, start: &str) -> usize {
        self.lines.iter().filter(|line| line.starts_with(start)).count()
    }

    fn next(&mut self, deadline: Instant) -> Option<Event> {
        let left = deadline.saturating_duration_since(Instant::now());
        let event = match self.events.recv_timeout(left) {
            Ok(event) => event,
            Err(RecvTimeoutError::Timeout) => return None,
            Err(RecvTimeoutError::Disconnected) => Event::Ended(Ended::Failed),
        };
        if let Event::Line(line) = &event {
            self.lines.push(line.clone());
        }
        Some(event)
    }
}

impl std::fmt::Display for Machine {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let tail = self.lines.len().saturating_sub(20);
        let rest = String::from_utf8_lossy(&self.serial.lock().unwrap().line).into_owned();
        write!(formatter, "\n{}\n{rest}", self.lines[tail..].join("\n"))
    }
}

impl Machine {
    fn kick(&self) {
        for thread in self.threads.iter().filter(|thread| !thread.is_finished()) {
            // SAFETY: the thread has not been joined, so its handle is valid.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), libc::SIGUSR1) };
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.wish.stop.store(true, Ordering::SeqCst);
        self.resume();
        // A kick between a vCPU's look at the wish and its KVM_RUN is lost, hence again.
        while self.threads.iter().any(|thread| !thread.is_finished()) {
            self.kick();
            std::thread::sleep(Duration::from_millis(1));
        }
        for thread in self.threads.drain(..) {
            // A vCPU thread that panicked has ended the test already.
            let _ = thread.join();
        }
    }
}

fn guest_memory(memory_mib: u64) -> GuestMemoryMmap {
    let size = memory_mib << 20;
    let low = size.min(HOLE_START);
    let mut ranges = vec![(GuestAddress(0), usize::try_from(low).unwrap())];
    if size > low {
        ranges.push((GuestAddress(HIGH_START), usize::try_from(size - low).unwrap()));
    }
    GuestMemoryMmap::from_ranges(&ranges).expect("guest memory")
}

/// Loads the image and writes what PVH hands over; the entry point.
fn load(memory: &GuestMemoryMmap, command_line: &str) -> u64 {
    let mut image = File::open(guest_image::PATH).expect("the guest's image");
    let loaded = Elf::load(memory, None, &mut image, None).expect("an ELF");
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        panic!("no PVH entry");
    };
    let mut text = command_line.as_bytes().to_vec();
    text.push(0);
    memory.write_slice(&text, GuestAddress(COMMAND_LINE)).unwrap();
    let mut entries = 0_u32;
    for region in memory.iter() {
        let place = GuestAddress(MEMORY_MAP + u64::from(entries) * 24);
        let words = [region.start_addr().0, region.len(), 1];
        memory.write_slice(&words.map(u64::to_le_bytes).concat(), place).unwrap();
        entries += 1;
    }
    let head = [0x336e_c578, 1, 0, 0].map(u32::to_le_bytes).concat();
    let places = [0, COMMAND_LINE, 0, MEMORY_MAP, u64::from(entries)].map(u64::to_le_bytes);
    memory.write_slice(&[head, places.concat()].concat(), GuestAddress(START_INFO)).unwrap();
    entry.0
}

fn create_vm(kvm: &Kvm, memory: &GuestMemoryMmap) -> VmFd {
    let vm = kvm.create_vm().expect("a VM");
    vm.set_tss_address(0xfffb_d000).expect("TSS address");
    vm.create_irq_chip().expect("irqchip");
    for (slot, region) in (0..).zip(memory.iter()) {
        let host = memory.get_host_address(region.start_addr()).unwrap();
        let description = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: host.addr() as u64,
        };
        // SAFETY: the mapping lives as long as `memory`, which every vCPU thread keeps.
        unsafe { vm.set_user_memory_region(description) }.expect("memory slot");
    }
    vm
}

fn create_vcpu(vm: &VmFd, id: u64, cpuid: &CpuId, entry: u64) -> VcpuFd {
    let vcpu = vm.create_vcpu(id).expect("a vCPU");
    let mut cpuid = cpuid.clone();
    for leaf in cpuid.as_mut_slice() {
        let id = u32::try_from(id).unwrap();
        match leaf.function {
            1 => leaf.ebx = (leaf.ebx & 0x00ff_ffff) | id << 24,
            0xb | 0x1f => leaf.edx = id,
            _ => {}
        }
    }
    vcpu.set_cpuid2(&cpuid).expect("CPUID");
    if id == 0 {
        start_state(&vcpu, entry);
    }
    vcpu
}

/// PVH's initial state: 32-bit protected mode, flat segments, no paging.
fn start_state(vcpu: &VcpuFd, entry: u64) {
    let mut sregs = vcpu.get_sregs().expect("sregs");
    for (segment, kind) in
        [(&mut sregs.cs, 0xb), (&mut sregs.ds, 3), (&mut sregs.es, 3), (&mut sregs.ss, 3)]
    {
        segment.base = 0;
        segment.limit = 0xffff_ffff;
        segment.selector = if kind == 0xb { 0x08 } else { 0x10 };
        segment.type_ = kind;
        (segment.present, segment.s, segment.db, segment.g, segment.l) = (1, 1, 1, 1, 0);
        segment.dpl = 0;
    }
    sregs.cr0 = 1;
    sregs.cr4 = 0;
    vcpu.set_sregs(&sregs).expect("sregs");
    let regs = kvm_regs { rip: entry, rbx: START_INFO, rflags: 2, ..Default::default() };
    vcpu.set_regs(&regs).expect("regs");
}

fn run_vcpu(
    mut vcpu: VcpuFd,
    id: u64,
    serial: &Mutex<Serial>,
    wish: &Wish,
    events: &Sender<Event>,
) {
    let ended = loop {
        while wish.pause.load(Ordering::SeqCst) & (1 << id) != 0 {
            wish.paused.fetch_or(1 << id, Ordering::SeqCst);
            std::thread::park_timeout(Duration::from_millis(10));
        }
        wish.paused.fetch_and(!(1 << id), Ordering::SeqCst);
        if wish.stop.load(Ordering::SeqCst) {
            return;
        }
        match vcpu.run() {
            Ok(VcpuExit::IoOut(port, data)) => match (port, data) {
                (SERIAL_PORT, data) => transmit(serial, data, events),
                (SLEEP_CONTROL_PORT, [POWER_OFF]) => break Ended::PowerOff,
                (RESET_PORT, [RESET]) => break Ended::Reset,
                _ => {}
            },
            Ok(VcpuExit::IoIn(port, data)) => data.fill(receive(serial, port)),
            Ok(VcpuExit::MmioRead(_, data)) => data.fill(0xff),
            Ok(VcpuExit::MmioWrite(..) | VcpuExit::Intr) => {}
            Ok(VcpuExit::Shutdown) => break Ended::Shutdown,
            Ok(other) => {
                eprintln!("unexpected exit {other:?}");
                break Ended::Failed;
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(error) => {
                eprintln!("KVM_RUN: {error}");
                break Ended::Failed;
            }
        }
    };
    // The test may be over already.
    let _ = events.send(Event::Ended(ended));
}

fn transmit(serial: &Mutex<Serial>, data: &[u8], events: &Sender<Event>) {
    let mut serial = serial.lock().unwrap();
    for byte in data {
        if *byte != b'\n' {
            serial.line.push(*byte);
            continue;
        }
        let line = String::from_utf8_lossy(&serial.line).into_owned();
        serial.line.clear();
        // The test may be over already.
        let _ = events.send(Event::Line(line));
    }
}

fn receive(serial: &Mutex<Serial>, port: u16) -> u8 {
    let mut serial = serial.lock().unwrap();
    let ready = !serial.input.is_empty();
    match port {
        SERIAL_PORT if ready => serial.input.remove(0),
        SERIAL_PORT => 0,
        port if port == SERIAL_PORT + 5 => 0x60 | u8::from(ready),
        _ => 0xff,
    }
}

/// The kick has only to interrupt KVM_RUN.
fn install_kick_handler() {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: the handler does nothing, so it may run anywhere.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
        libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut());
    }
}
