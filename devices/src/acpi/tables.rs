//! Builds the ACPI tables: pure, from a configuration to bytes at guest addresses.
//!
//! ```text
//!  RSDP ──▶ XSDT ──▶ FADT ──▶ DSDT
//!             ├────▶ MADT
//!             └────▶ MCFG     where there is a PCI bus
//! ```
//!
//! ACPI 6.5 with reduced hardware: no FACS, no fixed registers, no SCI. There is no PIT, no HPET,
//! and no 8259 that the guest should use. What always holds: every table lies in `base..limit`,
//! starts at a multiple of 16, overlaps no other, and sums to zero.

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use thiserror::Error;

use super::{dsdt, pm};
use crate::legacy::cmos::CMOS_CENTURY;
use crate::pci::root::Windows;

/// Where the in-kernel IOAPIC is.
pub const IOAPIC_ADDRESS: u32 = 0xfec0_0000;
/// Where each vCPU sees its local APIC.
pub const LAPIC_ADDRESS: u32 = 0xfee0_0000;
/// Most vCPUs that tables can describe: CPU devices are numbered with three hexadecimal digits.
pub const VCPUS_MAX: u32 = 0xfff;

pub(super) const OEM_ID: [u8; 6] = *b"UNDRST";
pub(super) const OEM_TABLE_ID: [u8; 8] = *b"UNDERSTD";
pub(super) const OEM_REVISION: u32 = 1;

const TABLE_ALIGN: u64 = 16;
const HEADER_BYTES: u32 = 36;
/// Revision of the MADT from which Linux believes the online-capable flag (ACPI 6.3).
const MADT_REVISION: u8 = 5;
/// The first local APIC id that needs an x2APIC entry: 255 is the broadcast address.
const X2APIC_ID_MIN: u32 = 255;
const APIC_ENABLED: u32 = 1;
/// IAPC_BOOT_ARCH: do not probe for VGA. All else is clear: no 8042 keyboard to probe for, and
/// the CMOS clock is there.
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;

/// The PCI bus as the tables tell it: segment 0, bus 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AcpiPci {
    /// Where configuration space is, [`crate::pci::access::ECAM_BYTES`] long.
    pub ecam: u32,
    /// Where BARs may be; the low one lies below 4 GiB.
    pub windows: Windows,
}

/// What the tables tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiConfig {
    /// vCPUs that start with the machine; their APIC ids are 0 and up.
    pub vcpus: u32,
    /// vCPUs that the machine may ever have. Those past `vcpus` are listed as disabled.
    pub max_vcpus: u32,
    /// COM1 exists.
    pub serial: bool,
    pub pci: Option<AcpiPci>,
    /// Where the RSDP goes; a multiple of 16. A BIOS would use 0xe0000.
    pub base: u64,
    /// First address after the tables' room.
    pub limit: u64,
}

/// The tables, ready to be copied into guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiTables {
    /// Where the RSDP is.
    pub rsdp: u64,
    /// Guest address and bytes, addresses ascending.
    pub blobs: Vec<(u64, Vec<u8>)>,
}

/// Errors of building tables.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum AcpiError {
    /// No such machine.
    #[error("ACPI tables cannot describe {vcpus} of {max_vcpus} vCPUs")]
    Vcpus { vcpus: u32, max_vcpus: u32 },
    /// The RSDP must be aligned.
    #[error("ACPI base {0:#x} is no multiple of {TABLE_ALIGN}")]
    Unaligned(u64),
    /// The room is too small.
    #[error("ACPI table {table} of {len} bytes does not fit below {limit:#x}")]
    NoRoom { table: &'static str, len: usize, limit: u64 },
}

/// Builds the tables.
pub fn build(config: &AcpiConfig) -> Result<AcpiTables, AcpiError> {
    let (vcpus, max_vcpus) = (config.vcpus, config.max_vcpus);
    if vcpus == 0 || vcpus > max_vcpus || max_vcpus > VCPUS_MAX {
        return Err(AcpiError::Vcpus { vcpus, max_vcpus });
    }
    if !config.base.is_multiple_of(TABLE_ALIGN) {
        return Err(AcpiError::Unaligned(config.base));
    }
    let mut room = Room { next: config.base, limit: config.limit, blobs: Vec::new() };
    // The RSDP comes first and points to what is placed after it.
    let rsdp = room.reserve("RSDP", Rsdp::len())?;
    let dsdt = room.place("DSDT", dsdt::build(config))?;
    let fadt = room.place("FADT", build_fadt(dsdt))?;
    let madt = room.place("MADT", build_madt(config))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    if let Some(pci) = &config.pci {
        let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
        mcfg.add_ecam(pci.ecam.into(), 0, 0, 0);
        xsdt.add_entry(room.place("MCFG", bytes_of(&mcfg))?);
    }
    let xsdt = room.place("XSDT", bytes_of(&xsdt))?;
    room.blobs.insert(0, (rsdp, bytes_of(&Rsdp::new(OEM_ID, xsdt))));
    Ok(AcpiTables { rsdp, blobs: room.blobs })
}

