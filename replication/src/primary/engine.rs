//! The primary's engine: carries out what [`crate::protocol::primary`] decides.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use api::replication::{Cow, Degrade, ReplicateData};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};

use super::disk::{self, DiskError, DiskSender};
use super::in_flight::{InFlight, InFlights};
use super::patience::{Patience, Verdict};
use super::rest::{self, Rest};
use super::seal::{Pause, Sealer};
use super::send::{Job, Senders, Sent, Source};
use super::session::Session;
use crate::capture::epoch::Cadence;
use crate::checking::reach;
use crate::disk::{Disks, Journal};
use crate::engine::arbiter::{Asker, Next, Report as Asked};
use crate::engine::clock;
use crate::engine::control::{Control, Credit, Greeted, Pace, Progress};
use crate::engine::heard::Heard;
use crate::engine::status::Status;
use crate::error::Error;
use crate::guest::{Guest, Waker};
use crate::ids::{EpochId, Generation, PAGE_SIZE};
use crate::observer::{Event as Told, Observer};
use crate::ownership::{HostId, HostIdentity, Record, Seen, Standing};
use crate::protocol::ownership::{Claim, Verdict as Owner};
use crate::protocol::primary::{Action, Event, IN_FLIGHT_MAX, Primary, Purpose, Report, State};
use crate::protocol::window::Approach;
use crate::transport::rdma;
use crate::wire::{Message, SessionId, Welcome, WireError};
use begin::{Around, Copied, Crew};
pub(super) use begin::{Begin, Called, Ended, call};
use braking::Braking;
use held::Held;
use straight::Copying;

/// Passes of a copy after which the rest goes into the first epoch, however large. Each leaves half of the
/// one before, see [`crate::capture::brake`].
const PASSES_MAX: u32 = 24;
/// A rest that an epoch takes without a long pause.
const REST_PAGES: u64 = 4096;
/// Copies anew for epochs that were too large, without as many good epochs in between, after
/// which it is no accident.
const TOO_LARGE_MAX: u32 = 3;
const GOOD_EPOCHS: u32 = 100;
/// How many time-outs a backup that has the last epoch of a switch-over may take until it runs the VM.
const HANDOVER_TIMEOUTS: u32 = 5;

/// Least staging with disks: the log's quarter holds one change of the largest kind, and another
/// beside it.
const DISK_STAGING_BYTES_MIN: u64 = 9 << 20;
/// Most bytes of an epoch's log of the disks.
const LOG_BYTES_MAX: u64 = 64 << 20;

/// What a person asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    /// `decides`: whoever asks has seen that nobody else can say whose the VM is, and says that it is this host's. Not
    /// so where that came about on the way here, nor where the VM ends.
    Stop { decides: bool },
    /// `reverses`: this host can be the VM's backup from then on, where the options want it to.
    Failover { reverses: bool },
}

/// Everything that reaches the engine.
pub(super) enum Input {
    /// The credit goes back to the reader once the message was dealt with.
    Message(Message, Credit),
    /// The control connection ended.
    Lost(WireError),
    Sent(Sent),
    Disk(disk::Sent),
    /// Some more of guest memory is registered.
    Lending,
    /// Guest memory is registered, or is not.
    Lent(Result<(), rdma::LendError>),
    Arbiter(Asked),
    Output,
    /// How a call of the backup went.
    Called(Box<Result<Called, Error>>),
    Ask(Ask, Sender<Result<(), Error>>),
}

/// What the engine is busy with beside waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    Nothing,
    /// Memory is registered, on both sides, so that a copy can go, or go on, straight into the backup's.
    Opening,
    /// A pass of a copy is under way.
    Copying {
        pass: u32,
        pages: u64,
        since: Instant,
    },
    /// Memory is copied; the disks are not yet, or the memory is not registered.
    AwaitingRest,
    /// It makes its memory its own again; this pass is next.
    Shutting {
        pass: u32,
    },
    /// Paired, and the blocks that were written meanwhile are copied.
    Settling,
    /// Changes of disks are logged, and the last blocks are sent.
    Rest,
    /// The guest stands still while what does not fit the first epoch goes into the image.
    Surplus,
    Epochs,
}

