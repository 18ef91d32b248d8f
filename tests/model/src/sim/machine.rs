//! The simulator's machine: memory, a server of counters in it, lines on a console, and the gates that
//! ship in front of both.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::output_gate::OutputGate;
use devices::virtio::net::gate::{Limits, TxGate};
use replication::guest::{Guest, GuestError, Waker};
use replication::ids::EpochId;
use replication::primary::simulated::Rest;
use replication::protocol::backup::Handover;
use replication::ram::{PageSet, Ram};
use replication::wire::Base;

use super::memory::{self, PAGES};
use super::state::State;
use crate::broken::Broken;
use crate::guest::{Guest as History, Position};
use crate::vm::{Replicated, Vm};

pub const CLIENTS: usize = 3;
/// What a backup is told to build.
pub const DESCRIPTION: &[u8] = b"the machine of the simulator";

/// Pages of the counters (one a client, of the highest request that it served) and of the console.
const LINE_PAGE: usize = CLIENTS;
const FREE_PAGES: usize = CLIENTS + 1;
/// Of so many values of a computation one changes many pages.
const BURST: u64 = 61;
const BURST_PAGES: usize = 30;

/// What leaves a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Output {
    /// A frame: the client's request of this number is done, and these are all counters.
    Response { client: usize, request: u64, total: u64 },
    /// A line on the console, with its number.
    Line(u64),
}

/// What replication drives.
#[derive(Debug)]
pub struct Inside {
    pub history: History,
    ram: Ram,
    console: OutputGate,
    net: TxGate,
    /// A seal, or a wait for room.
    is_quiesced: bool,
    /// Tracking began: everything counts as written.
    is_all_dirty: bool,
    /// The epoch that is being sealed is the last one of a switch-over.
    is_last: bool,
    /// Replication has ended it.
    pub is_destroyed: bool,
    broken: Option<Broken>,
    /// What has left since somebody looked.
    out: Vec<Output>,
}

/// What an engine has of it.
#[derive(Clone, Debug)]
pub struct Handle(Arc<Mutex<Inside>>);

impl Handle {
    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
pub struct Machine {
    handle: Handle,
    /// What the backup may have of the session before.
    pub rest: Option<Rest>,
    /// It was protected before, and is alone: nobody has ended that.
    pub again: bool,
}

impl Machine {
    #[must_use]
    pub fn new() -> Self {
        Self::with(History::new(), memory::new())
    }

    fn with(history: History, ram: Ram) -> Self {
        let inside = Inside {
            history,
            ram,
            console: OutputGate::new(),
            net: TxGate::new(1, Limits::default()),
            is_quiesced: false,
            is_all_dirty: false,
            is_last: false,
            is_destroyed: false,
            broken: None,
            out: vec![],
        };
        let handle = Handle(Arc::new(Mutex::new(inside)));
        Self { handle, rest: None, again: false }
    }

    /// What happens to it.
    pub fn inside(&self) -> MutexGuard<'_, Inside> {
        self.handle.lock()
    }

    /// What an engine drives, with a rule broken or not.
    #[must_use]
    pub fn handle(&self, broken: Option<Broken>) -> Handle {
        self.inside().broken = broken;
        self.handle.clone()
    }

    /// The machine of an image that nobody writes any more, with output held or free.
    #[must_use]
    pub fn started(state: &State, ram: Ram, held: bool) -> Self {
        let history = match held {
            true => History::start_held(&state.position),
            false => History::start(&state.position),
        };
        let machine = Self::with(history, ram);
        {
            let mut inside = machine.inside();
            if held {
                inside.hold();
            }
            inside.console.write(&state.console);
        }
        machine
    }

    #[must_use]
    pub fn ram(&self) -> Ram {
        self.inside().ram.clone()
    }

    fn runs(&self) -> bool {
        !self.stands()
    }

