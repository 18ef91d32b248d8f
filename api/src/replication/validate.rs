//! Ranges of the replication settings, and what of them this version cannot do.

use std::fmt::Display;
use std::ops::RangeInclusive;

use super::{ReceiveReplicaData, ReplicateData};
use crate::config::validate::console;
use crate::endpoint::{ArbiterUrl, Endpoint, EtcdCluster};
use crate::invalid::Invalid;

/// Range of `epoch_ms`.
pub const EPOCH_MS: RangeInclusive<u64> = 1..=10_000;
/// Range of `connections`.
pub const CONNECTIONS: RangeInclusive<u32> = 1..=128;
/// Range of `heartbeat_ms`.
pub const HEARTBEAT_MS: RangeInclusive<u64> = 10..=60_000;
/// Greatest `timeout_ms`: ten minutes.
pub const TIMEOUT_MS_MAX: u64 = 600_000;
/// Range of `staging_size`.
pub const STAGING_SIZE: RangeInclusive<u64> = 1 << 20..=1 << 40;

/// Bytes of an RDMA device's name (`IB_DEVICE_NAME_MAX` of the kernel, less the closing zero).
pub const RDMA_DEVICE_BYTES_MAX: usize = 63;
/// Range of `rdma_port`.
pub const RDMA_PORT: RangeInclusive<u32> = 1..=254;
/// Range of `rdma_gid_index`: a packet's header is made with an index of one byte.
pub const RDMA_GID_INDEX: RangeInclusive<u32> = 0..=255;
/// Range of `rdma_depth`.
pub const RDMA_DEPTH: RangeInclusive<u32> = 4..=1024;

impl ReplicateData {
    /// Everything that is wrong with these settings, or that this version cannot honour; nothing
    /// where the VM can be protected so.
    #[must_use]
    pub fn validate(&self) -> Vec<Invalid> {
        let mut found = Vec::new();
        peer("destination_url", &self.destination_url, &mut found);
        if let Some(url) = &self.return_url {
            peer("return_url", url, &mut found);
        }
        range("epoch_ms", self.epoch_ms, &EPOCH_MS, &mut found);
        range("epoch_min_ms", self.epoch_min_ms, &EPOCH_MS, &mut found);
        if self.epoch_min_ms > self.epoch_ms {
            let wanted = format!("epoch_ms ({}) at most", self.epoch_ms);
            found.push(Invalid::value("epoch_min_ms", wanted, self.epoch_min_ms));
        }
        if let Some(most) = self.epoch_max_ms {
            range("epoch_max_ms", most, &EPOCH_MS, &mut found);
            if most < self.epoch_ms {
                let wanted = format!("at least epoch_ms ({})", self.epoch_ms);
                found.push(Invalid::value("epoch_max_ms", wanted, most));
            }
        }
        range("connections", self.connections, &CONNECTIONS, &mut found);
        silence(self.heartbeat_ms, self.timeout_ms, &mut found);
        let Self { arbiter: url, arbiter_tls_dir, arbiter_credentials, .. } = self;
        let own = [arbiter_tls_dir.as_deref(), arbiter_credentials.as_deref()];
        arbiter(url.as_deref(), own, &mut found);
        tls("destination_url", &self.destination_url, self.tls_dir.as_deref(), &mut found);
        if let Some(url) = &self.return_url {
            tls("return_url", url, self.tls_dir.as_deref(), &mut found);
        }
        let Self { rdma_device, rdma_port, rdma_gid_index, rdma_depth, .. } = self;
        let numbers = [*rdma_port, *rdma_gid_index, *rdma_depth];
        rdma("destination_url", &self.destination_url, rdma_device.as_deref(), numbers, &mut found);
        if self.rdma_pin.is_some() {
            for_rdma("rdma_pin", "destination_url", &self.destination_url, &mut found);
        }
        if self.fallback {
            for_rdma("fallback", "destination_url", &self.destination_url, &mut found);
        }
        found
    }
}

