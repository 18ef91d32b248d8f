//! State that is saved in one VM and goes on in another.

mod common;

use std::sync::atomic::Ordering;

use common::{Machine, install_kick, kick, run_to_out, wait_for_change};
use hypervisor::{Exit, ImmediateExit, Vcpu, VcpuState, VmState};
use zerocopy::IntoBytes;

/// inc ecx; add eax, ecx; mov [0x4000], eax; out 0x42, al; jmp back
const SUMS: &[u8] = &[0x41, 0x01, 0xc8, 0xa3, 0x00, 0x40, 0, 0, 0xe6, 0x42, 0xeb, 0xf4];

const DAY_NS: u64 = 86_400_000_000_000;

/// Two readings of a vCPU at rest are the same but for the TSC; the first difference is named.
fn assert_same(left: &VcpuState, right: &VcpuState) {
    const IA32_TSC: u32 = 0x10;
    assert_eq!(left.mp_state, right.mp_state);
    assert_eq!(left.regs, right.regs);
    assert_eq!(left.sregs, right.sregs);
    assert_eq!(left.pdptrs, right.pdptrs);
    assert_eq!(left.events, right.events);
    assert_eq!(left.debugregs, right.debugregs);
    assert_eq!(left.xcrs, right.xcrs);
    // XSTATE_BV may or may not name a component that is in its initial state: the CPU decides
    // that anew at each task switch (Intel SDM vol. 1, 13.6).
    let named = |at: usize| (512..520).contains(&at);
    let mut registers = differences(&left.xsave.0, &right.xsave.0);
    registers.retain(|&(at, ..)| !named(at));
    assert_eq!(registers, [], "extended registers");
    assert_eq!(differences(left.lapic.0.as_bytes(), right.lapic.0.as_bytes()), [], "the LAPIC");
    assert_eq!(left.nested, right.nested);
    assert_eq!(left.msrs.len(), right.msrs.len());
    for (left, right) in left.msrs.iter().zip(&right.msrs) {
        assert!(left.index == IA32_TSC || left == right, "{left:x?} {right:x?}");
    }
}

/// Offset and both values of each byte that differs.
fn differences(left: &[u8], right: &[u8]) -> Vec<(usize, u8, u8)> {
    assert_eq!(left.len(), right.len());
    let both = left.iter().zip(right).enumerate();
    both.filter(|(_, (a, b))| a != b).map(|(at, (&a, &b))| (at, a, b)).collect()
}

#[test]
fn a_vcpu_goes_on_in_another_vm() {
    let mut machine = Machine::new(1, SUMS);
    for _ in 0..5 {
        run_to_out(&mut machine.vcpus[0]);
    }
    machine.vm.set_clock_ns(DAY_NS).unwrap();
    let vcpu = machine.vcpus[0].save().unwrap();
    let vm = machine.vm.save_state().unwrap();
    assert_eq!(vcpu.regs.0.rcx, 5);
    assert_eq!(vcpu.regs.0.rax, 15);

    let mut twin = machine.twin();
    twin.vm.restore_state(&vm).unwrap();
    twin.vcpus[0].restore(&vcpu).unwrap();
    let again = twin.vcpus[0].save().unwrap();
    assert_same(&again, &vcpu);
    let vm_again = twin.vm.save_state().unwrap();
    assert_eq!(vm_again.irqchips, vm.irqchips);
    assert!(vm_again.clock_ns >= vm.clock_ns, "the clock does not run backwards");
    for _ in 0..5 {
        let expected = run_to_out(&mut machine.vcpus[0]);
        assert_eq!(run_to_out(&mut twin.vcpus[0]), expected);
    }
    assert_eq!(twin.word(0x4000), 55);
    assert_eq!(machine.word(0x4000), 55);
}

#[test]
fn every_part_of_the_state_is_loaded() {
    let mut machine = Machine::new(1, SUMS);
    run_to_out(&mut machine.vcpus[0]);
    let mut state = machine.vcpus[0].save().unwrap();
    state.regs.0.r15 = 0x1515;
    state.sregs.0.cr2 = 0x2222;
    state.debugregs.0.db[0] = 0x3333;
    // Legacy region of XSAVE: XMM0 at 160; the header's first byte says that SSE is in use.
    state.xsave.0[160..176].fill(0x44);
    state.xsave.0[512] |= 0b11;
    set_msr(&mut state, 0xc000_0102, 0x5555); // KERNEL_GS_BASE
    let mut twin = machine.twin();
    twin.vm.restore_state(&machine.vm.save_state().unwrap()).unwrap();
    twin.vcpus[0].restore(&state).unwrap();
    let again = twin.vcpus[0].save().unwrap();
    assert_eq!(again.xsave.0[160..176], [0x44; 16]);
    assert_eq!(again.regs, state.regs);
    assert_eq!(again.sregs, state.sregs);
    assert_eq!(again.debugregs, state.debugregs);
    assert_eq!(again.events, state.events);
    assert_eq!(again.lapic, state.lapic);
    assert_eq!(msr(&again, 0xc000_0102), 0x5555);
}

