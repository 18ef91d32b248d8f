//! The thread of a queue pair.
//!
//! ```text
//!   doorbells ──┐                     ┌─▶ transmit ring ─▶ gate
//!   tap ────────┼─▶ wait ─▶ look at ──┼─▶ gate ─▶ tap
//!   gate, VMM ──┤     ▲     what may  ├─▶ tap ─▶ buffer of the VMM ─▶ receive ring
//!   timer ──────┘     │     be done   └─▶ control ring (first pair)
//!                     └─────────┘
//! ```
//!
//! What always holds: the thread blocks in its wait only; it waits for the tap only when it has
//! something to do with it (a room to read into, a frame to write), so it never spins; it enters
//! the turnstile without waiting, so that a parked device still writes what was committed. A frame
//! that was read when the device became parked stays in the thread's buffer. It looks at all rings
//! after each park, and writes to none where there is nothing to do: an idle card dirties no page.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, EpollEvent, EventSet};

use super::announce::Announcer;
use super::control::{self, Next, Request};
use super::features::{GUEST_ANNOUNCE, GuestOffloads, MRG_RXBUF, STATUS};
use super::frame::{FRAME_BYTES_MAX, FrameHeader, HEADER_BYTES, announcement};
use super::host::HostSide;
use super::rx::{self, Delivery};
use super::shared::{ActivePair, Pair, Shared, Token};
use super::tap::TapQueue;
use super::tx::{self, TakeEnd};
use crate::virtio::chain_of;
use crate::virtio::ring::{self, RingError};

/// Steps of one kind after which the others have their turn.
const TURN_STEPS: usize = 64;
/// Events that are fetched at once.
const EVENTS: usize = 8;
/// After a failed read the tap is left alone for so long.
const READ_RETRY: Duration = Duration::from_secs(1);
/// Longest name of a thread.
const THREAD_NAME_BYTES: usize = 15;

/// What the driver is to hear at the end of a pass.
enum Notice {
    Queue(u16),
    Config,
    NeedsReset(String),
}

/// What the first pair's worker does for all.
struct First {
    host: HostSide,
    announcer: Announcer,
}

pub struct Worker {
    shared: Arc<Shared>,
    index: usize,
    tap: Arc<dyn TapQueue>,
    /// The first pair's queue, which is always enabled.
    first_tap: Arc<dyn TapQueue>,
    first: Option<First>,
    /// What the tap is watched for at present.
    interest: EventSet,
    /// The doorbell has rung, or it may have: there may be chains.
    transmit: bool,
    receive: bool,
    control: bool,
    /// The tap took nothing: it is watched until it does.
    tap_blocked: bool,
    /// The tap may have a frame.
    tap_readable: bool,
    /// The tap could not be read and is left alone until then.
    read_retry: Option<Instant>,
    /// One byte longer than a frame can be, so that one that is too long is noticed.
    buffer: Box<[u8]>,
    /// Bytes in the buffer that are yet to be delivered.
    pending: Option<usize>,
    tx_scratch: tx::Scratch,
    rx_scratch: rx::Scratch,
    notices: Vec<Notice>,
}

impl Worker {
    /// Starts the thread of pair `index`. `taps` are the queues of all pairs.
    pub fn spawn(
        shared: &Arc<Shared>,
        index: usize,
        taps: &[Arc<dyn TapQueue>],
    ) -> io::Result<JoinHandle<()>> {
        let worker = Self::new(shared, index, taps)?;
        thread::Builder::new().name(thread_name(&shared.id, index)).spawn(move || worker.run())
    }

    /// What the thread of pair `index` works with.
    pub(super) fn new(
        shared: &Arc<Shared>,
        index: usize,
        taps: &[Arc<dyn TapQueue>],
    ) -> io::Result<Self> {
        let first = if index == 0 {
            let announcer = Announcer::new()?;
            let event = EpollEvent::new(EventSet::IN, Token::Timer as u64);
            let timer = announcer.timer().as_raw_fd();
            shared.pairs[0].epoll.ctl(ControlOperation::Add, timer, event)?;
            Some(First { host: HostSide::new(taps.to_vec()), announcer })
        } else {
            None
        };
        Ok(Self {
            shared: Arc::clone(shared),
            index,
            tap: Arc::clone(&taps[index]),
            first_tap: Arc::clone(&taps[0]),
            first,
            interest: EventSet::empty(),
            transmit: true,
            receive: true,
            control: true,
            tap_blocked: false,
            tap_readable: true,
            read_retry: None,
            buffer: vec![0; FRAME_BYTES_MAX + 1].into_boxed_slice(),
            pending: None,
            tx_scratch: tx::Scratch::default(),
            rx_scratch: rx::Scratch::default(),
            notices: Vec::new(),
        })
    }

