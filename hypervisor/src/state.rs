//! The saved form of a vCPU and of a VM, and its checks.
//!
//! In: KVM's structures as they are, since they are a kernel ABI and never change their layout.
//! Out: serde, as hexadecimal text for people (snapshots) and as plain bytes otherwise (epochs).
//! What always holds: a value that came from outside has structures of exactly the right length
//! and lists within bounds once [`VcpuState::validate`] or [`VmState::validate`] has passed; what
//! the bits mean is for KVM to check.

use std::fmt;

use kvm_bindings::{
    KVM_MAX_XCRS, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_nested_state, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::KvmNestedStateBuffer;
use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::sys::XSAVE_SIZE_MIN;
use crate::vcpu::position;

/// Most MSRs of a vCPU; KVM lists a few hundred.
pub const MSRS_MAX: usize = 1024;
/// Longest extended register state; today's largest (with AMX tiles) has about 11 KiB.
pub const XSAVE_SIZE_MAX: usize = 64 << 10;
/// Longest nested state: a header and two pages.
pub const NESTED_SIZE_MAX: usize = size_of::<KvmNestedStateBuffer>();
/// Interrupt controllers of a VM: two PICs, one IOAPIC.
pub const IRQCHIPS: usize = 3;

/// What is wrong with a state that came from outside.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum StateError {
    #[error("{0} bytes of extended registers, must be {XSAVE_SIZE_MIN} to {XSAVE_SIZE_MAX}")]
    XsaveSize(usize),
    #[error("{0} model-specific registers, at most {MSRS_MAX}")]
    TooManyMsrs(usize),
    #[error("{0} extended control registers, at most {KVM_MAX_XCRS}")]
    TooManyXcrs(u32),
    #[error("{0} bytes of nested state do not fit their header")]
    NestedSize(usize),
    #[error("Interrupt controller {found} in the place of {expected}")]
    Irqchip { expected: u32, found: u32 },
}

/// A structure of the kernel, compared, shown and serialised by its bytes.
#[derive(Clone, Copy, Default)]
pub struct Raw<T>(pub T);

impl<T: IntoBytes + Immutable> PartialEq for Raw<T> {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_bytes() == other.0.as_bytes()
    }
}

impl<T: fmt::Debug> fmt::Debug for Raw<T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

impl<T: IntoBytes + Immutable> Serialize for Raw<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serialize_bytes(self.0.as_bytes(), serializer)
    }
}

impl<'de, T: FromBytes> Deserialize<'de> for Raw<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let limit = size_of::<T>();
        let bytes = deserialize_bytes(deserializer, limit)?;
        T::read_from_bytes(&bytes)
            .map(Self)
            .map_err(|_| D::Error::invalid_length(bytes.len(), &format!("{limit} bytes").as_str()))
    }
}

/// A structure of the kernel whose length differs from host to host.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Blob(pub Vec<u8>);

impl fmt::Debug for Blob {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} bytes", self.0.len())
    }
}

impl Serialize for Blob {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serialize_bytes(&self.0, serializer)
    }
}

impl<'de> Deserialize<'de> for Blob {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserialize_bytes(deserializer, XSAVE_SIZE_MAX).map(Self)
    }
}

/// One model-specific register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msr {
    pub index: u32,
    pub data: u64,
}

/// All that a vCPU is, but for its CPUID, which comes from the VM's configuration, and its id.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VcpuState {
    /// Frequency of the guest's TSC, 0 if KVM does not know it.
    pub tsc_khz: u32,
    /// KVM_MP_STATE_*: running, halted, or waiting for a start-up message.
    pub mp_state: u32,
    pub regs: Raw<kvm_regs>,
    pub sregs: Raw<kvm_sregs>,
    /// Page directory pointers, in PAE paging only: the CPU keeps copies that memory need not
    /// agree with.
    pub pdptrs: Option<[u64; 4]>,
    /// Exceptions, interrupts and NMIs on their way.
    pub events: Raw<kvm_vcpu_events>,
    pub debugregs: Raw<kvm_debugregs>,
    pub xcrs: Raw<kvm_xcrs>,
    /// FPU, SSE, AVX and later registers, in the CPU's XSAVE layout. The FPU needs no field of
    /// its own: KVM fills this one even on a CPU without XSAVE.
    pub xsave: Blob,
    pub lapic: Raw<kvm_lapic_state>,
    /// In the order in which they are loaded.
    #[serde(deserialize_with = "bounded_msrs")]
    pub msrs: Vec<Msr>,
    /// State of a hypervisor inside the guest, where there can be one.
    pub nested: Option<Blob>,
}

impl VcpuState {
    /// Where the vCPU stood, in one line, with what was on its way into the guest.
    #[must_use]
    pub fn position(&self) -> String {
        let (exception, interrupt) = (&self.events.0.exception, &self.events.0.interrupt);
        format!(
            "{} run state {} exception {}/{} of {:#x} (code {:#x}) interrupt {} of {:#x} shadow {:#x} \
             nmi {}/{} tr {:#x} gdt {:#x} idt {:#x} gs {:#x}",
            position(&self.regs.0, &self.sregs.0),
            self.mp_state,
            exception.injected,
            exception.pending,
            exception.nr,
            exception.error_code,
            interrupt.injected,
            interrupt.nr,
            interrupt.shadow,
            self.events.0.nmi.injected,
            self.events.0.nmi.pending,
            self.sregs.0.tr.base,
            self.sregs.0.gdt.base,
            self.sregs.0.idt.base,
            self.sregs.0.gs.base,
        )
    }

