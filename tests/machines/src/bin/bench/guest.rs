//! The guest of a row: how large it is and what it writes.

use std::time::Duration;

use anyhow::Result;
use understudy_tests::pair::Setup;
use understudy_tests::serial::Serial;

const LIMIT: Duration = Duration::from_secs(120);

/// A guest that rewrites a set of pages in each epoch.
#[derive(Clone, Debug)]
pub struct Spec {
    pub vcpus: u32,
    pub memory_mib: u64,
    /// Pages of the set, and how many of them are adjacent.
    pub set: u64,
    pub run: u64,
    /// Sets of which each round has the next one: a page is not written again for as many rounds.
    pub sets: u64,
    /// Long enough for the guest to write all of its set: a page's first write in an epoch is a
    /// fault, which costs microseconds where KVM is a software one.
    pub epoch_ms: u64,
}

impl Spec {
    #[must_use]
    pub fn command_line(&self) -> String {
        format!(
            "workload=dirty vcpus={} tick_ms=250 dirty_set={} dirty_sets={} dirty_run={} dirty_fill=set \
             dirty_period_ms={}",
            self.vcpus,
            self.set,
            self.sets,
            self.run,
            self.period_ms()
        )
    }

    /// One set: shorter than an epoch, so that each epoch has a write to each of its pages, wherever
    /// in the period it begins. Several: as long, so that each epoch has as many pages as one.
    fn period_ms(&self) -> u64 {
        if self.sets > 1 { self.epoch_ms } else { (self.epoch_ms * 4 / 5).max(1) }
    }

    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.memory_mib << 20
    }

    /// A pair with this guest, whose output does not wait: no epoch is sealed early for it, and none late
    /// because of that.
    #[must_use]
    pub fn setup(&self) -> Setup {
        let mut setup = Setup::verify(self.vcpus, &format!("{}M", self.memory_mib));
        setup.command_line = self.command_line();
        let epoch_ms = self.epoch_ms;
        setup.replicate_options =
            format!(",console_output=pass,epoch_ms={epoch_ms},epoch_max_ms={epoch_ms}");
        setup
    }

    /// Waits until each page of the set has its first content.
    pub fn wait_filled(&self, serial: &Serial) -> Result<()> {
        wait_filled(serial, LIMIT)
    }
}

/// Waits until each page of the set, or of the working area, has its first content.
pub fn wait_filled(serial: &Serial, limit: Duration) -> Result<()> {
    serial.wait_line("'dirty filled'", 0, limit, is_filled)?;
    Ok(())
}

/// The guest says it once; what it said before anybody was connected to its port is lost, so its
/// first rounds say the same.
fn is_filled(line: &str) -> bool {
    let total = || line.strip_prefix("dirty pages=")?.split_once(" total=");
    let is_round = total().is_some_and(|(_, total)| !total.starts_with("0 "));
    line.starts_with("dirty filled") || is_round
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_says_that_the_set_was_filled() {
        assert!(is_filled("dirty filled pages=300"));
        assert!(is_filled("dirty pages=856 per_s=2956 total=447256 tick=478"));
        assert!(!is_filled("dirty pages=0 per_s=0 total=0 tick=1"));
        assert!(!is_filled("dirty ready"));
    }
}
