//! Running, exits, kicks, and the end of I/O instructions.

mod common;

use common::{Machine, install_kick, kick, run_to_out, wait_for_change};
use hypervisor::{Exit, VcpuError};

#[test]
fn memory_ports_and_mmio_reach_the_vmm() {
    let mut machine = Machine::new(
        1,
        &[
            0xc7, 0x05, 0x00, 0x20, 0, 0, 0x78, 0x56, 0x34, 0x12, // mov [0x2000], 0x12345678
            0x89, 0x1d, 0x04, 0x20, 0, 0, // mov [0x2004], ebx
            0xe4, 0x43, // in al, 0x43
            0xa2, 0x00, 0x30, 0, 0, // mov [0x3000], al
            0xa1, 0x00, 0x00, 0, 0xd0, // mov eax, [0xd0000000]
            0xa3, 0x08, 0x00, 0, 0xd0, // mov [0xd0000008], eax
            0xb0, 0x41, // mov al, 'A'
            0xe6, 0x42, // out 0x42, al
        ],
    );
    let vcpu = &mut machine.vcpus[0];
    match vcpu.run().unwrap() {
        Exit::IoIn { port: 0x43, size: 1, data } => data.copy_from_slice(&[0x5a]),
        other => panic!("{other:?}"),
    }
    match vcpu.run().unwrap() {
        Exit::MmioRead { address: 0xd000_0000, data } => {
            data.copy_from_slice(&0xcafe_f00d_u32.to_le_bytes());
        }
        other => panic!("{other:?}"),
    }
    match vcpu.run().unwrap() {
        Exit::MmioWrite { address: 0xd000_0008, data } => {
            assert_eq!(data, 0xcafe_f00d_u32.to_le_bytes());
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(run_to_out(vcpu), (0x42, b'A'));
    assert_eq!(machine.word(0x2000), 0x1234_5678);
    assert_eq!(machine.word(0x2004), 0x7000, "start_info is in EBX");
    assert_eq!(machine.word(0x3000) & 0xff, 0x5a);
}

#[test]
fn a_string_write_arrives_in_elements() {
    let mut machine = Machine::new(
        1,
        &[
            0xbe, 0x00, 0x20, 0, 0, // mov esi, 0x2000
            0xb9, 0x03, 0, 0, 0, // mov ecx, 3
            0xba, 0xf8, 0x03, 0, 0, // mov edx, 0x3f8
            0xf3, 0x6e, // rep outsb
            0xe6, 0x42, // out 0x42, al
            b'a', b'b', b'c',
        ],
    );
    let text = ENTRY_TEXT;
    vm_memory::Bytes::write_slice(&machine.memory, text, vm_memory::GuestAddress(0x2000)).unwrap();
    let mut heard = Vec::new();
    loop {
        match machine.vcpus[0].run().unwrap() {
            Exit::IoOut { port: 0x3f8, size, data } => {
                assert_eq!(size, 1);
                heard.extend_from_slice(data);
            }
            Exit::IoOut { port: 0x42, .. } => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(heard, text);
}

const ENTRY_TEXT: &[u8] = b"abc";

/// inc [0x4000]; jmp back
const COUNT_FOR_EVER: &[u8] = &[0xff, 0x05, 0x00, 0x40, 0, 0, 0xeb, 0xf8];

#[test]
fn a_kick_ends_a_run_and_is_never_lost() {
    install_kick();
    let mut machine = Machine::new(1, COUNT_FOR_EVER);
    let mut vcpu = machine.vcpus.remove(0);
    let handle = vcpu.kick_handle();
    for _ in 0..20 {
        let owner = std::thread::spawn({
            let handle = handle.clone();
            move || {
                loop {
                    let exit = vcpu.run().unwrap();
                    assert!(matches!(exit, Exit::Interrupted), "{exit:?}");
                    if handle.is_set() {
                        // Completing an instruction in between must not swallow the request.
                        assert!(vcpu.complete_io().unwrap().is_none());
                        vcpu.save().unwrap();
                        assert!(handle.is_set());
                        return vcpu;
                    }
                }
            }
        });
        wait_for_change(machine.shared_word(0x4000));
        handle.set();
        kick(&owner);
        vcpu = owner.join().unwrap();
        // Still set: without any signal, the next run does not start.
        let before = machine.word(0x4000);
        assert!(matches!(vcpu.run().unwrap(), Exit::Interrupted));
        assert_eq!(machine.word(0x4000), before);
        handle.clear();
    }
    drop(vcpu);
    drop(machine);
    handle.set();
    assert!(handle.is_set(), "the handle outlives its vCPU");
}

#[test]
fn an_instruction_is_complete_before_its_state_is_saved() {
    let mut machine = Machine::new(
        1,
        &[
            0xe4, 0x43, // in al, 0x43
            0xe6, 0x42, // out 0x42, al
            0xe6, 0x44, // out 0x44, al
        ],
    );
    let vcpu = &mut machine.vcpus[0];
    let start = vcpu.save().unwrap();
    match vcpu.run().unwrap() {
        Exit::IoIn { port: 0x43, data, .. } => data.copy_from_slice(&[0x77]),
        other => panic!("{other:?}"),
    }
    assert!(vcpu.complete_io().unwrap().is_none());
    let state = vcpu.save().unwrap();
    assert_eq!(state.regs.0.rax & 0xff, 0x77);
    assert_eq!(state.regs.0.rip, start.regs.0.rip + 2);

    // Without the explicit call, too.
    assert_eq!(run_to_out(vcpu), (0x42, 0x77));
    let state = vcpu.save().unwrap();
    assert_eq!(state.regs.0.rip, start.regs.0.rip + 4);

    let mut twin = machine.twin();
    twin.vm.restore_state(&machine.vm.save_state().unwrap()).unwrap();
    twin.vcpus[0].restore(&state).unwrap();
    assert_eq!(run_to_out(&mut twin.vcpus[0]), (0x44, 0x77), "the write is not repeated");
}

#[test]
fn a_string_read_is_completed_part_by_part() {
    let mut machine = Machine::new(
        1,
        &[
            0xbf, 0x00, 0x20, 0, 0, // mov edi, 0x2000
            0xb9, 0x05, 0, 0, 0, // mov ecx, 5
            0xba, 0x43, 0, 0, 0, // mov edx, 0x43
            0xf3, 0x6c, // rep insb
            0xe6, 0x42, // out 0x42, al
        ],
    );
    let vcpu = &mut machine.vcpus[0];
    let mut next = 1u8..;
    let mut serve = |exit: Exit<'_>| match exit {
        Exit::IoIn { port: 0x43, data, .. } => {
            data.iter_mut().zip(&mut next).for_each(|(byte, value)| *byte = value);
        }
        other => panic!("{other:?}"),
    };
    serve(vcpu.run().unwrap());
    while let Some(exit) = vcpu.complete_io().unwrap() {
        serve(exit);
    }
    let state = vcpu.save().unwrap();
    let done = 5 - state.regs.0.rcx;
    assert!(done > 0, "at least the part that was served has happened");
    let mut twin = machine.twin();
    twin.vm.restore_state(&machine.vm.save_state().unwrap()).unwrap();
    twin.vcpus[0].restore(&state).unwrap();
    let vcpu = &mut twin.vcpus[0];
    loop {
        match vcpu.run().unwrap() {
            Exit::IoOut { port: 0x42, .. } => break,
            exit => serve(exit),
        }
    }
    assert_eq!(twin.word(0x2000), 0x0403_0201);
    assert_eq!(twin.word(0x2004) & 0xff, 5);
}

#[test]
fn an_access_in_two_parts_is_not_saved_in_between() {
    let mut machine = Machine::new(
        1,
        &[
            0xa1, 0xfe, 0x0f, 0x00, 0xd0, // mov eax, [0xd0000ffe]
            0xe6, 0x42, // out 0x42, al
        ],
    );
    let vcpu = &mut machine.vcpus[0];
    match vcpu.run().unwrap() {
        Exit::MmioRead { address: 0xd000_0ffe, data } => data.copy_from_slice(&[1, 2]),
        other => panic!("{other:?}"),
    }
    for _ in 0..2 {
        assert!(matches!(vcpu.save(), Err(VcpuError::IoPending { id: 0 })));
    }
    match vcpu.complete_io().unwrap() {
        Some(Exit::MmioRead { address: 0xd000_1000, data }) => data.copy_from_slice(&[3, 4]),
        other => panic!("the second part is not lost: {other:?}"),
    }
    assert!(vcpu.complete_io().unwrap().is_none());
    assert_eq!(vcpu.save().unwrap().regs.0.rax, 0x0403_0201);
    assert_eq!(run_to_out(vcpu), (0x42, 1));
}

#[test]
fn a_triple_fault_is_a_shutdown() {
    // lidt [0x2000], an empty table there; ud2
    let mut machine = Machine::new(1, &[0x0f, 0x01, 0x1d, 0x00, 0x20, 0, 0, 0x0f, 0x0b]);
    let exit = machine.vcpus[0].run().unwrap();
    assert!(matches!(exit, Exit::Shutdown), "{exit:?}");
}

#[test]
fn a_64_bit_kernel_finds_itself_in_long_mode() {
    const TABLES: u64 = 0x20000;
    const GDT: u64 = 0x30000;
    let mut machine = Machine::new(
        1,
        &[
            0x48, 0x89, 0x34, 0x25, 0x00, 0x40, 0, 0, // mov [0x4000], rsi
            0x48, 0xb8, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, // mov rax, imm64
            0x48, 0xc1, 0xe8, 0x20, // shr rax, 32
            0x89, 0x04, 0x25, 0x08, 0x40, 0, 0, // mov [0x4008], eax
            0xe6, 0x42, // out 0x42, al
        ],
    );
    let write = |bytes: &[u8], address| {
        vm_memory::Bytes::write_slice(&machine.memory, bytes, vm_memory::GuestAddress(address))
            .unwrap();
    };
    write(&hypervisor::boot::identity_page_tables(TABLES), TABLES);
    write(&hypervisor::boot::gdt(true), GDT);
    machine.vcpus[0].setup_linux64(common::ENTRY, 0x7000, GDT, TABLES).unwrap();
    assert_eq!(run_to_out(&mut machine.vcpus[0]), (0x42, 0x44));
    assert_eq!(machine.word(0x4000), 0x7000, "boot_params is in RSI");
    assert_eq!(machine.word(0x4008), 0x1122_3344, "registers have 64 bits");
}
