//! The CPUID that a VM was made with, where another host is to run it: as numbers, and what that host lacks.
//!
//! Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E; KVM's leaves:
//! Documentation/virt/kvm/x86/cpuid.rst. Names of features are those of Linux' /proc/cpuinfo.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};

use super::{CpuidError, LEAF_FEATURES, LEAF_FEATURES_EXTENDED, LEAF_VENDOR, of};

const LEAF_XSAVE: u32 = 0xd;
const LEAF_SIZES: u32 = 0x8000_0008;

/// A leaf: function, index, flags, EAX, EBX, ECX, EDX.
pub type Leaf = [u32; 7];

/// What [`from_leaves`] makes a CPUID of again. Without the place of the processor that KVM was asked on, which
/// is another one the next time; each vCPU gets its own.
#[must_use]
pub fn to_leaves(cpuid: &CpuId) -> Vec<Leaf> {
    let leaf = |e: &kvm_cpuid_entry2| match e.function {
        LEAF_FEATURES => [e.function, e.index, e.flags, e.eax, e.ebx & 0xffff, e.ecx, e.edx],
        super::LEAF_TOPOLOGY_AMD => [e.function, e.index, e.flags, 0, 0, 0, e.edx],
        _ => [e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx],
    };
    let kept = cpuid.as_slice().iter().filter(|e| !super::REBUILT.contains(&e.function));
    kept.map(leaf).collect()
}

