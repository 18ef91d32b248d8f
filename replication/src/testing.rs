//! A guest of plain memory: no KVM, real threads, real sockets. For tests and benches, of other
//! crates too (feature `testing`).
//!
//! A [`Machine`] is memory, a gate through which every guest step goes, and an output port. Its
//! machine state is a checksum of its memory at the capture, so a replica can tell at every epoch
//! whether its image is the primary's at that seal, byte by byte.

mod disks;
mod stream;
mod tape;

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use api::replication::ReplicateData;
use vm_memory::{Bytes, GuestAddress};

pub use disks::{MemoryDisks, MemoryImage, Request};
pub use stream::{Lent, Placed, Plain};
pub use tape::Tape;

use crate::disk::{Disks, ReplicaDisk};
use crate::guest::{Guest, GuestError, MachineState, Replica, ReplicaBuilder, Waker};
use crate::ids::{EpochId, PAGE_SIZE, PageIndex};
use crate::observer::{Event, Observer};
use crate::ram::{Mapping, PageSet, Ram};

/// Most guest threads; each has a counter at its place in the first page.
pub const WORKERS_MAX: usize = 64;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Memory of `layout`: start address and number of pages of each region.
///
/// # Panics
/// If the layout is impossible or the host has no memory.
#[must_use]
pub fn memory(layout: &[(u64, u64)]) -> Ram {
    let size = |pages: u64| usize::try_from(pages).expect("fits the host") * PAGE_SIZE;
    let ranges: Vec<_> =
        layout.iter().map(|(start, pages)| (GuestAddress(*start), size(*pages))).collect();
    Ram::new(Arc::new(Mapping::from_ranges(&ranges).expect("test memory")))
}

/// A checksum over all of memory.
///
/// # Panics
/// Never: every page of a `Ram` can be read.
#[must_use]
pub fn checksum(ram: &Ram) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    let mut page = [0; PAGE_SIZE];
    for index in 0..ram.pages() {
        assert!(ram.read_page(PageIndex(index), &mut page), "page {index} exists");
        hasher.update(&page);
    }
    hasher.finalize()
}

#[derive(Debug, Default)]
struct Gate {
    stopped: bool,
    suspended: bool,
    destroyed: bool,
    inside: usize,
}

#[derive(Debug, Default)]
struct Port {
    holding: bool,
    held: VecDeque<(Option<EpochId>, usize, u64)>,
    released: Vec<u64>,
    /// Everything that left, in order.
    count: u64,
}

impl Port {
    fn leave(&mut self, worker: usize, value: u64) {
        self.released.resize(WORKERS_MAX, 0);
        self.released[worker] = self.released[worker].max(value);
        self.count += 1;
    }
}

/// Called by a [`Machine`].
pub type Hook = Box<dyn Fn() + Send>;

/// The guest of a test.
pub struct Machine {
    ram: Ram,
    gate: Mutex<Gate>,
    changed: Condvar,
    port: Mutex<Port>,
    waker: Mutex<Option<Waker>>,
    all_dirty: AtomicBool,
    tracking: AtomicBool,
    before_pass: Mutex<Option<Hook>>,
    before_destroy: Mutex<Option<Hook>>,
    uncapturable: AtomicBool,
    forgotten: Mutex<Option<PageIndex>>,
    disks: Option<Arc<MemoryDisks>>,
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine").field("gate", &self.gate).finish_non_exhaustive()
    }
}

impl Machine {
    /// A machine with `ram`.
    #[must_use]
    pub fn new(ram: Ram) -> Arc<Self> {
        Self::with_disks(ram, None)
    }

    /// A machine with `ram` and disks.
    #[must_use]
    pub fn with_disks(ram: Ram, disks: Option<Arc<MemoryDisks>>) -> Arc<Self> {
        Arc::new(Self {
            disks,
            ram,
            gate: Mutex::default(),
            changed: Condvar::new(),
            port: Mutex::default(),
            waker: Mutex::default(),
            all_dirty: AtomicBool::new(false),
            tracking: AtomicBool::new(false),
            before_pass: Mutex::default(),
            before_destroy: Mutex::default(),
            uncapturable: AtomicBool::new(false),
            forgotten: Mutex::default(),
        })
    }

