//! `--disk`, `--net`, `--rng`, `--serial`, `--console`.

use crate::config::{
    ConsoleConfig, ConsoleOutputMode, DiskConfig, NetConfig, QueueAffinity, RateLimiterConfig,
    RngConfig, TokenBucket, VhostMode,
};
use crate::option::{OptionError, Pairs, bad, split, unquote};

use super::machine::cpu_list;

const CONSOLE_WORDS: &str = "off|null|pty|tty|file=<path>|socket=<path>";
const LIMITER_KEYS: [&str; 6] = [
    "bw_size",
    "bw_one_time_burst",
    "bw_refill_time",
    "ops_size",
    "ops_one_time_burst",
    "ops_refill_time",
];

/// `--serial` and `--console`: `off|null|pty|tty|file=<path>|socket=<path>`.
///
/// # Errors
///
/// The value is none of these.
pub fn console(text: &str) -> Result<ConsoleConfig, OptionError> {
    let mut config = None;
    let mut iommu = false;
    // Words without a value are allowed here, so the pairs' own syntax does not do.
    for piece in split(text)? {
        let refuse = || OptionError::BadWord { wanted: CONSOLE_WORDS, value: text.to_owned() };
        let found = match piece.split_once('=') {
            None => word(piece),
            Some(("file", path)) if !path.is_empty() => Some(ConsoleConfig::to_file(unquote(path))),
            Some(("socket", path)) if !path.is_empty() => {
                Some(ConsoleConfig::on_socket(unquote(path)))
            }
            Some(("iommu", toggle)) => {
                iommu = match toggle {
                    "on" | "true" => true,
                    "off" | "false" => false,
                    other => return Err(bad("iommu", "on or off", other)),
                };
                continue;
            }
            Some(_) => None,
        };
        if config.is_some() {
            return Err(refuse());
        }
        config = Some(found.ok_or_else(refuse)?);
    }
    let config = config
        .ok_or_else(|| OptionError::BadWord { wanted: CONSOLE_WORDS, value: text.to_owned() })?;
    Ok(ConsoleConfig { iommu, ..config })
}

/// The console of one word.
pub(super) fn word(text: &str) -> Option<ConsoleConfig> {
    Some(ConsoleConfig::new(match text {
        "off" => ConsoleOutputMode::Off,
        "null" => ConsoleOutputMode::Null,
        "pty" => ConsoleOutputMode::Pty,
        "tty" => ConsoleOutputMode::Tty,
        _ => return None,
    }))
}

/// `--rng src=<path>`.
///
/// # Errors
///
/// The syntax is broken.
pub fn rng(text: &str) -> Result<RngConfig, OptionError> {
    let mut pairs = Pairs::parse(text, &["src", "iommu"])?;
    let default = RngConfig::default();
    Ok(RngConfig {
        src: pairs.path("src")?.unwrap_or(default.src),
        iommu: pairs.toggle("iommu")?.unwrap_or(default.iommu),
    })
}

/// `--disk path=<path>,readonly=on|off,…`.
///
/// # Errors
///
/// The syntax is broken.
pub fn disk(text: &str) -> Result<DiskConfig, OptionError> {
    let own = [
        "path",
        "readonly",
        "direct",
        "iommu",
        "num_queues",
        "queue_size",
        "vhost_user",
        "socket",
        "rate_limit_group",
        "id",
        "_disable_io_uring",
        "_disable_aio",
        "pci_segment",
        "serial",
        "queue_affinity",
        "backing_files",
        "sparse",
        "image_type",
    ];
    let known: Vec<&str> = own.iter().chain(&LIMITER_KEYS).copied().collect();
    let mut pairs = Pairs::parse(text, &known)?;
    let default = DiskConfig::default();
    Ok(DiskConfig {
        path: pairs.path("path")?,
        readonly: pairs.toggle("readonly")?.unwrap_or(default.readonly),
        direct: pairs.toggle("direct")?.unwrap_or(default.direct),
        iommu: pairs.toggle("iommu")?.unwrap_or(default.iommu),
        num_queues: pairs.parsed("num_queues", "a number")?.unwrap_or(default.num_queues),
        queue_size: pairs.parsed("queue_size", "a number")?.unwrap_or(default.queue_size),
        vhost_user: pairs.toggle("vhost_user")?.unwrap_or(default.vhost_user),
        vhost_socket: pairs.text("socket"),
        rate_limit_group: pairs.text("rate_limit_group"),
        rate_limiter_config: limiter(&mut pairs)?,
        id: pairs.text("id"),
        disable_io_uring: pairs.toggle("_disable_io_uring")?.unwrap_or(default.disable_io_uring),
        disable_aio: pairs.toggle("_disable_aio")?.unwrap_or(default.disable_aio),
        pci_segment: pairs.parsed("pci_segment", "a number")?.unwrap_or(default.pci_segment),
        serial: pairs.text("serial"),
        queue_affinity: queue_affinity(&mut pairs)?,
        backing_files: pairs.toggle("backing_files")?.unwrap_or(default.backing_files),
        sparse: pairs.toggle("sparse")?.unwrap_or(default.sparse),
        image_type: pairs.text("image_type"),
    })
}