    /// Serves a client: a request that was served before is answered again and changes nothing.
    /// `false` for one that it cannot know: what it said before is not in its memory.
    pub fn serve(&mut self, client: usize, request: u64) -> bool {
        if !self.runs() {
            return true;
        }
        let inside = self.inside();
        let ram = &inside.ram;
        let served = memory::read(ram, client, 0);
        if request > served + 1 {
            return false;
        }
        memory::write(ram, client, 0, served.max(request));
        let total: u64 = (0..CLIENTS).map(|client| memory::read(ram, client, 0)).sum();
        let frame = [client as u64, request, total].map(u64::to_le_bytes).concat();
        // A full gate keeps the guest from sending: the client asks again.
        let _ = inside.net.push(0, frame);
        true
    }

    /// Computes: some pages change.
    pub fn compute(&mut self, page: usize, value: u64) {
        if !self.runs() {
            return;
        }
        let count = if value.is_multiple_of(BURST) { BURST_PAGES } else { 1 };
        self.writes(page, count, value);
    }

    /// Writes all that it computes with.
    pub fn floods(&mut self, value: u64) {
        if self.runs() {
            self.writes(0, PAGES - FREE_PAGES, value);
        }
    }

    fn writes(&self, page: usize, count: usize, value: u64) {
        let ram = self.ram();
        for at in page..page + count {
            let page = FREE_PAGES + at % (PAGES - FREE_PAGES);
            memory::scribble(&ram, page, value);
        }
    }

    /// Says the next line.
    pub fn line(&mut self) {
        if self.runs() {
            let inside = self.inside();
            let line = memory::read(&inside.ram, LINE_PAGE, 0) + 1;
            memory::write(&inside.ram, LINE_PAGE, 0, line);
            inside.console.write(format!("{line}\n").as_bytes());
        }
    }

    /// What has left. The console's writer may be behind.
    pub fn leaves(&mut self, console: bool) -> Vec<Output> {
        let mut inside = self.inside();
        inside.transmit();
        if console {
            inside.print();
        }
        std::mem::take(&mut inside.out)
    }

    /// What a primary would ask a backup for, and whether it is called again.
    #[must_use]
    pub fn calls(&self) -> (Option<Base>, bool) {
        (self.rest.as_ref().map(Rest::base), self.again)
    }
}

impl Default for Machine {
    fn default() -> Self {
        Self::new()
    }
}

impl Inside {
    /// Frames that may leave do.
    fn transmit(&mut self) {
        while let Some(frame) = self.net.next(0) {
            let (words, _) = frame.as_chunks::<8>();
            if let [client, request, total] = words {
                let [request, total] = [*request, *total].map(u64::from_le_bytes);
                let client = usize::from(client[0]);
                self.out.push(Output::Response { client, request, total });
            }
        }
    }

    /// The console's writer writes all that it may.
    fn print(&mut self) {
        let mut text = Vec::new();
        let mut chunk = Vec::new();
        // It would wait for more.
        while !self.console.settle(std::time::Duration::ZERO) && self.console.next_chunk(&mut chunk)
        {
            text.extend_from_slice(&chunk);
            self.console.consume(chunk.len());
        }
        let text = String::from_utf8_lossy(&text);
        self.out.extend(text.lines().filter_map(|line| line.parse().ok()).map(Output::Line));
    }
}

impl Inside {
    fn hold(&mut self) {
        self.history.hold();
        self.console.hold();
        self.net.hold();
    }

    fn commit(&mut self, epoch: EpochId) {
        self.history.commit(epoch);
        let early = self.broken == Some(Broken::GateLetsNextOut);
        let epoch = if early { epoch.next() } else { epoch };
        self.console.commit(epoch.0);
        self.net.commit(epoch.0);
    }

    fn hand_over(&mut self, epoch: EpochId) {
        self.history.hand_over(epoch);
        self.net.commit(epoch.0);
    }

    /// All output leaves.
    pub fn pass(&mut self) {
        self.history.pass();
        self.console.pass();
        self.net.pass();
    }

    fn run(&mut self) {
        self.is_quiesced = false;
        self.history.release();
    }
}

impl Guest for Handle {
    type State = State;

    fn ram(&self) -> Ram {
        self.lock().ram.clone()
    }