    /// The machine that a replica has become: what [`ReplicaLog`] says of it holds.
    #[must_use]
    pub fn going_on(ram: Ram, log: &ReplicaLog) -> Arc<Self> {
        let machine = Self::new(ram);
        machine.tracking.store(log.tracked.load(Ordering::Acquire), Ordering::Release);
        lock(&machine.port).holding = log.held.load(Ordering::Acquire);
        machine
    }

    /// Calls `hook` before all output passes.
    pub fn before_pass(&self, hook: Hook) {
        *lock(&self.before_pass) = Some(hook);
    }

    /// Calls `hook` before the guest ends.
    pub fn before_destroy(&self, hook: Hook) {
        *lock(&self.before_destroy) = Some(hook);
    }

    /// No machine state can be had from here on.
    pub fn refuse_captures(&self) {
        self.uncapturable.store(true, Ordering::Release);
    }

    /// Leaves a page out of all harvests: what replication takes on trust is broken.
    pub fn forget(&self, page: PageIndex) {
        *lock(&self.forgotten) = Some(page);
    }

    /// Its memory.
    #[must_use]
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// One step of a guest thread; waits while the guest stands still. `None`: destroyed.
    pub fn run<T>(&self, step: impl FnOnce(&Ram) -> T) -> Option<T> {
        let mut gate = lock(&self.gate);
        while (gate.stopped || gate.suspended) && !gate.destroyed {
            gate = self.changed.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        if gate.destroyed {
            return None;
        }
        gate.inside += 1;
        drop(gate);
        let result = step(&self.ram);
        lock(&self.gate).inside -= 1;
        self.changed.notify_all();
        Some(result)
    }

    /// A step that raises the worker's counter in memory, writes `page`, and tells the world.
    /// `None`: destroyed.
    ///
    /// # Panics
    /// If the page does not exist.
    pub fn work(&self, worker: usize, page: PageIndex, fill: u64) -> Option<u64> {
        self.run(|ram| {
            let at = GuestAddress(ram.regions()[0].start.0 + worker as u64 * 8);
            let value: u64 = ram.mapping().read_obj(at).expect("counter");
            let value = value + 1;
            ram.mapping().write_obj(value, at).expect("counter");
            if page.0 != 0 {
                let at = ram.address(page).expect("page exists");
                let offset = (fill % 512) * 8;
                ram.mapping().write_obj(fill, GuestAddress(at.0 + offset)).expect("page");
            }
            self.send(worker, value);
            value
        })
    }

    fn send(&self, worker: usize, value: u64) {
        let mut port = lock(&self.port);
        if !port.holding {
            port.leave(worker, value);
            return;
        }
        port.held.push_back((None, worker, value));
        drop(port);
        if let Some(waker) = &*lock(&self.waker) {
            waker.wake();
        }
    }

    /// The highest counter that each worker told the world.
    #[must_use]
    pub fn released(&self) -> Vec<u64> {
        lock(&self.port).released.clone()
    }

    /// How often something left.
    #[must_use]
    pub fn released_count(&self) -> u64 {
        lock(&self.port).count
    }

    #[must_use]
    pub fn is_holding(&self) -> bool {
        lock(&self.port).holding
    }

    #[must_use]
    pub fn is_destroyed(&self) -> bool {
        lock(&self.gate).destroyed
    }

    #[must_use]
    pub fn is_suspended(&self) -> bool {
        lock(&self.gate).suspended
    }

    #[must_use]
    pub fn is_tracking(&self) -> bool {
        self.tracking.load(Ordering::Acquire)
    }

    /// Whether guest threads may run at this moment.
    #[must_use]
    pub fn is_running(&self) -> bool {
        let gate = lock(&self.gate);
        !gate.stopped && !gate.suspended && !gate.destroyed
    }

    /// Ends the guest threads of a test.
    pub fn power_off(&self) {
        lock(&self.gate).destroyed = true;
        self.changed.notify_all();
    }
}

/// Each worker's counter as memory has it.
///
/// # Panics
/// Never: the first page exists.
#[must_use]
pub fn counters(ram: &Ram) -> Vec<u64> {
    let start = ram.regions()[0].start.0;
    let read = |worker: usize| {
        ram.mapping().read_obj(GuestAddress(start + worker as u64 * 8)).expect("counter")
    };
    (0..WORKERS_MAX).map(read).collect()
}

/// The machine state: a checksum of memory at the capture, and what is to be said of the disks.
#[derive(Clone, Debug)]
pub struct Checksum(u32, Vec<u8>);

impl MachineState for Checksum {
    fn encode(&self, out: &mut Vec<u8>) -> Result<(), GuestError> {
        out.extend(b"sum:");
        out.extend(self.0.to_le_bytes());
        out.extend(&self.1);
        Ok(())
    }
}

/// What a VMM would be: drives a [`Machine`].
#[derive(Debug)]
pub struct MemoryGuest(pub Arc<Machine>);

impl Guest for MemoryGuest {
    type State = Checksum;

