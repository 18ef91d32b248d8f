//! What a vCPU says about itself: KVM's CPUID, with the leaves that name this vCPU and its place.
//!
//! In: the leaves that KVM supports, the vCPU's APIC id, the topology. Out: the leaves of that
//! vCPU. All vCPUs of a VM get the same features. A host that is to run another one's VM gives it
//! the base that it had there, and must have what that offers ([`base`]).
//!
//! An APIC id is made of bit fields, lowest first: thread, core, die, package.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use thiserror::Error;

pub mod base;

use crate::vcpu::{Vcpu, VcpuError};

const LEAF_VENDOR: u32 = 0;
const LEAF_FEATURES: u32 = 1;
const LEAF_CACHES_INTEL: u32 = 4;
const LEAF_FEATURES_STRUCTURED: u32 = 7;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_KVM: u32 = 0x4000_0000;
/// By convention among hypervisors: EAX is the TSC's and EBX the APIC timer's frequency, in kHz.
const LEAF_FREQUENCIES: u32 = 0x4000_0010;
const LEAF_FEATURES_EXTENDED: u32 = 0x8000_0001;
const LEAF_SIZES_AMD: u32 = 0x8000_0008;
const LEAF_CACHES_AMD: u32 = 0x8000_001d;
const LEAF_TOPOLOGY_AMD: u32 = 0x8000_001e;
const LEAF_TOPOLOGY_AMD_V2: u32 = 0x8000_0026;

/// Leaves of which nothing is taken from the base.
const REBUILT: [u32; 4] = [LEAF_TOPOLOGY, LEAF_TOPOLOGY_V2, LEAF_TOPOLOGY_AMD_V2, LEAF_FREQUENCIES];

const ECX_X2APIC: u32 = 1 << 21;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
/// Of the structured features (Intel SDM vol. 2, CPUID leaf 7).
const ECX_SHADOW_STACK: u32 = 1 << 7;
const ECX_VMX: u32 = 1 << 5;
const ECX_SVM: u32 = 1 << 2;
const ECX_CMP_LEGACY: u32 = 1 << 1;
const EDX_HTT: u32 = 1 << 28;

/// KVM's APIC timer counts nanoseconds.
const APIC_TIMER_KHZ: u32 = 1_000_000;

/// Types of a level in leaves 0xb and 0x1f.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;
const LEVEL_DIE: u32 = 5;

/// Why a CPUID could not be composed.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum CpuidError {
    #[error("A topology needs at least one thread, core, die and package")]
    EmptyTopology,
    #[error("An APIC id of {0} bits; 8 is the most")]
    TooManyBits(u32),
    #[error("More CPUID leaves than KVM takes")]
    TooManyLeaves,
    #[error("CPUID leaves of no CPU: those of vendor and features are missing")]
    NoCpu,
}

/// How vCPUs are arranged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    pub threads_per_core: u16,
    pub cores_per_die: u16,
    pub dies_per_package: u16,
    pub packages: u16,
}

impl Topology {
    /// One package with that many cores of one thread each.
    pub fn flat(vcpus: u16) -> Self {
        Self { threads_per_core: 1, cores_per_die: vcpus, dies_per_package: 1, packages: 1 }
    }

    /// vCPUs in all.
    pub fn vcpus(self) -> u64 {
        u64::from(self.threads_per_package()) * u64::from(self.packages)
    }

    fn threads_per_package(self) -> u32 {
        [self.cores_per_die, self.dies_per_package]
            .into_iter()
            .fold(self.threads_per_core.into(), |all, each| all.saturating_mul(each.into()))
    }

    fn core_shift(self) -> u32 {
        bits(self.threads_per_core)
    }

    fn die_shift(self) -> u32 {
        self.core_shift() + bits(self.cores_per_die)
    }

    fn package_shift(self) -> u32 {
        self.die_shift() + bits(self.dies_per_package)
    }