/// Why a connection ended that is not the control connection.
enum Ending {
    /// Of those that may go by RDMA.
    Pages(WireError),
    /// That of the disks, which goes by TCP.
    Disks(WireError),
}

pub(super) struct Engine<'g, G: Guest> {
    guest: Held<'g, G>,
    options: ReplicateData,
    identity: HostIdentity,
    backup: HostId,
    machine: Primary,
    observer: Arc<dyn Observer>,
    status: Status,
    queue: Receiver<Input>,
    /// Keeps the queue open when every other sender is gone.
    inputs: Sender<Input>,
    asker: Asker,
    control: Option<Control>,
    senders: Option<Senders>,
    disks: Option<DiskSender>,
    /// Number of the disks' copy that is out last, and whether it is under way.
    disk_job: u64,
    disks_copy: bool,
    /// What lends guest memory to the connections, until it does; what it lends, and whether it is
    /// at it.
    lender: Option<rdma::Lender>,
    lent: Option<Arc<rdma::Lent>>,
    lending: bool,
    /// What the next session may find of it, and until when that is waited for.
    registered: Option<(rdma::Kept, Instant)>,
    /// The writing of the backup's memory, what of the copy goes so, and until when the backup is to
    /// answer.
    approach: Approach,
    straight: Option<Copying>,
    /// The backup's memory, where it is opened, reads as zero: nothing was sent before that.
    opens_zero: bool,
    window_due: Option<Instant>,
    log_bytes_max: u64,
    heard: Heard,
    /// What the backup says it has done.
    done: Arc<AtomicU64>,
    cadence: Cadence,
    sealer: Sealer,
    /// Of the pass of a copy, after the first.
    braking: Option<Braking>,
    /// How long the guest had waited for room at the last seal.
    waited: Duration,
    work: Work,
    /// Number of the job that is out, and senders that still work on it.
    job: u64,
    unsent: usize,
    /// What stands to be sealed does not fit beside what is in flight.
    awaits_room: bool,
    in_flight: InFlights,
    sealed: EpochId,
    id: SessionId,
    /// The generation of the present epochs.
    paired: Generation,
    /// The tracking of dirty pages goes on from an earlier session.
    is_tracking: bool,
    last_seal: Instant,
    /// When the dirty set was looked at last without a seal.
    last_look: Instant,
    /// Nothing was sent to this backup yet.
    fresh: bool,
    first: bool,
    handover: bool,
    /// The state of the last epoch of a switch-over that reverses the pair.
    last_state: Option<Vec<u8>>,
    /// The session goes on from a pair that was reversed.
    is_reversed: bool,
    too_large: u32,
    good: u32,
    output: Arc<AtomicBool>,
    patience: Patience,
    retry_at: Option<Instant>,
    /// Without an arbiter, once nobody reads the memory of a guest that stands: the VM is this host's, with this
    /// generation.
    owned_when_sent: Option<Generation>,
    /// Why a data connection ended, and until when the control connection may tell more.
    data_lost: Option<(Ending, Instant)>,
    /// TCP may carry the data instead of RDMA, and why it is to.
    falls_back: bool,
    no_rdma: Option<String>,
    /// Until when the backup, which may be well, hears this side while it is claimed from.
    claim_due: Option<Instant>,
    /// Until when a backup that has the last epoch of a switch-over is to run the VM.
    handover_due: Option<Instant>,
    /// What this process knows of the record.
    seen: Seen,
    undecided_told: bool,
    /// What is being asked by a person.
    asking: Option<Ask>,
    stop_answer: Vec<Sender<Result<(), Error>>>,
    failover_answer: Vec<Sender<Result<(), Error>>>,
}

