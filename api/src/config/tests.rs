//! Configurations as clients send them, and what is wrong with others.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::invalid::Invalid;
use crate::response::{VmInfo, VmState};

fn config(value: Value) -> VmConfig {
    serde_json::from_value(value).unwrap()
}

/// A configuration in which everything is right.
fn right() -> VmConfig {
    config(json!({ "payload": { "kernel": "/k" } }))
}

fn lines(found: &[Invalid]) -> Vec<String> {
    found.iter().map(Invalid::line).collect()
}

#[test]
fn an_empty_configuration_has_the_documented_defaults() {
    let config = config(json!({}));
    assert_eq!((config.cpus.boot_vcpus, config.cpus.max_vcpus), (1, 1));
    assert_eq!(config.memory.size, 512 << 20);
    assert!(config.memory.thp);
    assert_eq!(config.serial.mode, ConsoleOutputMode::Null);
    assert_eq!(config.console.mode, ConsoleOutputMode::Tty);
    assert_eq!(config.rng.src.to_str(), Some("/dev/urandom"));
    assert_eq!(lines(&config.validate()), [""; 0]);
    assert_eq!(lines(&config.unsupported()), [""; 0]);
    let missing = "payload.kernel is missing: there is nothing to boot";
    assert_eq!(lines(&config.validate_boot()), [missing]);
    let disk: DiskConfig = serde_json::from_str("{}").unwrap();
    assert_eq!((disk.num_queues, disk.queue_size), (1, 128));
    let net: NetConfig = serde_json::from_str("{}").unwrap();
    assert_eq!((net.num_queues, net.queue_size), (2, 256));
}

/// What Kata Containers sends for a pod with a virtio-blk image, less its devices.
#[test]
fn a_configuration_of_kata_is_taken() {
    let config = config(json!({
        "payload": {
            "kernel": "/opt/kata/vmlinux.container",
            "cmdline": "root=/dev/pmem0p1 console=hvc0 agent.log=debug",
        },
        "cpus": { "boot_vcpus": 1, "max_vcpus": 8, "features": {} },
        "memory": {
            "size": 2147483648_u64, "shared": true, "hugepages": false, "prefault": false,
            "hotplug_size": 14999879680_u64, "hotplug_method": "Acpi", "thp": true,
        },
        "rng": { "src": "/dev/urandom", "iommu": false },
        "serial": { "mode": "Off" },
        "console": { "mode": "Off", "iommu": false },
        "debug_console": { "mode": "Off", "iobase": 233 },
        "platform": { "num_pci_segments": 1, "iommu_segments": [] },
        "watchdog": false,
        "disks": [],
    }));
    assert_eq!(config.cpus.max_vcpus, 8);
    assert_eq!(lines(&config.validate_boot()), [""; 0]);
    assert_eq!(lines(&config.unsupported()), [""; 0]);
}

/// What libvirt's driver sends for a plain domain.
#[test]
fn a_configuration_of_libvirt_is_taken() {
    let config = config(json!({
        "console": { "mode": "Off" },
        "serial": { "mode": "Pty" },
        "cpus": { "boot_vcpus": 2, "max_vcpus": 2 },
        "memory": { "size": 1073741824 },
        "payload": { "kernel": "/k", "cmdline": "console=ttyS0", "initramfs": "/i" },
    }));
    assert_eq!(lines(&config.validate_boot()), [""; 0]);
    assert_eq!(config.serial.mode, ConsoleOutputMode::Pty);
}

/// What the crate cloud-hypervisor-client makes of its own defaults: every optional as null or
/// left out, numbers where we have narrower ones.
#[test]
fn unknown_fields_and_nulls_are_passed_over() {
    let config = config(json!({
        "payload": { "kernel": "/k", "cmdline": null, "fw_cfg_config": { "items": [] } },
        "cpus": { "boot_vcpus": 1, "max_vcpus": 1, "core_scheduling": "Vm", "topology": null },
        "memory": { "size": 134217728, "zones": null, "reserve": true },
        "net": null,
        "fs": null,
        "pmem": [],
        "a_field_of_the_future": { "x": 1 },
    }));
    assert_eq!(lines(&config.validate_boot()), [""; 0]);
    assert_eq!(lines(&config.unsupported()), [""; 0]);
}

