//! One vCPU: running it, kicking it out of the guest, and bringing it to an instruction's end.
//!
//! A [`Vcpu`] belongs to one thread. Others reach it through [`ImmediateExit`] and a signal:
//! the flag makes a KVM_RUN that is about to start return, the signal one that has started.
//!
//! ```text
//!             run()                        run(), complete_io()
//!   at rest ----------> in the guest ----+----------------------> at rest
//!      ^                                 |
//!      |   complete_io()                 | IoIn, IoOut, MmioRead, MmioWrite
//!      +------------------ I/O pending <-+
//! ```
//!
//! State can be saved only at rest. With I/O pending, the instruction's effect is in the shared
//! area and not yet in the registers.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvm_bindings::{Msrs, kvm_regs, kvm_sregs};
use kvm_ioctls::VcpuFd;
use thiserror::Error;
use vmm_sys_util::errno;

use crate::cpuid::CpuidError;
use crate::exit::{Exit, KICK, OWN, RunArea, RunMapping};
use crate::msr::MsrSet;
use crate::state::StateError;
use crate::sys;
use crate::vm::{Shared, VmError};

/// What went wrong with a vCPU.
#[derive(Debug, Error)]
pub enum VcpuError {
    #[error("Cannot run vCPU {id}")]
    Run { id: u32, source: errno::Error },
    #[error("vCPU {id} has no room to note the pages that it writes")]
    NoRoom { id: u32, source: VmError },
    #[error("vCPU {id} is inside an I/O instruction that was not completed")]
    IoPending { id: u32 },
    #[error("Cannot read {what} of vCPU {id}")]
    Get { id: u32, what: &'static str, source: errno::Error },
    #[error("Cannot set {what} of vCPU {id}")]
    Set { id: u32, what: &'static str, source: errno::Error },
    #[error("vCPU {id} does not take {data:#x} for model-specific register {index:#x}")]
    MsrRefused { id: u32, index: u32, data: u64 },
    #[error("vCPU {id} has {here} bytes of extended registers, the saved state has {saved}")]
    XsaveSize { id: u32, here: usize, saved: usize },
    #[error("vCPU {id} cannot take the state of a nested hypervisor")]
    NoNesting { id: u32 },
    #[error("Cannot compose the CPUID of vCPU {id}")]
    Cpuid { id: u32, source: CpuidError },
    #[error("The state of vCPU {id} is not valid")]
    State { id: u32, source: StateError },
}

/// A virtual CPU.
pub struct Vcpu {
    pub(crate) id: u32,
    pub(crate) fd: VcpuFd,
    pub(crate) area: RunArea,
    pub(crate) shared: Arc<Shared>,
    /// The last exit was an I/O instruction that KVM has yet to complete.
    pub(crate) io_pending: bool,
    /// The area holds an exit that no caller has seen yet.
    pub(crate) unseen: bool,
    /// Frequency of the guest's TSC, 0 if KVM does not know it.
    pub(crate) tsc_khz: u32,
    /// The guest's CPUID has hardware virtualisation.
    pub(crate) nesting: bool,
    /// The MSRs to save, ready for KVM_GET_MSRS; empty before the first save.
    pub(crate) msr_buffers: Vec<Msrs>,
    /// The position of the state that was loaded last.
    pub(crate) loaded: Option<String>,
}

impl Vcpu {
    pub(crate) fn new(id: u32, fd: VcpuFd, shared: Arc<Shared>) -> Result<Self, errno::Error> {
        let area = RunArea::map(&fd, shared.fd.run_size())?;
        let tsc_khz = fd.get_tsc_khz().unwrap_or(0);
        Ok(Self {
            id,
            fd,
            area,
            shared,
            io_pending: false,
            unseen: false,
            tsc_khz,
            nesting: true,
            msr_buffers: Vec::new(),
            loaded: None,
        })
    }

    /// The vCPU's id, which is its APIC id, too.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Frequency of the guest's TSC in kHz, `None` if KVM does not know it.
    pub fn tsc_khz(&self) -> Option<u32> {
        (self.tsc_khz != 0).then_some(self.tsc_khz)
    }

    /// Runs the guest until something needs the VMM. A previous I/O exit is completed first, so
    /// its data must be in place. [`Exit::Interrupted`] and [`Exit::Again`] are no errors: look
    /// for requests, then run again.
    pub fn run(&mut self) -> Result<Exit<'_>, VcpuError> {
        if std::mem::take(&mut self.unseen) {
            return Ok(self.area.exit());
        }
        let ended = sys::run(&self.fd);
        self.io_pending = ended.is_ok() && self.area.is_io();
        match ended {
            Ok(()) if self.area.is_ring_full() => {
                self.make_room()?;
                Ok(Exit::Again)
            }
            Ok(()) => Ok(self.area.exit()),
            Err(error) => match error.errno() {
                libc::EINTR => Ok(Exit::Interrupted),
                libc::EAGAIN => Ok(Exit::Again),
                _ => Err(VcpuError::Run { id: self.id, source: error }),
            },
        }
    }

    /// Brings the vCPU to the end of the I/O instruction it stands in, without running on. The
    /// exit was served before. `None`: at rest. An exit: the instruction has a further part
    /// (a string or a wide access); serve it and call again.
    pub fn complete_io(&mut self) -> Result<Option<Exit<'_>>, VcpuError> {
        if !self.unseen && (!self.io_pending || !self.enter_and_leave()?) {
            return Ok(None);
        }
        self.unseen = false;
        Ok(Some(self.area.exit()))
    }