    fn ram(&self) -> Ram {
        self.0.ram.clone()
    }

    fn disks(&self) -> Option<Arc<dyn Disks>> {
        self.0.disks.clone().map(|disks| disks as _)
    }

    fn describe(&mut self) -> Result<Vec<u8>, GuestError> {
        let regions = self.0.ram.regions().iter();
        Ok(regions
            .flat_map(|r| [r.start.0.to_le_bytes(), r.pages.to_le_bytes()].concat())
            .collect())
    }

    fn start_tracking(&mut self) -> Result<(), GuestError> {
        self.0.all_dirty.store(true, Ordering::Release);
        self.0.tracking.store(true, Ordering::Release);
        Ok(())
    }

    fn stop_tracking(&mut self) -> Result<(), GuestError> {
        self.0.tracking.store(false, Ordering::Release);
        Ok(())
    }

    fn quiesce(&mut self) -> Result<(), GuestError> {
        let mut gate = lock(&self.0.gate);
        gate.stopped = true;
        while gate.inside > 0 {
            gate = self.0.changed.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }

    fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), GuestError> {
        let all = self.0.all_dirty.swap(false, Ordering::AcqRel);
        let ram = &self.0.ram;
        match *lock(&self.0.forgotten) {
            None => ram.drain_written(dirty),
            Some(page) => {
                let mut written = PageSet::new(ram.pages());
                ram.drain_written(&mut written);
                written.iter().filter(|other| *other != page).for_each(|other| dirty.insert(other));
            }
        }
        if all {
            dirty.insert_range(PageIndex(0), ram.pages());
        }
        Ok(())
    }

    fn written_pages(&mut self) -> Result<Option<u64>, GuestError> {
        Ok(Some(self.0.ram.written()))
    }

    fn capture(&mut self) -> Result<Checksum, GuestError> {
        if self.0.uncapturable.load(Ordering::Acquire) {
            return Err("A vCPU cannot be read".into());
        }
        let disks = self.0.disks.as_ref().map(|disks| disks.state()).unwrap_or_default();
        Ok(Checksum(checksum(&self.0.ram), disks))
    }

    fn hold_output(&mut self) {
        lock(&self.0.port).holding = true;
    }

    fn seal_output(&mut self, epoch: EpochId) {
        for (tag, ..) in &mut lock(&self.0.port).held {
            tag.get_or_insert(epoch);
        }
    }

    fn release(&mut self) -> Result<(), GuestError> {
        lock(&self.0.gate).stopped = false;
        self.0.changed.notify_all();
        Ok(())
    }

    fn commit_output(&mut self, epoch: EpochId) {
        let mut port = lock(&self.0.port);
        while let Some((Some(tag), worker, value)) = port.held.front().copied()
            && tag <= epoch
        {
            port.held.pop_front();
            port.leave(worker, value);
        }
    }

    fn pass_output(&mut self) {
        if let Some(hook) = &*lock(&self.0.before_pass) {
            hook();
        }
        let mut port = lock(&self.0.port);
        port.holding = false;
        while let Some((_, worker, value)) = port.held.pop_front() {
            port.leave(worker, value);
        }
    }

    fn output_held_bytes(&self) -> u64 {
        lock(&self.0.port).held.len() as u64 * 16
    }