#[test]
fn what_is_absent_is_left_out() {
    let info = VmInfo {
        config: right(),
        state: VmState::Created,
        memory_actual_size: 512 << 20,
        device_tree: None,
    };
    let value = serde_json::to_value(&info).unwrap();
    fn without_nulls(value: &Value) -> bool {
        match value {
            Value::Null => false,
            Value::Array(items) => items.iter().all(without_nulls),
            Value::Object(fields) => fields.values().all(without_nulls),
            _ => true,
        }
    }
    assert!(without_nulls(&value), "{value}");
    assert_eq!(value["state"], "Created");
    assert_eq!(value["config"]["payload"], json!({ "kernel": "/k" }));
    assert_eq!(value["config"]["console"], json!({ "mode": "Tty", "iommu": false }));
    assert!(value["config"].get("disks").is_none());
    assert_eq!(serde_json::from_value::<VmInfo>(value).unwrap(), info);
}

#[test]
fn every_contradiction_is_found_and_named() {
    let found = |value: Value| {
        let mut whole = json!({ "payload": { "kernel": "/k" } });
        for (key, part) in value.as_object().unwrap() {
            whole[key] = part.clone();
        }
        lines(&config(whole).validate_boot())
    };
    let cpus = |boot: u32, max: u32| json!({ "cpus": { "boot_vcpus": boot, "max_vcpus": max } });
    assert_eq!(found(cpus(0, 1)), ["cpus.boot_vcpus must be 1 to 254, not 0"]);
    assert_eq!(found(cpus(3, 2)), ["cpus.boot_vcpus must be cpus.max_vcpus (2) at most, not 3"]);
    assert_eq!(found(cpus(1, 255)), ["cpus.max_vcpus must be 254 at most, not 255"]);
    let memory = |size: u64| json!({ "memory": { "size": size } });
    assert_eq!(found(memory(0)), ["memory.size must be 4194304 to 70368744177664 bytes, not 0"]);
    assert_eq!(
        found(memory((512 << 20) + 1)),
        ["memory.size must be a multiple of 4096 bytes, not 536870913"]
    );
    assert_eq!(found(memory(u64::MAX - 4095)).len(), 1);
    let cases = [
        (
            json!({ "memory": { "size": 1 << 30, "hugepages": true, "hugepage_size": 3 << 20 } }),
            "memory.hugepage_size must be a power of two from 2 MiB to 1 GiB, not 3145728",
        ),
        (
            json!({ "memory": { "size": 1 << 30, "hugepage_size": 2 << 20 } }),
            "memory.hugepages is missing: memory.hugepage_size is given",
        ),
        (
            json!({ "memory": { "size": (1 << 30) + 4096, "hugepages": true } }),
            "memory.size must be a multiple of 2097152 bytes, not 1073745920",
        ),
        (
            json!({ "memory": { "size": 1 << 30, "hotplugged_size": 1 } }),
            "memory.hotplugged_size must be memory.hotplug_size at most, not 1",
        ),
        (
            json!({ "cpus": { "boot_vcpus": 4, "max_vcpus": 4, "topology": {
                "threads_per_core": 2, "cores_per_die": 1, "dies_per_package": 1, "packages": 1,
            } } }),
            "cpus.topology must be a product of cpus.max_vcpus (4), not 2",
        ),
        (
            json!({ "cpus": { "boot_vcpus": 1, "max_vcpus": 1, "max_phys_bits": 64 } }),
            "cpus.max_phys_bits must be 32 to 52, not 64",
        ),
        (
            json!({ "cpus": { "boot_vcpus": 1, "max_vcpus": 1,
                "affinity": [{ "vcpu": 1, "host_cpus": [0] }] } }),
            "cpus.affinity must be a vCPU below cpus.max_vcpus, not 1",
        ),
        (json!({ "serial": { "mode": "File" } }), "serial.file is missing: its mode is File"),
        (
            json!({ "serial": { "mode": "File", "file": "" } }),
            "serial.file is missing: its mode is File",
        ),
        (
            json!({ "console": { "mode": "Socket" } }),
            "console.socket is missing: its mode is Socket",
        ),
        (
            json!({ "serial": { "mode": "Tty" } }),
            "serial.mode Tty contradicts console.mode Tty: one terminal cannot be both, switch \
             one of them off",
        ),
        (
            json!({ "payload": { "kernel": "/k", "firmware": "/f" } }),
            "payload.firmware contradicts payload.kernel: a VM boots one of them",
        ),
        (
            json!({ "payload": { "firmware": "/f", "initramfs": "/i" } }),
            "payload.kernel is missing: there is a payload.initramfs",
        ),
        (json!({ "payload": {} }), "payload.kernel is missing: there is nothing to boot"),
        (
            json!({ "disks": [{ "path": "/a", "id": "__a" }] }),
            "disks[0].id starts with __, which is reserved: __a",
        ),
        (json!({ "disks": [{}] }), "disks[0].path is missing"),
        (
            json!({ "disks": [{ "path": "/a", "queue_size": 3 }] }),
            "disks[0].queue_size must be a power of two, not 3",
        ),
        (
            json!({ "net": [{ "num_queues": 3 }] }),
            "net[0].num_queues must be even, a pair being two queues, not 3",
        ),
        (
            json!({ "net": [{ "mac": "02:00:00:00:00:+1" }] }),
            "net[0].mac must be six hexadecimal bytes as 02:00:00:00:00:01, not 02:00:00:00:00:+1",
        ),
        (
            json!({ "vsock": { "cid": 2, "socket": "/s" } }),
            "vsock.cid must be 3 to 4294967294, not 2",
        ),
    ];
    for (value, line) in cases {
        assert_eq!(found(value), [line]);
    }
}