impl ReceiveReplicaData {
    /// Everything that is wrong with these settings, or that this version cannot honour; nothing
    /// where this process can be the backup so.
    #[must_use]
    pub fn validate(&self) -> Vec<Invalid> {
        let mut found = Vec::new();
        peer("receiver_url", &self.receiver_url, &mut found);
        range("staging_size", self.staging_size, &STAGING_SIZE, &mut found);
        silence(self.heartbeat_ms, self.timeout_ms, &mut found);
        let Self { arbiter: url, arbiter_tls_dir, arbiter_credentials, .. } = self;
        let own = [arbiter_tls_dir.as_deref(), arbiter_credentials.as_deref()];
        arbiter(url.as_deref(), own, &mut found);
        tls("receiver_url", &self.receiver_url, self.tls_dir.as_deref(), &mut found);
        for (key, config) in [("serial", &self.serial), ("console", &self.console)] {
            if let Some(config) = config {
                console(key, config, &mut found);
            }
        }
        let disks = self.disks.iter().map(|disk| (&disk.id, disk.path.as_os_str().is_empty()));
        entries("disks", "path", disks, &mut found);
        let cards = self.net.iter().map(|card| (&card.id, card.tap.is_empty()));
        entries("net", "tap", cards, &mut found);
        let Self { rdma_device, rdma_port, rdma_gid_index, rdma_depth, .. } = self;
        let numbers = [*rdma_port, *rdma_gid_index, *rdma_depth];
        rdma("receiver_url", &self.receiver_url, rdma_device.as_deref(), numbers, &mut found);
        if self.fallback {
            for_rdma("fallback", "receiver_url", &self.receiver_url, &mut found);
        }
        found
    }
}

/// What a backup has otherwise, each with its id and whether what it has is empty.
fn entries<'a>(
    list: &str,
    key: &str,
    entries: impl Iterator<Item = (&'a Option<String>, bool)>,
    found: &mut Vec<Invalid>,
) {
    for (id, is_empty) in entries {
        if let Some(id) = id.as_ref().filter(|id| id.is_empty() || id.contains('@')) {
            found.push(Invalid::value(format!("{list} id"), "the id of a device", id));
        }
        if is_empty {
            found.push(Invalid::value(format!("{list} {key}"), "not an empty text", ""));
        }
    }
}

fn range<T: PartialOrd + Display>(
    key: &str,
    value: T,
    range: &RangeInclusive<T>,
    found: &mut Vec<Invalid>,
) {
    if !range.contains(&value) {
        found.push(Invalid::value(key, format!("{} to {}", range.start(), range.end()), value));
    }
}

fn silence(heartbeat_ms: u64, timeout_ms: u64, found: &mut Vec<Invalid>) {
    range("heartbeat_ms", heartbeat_ms, &HEARTBEAT_MS, found);
    // One heartbeat may be lost or late without anything being wrong.
    let least = heartbeat_ms.saturating_mul(2);
    if timeout_ms < least {
        let wanted = format!("at least twice heartbeat_ms ({heartbeat_ms})");
        found.push(Invalid::value("timeout_ms", wanted, timeout_ms));
    }
    if timeout_ms > TIMEOUT_MS_MAX {
        let wanted = format!("{TIMEOUT_MS_MAX} at most");
        found.push(Invalid::value("timeout_ms", wanted, timeout_ms));
    }
}

fn peer(key: &str, url: &str, found: &mut Vec<Invalid>) {
    match url.parse() {
        Ok(Endpoint::Tcp { .. } | Endpoint::Unix(_) | Endpoint::Rdma { .. }) => {}
        Err(error) => found.push(Invalid::endpoint(key, error)),
    }
}

/// The arbiter; `own` are the directory and the file that only `etcd:` has.
fn arbiter(url: Option<&str>, own: [Option<&str>; 2], found: &mut Vec<Invalid>) {
    const KEYS: [&str; 2] = ["arbiter_tls_dir", "arbiter_credentials"];
    let cluster = match url.map(str::parse) {
        None | Some(Ok(ArbiterUrl::File(_))) => None,
        Some(Ok(ArbiterUrl::Etcd(cluster))) => Some(cluster),
        Some(Err(error)) => return found.push(Invalid::endpoint("arbiter", error)),
    };
    for (key, path) in KEYS.into_iter().zip(own) {
        let Some(path) = path else { continue };
        if path.is_empty() {
            found.push(Invalid::value(key, "a path", path));
        }
        if cluster.is_none() {
            found.push(Invalid::contradiction(key, "arbiter", "it is for etcd:<url> only"));
        }
    }
    let is_plain = |cluster: EtcdCluster| cluster.servers.iter().all(|server| !server.tls);
    if own[0].is_some() && cluster.is_some_and(is_plain) {
        found.push(Invalid::contradiction(KEYS[0], "arbiter", "none of its URLs is https:"));
    }
}

fn tls(url_key: &str, url: &str, directory: Option<&str>, found: &mut Vec<Invalid>) {
    const KEY: &str = "tls_dir";
    match directory {
        None => {}
        Some("") => found.push(Invalid::value(KEY, "a directory", "")),
        // Its bytes never leave the host, and who may open it is what the permissions say. A URL that is
        // none was named already.
        Some(_) if matches!(url.parse(), Ok(Endpoint::Unix(_))) => {
            let because = "it is for tcp:<host>:<port> and rdma:<host>:<port> only";
            found.push(Invalid::contradiction(KEY, url_key, because));
        }
        Some(_) => {}
    }
}

