//! The KVM of this host: opened, asked for what it can do, and refused at once with the reason
//! if a VM could not run on it.

use std::ffi::c_ulong;
use std::io;
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_SREGS2,
    KVM_CLOCK_REALTIME, KVM_CLOCK_TSC_STABLE, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MAX_CPUID_ENTRIES,
};
use kvm_ioctls::{Cap, Kvm};
use thiserror::Error;
use vmm_sys_util::errno;

use crate::vm::{Vm, VmError};

/// Version of the KVM API, unchanged since Linux 2.6.22.
const API_VERSION: i32 = 12;

/// Why this host cannot run a VM; each says what to do about it.
#[derive(Debug, Error)]
pub enum OpenError {
    #[error(
        "No /dev/kvm on this host: turn on virtualisation in the firmware and load kvm_intel \
         or kvm_amd"
    )]
    Missing,
    #[error("No permission to open /dev/kvm: run as root or join the group that owns it")]
    Permission,
    #[error("Cannot open /dev/kvm")]
    Open(#[source] io::Error),
    #[error("KVM speaks API version {0}, and only version 12 is known: use another kernel")]
    ApiVersion(i32),
    #[error("KVM lacks {0}: use a newer kernel")]
    Capability(&'static str),
    #[error("Cannot read KVM's list of model-specific registers")]
    MsrList(#[source] errno::Error),
}

/// What this host's KVM can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Most vCPUs of one VM.
    pub max_vcpus: u32,
    /// Most memory slots of one VM.
    pub max_slots: u32,
    /// The dirty log is re-armed by KVM_CLEAR_DIRTY_LOG, not by reading it.
    pub manual_dirty_log: bool,
    /// All pages of a new slot count as dirty, so that nothing is write-protected up front.
    pub initially_set: bool,
    /// Entries of the largest dirty ring; 0 where there is none.
    pub dirty_ring_max: u32,
    /// KVM_SYNC_X86_* sets of registers that KVM_RUN leaves in the shared page.
    pub sync_regs: u64,
    /// The guest's TSC can run at a frequency of its own.
    pub tsc_control: bool,
    /// The LAPIC timer knows TSC deadlines.
    pub tsc_deadline: bool,
    /// Bytes of the largest nested state; 0 where KVM cannot save any.
    pub nested_state_size: u32,
    /// KVM_RUN looks at `immediate_exit`.
    pub immediate_exit: bool,
    /// KVM_CLOCK_* flags that KVM_GET_CLOCK may return.
    pub clock_flags: u32,
    /// KVM_GET_SREGS2 exists.
    pub sregs2: bool,
    /// Extended control registers can be saved.
    pub xcrs: bool,
    /// Debug registers can be saved.
    pub debugregs: bool,
    /// The guest can be told that it was stopped (KVM_KVMCLOCK_CTRL).
    pub kvmclock_ctrl: bool,
}

impl Capabilities {
    fn probe(kvm: &Kvm) -> Result<Self, OpenError> {
        let required = [
            (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
            (Cap::SyncMmu, "KVM_CAP_SYNC_MMU"),
            (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
            (Cap::Irqfd, "KVM_CAP_IRQFD"),
            (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
            (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
            (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
            (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
            (Cap::MpState, "KVM_CAP_MP_STATE"),
            (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
            (Cap::Xsave, "KVM_CAP_XSAVE"),
            (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
        ];
        for (cap, name) in required {
            if !kvm.check_extension(cap) {
                return Err(OpenError::Capability(name));
            }
        }
        let raw = |cap: u32| kvm.check_extension_raw(c_ulong::from(cap));
        let manual = flags(raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2));
        Ok(Self {
            max_vcpus: u32::try_from(kvm.get_max_vcpus()).unwrap_or(u32::MAX),
            max_slots: u32::try_from(kvm.get_nr_memslots()).unwrap_or(u32::MAX),
            manual_dirty_log: manual & u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE) != 0,
            initially_set: manual & u64::from(KVM_DIRTY_LOG_INITIALLY_SET) != 0,
            dirty_ring_max: dirty_ring_max(
                raw(KVM_CAP_DIRTY_LOG_RING_ACQ_REL).max(kvm.check_extension_int(Cap::DirtyLogRing)),
            ),
            sync_regs: flags(kvm.check_extension_int(Cap::SyncRegs)),
            tsc_control: kvm.check_extension(Cap::TscControl),
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            nested_state_size: u32::try_from(kvm.check_extension_int(Cap::NestedState))
                .unwrap_or(0),
            immediate_exit: true,
            clock_flags: u32::try_from(kvm.check_extension_int(Cap::AdjustClock)).unwrap_or(0)
                & (KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME),
            sregs2: raw(KVM_CAP_SREGS2) > 0,
            xcrs: kvm.check_extension(Cap::Xcrs),
            debugregs: kvm.check_extension(Cap::Debugregs),
            kvmclock_ctrl: kvm.check_extension(Cap::KvmclockCtrl),
        })
    }
}

/// A capability's answer read as a set of flags; an error is the empty set.
fn flags(answer: i32) -> u64 {
    u64::try_from(answer).unwrap_or(0)
}

/// KVM answers the ring's size in bytes; an entry (`kvm_dirty_gfn`) has 16.
fn dirty_ring_max(answer: i32) -> u32 {
    u32::try_from(answer).unwrap_or(0) / 16
}

/// `/dev/kvm` and what it can do.
pub struct Hypervisor {
    kvm: Kvm,
    capabilities: Capabilities,
    msr_indices: Arc<[u32]>,
}

impl Hypervisor {
    /// Opens `/dev/kvm` and checks that it has what a VM needs.
    pub fn open() -> Result<Self, OpenError> {
        let kvm = Kvm::new().map_err(|error| match error.errno() {
            libc::ENOENT | libc::ENODEV | libc::ENXIO => OpenError::Missing,
            libc::EACCES | libc::EPERM => OpenError::Permission,
            code => OpenError::Open(io::Error::from_raw_os_error(code)),
        })?;
        let version = kvm.get_api_version();
        if version != API_VERSION {
            return Err(OpenError::ApiVersion(version));
        }
        let capabilities = Capabilities::probe(&kvm)?;
        let list = kvm.get_msr_index_list().map_err(OpenError::MsrList)?;
        Ok(Self { kvm, capabilities, msr_indices: list.as_slice().into() })
    }

    pub fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// A VM without memory, vCPUs or interrupt controllers, its dirty log a bitmap.
    ///
    /// # Errors
    /// KVM gives none.
    pub fn create_vm(&self) -> Result<Vm, VmError> {
        // KVM_CREATE_VM is interrupted when a signal meets a slow start of the kernel's helper.
        let fd = loop {
            match self.kvm.create_vm() {
                Err(error) if error.errno() == libc::EINTR => {}
                other => break other.map_err(VmError::Create)?,
            }
        };
        Vm::new(fd, self.capabilities.clone(), Arc::clone(&self.msr_indices))
    }

    /// The CPUID that this KVM offers to guests, the base of [`crate::Vcpu::configure_cpuid`].
    pub fn supported_cpuid(&self) -> Result<CpuId, VmError> {
        self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(VmError::SupportedCpuid)
    }
}
