//! `--cpus`, `--memory`, `--platform`.

use crate::config::{
    CpuAffinity, CpuFeatures, CpuTopology, CpusConfig, HotplugMethod, MemoryConfig, PlatformConfig,
};
use crate::option::{OptionError, Pairs, bad, items};

/// Host CPUs that one list may name: the kernel's own limit on x86-64 (`NR_CPUS`).
const HOST_CPUS_MAX: usize = 8192;

/// `--cpus boot=<n>,max=<n>,topology=<threads>:<cores>:<dies>:<packages>,…`.
///
/// # Errors
///
/// The syntax is broken.
pub fn cpus(text: &str) -> Result<CpusConfig, OptionError> {
    let known = [
        "boot",
        "max",
        "topology",
        "kvm_hyperv",
        "max_phys_bits",
        "affinity",
        "features",
        "nested",
    ];
    let mut pairs = Pairs::parse(text, &known)?;
    let default = CpusConfig::default();
    let boot_vcpus = pairs.parsed("boot", "a number")?.unwrap_or(default.boot_vcpus);
    Ok(CpusConfig {
        boot_vcpus,
        max_vcpus: pairs.parsed("max", "a number")?.unwrap_or(boot_vcpus),
        topology: pairs.with("topology", "<threads>:<cores>:<dies>:<packages>", topology)?,
        kvm_hyperv: pairs.toggle("kvm_hyperv")?.unwrap_or(default.kvm_hyperv),
        max_phys_bits: pairs.parsed("max_phys_bits", "a number")?.unwrap_or(default.max_phys_bits),
        affinity: affinity(&mut pairs)?,
        features: features(&mut pairs)?,
        nested: pairs.toggle("nested")?,
    })
}

fn topology(text: &str) -> Option<CpuTopology> {
    let mut parts = text.split(':').map(|part| part.parse().ok());
    let topology = CpuTopology {
        threads_per_core: parts.next()??,
        cores_per_die: parts.next()??,
        dies_per_package: parts.next()??,
        packages: parts.next()??,
    };
    parts.next().is_none().then_some(topology)
}

/// `affinity=[0@[0-3],1@[4,5]]`.
fn affinity(pairs: &mut Pairs) -> Result<Option<Vec<CpuAffinity>>, OptionError> {
    let Some(items) = pairs.raw_list("affinity")? else { return Ok(None) };
    let read = |item: &String| {
        let (vcpu, cpus) = item.split_once('@')?;
        Some(CpuAffinity { vcpu: vcpu.parse().ok()?, host_cpus: cpu_list(cpus)? })
    };
    let refuse = |item: &str| bad("affinity", "items as 0@[0-3,5]", item);
    items
        .iter()
        .map(|item| read(item).ok_or_else(|| refuse(item)))
        .collect::<Result<_, _>>()
        .map(Some)
}

/// The CPUs of `[0-3,5]`.
pub(super) fn cpu_list(text: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for item in items(text)? {
        let (first, last) = item.split_once('-').unwrap_or((&item, &item));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last >= HOST_CPUS_MAX || cpus.len() >= HOST_CPUS_MAX {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

/// `features=amx`, or a list of features.
fn features(pairs: &mut Pairs) -> Result<CpuFeatures, OptionError> {
    let found = pairs.with("features", "amx", |text| match text {
        "amx" | "[amx]" => Some(CpuFeatures { amx: true }),
        "" | "[]" => Some(CpuFeatures::default()),
        _ => None,
    })?;
    Ok(found.unwrap_or_default())
}

/// `--memory size=<size>,shared=on|off,…`.
///
/// # Errors
///
/// The syntax is broken.
pub fn memory(text: &str) -> Result<MemoryConfig, OptionError> {
    let known = [
        "size",
        "mergeable",
        "hotplug_method",
        "hotplug_size",
        "hotplugged_size",
        "shared",
        "hugepages",
        "hugepage_size",
        "prefault",
        "thp",
    ];
    let mut pairs = Pairs::parse(text, &known)?;
    let default = MemoryConfig::default();
    let methods = [
        ("acpi", HotplugMethod::Acpi),
        ("Acpi", HotplugMethod::Acpi),
        ("virtio-mem", HotplugMethod::VirtioMem),
    ];
    Ok(MemoryConfig {
        size: pairs.size("size")?.unwrap_or(default.size),
        mergeable: pairs.toggle("mergeable")?.unwrap_or(default.mergeable),
        hotplug_method: pairs.word("hotplug_method", &methods)?.unwrap_or_default(),
        hotplug_size: pairs.size("hotplug_size")?,
        hotplugged_size: pairs.size("hotplugged_size")?,
        shared: pairs.toggle("shared")?.unwrap_or(default.shared),
        hugepages: pairs.toggle("hugepages")?.unwrap_or(default.hugepages),
        hugepage_size: pairs.size("hugepage_size")?,
        prefault: pairs.toggle("prefault")?.unwrap_or(default.prefault),
        zones: None,
        thp: pairs.toggle("thp")?.unwrap_or(default.thp),
    })
}

/// `--platform uuid=<uuid>,oem_strings=[a,b],…`.
///
/// # Errors
///
/// The syntax is broken.
pub fn platform(text: &str) -> Result<PlatformConfig, OptionError> {
    let known = [
        "num_pci_segments",
        "iommu_segments",
        "iommu_address_width",
        "serial_number",
        "uuid",
        "oem_strings",
        "tdx",
        "sev_snp",
    ];
    let mut pairs = Pairs::parse(text, &known)?;
    let default = PlatformConfig::default();
    let segments = pairs.list("iommu_segments")?;
    let iommu_segments = segments
        .map(|items| {
            let read = |item: &String| item.parse().ok();
            let refuse = |item: &str| bad("iommu_segments", "numbers", item);
            items.iter().map(|item| read(item).ok_or_else(|| refuse(item))).collect()
        })
        .transpose()?;
    Ok(PlatformConfig {
        num_pci_segments: pairs
            .parsed("num_pci_segments", "a number")?
            .unwrap_or(default.num_pci_segments),
        iommu_segments,
        iommu_address_width: pairs.parsed("iommu_address_width", "a number")?,
        serial_number: pairs.text("serial_number"),
        uuid: pairs.text("uuid"),
        oem_strings: pairs.list("oem_strings")?,
        tdx: pairs.toggle("tdx")?.unwrap_or(default.tdx),
        sev_snp: pairs.toggle("sev_snp")?.unwrap_or(default.sev_snp),
        // A flag that is not known is an error.
        other: default.other,
    })
}
