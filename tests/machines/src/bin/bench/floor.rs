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
use replication::ram::{PageBuffer, PageSet, Ram};
use serde_json::json;
use understudy_tests::interrupt::Folder;
use understudy_tests::serial::Serial;
use userfault::Userfault;
use vm_memory::Bytes;
use vmm::device_manager::taps::TapDescriptors;
use vmm::machine::Machine;

use crate::guest::Spec;
use crate::row::Step;
use crate::samples::{Samples, float};
use crate::turns::CAPTURE;

const LIMIT: Duration = Duration::from_secs(120);
/// Pauses before the first that counts.
const WARM_UP: u32 = 3;

/// The state is captured first here, with nothing beside it: what it takes by itself.
const STEPS: [&str; 5] = ["stop", CAPTURE, "harvest", "keep pages", "release"];

/// A machine that runs during its turns, and what they brought.
pub struct Floor {
    bare: Bare,
    keeper: Keeper,
    epoch: Duration,
    /// Microseconds from the kick to the release, with pages copied, and with them protected.
    copying: Samples,
    protecting: Samples,
    pub pages: Samples,
    steps: [Samples; STEPS.len()],
}

impl Floor {
    /// Builds the machine; it stands until its first turn.
    pub fn start(spec: &Spec) -> Result<Self> {
        let bare = Bare::start(Folder::new()?, spec)?;
        bare.machine.pause()?;
        Ok(Self {
            keeper: Keeper::new(bare.machine.memory().ram(), spec.set)?,
            bare,
            epoch: Duration::from_millis(spec.epoch_ms),
            copying: Samples::default(),
            protecting: Samples::default(),
            pages: Samples::default(),
            steps: Default::default(),
        })
    }

    /// The pauses of the cheaper way to keep pages.
    #[must_use]
    pub fn pause(&self) -> &Samples {
        match (self.copying.median(), self.protecting.median()) {
            (Some(copying), Some(protecting)) if protecting < copying => &self.protecting,
            _ => &self.copying,
        }
    }

    /// One turn of `pauses` pauses each way, and as many that are taken apart, as far as `limit`
    /// lasts.
    pub fn turn(&mut self, pauses: u32, limit: Duration) -> Result<()> {
        self.bare.machine.resume()?;
        for _ in 0..WARM_UP {
            std::thread::sleep(self.epoch);
            self.bare.pause(&mut self.keeper, false)?;
        }
        let (mut ways, mut pages, mut steps) =
            ([vec![], vec![]], vec![], vec![vec![]; STEPS.len()]);
        let start = Instant::now();
        // Every third pause is taken apart: nothing overlaps in it.
        for number in 0..3 * pauses {
            if start.elapsed() > limit {
                break;
            }
            std::thread::sleep(self.epoch);
            if number % 3 < 2 {
                let protects = number % 3 == 1;
                let Some(took) = self.bare.pause(&mut self.keeper, protects)? else { continue };
                ways[usize::from(protects)].push(micros(took));
                pages.push(float(self.keeper.dirty.len()));
            } else {
                let Some(times) = self.bare.pause_in_steps(&mut self.keeper)? else { continue };
                steps.iter_mut().zip(times).for_each(|(step, time)| step.push(micros(time)));
            }
        }
        self.bare.machine.pause()?;
        let [copying, protecting] = ways;
        self.copying.add(copying);
        self.protecting.add(protecting);
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
    kept: PageBuffer,
    room: usize,
    ram: Ram,
    userfault: Userfault,
    /// Runs that are protected, as first page and count.
    protected: Vec<(u64, u64)>,
}

impl Keeper {
    fn has_room(&self) -> bool {
        usize::try_from(self.dirty.len()).is_ok_and(|pages| pages <= self.room)
    }

    fn new(ram: &Ram, set: u64) -> Result<Self> {
        // Beside its set, the guest writes stacks and counters.
        let room = usize::try_from(2 * set + set / 4 + 2048).unwrap_or(0);
        Ok(Self {
            dirty: PageSet::new(ram.pages()),
            kept: PageBuffer::touched(room),
            room,
            ram: ram.clone(),
            userfault: Userfault::new(Arc::clone(ram.mapping()))?,
            protected: Vec::with_capacity(room),
        })
    }