    fn run(mut self) {
        while !self.shared.stop.load(Ordering::SeqCst) {
            let again = self.turn();
            self.wait(again);
        }
        // What is released belongs to committed epochs, so it leaves, as far as the tap takes it.
        while self.write_tap() {}
        // Another worker may come after this one, and the tap may outlive both.
        if !self.interest.is_empty() {
            let event = EpollEvent::default();
            if let Err(error) =
                self.pair().epoll.ctl(ControlOperation::Delete, self.tap.fd(), event)
            {
                tracing::debug!("The tap of {} was not watched: {error}", self.shared.id);
            }
        }
    }

    /// Does what may be done now. True if there may be more.
    pub(super) fn turn(&mut self) -> bool {
        self.sync_host();
        self.announce();
        let mut again = self.control();
        again |= self.transmit();
        again |= self.write_tap();
        again |= self.receive();
        self.watch_tap();
        again
    }

    /// Fetches what has happened since the last time, without a wait.
    #[cfg(feature = "fuzzing")]
    pub(super) fn look(&mut self) {
        self.wait(true);
    }

    fn pair(&self) -> &Pair {
        &self.shared.pairs[self.index]
    }

    /// Waits for something to do, or only fetches what has happened.
    fn wait(&mut self, again: bool) {
        let timeout_ms = if again {
            0
        } else {
            self.read_retry.map_or(-1, |retry| {
                let left = retry.saturating_duration_since(Instant::now()).as_millis();
                i32::try_from(left).unwrap_or(i32::MAX).saturating_add(1)
            })
        };
        let mut events = [EpollEvent::default(); EVENTS];
        let count = match self.pair().epoll.wait(timeout_ms, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => panic!("a worker's own epoll descriptor is valid: {error}"),
        };
        if self.read_retry.is_some_and(|retry| retry <= Instant::now()) {
            self.read_retry = None;
            self.tap_readable = true;
        }
        for event in &events[..count] {
            match Token::from_data(event.data()) {
                Some(Token::Wake) => {
                    (self.transmit, self.receive, self.control) = (true, true, true);
                }
                Some(Token::Tap) => {
                    let bad = EventSet::ERROR | EventSet::HANG_UP;
                    self.tap_readable |= event.event_set().intersects(EventSet::IN | bad);
                    self.tap_blocked &= !event.event_set().intersects(EventSet::OUT | bad);
                }
                Some(Token::Timer) => self.announce_again(),
                Some(Token::Receive) => self.receive = true,
                Some(Token::Transmit) => self.transmit = true,
                Some(Token::Control) => self.control = true,
                None => {}
            }
        }
    }

    /// Watches the tap for what can be used, and not at all where nothing can: errors are reported
    /// whether one watches for them or not.
    fn watch_tap(&mut self) {
        let mut wanted = EventSet::empty();
        if self.receive && self.pending.is_none() && self.may_read() {
            wanted |= EventSet::IN;
        }
        if self.tap_blocked {
            wanted |= EventSet::OUT;
        }
        if wanted == self.interest {
            return;
        }
        let operation = if self.interest.is_empty() {
            ControlOperation::Add
        } else if wanted.is_empty() {
            ControlOperation::Delete
        } else {
            ControlOperation::Modify
        };
        let event = EpollEvent::new(wanted, Token::Tap as u64);
        match self.pair().epoll.ctl(operation, self.tap.fd(), event) {
            Ok(()) => self.interest = wanted,
            Err(error) => {
                tracing::warn!("The tap of {} cannot be watched: {error}", self.shared.id);
                self.read_retry = Some(Instant::now() + READ_RETRY);
            }
        }
    }

    /// The tap's queue carries traffic and is not left alone.
    fn may_read(&self) -> bool {
        self.is_enabled() && self.read_retry.is_none()
    }

    fn is_enabled(&self) -> bool {
        self.index < self.shared.taps_enabled.load(Ordering::SeqCst)
    }