    /// The APIC id, and so the KVM id, of the vCPU with this number.
    pub fn apic_id(self, vcpu: u32) -> u32 {
        let [threads, cores, dies] =
            [self.threads_per_core, self.cores_per_die, self.dies_per_package]
                .map(|count| u32::from(count.max(1)));
        let (thread, core) = (vcpu % threads, vcpu / threads % cores);
        let (die, package) = (vcpu / threads / cores % dies, vcpu / threads / cores / dies);
        // A topology too large for a shift is refused later, by `compose`.
        let place = |value: u32, shift| value.checked_shl(shift).unwrap_or(0);
        thread
            | place(core, self.core_shift())
            | place(die, self.die_shift())
            | place(package, self.package_shift())
    }

    fn check(self) -> Result<(), CpuidError> {
        let counts =
            [self.threads_per_core, self.cores_per_die, self.dies_per_package, self.packages];
        if counts.contains(&0) {
            return Err(CpuidError::EmptyTopology);
        }
        // Eight bits are what an xAPIC holds, and more than we have vCPUs for.
        match self.package_shift() + bits(self.packages) {
            0..=8 => Ok(()),
            more => Err(CpuidError::TooManyBits(more)),
        }
    }
}

/// A flat topology; one of more vCPUs than there can be is refused when it is used.
impl From<u32> for Topology {
    fn from(vcpus: u32) -> Self {
        Self::flat(u16::try_from(vcpus).unwrap_or(u16::MAX))
    }
}

/// Bits that number `count` things.
fn bits(count: u16) -> u32 {
    u32::from(count).max(1).next_power_of_two().trailing_zeros()
}

/// What differs from host to host and from vCPU to vCPU.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    pub apic_id: u32,
    pub topology: Topology,
    /// Frequency of the guest's TSC, if KVM knows it.
    pub tsc_khz: Option<u32>,
    /// The LAPIC timer knows TSC deadlines.
    pub tsc_deadline: bool,
}

/// The CPUID of one vCPU.
pub fn compose(base: &CpuId, identity: &Identity) -> Result<CpuId, CpuidError> {
    identity.topology.check()?;
    let base = base.as_slice();
    let amd = base.iter().any(|entry| entry.function == LEAF_VENDOR && is_amd(entry));
    let mut leaves: Vec<_> =
        base.iter().filter(|entry| !REBUILT.contains(&entry.function)).copied().collect();
    for entry in &mut leaves {
        adapt(entry, identity, amd);
    }
    let highest = base.iter().find(|entry| entry.function == LEAF_VENDOR).map_or(0, |e| e.eax);
    if highest >= LEAF_TOPOLOGY {
        leaves.extend(levels(LEAF_TOPOLOGY, identity, &two_levels(identity.topology)));
    }
    if highest >= LEAF_TOPOLOGY_V2 {
        leaves.extend(levels(LEAF_TOPOLOGY_V2, identity, &three_levels(identity.topology)));
    }
    if let Some(khz) = identity.tsc_khz
        && let Some(kvm) = leaves.iter_mut().find(|entry| entry.function == LEAF_KVM)
    {
        kvm.eax = kvm.eax.max(LEAF_FREQUENCIES);
        leaves.push(kvm_cpuid_entry2 {
            function: LEAF_FREQUENCIES,
            eax: khz,
            ebx: APIC_TIMER_KHZ,
            ..Default::default()
        });
    }
    CpuId::from_entries(&leaves).map_err(|_| CpuidError::TooManyLeaves)
}

fn of(cpuid: &CpuId, function: u32, index: u32) -> Option<kvm_cpuid_entry2> {
    let is_it = |entry: &&kvm_cpuid_entry2| (entry.function, entry.index) == (function, index);
    cpuid.as_slice().iter().find(is_it).copied()
}

/// "AuthenticAMD" or "HygonGenuine".
fn is_amd(vendor: &kvm_cpuid_entry2) -> bool {
    [*b"Auth", *b"Hygo"].contains(&vendor.ebx.to_le_bytes())
}

