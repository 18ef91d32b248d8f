//! The guest of a row: how large it is and what it writes.

use std::time::Duration;

use anyhow::Result;
use understudy_tests::pair::Setup;
use understudy_tests::serial::Serial;

const LIMIT: Duration = Duration::from_secs(120);
/// Each page of the set is written at least twice in an epoch, so that each epoch has all of it.
const PERIOD_MS: u64 = 10;

/// A guest that rewrites a set of pages in each epoch.
#[derive(Clone, Debug)]
pub struct Spec {
    pub vcpus: u32,
    pub memory_mib: u64,
    /// Pages of the set, and how many of them are adjacent.
    pub set: u64,
    pub run: u64,
}

impl Spec {
    #[must_use]
    pub fn command_line(&self) -> String {
        format!(
            "workload=dirty vcpus={} tick_ms=250 dirty_set={} dirty_run={} dirty_fill=set \
             dirty_period_ms={PERIOD_MS}",
            self.vcpus, self.set, self.run
        )
    }

    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.memory_mib << 20
    }

    /// A pair with this guest, whose output does not wait: no epoch is sealed early for it.
    #[must_use]
    pub fn setup(&self) -> Setup {
        let mut setup = Setup::verify(self.vcpus, &format!("{}M", self.memory_mib));
        setup.command_line = self.command_line();
        setup.replicate_options = ",console_output=pass".into();
        setup
    }

    /// Waits until each page of the set has its first content.
    pub fn wait_filled(&self, serial: &Serial) -> Result<()> {
        serial.wait_line("'dirty filled'", 0, LIMIT, |line| line.starts_with("dirty filled"))?;
        Ok(())
    }
}