fn msr(state: &VcpuState, index: u32) -> u64 {
    state.msrs.iter().find(|msr| msr.index == index).expect("an MSR of every CPU").data
}

fn set_msr(state: &mut VcpuState, index: u32, data: u64) {
    state.msrs.iter_mut().find(|msr| msr.index == index).expect("an MSR of every CPU").data = data;
}

/// KVM may keep a value for which it gave the guest a fault, and refuses it when it is loaded.
#[test]
fn what_a_guest_could_not_have_of_kvm_is_off_elsewhere() {
    let mut machine = Machine::new(1, SUMS);
    run_to_out(&mut machine.vcpus[0]);
    let mut state = machine.vcpus[0].save().unwrap();
    let put = |state: &mut VcpuState, index, data| {
        let mut msr = state.msrs[0];
        (msr.index, msr.data) = (index, data);
        state.msrs.retain(|msr| msr.index != index);
        state.msrs.push(msr);
    };
    // Asynchronous faults by interrupt, and their place beyond all memory.
    let faults = 0x4b56_4d02;
    put(&mut state, faults, 1 << 63 | 1 << 45 | 0b1001);
    let mut twin = machine.twin();
    twin.vm.restore_state(&machine.vm.save_state().unwrap()).unwrap();
    twin.vcpus[0].restore(&state).unwrap();
    let again = twin.vcpus[0].save().unwrap();
    assert!(again.msrs.iter().all(|msr| msr.index != faults || msr.data == 0));
    // What is no favour is missed.
    put(&mut state, 0xdead_beef, 1);
    assert!(twin.vcpus[0].restore(&state).is_err());
}

#[test]
fn a_timer_that_was_armed_stays_armed() {
    let mut machine = Machine::new(1, SUMS);
    if !machine.vm.capabilities().tsc_deadline {
        eprintln!("no TSC deadline timer on this KVM: nothing to keep");
        return;
    }
    let mut state = machine.vcpus[0].save().unwrap();
    let deadline = msr(&state, 0x10) + (1 << 44);
    let lapic = state.lapic.0.as_mut_bytes();
    lapic[0xf0..0xf4].copy_from_slice(&0x1ff_u32.to_le_bytes()); // software-enabled
    lapic[0x320..0x324].copy_from_slice(&0x4_0030_u32.to_le_bytes()); // deadline mode
    set_msr(&mut state, 0x6e0, deadline);
    machine.vcpus[0].restore(&state).unwrap();
    let again = machine.vcpus[0].save().unwrap();
    assert_eq!(msr(&again, 0x6e0), deadline, "written while the timer is in deadline mode");
    assert!(msr(&again, 0x10) >= msr(&state, 0x10), "the TSC goes on from where it was");
    assert!(msr(&again, 0x10) < deadline);
}

/// The first vCPU starts the second at 0x8000 by its LAPIC, then counts; see `START_UP`.
const START_AND_COUNT: &[u8] = &[
    0xc7, 0x05, 0xf0, 0, 0xe0, 0xfe, 0xff, 0x01, 0, 0, // mov [0xfee000f0], 0x1ff
    0xc7, 0x05, 0x10, 0x03, 0xe0, 0xfe, 0, 0, 0, 0x01, // mov [0xfee00310], 1 << 24
    0xc7, 0x05, 0x00, 0x03, 0xe0, 0xfe, 0x00, 0x45, 0, 0, // mov [0xfee00300], 0x4500: INIT
    0xc7, 0x05, 0x00, 0x03, 0xe0, 0xfe, 0x08, 0x46, 0, 0, // mov [0xfee00300], 0x4608: SIPI
    0xff, 0x05, 0x00, 0x40, 0, 0, // inc dword [0x4000]
    0xeb, 0xf8, // jmp back to inc
];
/// Real mode: inc word [0x5000]; jmp back.
const START_UP: &[u8] = &[0xff, 0x06, 0x00, 0x50, 0xeb, 0xfa];

fn run_until_kicked(mut vcpu: Vcpu, handle: &ImmediateExit) -> (Vcpu, VcpuState) {
    loop {
        match vcpu.run().unwrap() {
            Exit::Interrupted | Exit::Again if handle.is_set() => break,
            Exit::Interrupted | Exit::Again => {}
            other => panic!("{other:?}"),
        }
    }
    handle.clear();
    let state = vcpu.save().unwrap();
    (vcpu, state)
}

