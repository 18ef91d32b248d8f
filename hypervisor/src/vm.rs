//! The VM: memory slots, interrupt controllers, event descriptors, and the state that belongs to
//! no vCPU (interrupt controllers and the KVM clock).
//!
//! All methods take `&self`; share a [`Vm`] by `Arc`. Dirty logging is in [`crate::dirty`].

use std::sync::{Arc, OnceLock};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_CAP_XSAVE2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_MEM_LOG_DIRTY_PAGES, KvmIrqRouting, kvm_clock_data, kvm_dirty_gfn, kvm_enable_cap,
    kvm_irqchip, kvm_msi, kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, VmFd};
use thiserror::Error;
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

use crate::dirty::{Bitmap, DirtyLog, Rings, Slots};
use crate::irq::{Route, halves};
use crate::msr::MsrSet;
use crate::state::{IRQCHIPS, Raw, StateError, VmState};
use crate::sys::XSAVE_SIZE_MIN;
use crate::system::Capabilities;
use crate::vcpu::Vcpu;

/// Where KVM on Intel keeps the page table of real mode: one page of guest-physical space that
/// holds no memory.
pub const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;
/// Where KVM on Intel keeps the task state of real mode: three such pages.
pub const TSS_ADDRESS: u64 = 0xfffb_d000;
const TSS_OFFSET: usize = 0xfffb_d000;

const PAGE_SIZE: u64 = 4096;

