//! What makes a configuration right in itself, before anything of the host is looked at.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::{
    ConsoleConfig, ConsoleOutputMode, CpuTopology, CpusConfig, DebugConsoleMode, DiskConfig,
    MemoryConfig, NetConfig, PayloadConfig, VmConfig,
};
use crate::invalid::Invalid;

/// vCPUs of a VM: what an 8-bit APIC id can name, less the broadcast address.
pub const VCPUS_MAX: u32 = 254;
/// Bytes of memory below which nothing boots.
pub const MEMORY_SIZE_MIN: u64 = 4 << 20;
/// Bytes of memory above which a size is certainly a mistake: 64 TiB, the reach of 46 physical
/// address bits.
pub const MEMORY_SIZE_MAX: u64 = 1 << 46;
/// Bytes of a page.
const PAGE_SIZE: u64 = 4096;
/// Bytes of a huge page where no size is named.
const HUGEPAGE_SIZE_DEFAULT: u64 = 2 << 20;
/// Bytes of the huge pages that x86-64 has.
const HUGEPAGE_SIZES: std::ops::RangeInclusive<u64> = 2 << 20..=1 << 30;
/// Bytes of a kernel command line, and of any other text that a guest is given.
const CMDLINE_BYTES_MAX: usize = 64 << 10;
/// Devices of one kind.
const DEVICES_MAX: usize = 256;

impl VmConfig {
    /// Everything that is wrong with this configuration; nothing where it is right.
    ///
    /// A payload may still be missing: it is needed at boot, not for a VM that is restored. See
    /// [`VmConfig::validate_boot`].
    #[must_use]
    pub fn validate(&self) -> Vec<Invalid> {
        let mut found = Vec::new();
        payload(&self.payload, &mut found);
        cpus(&self.cpus, &mut found);
        memory(&self.memory, &mut found);
        console("serial", &self.serial, &mut found);
        console("console", &self.console, &mut found);
        if self.serial.mode == ConsoleOutputMode::Tty && self.console.mode == ConsoleOutputMode::Tty
        {
            let because = "one terminal cannot be both, switch one of them off";
            found.push(Invalid::contradiction("serial.mode Tty", "console.mode Tty", because));
        }
        if let Some(debug) = &self.debug_console
            && debug.mode == DebugConsoleMode::File
            && debug.file.is_none()
        {
            found.push(Invalid::missing("debug_console.file", "its mode is File"));
        }
        if self.rng.src.as_os_str().is_empty() {
            found.push(Invalid::missing("rng.src", ""));
        }
        self.devices_of_a_kind(&mut found);
        self.identifiers(&mut found);
        found
    }

    /// What is wrong with booting this configuration: all of [`VmConfig::validate`], and a
    /// payload that is not there.
    #[must_use]
    pub fn validate_boot(&self) -> Vec<Invalid> {
        let mut found = self.validate();
        if self.payload.kernel.is_none() && self.payload.firmware.is_none() {
            found.push(Invalid::missing("payload.kernel", "there is nothing to boot"));
        }
        found
    }

    fn devices_of_a_kind(&self, found: &mut Vec<Invalid>) {
        let disks = self.disks.as_deref().unwrap_or_default();
        let cards = self.net.as_deref().unwrap_or_default();
        for (key, count) in [("disks", disks.len()), ("net", cards.len())] {
            if count > DEVICES_MAX {
                found.push(Invalid::value(key, format!("{DEVICES_MAX} at most"), count));
            }
        }
        let mut paths = BTreeSet::new();
        for (index, config) in disks.iter().enumerate() {
            disk(&format!("disks[{index}]"), config, found);
            if let Some(path) = &config.path
                && !config.readonly
                && !paths.insert(path)
            {
                let key = format!("disks[{index}].path");
                found.push(Invalid::Duplicate { key, id: path.display().to_string() });
            }
        }
        for (index, config) in cards.iter().enumerate() {
            net(&format!("net[{index}]"), config, found);
        }
        if let Some(vsock) = &self.vsock {
            // 0 to 2 are the hypervisor, the loopback and the host (vsock(7)).
            if vsock.cid < 3 || vsock.cid == u32::MAX {
                found.push(Invalid::value("vsock.cid", "3 to 4294967294", vsock.cid));
            }
        }
    }

