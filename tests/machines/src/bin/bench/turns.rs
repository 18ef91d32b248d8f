//! Turns of a real pair: two VMM processes, TCP over the loopback.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use api::replication::Cow;
use understudy_tests::interrupt::Folder;
use understudy_tests::pair::Pair;

use crate::guest::Spec;
use crate::samples::{Samples, float};

const LIMIT: Duration = Duration::from_secs(120);
/// More often than an epoch ends, so that each one's pause is read.
const LOOK: Duration = Duration::from_millis(20);
/// Epochs before the first that counts: buffers that are used for the first time.
const WARM_UP: u64 = 10;

/// What turns of a pair brought, one figure for each epoch.
#[derive(Default)]
pub struct Pauses {
    pub pause: Samples,
    pub pages: Samples,
    /// Epochs that were over before anybody looked.
    pub unseen: u64,
}

impl Pauses {
    /// One turn of a pair that is started for it. Without a `cow`: as it is delivered.
    pub fn turn(&mut self, spec: &Spec, cow: Option<Cow>, epochs: u32) -> Result<()> {
        let folder = Folder::new()?;
        let mut setup = spec.setup();
        if let Some(cow) = cow {
            setup.replicate_options.push_str(&format!(",cow={}", name(cow)));
        }
        let mut pair = Pair::start(folder.path(), &setup)?;
        spec.wait_filled(&pair.primary_serial)?;
        let protected = pair.wait_protected(LIMIT);
        let start = protected.with_context(|| format!("The backup says:\n{}", pair.backup.log()))?;
        let (mut seen, mut pauses, mut pages) = (start.epoch_sealed, vec![], vec![]);
        let began = Instant::now();
        while pauses.len() < usize::try_from(epochs)? {
            ensure!(began.elapsed() < LIMIT, "only {} epochs in {LIMIT:?}", pauses.len());
            std::thread::sleep(LOOK);
            let info = pair.primary.replication()?;
            if info.epoch_sealed == seen || info.epoch_sealed < start.epoch_sealed + WARM_UP {
                continue;
            }
            if !pauses.is_empty() {
                self.unseen += info.epoch_sealed - seen - 1;
            }
            seen = info.epoch_sealed;
            pauses.push(float(info.pause_us.last));
            pages.push(float(info.dirty_pages.last));
        }
        self.pause.add(pauses);
        self.pages.add(pages);
        Ok(())
    }
}

/// As `cow=` takes it.
#[must_use]
pub fn name(cow: Cow) -> &'static str {
    match cow {
        Cow::Hybrid => "hybrid",
        Cow::Protect => "protect",
        Cow::Copy => "copy",
        Cow::Off => "off",
    }
}

/// Whether this build takes options of `--replicate`.
#[must_use]
pub fn is_built(options: &str) -> bool {
    let data = format!("destination_url=tcp:127.0.0.1:1{options}");
    let data = data.parse::<api::replication::ReplicateData>();
    data.is_ok_and(|data| data.validate().is_empty())
}