    /// Does something with the pair's queues under a pass. None if the device is parked, has no
    /// queues or is broken; an error breaks it.
    ///
    /// The driver hears of it in the same pass, but when the queues are free again: a transport
    /// may wait for them, to reset the device, with a lock held that its interrupts need.
    fn with_queues<R, E: std::error::Error>(
        &mut self,
        f: impl FnOnce(&mut Self, &mut ActivePair) -> Result<R, E>,
    ) -> Option<R> {
        let shared = Arc::clone(&self.shared);
        let _pass = shared.turnstile.try_enter()?;
        let mut slot = shared.pairs[self.index].slot();
        let active = slot.as_mut()?;
        if shared.broken.load(Ordering::SeqCst) {
            return None;
        }
        let result = match f(self, active) {
            Ok(result) => Some(result),
            Err(error) => {
                shared.broken.store(true, Ordering::SeqCst);
                let why = chain_of(&error);
                // The transport tells it, as often as a guest may fill the log.
                tracing::debug!("Network device {} needs a reset: {why}", shared.id);
                self.notices.push(Notice::NeedsReset(why));
                None
            }
        };
        if !self.notices.is_empty() {
            let interrupt = Arc::clone(&active.interrupt);
            drop(slot);
            for notice in self.notices.drain(..) {
                match notice {
                    Notice::Queue(index) => interrupt.queue(index),
                    Notice::Config => interrupt.config(),
                    Notice::NeedsReset(why) => interrupt.needs_reset(&why),
                }
            }
        }
        result
    }

    fn notify(&mut self, queue: u16, wanted: bool) {
        if wanted {
            self.notices.push(Notice::Queue(queue));
        }
    }

    /// Takes frames of the guest. True if there may be more.
    fn transmit(&mut self) -> bool {
        // Back-pressure: what the tap does not take is not taken from the guest either. The gate
        // wakes this worker when it has room.
        if !self.transmit || self.tap_blocked || self.shared.gate.is_full() {
            return false;
        }
        let end = self.with_queues(|worker, active| {
            let Some(queue) = &mut active.transmit else { return Ok::<_, RingError>(None) };
            let gate = (&*worker.shared.gate, worker.index);
            let (end, interrupt) = tx::take(
                &mut queue.queue,
                &active.memory,
                gate,
                &worker.shared.counters,
                &mut worker.tx_scratch,
            )?;
            worker.notify(queue.index, interrupt);
            Ok(Some(end))
        });
        match end.flatten() {
            Some(TakeEnd::Budget) => true,
            Some(TakeEnd::Full) => {
                // It may have got room again before it was known to be full.
                !self.shared.gate.is_full()
            }
            Some(TakeEnd::Empty) => {
                self.transmit = false;
                false
            }
            None => false,
        }
    }

    /// Writes released frames to the tap. True if there may be more.
    fn write_tap(&mut self) -> bool {
        for _ in 0..TURN_STEPS {
            if self.tap_blocked {
                return false;
            }
            let Some(frame) = self.shared.gate.next(self.index) else { return false };
            // What a pair sent before the driver gave it up leaves by a queue that is enabled.
            let enabled = self.is_enabled();
            let tap = if enabled { &self.tap } else { &self.first_tap };
            match retrying(|| tap.write(&frame)) {
                Ok(_) => {
                    self.shared.counters.tx_frames.add(1);
                    self.shared.counters.tx_bytes.add_len(frame.len() - HEADER_BYTES);
                }
                Err(error) if enabled && error.kind() == io::ErrorKind::WouldBlock => {
                    self.shared.gate.give_back(self.index, frame);
                    self.tap_blocked = true;
                }
                // The link is down, the host is short of memory, or the guest's header is nonsense.
                Err(error) => {
                    tracing::debug!("The tap of {} refused a frame: {error}", self.shared.id);
                    self.shared.counters.tx_dropped.add(1);
                }
            }
        }
        true
    }

    /// Moves frames from the tap to the guest. True if there may be more.
    fn receive(&mut self) -> bool {
        for _ in 0..TURN_STEPS {
            if !self.receive || self.pending.is_none() && !self.read_tap() {
                return false;
            }
            match self.deliver() {
                Some(Delivery::Done) => self.pending = None,
                Some(Delivery::Unfit) => {
                    self.shared.counters.rx_dropped.add(1);
                    self.pending = None;
                }
                Some(Delivery::Retry) => return true,
                Some(Delivery::NoBuffers) => {
                    self.receive = false;
                    return false;
                }
                None => return false,
            }
        }
        true
    }