/// What went wrong with a VM.
#[derive(Debug, Error)]
pub enum VmError {
    #[error("Cannot create a VM")]
    Create(#[source] errno::Error),
    #[error("Cannot read the CPUID that KVM supports")]
    SupportedCpuid(#[source] errno::Error),
    #[error("Cannot turn on manual re-arming of the dirty log")]
    ManualDirtyLog(#[source] errno::Error),
    #[error("Cannot turn on dirty rings")]
    DirtyRings(#[source] errno::Error),
    #[error("A dirty ring lost pages: this KVM does not stop a vCPU whose ring is full")]
    RingOverflow,
    #[error("Of {expected} pages of the dirty rings only {found} were re-armed")]
    PartOfRings { expected: u32, found: u32 },
    #[error("Cannot re-arm the pages of the dirty rings")]
    ResetRings(#[source] errno::Error),
    #[error("Cannot place the task state of real mode")]
    TssAddress(#[source] errno::Error),
    #[error("Cannot place the identity map of real mode")]
    IdentityMap(#[source] errno::Error),
    #[error("Cannot create the interrupt controllers")]
    CreateIrqchip(#[source] errno::Error),
    #[error("Memory slot {slot} is not page-aligned: {address:#x}, {size:#x} bytes")]
    Unaligned { slot: u32, address: u64, size: u64 },
    #[error("Cannot set memory slot {slot} at {guest_address:#x}")]
    SetMemory { slot: u32, guest_address: u64, source: errno::Error },
    #[error("No memory slot {slot}")]
    NoSlot { slot: u32 },
    #[error("The bitmap does not fit memory slot {slot}")]
    BitmapLength { slot: u32 },
    #[error("Cannot read the dirty log of memory slot {slot}")]
    DirtyLog { slot: u32, source: errno::Error },
    #[error("Cannot clear the dirty log of memory slot {slot}")]
    ClearDirtyLog { slot: u32, source: errno::Error },
    #[error("Cannot bind an event to interrupt line {gsi}")]
    Irqfd { gsi: u32, source: errno::Error },
    #[error("Cannot bind an event to a guest address")]
    Ioeventfd(#[source] errno::Error),
    #[error("Cannot set interrupt line {gsi}")]
    IrqLine { gsi: u32, source: errno::Error },
    #[error("Too many interrupt routes: {0}")]
    TooManyRoutes(usize),
    #[error("Cannot set the interrupt routes")]
    Routes(#[source] errno::Error),
    #[error("Cannot send an interrupt message to {address:#x}")]
    Message { address: u64, source: errno::Error },
    #[error("Cannot create vCPU {id}")]
    CreateVcpu { id: u32, source: errno::Error },
    #[error("Cannot read interrupt controller {chip}")]
    GetIrqchip { chip: u32, source: errno::Error },
    #[error("Cannot load interrupt controller {chip}")]
    SetIrqchip { chip: u32, source: errno::Error },
    #[error("Cannot read the VM's clock")]
    GetClock(#[source] errno::Error),
    #[error("Cannot set the VM's clock")]
    SetClock(#[source] errno::Error),
    #[error("The VM's state is not valid")]
    State(#[source] StateError),
}

/// What the vCPUs of a VM share with it.
pub(crate) struct Shared {
    pub(crate) fd: Arc<VmFd>,
    pub(crate) log: Box<dyn DirtyLog>,
    pub(crate) capabilities: Capabilities,
    /// MSRs that KVM lists as state.
    pub(crate) msr_indices: Arc<[u32]>,
    /// MSRs that can be saved and loaded, found out by the first vCPU with a CPUID.
    pub(crate) msr_set: OnceLock<MsrSet>,
    /// Bytes of a vCPU's extended register state.
    pub(crate) xsave_size: usize,
    /// KVM_GET_XSAVE2 exists.
    pub(crate) xsave2: bool,
}

/// A virtual machine.
pub struct Vm {
    shared: Arc<Shared>,
    /// The kernel writes bitmaps of their lengths.
    slots: Arc<Slots>,
}

impl Vm {
    pub(crate) fn new(
        fd: VmFd,
        capabilities: Capabilities,
        msr_indices: Arc<[u32]>,
    ) -> Result<Self, VmError> {
        enable_manual_log(&fd, &capabilities)?;
        let (fd, slots) = (Arc::new(fd), Arc::<Slots>::default());
        let Capabilities { manual_dirty_log, initially_set, .. } = capabilities;
        let log = Bitmap::new(Arc::clone(&fd), Arc::clone(&slots), manual_dirty_log, initially_set);
        // The answer of the VM, not of the host: features can be switched on for one process.
        let large = usize::try_from(fd.check_extension_raw(KVM_CAP_XSAVE2.into())).unwrap_or(0);
        let shared = Shared {
            fd,
            log: Box::new(log),
            capabilities,
            msr_indices,
            msr_set: OnceLock::new(),
            xsave_size: large.max(XSAVE_SIZE_MIN),
            xsave2: large > 0,
        };
        Ok(Self { shared: Arc::new(shared), slots })
    }

    pub(crate) fn fd(&self) -> &VmFd {
        &self.shared.fd
    }

    pub fn capabilities(&self) -> &Capabilities {
        &self.shared.capabilities
    }

    /// Keeps the dirty log in rings from here on. Before the first vCPU, and while no slot's logging
    /// is on. `entries` of each vCPU's is a power of two, usually [`crate::dirty::RING_ENTRIES`].
    ///
    /// # Errors
    /// The VM has vCPUs, or this KVM has no such rings ([`crate::Tracking::is_possible`]).
    pub fn use_rings(&mut self, entries: u32) -> Result<(), VmError> {
        // Each vCPU shares it.
        let late = || VmError::DirtyRings(errno::Error::new(libc::EBUSY));
        let shared = Arc::get_mut(&mut self.shared).ok_or_else(late)?;
        if !entries.is_power_of_two() {
            return Err(VmError::DirtyRings(errno::Error::new(libc::EINVAL)));
        }
        enable_rings(&shared.fd, &shared.capabilities, entries)?;
        shared.log = Box::new(Rings::new(Arc::clone(&shared.fd), entries));
        Ok(())
    }

    /// Which pages the guest writes, of the slots whose logging is on.
    pub fn dirty_log(&self) -> &dyn DirtyLog {
        &*self.shared.log
    }

    /// Creates PICs, IOAPIC and, for each vCPU created later, a LAPIC inside KVM; before that
    /// places what KVM on Intel needs for real mode, see [`TSS_ADDRESS`].
    pub fn create_irqchip(&self) -> Result<(), VmError> {
        self.fd().set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(VmError::IdentityMap)?;
        self.fd().set_tss_address(TSS_OFFSET).map_err(VmError::TssAddress)?;
        self.fd().create_irq_chip().map_err(VmError::CreateIrqchip)
    }

    /// Makes `size` bytes at `host_address` the guest's memory at `guest_address`. The same call
    /// with another `log_dirty` switches dirty logging; `size` 0 removes the slot.
    ///
    /// # Safety
    /// `host_address..host_address + size` stays mapped while the slot exists, and whatever else
    /// accesses it allows for a guest that writes there at any time.
    pub unsafe fn set_memory(
        &self,
        slot: u32,
        guest_address: u64,
        size: u64,
        host_address: u64,
        log_dirty: bool,
    ) -> Result<(), VmError> {
        for address in [guest_address, host_address] {
            if !address.is_multiple_of(PAGE_SIZE) || !size.is_multiple_of(PAGE_SIZE) {
                return Err(VmError::Unaligned { slot, address, size });
            }
        }
        let region = kvm_userspace_memory_region {
            slot,
            flags: if log_dirty { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: guest_address,
            memory_size: size,
            userspace_addr: host_address,
        };
        // Before the first page can be noted.
        self.shared.log.slot_set(slot, size / PAGE_SIZE, log_dirty);
        // SAFETY: the caller's promise is exactly what KVM asks for.
        unsafe { self.fd().set_user_memory_region(region) }
            .map_err(|source| VmError::SetMemory { slot, guest_address, source })?;
        self.slots.set(slot, size / PAGE_SIZE, log_dirty);
        Ok(())
    }

    /// Pages of a memory slot.
    pub fn slot_pages(&self, slot: u32) -> Option<u64> {
        self.slots.pages(slot)
    }

    /// Each signal of `event` becomes an edge on interrupt line `gsi`.
    pub fn register_irqfd(&self, event: &EventFd, gsi: u32) -> Result<(), VmError> {
        self.fd().register_irqfd(event, gsi).map_err(|source| VmError::Irqfd { gsi, source })
    }

    pub fn unregister_irqfd(&self, event: &EventFd, gsi: u32) -> Result<(), VmError> {
        self.fd().unregister_irqfd(event, gsi).map_err(|source| VmError::Irqfd { gsi, source })
    }

    /// A write to `address` signals `event` and does not leave the kernel. `datamatch` is the
    /// value that counts, or [`kvm_ioctls::NoDatamatch`].
    pub fn register_ioevent<T: Into<u64>>(
        &self,
        event: &EventFd,
        address: &IoEventAddress,
        datamatch: T,
    ) -> Result<(), VmError> {
        self.fd().register_ioevent(event, address, datamatch).map_err(VmError::Ioeventfd)
    }

    pub fn unregister_ioevent<T: Into<u64>>(
        &self,
        event: &EventFd,
        address: &IoEventAddress,
        datamatch: T,
    ) -> Result<(), VmError> {
        self.fd().unregister_ioevent(event, address, datamatch).map_err(VmError::Ioeventfd)
    }

    /// Raises or lowers an interrupt line.
    pub fn set_irq_line(&self, gsi: u32, active: bool) -> Result<(), VmError> {
        self.fd().set_irq_line(gsi, active).map_err(|source| VmError::IrqLine { gsi, source })
    }

    /// Replaces all interrupt routes, the default ones of the interrupt controllers included.
    pub fn set_routes(&self, routes: &[Route]) -> Result<(), VmError> {
        let entries: Vec<_> = routes.iter().flat_map(|route| route.entries()).collect();
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| VmError::TooManyRoutes(entries.len()))?;
        self.fd().set_gsi_routing(&table).map_err(VmError::Routes)
    }

    /// Sends one interrupt message, as a device's MSI write would.
    pub fn signal_message(&self, address: u64, data: u32) -> Result<(), VmError> {
        let (address_lo, address_hi) = halves(address);
        let message = kvm_msi { address_lo, address_hi, data, ..Default::default() };
        // A message that a masked or absent LAPIC drops is the guest's affair.
        self.fd()
            .signal_msi(message)
            .map(|_| ())
            .map_err(|source| VmError::Message { address, source })
    }

    /// Creates a vCPU; `id` is its APIC id as well, see [`crate::Topology::apic_id`].
    pub fn create_vcpu(&self, id: u32) -> Result<Vcpu, VmError> {
        let create = |source| VmError::CreateVcpu { id, source };
        let fd = self.fd().create_vcpu(id.into()).map_err(create)?;
        self.shared.log.vcpu_created(&fd).map_err(create)?;
        Vcpu::new(id, fd, Arc::clone(&self.shared)).map_err(create)
    }

    /// Nanoseconds of the VM's KVM clock.
    pub fn clock_ns(&self) -> Result<u64, VmError> {
        Ok(self.fd().get_clock().map_err(VmError::GetClock)?.clock)
    }

    /// Sets the VM's KVM clock. Flags stay zero: what KVM_GET_CLOCK returns in them describes the
    /// reading, and KVM_CLOCK_REALTIME would add the time that passed on the wall, which the
    /// guest was not alive for.
    pub fn set_clock_ns(&self, clock: u64) -> Result<(), VmError> {
        self.fd()
            .set_clock(&kvm_clock_data { clock, ..Default::default() })
            .map_err(VmError::SetClock)
    }

    /// The state that belongs to no vCPU. Every vCPU is out of the guest, and no device raises
    /// interrupts.
    pub fn save_state(&self) -> Result<VmState, VmError> {
        let mut irqchips: [Raw<kvm_irqchip>; IRQCHIPS] = Default::default();
        for (chip, raw) in (0..).zip(&mut irqchips) {
            raw.0.chip_id = chip;
            self.fd()
                .get_irqchip(&mut raw.0)
                .map_err(|source| VmError::GetIrqchip { chip, source })?;
        }
        Ok(VmState { clock_ns: self.clock_ns()?, irqchips })
    }

    /// Loads what [`Vm::save_state`] returned, before the vCPUs' own state.
    pub fn restore_state(&self, state: &VmState) -> Result<(), VmError> {
        state.validate().map_err(VmError::State)?;
        self.set_clock_ns(state.clock_ns)?;
        for (chip, raw) in (0..).zip(&state.irqchips) {
            self.fd().set_irqchip(&raw.0).map_err(|source| VmError::SetIrqchip { chip, source })?;
        }
        Ok(())
    }
}

/// Re-arms dirty pages by hand from here on, and lets new slots start all dirty, so that nothing has
/// to be write-protected before the first harvest.
fn enable_manual_log(fd: &VmFd, capabilities: &Capabilities) -> Result<(), VmError> {
    if !capabilities.manual_dirty_log {
        return Ok(());
    }
    let mut flags = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE;
    if capabilities.initially_set {
        flags |= KVM_DIRTY_LOG_INITIALLY_SET;
    }
    let mut cap = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
    cap.args[0] = flags.into();
    fd.enable_cap(&cap).map_err(VmError::ManualDirtyLog)
}

/// Notes dirty pages in rings from here on. Manual re-arming goes off: with it, all pages of a slot
/// would count as dirty at first, and none be protected, but no ring would name them.
fn enable_rings(fd: &VmFd, capabilities: &Capabilities, entries: u32) -> Result<(), VmError> {
    if capabilities.manual_dirty_log {
        let cap = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
        fd.enable_cap(&cap).map_err(VmError::ManualDirtyLog)?;
    }
    let ordered = fd.check_extension_raw(KVM_CAP_DIRTY_LOG_RING_ACQ_REL.into()) > 0;
    let cap = if ordered { KVM_CAP_DIRTY_LOG_RING_ACQ_REL } else { KVM_CAP_DIRTY_LOG_RING };
    let mut cap = kvm_enable_cap { cap, ..Default::default() };
    cap.args[0] = u64::from(entries) * size_of::<kvm_dirty_gfn>() as u64;
    fd.enable_cap(&cap).map_err(VmError::DirtyRings)
}