/// Hands out aligned addresses.
struct Room {
    next: u64,
    limit: u64,
    blobs: Vec<(u64, Vec<u8>)>,
}

impl Room {
    fn reserve(&mut self, table: &'static str, len: usize) -> Result<u64, AcpiError> {
        let no_room = AcpiError::NoRoom { table, len, limit: self.limit };
        let at = self.next;
        let end = u64::try_from(len).ok().and_then(|len| at.checked_add(len));
        match end {
            Some(end) if end <= self.limit => {
                self.next = end.checked_next_multiple_of(TABLE_ALIGN).ok_or(no_room)?;
                Ok(at)
            }
            _ => Err(no_room),
        }
    }

    fn place(&mut self, table: &'static str, bytes: Vec<u8>) -> Result<u64, AcpiError> {
        let at = self.reserve(table, bytes.len())?;
        self.blobs.push((at, bytes));
        Ok(at)
    }
}

pub(super) fn bytes_of(object: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    object.to_aml_bytes(&mut bytes);
    bytes
}

fn port_register(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port))
}

fn build_fadt(dsdt: u64) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        // Buttons and clock have no fixed registers.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .flag(Flags::HwReducedAcpi);
    fadt.reset_reg = port_register(pm::RESET_PORT);
    fadt.reset_value = pm::RESET_VALUE;
    fadt.sleep_control_reg = port_register(pm::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port_register(pm::SLEEP_STATUS_PORT);
    fadt.iapc_boot_arch = BOOT_ARCH_NO_VGA.into();
    fadt.century = CMOS_CENTURY;
    // A hypervisor's name makes reports from guests readable (ACPI 6.5, 5.2.9).
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE_ID).into();
    bytes_of(&fadt.finalize())
}