/// An option that was given, of `rdma:` only. A URL that is none was named already.
fn for_rdma(key: &str, url_key: &str, url: &str, found: &mut Vec<Invalid>) {
    if matches!(url.parse(), Ok(Endpoint::Tcp { .. } | Endpoint::Unix(_))) {
        found.push(Invalid::contradiction(key, url_key, "it is for rdma:<host>:<port> only"));
    }
}

/// The options of `rdma:`; `numbers` are port, GID index and depth.
fn rdma(
    url_key: &str,
    url: &str,
    device: Option<&str>,
    numbers: [Option<u32>; 3],
    found: &mut Vec<Invalid>,
) {
    const DEVICE: &str = "rdma_device";
    let ranges =
        [("rdma_port", RDMA_PORT), ("rdma_gid_index", RDMA_GID_INDEX), ("rdma_depth", RDMA_DEPTH)];
    let given = ranges.iter().zip(numbers).filter_map(|((key, _), value)| value.map(|_| *key));
    for key in device.map(|_| DEVICE).into_iter().chain(given) {
        for_rdma(key, url_key, url, found);
    }
    let is_name = |name: &str| {
        (1..=RDMA_DEVICE_BYTES_MAX).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_graphic())
    };
    if let Some(name) = device.filter(|name| !is_name(name)) {
        let wanted = format!("the name of a device, {RDMA_DEVICE_BYTES_MAX} bytes at most");
        found.push(Invalid::value(DEVICE, wanted, name));
    }
    for ((key, bounds), value) in ranges.iter().zip(numbers) {
        if let Some(value) = value {
            range(key, value, bounds, found);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(found: &[Invalid]) -> Vec<String> {
        found.iter().map(Invalid::line).collect()
    }

    #[test]
    fn every_value_out_of_range_is_named() {
        let good = "destination_url=tcp:b:4000";
        for (option, line) in [
            ("epoch_ms=0,epoch_min_ms=0", "epoch_ms must be 1 to 10000, not 0"),
            ("epoch_ms=10001", "epoch_ms must be 1 to 10000, not 10001"),
            ("epoch_ms=5,epoch_min_ms=6", "epoch_min_ms must be epoch_ms (5) at most, not 6"),
            ("epoch_max_ms=10001", "epoch_max_ms must be 1 to 10000, not 10001"),
            ("epoch_max_ms=24", "epoch_max_ms must be at least epoch_ms (25), not 24"),
            ("connections=0", "connections must be 1 to 128, not 0"),
            ("connections=129", "connections must be 1 to 128, not 129"),
            ("heartbeat_ms=9", "heartbeat_ms must be 10 to 60000, not 9"),
            ("timeout_ms=199", "timeout_ms must be at least twice heartbeat_ms (100), not 199"),
            ("timeout_ms=600001", "timeout_ms must be 600000 at most, not 600001"),
            (
                "arbiter=file:/a,arbiter_tls_dir=/t",
                "arbiter_tls_dir contradicts arbiter: it is for etcd:<url> only",
            ),
            (
                "arbiter_credentials=/t",
                "arbiter_credentials contradicts arbiter: it is for etcd:<url> only",
            ),
            (
                "arbiter=etcd:http://a,arbiter_tls_dir=/t",
                "arbiter_tls_dir contradicts arbiter: none of its URLs is https:",
            ),
            ("arbiter=etcd:https://a,arbiter_tls_dir=", "arbiter_tls_dir must be a path, not "),
            (
                "arbiter=/shared",
                "arbiter is malformed: Expected file:<dir> or etcd:<url>[,<url>], found \"/shared\"",
            ),
            ("tls_dir=", "tls_dir must be a directory, not "),
            (
                "tls_dir=/t,return_url=unix:/x",
                "tls_dir contradicts return_url: it is for tcp:<host>:<port> and rdma:<host>:<port> only",
            ),
        ] {
            let data: ReplicateData = format!("{good},{option}").parse().unwrap();
            assert_eq!(lines(&data.validate())[0], line);
        }
        let long = "x".repeat(64);
        for (option, line) in [
            ("rdma_port=0", "rdma_port must be 1 to 254, not 0"),
            ("rdma_port=255", "rdma_port must be 1 to 254, not 255"),
            ("rdma_gid_index=256", "rdma_gid_index must be 0 to 255, not 256"),
            ("rdma_depth=3", "rdma_depth must be 4 to 1024, not 3"),
            ("rdma_depth=1025", "rdma_depth must be 4 to 1024, not 1025"),
            ("rdma_device=", "rdma_device must be the name of a device, 63 bytes at most, not "),
            (
                &format!("rdma_device={long}"),
                &format!("rdma_device must be the name of a device, 63 bytes at most, not {long}"),
            ),
        ] {
            let data: ReplicateData =
                format!("destination_url=rdma:b:4000,{option}").parse().unwrap();
            assert_eq!(lines(&data.validate()), [line]);
            let data: ReceiveReplicaData =
                format!("receiver_url=rdma:b:4000,{option}").parse().unwrap();
            assert_eq!(lines(&data.validate()), [line]);
        }
        let data: ReplicateData = "destination_url=here".parse().unwrap();
        assert!(lines(&data.validate())[0].starts_with("destination_url is malformed: Expected"));
    }

    #[test]
    fn the_edges_of_the_ranges_are_in_them() {
        for option in [
            "epoch_ms=1,epoch_min_ms=1",
            "epoch_ms=10000,epoch_min_ms=10000,epoch_max_ms=10000",
            "epoch_max_ms=25",
            "connections=128",
            "heartbeat_ms=10,timeout_ms=20",
            "heartbeat_ms=60000,timeout_ms=120000",
            "cow=protect",
            "compression=delta",
            "compression=lz4",
            "cow=off,compression=none,degrade=pause,console_output=pass,arbiter=file:/a",
            "arbiter=etcd:http://a,arbiter_credentials=/c",
            "arbiter=\"etcd:http://a,https://b/k\",arbiter_tls_dir=/t,arbiter_credentials=/c",
        ] {
            let data: ReplicateData = format!("destination_url=unix:/a,{option}").parse().unwrap();
            assert_eq!(lines(&data.validate()), [""; 0], "{option}");
        }
    }

    #[test]
    fn options_of_rdma_need_its_url() {
        const OPTIONS: &str = "rdma_device=mlx5_0,rdma_port=1,rdma_gid_index=0,rdma_depth=4";
        let keys = ["rdma_device", "rdma_port", "rdma_gid_index", "rdma_depth"];
        for url in ["tcp:b:4000", "unix:/a"] {
            let expected = |other: &str| {
                keys.map(|key| {
                    format!("{key} contradicts {other}: it is for rdma:<host>:<port> only")
                })
            };
            let data: ReplicateData = format!("destination_url={url},{OPTIONS}").parse().unwrap();
            assert_eq!(lines(&data.validate()), expected("destination_url"));
            let data: ReceiveReplicaData = format!("receiver_url={url},{OPTIONS}").parse().unwrap();
            assert_eq!(lines(&data.validate()), expected("receiver_url"));
        }
        for options in [OPTIONS, "rdma_port=254,rdma_gid_index=255,rdma_depth=1024"] {
            let data: ReplicateData =
                format!("destination_url=rdma:b:4000,{options}").parse().unwrap();
            assert_eq!(lines(&data.validate()), [""; 0]);
            let data: ReceiveReplicaData =
                format!("receiver_url=rdma:b:4000,{options}").parse().unwrap();
            assert_eq!(lines(&data.validate()), [""; 0]);
        }
    }

    #[test]
    fn certificates_are_for_networks() {
        for (url, wrong) in [("tcp:b:4000", false), ("rdma:b:4000", false), ("unix:/a", true)] {
            let expected = |other: &str| match wrong {
                true => vec![format!(
                    "tls_dir contradicts {other}: it is for tcp:<host>:<port> and rdma:<host>:<port> only"
                )],
                false => vec![],
            };
            let data: ReplicateData = format!("destination_url={url},tls_dir=/t").parse().unwrap();
            assert_eq!(lines(&data.validate()), expected("destination_url"));
            let data: ReceiveReplicaData =
                format!("receiver_url={url},tls_dir=/t").parse().unwrap();
            assert_eq!(lines(&data.validate()), expected("receiver_url"));
        }
    }

    #[test]
    fn a_backup_is_checked_as_well() {
        for (option, line) in [
            ("staging_size=1048575", "staging_size must be 1048576 to 1099511627776, not 1048575"),
            ("staging_size=2T", "staging_size must be 1048576 to 1099511627776, not 2199023255552"),
            ("timeout_ms=1", "timeout_ms must be at least twice heartbeat_ms (100), not 1"),
            ("tls_dir=", "tls_dir must be a directory, not "),
            (
                "arbiter_credentials=/t",
                "arbiter_credentials contradicts arbiter: it is for etcd:<url> only",
            ),
        ] {
            let data: ReceiveReplicaData =
                format!("receiver_url=tcp:b:4000,{option}").parse().unwrap();
            assert_eq!(lines(&data.validate()), [line]);
        }
        let body = "{\"receiver_url\":\"tcp:b:1\",\"serial\":{\"mode\":\"File\"}}";
        let data: ReceiveReplicaData = serde_json::from_str(body).unwrap();
        assert_eq!(lines(&data.validate()), ["serial.file is missing: its mode is File"]);
    }
}
