# The ring-0 part of the guest: the way in (PVH and AP start-up), the way down to ring 3, the
# fault report and the few services that need privilege.
#
#   PVH entry (32 bit) --+
#                        +-> protected_common -> long_common -> ring 3
#   SIPI -> 16 -> 32 bit +
#
# It stays in assembly and small on purpose: a software KVM emulates every instruction of ring 0,
# and knows no SSE there, which compiled Rust uses freely.
#
# Placeholders in braces are constants of boot.rs.

    .section .note.Xen, "a", @note
    .balign 4
    .long 4
    .long 8
    .long 18                        # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_start

# ------------------------------------------------------------------------------------- 32 bit

    .section .boot, "ax", @progbits
    .code32
    .global pvh_start
pvh_start:
    cli
    cld
    mov dword ptr [start_info_address], ebx
    lgdt [gdt_pointer]
    mov edi, offset bsp_block
    mov ebp, offset bsp_long
    jmp protected_common

    # An AP comes here from the trampoline with a flat 32-bit code segment.
ap_start32:
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov edi, dword ptr [ap_block]
    mov ebp, offset long_common

    # edi: this processor's block; ebp: where to go on in 64-bit mode.
protected_common:
    mov eax, cr4
    or eax, 0x620                   # PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, offset boot_pml4
    mov cr3, eax
    mov ecx, 0xc0000080             # EFER
    rdmsr
    or eax, 0x100                   # LME
    wrmsr
    mov eax, cr0
    and eax, 0x9ffffff3             # not CD, NW, EM, TS
    or eax, 0x80000023              # PG, NE, MP, PE
    mov cr0, eax
    .byte 0xea                      # far jump into the 64-bit code segment
    .long long_start
    .word 0x08

# ------------------------------------------------------------------------------------- 64 bit

    .code64
long_start:
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov edi, edi
    mov ebp, ebp
    mov rsp, qword ptr [rdi]
    jmp rbp

    # Only the first processor: fill the IDT, describe its TSS, ask CPUID.
bsp_long:
    mov r8d, offset idt
    mov r9d, offset fault_stubs
    mov ecx, 32
1:  call set_gate
    add r8, 16
    add r9, 16
    dec ecx
    jnz 1b
    mov r8d, offset idt + 16 * {TIMER_VECTOR}
    mov r9d, offset timer_interrupt
    call set_gate
    mov r8d, offset idt + 16 * {SPURIOUS_VECTOR}
    mov r9d, offset spurious_interrupt
    call set_gate

    mov eax, offset bsp_tss
    mov ecx, eax
    and ecx, 0xffffff
    shl rcx, 16
    shr rax, 24
    shl rax, 56
    or rcx, rax
    mov rax, 0x0000890000000000 + {TSS_LIMIT}
    or rcx, rax
    mov qword ptr [gdt + {FIRST_TSS}], rcx
    mov qword ptr [gdt + {FIRST_TSS} + 8], 0

    mov r8d, offset cpuid_facts
    mov r9d, {CPUID_FACTS}
2:  mov eax, dword ptr [r8]
    xor ecx, ecx
    cpuid
    mov dword ptr [r8 + 4], eax
    mov dword ptr [r8 + 8], ebx
    mov dword ptr [r8 + 12], ecx
    mov dword ptr [r8 + 16], edx
    add r8, 20
    dec r9d
    jnz 2b

    # Every processor: rdi is its block.
long_common:
    lidt [idt_pointer]
    ltr word ptr [rdi + 16]

    mov eax, 1
    xor ecx, ecx
    cpuid
    bt ecx, 26                      # XSAVE
    jnc 4f
    mov rax, cr4
    or eax, 0x40000                 # OSXSAVE
    mov cr4, rax
    mov eax, 3                      # x87 and SSE
    bt ecx, 28                      # AVX
    jnc 3f
    mov eax, 7
3:  xor ecx, ecx
    xor edx, edx
    xsetbv
    mov dword ptr [enabled_xcr0], eax
