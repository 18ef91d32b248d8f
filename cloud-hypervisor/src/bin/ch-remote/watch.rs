//! The live view of a replication: a line that says where the pair stands.

use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::Context;
use api::client::{Client, Method};
use api::replication::ReplicationInfo;

use crate::output;

/// How long the server may take for an answer: a VMM that says nothing is not being watched.
const ANSWER: Duration = Duration::from_secs(10);

/// Prints a line every `interval_ms` until interrupted or until the VMM is gone. On a terminal
/// each line takes the place of the one before.
pub(crate) fn run(socket: &Path, interval_ms: u64) -> anyhow::Result<()> {
    let mut client = Client::connect(socket)?;
    client.set_timeout(Some(ANSWER)).context("Cannot set a timeout")?;
    let mut out = io::stdout().lock();
    let terminal = out.is_terminal();
    loop {
        let text = client
            .call(Method::Get, "vm.replication-info", None)
            .context("vm.replication-info failed")?;
        let info = serde_json::from_str(&text).context("Cannot parse vm.replication-info")?;
        let line = line(&info);
        let written =
            if terminal { write!(out, "\r{line}\x1b[K") } else { writeln!(out, "{line}") };
        let written = written.and_then(|()| out.flush());
        if written.is_err() {
            return output::judge(written);
        }
        thread::sleep(Duration::from_millis(interval_ms));
    }
}

/// What matters, on one line.
fn line(info: &ReplicationInfo) -> String {
    let mut text = format!(
        "{:?} {:?} gen {} epoch {}/{} pause {}/{} commit {}/{} held {} sync {:.0}%",
        info.role,
        info.state,
        info.generation,
        info.epoch_committed,
        info.epoch_sealed,
        duration(info.pause_us.p50),
        duration(info.pause_us.p99),
        duration(info.commit_latency_us.p50),
        duration(info.commit_latency_us.p99),
        bytes(info.output_held_bytes),
        info.sync_progress * 100.0,
    );
    if info.reconnect_attempts > 0 {
        text.push_str(&format!(" attempt {}", info.reconnect_attempts));
    }
    if let Some(error) = &info.last_error {
        text.push_str("  ");
        text.push_str(error);
    }
    text
}

/// Microseconds with a readable unit.
fn duration(us: u64) -> String {
    match us {
        0..1_000 => format!("{us}us"),
        1_000..1_000_000 => format!("{}.{}ms", us / 1_000, us % 1_000 / 100),
        _ => format!("{}.{}s", us / 1_000_000, us % 1_000_000 / 100_000),
    }
}

/// Bytes with a binary unit, rounded down.
fn bytes(count: u64) -> String {
    match count {
        0..0x400 => format!("{count}B"),
        0x400..0x10_0000 => format!("{}K", count >> 10),
        0x10_0000..0x4000_0000 => format!("{}M", count >> 20),
        _ => format!("{}G", count >> 30),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use api::replication::{Percentiles, ReplicationState, Role};

    #[test]
    fn units_change_where_they_should() {
        assert_eq!(duration(999), "999us");
        assert_eq!(duration(1_000), "1.0ms");
        assert_eq!(duration(999_999), "999.9ms");
        assert_eq!(duration(1_000_000), "1.0s");
        assert_eq!(bytes(1023), "1023B");
        assert_eq!(bytes(1024), "1K");
        assert_eq!(bytes(1 << 20), "1M");
        assert_eq!(bytes(1 << 30), "1G");
    }

    #[test]
    fn a_line_says_where_the_pair_stands() {
        let info = ReplicationInfo {
            role: Role::Primary,
            state: ReplicationState::Protected,
            generation: 3,
            epoch_sealed: 11,
            epoch_committed: 10,
            pause_us: Percentiles { last: 1, p50: 180, p99: 1_250, max: 2_000 },
            commit_latency_us: Percentiles { last: 1, p50: 2_000, p99: 3_400, max: 9_000 },
            output_held_bytes: 4096,
            sync_progress: 1.0,
            ..ReplicationInfo::default()
        };
        assert_eq!(
            line(&info),
            "Primary Protected gen 3 epoch 10/11 pause 180us/1.2ms commit 2.0ms/3.4ms held 4K \
             sync 100%"
        );
    }
}