    fn describe(&mut self) -> Result<Vec<u8>, GuestError> {
        Ok(DESCRIPTION.to_vec())
    }

    fn start_tracking(&mut self) -> Result<(), GuestError> {
        self.lock().is_all_dirty = true;
        Ok(())
    }

    fn stop_tracking(&mut self) -> Result<(), GuestError> {
        Ok(())
    }

    fn quiesce(&mut self) -> Result<(), GuestError> {
        let mut inside = self.lock();
        (inside.is_quiesced, inside.is_last) = (true, false);
        Ok(())
    }

    fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), GuestError> {
        let mut inside = self.lock();
        inside.ram.drain_written(dirty);
        if std::mem::take(&mut inside.is_all_dirty) {
            dirty.insert_range(replication::ids::PageIndex(0), PAGES as u64);
        }
        Ok(())
    }

    fn capture(&mut self) -> Result<State, GuestError> {
        let inside = self.lock();
        let History { incarnation, open, .. } = inside.history;
        let position = Position { incarnation, at: open, handover: inside.is_last };
        let console = inside.console.pending();
        Ok(State { position, console })
    }

    fn hold_output(&mut self) {
        self.lock().hold();
    }

    fn seal_output(&mut self, epoch: EpochId) {
        let mut inside = self.lock();
        let is_last = inside.is_last;
        inside.history.interval(epoch, is_last);
        inside.console.seal(epoch.0);
        inside.net.seal(epoch.0);
        if inside.broken == Some(Broken::ReleaseBeforeAck) {
            inside.commit(epoch);
        }
    }

    fn settle_output(&mut self) {
        let mut inside = self.lock();
        inside.is_last = true;
        inside.print();
    }

    fn release(&mut self) -> Result<(), GuestError> {
        self.lock().run();
        Ok(())
    }

    fn commit_output(&mut self, epoch: EpochId) {
        self.lock().commit(epoch);
    }

    fn hand_over_output(&mut self, epoch: EpochId) {
        let mut inside = self.lock();
        match inside.broken {
            Some(Broken::HandedIsSaid) => inside.commit(epoch),
            _ => inside.hand_over(epoch),
        }
    }

    fn pass_output(&mut self) {
        self.lock().pass();
    }

    fn output_held_bytes(&self) -> u64 {
        let inside = self.lock();
        (inside.console.held_bytes() + inside.net.held_bytes()) as u64
    }

    fn output_waiting(&self) -> bool {
        let inside = self.lock();
        inside.console.open_bytes() + inside.net.open_bytes() > 0
    }

    fn set_output_waker(&mut self, waker: Waker) {
        let waker: devices::output_gate::Waker = Arc::new(move || waker.wake());
        let inside = self.lock();
        inside.console.set_waker(Arc::clone(&waker));
        inside.net.set_waker(waker);
    }

    fn suspend(&mut self) -> Result<(), GuestError> {
        Ok(())
    }

    fn regain(&mut self) -> Result<(), GuestError> {
        Ok(())
    }

    fn destroy(&mut self) {
        let mut inside = self.lock();
        if inside.broken == Some(Broken::LoserGoesOn) {
            inside.pass();
            return inside.run();
        }
        inside.is_destroyed = true;
        inside.console.discard();
        inside.net.discard();
    }
}

impl Vm for Machine {
    type Content = ();

    fn copy(&mut self) -> Option<()> {
        None
    }

    fn seal(&mut self, _: EpochId, _: Handover) {
        unreachable!("only the engine that ships seals a simulated machine")
    }

    fn hold(&mut self) {
        self.inside().hold();
    }

    fn commit(&mut self, epoch: EpochId) {
        self.inside().commit(epoch);
    }

    fn hand_over(&mut self, epoch: EpochId) {
        self.inside().hand_over(epoch);
    }

    fn pass(&mut self) {
        self.inside().pass();
    }

    fn release(&mut self) {
        self.inside().run();
    }

    fn stands(&self) -> bool {
        let inside = self.inside();
        inside.history.stands() || inside.is_quiesced
    }

    fn is_free(&self) -> bool {
        self.inside().history.is_free()
    }
}