/// `--net tap=<name>,mac=<address>,…`.
///
/// # Errors
///
/// The syntax is broken.
pub fn net(text: &str) -> Result<NetConfig, OptionError> {
    let own = [
        "tap",
        "ip",
        "mask",
        "mac",
        "host_mac",
        "mtu",
        "iommu",
        "num_queues",
        "queue_size",
        "vhost_user",
        "socket",
        "vhost_mode",
        "id",
        "fd",
        "pci_segment",
        "offload_tso",
        "offload_ufo",
        "offload_csum",
    ];
    let known: Vec<&str> = own.iter().chain(&LIMITER_KEYS).copied().collect();
    let mut pairs = Pairs::parse(text, &known)?;
    let default = NetConfig::default();
    let modes = [("client", VhostMode::Client), ("server", VhostMode::Server)];
    Ok(NetConfig {
        tap: pairs.text("tap"),
        ip: pairs.parsed("ip", "an IP address")?,
        mask: pairs.parsed("mask", "an IP address")?,
        mac: pairs.text("mac"),
        host_mac: pairs.text("host_mac"),
        mtu: pairs.parsed("mtu", "a number")?,
        iommu: pairs.toggle("iommu")?.unwrap_or(default.iommu),
        num_queues: pairs.parsed("num_queues", "a number")?.unwrap_or(default.num_queues),
        queue_size: pairs.parsed("queue_size", "a number")?.unwrap_or(default.queue_size),
        vhost_user: pairs.toggle("vhost_user")?.unwrap_or(default.vhost_user),
        vhost_socket: pairs.text("socket"),
        vhost_mode: pairs.word("vhost_mode", &modes)?.unwrap_or(default.vhost_mode),
        id: pairs.text("id"),
        fds: descriptors(&mut pairs)?,
        rate_limiter_config: limiter(&mut pairs)?,
        pci_segment: pairs.parsed("pci_segment", "a number")?.unwrap_or(default.pci_segment),
        offload_tso: pairs.toggle("offload_tso")?.unwrap_or(default.offload_tso),
        offload_ufo: pairs.toggle("offload_ufo")?.unwrap_or(default.offload_ufo),
        offload_csum: pairs.toggle("offload_csum")?.unwrap_or(default.offload_csum),
    })
}

/// `fd=[3,4]`, or `fd=3` for one.
fn descriptors(pairs: &mut Pairs) -> Result<Option<Vec<i32>>, OptionError> {
    let wanted = "descriptors as [3,4]";
    pairs.with("fd", wanted, |text| {
        let inner = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        inner.unwrap_or(text).split(',').map(|fd| fd.parse().ok()).collect()
    })
}

/// `queue_affinity=[0@[1,3],1@[2]]`.
fn queue_affinity(pairs: &mut Pairs) -> Result<Option<Vec<QueueAffinity>>, OptionError> {
    let Some(items) = pairs.raw_list("queue_affinity")? else { return Ok(None) };
    let read = |item: &String| {
        let (queue, cpus) = item.split_once('@')?;
        Some(QueueAffinity { queue_index: queue.parse().ok()?, host_cpus: cpu_list(cpus)? })
    };
    let refuse = |item: &str| bad("queue_affinity", "items as 0@[1,3]", item);
    items
        .iter()
        .map(|item| read(item).ok_or_else(|| refuse(item)))
        .collect::<Result<_, _>>()
        .map(Some)
}

fn limiter(pairs: &mut Pairs) -> Result<Option<RateLimiterConfig>, OptionError> {
    let bandwidth = bucket(pairs, ["bw_size", "bw_one_time_burst", "bw_refill_time"])?;
    let ops = bucket(pairs, ["ops_size", "ops_one_time_burst", "ops_refill_time"])?;
    let some = bandwidth.is_some() || ops.is_some();
    Ok(some.then_some(RateLimiterConfig { bandwidth, ops }))
}

fn bucket(
    pairs: &mut Pairs,
    [size, burst, refill]: [&'static str; 3],
) -> Result<Option<TokenBucket>, OptionError> {
    let bytes = pairs.size(size)?;
    let one_time_burst = pairs.size(burst)?;
    let refill_time = pairs.parsed(refill, "milliseconds")?;
    match (bytes, refill_time) {
        (None, None) if one_time_burst.is_none() => Ok(None),
        (Some(size), Some(refill_time)) => {
            Ok(Some(TokenBucket { size, one_time_burst, refill_time }))
        }
        (None, _) => Err(OptionError::MissingKey(size)),
        (_, None) => Err(OptionError::MissingKey(refill)),
    }
}