impl<'g, G: Guest> Engine<'g, G> {
    /// Starts the threads of a session.
    pub(super) fn open(
        guest: &'g mut G,
        called: Called,
        identity: HostIdentity,
        (observer, status): (Arc<dyn Observer>, Status),
        (inputs, queue): (Sender<Input>, Receiver<Input>),
        begin: Begin,
        (rest, seen): (&mut Option<Rest>, Seen),
    ) -> Result<Self, Error> {
        let Called { options, arbiter, generation, session } = called;
        let Session { id, control, data, disks, lender, backup, welcome } = session;
        let heard = Heard::new();
        let deliver = inputs.clone();
        let asker =
            Asker::start(arbiter, move |report| deliver.send(Input::Arbiter(report)).is_ok())?;
        let done = Arc::<AtomicU64>::default();
        let theirs = Progress { ours: None, theirs: Arc::clone(&done) };
        let control = Self::listen(control, &options, &heard, theirs, inputs.clone())?;
        let ram = guest.ram();
        let deliver = inputs.clone();
        let deliver = move |sent| deliver.send(Input::Sent(sent)).is_ok();
        let senders = Senders::start(data, &ram, options.compression, &status.counters, deliver)?;
        let from = (begin.machine(asker.exists(), generation), rest);
        let disks = guest.disks().zip(disks);
        let around = Around { identity, backup, observer, status, seen };
        let crew = Crew { id, queue, inputs, asker, control, senders, heard, done, lender };
        Self::around(Held::Lent(guest), options, from, &welcome, around, crew, disks)
    }

    /// An engine of a session whose crew is at work.
    pub(super) fn around(
        mut guest: Held<'g, G>,
        options: ReplicateData,
        (machine, rest): (Primary, &mut Option<Rest>),
        welcome: &Welcome,
        around: Around,
        crew: Crew,
        disks: Option<Copied>,
    ) -> Result<Self, Error> {
        let Around { identity, backup, observer, status, seen } = around;
        let Crew { id, queue, inputs, asker, control, senders, heard, done, lender } = crew;
        let falls_back = lender.is_some() && options.fallback && options.reconnect;
        let millis = Duration::from_millis;
        let (shortest, longest) = (millis(options.epoch_min_ms), millis(options.epoch_ms));
        let stretched = options.epoch_max_ms.map(millis);
        let staging = welcome.staging_bytes;
        let log_bytes_max = if disks.is_some() { log_share(staging)? } else { 0 };
        let cadence = Cadence::new(shortest, longest, stretched, staging - log_bytes_max);
        let patience = Patience::new(millis(options.timeout_ms), clock::now());
        let (output, waker) = Self::wake_by(&mut guest, inputs.clone());
        let ram = guest.ram();
        let pages = ram.pages();
        let device = lender.as_ref().map_or(millis(options.timeout_ms), rdma::Lender::patience);
        let mut sealer = Sealer::new(ram, options.cow, cadence.staging_pages(), device)?;
        let disks = match disks {
            Some((disks, writer)) => {
                let journal = journal(&disks, waker);
                sealer.journal = Some(Arc::clone(&journal));
                let deliver = inputs.clone();
                let deliver = move |sent| deliver.send(Input::Disk(sent)).is_ok();
                let counters = &status.counters;
                Some(DiskSender::start(disks, journal, writer, counters, deliver)?)
            }
            None => None,
        };
        // Not before nothing can fail: whoever calls next goes on from it, or ends the tracking.
        let rest = rest.take();
        let is_tracking = rest.is_some();
        let has_base = rest::go_on(rest, welcome.has_base, &mut sealer.dirty);
        let is_reversed = machine.state() == State::Calling;
        Ok(Self {
            sealer,
            disks,
            id,
            paired: Generation(0),
            is_tracking,
            disk_job: 0,
            disks_copy: false,
            lent: lender.as_ref().map(rdma::Lender::lent),
            lender,
            lending: false,
            registered: None,
            approach: Approach::default(),
            straight: None,
            opens_zero: false,
            window_due: None,
            log_bytes_max,
            sealed: machine.committed(),
            machine,
            guest,
            options,
            identity,
            backup,
            observer,
            status,
            queue,
            inputs,
            asker,
            control: Some(control),
            senders: Some(senders),
            heard,
            done,
            cadence,
            braking: None,
            waited: Duration::ZERO,
            work: Work::Nothing,
            job: 0,
            unsent: 0,
            awaits_room: false,
            in_flight: InFlights::new(pages),
            last_seal: clock::now(),
            last_look: clock::now(),
            fresh: !has_base,
            // Nothing goes straight into an image that is a committed epoch's.
            first: !is_reversed,
            handover: false,
            last_state: None,
            is_reversed,
            too_large: 0,
            good: GOOD_EPOCHS,
            output,
            patience,
            retry_at: None,
            owned_when_sent: None,
            data_lost: None,
            falls_back,
            no_rdma: None,
            claim_due: None,
            handover_due: None,
            seen,
            undecided_told: false,
            asking: None,
            stop_answer: vec![],
            failover_answer: vec![],
        })
    }

