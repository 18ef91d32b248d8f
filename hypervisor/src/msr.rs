//! Model-specific registers: which belong to a vCPU's state, and how they are read and loaded in
//! few calls.
//!
//! KVM lists the MSRs that are state (KVM_GET_MSR_INDEX_LIST), but not all of them exist for a
//! given CPUID, and some lists leave out the MTRRs. So the set is found out once a VM: those that
//! a vCPU can read, and take back. KVM_GET_MSRS and KVM_SET_MSRS stop at the first MSR that they
//! refuse and return how many they did.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno;

use crate::state::{MSRS_MAX, Msr};

pub(crate) const IA32_TSC: u32 = 0x10;
const IA32_FEATURE_CONTROL: u32 = 0x3a;
const IA32_TSC_ADJUST: u32 = 0x3b;
pub(crate) const IA32_MISC_ENABLE: u32 = 0x1a0;
pub(crate) const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
pub(crate) const IA32_TSC_DEADLINE: u32 = 0x6e0;

/// The MSRs of KVM's own interface: clock, steal time, asynchronous faults.
const KVM_PV: [std::ops::RangeInclusive<u32>; 2] = [0x11..=0x12, 0x4b56_4d00..=0x4b56_4dff];
/// Of these, the clock's, old and new.
const KVM_CLOCK: [u32; 4] = [0x11, 0x12, 0x4b56_4d00, 0x4b56_4d01];
/// What a nested hypervisor may use of VMX (Intel SDM vol. 3, appendix A): fixed once a vCPU is in VMX operation.
const VMX: std::ops::RangeInclusive<u32> = 0x480..=0x491;

/// Whether an MSR is loaded before all other registers: what nested VMX may be, and the lock of feature
/// control, which takes a vCPU out of VMX operation where it is 0. Control registers are checked against both.
pub(crate) fn is_early(index: u32) -> bool {
    index == IA32_FEATURE_CONTROL || VMX.contains(&index)
}

/// Takes a vCPU out of VMX operation, in which it may be from a state that was loaded before.
pub(crate) const LEAVE_VMX: Msr = Msr { index: IA32_FEATURE_CONTROL, data: 0 };

/// The MSRs of Hyper-V's interface, which no guest of ours is offered. Merely touching one makes
/// KVM set up its Hyper-V emulation.
const HYPERV: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_01ff;

/// Most MSRs in a call: KVM takes fewer than its MAX_IO_MSRS, 256.
const MSRS_A_CALL: usize = 255;

/// The MSRs that are a vCPU's state, in the order in which they are loaded.
pub(crate) struct MsrSet {
    indices: Vec<u32>,
}

impl MsrSet {
    /// Finds the set on a vCPU that has its CPUID and has not run yet.
    pub(crate) fn probe(vcpu: &VcpuFd, listed: &[u32]) -> Result<Self, errno::Error> {
        let readable = read_back(vcpu, &candidates(listed))?;
        let (tried, assumed): (Vec<_>, Vec<_>) =
            readable.iter().partition(|msr| may_write_back(msr.index));
        let taken = write_what_works(vcpu, &tried)?;
        let mut indices: Vec<u32> =
            taken.iter().copied().chain(assumed.iter().map(|msr| msr.index)).collect();
        indices.sort_by_key(|&index| (load_order(index), index));
        indices.truncate(MSRS_MAX);
        Ok(Self { indices })
    }

    /// Buffers for [`read_into`]: as many MSRs in each as one call takes.
    pub(crate) fn buffers(&self) -> Result<Vec<Msrs>, errno::Error> {
        self.indices.chunks(MSRS_A_CALL).map(buffer).collect()
    }
}

/// KVM's list and the MTRRs, each once, without what is no state of ours.
fn candidates(listed: &[u32]) -> Vec<u32> {
    // Variable ranges, fixed ranges, default type (Intel SDM vol. 3, 12.11).
    let mtrrs = (0x200..=0x20f)
        .chain([0x250, 0x258, 0x259])
        .chain(0x268..=0x26f)
        .chain([IA32_MTRR_DEF_TYPE]);
    let mut indices: Vec<u32> = listed.iter().copied().chain(mtrrs).collect();
    indices.retain(|index| !HYPERV.contains(index));
    indices.sort_unstable();
    indices.dedup();
    indices
}

