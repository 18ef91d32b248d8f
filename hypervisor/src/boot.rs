//! What a CPU holds when it enters a kernel: registers, and the tables that registers point to.
//!
//! PVH: <https://xenbits.xen.org/docs/unstable/misc/pvh.html>. 64-bit Linux entry:
//! Documentation/arch/x86/boot.rst, "64-bit boot protocol". The tables are returned as bytes; the
//! caller writes them to guest memory.

use kvm_bindings::{kvm_regs, kvm_segment};
use zerocopy::{FromBytes, IntoBytes};

use crate::msr::{IA32_MISC_ENABLE, IA32_MTRR_DEF_TYPE};
use crate::state::Msr;
use crate::vcpu::{Vcpu, VcpuError};

/// Bytes of [`gdt`].
pub const GDT_SIZE: usize = 5 * 8;
/// Bytes of [`identity_page_tables`]: a table of level 4, one of level 3, four of level 2.
pub const PAGE_TABLES_SIZE: usize = 6 * PAGE;

const PAGE: usize = 4096;
const HUGE_PAGE: u64 = 2 << 20;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit of RFLAGS that is always set.
const RFLAGS_RESERVED: u64 = 1 << 1;

const PRESENT_WRITABLE: u64 = 0b11;
const PAGE_SIZE_BIT: u64 = 1 << 7;

// Linux' own selectors (__BOOT_CS, __BOOT_DS), so that a kernel finds what its tables will hold.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;

const CODE_READ_ACCESSED: u8 = 0b1011;
const DATA_WRITE_ACCESSED: u8 = 0b0011;
const TASK_BUSY: u8 = 0b1011;

/// The local vector table's entries for the two pins of a LAPIC, and their delivery modes.
const LAPIC_LINT0: usize = 0x350;
const LAPIC_LINT1: usize = 0x360;
const DELIVERY_MODE_MASK: u32 = 0x700;
const DELIVERY_NMI: u32 = 0x400;
const DELIVERY_EXTINT: u32 = 0x700;
const LVT_MASKED: u32 = 1 << 16;

fn flat(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

fn code(long: bool) -> kvm_segment {
    flat(CODE_SELECTOR, CODE_READ_ACCESSED, long)
}

fn data() -> kvm_segment {
    flat(DATA_SELECTOR, DATA_WRITE_ACCESSED, false)
}

fn task() -> kvm_segment {
    kvm_segment {
        limit: 0x67,
        selector: TASK_SELECTOR,
        type_: TASK_BUSY,
        present: 1,
        ..Default::default()
    }
}

/// A segment as its descriptor in a table (Intel SDM vol. 3, 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let bit = |value: u8, shift: u32| u64::from(value & 1) << shift;
    (limit & 0xffff)
        | (segment.base & 0xff_ffff) << 16
        | u64::from(segment.type_ & 0xf) << 40
        | bit(segment.s, 44)
        | u64::from(segment.dpl & 3) << 45
        | bit(segment.present, 47)
        | (limit >> 16 & 0xf) << 48
        | bit(segment.avl, 52)
        | bit(segment.l, 53)
        | bit(segment.db, 54)
        | bit(segment.g, 55)
        | (segment.base >> 24 & 0xff) << 56
}

/// The descriptor table of the entry states here: two empty entries, code, data, task. `long`:
/// for [`Vcpu::setup_linux64`], else for [`Vcpu::setup_pvh`].
pub fn gdt(long: bool) -> [u8; GDT_SIZE] {
    let table = [0, 0, descriptor(&code(long)), descriptor(&data()), descriptor(&task())];
    let mut bytes = [0; GDT_SIZE];
    for (bytes, entry) in bytes.chunks_exact_mut(8).zip(table) {
        bytes.copy_from_slice(&entry.to_le_bytes());
    }
    bytes
}

/// Page tables that map the first 4 GiB to themselves by 2 MiB pages, to be placed at `address`,
/// a multiple of 4096, which is what CR3 then holds.
pub fn identity_page_tables(address: u64) -> Vec<u8> {
    let table = |index: u64| address + index * PAGE as u64 + PRESENT_WRITABLE;
    let level4 = std::iter::once(table(1)).chain(std::iter::repeat_n(0, 511));
    let level3 = (2..6).map(table).chain(std::iter::repeat_n(0, 508));
    let level2 = (0..4 * 512).map(|page| page * HUGE_PAGE + PRESENT_WRITABLE + PAGE_SIZE_BIT);
    level4.chain(level3).chain(level2).flat_map(u64::to_le_bytes).collect()
}

