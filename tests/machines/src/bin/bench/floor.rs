//! The least that a pause can take on this machine: a machine of our own VMM in this process, with
//! no engine, no peer and nothing to send.
//!
//! ```text
//! run an epoch ── kick ── save ── harvest ── keep ── capture ── release ── run an epoch ...
//! ```
//!
//! Enters: the guest that a row's pair runs, too. Leaves: how long it stood still, and for what.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hypervisor::Hypervisor;
use replication::ids::{PAGE_SIZE, PageIndex};
use replication::ram::{PageSet, Ram};
use serde_json::json;
use understudy_tests::interrupt::Folder;
use understudy_tests::serial::Serial;
use vm_memory::Bytes;
use vmm::device_manager::taps::TapDescriptors;
use vmm::machine::Machine;

use crate::guest::Spec;
use crate::row::Step;
use crate::samples::{Samples, float};

const LIMIT: Duration = Duration::from_secs(120);
/// Pauses before the first that counts.
const WARM_UP: u32 = 3;

const STEPS: [&str; 6] = ["kick", "save vCPUs", "harvest", "keep pages", "capture VM", "release"];

/// A machine that runs during its turns, and what they brought.
pub struct Floor {
    bare: Bare,
    keeper: Keeper,
    epoch: Duration,
    /// Microseconds from the kick to the release.
    pub pause: Samples,
    pub pages: Samples,
    steps: [Samples; STEPS.len()],
}

impl Floor {
    /// Builds the machine; it stands until its first turn.
    pub fn start(spec: &Spec) -> Result<Self> {
        let bare = Bare::start(Folder::new()?, spec)?;
        bare.machine.pause()?;
        Ok(Self {
            keeper: Keeper::new(bare.machine.memory().ram(), spec.set),
            bare,
            epoch: Duration::from_millis(spec.epoch_ms),
            pause: Samples::default(),
            pages: Samples::default(),
            steps: Default::default(),
        })
    }

    /// One turn of `pauses` pauses, and as many that are taken apart, as far as `limit` lasts.
    pub fn turn(&mut self, pauses: u32, limit: Duration) -> Result<()> {
        self.bare.machine.resume()?;
        for _ in 0..WARM_UP {
            std::thread::sleep(self.epoch);
            self.bare.pause(&mut self.keeper)?;
        }
        let (mut whole, mut pages, mut steps) = (vec![], vec![], vec![vec![]; STEPS.len()]);
        let start = Instant::now();
        // Every other pause is taken apart, which costs it a second round of wake-ups.
        for number in 0..2 * pauses {
            if start.elapsed() > limit {
                break;
            }
            std::thread::sleep(self.epoch);
            if number % 2 == 0 {
                whole.push(micros(self.bare.pause(&mut self.keeper)?));
                pages.push(float(self.keeper.dirty.len()));
            } else {
                let times = self.bare.pause_in_steps(&mut self.keeper)?;
                steps.iter_mut().zip(times).for_each(|(step, time)| step.push(micros(time)));
            }
        }
        self.bare.machine.pause()?;
        self.pause.add(whole);
        self.pages.add(pages);
        self.steps.iter_mut().zip(steps).for_each(|(step, times)| step.add(times));
        Ok(())
    }

    /// Medians of a pause's steps.
    #[must_use]
    pub fn profile(&self) -> Vec<Step> {
        let medians = STEPS.iter().zip(&self.steps);
        medians.filter_map(|(name, step)| Some(Step { name, us: step.median()? })).collect()
    }
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// Room for the pages of a pause, made and touched beforehand.
struct Keeper {
    dirty: PageSet,
    kept: Vec<[u8; PAGE_SIZE]>,
    ram: Ram,
}

impl Keeper {
    fn new(ram: &Ram, set: u64) -> Self {
        // Beside its set, the guest writes stacks and counters.
        let room = usize::try_from(set + set / 4 + 2048).unwrap_or(0);
        Self {
            dirty: PageSet::new(ram.pages()),
            kept: vec![[1; PAGE_SIZE]; room],
            ram: ram.clone(),
        }
    }

    /// Keeps the dirty pages as they are now: by the cheaper of copying and protecting, once this
    /// build can protect.
    fn keep(&mut self) -> Result<()> {
        let mut at = 0;
        let mut pages = self.dirty.iter().peekable();
        while let Some(first) = pages.next() {
            let start = self.ram.address(first).context("a page outside of memory")?;
            let mut run = 1;
            while let Some(next) = pages.peek().copied()
                && next == PageIndex(first.0 + run)
                && self.ram.address(next).map(|at| at.0) == Some(start.0 + run * PAGE_SIZE as u64)
            {
                run += 1;
                pages.next();
            }
            let end = at + usize::try_from(run)?;
            ensure!(end <= self.kept.len(), "{} pages are dirty", self.dirty.len());
            self.ram.mapping().read_slice(self.kept[at..end].as_flattened_mut(), start)?;
            at = end;
        }
        Ok(())
    }
}

/// A machine that nobody protects.
struct Bare {
    machine: Machine,
    _serial: Serial,
    _folder: Folder,
}

impl Bare {
    fn start(folder: Folder, spec: &Spec) -> Result<Self> {
        let socket = folder.path().join("floor.serial");
        let config = json!({
            "payload": {"kernel": guest_image::PATH, "cmdline": spec.command_line()},
            "cpus": {"boot_vcpus": spec.vcpus, "max_vcpus": spec.vcpus},
            "memory": {"size": spec.memory_bytes()},
            "serial": {"mode": "Socket", "socket": socket},
            "console": {"mode": "Off"},
        });
        let hypervisor = Arc::new(Hypervisor::open()?);
        let config = serde_json::from_value(config)?;
        let machine = Machine::build(&hypervisor, config, TapDescriptors::default())?;
        machine.boot()?;
        let serial = Serial::connect(&socket, LIMIT)?;
        spec.wait_filled(&serial)?;
        machine.set_tracking(true)?;
        // At first all pages count as dirty: a first sync would have sent them.
        machine.harvest(&mut PageSet::new(machine.memory().ram().pages()))?;
        Ok(Self { machine, _serial: serial, _folder: folder })
    }

    /// Stops the guest as the engine does.
    fn pause(&self, keeper: &mut Keeper) -> Result<Duration> {
        keeper.dirty.clear();
        let start = Instant::now();
        self.machine.quiesce()?;
        self.machine.harvest(&mut keeper.dirty)?;
        keeper.keep()?;
        let state = self.machine.capture()?;
        self.machine.release()?;
        let took = start.elapsed();
        drop(state);
        Ok(took)
    }

    /// The same with kicking and saving one after the other.
    fn pause_in_steps(&self, keeper: &mut Keeper) -> Result<[Duration; STEPS.len()]> {
        keeper.dirty.clear();
        let mut last = Instant::now();
        let mut lap = || std::mem::replace(&mut last, Instant::now()).elapsed();
        self.machine.pause()?;
        let kick = lap();
        self.machine.quiesce()?;
        let save = lap();
        self.machine.harvest(&mut keeper.dirty)?;
        let harvest = lap();
        keeper.keep()?;
        let keep = lap();
        let state = self.machine.capture()?;
        let capture = lap();
        // While it is quiesced this only takes the person's pause away, and tells nobody.
        self.machine.resume()?;
        self.machine.release()?;
        let release = lap();
        drop(state);
        Ok([kick, save, harvest, keep, capture, release])
    }
}