    /// Reads a frame into the buffer, where the guest has any room for one. False if there is none.
    fn read_tap(&mut self) -> bool {
        if !self.tap_readable || !self.may_read() {
            return false;
        }
        let room = self.with_queues(|_, active| match &mut active.receive {
            Some(receive) => ring::has_more(&mut receive.queue, &active.memory),
            None => Ok(false),
        });
        if room != Some(true) {
            // Parked, without queues or without buffers: what ends that wakes this worker.
            self.receive = false;
            return false;
        }
        match retrying(|| self.tap.read(&mut self.buffer)) {
            Ok(len) if (HEADER_BYTES..=FRAME_BYTES_MAX).contains(&len) => {
                self.pending = Some(len);
                true
            }
            Ok(1..) => {
                self.shared.counters.rx_dropped.add(1);
                false
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.tap_readable = false;
                false
            }
            // The interface is gone, or this queue of it is disabled.
            result => {
                tracing::debug!("The tap of {} cannot be read: {result:?}", self.shared.id);
                self.shared.counters.rx_errors.add(1);
                self.read_retry = Some(Instant::now() + READ_RETRY);
                false
            }
        }
    }

    /// Puts the pending frame into the guest's memory. None if that is not possible now.
    fn deliver(&mut self) -> Option<Delivery> {
        let len = self.pending?;
        self.with_queues(|worker, active| {
            let Some(receive) = &mut active.receive else {
                return Ok(Delivery::Unfit);
            };
            let frame = &mut worker.buffer[..len];
            let offloads = worker.shared.control().offloads(active.features);
            if !FrameHeader::new(frame).is_some_and(|mut header| offloads.admit(&mut header)) {
                return Ok(Delivery::Unfit);
            }
            let mergeable = active.features & MRG_RXBUF != 0;
            let (delivery, interrupt) = rx::deliver(
                &mut receive.queue,
                &active.memory,
                frame,
                mergeable,
                &mut worker.rx_scratch,
            )?;
            worker.notify(receive.index, interrupt);
            if delivery == Delivery::Done {
                worker.shared.counters.rx_frames.add(1);
                worker.shared.counters.rx_bytes.add_len(len - HEADER_BYTES);
            }
            Ok::<_, rx::RxError>(delivery)
        })
    }

    /// Brings the tap in line with the driver's present choice.
    fn sync_host(&mut self) {
        let Some(first) = &mut self.first else { return };
        let features = self.shared.pairs[0].slot().as_ref().map(|active| active.features);
        let control = self.shared.control().clone();
        let (offloads, pairs) = match features {
            Some(features) => (control.offloads(features), control.pairs),
            None => (GuestOffloads::default(), 1),
        };
        first.host.sync(&self.shared, offloads, pairs);
    }

    /// Carries out commands of the driver. True if there may be more.
    fn control(&mut self) -> bool {
        if self.first.is_none() || !self.control {
            return false;
        }
        for _ in 0..TURN_STEPS {
            let Some((next, features)) = self.peek_control() else { return false };
            let request = match next {
                Next::Request(request) => request,
                Next::Malformed { .. } => continue,
                Next::Nothing => {
                    self.control = false;
                    return false;
                }
            };
            let done = self.carry_out(&request, features);
            if !self.answer_control(&request, done) {
                return false;
            }
        }
        true
    }

    /// Looks at the next command, answering what is none.
    fn peek_control(&mut self) -> Option<(Next, u64)> {
        self.with_queues(|worker, active| {
            let Some(queue) = &mut active.control else {
                return Ok::<_, RingError>((Next::Nothing, 0));
            };
            let mut next = control::peek(&mut queue.queue, &active.memory)?;
            if next == Next::Nothing && ring::has_more(&mut queue.queue, &active.memory)? {
                next = control::peek(&mut queue.queue, &active.memory)?;
            }
            if let Next::Malformed { head } = next {
                worker.shared.counters.control_errors.add(1);
                let interrupt = control::refuse(&mut queue.queue, &active.memory, head)?;
                worker.notify(queue.index, interrupt);
            }
            Ok((next, active.features))
        })
    }

    /// The host's part of a command.
    fn carry_out(&mut self, request: &Request, features: u64) -> bool {
        let shared = Arc::clone(&self.shared);
        let after = shared.control().after(request.command, features, shared.pairs_max());
        let (Some(after), Some(first)) = (after, &mut self.first) else { return false };
        match first.host.apply(&shared, after.offloads(features), after.pairs) {
            Ok(()) => true,
            Err(error) => {
                // A driver may repeat it, and has its answer and a counter.
                tracing::debug!("The tap of {} refuses a command: {error}", shared.id);
                false
            }
        }
    }