    /// Identifiers that clients chose: none twice, none of those that the VMM gives itself, nothing that a log or
    /// a thread's name cannot have.
    fn identifiers(&self, found: &mut Vec<Invalid>) {
        let mut named: Vec<(String, &str)> = Vec::new();
        for (index, disk) in self.disks.iter().flatten().enumerate() {
            named.extend(disk.id.as_deref().map(|id| (format!("disks[{index}].id"), id)));
        }
        for (index, card) in self.net.iter().flatten().enumerate() {
            named.extend(card.id.as_deref().map(|id| (format!("net[{index}].id"), id)));
        }
        let vsock = self.vsock.as_ref().and_then(|vsock| vsock.id.as_deref());
        named.extend(vsock.map(|id| ("vsock.id".to_owned(), id)));
        for (index, zone) in self.memory.zones.iter().flatten().enumerate() {
            named.push((format!("memory.zones[{index}].id"), &zone.id));
        }
        let mut known = BTreeSet::new();
        for (key, id) in named {
            if id.is_empty() {
                found.push(Invalid::missing(key, ""));
            } else if id.contains(char::is_control) {
                let wanted = "text without control characters";
                found.push(Invalid::value(key, wanted, id.escape_debug()));
            } else if id.starts_with("__") {
                found.push(Invalid::ReservedId { key, id: id.to_owned() });
            } else if !known.insert(id) {
                found.push(Invalid::Duplicate { key, id: id.to_owned() });
            }
        }
    }
}

fn payload(config: &PayloadConfig, found: &mut Vec<Invalid>) {
    if config.kernel.is_some() && config.firmware.is_some() {
        let because = "a VM boots one of them";
        found.push(Invalid::contradiction("payload.firmware", "payload.kernel", because));
    }
    if config.initramfs.is_some() && config.kernel.is_none() {
        found.push(Invalid::missing("payload.kernel", "there is a payload.initramfs"));
    }
    let length = config.cmdline.as_ref().map_or(0, String::len);
    if length > CMDLINE_BYTES_MAX {
        let wanted = format!("{CMDLINE_BYTES_MAX} bytes at most");
        found.push(Invalid::value("payload.cmdline", wanted, length));
    }
    if config.cmdline.as_ref().is_some_and(|text| text.contains('\0')) {
        found.push(Invalid::value("payload.cmdline", "text", "a text with a zero byte"));
    }
}

fn cpus(config: &CpusConfig, found: &mut Vec<Invalid>) {
    let CpusConfig { boot_vcpus, max_vcpus, .. } = *config;
    if !(1..=VCPUS_MAX).contains(&boot_vcpus) {
        found.push(Invalid::value("cpus.boot_vcpus", format!("1 to {VCPUS_MAX}"), boot_vcpus));
    }
    if max_vcpus > VCPUS_MAX {
        found.push(Invalid::value("cpus.max_vcpus", format!("{VCPUS_MAX} at most"), max_vcpus));
    }
    if boot_vcpus > max_vcpus {
        let wanted = format!("cpus.max_vcpus ({max_vcpus}) at most");
        found.push(Invalid::value("cpus.boot_vcpus", wanted, boot_vcpus));
    }
    // KVM maps guests of at least 32 bits; 52 is what page tables can hold.
    if !(32..=52).contains(&config.max_phys_bits) {
        found.push(Invalid::value("cpus.max_phys_bits", "32 to 52", config.max_phys_bits));
    }
    if let Some(topology) = &config.topology {
        let product = topology_product(topology);
        if product != u64::from(max_vcpus) {
            let wanted = format!("a product of cpus.max_vcpus ({max_vcpus})");
            found.push(Invalid::value("cpus.topology", wanted, product));
        }
    }
    let mut pinned = BTreeSet::new();
    for affinity in config.affinity.iter().flatten() {
        if affinity.vcpu >= max_vcpus {
            let wanted = "a vCPU below cpus.max_vcpus";
            found.push(Invalid::value("cpus.affinity", wanted, affinity.vcpu));
        }
        if affinity.host_cpus.is_empty() {
            found.push(Invalid::missing("cpus.affinity host_cpus", ""));
        }
        if !pinned.insert(affinity.vcpu) {
            let id = affinity.vcpu.to_string();
            found.push(Invalid::Duplicate { key: "cpus.affinity vcpu".to_owned(), id });
        }
    }
}

/// Four factors of 16 bits: their product always fits.
fn topology_product(topology: &CpuTopology) -> u64 {
    u64::from(topology.threads_per_core)
        * u64::from(topology.cores_per_die)
        * u64::from(topology.dies_per_package)
        * u64::from(topology.packages)
}

