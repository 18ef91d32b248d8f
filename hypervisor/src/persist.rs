//! Saving a vCPU and loading it: which of KVM's calls, and in which order.
//!
//! Order at save, and why:
//! 1. KVM_GET_MP_STATE first: it carries out INIT and start-up messages that are waiting, which
//!    changes registers.
//! 2. Registers.
//! 3. MSRs before the LAPIC: a deadline that expires between the two is then seen at least once,
//!    as a deadline in the past or as an interrupt, and never lost.
//!
//! Order at load (CPUID, the VM's clock and interrupt controllers have been loaded):
//! 1. TSC frequency, since TSC values are scaled by it.
//! 2. IA32_FEATURE_CONTROL and the VMX capabilities: KVM refuses them, and a CR4 without VMXE, while the vCPU
//!    is in VMX operation; a feature control of 0 ends that of the state before.
//! 3. Special registers: paging, EFER, APIC base, on which the rest depends.
//! 4. XCR0 before the extended registers that it enables.
//! 5. General registers, nested state (it needs EFER.SVME), debug registers.
//! 6. MSRs: TSC first, KVM's clock late, all but the deadline.
//! 7. LAPIC, then the deadline: KVM ignores one while the timer's mode is another.
//! 8. MP state, then events last: loading registers drops pending exceptions.

use kvm_bindings::{
    KVM_SREGS2_FLAGS_PDPTRS_VALID, KVM_SYNC_X86_VALID_FIELDS, kvm_mp_state, kvm_sregs,
};
use kvm_ioctls::KvmNestedStateBuffer;
use zerocopy::{FromZeros, IntoBytes};

use crate::msr::{self, IA32_TSC, IA32_TSC_DEADLINE};
use crate::state::{Blob, Msr, VcpuState};
use crate::sys;
use crate::vcpu::{Vcpu, VcpuError};

const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LMA: u64 = 1 << 10;

/// Whether the page directory pointers are registers of their own (Intel SDM vol. 3, 4.4.1).
fn is_pae(sregs: &kvm_sregs) -> bool {
    sregs.cr0 & CR0_PG != 0 && sregs.cr4 & CR4_PAE != 0 && sregs.efer & EFER_LMA == 0
}

impl Vcpu {
    /// The whole state of the vCPU. See [`Vcpu::save_into`].
    pub fn save(&mut self) -> Result<VcpuState, VcpuError> {
        let mut state = VcpuState::default();
        self.save_into(&mut state)?;
        Ok(state)
    }

    /// As [`Vcpu::save`], into the buffers of an older state. An I/O instruction that was served
    /// is completed first; one that has a further part is [`VcpuError::IoPending`]: call
    /// [`Vcpu::complete_io`] until it says `None`.
    pub fn save_into(&mut self, state: &mut VcpuState) -> Result<(), VcpuError> {
        self.come_to_rest()?;
        state.tsc_khz = self.tsc_khz;
        state.mp_state =
            self.fd.get_mp_state().map_err(|e| self.get_error("the run state", e))?.mp_state;
        if self.nesting {
            // Moves what an exception brings along (CR2, DR6) to the registers that are read next.
            // KVM puts that off for a guest that runs guests.
            self.fd.get_vcpu_events().map_err(|e| self.get_error("pending events", e))?;
        }
        self.save_registers(state)?;
        self.save_xsave(state)?;
        if self.shared.capabilities.xcrs {
            state.xcrs.0 =
                self.fd.get_xcrs().map_err(|e| self.get_error("extended control registers", e))?;
        }
        self.save_msrs(state)?;
        state.lapic.0 = self.fd.get_lapic().map_err(|e| self.get_error("the LAPIC", e))?;
        if self.shared.capabilities.debugregs {
            state.debugregs.0 =
                self.fd.get_debug_regs().map_err(|e| self.get_error("debug registers", e))?;
        }
        self.save_nested(state)
    }

    fn come_to_rest(&mut self) -> Result<(), VcpuError> {
        if !self.unseen && self.io_pending {
            self.unseen = self.enter_and_leave()?;
        }
        if self.unseen { Err(VcpuError::IoPending { id: self.id }) } else { Ok(()) }
    }