4:
    # An iretq down to ring 3, with a stack as after a call.
    mov rcx, qword ptr [rdi + 8]
    sub rcx, 8
    mov qword ptr [rcx], 0
    push 0x2b
    push rcx
    push 0x3002                     # IOPL 3, interrupts off
    push 0x33
    push qword ptr [rdi + 32]
    mov rdi, qword ptr [rdi + 24]
    xor eax, eax
    xor edx, edx
    xor ebp, ebp
    mov ds, eax
    mov es, eax
    iretq

    # r8: the gate, r9: the handler, below 4 GiB.
set_gate:
    mov eax, r9d
    mov word ptr [r8], ax
    mov word ptr [r8 + 2], 0x08
    mov word ptr [r8 + 4], 0x8e00
    shr eax, 16
    mov word ptr [r8 + 6], ax
    mov qword ptr [r8 + 8], 0
    ret

    # Ring 3's first instructions on the first processor. Clearing .bss here costs nothing.
    .global ring3_start
ring3_start:
    mov edi, offset bss_start
    mov ecx, offset bss_end
    sub ecx, edi
    xor eax, eax
    rep stosb
    xor edi, edi
    jmp bsp_main

# ------------------------------------------------------------------------ faults and services

    .balign 16
fault_stubs:
    .set vector, 0
    .rept 32
    .balign 16
    # These push an error code themselves (Intel SDM 3A, 6.15); the others get a zero.
    .set has_code, (vector == 8) || (vector >= 10 && vector <= 14) || (vector == 17)
    .set has_code, has_code || (vector == 21) || (vector == 29) || (vector == 30)
    .ifeq has_code
    push 0
    .endif
    push vector
    jmp fault_common
    .set vector, vector + 1
    .endr
    .balign 16

    # Stack: vector, error code, rip, cs, rflags, rsp, ss, and above it the processor's number.
fault_common:
    cmp byte ptr [rsp], 13
    jne report
    test byte ptr [rsp + 24], 3
    jz report
    mov rcx, qword ptr [rsp + 16]
    cmp byte ptr [rcx], 0xf4        # hlt: ring 3's call for a service, the number in eax
    jne report
    cmp eax, {SERVICE_WAIT}
    je service_wait
    cmp eax, {SERVICE_PARK}
    je park
    cmp eax, {SERVICE_TRIPLE_FAULT}
    je triple_fault
    jmp report

service_wait:
    inc qword ptr [rsp + 16]
    sti
    hlt
    cli
    add rsp, 16
    iretq

    .balign 16
timer_interrupt:
    push rax
    mov eax, {LAPIC_EOI}
    mov dword ptr [rax], 0
    pop rax
    iretq

    .balign 16
spurious_interrupt:
    iretq

park:
    cli
    hlt
    jmp park

triple_fault:
    lidt [no_idt]
    ud2

report:
    mov dx, {SERIAL_PORT}
    mov esi, offset text_fault
    call put_text
    mov rbx, qword ptr [rsp]
    call put_hex
    mov esi, offset text_rip
    call put_text
    mov rbx, qword ptr [rsp + 16]
    call put_hex
    mov esi, offset text_error
    call put_text
    mov rbx, qword ptr [rsp + 8]
    call put_hex
    mov esi, offset text_cr2
    call put_text
    mov rbx, cr2
    call put_hex
    mov esi, offset text_rsp
    call put_text
    mov rbx, qword ptr [rsp + 40]
    call put_hex
    test byte ptr [rsp + 24], 3
    jz 1f
    mov esi, offset text_cpu
    call put_text
    mov rbx, qword ptr [rsp + 56]
    call put_hex
1:  mov esi, offset text_end
    call put_text
    mov dx, {SLEEP_PORT}
    mov al, {POWER_OFF}
    out dx, al
    jmp park

    # rsi: a text that ends with a zero; dx: the port.
put_text:
    mov al, byte ptr [rsi]
    test al, al
    jz 1f
    out dx, al
    inc rsi
    jmp put_text
1:  ret

    # rbx: the number, printed without leading zeros.
put_hex:
    mov ecx, 16
    xor edi, edi