    /// Keeps the dirty pages as they are now, by protecting each run with one call.
    fn protect(&mut self) -> Result<()> {
        self.protected.clear();
        for page in self.dirty.iter() {
            match self.protected.last_mut() {
                Some((first, count)) if *first + *count == page.0 => *count += 1,
                _ => self.protected.push((page.0, 1)),
            }
        }
        for (first, count) in &self.protected {
            self.userfault.protect(*first, *count)?;
        }
        Ok(())
    }

    /// The guest goes on: nobody waits for long.
    fn unprotect(&mut self) -> Result<()> {
        for (first, count) in self.protected.drain(..) {
            self.userfault.unprotect(first, count)?;
        }
        Ok(())
    }

    /// Keeps the dirty pages as they are now, by copying them.
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
            ensure!(end <= self.room, "{} pages are to be kept", self.dirty.len());
            self.ram.mapping().read_slice(self.kept.pages_mut(at, end - at), start)?;
            at = end;
        }
        Ok(())
    }
}

/// Boots the test guest in this process.
pub fn boot(
    folder: &Folder,
    command_line: &str,
    vcpus: u32,
    memory_bytes: u64,
) -> Result<(Machine, Serial)> {
    let socket = folder.path().join("floor.serial");
    let config = json!({
        "payload": {"kernel": guest_image::PATH, "cmdline": command_line},
        "cpus": {"boot_vcpus": vcpus, "max_vcpus": vcpus},
        "memory": {"size": memory_bytes},
        "serial": {"mode": "Socket", "socket": socket},
        "console": {"mode": "Off"},
    });
    let hypervisor = Arc::new(Hypervisor::open()?);
    let config = serde_json::from_value(config)?;
    let machine = Machine::build(&hypervisor, config, TapDescriptors::default())?;
    machine.boot()?;
    Ok((machine, Serial::connect(&socket, LIMIT)?))
}

/// A machine that nobody protects.
struct Bare {
    machine: Machine,
    _serial: Serial,
    _folder: Folder,
}

impl Bare {
    fn start(folder: Folder, spec: &Spec) -> Result<Self> {
        let command_line = spec.command_line();
        let (machine, serial) = boot(&folder, &command_line, spec.vcpus, spec.memory_bytes())?;
        spec.wait_filled(&serial)?;
        machine.set_tracking(true)?;
        // At first all pages count as dirty: a first sync would have sent them.
        machine.harvest(&mut PageSet::new(machine.memory().ram().pages()))?;
        Ok(Self { machine, _serial: serial, _folder: folder })
    }

    /// Stops the guest as the engine does. `None`: it had written more than there is room for, as it does
    /// where it makes up for a time in which it stood, or was not waited for in time.
    fn pause(&self, keeper: &mut Keeper, protects: bool) -> Result<Option<Duration>> {
        keeper.dirty.clear();
        let start = Instant::now();
        self.machine.quiesce()?;
        self.machine.harvest(&mut keeper.dirty)?;
        if !keeper.has_room() {
            self.machine.release()?;
            return Ok(None);
        }
        if protects {
            keeper.protect()?;
        } else {
            keeper.keep()?;
        }
        let state = self.machine.capture()?;
        self.machine.release()?;
        let took = start.elapsed();
        keeper.unprotect()?;
        drop(state);
        Ok(Some(took))
    }

    /// The same with one step after the other: the vCPUs are saved before anything else begins.
    fn pause_in_steps(&self, keeper: &mut Keeper) -> Result<Option<[Duration; STEPS.len()]>> {
        keeper.dirty.clear();
        let mut last = Instant::now();
        let mut lap = || std::mem::replace(&mut last, Instant::now()).elapsed();
        self.machine.quiesce()?;
        let stop = lap();
        let state = self.machine.capture()?;
        let capture = lap();
        self.machine.harvest(&mut keeper.dirty)?;
        let harvest = lap();
        if !keeper.has_room() {
            self.machine.release()?;
            return Ok(None);
        }
        keeper.keep()?;
        let keep = lap();
        self.machine.release()?;
        let release = lap();
        drop(state);
        Ok(Some([stop, capture, harvest, keep, release]))
    }
}