    /// KVM_RUN without entering the guest; `true` if that ended with an exit to serve, which
    /// the caller hands on or marks as unseen.
    pub(crate) fn enter_and_leave(&mut self) -> Result<bool, VcpuError> {
        let flag = self.area.mapping().immediate_exit();
        flag.fetch_or(OWN, Ordering::SeqCst);
        let ended = sys::run(&self.fd);
        flag.fetch_and(!OWN, Ordering::SeqCst);
        self.io_pending = ended.is_ok() && self.area.is_io();
        match ended {
            Ok(()) if self.area.is_ring_full() => {
                self.make_room()?;
                Ok(false)
            }
            Ok(()) => Ok(true),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Ok(false),
            Err(source) => Err(VcpuError::Run { id: self.id, source }),
        }
    }

    fn make_room(&self) -> Result<(), VcpuError> {
        self.shared.log.make_room().map_err(|source| VcpuError::NoRoom { id: self.id, source })
    }

    /// A handle with which other threads make the next KVM_RUN return at once.
    pub fn kick_handle(&self) -> ImmediateExit {
        ImmediateExit { mapping: Arc::clone(self.area.mapping()) }
    }

    /// Tells a guest with a KVM clock that it stood still, so that its watchdogs do not bark.
    /// Best effort: a guest that has not set up the clock cannot be told.
    pub fn signal_guest_paused(&self) {
        if self.shared.capabilities.kvmclock_ctrl {
            let _ = self.fd.kvmclock_ctrl();
        }
    }

    /// Sends the vCPU a non-maskable interrupt.
    pub fn inject_nmi(&self) -> Result<(), VcpuError> {
        self.fd.nmi().map_err(|source| self.set_error("a non-maskable interrupt", source))
    }

    /// Where the vCPU stands, in one line, for a log. After a triple fault it is what KVM leaves
    /// there: on AMD the state of a reset.
    pub fn position(&self) -> String {
        match (self.fd.get_regs(), self.fd.get_sregs()) {
            (Ok(regs), Ok(sregs)) => position(&regs, &sregs),
            (Err(error), _) | (_, Err(error)) => {
                format!("registers that KVM does not give: {error}")
            }
        }
    }

    /// Where the state that was loaded last had stood, in one line, with what was on its way into
    /// the guest; `None` for a vCPU that started by itself.
    pub fn loaded_position(&self) -> Option<&str> {
        self.loaded.as_deref()
    }

    /// The VM's set of MSRs, found out with this vCPU if it is the first.
    pub(crate) fn msr_set(&self) -> Result<&MsrSet, VcpuError> {
        if let Some(set) = self.shared.msr_set.get() {
            return Ok(set);
        }
        let set = MsrSet::probe(&self.fd, &self.shared.msr_indices)
            .map_err(|source| self.get_error("model-specific registers", source))?;
        Ok(self.shared.msr_set.get_or_init(|| set))
    }

    pub(crate) fn get_error(&self, what: &'static str, source: errno::Error) -> VcpuError {
        VcpuError::Get { id: self.id, what, source }
    }

    pub(crate) fn set_error(&self, what: &'static str, source: errno::Error) -> VcpuError {
        VcpuError::Set { id: self.id, what, source }
    }
}

/// Registers that tell where a vCPU stands.
pub(crate) fn position(regs: &kvm_regs, sregs: &kvm_sregs) -> String {
    format!(
        "rip {:#x} rsp {:#x} rflags {:#x} cs {:#x} cr0 {:#x} cr2 {:#x} cr3 {:#x} cr4 {:#x} \
         efer {:#x}",
        regs.rip,
        regs.rsp,
        regs.rflags,
        sregs.cs.selector,
        sregs.cr0,
        sregs.cr2,
        sregs.cr3,
        sregs.cr4,
        sregs.efer
    )
}

/// Makes KVM_RUN of one vCPU return as soon as it starts, for as long as it is set. It stays
/// valid, without effect, when the vCPU is gone.
#[derive(Clone)]
pub struct ImmediateExit {
    mapping: Arc<RunMapping>,
}

impl ImmediateExit {
    /// Set this first, then send the signal: a KVM_RUN between the two sees the flag, one before
    /// them the signal.
    pub fn set(&self) {
        self.mapping.immediate_exit().fetch_or(KICK, Ordering::SeqCst);
    }

    /// Lets the vCPU run again; its own thread does this when it has seen the request.
    pub fn clear(&self) {
        self.mapping.immediate_exit().fetch_and(!KICK, Ordering::SeqCst);
    }

    pub fn is_set(&self) -> bool {
        self.mapping.immediate_exit().load(Ordering::SeqCst) & KICK != 0
    }
}