/// ACPI 6.5, 5.2.12. The crate's builder has neither x2APIC entries nor this revision.
fn build_madt(config: &AcpiConfig) -> Vec<u8> {
    let mut madt =
        Sdt::new(*b"APIC", HEADER_BYTES, MADT_REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let mut body = Vec::new();
    body.extend(LAPIC_ADDRESS.to_le_bytes());
    // Flags: PCAT_COMPAT clear, no 8259 to mask.
    body.extend(0u32.to_le_bytes());
    for id in 0..config.max_vcpus {
        // Without the online-capable flag a disabled entry is never brought up.
        let flags = if id < config.vcpus { APIC_ENABLED } else { 0 };
        push_local_apic(&mut body, id, flags);
    }
    // IOAPIC: type 1, 12 bytes, id 0, GSI base 0.
    body.extend([1, 12, 0, 0]);
    body.extend(IOAPIC_ADDRESS.to_le_bytes());
    body.extend(0u32.to_le_bytes());
    madt.append_slice(&body);
    bytes_of(&madt)
}

/// The ACPI processor uid is the APIC id, as in the DSDT.
fn push_local_apic(body: &mut Vec<u8>, id: u32, flags: u32) {
    match u8::try_from(id) {
        Ok(short) if id < X2APIC_ID_MIN => {
            body.extend([0, 8, short, short]);
            body.extend(flags.to_le_bytes());
        }
        _ => {
            body.extend([9, 16, 0, 0]);
            body.extend(id.to_le_bytes());
            body.extend(flags.to_le_bytes());
            body.extend(id.to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pci::Region;

    const HEADER: usize = 36;

    fn config(vcpus: u32) -> AcpiConfig {
        AcpiConfig {
            vcpus,
            max_vcpus: vcpus,
            serial: true,
            pci: Some(PCI),
            base: 0xe0000,
            limit: 0x10_0000,
        }
    }

    const PCI: AcpiPci = AcpiPci {
        ecam: 0xe000_0000,
        windows: Windows {
            low: Region { base: 0xc000_0000, len: 0x2000_0000 },
            high: Region { base: 0x10_0000_0000, len: 0x4_0000_0000 },
        },
    };

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn blob(tables: &AcpiTables, address: u64) -> &[u8] {
        &tables.blobs.iter().find(|(at, _)| *at == address).unwrap().1
    }

    /// Follows the pointers from the RSDP as a guest does.
    struct Walked<'a> {
        fadt: &'a [u8],
        madt: &'a [u8],
        dsdt: &'a [u8],
        mcfg: Option<&'a [u8]>,
    }

    fn walk(tables: &AcpiTables) -> Walked<'_> {
        let rsdp = blob(tables, tables.rsdp);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!(rsdp.len(), 36);
        assert_eq!(sum(&rsdp[..20]), 0);
        assert_eq!(sum(rsdp), 0);
        let xsdt = blob(tables, u64_at(rsdp, 24));
        let fadt = blob(tables, u64_at(xsdt, HEADER));
        let madt = blob(tables, u64_at(xsdt, HEADER + 8));
        let dsdt = blob(tables, u64_at(fadt, 140));
        let mcfg = (xsdt.len() > HEADER + 16).then(|| blob(tables, u64_at(xsdt, HEADER + 16)));
        let mut named: Vec<(&[u8], &[u8; 4])> =
            vec![(xsdt, b"XSDT"), (fadt, b"FACP"), (madt, b"APIC"), (dsdt, b"DSDT")];
        named.extend(mcfg.map(|mcfg| (mcfg, b"MCFG")));
        for (table, signature) in named {
            assert_eq!(&table[..4], signature);
            assert_eq!(usize::try_from(u32_at(table, 4)).unwrap(), table.len());
            assert_eq!(sum(table), 0);
        }
        assert_eq!(xsdt.len(), HEADER + 16 + mcfg.map_or(0, |_| 8));
        Walked { fadt, madt, dsdt, mcfg }
    }

    /// (type, bytes) of the MADT's entries.
    fn madt_entries(madt: &[u8]) -> Vec<(u8, &[u8])> {
        let mut entries = Vec::new();
        let mut rest = &madt[HEADER + 8..];
        while !rest.is_empty() {
            let (entry, tail) = rest.split_at(usize::from(rest[1]));
            entries.push((entry[0], entry));
            rest = tail;
        }
        entries
    }

    fn contains(bytes: &[u8], part: &[u8]) -> bool {
        bytes.windows(part.len()).any(|window| window == part)
    }

    #[test]
    fn the_fadt_names_our_registers() {
        let tables = build(&config(2)).unwrap();
        let fadt = walk(&tables).fadt;
        assert_eq!(fadt.len(), 276);
        assert_eq!((fadt[8], fadt[131]), (6, 5));
        let flags = u32_at(fadt, 112);
        assert_ne!(flags & (1 << 20), 0, "hardware-reduced");
        assert_ne!(flags & (1 << 10), 0, "reset register");
        let io_byte = |at: usize, port: u64| {
            assert_eq!(fadt[at..at + 4], [1, 8, 0, 1]);
            assert_eq!(u64_at(fadt, at + 4), port);
        };
        io_byte(116, 0x601);
        assert_eq!(fadt[128], 1);
        io_byte(244, 0x600);
        io_byte(256, 0x602);
        assert_eq!(fadt[108], 0x32);
    }

    #[test]
    fn the_madt_lists_every_vcpu_once() {
        let config = AcpiConfig { max_vcpus: 6, ..config(4) };
        let tables = build(&config).unwrap();
        let madt = walk(&tables).madt;
        assert_eq!(u32_at(madt, HEADER), LAPIC_ADDRESS);
        let entries = madt_entries(madt);
        let lapics: Vec<_> = entries.iter().filter(|(kind, _)| *kind == 0).collect();
        assert_eq!(lapics.len(), 6);
        for (id, (_, entry)) in (0u8..).zip(lapics) {
            assert_eq!((entry[2], entry[3]), (id, id));
            assert_eq!(u32_at(entry, 4), u32::from(id < 4));
        }
        let ioapic = entries.last().unwrap().1;
        assert_eq!(ioapic, [1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
    }

    #[test]
    fn apic_ids_past_254_have_x2apic_entries() {
        let tables = build(&config(300)).unwrap();
        let entries = madt_entries(walk(&tables).madt);
        assert_eq!(entries.iter().filter(|(kind, _)| *kind == 0).count(), 255);
        let wide: Vec<_> = entries.iter().filter(|(kind, _)| *kind == 9).collect();
        assert_eq!(wide.len(), 45);
        for (id, (_, entry)) in (255u32..).zip(wide) {
            assert_eq!((u32_at(entry, 4), u32_at(entry, 8), u32_at(entry, 12)), (id, 1, id));
        }
    }

    #[test]
    fn the_dsdt_names_the_serial_port_only_when_there_is_one() {
        let with = build(&config(1)).unwrap();
        let without = build(&AcpiConfig { serial: false, ..config(1) }).unwrap();
        let (with, without) = (walk(&with).dsdt, walk(&without).dsdt);
        assert!(contains(with, b"COM1") && !contains(without, b"COM1"));
        for dsdt in [with, without] {
            // Name (_S5, Package (4) { 5, 5, 0, 0 })
            assert!(contains(dsdt, b"_S5_\x12\x08\x04\x0a\x05\x0a\x05"));
            assert!(contains(dsdt, b"ACPI0013") && contains(dsdt, b"C000"));
        }
    }

    #[test]
    fn the_pci_bus_is_told_twice_or_not_at_all() {
        let with = build(&config(1)).unwrap();
        let walked = walk(&with);
        let mcfg = walked.mcfg.unwrap();
        assert_eq!(mcfg.len(), HEADER + 8 + 16);
        assert_eq!(u64_at(mcfg, HEADER + 8), 0xe000_0000);
        assert_eq!(mcfg[HEADER + 16..], [0; 8], "segment 0, buses 0 to 0");
        assert!(contains(walked.dsdt, b"PCI0") && contains(walked.dsdt, b"ECAM"));
        // The last address of each window.
        assert!(contains(walked.dsdt, &0xdfff_ffff_u32.to_le_bytes()));
        assert!(contains(walked.dsdt, &0x13_ffff_ffff_u64.to_le_bytes()));
        let without = build(&AcpiConfig { pci: None, ..config(1) }).unwrap();
        assert!(walk(&without).mcfg.is_none());
        assert!(!contains(walk(&without).dsdt, b"PCI0"));
    }

    #[test]
    fn impossible_configurations_are_refused() {
        let error = |config: AcpiConfig| build(&config).unwrap_err();
        assert!(matches!(error(config(0)), AcpiError::Vcpus { .. }));
        assert!(matches!(error(config(VCPUS_MAX + 1)), AcpiError::Vcpus { .. }));
        let less = AcpiConfig { max_vcpus: 1, ..config(2) };
        assert!(matches!(error(less), AcpiError::Vcpus { .. }));
        let odd = AcpiConfig { base: 0xe0008, ..config(1) };
        assert_eq!(error(odd), AcpiError::Unaligned(0xe0008));
        let tight = AcpiConfig { limit: 0xe0100, ..config(1) };
        assert!(matches!(error(tight), AcpiError::NoRoom { table: "DSDT", .. }));
        let end = AcpiConfig { base: u64::MAX - 15, limit: u64::MAX, ..config(1) };
        assert!(matches!(error(end), AcpiError::NoRoom { table: "RSDP", .. }));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn tables_stay_in_their_room(
            vcpus in 1u32..600,
            more in 0u32..600,
            serial: bool,
            base in 0u64..0x1_0000_0000,
        ) {
            let base = base & !0xf;
            let limit = base + 0x2_0000;
            let pci = serial.then_some(PCI);
            let config = AcpiConfig { vcpus, max_vcpus: vcpus + more, serial, pci, base, limit };
            let tables = build(&config).unwrap();
            walk(&tables);
            prop_assert_eq!(tables.rsdp, base);
            let mut free = base;
            for (at, bytes) in &tables.blobs {
                prop_assert!(*at >= free && at.is_multiple_of(16));
                free = at + u64::try_from(bytes.len()).unwrap();
            }
            prop_assert!(free <= limit);
        }
    }

    /// Writes the tables where `iasl -d` can look at them:
    /// `ACPI_DUMP_DIR=<dir> cargo test -p devices -- --ignored dump`.
    #[test]
    #[ignore = "writes files for a person to look at"]
    fn dump() {
        let dir =
            std::path::PathBuf::from(std::env::var_os("ACPI_DUMP_DIR").expect("ACPI_DUMP_DIR"));
        let tables = build(&AcpiConfig { max_vcpus: 258, ..config(257) }).unwrap();
        let walked = walk(&tables);
        for (name, table) in [("facp", walked.fadt), ("apic", walked.madt), ("dsdt", walked.dsdt)] {
            std::fs::write(dir.join(name).with_extension("dat"), table).unwrap();
        }
    }
}