#[test]
fn identifiers_and_images_that_clash_are_conflicts() {
    let clash = config(json!({
        "disks": [{ "path": "/a", "id": "x" }, { "path": "/b", "id": "y" }],
        "net": [{ "id": "x" }],
    }));
    let found = clash.validate();
    assert_eq!(lines(&found), ["net[0].id is used more than once: x"]);
    assert!(found.iter().all(Invalid::is_conflict));
    let clash = config(json!({ "disks": [{ "path": "/a" }, { "path": "/a" }] }));
    assert_eq!(lines(&clash.validate()), ["disks[1].path is used more than once: /a"]);
    let odd = config(json!({ "disks": [{ "path": "/a", "id": "a\u{0}b" }] }));
    let expected = r"disks[0].id must be text without control characters, not a\0b";
    assert_eq!(lines(&odd.validate()), [expected]);
    let shared = json!({ "path": "/a", "readonly": true });
    let fine = config(json!({ "disks": [shared.clone(), shared] }));
    assert!(fine.validate().is_empty());
}

#[test]
fn every_key_that_cannot_be_honoured_is_named() {
    let cases = [
        (json!({ "disks": [{ "path": "/a", "image_type": "Qcow2" }] }), "disks image_type"),
        (json!({ "disks": [{ "path": "/a", "backing_files": true }] }), "disks backing_files"),
        (json!({ "disks": [{ "path": "/a", "pci_segment": 1 }] }), "disks pci_segment"),
        (json!({ "disks": [{ "path": "/a", "vhost_user": true }] }), "disks vhost_user"),
        (json!({ "disks": [{ "path": "/a", "iommu": true }] }), "disks iommu"),
        (json!({ "net": [{ "fds": [3] }] }), "net fds"),
        (json!({ "net": [{ "pci_segment": 1 }] }), "net pci_segment"),
        (json!({ "net": [{ "vhost_user": true }] }), "net vhost_user"),
        (json!({ "vsock": { "cid": 3, "socket": "/s" } }), "vsock"),
        (json!({ "balloon": { "size": 0 } }), "balloon"),
        (json!({ "watchdog": true }), "watchdog"),
        (json!({ "pvpanic": true }), "pvpanic"),
        (json!({ "iommu": true }), "iommu"),
        (json!({ "rng": { "src": "/r", "iommu": true } }), "rng.iommu"),
        (json!({ "console": { "mode": "Off", "iommu": true } }), "console.iommu"),
        (json!({ "debug_console": { "mode": "Tty" } }), "debug_console"),
        (json!({ "fs": [{ "tag": "t" }] }), "fs"),
        (json!({ "pmem": [{}] }), "pmem"),
        (json!({ "devices": [{ "path": "/sys/x" }] }), "devices"),
        (json!({ "user_devices": [{}] }), "user_devices"),
        (json!({ "vdpa": [{}] }), "vdpa"),
        (json!({ "sgx_epc": [{}] }), "sgx_epc"),
        (json!({ "numa": [{}] }), "numa"),
        (json!({ "tpm": { "socket": "/s" } }), "tpm"),
        (json!({ "pci_segments": [{}] }), "pci_segments"),
        (json!({ "landlock_enable": true }), "landlock_enable"),
        (json!({ "platform": { "uuid": "u" } }), "platform.uuid"),
        (json!({ "platform": { "a_later_one": "u" } }), "platform.a_later_one"),
        (json!({ "payload": { "igvm": "/i" } }), "payload.igvm"),
        (
            json!({ "memory": { "size": 0, "zones": [{ "id": "z", "size": 4096 }] } }),
            "memory.zones",
        ),
        (
            json!({ "memory": { "size": 1 << 30, "hotplug_method": "VirtioMem", "hotplug_size": 1 } }),
            "memory.hotplug_method VirtioMem",
        ),
        (
            json!({ "cpus": { "boot_vcpus": 1, "max_vcpus": 1, "kvm_hyperv": true } }),
            "cpus.kvm_hyperv",
        ),
        (
            json!({ "cpus": { "boot_vcpus": 1, "max_vcpus": 1, "features": { "amx": true } } }),
            "cpus.features.amx",
        ),
        (
            json!({ "cpus": { "boot_vcpus": 1, "max_vcpus": 1, "nested": false } }),
            "cpus.nested=false",
        ),
        (json!({ "platform": { "tdx": true } }), "platform.tdx"),
        (json!({ "platform": { "uuid": "u" } }), "platform.uuid"),
        (json!({ "platform": { "num_pci_segments": 2 } }), "platform.num_pci_segments"),
    ];
    for (value, key) in cases {
        let found = lines(&config(value).unsupported());
        let start = format!("{key} is not supported");
        assert!(found.iter().any(|line| line.starts_with(&start)), "{key}: {found:?}");
    }
}

proptest! {
    #[test]
    fn no_text_breaks_the_configuration(text in "[\\[\\]{}\",:a-z0-9._ -]{0,80}") {
        if let Ok(config) = serde_json::from_str::<VmConfig>(&text) {
            let _ = config.validate_boot();
            let _ = config.unsupported();
        }
    }

    #[test]
    fn numbers_of_any_size_are_judged(numbers in any::<[u64; 4]>(), cpus in any::<[u32; 2]>()) {
        let [size, hugepage_size, hotplug_size, hotplugged_size] = numbers;
        let config = config(json!({
            "cpus": { "boot_vcpus": cpus[0], "max_vcpus": cpus[1], "topology": {
                "threads_per_core": u16::MAX, "cores_per_die": u16::MAX,
                "dies_per_package": u16::MAX, "packages": u16::MAX } },
            "memory": { "size": size, "hugepages": true, "hugepage_size": hugepage_size,
                "hotplug_size": hotplug_size, "hotplugged_size": hotplugged_size },
        }));
        prop_assert!(!config.validate().is_empty());
        let text = serde_json::to_string(&config).unwrap();
        prop_assert_eq!(serde_json::from_str::<VmConfig>(&text).unwrap(), config);
    }
}
