//! Why a vCPU came back from the guest: the shared `kvm_run` area, read with bounds.
//! Linux: Documentation/virt/kvm/api.rst, "The kvm_run structure".

use std::fmt;
use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU8;

use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_DIRTY_RING_FULL, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT,
    KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IO_IN, KVM_EXIT_MMIO,
    KVM_EXIT_SHUTDOWN, KVM_EXIT_SYSTEM_EVENT, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN,
    kvm_run, kvm_sync_regs,
};
use vmm_sys_util::errno;

use crate::mapping::Mapping;

/// Bit of `immediate_exit` that other threads set, through [`crate::ImmediateExit`].
pub(crate) const KICK: u8 = 1;
/// Bit of `immediate_exit` that the vCPU's own thread sets to complete an instruction. KVM asks
/// only for non-zero; two bits keep a kick that arrives in between from being lost.
pub(crate) const OWN: u8 = 2;

/// Why KVM_RUN returned.
#[derive(Debug)]
pub enum Exit<'a> {
    /// The guest reads a port: fill `data`. String instructions make it several elements of
    /// `size` bytes, one after the other.
    IoIn {
        port: u16,
        size: usize,
        data: &'a mut [u8],
    },
    /// The guest wrote a port: one or more elements of `size` bytes.
    IoOut {
        port: u16,
        size: usize,
        data: &'a [u8],
    },
    /// The guest reads where no memory is: fill `data`, at most 8 bytes.
    MmioRead {
        address: u64,
        data: &'a mut [u8],
    },
    /// The guest wrote where no memory is.
    MmioWrite {
        address: u64,
        data: &'a [u8],
    },
    /// The guest halted; only without interrupt controllers in KVM.
    Hlt,
    /// Triple fault.
    Shutdown,
    /// The guest asked KVM for a reset.
    SystemReset,
    /// The guest asked KVM for power-off.
    SystemShutdown,
    /// A signal or [`crate::ImmediateExit`] ended the run.
    Interrupted,
    /// A waiting vCPU got its start-up message, or KVM wants another try: run again.
    Again,
    /// The CPU refused to enter the guest; its reason.
    FailEntry(u64),
    /// KVM could not go on.
    InternalError(InternalError),
    Debug,
    /// An exit (KVM_EXIT_*) that nothing here asks for.
    Other(u32),
}

/// KVM's words about an internal error: 1 means that it could not emulate an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InternalError {
    pub suberror: u32,
    /// How many words of `data` count.
    pub words: usize,
    pub data: [u64; 16],
}

impl fmt::Display for InternalError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "KVM internal error {}", self.suberror)?;
        for word in &self.data[..self.words.min(self.data.len())] {
            write!(formatter, " {word:#x}")?;
        }
        Ok(())
    }
}

/// The `kvm_run` area of one vCPU, mapped once more: this mapping covers all of it.
pub(crate) struct RunMapping(Mapping);

// SAFETY: the area is plain shared memory. Through a shared reference only `immediate_exit` can
// be reached, and atomically; the rest is `RunArea`'s, whose one owner moves with its thread.
unsafe impl Send for RunMapping {}
// SAFETY: as above.
unsafe impl Sync for RunMapping {}

impl RunMapping {
    fn map(vcpu: &impl AsRawFd, size: usize) -> Result<Self, errno::Error> {
        if size < size_of::<kvm_run>() {
            return Err(errno::Error::new(libc::EINVAL));
        }
        Mapping::new(vcpu, size, 0).map(Self)
    }

    pub(crate) fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the byte is inside the mapping, which lives as long as `self`; every access of
        // this process to it is atomic, and the kernel only reads it.
        unsafe { AtomicU8::from_ptr(self.0.start().add(offset_of!(kvm_run, immediate_exit))) }
    }
}

/// The owner's side of a [`RunMapping`]: one for each vCPU.
pub(crate) struct RunArea {
    mapping: Arc<RunMapping>,
}

impl RunArea {
    /// Maps the area of a vCPU; `size` is KVM_GET_VCPU_MMAP_SIZE.
    pub(crate) fn map(vcpu: &impl AsRawFd, size: usize) -> Result<Self, errno::Error> {
        Ok(Self { mapping: Arc::new(RunMapping::map(vcpu, size)?) })
    }

    pub(crate) fn mapping(&self) -> &Arc<RunMapping> {
        &self.mapping
    }

    /// The structure at the area's start, aligned since a mapping begins with a page.
    fn run(&self) -> *mut kvm_run {
        self.mapping.0.start().cast()
    }

    /// Asks KVM to leave these KVM_SYNC_X86_* registers in the area when a run ends.
    pub(crate) fn set_valid_regs(&mut self, sets: u64) {
        // SAFETY: in bounds and aligned; `&mut self` is the owning thread, outside KVM_RUN.
        unsafe { (&raw mut (*self.run()).kvm_valid_regs).write(sets) }
    }

