//! Turns of a real pair: two VMM processes on this host.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use api::replication::{Cow, PauseSteps, ReplicationState};
use understudy_tests::interrupt::Folder;
use understudy_tests::pair::{Pair, Setup};

use crate::guest::Spec;
use crate::row::Step;
use crate::samples::{Samples, float};

const LIMIT: Duration = Duration::from_secs(300);
/// More often than an epoch ends, so that each one's pause is read.
const LOOK: Duration = Duration::from_millis(20);
/// Epochs of a turn before the first that counts.
const WARM_UP: u64 = 3;

/// A pair whose guest runs during its turns, and what they brought: a figure for each epoch.
pub struct Protected {
    pair: Pair,
    _folder: Folder,
    /// Microseconds that the guest stood still, as `replication-info` says.
    pub pause: Samples,
    pub pages: Samples,
    /// From the seal to the acknowledgement.
    pub commit: Samples,
    /// Epochs that were over before anybody looked.
    pub unseen: u64,
    /// Of each step, what `replication-info` says of the last epochs.
    steps: [Samples; STEPS.len()],
}

/// Steps of a pause, as `pause_steps_us` has them.
const STEPS: [&str; 5] = ["stop", "harvest", "keep", CAPTURE, "release"];
/// The rest of the vCPUs' saves, which begin as the guest has stopped, and the VM with its devices.
pub const CAPTURE: &str = "capture";

impl Protected {
    /// Starts a pair and waits until it is protected; its guest stands until the first turn.
    /// Without a `cow`: as it is delivered.
    pub fn start(spec: &Spec, cow: Option<Cow>) -> Result<Self> {
        let mut setup = spec.setup();
        if let Some(cow) = cow {
            setup.replicate_options.push_str(&format!(",cow={}", name(cow)));
        }
        Self::start_as(spec, &setup)
    }

    /// The same with a setup that was made for the guest.
    pub fn start_as(spec: &Spec, setup: &Setup) -> Result<Self> {
        let folder = Folder::new()?;
        let mut pair = Pair::start(folder.path(), setup)?;
        spec.wait_filled(&pair.primary_serial)?;
        let protected = pair.wait_protected(LIMIT);
        protected.with_context(|| format!("The backup says:\n{}", pair.backup.log()))?;
        pair.primary.put_ok("vm.pause", None)?;
        Ok(Self {
            pair,
            _folder: folder,
            pause: Samples::default(),
            pages: Samples::default(),
            commit: Samples::default(),
            unseen: 0,
            steps: Default::default(),
        })
    }

    /// One turn of `epochs` epochs, as far as `limit` lasts.
    pub fn turn(&mut self, epochs: u32, limit: Duration) -> Result<()> {
        let primary = &self.pair.primary;
        let start = primary.replication()?.epoch_sealed;
        primary.put_ok("vm.resume", None)?;
        let (mut seen, mut pauses, mut pages, mut commits) = (start, vec![], vec![], vec![]);
        let began = Instant::now();
        while pauses.len() < usize::try_from(epochs)? && began.elapsed() < limit {
            std::thread::sleep(LOOK);
            let info = primary.replication()?;
            ensure!(
                info.state == ReplicationState::Protected,
                "it is no longer protected: {info:?}"
            );
            if info.epoch_sealed == seen || info.epoch_sealed < start + WARM_UP {
                continue;
            }
            if !pauses.is_empty() {
                self.unseen += info.epoch_sealed - seen - 1;
            }
            seen = info.epoch_sealed;
            pauses.push(float(info.pause_us.last));
            pages.push(float(info.dirty_pages.last));
            commits.push(float(info.commit_latency_us.last));
        }
        let PauseSteps { stop, harvest, keep, capture, release } =
            primary.replication()?.pause_steps_us;
        for (step, us) in self.steps.iter_mut().zip([stop, harvest, keep, capture, release]) {
            step.add(vec![float(us)]);
        }
        primary.put_ok("vm.pause", None)?;
        self.pause.add(pauses);
        self.pages.add(pages);
        self.commit.add(commits);
        Ok(())
    }
}

impl Protected {
    /// Medians of a pause's steps.
    #[must_use]
    pub fn profile(&self) -> Vec<Step> {
        let medians = STEPS.iter().zip(&self.steps);
        medians.filter_map(|(name, step)| Some(Step { name, us: step.median()? })).collect()
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