    fn save_registers(&mut self, state: &mut VcpuState) -> Result<(), VcpuError> {
        let sets = u64::from(KVM_SYNC_X86_VALID_FIELDS);
        if self.shared.capabilities.sync_regs & sets == sets {
            self.area.set_valid_regs(sets);
            let left = self.enter_and_leave();
            self.area.set_valid_regs(0);
            self.unseen = left?;
            if self.unseen {
                return Err(VcpuError::IoPending { id: self.id });
            }
            let regs = self.area.sync_regs();
            (state.regs.0, state.sregs.0, state.events.0) = (regs.regs, regs.sregs, regs.events);
        } else {
            state.regs.0 =
                self.fd.get_regs().map_err(|e| self.get_error("general registers", e))?;
            state.sregs.0 =
                self.fd.get_sregs().map_err(|e| self.get_error("special registers", e))?;
            state.events.0 =
                self.fd.get_vcpu_events().map_err(|e| self.get_error("pending events", e))?;
        }
        state.pdptrs = None;
        if self.shared.capabilities.sregs2 && is_pae(&state.sregs.0) {
            let sregs = sys::get_sregs2(&self.fd)
                .map_err(|e| self.get_error("page directory pointers", e))?;
            let valid = sregs.flags & u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0;
            state.pdptrs = valid.then_some(sregs.pdptrs);
        }
        Ok(())
    }

    fn save_xsave(&self, state: &mut VcpuState) -> Result<(), VcpuError> {
        state.xsave.0.resize(self.shared.xsave_size, 0);
        // SAFETY: the buffer has just been given the VM's size.
        unsafe { sys::get_xsave(&self.fd, self.shared.xsave2, &mut state.xsave.0) }
            .map_err(|e| self.get_error("extended registers", e))
    }

    fn save_msrs(&mut self, state: &mut VcpuState) -> Result<(), VcpuError> {
        if self.msr_buffers.is_empty() {
            self.msr_buffers = self
                .msr_set()?
                .buffers()
                .map_err(|e| self.get_error("model-specific registers", e))?;
        }
        msr::read_into(&self.fd, &mut self.msr_buffers, &mut state.msrs)
            .map_err(|e| self.get_error("model-specific registers", e))
    }

    fn save_nested(&mut self, state: &mut VcpuState) -> Result<(), VcpuError> {
        state.nested = None;
        if !self.nesting || self.shared.capabilities.nested_state_size == 0 {
            return Ok(());
        }
        let mut buffer = KvmNestedStateBuffer::empty();
        match self.fd.nested_state(&mut buffer) {
            Ok(_) => {
                // Even the bare header is state: it says whether interrupts are held off.
                let bytes = buffer.as_bytes();
                let size = usize::try_from(buffer.size).unwrap_or(usize::MAX).min(bytes.len());
                state.nested = Some(Blob(bytes[..size].to_vec()));
            }
            // KVM without nesting lists the capability and refuses the call.
            Err(error) if error.errno() == libc::EINVAL => self.nesting = false,
            Err(error) => return Err(self.get_error("nested state", error)),
        }
        Ok(())
    }

    /// Loads a whole state. The vCPU has the CPUID that the state was saved under, and
    /// [`crate::Vm::restore_state`] has been called.
    pub fn restore(&mut self, state: &VcpuState) -> Result<(), VcpuError> {
        state.validate().map_err(|source| VcpuError::State { id: self.id, source })?;
        self.loaded = Some(state.position());
        (self.io_pending, self.unseen) = (false, false);
        self.restore_tsc_khz(state.tsc_khz);
        let (early, others): (Vec<Msr>, Vec<Msr>) =
            state.msrs.iter().partition(|msr| msr::is_early(msr.index));
        self.restore_msrs(&[msr::LEAVE_VMX])?;
        self.restore_msrs(&early)?;
        self.restore_sregs(state)?;
        if self.shared.capabilities.xcrs && state.xcrs.0.nr_xcrs > 0 {
            self.fd
                .set_xcrs(&state.xcrs.0)
                .map_err(|e| self.set_error("extended control registers", e))?;
        }
        self.restore_xsave(&state.xsave.0)?;
        self.fd.set_regs(&state.regs.0).map_err(|e| self.set_error("general registers", e))?;
        self.restore_nested(state)?;
        if self.shared.capabilities.debugregs {
            self.fd
                .set_debug_regs(&state.debugregs.0)
                .map_err(|e| self.set_error("debug registers", e))?;
        }
        let (deadline, others): (Vec<Msr>, Vec<Msr>) =
            others.into_iter().partition(|msr| msr.index == IA32_TSC_DEADLINE);
        self.restore_msrs(&others)?;
        self.fd.set_lapic(&state.lapic.0).map_err(|e| self.set_error("the LAPIC", e))?;
        self.restore_msrs(&deadline)?;
        self.fd
            .set_mp_state(kvm_mp_state { mp_state: state.mp_state })
            .map_err(|e| self.set_error("the run state", e))?;
        self.fd.set_vcpu_events(&state.events.0).map_err(|e| self.set_error("pending events", e))
    }

