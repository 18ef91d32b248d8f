//! What the figures were measured on.

use std::fs;

use serde::Serialize;

#[derive(Clone, Debug, Serialize)]
pub struct Host {
    pub cpu: String,
    pub cores: usize,
    pub memory_mib: u64,
    pub available_mib: u64,
    pub kernel: String,
    /// The kernel's module that runs guests: `kvm_intel`, `kvm_amd`, or a software one.
    pub kvm: String,
}

impl Host {
    #[must_use]
    pub fn read() -> Self {
        let cpus = read("/proc/cpuinfo");
        let named = |name: &str| {
            let line = cpus.lines().find(|line| line.starts_with(name));
            line.and_then(|line| line.split_once(": ")).map_or("", |(_, value)| value).to_owned()
        };
        let kinds = ["kvm_intel", "kvm_amd", "kvm_pvm"];
        let is_there = |kind: &&&str| fs::exists(format!("/sys/module/{kind}")).unwrap_or(false);
        let kvm: Vec<&str> = kinds.iter().filter(is_there).copied().collect();
        Self {
            cpu: named("model name"),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_mib: memory_mib("MemTotal:"),
            available_mib: memory_mib("MemAvailable:"),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            kvm: if kvm.is_empty() { "unknown".into() } else { kvm.join(" ") },
        }
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// Of /proc/meminfo; 0 where it cannot be read.
#[must_use]
pub fn memory_mib(name: &str) -> u64 {
    let text = read("/proc/meminfo");
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) / 1024
}