/// Puts the vCPU's identity into a leaf that KVM filled for the host.
fn adapt(entry: &mut kvm_cpuid_entry2, identity: &Identity, amd: bool) {
    let topology = identity.topology;
    let threads = topology.threads_per_package();
    match entry.function {
        LEAF_FEATURES => {
            let ids = (1u32 << topology.package_shift()).min(0xff);
            entry.ebx = (entry.ebx & 0xffff) | ids << 16 | (identity.apic_id & 0xff) << 24;
            entry.ecx |= ECX_HYPERVISOR | ECX_X2APIC;
            set(&mut entry.ecx, ECX_TSC_DEADLINE, identity.tsc_deadline);
            set(&mut entry.edx, EDX_HTT, threads > 1);
        }
        // Its pointer is no MSR, and is not among what a state has: a process with a shadow stack would not
        // survive a take-over.
        LEAF_FEATURES_STRUCTURED if entry.index == 0 => {
            set(&mut entry.ecx, ECX_SHADOW_STACK, false);
        }
        LEAF_CACHES_INTEL if entry.eax & 0x1f != 0 => {
            let cores = 1u32 << (topology.package_shift() - topology.core_shift());
            entry.eax = (entry.eax & 0x3fff) | sharing(entry.eax, topology) << 14;
            entry.eax |= (cores - 1).min(0x3f) << 26;
        }
        LEAF_CACHES_AMD if entry.eax & 0x1f != 0 => {
            entry.eax = (entry.eax & !(0xfff << 14)) | sharing(entry.eax, topology) << 14;
        }
        LEAF_FEATURES_EXTENDED if amd => set(&mut entry.ecx, ECX_CMP_LEGACY, threads > 1),
        LEAF_SIZES_AMD if amd => {
            entry.ecx =
                (entry.ecx & !0xf0ff) | (threads - 1).min(0xff) | topology.package_shift() << 12;
        }
        LEAF_TOPOLOGY_AMD => {
            let core = identity.apic_id >> topology.core_shift();
            entry.eax = identity.apic_id;
            entry.ebx = (core & 0xff) | u32::from(topology.threads_per_core - 1) << 8;
            entry.ecx = identity.apic_id >> topology.package_shift() & 0xff;
        }
        _ => {}
    }
}

fn set(register: &mut u32, bit: u32, on: bool) {
    if on { *register |= bit } else { *register &= !bit }
}

/// Ids that share a cache, less one: the threads of a core up to level 2, a die beyond.
fn sharing(eax: u32, topology: Topology) -> u32 {
    let shift = if eax >> 5 & 7 < 3 { topology.core_shift() } else { topology.die_shift() };
    ((1u32 << shift) - 1).min(0xfff)
}

/// Type, shift to the next level's id, logical CPUs of a level.
type Level = (u32, u32, u32);

fn two_levels(topology: Topology) -> Vec<Level> {
    vec![
        (LEVEL_THREAD, topology.core_shift(), topology.threads_per_core.into()),
        (LEVEL_CORE, topology.package_shift(), topology.threads_per_package()),
    ]
}

fn three_levels(topology: Topology) -> Vec<Level> {
    let die = u32::from(topology.threads_per_core) * u32::from(topology.cores_per_die);
    vec![
        (LEVEL_THREAD, topology.core_shift(), topology.threads_per_core.into()),
        (LEVEL_CORE, topology.die_shift(), die),
        (LEVEL_DIE, topology.package_shift(), topology.threads_per_package()),
    ]
}

/// The subleaves of 0xb or 0x1f, with the empty one that ends them.
fn levels(function: u32, identity: &Identity, levels: &[Level]) -> Vec<kvm_cpuid_entry2> {
    (0..)
        .zip(levels.iter().chain(&[(0, 0, 0)]))
        .map(|(index, &(kind, shift, count))| kvm_cpuid_entry2 {
            function,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: count & 0xffff,
            ecx: kind << 8 | index,
            edx: identity.apic_id,
            ..Default::default()
        })
        .collect()
}