1:  rol rbx, 4
    mov eax, ebx
    and eax, 15
    or edi, eax
    jnz 2f
    cmp ecx, 1
    jne 4f
2:  add al, 0x30
    cmp al, 0x3a
    jb 3f
    add al, 0x27
3:  out dx, al
4:  dec ecx
    jnz 1b
    ret

text_fault: .asciz "\nFAULT vector=0x"
text_rip:   .asciz " rip=0x"
text_error: .asciz " error=0x"
text_cr2:   .asciz " cr2=0x"
text_rsp:   .asciz " rsp=0x"
text_cpu:   .asciz " vcpu=0x"
text_end:   .asciz "\n"

# -------------------------------------------------------------------------- the AP trampoline

    # Copied below 1 MiB; only addresses relative to its own start are used in 16-bit mode.
    .code16
    .balign 16
    .global ap_trampoline
    .global ap_trampoline_end
ap_trampoline:
    jmp 1f
    .balign 8
    .word {GDT_LIMIT}               # at offset 8
    .long gdt
1:  cli
    cld
    mov ax, cs
    mov ds, ax
    .byte 0x66                      # a 32-bit base
    lgdt [8]
    mov eax, cr0
    or eax, 1
    mov cr0, eax
    .byte 0x66, 0xea                # far jump with a 32-bit offset
    .long ap_start32
    .word 0x18
ap_trampoline_end:
    .code64

# ------------------------------------------------------------------------------ ring 0's data

    .section .ring0, "aw", @progbits
    .balign 4096
boot_pml4:
    .quad boot_pdpt + 7
    .skip 4088
    .global boot_pdpt
boot_pdpt:
    .quad boot_pd + 7
    .skip 4088
    # The first 16 MiB; boot_map.rs maps the rest from ring 3.
    .global boot_pd
boot_pd:
    .set frame, 0
    .rept 8
    .quad (frame << 21) + 0x87
    .set frame, frame + 1
    .endr
    .skip 4096 - 8 * 8

    .global gdt
gdt:
    .quad 0
    .quad 0x00af9b000000ffff        # 0x08 ring 0, 64-bit code
    .quad 0x00cf93000000ffff        # 0x10 ring 0, data
    .quad 0x00cf9b000000ffff        # 0x18 ring 0, 32-bit code
    .quad 0
    .quad 0x00cff3000000ffff        # 0x28 ring 3, data
    .quad 0x00affb000000ffff        # 0x30 ring 3, 64-bit code
    .quad 0
    .skip 16 * {MAX_VCPUS}
    .balign 16
idt:
    .skip 4096
gdt_pointer:
    .word {GDT_LIMIT}
    .quad gdt
    .balign 8
idt_pointer:
    .word 4095
    .quad idt
no_idt:
    .word 0
    .quad 0

    .balign 16
    .skip 4096
bsp_ring0_stack:
    .quad 0                         # the processor's number, for the fault report
    .balign 16
    .skip {RING3_STACK}
bsp_ring3_stack:

    # What long_common wants to know of a processor; the layout of boot.rs's CpuBlock.
bsp_block:
    .quad bsp_ring0_stack
    .quad bsp_ring3_stack
    .quad {FIRST_TSS}
    .quad 0
    .quad ring3_start
    .global ap_block
ap_block:
    .quad 0

    .balign 16
bsp_tss:
    .long 0
    .quad bsp_ring0_stack
    .skip 102 - 12
    .word 104
    .skip 8192                      # the I/O permission bitmap: every port is allowed
    .byte 0xff

    .balign 8
    .global start_info_address
start_info_address:
    .quad 0
    .global enabled_xcr0
enabled_xcr0:
    .quad 0
    # leaf, eax, ebx, ecx, edx; the order of boot.rs's CPUID_LEAVES
    .global cpuid_facts
cpuid_facts:
    .long 0x00000000, 0, 0, 0, 0
    .long 0x00000001, 0, 0, 0, 0
    .long 0x00000007, 0, 0, 0, 0
    .long 0x00000015, 0, 0, 0, 0
    .long 0x40000000, 0, 0, 0, 0
    .long 0x40000010, 0, 0, 0, 0
    .text