/// # Errors
/// [`CpuidError::TooManyLeaves`]; [`CpuidError::NoCpu`] without the leaves that each CPU has.
pub fn from_leaves(leaves: &[Leaf]) -> Result<CpuId, CpuidError> {
    if leaves.len() > KVM_MAX_CPUID_ENTRIES {
        return Err(CpuidError::TooManyLeaves);
    }
    let entry = |&[function, index, flags, eax, ebx, ecx, edx]: &Leaf| kvm_cpuid_entry2 {
        function,
        index,
        flags,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    };
    let entries: Vec<_> = leaves.iter().map(entry).collect();
    let cpuid = CpuId::from_entries(&entries).map_err(|_| CpuidError::TooManyLeaves)?;
    match of(&cpuid, LEAF_VENDOR, 0).is_some() && of(&cpuid, LEAF_FEATURES, 0).is_some() {
        true => Ok(cpuid),
        false => Err(CpuidError::NoCpu),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

use Register::{Eax, Ebx, Ecx, Edx};

impl Register {
    fn of(self, entry: &kvm_cpuid_entry2) -> u32 {
        match self {
            Eax => entry.eax,
            Ebx => entry.ebx,
            Ecx => entry.ecx,
            Edx => entry.edx,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Eax => "EAX",
            Ebx => "EBX",
            Ecx => "ECX",
            Edx => "EDX",
        }
    }
}

/// What [`super::compose`] says itself, whatever the base does. Which of these KVM reports depends on its version.
const COMPOSED: u32 = super::ECX_X2APIC | super::ECX_TSC_DEADLINE | super::ECX_HYPERVISOR;

/// Registers whose bits are features, and which of them count: not what is the topology's, the operating
/// system's (OSXSAVE, OSPKE), or a word on what the CPU no longer does.
const FEATURES: [(u32, u32, Register, u32); 23] = [
    (LEAF_FEATURES, 0, Ecx, !(1 << 27 | COMPOSED)),
    (LEAF_FEATURES, 0, Edx, !super::EDX_HTT),
    (7, 0, Ebx, !(1 << 6 | 1 << 13)),
    (7, 0, Ecx, !(1 << 4 | super::ECX_SHADOW_STACK)),
    (7, 0, Edx, !0),
    (7, 1, Eax, !0),
    (7, 1, Ebx, !0),
    (7, 1, Ecx, !0),
    (7, 1, Edx, !0),
    (7, 2, Edx, !0),
    (LEAF_XSAVE, 0, Eax, !0),
    (LEAF_XSAVE, 0, Edx, !0),
    (LEAF_XSAVE, 1, Eax, !0),
    (LEAF_XSAVE, 1, Ecx, !0),
    (LEAF_XSAVE, 1, Edx, !0),
    (0x14, 0, Ebx, !0),
    (0x4000_0001, 0, Eax, !0),
    (LEAF_FEATURES_EXTENDED, 0, Ecx, !super::ECX_CMP_LEGACY),
    (LEAF_FEATURES_EXTENDED, 0, Edx, !0),
    (0x8000_0007, 0, Edx, !0),
    (LEAF_SIZES, 0, Ebx, !0),
    (0x8000_000a, 0, Edx, !0),
    (0x8000_0021, 0, Eax, !0),
];

/// Those that people look for: function, index, register, bit, name.
const NAMES: [(u32, u32, Register, u32, &str); 54] = [
    (1, 0, Ecx, 0, "sse3"),
    (1, 0, Ecx, 1, "pclmulqdq"),
    (1, 0, Ecx, 5, "vmx"),
    (1, 0, Ecx, 9, "ssse3"),
    (1, 0, Ecx, 12, "fma"),
    (1, 0, Ecx, 13, "cx16"),
    (1, 0, Ecx, 19, "sse4_1"),
    (1, 0, Ecx, 20, "sse4_2"),
    (1, 0, Ecx, 22, "movbe"),
    (1, 0, Ecx, 23, "popcnt"),
    (1, 0, Ecx, 25, "aes"),
    (1, 0, Ecx, 26, "xsave"),
    (1, 0, Ecx, 28, "avx"),
    (1, 0, Ecx, 29, "f16c"),
    (1, 0, Ecx, 30, "rdrand"),
    (7, 0, Ebx, 0, "fsgsbase"),
    (7, 0, Ebx, 3, "bmi1"),
    (7, 0, Ebx, 4, "hle"),
    (7, 0, Ebx, 5, "avx2"),
    (7, 0, Ebx, 7, "smep"),
    (7, 0, Ebx, 8, "bmi2"),
    (7, 0, Ebx, 9, "erms"),
    (7, 0, Ebx, 10, "invpcid"),
    (7, 0, Ebx, 11, "rtm"),
    (7, 0, Ebx, 16, "avx512f"),
    (7, 0, Ebx, 17, "avx512dq"),
    (7, 0, Ebx, 18, "rdseed"),
    (7, 0, Ebx, 19, "adx"),
    (7, 0, Ebx, 20, "smap"),
    (7, 0, Ebx, 23, "clflushopt"),
    (7, 0, Ebx, 24, "clwb"),
    (7, 0, Ebx, 29, "sha_ni"),
    (7, 0, Ebx, 30, "avx512bw"),
    (7, 0, Ebx, 31, "avx512vl"),
    (7, 0, Ecx, 2, "umip"),
    (7, 0, Ecx, 3, "pku"),
    (7, 0, Ecx, 8, "gfni"),
    (7, 0, Ecx, 9, "vaes"),
    (7, 0, Ecx, 10, "vpclmulqdq"),
    (7, 0, Ecx, 11, "avx512_vnni"),
    (7, 0, Ecx, 16, "la57"),
    (7, 0, Ecx, 22, "rdpid"),
    (7, 0, Edx, 23, "avx512_fp16"),
    (7, 0, Edx, 24, "amx_tile"),
    (7, 0, Edx, 26, "spec_ctrl"),
    (7, 0, Edx, 31, "ssbd"),
    (7, 1, Eax, 4, "avx_vnni"),
    (7, 1, Eax, 5, "avx512_bf16"),
    (0x8000_0001, 0, Ecx, 2, "svm"),
    (0x8000_0001, 0, Ecx, 5, "lzcnt"),
    (0x8000_0001, 0, Ecx, 6, "sse4a"),
    (0x8000_0001, 0, Edx, 26, "pdpe1gb"),
    (0x8000_0001, 0, Edx, 27, "rdtscp"),
    (0x8000_0007, 0, Edx, 8, "constant_tsc"),
];

fn feature(function: u32, index: u32, register: Register, bit: u32) -> String {
    let is_it = |known: &&(u32, u32, Register, u32, &str)| {
        (known.0, known.1, known.2, known.3) == (function, index, register, bit)
    };
    match NAMES.iter().find(is_it) {
        Some((.., name)) => (*name).to_owned(),
        None => format!("bit {bit} of {} in CPUID leaf {function:#x}.{index}", register.name()),
    }
}

fn vendor(cpuid: &CpuId) -> Option<[u32; 3]> {
    of(cpuid, LEAF_VENDOR, 0).map(|entry| [entry.ebx, entry.edx, entry.ecx])
}

fn vendor_name(cpuid: &CpuId) -> String {
    let name: Vec<u8> =
        vendor(cpuid).unwrap_or_default().into_iter().flat_map(u32::to_le_bytes).collect();
    String::from_utf8_lossy(&name).escape_debug().to_string()
}

/// Bits of physical addresses.
fn address_bits(cpuid: &CpuId) -> u32 {
    of(cpuid, LEAF_SIZES, 0).map_or(0, |entry| entry.eax & 0xff)
}

/// Size and place of a part of the extended state (XSAVE's standard format).
fn layout(cpuid: &CpuId, part: u32) -> Option<[u32; 2]> {
    of(cpuid, LEAF_XSAVE, part).map(|entry| [entry.eax, entry.ebx])
}

/// What a guest that was told `guest` may use, and a host that offers `host` does not have, for a person.
#[must_use]
pub fn lacks(guest: &CpuId, host: &CpuId) -> Vec<String> {
    if vendor(guest) != vendor(host) {
        return vec![format!("a CPU of {} (here: {})", vendor_name(guest), vendor_name(host))];
    }
    let mut lacks = Vec::new();
    for (function, index, register, counts) in FEATURES {
        let bits = |cpuid| of(cpuid, function, index).map_or(0, |entry| register.of(&entry));
        let missing = bits(guest) & counts & !bits(host);
        let bits = (0..u32::BITS).filter(|bit| missing >> bit & 1 == 1);
        lacks.extend(bits.map(|bit| feature(function, index, register, bit)));
    }
    let (wanted, here) = (address_bits(guest), address_bits(host));
    if wanted > here {
        lacks.push(format!("{wanted} bits of physical addresses (here: {here})"));
    }
    let parts = of(guest, LEAF_XSAVE, 0).map_or(0, |entry| entry.eax);
    let parts = (2..u32::BITS).filter(|part| parts >> part & 1 == 1);
    let elsewhere = parts.filter(|part| layout(guest, *part) != layout(host, *part));
    lacks.extend(elsewhere.map(|part| format!("the place of XSAVE's part {part}")));
    lacks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu(change: impl FnOnce(&mut Vec<Leaf>)) -> CpuId {
        let text = |text: &[u8; 4]| u32::from_le_bytes(*text);
        let mut leaves = vec![
            [0, 0, 0, 0xd, text(b"Genu"), text(b"ntel"), text(b"ineI")],
            [1, 0, 0, 0x123, 0x0504_0800, 1 << 28 | 1 << 27 | COMPOSED, 1 << 28],
            [7, 0, 1, 2, 1 << 16 | 1 << 5, super::super::ECX_SHADOW_STACK, 1 << 3],
            [0xd, 0, 1, 7, 0x340, 0, 0],
            [0xd, 2, 1, 256, 576, 0, 0],
            [0x8000_0008, 0, 0, 46, 0, 0, 0],
            [0xb, 0, 1, 1, 2, 0x100, 5],
        ];
        change(&mut leaves);
        from_leaves(&leaves).unwrap()
    }

    #[test]
    fn a_cpu_lacks_nothing_of_itself_whatever_a_leaf_says_of_the_place() {
        let whole = cpu(|_| {});
        assert_eq!(lacks(&whole, &whole), [""; 0]);
        // APIC id, OSXSAVE, hyper-threading; what an older KVM does not report, and what a guest is never told;
        // and a newer CPU.
        let other = cpu(|leaves| {
            (leaves[1][4], leaves[1][5], leaves[1][6]) = (0x0704_0800, 1 << 28, 0);
            leaves[2][5] = 0;
            leaves[2][4] |= 1 << 30;
            leaves[5][3] = 52;
        });
        assert_eq!(lacks(&whole, &other), [""; 0]);
    }

    #[test]
    fn what_a_host_does_not_have_is_named() {
        let whole = cpu(|_| {});
        let lesser = cpu(|leaves| {
            leaves[2] = [7, 0, 1, 2, 1 << 5, 0, 0];
            leaves[4][4] = 600;
            leaves[5][3] = 39;
        });
        let named = [
            "avx512f",
            "bit 3 of EDX in CPUID leaf 0x7.0",
            "46 bits of physical addresses (here: 39)",
            "the place of XSAVE's part 2",
        ];
        assert_eq!(lacks(&whole, &lesser), named);
        let without = cpu(|leaves| {
            leaves.remove(2);
        });
        let named = ["avx2", "avx512f", "bit 3 of EDX in CPUID leaf 0x7.0"];
        assert_eq!(lacks(&whole, &without), named);
        let other = cpu(|leaves| {
            leaves[0] = [0, 0, 0, 0xd, 0x6874_7541, 0x444d_4163, 0x6974_6e65];
        });
        assert_eq!(lacks(&whole, &other), ["a CPU of GenuineIntel (here: AuthenticAMD)"]);
    }

    #[test]
    fn leaves_are_numbers_and_back() {
        let whole = cpu(|_| {});
        let of_this = to_leaves(&whole);
        assert_eq!(of_this[1], [1, 0, 0, 0x123, 0x0800, 1 << 28 | 1 << 27 | COMPOSED, 1 << 28]);
        assert_eq!(of_this.len(), whole.as_slice().len() - 1, "where it was asked is left out");
        assert_eq!(to_leaves(&from_leaves(&of_this).unwrap()), of_this);
        assert_eq!(from_leaves(&[]).map(drop), Err(CpuidError::NoCpu));
        let many = [[1; 7]; KVM_MAX_CPUID_ENTRIES + 1];
        assert_eq!(from_leaves(&many).map(drop), Err(CpuidError::TooManyLeaves));
    }
}