impl Vcpu {
    /// Entry by the PVH boot protocol: 32-bit protected mode, no paging, `start_info` in EBX.
    pub fn setup_pvh(&mut self, entry: u64, start_info: u64) -> Result<(), VcpuError> {
        let what = "special registers";
        let mut sregs = self.fd.get_sregs().map_err(|e| self.get_error(what, e))?;
        sregs.cs = code(false);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) =
            (data(), data(), data(), data(), data());
        sregs.tr = task();
        (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0_PE | CR0_ET, 0, 0, 0);
        self.fd.set_sregs(&sregs).map_err(|e| self.set_error(what, e))?;
        self.enter_at(kvm_regs {
            rip: entry,
            rbx: start_info,
            rflags: RFLAGS_RESERVED,
            ..Default::default()
        })
    }

    /// Entry by Linux' 64-bit boot protocol: long mode, paging on, `boot_params` in RSI. At
    /// `gdt_address` the guest has [`gdt`], at `page_tables` [`identity_page_tables`].
    pub fn setup_linux64(
        &mut self,
        entry: u64,
        boot_params: u64,
        gdt_address: u64,
        page_tables: u64,
    ) -> Result<(), VcpuError> {
        let what = "special registers";
        let mut sregs = self.fd.get_sregs().map_err(|e| self.get_error(what, e))?;
        sregs.cs = code(true);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) =
            (data(), data(), data(), data(), data());
        sregs.tr = task();
        sregs.gdt.base = gdt_address;
        sregs.gdt.limit = 39;
        sregs.idt.base = 0;
        sregs.idt.limit = 0;
        sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
        sregs.cr3 = page_tables;
        sregs.cr4 = CR4_PAE;
        sregs.efer = EFER_LME | EFER_LMA;
        self.fd.set_sregs(&sregs).map_err(|e| self.set_error(what, e))?;
        self.enter_at(kvm_regs {
            rip: entry,
            rsi: boot_params,
            rflags: RFLAGS_RESERVED,
            ..Default::default()
        })
    }

    fn enter_at(&self, regs: kvm_regs) -> Result<(), VcpuError> {
        self.fd.set_regs(&regs).map_err(|e| self.set_error("general registers", e))
    }

    /// Connects the LAPIC's pins as firmware does: the PIC to LINT0, NMI to LINT1.
    pub fn setup_lapic_lints(&mut self) -> Result<(), VcpuError> {
        let mut lapic = self.fd.get_lapic().map_err(|e| self.get_error("the LAPIC", e))?;
        let registers = lapic.as_mut_bytes();
        for (offset, mode) in [(LAPIC_LINT0, DELIVERY_EXTINT), (LAPIC_LINT1, DELIVERY_NMI)] {
            let Ok((register, _)) = u32::mut_from_prefix(&mut registers[offset..]) else {
                continue;
            };
            *register = (*register & !(DELIVERY_MODE_MASK | LVT_MASKED)) | mode;
        }
        self.fd.set_lapic(&lapic).map_err(|e| self.set_error("the LAPIC", e))
    }

    /// What firmware leaves in MSRs: memory is write-back unless something says otherwise, and
    /// string instructions are fast. A KVM without one of them goes without.
    pub(crate) fn setup_boot_msrs(&self) -> Result<(), VcpuError> {
        const MTRR_ENABLE_WRITE_BACK: u64 = 1 << 11 | 6;
        const FAST_STRINGS: u64 = 1;
        let msrs = [
            Msr { index: IA32_MTRR_DEF_TYPE, data: MTRR_ENABLE_WRITE_BACK },
            Msr { index: IA32_MISC_ENABLE, data: FAST_STRINGS },
        ];
        crate::msr::write_each(&self.fd, &msrs, |_, _| {})
            .map_err(|e| self.set_error("model-specific registers", e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_of_the_manual() {
        let words = |long| -> Vec<u64> {
            gdt(long).as_chunks().0.iter().map(|entry| u64::from_le_bytes(*entry)).collect()
        };
        assert_eq!(
            words(false),
            [0, 0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067]
        );
        assert_eq!(words(true)[2], 0x00af_9b00_0000_ffff);
    }

    #[test]
    fn page_tables_map_every_address_to_itself() {
        const BASE: u64 = 0x9000;
        let bytes = identity_page_tables(BASE);
        assert_eq!(bytes.len(), PAGE_TABLES_SIZE);
        let entry = |table: u64, index: u64| {
            let at = usize::try_from(table - BASE + index * 8).unwrap();
            u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
        };
        for address in [0, 0x1234_5678, 0x8000_0000, 0xffff_ffff_u64] {
            let level3 = entry(BASE, address >> 39 & 511);
            let level2 = entry(level3 & !0xfff, address >> 30 & 511);
            let page = entry(level2 & !0xfff, address >> 21 & 511);
            assert_eq!([level3, level2].map(|entry| entry & 0xfff), [3, 3]);
            assert_eq!(page & 0x1f_ffff, 0x83);
            assert_eq!(page & !0x1f_ffff, address & !0x1f_ffff);
        }
        assert_eq!(entry(BASE, 1), 0);
        assert_eq!(entry(BASE + 4096, 4), 0);
    }
}
