//! The simulator's machine: memory, a server of counters in it, lines on a console, and the gates that
//! ship in front of both.

use devices::output_gate::OutputGate;
use devices::virtio::net::gate::{Limits, TxGate};
use replication::guest::{Guest, GuestError, MachineState};
use replication::ids::{EpochId, Generation};
use replication::primary::simulated::{Broken as SendingBroken, Rest, Sending, Terms};
use replication::protocol::backup::Handover;
use replication::protocol::primary::Primary;
use replication::ram::{PageSet, Ram};
use replication::wire::Base;

use super::image::{Content, Image, State};
use super::memory::{self, PAGES};
use crate::broken::Broken;
use crate::guest::{Guest as History, Position};
use crate::vm::Vm;

pub const CLIENTS: usize = 3;

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
    /// The epoch that is being sealed, and whether it is a last one.
    sealing: (EpochId, bool),
    /// What has left since somebody looked.
    out: Vec<Output>,
}

#[derive(Debug)]
pub struct Machine {
    pub inside: Inside,
    sending: Option<Sending>,
    /// What the backup may have of the session before.
    rest: Option<Rest>,
    /// It was protected before, and is alone: nobody has ended that.
    again: bool,
    /// Of a switch-over.
    last: Option<(State, Terms)>,
    broken: Option<Broken>,
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
            sealing: (EpochId(0), false),
            out: vec![],
        };
        Self { inside, sending: None, rest: None, again: false, last: None, broken: None }
    }

    /// The machine of an image that nobody writes any more, with output held or free.
    fn of(image: &Image, held: bool) -> Self {
        let state = image.state.as_ref().expect("only what was committed is started");
        let history = match held {
            true => History::start_held(&state.position),
            false => History::start(&state.position),
        };
        let mut machine = Self::with(history, image.ram());
        let inside = &mut machine.inside;
        if held {
            inside.hold_output();
        }
        inside.console.write(&state.console);
        if state.position.handover {
            // What it writes is noted from its first instruction on, and the old host has the rest.
            let mut before = PageSet::new(PAGES as u64);
            inside.ram.drain_written(&mut before);
            machine.rest = image.terms().map(|terms| {
                let (generation, committed) = (state.generation, state.epoch);
                let session = terms.session.0;
                let base = Base { session, generation, committed, sealed: committed };
                Rest::handed(base, PAGES as u64)
            });
        }
        machine
    }

    #[must_use]
    pub fn ram(&self) -> &Ram {
        &self.inside.ram
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
        let ram = &self.inside.ram;
        let served = memory::read(ram, client, 0);
        if request > served + 1 {
            return false;
        }
        memory::write(ram, client, 0, served.max(request));
        let total: u64 = (0..CLIENTS).map(|client| memory::read(ram, client, 0)).sum();
        let frame = [client as u64, request, total].map(u64::to_le_bytes).concat();
        // A full gate keeps the guest from sending: the client asks again.
        let _ = self.inside.net.push(0, frame);
        true
    }

    /// Computes: some pages change.
    pub fn compute(&mut self, page: usize, value: u64) {
        if !self.runs() {
            return;
        }
        let count = if value.is_multiple_of(BURST) { BURST_PAGES } else { 1 };
        for at in page..page + count {
            let page = FREE_PAGES + at % (PAGES - FREE_PAGES);
            memory::scribble(&self.inside.ram, page, value);
        }
    }

    /// Says the next line.
    pub fn line(&mut self) {
        if self.runs() {
            let line = memory::read(&self.inside.ram, LINE_PAGE, 0) + 1;
            memory::write(&self.inside.ram, LINE_PAGE, 0, line);
            self.inside.console.write(format!("{line}\n").as_bytes());
        }
    }

    /// What has left. The console's writer may be behind.
    pub fn leaves(&mut self, console: bool) -> Vec<Output> {
        self.inside.transmit();
        if console {
            self.inside.print();
        }
        std::mem::take(&mut self.inside.out)
    }

    /// What a primary would ask a backup for, and whether it is called again.
    #[must_use]
    pub fn calls(&self) -> (Option<Base>, bool) {
        (self.rest.as_ref().map(Rest::base), self.again)
    }

    /// A session begins.
    pub fn open(
        &mut self,
        terms: Terms,
        sealed: EpochId,
        has_base: bool,
        (delta, lz4): (bool, bool),
        broken: Option<Broken>,
    ) {
        self.broken = broken;
        let breaks = SendingBroken {
            stale_deltas: broken == Some(Broken::DeltaOfAnother),
            forgets: broken == Some(Broken::RestForgets),
        };
        let rest = self.rest.take();
        let mut sending = Sending::open(&mut self.inside, terms, sealed, rest, has_base, breaks);
        sending.choose(delta, lz4);
        self.sending = Some(sending);
    }

    #[must_use]
    pub fn sending(&mut self) -> Option<&mut Sending> {
        self.sending.as_mut()
    }

    /// Whether something is to be sent yet.
    #[must_use]
    pub fn is_sending(&self) -> bool {
        self.sending.as_ref().is_some_and(Sending::is_sending)
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

impl Guest for Inside {
    type State = State;

    fn ram(&self) -> Ram {
        self.ram.clone()
    }

    fn describe(&mut self) -> Result<Vec<u8>, GuestError> {
        Ok(vec![])
    }

    fn start_tracking(&mut self) -> Result<(), GuestError> {
        self.is_all_dirty = true;
        Ok(())
    }

    fn stop_tracking(&mut self) -> Result<(), GuestError> {
        Ok(())
    }

    fn quiesce(&mut self) -> Result<(), GuestError> {
        self.is_quiesced = true;
        Ok(())
    }

    fn harvest(&mut self, dirty: &mut PageSet) -> Result<(), GuestError> {
        self.ram.drain_written(dirty);
        if std::mem::take(&mut self.is_all_dirty) {
            dirty.insert_range(replication::ids::PageIndex(0), PAGES as u64);
        }
        Ok(())
    }

    fn capture(&mut self) -> Result<State, GuestError> {
        let (epoch, is_last) = self.sealing;
        let position = self.history.interval(epoch, is_last);
        let console = self.console.pending();
        // Which pair's it is the seal says.
        Ok(State { position, console, epoch, generation: Generation(0) })
    }

    fn hold_output(&mut self) {
        self.console.hold();
        self.net.hold();
    }

    fn seal_output(&mut self, epoch: EpochId) {
        self.console.seal(epoch.0);
        self.net.seal(epoch.0);
    }

    fn settle_output(&mut self) {
        self.print();
    }

    fn release(&mut self) -> Result<(), GuestError> {
        self.is_quiesced = false;
        Ok(())
    }

    fn commit_output(&mut self, epoch: EpochId) {
        self.console.commit(epoch.0);
        self.net.commit(epoch.0);
    }

    fn hand_over_output(&mut self, epoch: EpochId) {
        self.net.commit(epoch.0);
    }

    fn pass_output(&mut self) {
        self.console.pass();
        self.net.pass();
    }

    fn output_held_bytes(&self) -> u64 {
        self.console.held_bytes() as u64
    }

    fn suspend(&mut self) -> Result<(), GuestError> {
        Ok(())
    }

    fn regain(&mut self) -> Result<(), GuestError> {
        Ok(())
    }

    fn destroy(&mut self) {
        self.console.discard();
        self.net.discard();
    }
}

impl MachineState for State {
    fn encode(&self, out: &mut Vec<u8>) -> Result<(), GuestError> {
        let Position { incarnation, at, handover } = self.position;
        out.extend(incarnation.to_le_bytes());
        out.extend(at.to_le_bytes());
        out.push(handover.into());
        out.extend(&self.console);
        Ok(())
    }
}

impl Vm for Machine {
    type Content = Content;
    type Image = Image;

    const CALLS_AGAIN: bool = true;

    fn copy(&mut self) -> Option<Content> {
        if let Some(sending) = &mut self.sending {
            sending.copy(&mut self.inside);
        }
        None
    }

    fn seal(
        &mut self,
        epoch: EpochId,
        generation: Generation,
        handover: Handover,
    ) -> Option<Content> {
        self.inside.sealing = (epoch, handover != Handover::No);
        let sending = self.sending.as_mut()?;
        let seal = sending.seal(&mut self.inside, epoch, generation, handover)?;
        let content = Content { pages: seal.pages, state: seal.state };
        if handover != Handover::No {
            let state = State::parse(&content.state, epoch, generation).ok()?;
            self.last = Some((state, sending.terms()));
        }
        Some(content)
    }

    fn acked(&mut self) {
        if let Some(sending) = &mut self.sending {
            sending.acked();
        }
    }

    fn hold_up(&mut self) {
        if let Some(sending) = &mut self.sending {
            sending.hold_up(&mut self.inside);
        }
    }

    fn close(&mut self) {
        if let Some(sending) = &mut self.sending {
            sending.close();
        }
    }

    fn ends(&mut self, machine: &Primary) {
        let Some(mut sending) = self.sending.take() else { return };
        self.again = machine.may_go_on();
        if !self.inside.history.stands() {
            // For a copy, an epoch or room it stood in this session only.
            sending.release(&mut self.inside);
        }
        self.rest = if self.again { sending.rest(machine) } else { None };
    }

    fn hold(&mut self) {
        self.inside.history.hold();
        self.inside.hold_output();
    }

    fn commit(&mut self, epoch: EpochId) {
        self.inside.history.commit(epoch);
        let early = self.broken == Some(Broken::GateLetsNextOut);
        self.inside.commit_output(if early { epoch.next() } else { epoch });
    }

    fn hand_over(&mut self, epoch: EpochId) {
        self.inside.history.hand_over(epoch);
        self.inside.hand_over_output(epoch);
    }

    fn pass(&mut self) {
        self.inside.history.pass();
        self.inside.pass_output();
    }

    fn release(&mut self) {
        self.inside.history.release();
        if let Some(sending) = &mut self.sending {
            sending.release(&mut self.inside);
        }
    }

    fn stands(&self) -> bool {
        self.inside.history.stands() || self.inside.is_quiesced
    }

    fn is_free(&self) -> bool {
        self.inside.history.is_free()
    }

    fn fits(image: &Image, base: &Base, generation: Generation, committed: EpochId) -> bool {
        image.terms().is_some_and(|terms| base.fits(terms.session.0, generation, committed))
    }

    fn drop_staging(image: &mut Image) {
        image.with(|reception| reception.drop_staging());
    }

    fn receive(image: &mut Image, content: &Content) {
        image.receive(content);
    }

    fn start(image: &Image) -> Self {
        image.end();
        Self::of(image, false)
    }

    fn start_held(image: &Image) -> Self {
        image.end();
        Self::of(image, true)
    }

    fn kept(&self) -> Image {
        let (state, terms) = self.last.clone().expect("it stands for its last seal");
        Image::of(self.inside.ram.clone(), state, terms)
    }
}
