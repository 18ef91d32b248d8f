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

/// Seconds of processor time since the boot: of all processes, and of this one and those that it
/// has waited for.
#[derive(Clone, Copy, Debug)]
pub struct Busy {
    all: f64,
    ours: f64,
}

/// USER_HZ, which Linux gives everybody on x86 (proc_stat(5)).
const TICKS_PER_S: f64 = 100.0;

impl Busy {
    #[must_use]
    pub fn now() -> Self {
        let sum = |fields: &str, skip: usize, take: usize| -> f64 {
            let numbers = fields.split_whitespace().skip(skip).take(take);
            let ticks: u64 = numbers.filter_map(|number| number.parse::<u64>().ok()).sum();
            crate::samples::float(ticks) / TICKS_PER_S
        };
        let all = read("/proc/stat");
        let own = read("/proc/self/stat");
        // user, nice, system; idle and iowait; irq, softirq, steal. A name may hold blanks.
        let head = all.lines().next().unwrap_or_default();
        let own = own.rsplit_once(')').map_or("", |(_, fields)| fields);
        Self { all: sum(head, 1, 3) + sum(head, 6, 3), ours: sum(own, 11, 4) }
    }

    /// Seconds that others took since an earlier moment. A child of this process is one of them until
    /// it was waited for.
    #[must_use]
    pub fn others_since(self, before: Self) -> f64 {
        ((self.all - before.all) - (self.ours - before.ours)).max(0.0)
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