    fn output_waiting(&self) -> bool {
        lock(&self.0.port).held.back().is_some_and(|(tag, ..)| tag.is_none())
    }

    fn set_output_waker(&mut self, waker: Waker) {
        *lock(&self.0.waker) = Some(waker);
    }

    fn suspend(&mut self) -> Result<(), GuestError> {
        lock(&self.0.gate).suspended = true;
        Ok(())
    }

    fn regain(&mut self) -> Result<(), GuestError> {
        lock(&self.0.gate).suspended = false;
        self.0.changed.notify_all();
        Ok(())
    }

    fn destroy(&mut self) {
        if let Some(hook) = &*lock(&self.0.before_destroy) {
            hook();
        }
        lock(&self.0.port).held.clear();
        self.0.power_off();
    }
}

/// What became of the replicas of a builder.
#[derive(Debug, Default)]
pub struct ReplicaLog {
    /// Memory of the replica that runs now.
    pub started: Mutex<Option<Ram>>,
    /// What is wrong with what a replica saw; empty if nothing is.
    pub wrong: Mutex<Vec<String>>,
    /// Epochs at which the image was compared.
    pub compared: AtomicU64,
    /// Replicas that were built.
    pub built: AtomicU64,
    /// Replicas that were received again without being built.
    pub reused: AtomicU64,
    /// Replicas that exist.
    pub alive: AtomicU64,
    /// Held by a test, no machine state is parsed and no replica goes.
    pub busy: Mutex<()>,
    /// Held by a test, no replica starts.
    pub starting: Mutex<()>,
    /// Whether what was started notes what is written; whether its output is held.
    pub tracked: AtomicBool,
    pub held: AtomicBool,
    /// Set by a test, nothing can be started.
    pub doomed: AtomicBool,
    /// Set by a test, the host lacks what a replica would need to run.
    pub lacking: AtomicBool,
}

/// Builds replicas of [`MemoryGuest`]s.
#[derive(Default)]
pub struct MemoryBuilder {
    pub log: Arc<ReplicaLog>,
    /// Images of the disks that this host has.
    pub images: Vec<Arc<MemoryImage>>,
    /// Memory of a machine that was handed over, for the next replica.
    pub kept: Option<Ram>,
    /// Most pages that this host has.
    pub pages_max: Option<u64>,
    /// Refuse every machine state.
    pub refuse_states: bool,
    /// Do not compare between epochs, where a copy anew may be under way.
    pub lenient: bool,
}

impl ReplicaBuilder for MemoryBuilder {
    type Replica = MemoryReplica;

    fn build(&mut self, description: &[u8]) -> Result<MemoryReplica, GuestError> {
        let (numbers, rest) = description.as_chunks::<8>();
        if !rest.is_empty() || numbers.is_empty() || numbers.len() % 2 != 0 {
            return Err("The description is no layout".into());
        }
        let numbers: Vec<u64> = numbers.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect();
        let layout: Vec<(u64, u64)> = numbers.chunks(2).map(|pair| (pair[0], pair[1])).collect();
        let pages: u64 = layout.iter().map(|(_, pages)| pages).sum();
        if self.pages_max.is_some_and(|most| pages > most) {
            return Err(format!("This host has no memory for {pages} pages").into());
        }
        self.log.built.fetch_add(1, Ordering::AcqRel);
        if self.log.alive.fetch_add(1, Ordering::AcqRel) > 0 {
            lock(&self.log.wrong).push("a replica was built beside another".to_owned());
        }
        let log = Arc::clone(&self.log);
        let (refuse, lenient) = (self.refuse_states, self.lenient);
        let images = self.images.clone();
        let ram = self.kept.take().unwrap_or_else(|| memory(&layout));
        Ok(MemoryReplica { ram, images, last: None, refuse, lenient, log })
    }