    /// The guest's part: the new state and the answer, in one pass, if the command is still what
    /// was carried out. False if that is not possible now; then the command stays in the ring.
    fn answer_control(&mut self, request: &Request, done: bool) -> bool {
        self.with_queues(|worker, active| {
            let Some(queue) = &mut active.control else { return Ok::<_, RingError>(()) };
            if control::peek(&mut queue.queue, &active.memory)? != Next::Request(*request) {
                // The driver has rewritten it; the next turn brings the tap back in line.
                return Ok(());
            }
            let shared = &worker.shared;
            let mut state = shared.control();
            let after = state.after(request.command, active.features, shared.pairs_max());
            let done = match after.filter(|_| done) {
                Some(after) => {
                    *state = after;
                    true
                }
                None => false,
            };
            drop(state);
            let count = if done {
                &shared.counters.control_commands
            } else {
                &shared.counters.control_errors
            };
            count.add(1);
            let interrupt = control::answer(&mut queue.queue, &active.memory, request, done)?;
            worker.notify(queue.index, interrupt);
            Ok(())
        })
        .is_some()
    }

    /// Begins what [`super::Net::announce`] asked for.
    fn announce(&mut self) {
        let Some(first) = &mut self.first else { return };
        if self.shared.announce_frames.swap(false, Ordering::SeqCst) {
            if let Err(error) = first.announcer.start() {
                tracing::warn!("Announcements are not repeated: {error}");
            }
            self.send_announcement();
        }
        if !self.shared.announce_guest.load(Ordering::SeqCst) {
            return;
        }
        self.with_queues(|worker, active| {
            worker.shared.announce_guest.store(false, Ordering::SeqCst);
            if active.features & (GUEST_ANNOUNCE | STATUS) == GUEST_ANNOUNCE | STATUS {
                worker.shared.control().announce = true;
                worker.notices.push(Notice::Config);
            }
            Ok::<_, RingError>(())
        });
    }

    fn announce_again(&mut self) {
        let Some(first) = &mut self.first else { return };
        if let Err(error) = first.announcer.expired() {
            tracing::warn!("Announcements are not repeated: {error}");
        }
        self.send_announcement();
    }

    /// Past the gate, since it belongs to no epoch, and past what waits for the tap.
    fn send_announcement(&self) {
        match retrying(|| self.tap.write(&announcement(self.shared.mac()))) {
            Ok(_) => self.shared.counters.announcements.add(1),
            Err(error) => tracing::debug!("An announcement was not sent: {error}"),
        }
    }
}

/// Calls `f` until no signal interrupts it.
fn retrying<R>(mut f: impl FnMut() -> io::Result<R>) -> io::Result<R> {
    loop {
        match f() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// The device's name, cut so that the pair's number fits.
fn thread_name(id: &str, index: usize) -> String {
    let suffix = format!("_qp{index}");
    let mut len = id.len().min(THREAD_NAME_BYTES.saturating_sub(suffix.len()));
    while !id.is_char_boundary(len) {
        len -= 1;
    }
    format!("{}{suffix}", &id[..len])
}

#[cfg(test)]
mod tests {
    use super::super::Net;
    use super::super::tests::{fake_tap, frame, options};
    use super::*;

    #[test]
    fn what_is_released_at_the_end_still_leaves() {
        let net = Net::new(options(1)).unwrap();
        let (tap, world) = fake_tap();
        let worker = Worker::new(&net.shared, 0, &[tap as Arc<dyn TapQueue>]).unwrap();
        net.gate().hold();
        for seed in 0..4 {
            net.gate().push(0, frame(seed, 60)).unwrap();
        }
        net.gate().seal(1);
        net.gate().push(0, frame(9, 60)).unwrap();
        net.gate().commit(1);
        // The VM ends before the thread has seen it.
        net.shared.stop.store(true, Ordering::SeqCst);
        worker.run();
        for seed in 0..4 {
            assert_eq!(world.try_receive(), Some(frame(seed, 60)));
        }
        assert_eq!(world.try_receive(), None, "held");
    }

    #[test]
    fn a_thread_is_named_after_its_device_and_pair() {
        assert_eq!(thread_name("_net0", 1), "_net0_qp1");
        assert_eq!(thread_name("a-network-card-of-mine", 12), "a-network-_qp12");
        assert_eq!(thread_name("ääääääää", 0).len(), 14);
    }
}