/// Runs both vCPUs until both have counted on, and returns their states.
fn run_both(machine: &mut Machine) -> Vec<VcpuState> {
    let runs: Vec<_> = machine
        .vcpus
        .drain(..)
        .map(|vcpu| {
            let handle = vcpu.kick_handle();
            let owned = handle.clone();
            (handle, std::thread::spawn(move || run_until_kicked(vcpu, &owned)))
        })
        .collect();
    wait_for_change(machine.shared_word(0x4000));
    wait_for_change(machine.shared_word(0x5000));
    for (handle, thread) in &runs {
        handle.set();
        kick(thread);
    }
    let mut states = Vec::new();
    for (_, thread) in runs {
        let (vcpu, state) = thread.join().unwrap();
        machine.vcpus.push(vcpu);
        states.push(state);
    }
    states
}

#[test]
fn two_vcpus_go_on_from_json_and_from_postcard() {
    install_kick();
    let mut machine = Machine::new(2, START_AND_COUNT);
    vm_memory::Bytes::write_slice(&machine.memory, START_UP, vm_memory::GuestAddress(0x8000))
        .unwrap();
    let waiting = machine.vcpus[1].save().unwrap();
    assert_eq!(waiting.mp_state, 1, "waits for INIT");

    let states = run_both(&mut machine);
    let vm = machine.vm.save_state().unwrap();
    assert_eq!(states[1].sregs.0.cs.base, 0x8000, "the second runs what SIPI named");

    let json = serde_json::to_string(&(&states, &vm)).unwrap();
    let from_json: (Vec<VcpuState>, VmState) = serde_json::from_str(&json).unwrap();
    let bytes = postcard::to_stdvec(&(&states, &vm)).unwrap();
    let from_bytes: (Vec<VcpuState>, VmState) = postcard::from_bytes(&bytes).unwrap();
    assert_eq!((&from_json.0, &from_json.1), (&states, &vm));
    assert_eq!((&from_bytes.0, &from_bytes.1), (&states, &vm));

    for (vcpus, vm) in [from_json, from_bytes] {
        let mut twin = machine.twin();
        twin.vm.restore_state(&vm).unwrap();
        for (vcpu, state) in twin.vcpus.iter_mut().zip(&vcpus) {
            vcpu.restore(state).unwrap();
            assert_same(&vcpu.save().unwrap(), state);
        }
        run_both(&mut twin);
        let (counted, before) =
            (twin.shared_word(0x4000).load(Ordering::SeqCst), machine.word(0x4000));
        assert_ne!(counted, before);
    }
}

#[test]
fn a_vcpu_that_waits_for_its_start_goes_on_waiting_elsewhere() {
    install_kick();
    let mut machine = Machine::new(2, START_AND_COUNT);
    vm_memory::Bytes::write_slice(&machine.memory, START_UP, vm_memory::GuestAddress(0x8000))
        .unwrap();
    let states: Vec<_> = machine.vcpus.iter_mut().map(|vcpu| vcpu.save().unwrap()).collect();
    let mut twin = machine.twin();
    twin.vm.restore_state(&machine.vm.save_state().unwrap()).unwrap();
    for (vcpu, state) in twin.vcpus.iter_mut().zip(&states) {
        vcpu.restore(state).unwrap();
    }
    let states = run_both(&mut twin);
    assert_eq!(states[1].mp_state, 0, "started there");
}

#[test]
fn a_vm_that_ran_can_be_set_back() {
    let mut machine = Machine::new(1, SUMS);
    let fresh = (machine.vcpus[0].save().unwrap(), machine.vm.save_state().unwrap());
    let first: Vec<_> = (0..3).map(|_| run_to_out(&mut machine.vcpus[0])).collect();
    machine.vm.restore_state(&fresh.1).unwrap();
    machine.vcpus[0].restore(&fresh.0).unwrap();
    assert_same(&machine.vcpus[0].save().unwrap(), &fresh.0);
    let second: Vec<_> = (0..3).map(|_| run_to_out(&mut machine.vcpus[0])).collect();
    assert_eq!(first, second);
}

#[test]
fn an_interrupt_line_that_is_up_stays_up() {
    let machine = Machine::new(1, &[]);
    machine.vm.set_irq_line(4, true).unwrap();
    let up = machine.vm.save_state().unwrap();
    let twin = machine.twin();
    assert_ne!(twin.vm.save_state().unwrap().irqchips, up.irqchips);
    twin.vm.restore_state(&up).unwrap();
    assert_eq!(twin.vm.save_state().unwrap().irqchips, up.irqchips);
}

#[test]
fn the_clock_is_set_and_goes_on() {
    let machine = Machine::new(1, &[]);
    machine.vm.set_clock_ns(DAY_NS).unwrap();
    let (first, second) = (machine.vm.clock_ns().unwrap(), machine.vm.clock_ns().unwrap());
    assert!(first >= DAY_NS && second >= first, "{first} {second}");
}
