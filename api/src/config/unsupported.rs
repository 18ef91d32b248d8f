//! What this VMM cannot honour although it changes what the guest sees.
//!
//! Such a key is refused by its name. A key that only changes how the host does its work (page
//! merging, a rate limit, a queue's host CPUs) is accepted.

use serde_json::Value;

use super::{ConsoleConfig, DebugConsoleMode, DiskConfig, HotplugMethod, NetConfig, VmConfig};
use crate::invalid::Invalid;

const NOT_BUILT: &str = "this version has no such device";
const NO_BACKING: &str = "only raw images are read";
const ONE_SEGMENT: &str = "there is one PCI segment";
const OTHER_FDS: &str =
    "numbers mean nothing to this process, send the descriptors with vm.add-net";
const BYPASS: &str = "it would bypass replication";

impl VmConfig {
    /// Every key of this configuration that cannot be honoured; nothing where all can.
    #[must_use]
    pub fn unsupported(&self) -> Vec<Invalid> {
        let mut found = Vec::new();
        let mut refuse = |present: bool, key: &str, because: &'static str| {
            if present {
                found.push(Invalid::unsupported(key, because));
            }
        };
        self.refuse_devices(&mut refuse);
        self.refuse_machine(&mut refuse);
        self.refuse_platform(&mut refuse);
        found
    }

    fn refuse_devices(&self, refuse: &mut impl FnMut(bool, &str, &'static str)) {
        let disks = self.disks.as_deref().unwrap_or_default();
        let cards = self.net.as_deref().unwrap_or_default();
        let raw = |disk: &DiskConfig| {
            disk.image_type.as_deref().is_none_or(|name| name.eq_ignore_ascii_case("raw"))
        };
        refuse(!disks.iter().all(raw), "disks image_type", "only raw images are read");
        refuse(disks.iter().any(|disk| disk.backing_files), "disks backing_files", NO_BACKING);
        refuse(disks.iter().any(|disk| disk.pci_segment > 0), "disks pci_segment", ONE_SEGMENT);
        refuse(disks.iter().any(|disk| disk.vhost_user), "disks vhost_user", BYPASS);
        refuse(disks.iter().any(|disk| disk.iommu), "disks iommu", NOT_BUILT);
        // Upstream writes -1 for what it holds open, and so do we.
        let numbered = |card: &NetConfig| card.fds.iter().flatten().any(|fd| *fd >= 0);
        refuse(cards.iter().any(numbered), "net fds", OTHER_FDS);
        refuse(cards.iter().any(|card| card.pci_segment > 0), "net pci_segment", ONE_SEGMENT);
        refuse(cards.iter().any(|card| card.vhost_user), "net vhost_user", BYPASS);
        refuse(cards.iter().any(|card| card.iommu), "net iommu", NOT_BUILT);
        refuse(self.vsock.is_some(), "vsock", NOT_BUILT);
        refuse(self.balloon.is_some(), "balloon", NOT_BUILT);
        refuse(self.watchdog, "watchdog", NOT_BUILT);
        refuse(self.pvpanic, "pvpanic", NOT_BUILT);
        refuse(self.iommu, "iommu", NOT_BUILT);
        refuse(self.rng.iommu, "rng.iommu", NOT_BUILT);
        let on_iommu = |console: &ConsoleConfig| console.iommu;
        refuse(on_iommu(&self.console), "console.iommu", NOT_BUILT);
        refuse(on_iommu(&self.serial), "serial.iommu", NOT_BUILT);
        let debug = self.debug_console.as_ref();
        let debug_on = debug.is_some_and(|debug| debug.mode != DebugConsoleMode::Off);
        refuse(debug_on, "debug_console", NOT_BUILT);
        refuse(given(&self.fs), "fs", BYPASS);
        refuse(given(&self.generic_vhost_user), "generic_vhost_user", BYPASS);
        refuse(given(&self.pmem), "pmem", NOT_BUILT);
        refuse(given(&self.devices), "devices", BYPASS);
        refuse(given(&self.user_devices), "user_devices", BYPASS);
        refuse(given(&self.vdpa), "vdpa", BYPASS);
        refuse(given(&self.ivshmem), "ivshmem", BYPASS);
        refuse(given(&self.sgx_epc), "sgx_epc", NOT_BUILT);
        refuse(given(&self.tpm), "tpm", NOT_BUILT);
    }

    fn refuse_machine(&self, refuse: &mut impl FnMut(bool, &str, &'static str)) {
        let cpus = &self.cpus;
        refuse(cpus.kvm_hyperv, "cpus.kvm_hyperv", "");
        refuse(cpus.features.amx, "cpus.features.amx", "");
        refuse(cpus.nested == Some(false), "cpus.nested=false", "");
        let memory = &self.memory;
        let zoned = memory.zones.as_ref().is_some_and(|zones| !zones.is_empty());
        refuse(zoned, "memory.zones", "");
        let hotplug = memory.hotplug_size.unwrap_or(0) > 0;
        let virtio = memory.hotplug_method == HotplugMethod::VirtioMem;
        refuse(hotplug && virtio, "memory.hotplug_method VirtioMem", NOT_BUILT);
        refuse(memory.hotplugged_size.unwrap_or(0) > 0, "memory.hotplugged_size", "");
        refuse(given(&self.numa), "numa", "");
        refuse(given(&self.pci_segments), "pci_segments", "");
        let firmware = self.payload.firmware.is_some();
        refuse(firmware, "payload.firmware", "there is no firmware boot, name a payload.kernel");
        refuse(self.payload.igvm.is_some(), "payload.igvm", "");
        refuse(self.payload.host_data.is_some(), "payload.host_data", "");
        // The guest sees nothing of it, but whoever asks for a sandbox must not go without.
        refuse(self.landlock_enable, "landlock_enable", "");
    }

    fn refuse_platform(&self, refuse: &mut impl FnMut(bool, &str, &'static str)) {
        let Some(platform) = &self.platform else { return };
        refuse(platform.num_pci_segments > 1, "platform.num_pci_segments", "there is one");
        let segments = platform.iommu_segments.as_ref().is_some_and(|list| !list.is_empty());
        refuse(segments, "platform.iommu_segments", NOT_BUILT);
        refuse(platform.iommu_address_width.is_some(), "platform.iommu_address_width", NOT_BUILT);
        const NO_SMBIOS: &str = "there are no SMBIOS tables";
        refuse(platform.serial_number.is_some(), "platform.serial_number", NO_SMBIOS);
        refuse(platform.uuid.is_some(), "platform.uuid", NO_SMBIOS);
        let strings = platform.oem_strings.as_ref().is_some_and(|list| !list.is_empty());
        refuse(strings, "platform.oem_strings", NO_SMBIOS);
        refuse(platform.tdx, "platform.tdx", "");
        refuse(platform.sev_snp, "platform.sev_snp", "");
        // All of it is what the guest reads of its machine.
        for (key, _) in platform.other.iter().filter(|(_, value)| !value.is_null()) {
            refuse(true, &format!("platform.{key}"), "this version knows no such key");
        }
    }
}

/// Whether a client asks for something: an empty list does not.
fn given(value: &Option<Value>) -> bool {
    match value {
        None | Some(Value::Null) => false,
        Some(Value::Array(items)) => !items.is_empty(),
        Some(_) => true,
    }
}