    /// Parts the TSC from the vCPU's creation, before all vCPUs are restored: KVM before Linux 6.7 takes a value
    /// that is less than a second from what the clock would show by then for an attempt to synchronise, and keeps
    /// its own. The guest's time would step back by what lies between. Of one vCPU only, so that the others,
    /// whose values are close to each other, are synchronised still.
    ///
    /// # Errors
    /// KVM refuses the TSC.
    pub fn part_tsc(&self, state: &VcpuState) -> Result<(), VcpuError> {
        // Hours at any frequency.
        const AWAY: u64 = 1 << 45;
        let of = state.msrs.iter().find(|msr| msr.index == IA32_TSC);
        of.map_or(Ok(()), |tsc| {
            self.restore_msrs(&[Msr { index: IA32_TSC, data: tsc.data.wrapping_add(AWAY) }])
        })
    }

    /// Best effort: without TSC scaling a guest of another frequency runs at this host's, which
    /// its KVM clock follows. Whoever cannot accept that compares [`Vcpu::tsc_khz`] first.
    fn restore_tsc_khz(&mut self, khz: u32) {
        if khz != 0 && khz != self.tsc_khz && self.fd.set_tsc_khz(khz).is_ok() {
            self.tsc_khz = khz;
        }
    }

    fn restore_sregs(&self, state: &VcpuState) -> Result<(), VcpuError> {
        self.fd.set_sregs(&state.sregs.0).map_err(|e| self.set_error("special registers", e))?;
        let (Some(pdptrs), true) = (state.pdptrs, self.shared.capabilities.sregs2) else {
            return Ok(());
        };
        // All but the pointers has just been loaded and is only read back here.
        let what = "page directory pointers";
        let mut sregs = sys::get_sregs2(&self.fd).map_err(|e| self.get_error(what, e))?;
        sregs.flags |= u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID);
        sregs.pdptrs = pdptrs;
        sys::set_sregs2(&self.fd, &sregs).map_err(|e| self.set_error(what, e))
    }

    fn restore_xsave(&self, saved: &[u8]) -> Result<(), VcpuError> {
        let here = self.shared.xsave_size;
        if saved.len() > here {
            return Err(VcpuError::XsaveSize { id: self.id, here, saved: saved.len() });
        }
        // A host with more features has a longer area; zeros are those features' initial state.
        let mut buffer = saved.to_vec();
        buffer.resize(here, 0);
        // SAFETY: the buffer has just been given the VM's size.
        unsafe { sys::set_xsave(&self.fd, &buffer) }
            .map_err(|e| self.set_error("extended registers", e))
    }

    fn restore_nested(&self, state: &VcpuState) -> Result<(), VcpuError> {
        let Some(Blob(saved)) = &state.nested else { return Ok(()) };
        if self.shared.capabilities.nested_state_size == 0 {
            return Err(VcpuError::NoNesting { id: self.id });
        }
        let mut buffer = KvmNestedStateBuffer::new_zeroed();
        buffer.as_mut_bytes()[..saved.len()].copy_from_slice(saved);
        self.fd.set_nested_state(&buffer).map_err(|e| self.set_error("nested state", e))
    }

    /// A zero that is refused is a register that this host lacks and the guest never used.
    fn restore_msrs(&self, msrs: &[Msr]) -> Result<(), VcpuError> {
        let failed = |error| self.set_error("model-specific registers", error);
        let (mut refused, mut off) = (None, vec![]);
        msr::write_each(&self.fd, msrs, |msr, accepted| {
            if accepted || msr.data == 0 {
            } else if msr::is_favour(msr.index) {
                off.push(Msr { data: 0, ..msr });
            } else {
                refused.get_or_insert(msr);
            }
        })
        .map_err(failed)?;
        // Some kernels keep a value for which they gave the guest a fault: to the guest it is off.
        for Msr { index, .. } in &off {
            let id = self.id;
            tracing::warn!("vCPU {id}: KVM does not take back what MSR {index:#x} was: it is off");
        }
        msr::write_each(&self.fd, &off, |_, _| {}).map_err(failed)?;
        match refused {
            None => Ok(()),
            Some(Msr { index, data }) => Err(VcpuError::MsrRefused { id: self.id, index, data }),
        }
    }
}