    fn listen(
        greeted: Greeted,
        options: &ReplicateData,
        heard: &Heard,
        progress: Progress,
        inputs: Sender<Input>,
    ) -> Result<Control, Error> {
        let millis = Duration::from_millis;
        let pace =
            Pace { heartbeat: millis(options.heartbeat_ms), linger: millis(options.timeout_ms) };
        Control::start(greeted, pace, heard.clone(), progress, move |word, credit| {
            let input = match word {
                Ok(message) => Input::Message(message, credit),
                Err(error) => Input::Lost(error),
            };
            inputs.send(input).is_ok()
        })
    }

    /// The flag that waiting output raises, once for each seal, and who raises it.
    fn wake_by(guest: &mut Held<'g, G>, inputs: Sender<Input>) -> (Arc<AtomicBool>, Waker) {
        let output = Arc::new(AtomicBool::new(false));
        let waiting = Arc::clone(&output);
        let waker = Waker::new(move || {
            if !waiting.swap(true, Ordering::AcqRel) {
                // An engine that has ended holds nothing.
                let _ = inputs.send(Input::Output);
            }
        });
        guest.set_output_waker(waker.clone());
        (output, waker)
    }

    /// Works until the session ends one way or another. `None` if that was the last one.
    pub(super) fn run(mut self) -> Option<Ended> {
        self.begin();
        while !self.is_over() {
            match self.queue.recv_deadline(self.deadline()) {
                Ok(input) => self.input(input),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    unreachable!("the engine holds a sender itself")
                }
            }
            // What is over has nothing due, and must not stop the guest once more.
            if !self.is_over() {
                self.timers();
            }
        }
        self.ended()
    }

    /// What there is to do before anything is heard.
    fn begin(&mut self) {
        // Of a VM that was alone the state is another one from here on.
        self.show();
        let started = if self.is_tracking { Ok(()) } else { self.guest.start_tracking() };
        match started.map_err(|source| Error::Guest { what: "track dirty pages", source }) {
            Ok(()) if self.is_reversed => self.step(Event::Reached),
            Ok(()) => {
                if let Some(disks) = &self.disks {
                    disks.attach();
                }
                self.begin_copy();
                // Not before: it touches all pages, and those that were never touched are not copied.
                self.lend();
            }
            Err(error) => self.step(Event::GiveUp(error.chain())),
        }
    }

    /// What the next session has of this one, if there may be one.
    fn ended(mut self) -> Option<Ended> {
        let goes_on = self.options.reconnect && self.machine.may_go_on();
        let no_rdma = self.no_rdma.take();
        self.end_lent();
        let registered = self.registered.take().map(|(kept, _)| kept);
        let rest = self.end(goes_on);
        goes_on.then_some(Ended { rest, no_rdma, registered })
    }

    pub(super) fn is_over(&self) -> bool {
        use State::{Alone, Failed, Gone, Heir, Stopped};
        matches!(self.machine.state(), Alone | Gone | Heir | Stopped | Failed)
    }

    fn timeout(&self) -> Duration {
        Duration::from_millis(self.options.timeout_ms)
    }

    /// The next moment at which something is to be done without an input.
    fn deadline(&self) -> Instant {
        let silence = self.heard.deadline(self.timeout());
        let mut next = match self.control {
            Some(_) => silence,
            // Nobody is listened to: the clock matters to a claim only.
            None => clock::now() + Duration::from_secs(3600),
        };
        next = next.min(self.retry_at.unwrap_or(next));
        next = next.min(self.window_due.unwrap_or(next));
        next = next.min(self.claim_due.unwrap_or(next));
        next = next.min(self.handover_due.unwrap_or(next));
        next = next.min(self.data_lost.as_ref().map_or(next, |(_, until)| *until));
        next = next.min(self.registered.as_ref().map_or(next, |(_, until)| *until));
        if self.awaits_peer() {
            next = next.min(self.patience.deadline());
        }
        if self.work == Work::Epochs {
            next = next.min(self.seal_due());
        }
        next = next.min(self.brake_due().unwrap_or(next));
        next
    }

    /// Whether the peer has something to take, to acknowledge or to answer.
    fn awaits_peer(&self) -> bool {
        let busy = self.unsent > 0
            || !self.in_flight.is_empty()
            || self.disks_copy
            || self.machine.awaits_ready();
        // One to which nothing comes has nothing to take.
        self.control.is_some() && busy && self.no_rdma.is_none()
    }

    /// A peer whose heart beats but that takes nothing and acknowledges nothing is no backup, whatever
    /// it says that it does.
    fn is_given_up(&mut self) -> Option<(Verdict, String)> {
        let now = clock::now();
        if !self.awaits_peer() {
            self.patience.nothing_due(now);
            return None;
        }
        let counters = &self.status.counters;
        let zeroes = counters.synced_disk_bytes.load(Ordering::Relaxed);
        let sent = counters.wire_bytes.load(Ordering::Relaxed).wrapping_add(zeroes);
        let seen = sent.wrapping_add(self.machine.committed().0);
        let said = self.done.load(Ordering::Relaxed);
        let touched = self
            .in_flight
            .iter()
            .map(|epoch| (epoch.pages * PAGE_SIZE as u64).saturating_add(epoch.touched_bytes));
        // Acknowledged changes wait for the images, too, up to as much as a log may have.
        let mut bytes = touched.fold(self.log_bytes_max, u64::saturating_add);
        if !self.machine.is_protected() {
            // Zeroes of a copy are few bytes on the wire and may be many on an image.
            bytes = bytes.saturating_add(zeroes);
        }
        self.patience.look(now, seen, said, bytes);
        let verdict = self.patience.verdict(now);
        let reason = match verdict {
            Verdict::Waits => return None,
            Verdict::Stalled if self.machine.awaits_ready() => {
                "The backup lives but does not get ready for a copy anew".to_owned()
            }
            Verdict::Stalled => {
                "The backup lives but neither takes nor acknowledges an epoch".to_owned()
            }
            Verdict::OnlyWords => {
                let seconds = self.patience.word().as_secs();
                format!(
                    "The backup says that it goes on, but took and acknowledged nothing for \
                     {seconds} s"
                )
            }
        };
        Some((verdict, reason))
    }

    fn output_waiting(&self) -> bool {
        self.output.load(Ordering::Acquire)
            || (self.in_flight.is_empty() && self.guest.output_waiting())
    }

    /// Whether another epoch may be sealed now. Not before all of the last one is out: what waits
    /// behind it on the link is better gathered in one epoch.
    fn may_seal(&self) -> bool {
        let sent = self.unsent == 0 && self.options.cow != Cow::Off && !self.first;
        let room = (self.in_flight.len() as u64) < IN_FLIGHT_MAX;
        self.in_flight.is_empty() || sent && room && !self.handover
    }

    /// When to seal, or, while that may not be, when to look at the dirty set.
    fn seal_due(&self) -> Instant {
        let far = || clock::now() + Duration::from_secs(3600);
        if !self.in_flight.is_empty() && self.sealer.stands() {
            // The guest waits: as soon as it may be, and not before there is room.
            return if self.may_seal() && !self.awaits_room { self.last_seal } else { far() };
        }
        let look = self.last_seal.max(self.last_look) + self.cadence.look();
        if !self.may_seal() {
            return look;
        }
        let waits = self.output_waiting();
        let seal = self.last_seal + self.cadence.interval(waits);
        if !waits && self.cadence.is_stretched() { seal.min(look) } else { seal }
    }

    fn input(&mut self, input: Input) {
        match input {
            Input::Message(message, _credit) => self.message(message),
            Input::Lost(error) => self.lost(error),
            Input::Sent(Ok(number)) if number == self.job => {
                self.unsent -= 1;
                if self.unsent == 0 {
                    self.sent();
                }
            }
            Input::Sent(Ok(_)) | Input::Output | Input::Called(_) => {}
            Input::Sent(Err(error)) => self.data_lost(error, Ending::Pages),
            Input::Disk(Ok(number)) if number == self.disk_job => self.disks_copied(),
            Input::Disk(Ok(_)) => {}
            Input::Disk(Err(DiskError::Wire(error))) => self.data_lost(error, Ending::Disks),
            Input::Disk(Err(error)) => self.step(Event::GiveUp(crate::error::chain(&error))),
            Input::Lending => self.approached(),
            Input::Lent(lent) => self.was_lent(lent),
            Input::Arbiter(report) => {
                if let Some(error) = &report.error {
                    self.arbiter_failed(error);
                }
                let next = self.asker.report(&report);
                if report.is_gone && self.is_unfounded(&next) {
                    let reason = report.error.unwrap_or_default();
                    return self.step(Event::PeerLost(format!(
                        "{reason} Nobody but this host knows of that one: protection begins anew"
                    )));
                }
                self.claim_went(next);
            }
            Input::Ask(ask, answer) => self.asked(ask, answer),
        }
    }

    /// A data connection ended. The control connection tells more, if it ends too: it has the first
    /// word, for a while. A device that fails, or one connection of several, takes no other with it.
    fn data_lost(&mut self, error: WireError, of: fn(WireError) -> Ending) {
        if !error.is_loss() {
            return self.lost(error);
        }
        tracing::info!("a data connection ended: {}", crate::error::chain(&error));
        self.data_lost.get_or_insert((of(error), clock::now() + self.timeout()));
    }

    /// The backup lives, and data does not come to it by RDMA.
    fn fall_back(&mut self, reason: String) {
        if self.no_rdma.is_some() {
            return;
        }
        self.no_rdma = Some(reason.clone());
        self.claim_due = Some(clock::now() + self.timeout());
        self.step(Event::DataLost(reason));
        if self.options.cow == Cow::Off {
            // Nothing comes of what they send, and a guest may stand for it.
            self.end_senders();
        }
    }

    /// The arbiter has not said whose the VM is. Should this host not reach it, the backup may: it is heard
    /// that nobody is here any more, and claims.
    fn claim_late(&mut self) {
        let is_claiming = self.machine.state() == State::Claiming(Purpose::PeerLost);
        if is_claiming && self.control.is_some() {
            tracing::warn!("the arbiter does not answer in time: the backup may take over");
            self.step(Event::PeerLost("The arbiter does not answer in time".to_owned()));
        }
    }

    /// The backup lives, has the last epoch, and does not run the VM: it may never, and a person may want it
    /// here. With an arbiter that says whose it is.
    fn handover_late(&mut self) {
        if self.machine.state() == State::HandingOver {
            let seconds = (self.timeout() * HANDOVER_TIMEOUTS).as_secs_f32();
            let what = format!("The backup did not take the VM over within {seconds:.1} s");
            self.step(Event::HandoverLate(what));
        }
    }

    fn lost(&mut self, error: WireError) {
        if self.control.is_some() {
            let error = match error {
                WireError::Closed => "The backup closed the connection".to_owned(),
                other => Error::Wire(other).chain(),
            };
            self.step(Event::PeerLost(error));
        }
    }

    fn message(&mut self, message: Message) {
        match message {
            Message::Ack { epoch, generation } => self.acked(epoch, generation),
            Message::Abort(reason) => {
                let reason = Error::PeerAborted(reason).chain();
                self.step(Event::PeerLost(reason));
            }
            Message::Refuse(reason) => {
                self.step(Event::Refused(format!("The backup refuses it: {reason}")));
                // Nothing is waited for: a backup that lives is listened to until the VM is owned.
                self.in_flight.forget();
                self.refused();
            }
            Message::ResyncReady => self.step(Event::ResyncReady),
            Message::StopDone => {}
            Message::WindowOpen { number, grants } => self.window_opened(number, &grants),
            Message::WindowNone { number, reason } => self.window_refused(number, &reason),
            Message::WindowClosed(number) => self.window_closed(number),
            Message::HandedOver { generation, reversed } => {
                self.step(Event::HandedOver { generation, reversed });
            }
            other => {
                let found = other.kind();
                let error = WireError::Unexpected { found, expected: "an acknowledgement" };
                self.lost(error);
            }
        }
    }

    /// A switch-over that the backup refuses is over before anything of it was acknowledged. The guest
    /// runs, unheard, while the arbiter is asked, and should that not answer in time the backup may claim.
    fn refused(&mut self) {
        if matches!(self.machine.state(), State::Claiming(_)) {
            self.handover = false;
            self.claim_due.get_or_insert(clock::now() + self.timeout());
            self.go_on_in_doubt();
        }
    }

    fn acked(&mut self, epoch: EpochId, generation: Generation) {
        self.sealer.delays.at("ack");
        self.step(Event::Acked { epoch, generation });
        reach("acked");
        // One that was refused took the session with it.
        if self.machine.in_flight() >= self.in_flight.len() as u64 {
            return;
        }
        self.awaits_room = false;
        if let Some(in_flight) = self.in_flight.acked() {
            let mut gathered = self.status.lock();
            gathered.commit_us.add_time(clock::since(in_flight.sealed_at));
            drop(gathered);
            self.sealer.recycle(in_flight.set);
            self.good = self.good.saturating_add(1);
            if self.good >= GOOD_EPOCHS {
                self.too_large = 0;
            }
        }
        // With cow=off the guest stands until the senders say that all is out, which an
        // acknowledgement may overtake: there is nothing to seal then.
        let sending = self.options.cow == Cow::Off && self.unsent > 0;
        let handover = self.handover && self.in_flight.is_empty();
        let waits = self.sealer.stands() && !sending && !self.handover && self.may_seal();
        if self.work == Work::Epochs && (handover || waits) {
            self.seal();
        }
    }

    fn timers(&mut self) {
        let now = clock::now();
        if self.control.is_some() && self.heard.is_silent(self.timeout(), self.timeout() / 2) {
            let silent_ms = self.options.timeout_ms;
            self.step(Event::PeerLost(Error::Silent { silent_ms }.chain()));
        }
        if let Some((ending, _)) = self.data_lost.take_if(|(_, until)| *until <= now) {
            match ending {
                Ending::Pages(error) if self.falls_back && self.control.is_some() => {
                    self.fall_back(Error::Wire(error).chain());
                }
                Ending::Pages(error) | Ending::Disks(error) => self.lost(error),
            }
        }
        if let Some((verdict, reason)) = self.is_given_up() {
            // One that has all and does not acknowledge it would not by TCP.
            match self.falls_back && verdict == Verdict::Stalled && self.unsent > 0 {
                true => self.fall_back(reason),
                false => self.step(Event::PeerLost(reason)),
            }
        }
        if self.claim_due.take_if(|due| *due <= now).is_some() {
            self.claim_late();
        }
        if self.handover_due.take_if(|due| *due <= now).is_some() {
            self.handover_late();
        }
        if self.window_due.take_if(|due| *due <= now).is_some() {
            self.window_late();
        }
        if self.retry_at.is_some_and(|at| at <= now) {
            self.retry_at = None;
            let next = self.asker.timer();
            self.claim_went(next);
        }
        if self.work == Work::Epochs && self.seal_due() <= now {
            self.due();
        }
        if self.brake_due().is_some_and(|due| due <= now) {
            self.brake();
        }
        self.unregister_late(now);
    }

    fn tell(&self, message: Message) {
        if let Some(control) = &self.control {
            control.send(message);
        }
    }

    fn asked(&mut self, ask: Ask, answer: Sender<Result<(), Error>>) {
        self.asking = Some(ask);
        match ask {
            Ask::Stop { decides } => {
                self.stop_answer.push(answer);
                if !decides && self.machine.state() == State::Undecided {
                    let what = "The protection cannot be ended: a switch-over was cut off, and nobody but a \
                                person can say which host runs the VM (Suspended): if it is this one, stop \
                                the replication here";
                    self.refuse(what.to_owned());
                } else {
                    self.step(Event::StopAsked);
                }
            }
            Ask::Failover { reverses } => {
                self.failover_answer.push(answer);
                let reversal = if reverses { self.reversal() } else { None };
                self.step(Event::FailoverAsked { reversal });
            }
        }
        self.asking = None;
    }

    /// Why the request that is being looked at is not carried out.
    fn refuse(&mut self, reason: String) {
        let answer = match self.asking {
            Some(Ask::Stop { .. }) => self.stop_answer.pop(),
            Some(Ask::Failover { .. }) => self.failover_answer.pop(),
            None => None,
        };
        if let Some(answer) = answer {
            // A caller that stopped waiting needs no answer.
            let _ = answer.send(Err(Error::Conflict(reason)));
        }
    }

    /// The record with which the backup makes a pair of itself and this side; `None` where it is to own
    /// the VM alone: nobody wants it back, or this side could not be the backup at once.
    fn reversal(&self) -> Option<Record> {
        self.options.return_url.as_ref()?;
        let why = if !self.asker.exists() {
            "there is no arbiter"
        } else if self.disks.is_some() {
            "the images of its disks have to be copied"
        } else if self.lent.is_some() {
            "guest memory has to be registered with the RDMA device"
        } else {
            let generation = self.machine.generation().next();
            let standing = Standing::Pair { primary: self.backup, backup: self.identity.host };
            return Some(Record { generation, vm: self.identity.vm, standing });
        };
        tracing::info!("the VM is unprotected at first where it goes: {why}");
        None
    }

    fn arbiter_failed(&mut self, error: &str) {
        self.status.failed(error);
        if !std::mem::replace(&mut self.undecided_told, true) {
            self.observer.event(Told::Undecided { error: error.to_owned() });
        }
    }

    /// Whether a pair is asked for in place of a record that no backup has seen, which may never have been where it is
    /// asked: in an empty mount point, say. To wait for it would be for ever, and nobody has anything of this session.
    fn is_unfounded(&self, next: &Next) -> bool {
        matches!(next, Next::Wait { .. })
            && self.machine.state() == State::Pairing
            && self.seen.generation() < self.machine.generation()
    }

    fn claim_went(&mut self, next: Next) {
        match next {
            Next::Call(..) | Next::Nothing | Next::Record(_) | Next::ReadFailed => {}
            Next::Wait { ms } => self.retry_at = Some(clock::now() + Duration::from_millis(ms)),
            Next::Decided(verdict) => {
                self.undecided_told = false;
                self.step(Event::of(verdict, self.identity));
            }
        }
    }

    /// Asks the arbiter; without one the backup never takes over by itself, so this side owns.
    fn claim(&mut self, expected: Generation, standing: Standing) {
        let generation = expected.next();
        if !self.asker.exists() {
            // Nobody says so with a record: what senders make of an epoch while the guest runs the backup might
            // take for whole, and be told by a person to go on from.
            if self.options.cow == Cow::Off && self.unsent > 0 {
                self.owned_when_sent = Some(generation);
                return;
            }
            return self.step(Event::Verdict(Owner::Owned(generation)));
        }
        let next = Record { generation, vm: self.identity.vm, standing };
        let (claim, first) = Claim::new(expected, next);
        let next = self.asker.begin(claim, first);
        self.claim_went(next);
    }
}

/// The part of the backup's staging that is the disks'.
fn log_share(staging_bytes: u64) -> Result<u64, Error> {
    if staging_bytes < DISK_STAGING_BYTES_MIN {
        return Err(Error::Unfit(format!(
            "staging_size is {staging_bytes} bytes there, and a VM with disks needs \
             {DISK_STAGING_BYTES_MIN} at least"
        )));
    }
    Ok((staging_bytes / 4).min(LOG_BYTES_MAX))
}

fn journal(disks: &Arc<dyn Disks>, on_full: Waker) -> Arc<Journal> {
    // Weak: the disks hold the journal.
    let waits = Arc::downgrade(disks);
    let on_room = Waker::new(move || {
        if let Some(disks) = waits.upgrade() {
            disks.wake();
        }
    });
    Arc::new(Journal::new(&disks.sizes_bytes(), on_full, on_room))
}

mod actions;
mod begin;
mod braking;
mod epochs;
mod held;
mod lending;
#[cfg(any(test, feature = "testing"))]
pub mod simulated;
mod straight;