    /// The registers that KVM left there.
    pub(crate) fn sync_regs(&self) -> kvm_sync_regs {
        // SAFETY: in bounds and aligned; plain integers, valid whatever their bits; the kernel
        // writes only during KVM_RUN, which needs the owner that is calling here.
        unsafe { (&raw const (*self.run()).s.regs).read() }
    }

    /// Whether the last exit is an instruction that KVM completes only when it runs again.
    pub(crate) fn is_io(&self) -> bool {
        // SAFETY: as in `sync_regs`.
        let reason = unsafe { (&raw const (*self.run()).exit_reason).read() };
        matches!(reason, KVM_EXIT_IO | KVM_EXIT_MMIO)
    }

    /// Whether the vCPU came back because its dirty ring is nearly full.
    pub(crate) fn is_ring_full(&self) -> bool {
        // SAFETY: as in `sync_regs`.
        let reason = unsafe { (&raw const (*self.run()).exit_reason).read() };
        reason == KVM_EXIT_DIRTY_RING_FULL
    }

    /// Turns the end of a successful KVM_RUN into an [`Exit`].
    pub(crate) fn exit(&mut self) -> Exit<'_> {
        // SAFETY: as in `sync_regs`.
        let reason = unsafe { (&raw const (*self.run()).exit_reason).read() };
        match reason {
            KVM_EXIT_IO => self.io(),
            KVM_EXIT_MMIO => self.mmio(),
            KVM_EXIT_HLT => Exit::Hlt,
            KVM_EXIT_SHUTDOWN => Exit::Shutdown,
            KVM_EXIT_INTR => Exit::Interrupted,
            KVM_EXIT_DEBUG => Exit::Debug,
            KVM_EXIT_FAIL_ENTRY => {
                // SAFETY: in bounds and aligned; the reason says which variant the kernel wrote.
                let entry =
                    unsafe { (&raw const (*self.run()).__bindgen_anon_1.fail_entry).read() };
                Exit::FailEntry(entry.hardware_entry_failure_reason)
            }
            KVM_EXIT_INTERNAL_ERROR => {
                // SAFETY: as above.
                let error = unsafe { (&raw const (*self.run()).__bindgen_anon_1.internal).read() };
                let words = usize::try_from(error.ndata).unwrap_or(0).min(error.data.len());
                Exit::InternalError(InternalError {
                    suberror: error.suberror,
                    words,
                    data: error.data,
                })
            }
            KVM_EXIT_SYSTEM_EVENT => {
                // SAFETY: as above; only the type is read, which all forms of the event share.
                let kind = unsafe {
                    (&raw const (*self.run()).__bindgen_anon_1.system_event.type_).read()
                };
                match kind {
                    KVM_SYSTEM_EVENT_SHUTDOWN => Exit::SystemShutdown,
                    KVM_SYSTEM_EVENT_RESET => Exit::SystemReset,
                    _ => Exit::Other(reason),
                }
            }
            other => Exit::Other(other),
        }
    }

    fn io(&mut self) -> Exit<'_> {
        // SAFETY: in bounds and aligned; the exit reason says that the kernel wrote this variant.
        let io = unsafe { (&raw const (*self.run()).__bindgen_anon_1.io).read() };
        let size = usize::from(io.size);
        let bytes = usize::try_from(io.count).unwrap_or(usize::MAX).saturating_mul(size);
        let offset = usize::try_from(io.data_offset).unwrap_or(usize::MAX);
        let Some(data) = self.bytes(offset, bytes) else {
            return Exit::Other(KVM_EXIT_IO);
        };
        if u32::from(io.direction) == KVM_EXIT_IO_IN {
            Exit::IoIn { port: io.port, size, data }
        } else {
            Exit::IoOut { port: io.port, size, data }
        }
    }

    fn mmio(&mut self) -> Exit<'_> {
        // SAFETY: in bounds and aligned; the exit reason says that the kernel wrote this variant.
        let mmio = unsafe { (&raw const (*self.run()).__bindgen_anon_1.mmio).read() };
        let bytes = usize::try_from(mmio.len).unwrap_or(usize::MAX).min(mmio.data.len());
        let offset = offset_of!(kvm_run, __bindgen_anon_1.mmio.data);
        let Some(data) = self.bytes(offset, bytes) else {
            return Exit::Other(KVM_EXIT_MMIO);
        };
        if mmio.is_write == 0 {
            Exit::MmioRead { address: mmio.phys_addr, data }
        } else {
            Exit::MmioWrite { address: mmio.phys_addr, data }
        }
    }

    /// Part of the area behind the atomically used byte, if it is inside.
    fn bytes(&mut self, offset: usize, len: usize) -> Option<&mut [u8]> {
        let fixed = offset_of!(kvm_run, __bindgen_anon_1);
        let end = offset.checked_add(len)?;
        if offset < fixed || end > self.mapping.0.size() {
            return None;
        }
        // SAFETY: in the mapping, as just checked, and past `immediate_exit`; the borrow of
        // `self` keeps every other access of this process and KVM_RUN away.
        Some(unsafe { std::slice::from_raw_parts_mut(self.mapping.0.start().add(offset), len) })
    }
}