    /// Leaves out what KVM writes guest memory for when it is loaded, or when the vCPU stops after that.
    pub fn forget_paravirtual(&mut self) {
        self.msrs.retain(|msr| !crate::msr::is_paravirtual(msr.index));
    }

    /// Checks what KVM would not: every length that our own calls rely on.
    pub fn validate(&self) -> Result<(), StateError> {
        let size = self.xsave.0.len();
        if !(XSAVE_SIZE_MIN..=XSAVE_SIZE_MAX).contains(&size) {
            return Err(StateError::XsaveSize(size));
        }
        if self.msrs.len() > MSRS_MAX {
            return Err(StateError::TooManyMsrs(self.msrs.len()));
        }
        if self.xcrs.0.nr_xcrs > KVM_MAX_XCRS {
            return Err(StateError::TooManyXcrs(self.xcrs.0.nr_xcrs));
        }
        self.nested.as_ref().map_or(Ok(()), |nested| validate_nested(&nested.0))
    }
}

/// KVM trusts the length in the header, so it has to be the buffer's.
fn validate_nested(bytes: &[u8]) -> Result<(), StateError> {
    let len = bytes.len();
    // The header is flags and format, 16 bits each, then the length of the whole.
    let stated = bytes.get(4..8).and_then(|field| field.try_into().ok()).map(u32::from_le_bytes);
    let fits = (size_of::<kvm_nested_state>()..=NESTED_SIZE_MAX).contains(&len);
    if !fits || stated.map(usize::try_from) != Some(Ok(len)) {
        return Err(StateError::NestedSize(len));
    }
    Ok(())
}

/// What belongs to the VM as a whole.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmState {
    /// The KVM clock, in nanoseconds.
    pub clock_ns: u64,
    /// PIC master, PIC slave, IOAPIC.
    pub irqchips: [Raw<kvm_irqchip>; IRQCHIPS],
}

impl VmState {
    /// Checks that each controller is in its place, so that none is loaded twice.
    pub fn validate(&self) -> Result<(), StateError> {
        for (expected, raw) in (0..).zip(&self.irqchips) {
            let found = raw.0.chip_id;
            if found != expected {
                return Err(StateError::Irqchip { expected, found });
            }
        }
        Ok(())
    }
}

fn serialize_bytes<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    if !serializer.is_human_readable() {
        return serializer.serialize_bytes(bytes);
    }
    const DIGITS: [char; 16] =
        ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f'];
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 0xf]);
    let text: String = digits.map(|digit| DIGITS[usize::from(digit)]).collect();
    serializer.serialize_str(&text)
}

/// At most `limit` bytes; more are an error before they are copied.
fn deserialize_bytes<'de, D>(deserializer: D, limit: usize) -> Result<Vec<u8>, D::Error>
where
    D: Deserializer<'de>,
{
    if deserializer.is_human_readable() {
        deserializer.deserialize_str(BytesVisitor { limit })
    } else {
        deserializer.deserialize_bytes(BytesVisitor { limit })
    }
}

struct BytesVisitor {
    limit: usize,
}

impl Visitor<'_> for BytesVisitor {
    type Value = Vec<u8>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "at most {} bytes, as hexadecimal digits in text", self.limit)
    }

    fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
        if bytes.len() > self.limit {
            return Err(E::invalid_length(bytes.len(), &self));
        }
        Ok(bytes.to_vec())
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Vec<u8>, E> {
        let (pairs, rest) = text.as_bytes().as_chunks::<2>();
        if pairs.len() > self.limit || !rest.is_empty() {
            return Err(E::invalid_length(text.len(), &self));
        }
        pairs
            .iter()
            .map(|&[high, low]| Some(digit(high)? << 4 | digit(low)?))
            .collect::<Option<Vec<u8>>>()
            .ok_or_else(|| E::custom("not a hexadecimal digit"))
    }
}

fn digit(character: u8) -> Option<u8> {
    char::from(character).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

/// A list of MSRs that gives up at the first one too many.
fn bounded_msrs<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Msr>, D::Error> {
    struct MsrsVisitor;

    impl<'de> Visitor<'de> for MsrsVisitor {
        type Value = Vec<Msr>;

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(formatter, "at most {MSRS_MAX} model-specific registers")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<Msr>, A::Error> {
            let mut msrs = Vec::new();
            while let Some(msr) = list.next_element()? {
                if msrs.len() == MSRS_MAX {
                    return Err(A::Error::invalid_length(MSRS_MAX + 1, &self));
                }
                msrs.push(msr);
            }
            Ok(msrs)
        }
    }

    deserializer.deserialize_seq(MsrsVisitor)
}