/// Whether writing an MSR's own value on a fresh vCPU changes nothing: not so for time, and
/// KVM's interface need not be tried.
fn may_write_back(index: u32) -> bool {
    !matches!(index, IA32_TSC | IA32_TSC_ADJUST | IA32_TSC_DEADLINE) && !is_paravirtual(index)
}

/// The place of an MSR in the order of loading. Feature control unlocks others; the TSC comes
/// before all that is measured by it: its adjustment, KVM's clock, the deadline.
fn load_order(index: u32) -> u8 {
    match index {
        IA32_FEATURE_CONTROL => 0,
        IA32_TSC => 1,
        IA32_TSC_DEADLINE => 4,
        index if is_paravirtual(index) => 3,
        _ => 2,
    }
}

/// Whether KVM writes guest memory for an MSR of its own interface: at once, or when the vCPU stops.
pub(crate) fn is_paravirtual(index: u32) -> bool {
    KVM_PV.iter().any(|range| range.contains(&index))
}

/// Whether a guest goes on without it: asynchronous faults, steal time and the like, and no clock.
pub(crate) fn is_favour(index: u32) -> bool {
    is_paravirtual(index) && !KVM_CLOCK.contains(&index)
}

fn buffer(indices: &[u32]) -> Result<Msrs, errno::Error> {
    let entries: Vec<_> =
        indices.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
    wrap(&entries)
}

fn wrap(entries: &[kvm_msr_entry]) -> Result<Msrs, errno::Error> {
    // Fails for too many entries only, and callers chunk.
    Msrs::from_entries(entries).map_err(|_| errno::Error::new(libc::E2BIG))
}

/// The MSRs among `indices` that the vCPU can read, with their values.
fn read_back(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>, errno::Error> {
    let mut found = Vec::new();
    let mut rest = indices;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(MSRS_A_CALL)];
        let mut msrs = buffer(chunk)?;
        let count = vcpu.get_msrs(&mut msrs)?;
        found.extend(msrs.as_slice().iter().take(count).map(from_entry));
        // Past what was read, and past the one that was refused, if the chunk did not end there.
        rest = &rest[(count + 1).min(chunk.len())..];
    }
    Ok(found)
}

/// Writes the MSRs that the vCPU takes, and returns which those are.
fn write_what_works(vcpu: &VcpuFd, msrs: &[Msr]) -> Result<Vec<u32>, errno::Error> {
    let mut taken = Vec::new();
    write_each(vcpu, msrs, |msr, accepted| {
        if accepted {
            taken.push(msr.index);
        }
    })?;
    Ok(taken)
}

/// Writes MSRs in order and in few calls; `report` learns of each whether KVM took it.
pub(crate) fn write_each(
    vcpu: &VcpuFd,
    msrs: &[Msr],
    mut report: impl FnMut(Msr, bool),
) -> Result<(), errno::Error> {
    let mut rest = msrs;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(MSRS_A_CALL)];
        let entries: Vec<_> = chunk.iter().map(to_entry).collect();
        let count = vcpu.set_msrs(&wrap(&entries)?)?.min(chunk.len());
        for &msr in &chunk[..count] {
            report(msr, true);
        }
        let mut done = count;
        if let Some(&refused) = chunk.get(count) {
            report(refused, false);
            done += 1;
        }
        rest = &rest[done..];
    }
    Ok(())
}

/// Reads all MSRs of `buffers` into `state`. An MSR that cannot be read any more leaves its
/// buffer, so that the next save is one call again.
pub(crate) fn read_into(
    vcpu: &VcpuFd,
    buffers: &mut [Msrs],
    state: &mut Vec<Msr>,
) -> Result<(), errno::Error> {
    state.clear();
    for msrs in buffers {
        loop {
            let count = vcpu.get_msrs(msrs)?;
            let entries = msrs.as_slice();
            if count >= entries.len() {
                state.extend(entries.iter().map(from_entry));
                break;
            }
            let kept: Vec<_> = entries
                .iter()
                .enumerate()
                .filter(|&(place, _)| place != count)
                .map(|(_, &entry)| entry)
                .collect();
            *msrs = wrap(&kept)?;
        }
    }
    Ok(())
}

fn from_entry(entry: &kvm_msr_entry) -> Msr {
    Msr { index: entry.index, data: entry.data }
}

fn to_entry(msr: &Msr) -> kvm_msr_entry {
    kvm_msr_entry { index: msr.index, data: msr.data, ..Default::default() }
}