/// Whether a guest with this CPUID can be a hypervisor itself.
fn has_virtualisation(cpuid: &CpuId) -> bool {
    cpuid.as_slice().iter().any(|entry| match entry.function {
        LEAF_FEATURES => entry.ecx & ECX_VMX != 0,
        LEAF_FEATURES_EXTENDED => entry.ecx & ECX_SVM != 0,
        _ => false,
    })
}

impl Vcpu {
    /// Gives the vCPU its CPUID, made from what [`crate::Hypervisor::supported_cpuid`] offers,
    /// and the MSRs that firmware would have set. Once, before it runs or is restored.
    pub fn configure_cpuid(
        &mut self,
        base: &CpuId,
        topology: impl Into<Topology>,
    ) -> Result<(), VcpuError> {
        let identity = Identity {
            apic_id: self.id,
            topology: topology.into(),
            tsc_khz: self.tsc_khz(),
            tsc_deadline: self.shared.capabilities.tsc_deadline,
        };
        let cpuid =
            compose(base, &identity).map_err(|source| VcpuError::Cpuid { id: self.id, source })?;
        self.fd.set_cpuid2(&cpuid).map_err(|source| self.set_error("CPUID", source))?;
        self.nesting = has_virtualisation(&cpuid);
        self.msr_set()?;
        self.setup_boot_msrs()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn base(vendor: &[u8; 4], highest: u32) -> CpuId {
        let vendor = u32::from_le_bytes(*vendor);
        CpuId::from_entries(&[
            leaf(0, 0, [highest, vendor, 0, 0]),
            leaf(1, 0, [0x123, 0xff04_0800, ECX_TSC_DEADLINE, EDX_HTT]),
            leaf(4, 0, [0xfc00_c121, 0, 0, 0]),
            leaf(4, 3, [0xffff_c163, 0, 0, 0]),
            leaf(LEAF_FEATURES_STRUCTURED, 0, [2, 1, ECX_SHADOW_STACK | 4, 1 << 20]),
            leaf(0xb, 0, [9, 9, 0x100, 9]),
            leaf(0x1f, 0, [9, 9, 0x100, 9]),
            leaf(LEAF_KVM, 0, [0x4000_0001, 0, 0, 0]),
            leaf(LEAF_FEATURES_EXTENDED, 0, [0; 4]),
            leaf(LEAF_SIZES_AMD, 0, [0x3030, 0, 0x7fff, 0]),
            leaf(LEAF_CACHES_AMD, 3, [0xffff_c163, 0, 0, 0]),
            leaf(LEAF_TOPOLOGY_AMD, 0, [9; 4]),
        ])
        .unwrap()
    }

    fn of(cpuid: &CpuId, function: u32, index: u32) -> Option<kvm_cpuid_entry2> {
        let same = |entry: &&kvm_cpuid_entry2| (entry.function, entry.index) == (function, index);
        assert!(cpuid.as_slice().iter().filter(same).count() <= 1, "{function:#x} twice");
        super::of(cpuid, function, index)
    }

    const SIX: Topology =
        Topology { threads_per_core: 2, cores_per_die: 3, dies_per_package: 1, packages: 2 };

    fn identity(vcpu: u32) -> Identity {
        let topology = SIX;
        let apic_id = topology.apic_id(vcpu);
        Identity { apic_id, topology, tsc_khz: Some(2_000_000), tsc_deadline: false }
    }

    #[test]
    fn a_register_that_no_state_has_is_not_offered() {
        let identity =
            Identity { apic_id: 0, topology: Topology::flat(1), tsc_khz: None, tsc_deadline: true };
        let composed = compose(&base(b"Genu", 0x1f), &identity).unwrap();
        let features = of(&composed, LEAF_FEATURES_STRUCTURED, 0).unwrap();
        assert_eq!([features.ebx, features.ecx, features.edx], [1, 4, 1 << 20]);
    }

    #[test]
    fn apic_ids_leave_gaps_where_counts_are_no_powers_of_two() {
        let ids: Vec<_> = (0..12).map(|vcpu| SIX.apic_id(vcpu)).collect();
        assert_eq!(ids, [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]);
        assert!((0..254).all(|vcpu| Topology::from(254).apic_id(vcpu) == vcpu));
        assert_eq!(SIX.vcpus(), 12);
    }

    #[test]
    fn leaves_name_the_vcpu_and_its_place() {
        let cpuid = compose(&base(b"Genu", 0x1f), &identity(9)).unwrap();
        let features = of(&cpuid, 1, 0).unwrap();
        assert_eq!(features.eax, 0x123, "model untouched");
        assert_eq!(features.ebx, 11 << 24 | 8 << 16 | 0x0800);
        assert_eq!(features.ecx, ECX_HYPERVISOR | ECX_X2APIC, "no deadline timer here");
        assert_eq!(features.edx, EDX_HTT);
        assert_eq!(of(&cpuid, 4, 0).unwrap().eax, 3 << 26 | 1 << 14 | 0x121);
        assert_eq!(of(&cpuid, 4, 3).unwrap().eax, 3 << 26 | 7 << 14 | 0x163);
        let level = |leaf, index| {
            let entry = of(&cpuid, leaf, index).unwrap();
            assert_eq!(entry.edx, 11);
            assert_eq!(entry.flags, KVM_CPUID_FLAG_SIGNIFCANT_INDEX);
            (entry.eax, entry.ebx, entry.ecx)
        };
        assert_eq!(level(0xb, 0), (1, 2, 0x100));
        assert_eq!(level(0xb, 1), (3, 6, 0x201));
        assert_eq!(level(0xb, 2), (0, 0, 2));
        assert_eq!(level(0x1f, 2), (3, 6, 0x502));
        assert_eq!(of(&cpuid, LEAF_KVM, 0).unwrap().eax, LEAF_FREQUENCIES);
        assert_eq!(of(&cpuid, LEAF_FREQUENCIES, 0).unwrap().eax, 2_000_000);
    }

    #[test]
    fn amd_has_leaves_of_its_own() {
        let cpuid = compose(&base(b"Auth", 0xd), &identity(9)).unwrap();
        assert!(of(&cpuid, 0x1f, 0).is_none(), "beyond the highest leaf");
        assert_eq!(of(&cpuid, LEAF_FEATURES_EXTENDED, 0).unwrap().ecx, ECX_CMP_LEGACY);
        assert_eq!(of(&cpuid, LEAF_SIZES_AMD, 0).unwrap().ecx, 0x3f05);
        assert_eq!(of(&cpuid, LEAF_CACHES_AMD, 3).unwrap().eax, 0xfc00_0163 | 7 << 14);
        let place = of(&cpuid, LEAF_TOPOLOGY_AMD, 0).unwrap();
        assert_eq!((place.eax, place.ebx, place.ecx), (11, 5 | 1 << 8, 1));
    }

    #[test]
    fn impossible_topologies_are_refused() {
        let compose =
            |topology| compose(&base(b"Auth", 0xd), &Identity { topology, ..identity(0) });
        let none = Topology { dies_per_package: 0, ..SIX };
        assert_eq!(compose(none).map(drop), Err(CpuidError::EmptyTopology));
        assert_eq!(compose(Topology::from(257)).map(drop), Err(CpuidError::TooManyBits(9)));
        let full = Topology {
            threads_per_core: u16::MAX,
            cores_per_die: u16::MAX,
            dies_per_package: u16::MAX,
            packages: u16::MAX,
        };
        full.apic_id(u32::MAX);
        assert_eq!(compose(full).map(drop), Err(CpuidError::TooManyBits(64)));
        assert!(compose(Topology::from(256)).is_ok());
    }

    #[test]
    fn virtualisation_is_seen() {
        let with =
            |function, ecx| CpuId::from_entries(&[leaf(function, 0, [0, 0, ecx, 0])]).unwrap();
        assert!(has_virtualisation(&with(1, ECX_VMX)));
        assert!(has_virtualisation(&with(LEAF_FEATURES_EXTENDED, ECX_SVM)));
        assert!(!has_virtualisation(&with(1, ECX_SVM)));
    }
}