fn memory(config: &MemoryConfig, found: &mut Vec<Invalid>) {
    let zoned = config.zones.as_ref().is_some_and(|zones| !zones.is_empty());
    if zoned {
        if config.size != 0 {
            let because = "the zones make up the memory";
            found.push(Invalid::contradiction("memory.size", "memory.zones", because));
        }
    } else if !(MEMORY_SIZE_MIN..=MEMORY_SIZE_MAX).contains(&config.size) {
        let wanted = format!("{MEMORY_SIZE_MIN} to {MEMORY_SIZE_MAX} bytes");
        found.push(Invalid::value("memory.size", wanted, config.size));
    }
    let mut unit = PAGE_SIZE;
    match config.hugepage_size {
        Some(_) if !config.hugepages => {
            let because = "memory.hugepage_size is given";
            found.push(Invalid::missing("memory.hugepages", because));
        }
        Some(size) if !size.is_power_of_two() || !HUGEPAGE_SIZES.contains(&size) => {
            let wanted = "a power of two from 2 MiB to 1 GiB";
            found.push(Invalid::value("memory.hugepage_size", wanted, size));
        }
        Some(size) => unit = size,
        None if config.hugepages => unit = HUGEPAGE_SIZE_DEFAULT,
        None => {}
    }
    if !config.size.is_multiple_of(unit) {
        let wanted = format!("a multiple of {unit} bytes");
        found.push(Invalid::value("memory.size", wanted, config.size));
    }
    if let Some(hotplugged) = config.hotplugged_size
        && hotplugged > config.hotplug_size.unwrap_or(0)
    {
        let wanted = "memory.hotplug_size at most";
        found.push(Invalid::value("memory.hotplugged_size", wanted, hotplugged));
    }
    if let Some(size) = config.hotplug_size
        && size > MEMORY_SIZE_MAX
    {
        let wanted = format!("{MEMORY_SIZE_MAX} bytes at most");
        found.push(Invalid::value("memory.hotplug_size", wanted, size));
    }
}

/// A console or serial port, also where it is given for one host only.
pub(crate) fn console(key: &str, config: &ConsoleConfig, found: &mut Vec<Invalid>) {
    let empty = |path: &Option<std::path::PathBuf>| {
        path.as_ref().is_none_or(|path| path.as_os_str().is_empty())
    };
    if config.mode == ConsoleOutputMode::File && empty(&config.file) {
        found.push(Invalid::missing(format!("{key}.file"), "its mode is File"));
    }
    if config.mode == ConsoleOutputMode::Socket && empty(&config.socket) {
        found.push(Invalid::missing(format!("{key}.socket"), "its mode is Socket"));
    }
}

fn queue(key: &str, size: u16, count: usize, found: &mut Vec<Invalid>) {
    // Virtio 1.2, 2.7: a split queue's size is a power of two, 32768 at most.
    if !size.is_power_of_two() {
        found.push(Invalid::value(format!("{key}.queue_size"), "a power of two", size));
    }
    if count == 0 || count > DEVICES_MAX {
        let wanted = format!("1 to {DEVICES_MAX}");
        found.push(Invalid::value(format!("{key}.num_queues"), wanted, count));
    }
}

fn disk(key: &str, config: &DiskConfig, found: &mut Vec<Invalid>) {
    queue(key, config.queue_size, config.num_queues, found);
    if config.vhost_user {
        if config.vhost_socket.is_none() {
            found.push(Invalid::missing(format!("{key}.vhost_socket"), "vhost_user is on"));
        }
    } else if config.path.is_none() {
        found.push(Invalid::missing(format!("{key}.path"), ""));
    }
}

fn net(key: &str, config: &NetConfig, found: &mut Vec<Invalid>) {
    queue(key, config.queue_size, config.num_queues, found);
    if !config.num_queues.is_multiple_of(2) {
        let wanted = "even, a pair being two queues";
        found.push(Invalid::value(format!("{key}.num_queues"), wanted, config.num_queues));
    }
    if let (Some(IpAddr::V4(_)), Some(mask @ IpAddr::V6(_))) = (config.ip, config.mask) {
        let wanted = "a mask of IPv4, as the address is";
        found.push(Invalid::value(format!("{key}.mask"), wanted, mask));
    }
    for (name, mac) in [("mac", &config.mac), ("host_mac", &config.host_mac)] {
        if let Some(mac) = mac.as_ref().filter(|mac| !is_mac(mac)) {
            let wanted = "six hexadecimal bytes as 02:00:00:00:00:01";
            found.push(Invalid::value(format!("{key}.{name}"), wanted, mac));
        }
    }
}

fn is_mac(text: &str) -> bool {
    let bytes: Vec<&str> = text.split(':').collect();
    let is_byte = |byte: &&str| byte.len() == 2 && byte.bytes().all(|b| b.is_ascii_hexdigit());
    bytes.len() == 6 && bytes.iter().all(is_byte)
}