    fn reuse(&mut self, replica: &mut MemoryReplica) {
        // A copy goes over what it had.
        replica.last = None;
        self.log.reused.fetch_add(1, Ordering::AcqRel);
    }
}

/// A replica that compares its image with the primary's at every epoch.
pub struct MemoryReplica {
    ram: Ram,
    images: Vec<Arc<MemoryImage>>,
    last: Option<u32>,
    refuse: bool,
    lenient: bool,
    log: Arc<ReplicaLog>,
}

impl Drop for MemoryReplica {
    fn drop(&mut self) {
        drop(lock(&self.log.busy));
        self.log.alive.fetch_sub(1, Ordering::AcqRel);
    }
}

impl MemoryReplica {
    fn compare(&self, expected: u32, when: &str) {
        let found = checksum(&self.ram);
        if found != expected {
            let line = format!("{when}: the image is {found:08x}, the primary's {expected:08x}");
            lock(&self.log.wrong).push(line);
        }
        self.log.compared.fetch_add(1, Ordering::AcqRel);
    }
}

impl Replica for MemoryReplica {
    type State = (u32, Vec<u8>);

    fn ram(&self) -> Ram {
        self.ram.clone()
    }

    fn open_disks(&mut self) -> Result<Vec<Arc<dyn ReplicaDisk>>, GuestError> {
        Ok(self.images.iter().map(|image| Arc::clone(image) as _).collect())
    }

    fn parse(&mut self, state: &[u8]) -> Result<(u32, Vec<u8>), GuestError> {
        drop(lock(&self.log.busy));
        let sum = state.strip_prefix(b"sum:").and_then(|rest| rest.split_first_chunk::<4>());
        let Some((sum, disks)) = sum.filter(|_| !self.refuse) else {
            return Err("The machine state is not of this kind".into());
        };
        // Between two epochs the image is the one before, whole.
        if let Some(last) = self.last.filter(|_| !self.lenient) {
            self.compare(last, "before the next epoch");
        }
        let sum = u32::from_le_bytes(*sum);
        self.last = Some(sum);
        Ok((sum, disks.to_vec()))
    }

    fn ready(&mut self) -> Result<(), GuestError> {
        match self.log.lacking.load(Ordering::Acquire) {
            true => Err("The tap is in use".into()),
            false => Ok(()),
        }
    }

    fn track(&mut self) -> Result<(), GuestError> {
        self.log.tracked.store(true, Ordering::Release);
        Ok(())
    }

    fn start(
        self,
        (state, disks): (u32, Vec<u8>),
        held: Option<&ReplicateData>,
    ) -> Result<(), GuestError> {
        drop(lock(&self.log.starting));
        if self.log.doomed.load(Ordering::Acquire) {
            return Err("This host cannot start anything".into());
        }
        // Only what is written from here on is of interest.
        self.ram.drain_written(&mut PageSet::new(self.ram.pages()));
        self.log.held.store(held.is_some(), Ordering::Release);
        self.compare(state, "at the take-over");
        if let Err(wrong) = disks::compare(&self.images, &disks) {
            lock(&self.log.wrong).push(format!("at the take-over: {wrong}"));
        }
        *lock(&self.log.started) = Some(self.ram.clone());
        Ok(())
    }
}

/// Gathers events.
#[derive(Debug, Default)]
pub struct Recorder {
    events: Mutex<Vec<Event>>,
    changed: Condvar,
}

impl Observer for Recorder {
    fn event(&self, event: Event) {
        lock(&self.events).push(event);
        self.changed.notify_all();
    }
}

impl Recorder {
    /// All events so far.
    #[must_use]
    pub fn events(&self) -> Vec<Event> {
        lock(&self.events).clone()
    }

    /// Waits for an event, which may have come long ago; `None` if it has not come after a minute.
    #[must_use]
    pub fn wait(&self, wanted: impl Fn(&Event) -> bool) -> Option<Event> {
        self.wait_times(1, wanted)
    }

    /// Waits until so many such events have come; the first of them.
    #[must_use]
    pub fn wait_times(&self, times: usize, wanted: impl Fn(&Event) -> bool) -> Option<Event> {
        let events = lock(&self.events);
        let minute = std::time::Duration::from_secs(60);
        let missing =
            |events: &mut Vec<Event>| events.iter().filter(|event| wanted(event)).count() < times;
        let (events, _) = self
            .changed
            .wait_timeout_while(events, minute, missing)
            .unwrap_or_else(PoisonError::into_inner);
        events.iter().filter(|event| wanted(event)).nth(times - 1)?;
        events.iter().find(|event| wanted(event)).cloned()
    }
}
