//! The backup's engine, as far as order matters: after `backup/engine.rs`.

use std::collections::VecDeque;

use replication::VmId;
use replication::ids::{EpochId, Generation};
use replication::ownership::{HostId, HostIdentity, Record, Standing};
use replication::protocol::asking::{Asking, Next};
use replication::protocol::backup::{Action, Backup, Event, Handover, State};
use replication::protocol::ownership::{self as claim, Claim, Verdict};
use replication::protocol::primary::IN_FLIGHT_MAX;

use super::{Around, Effect, Message, Seal, asked, misread, primary};
use crate::broken::Broken;
use crate::vm::Replicated;

/// What reaches the engine.
#[derive(Clone, Debug)]
pub enum Input<C> {
    /// A primary's connection, and the machine that was built for it.
    Arrival(HostIdentity),
    Message(Message<C>),
    /// The pages of the epoch that is due are here.
    Whole,
    /// The connection ended, or was silent for too long; the primary's process ended.
    Lost,
    /// An image of a disk cannot be written.
    ImageFailed,
    /// The same, found out when all of it has to be there.
    Spoiled,
    /// The machine will not start.
    Doomed,
    /// The host lacks what the machine needs, and knows it.
    Lacking,
    Stop,
    Failover {
        force: bool,
    },
    Answer(u64, claim::Event),
    Timer,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Session<C> {
    primary: HostId,
    /// Seals whose epoch is not acknowledged, in their order.
    seals: VecDeque<Seal<C>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Engine<V: Replicated> {
    pub machine: Backup,
    me: HostId,
    vm: Option<VmId>,
    arbiter: bool,
    asking: Asking,
    session: Option<Session<V::Content>>,
    image: Option<V::Image>,
    /// The last acknowledged machine state, and whether it is the last of a switch-over.
    state: Option<(EpochId, bool)>,
    /// Kept for one broken rule only.
    before: Option<(V::Image, (EpochId, bool))>,
    verified: Option<Seal<V::Content>>,
    pairing: Option<Generation>,
    spoiled: bool,
    doomed: bool,
    lacking: bool,
    /// The new primary of a pair that was reversed, whose backup this is.
    heir_of: Option<HostId>,
    /// What was started is the primary of such a pair, with this backup.
    reversed: Option<(HostId, Generation, EpochId)>,
    pub waits: bool,
}

impl<V: Replicated> Engine<V> {
    #[must_use]
    pub fn new(me: HostId, arbiter: bool) -> Self {
        Self {
            machine: Backup::new(arbiter),
            me,
            vm: None,
            arbiter,
            asking: Asking::default(),
            session: None,
            image: None,
            state: None,
            before: None,
            verified: None,
            pairing: None,
            spoiled: false,
            doomed: false,
            lacking: false,
            heir_of: None,
            reversed: None,
            waits: false,
        }
    }

    /// What an old primary is from the moment that the pair is reversed.
    #[must_use]
    pub fn heir(identity: HostIdentity, before: &primary::Engine, image: V::Image) -> Self {
        let (generation, epoch) = (before.machine.generation(), before.sealed());
        Self {
            machine: Backup::heir(generation, epoch),
            vm: Some(identity.vm),
            image: Some(image),
            state: Some((epoch, true)),
            heir_of: Some(before.backup()),
            ..Self::new(identity.host, true)
        }
    }

    /// Whose call it awaits, as the backup of a reversed pair.
    #[must_use]
    pub fn awaits(&self) -> Option<HostId> {
        let awaits = self.machine.state() == State::Heir && self.session.is_none();
        self.heir_of.filter(|_| awaits)
    }

    /// The backup of the pair that this side has become the primary of, its generation, and the epoch
    /// that it began from.
    #[must_use]
    pub fn reversed(&self) -> Option<(HostId, Generation, EpochId)> {
        self.reversed.filter(|_| self.machine.state() == State::TakenOver)
    }

    #[must_use]
    pub fn is_over(&self) -> bool {
        matches!(self.machine.state(), State::TakenOver | State::Stopped)
    }

    #[must_use]
    pub fn is_receiving(&self) -> bool {
        matches!(self.machine.state(), State::Syncing | State::Replica | State::Heir)
    }

    /// Whose session this is.
    #[must_use]
    pub fn primary(&self) -> Option<HostId> {
        self.session.as_ref().map(|session| session.primary)
    }

    /// Whether what it has can be started.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        !self.spoiled && !self.doomed
    }

    /// Whether it would be looked at if the pages of the epoch that is due arrived.
    #[must_use]
    pub fn awaits_pages(&self) -> bool {
        self.pairing.is_none()
            && self.is_receiving()
            && self.session.as_ref().is_some_and(|session| !session.seals.is_empty())
    }

    /// Whether a primary would be welcome.
    #[must_use]
    pub fn welcomes(&self, vm: VmId) -> bool {
        match self.machine.state() {
            State::Idle => true,
            State::Orphan => self.vm == Some(vm),
            _ => false,
        }
    }

    pub fn input(&mut self, input: Input<V::Content>, around: &mut Around<'_, V>) {
        match input {
            Input::Arrival(primary) if self.welcomes(primary.vm) => {
                self.step(Event::Accepted, around);
                self.vm = Some(primary.vm);
                self.image = Some(V::Image::default());
                self.session = Some(Session { primary: primary.host, seals: VecDeque::default() });
            }
            Input::Arrival(primary) if self.awaits() == Some(primary.host) => {
                self.step(Event::Accepted, around);
                self.session = Some(Session { primary: primary.host, seals: VecDeque::default() });
            }
            Input::Message(message) if self.session.is_some() => self.message(message, around),
            Input::Whole if self.awaits_pages() => self.verify(around),
            Input::Whole if around.broken == Some(Broken::AckAfterSuspecting) => {
                if self.machine.state() == State::Claiming
                    && let Some(session) = &mut self.session
                    && let Some(Seal { epoch, generation, .. }) = session.seals.pop_front()
                {
                    around.send(Message::Ack { epoch, generation });
                }
            }
            Input::Lost if self.session.is_some() || self.awaits().is_some() => {
                self.step(Event::Lost("lost".into()), around)
            }
            Input::ImageFailed => self.image_failed(around),
            Input::Spoiled => self.spoiled = true,
            Input::Doomed => self.doomed = true,
            Input::Lacking => self.lacking = true,
            Input::Stop if matches!(self.machine.state(), State::Claiming | State::Starting) => {}
            Input::Stop => self.step(Event::StopAsked, around),
            Input::Failover { force } => self.step(Event::FailoverAsked { force }, around),
            Input::Answer(number, event) => self.answered(number, event, around),
            Input::Timer if self.waits => {
                self.waits = false;
                let next = asked(&mut self.asking, around.effects, Asking::timer);
                self.claim_went(next, around);
            }
            _ => {}
        }
    }

    fn message(&mut self, message: Message<V::Content>, around: &mut Around<'_, V>) {
        match message {
            Message::Pages(content) => {
                if let Some(image) =
                    self.image.as_mut().filter(|_| self.machine.state() == State::Syncing)
                {
                    V::receive(image, &content);
                }
            }
            Message::Paired(generation) => self.paired(generation, around),
            Message::Seal(seal) => self.sealed(seal, around),
            Message::Resync => self.step(Event::ResyncTold, around),
            Message::Stop => self.step(Event::StopTold, around),
            Message::Abort => self.step(Event::Lost("aborted".into()), around),
            _ => self.step(Event::Bad("unexpected".into()), around),
        }
    }

    fn paired(&mut self, generation: Generation, around: &mut Around<'_, V>) {
        let may_pair = matches!(self.machine.state(), State::Syncing | State::Heir);
        if !may_pair || self.pairing.is_some() {
            self.step(Event::Bad("out of turn".into()), around);
        } else if self.arbiter {
            self.pairing = Some(generation);
            let next = asked(&mut self.asking, around.effects, Asking::read);
            self.claim_went(next, around);
        } else {
            self.step(Event::Paired(generation), around);
        }
    }

    fn record(&mut self, record: Option<Record>, around: &mut Around<'_, V>) {
        let Some(generation) = self.pairing.take() else { return };
        let (Some(session), Some(vm)) = (&self.session, self.vm) else { return };
        let standing = Standing::Pair { primary: session.primary, backup: self.me };
        if record != Some(Record { generation, vm, standing }) {
            return self.step(Event::Unpaired("another record".into()), around);
        }
        self.step(Event::Paired(generation), around);
    }

    fn sealed(&mut self, seal: Seal<V::Content>, around: &mut Around<'_, V>) {
        let claiming = around.broken == Some(Broken::AckAfterSuspecting)
            && self.machine.state() == State::Claiming;
        if !self.is_receiving() && !claiming {
            return;
        }
        let Some(session) = &mut self.session else { return };
        let gathered = session.seals.len() as u64;
        if gathered >= IN_FLIGHT_MAX || seal.epoch.0 != self.machine.expected().0 + gathered {
            return self.step(Event::Bad("order".into()), around);
        }
        if around.broken == Some(Broken::AckBeforeWhole) && self.machine.state() == State::Replica {
            around.send(Message::Ack { epoch: seal.epoch, generation: seal.generation });
        }
        session.seals.push_back(seal);
    }

    /// The epoch that is due is whole.
    fn verify(&mut self, around: &mut Around<'_, V>) {
        let Some(session) = &mut self.session else { return };
        let Some(seal) = session.seals.pop_front() else { return };
        let Seal { epoch, generation, handover, .. } = seal;
        if handover != Handover::No && self.lacking {
            return self.step(Event::Unready("lacking".into()), around);
        }
        let before = self.machine.committed();
        if around.broken == Some(Broken::StartOlder) {
            self.before = self.image.clone().zip(self.state);
        }
        self.verified = Some(seal);
        let parsed = self.state.replace((epoch, handover != Handover::No));
        self.step(Event::Verified { epoch, generation, handover }, around);
        if self.machine.committed() == before {
            self.state = parsed;
            self.verified = None;
        }
    }

    fn answered(&mut self, number: u64, event: claim::Event, around: &mut Around<'_, V>) {
        let ours = self.machine.generation().next();
        if let Some(verdict) = misread(around.broken, &self.asking, &event, ours, self.me) {
            return self.step(Event::Verdict(verdict), around);
        }
        if around.broken == Some(Broken::FailedClaimDiscards)
            && event == claim::Event::Failed
            && self.machine.state() == State::Claiming
        {
            return self.step(Event::ImageFailed("failed".into()), around);
        }
        match asked(&mut self.asking, around.effects, |asking| asking.answered(number, event)) {
            Next::Record(record) => self.record(record, around),
            Next::ReadFailed => {
                if self.pairing.take().is_some() {
                    self.step(Event::Unpaired("no answer".into()), around);
                }
            }
            next => self.claim_went(next, around),
        }
    }

    fn claim_went(&mut self, next: Next, around: &mut Around<'_, V>) {
        match next {
            Next::Call(number, action) => around.effects.push(Effect::Call(number, action)),
            Next::Nothing | Next::Record(_) | Next::ReadFailed => {}
            Next::Wait { ms } => {
                self.waits = true;
                around.effects.push(Effect::Wait(ms));
            }
            Next::Decided(verdict) => self.step(Event::Verdict(verdict), around),
        }
    }

    fn step(&mut self, event: Event, around: &mut Around<'_, V>) {
        for action in self.machine.step(event) {
            self.act(action, around);
        }
    }

    fn act(&mut self, action: Action, around: &mut Around<'_, V>) {
        match action {
            Action::Ack { .. }
                if around.broken == Some(Broken::AckBeforeWhole) && self.before_first() => {}
            Action::Ack { epoch, generation } => {
                self.tell(Message::Ack { epoch, generation }, around);
            }
            Action::Apply(epoch) => self.apply(epoch),
            Action::DropStaging => self.drop_staging(around),
            Action::TellAbort(_) => self.tell(Message::Abort, around),
            Action::TellRefused(_) => self.tell(Message::Refuse, around),
            Action::TellStopDone => self.tell(Message::StopDone, around),
            Action::TellResyncReady if self.spoiled => self.image_failed(around),
            Action::TellResyncReady => self.tell(Message::ResyncReady, around),
            Action::TellHandedOver { generation, reversed } => {
                self.tell(Message::HandedOver { generation, reversed }, around);
            }
            Action::Close
                if around.broken == Some(Broken::AckAfterSuspecting)
                    && self.machine.state() == State::Claiming => {}
            Action::Close => {
                if around.broken == Some(Broken::StartUnacknowledged) {
                    self.keep_staged();
                }
                if self.session.take().is_some() {
                    around.effects.push(Effect::Close);
                }
            }
            Action::Claim { .. } if self.spoiled => self.image_failed(around),
            Action::Claim { .. }
                if around.broken == Some(Broken::HeirStartsWithoutSwap)
                    && self.heir_of.is_some() =>
            {
                let generation = self.machine.generation().next();
                self.step(Event::Verdict(Verdict::Owned(generation)), around);
            }
            Action::ClaimReversed { .. } if self.spoiled => self.image_failed(around),
            Action::Claim { expected } => {
                self.claim(expected, Standing::Solo { owner: self.me }, around);
            }
            Action::ClaimReversed { expected } => {
                let Some(session) = &self.session else { return };
                let standing = Standing::Pair { primary: self.me, backup: session.primary };
                self.claim(expected, standing, around);
            }
            // What is kept for a primary that calls again is nothing that runs; here none does.
            Action::Discard | Action::Keep { .. } => {
                self.image = None;
                self.state = None;
                self.spoiled = false;
            }
            Action::Start => self.start(false, around),
            Action::StartHeld => self.start(true, around),
            Action::Refuse(_) => {}
            Action::Report(_) => {
                if around.broken == Some(Broken::OrphanStarts)
                    && self.machine.state() == State::Orphan
                {
                    self.step(Event::FailoverAsked { force: true }, around);
                }
            }
        }
    }

    fn image_failed(&mut self, around: &mut Around<'_, V>) {
        self.step(Event::ImageFailed("image".into()), around);
    }

    /// With [`Broken::AckBeforeWhole`]: whether this epoch was acknowledged at its seal.
    fn before_first(&self) -> bool {
        self.machine.committed().is_some_and(|epoch| epoch.0 > 1)
    }

    fn tell(&self, message: Message<V::Content>, around: &mut Around<'_, V>) {
        if self.session.is_some() {
            around.send(message);
        }
    }

    fn apply(&mut self, epoch: EpochId) {
        let Some(seal) = self.verified.take() else { return };
        assert_eq!(seal.epoch, epoch, "what was verified is what is applied");
        if let Some(image) = &mut self.image {
            V::receive(image, &seal.content);
        }
    }

    fn drop_staging(&mut self, around: &Around<'_, V>) {
        self.verified = None;
        self.pairing = None;
        if around.broken == Some(Broken::AckAfterSuspecting) {
            return;
        }
        if let Some(session) = &mut self.session {
            session.seals.clear();
        }
    }

    /// With [`Broken::StartUnacknowledged`]: what is staged goes into the image, too.
    fn keep_staged(&mut self) {
        let Some(session) = &mut self.session else { return };
        for seal in session.seals.drain(..) {
            if let Some(image) = self.image.as_mut().filter(|_| self.state.is_some()) {
                V::receive(image, &seal.content);
                self.state = Some((seal.epoch, seal.handover != Handover::No));
            }
        }
    }

    fn claim(&mut self, expected: Generation, standing: Standing, around: &mut Around<'_, V>) {
        let generation = expected.next();
        if around.broken == Some(Broken::TakeOverWithoutSwap) {
            return self.step(Event::Verdict(Verdict::Owned(generation)), around);
        }
        let Some(vm) = self.vm else { return };
        let next = Record { generation, vm, standing };
        let (claim, first) = Claim::new(expected, next);
        let next = asked(&mut self.asking, around.effects, |asking| asking.begin(claim, first));
        self.claim_went(next, around);
    }

    fn start(&mut self, is_held: bool, around: &mut Around<'_, V>) {
        if let Some((image, state)) = self.before.take() {
            (self.image, self.state) = (Some(image), Some(state));
        }
        let (Some(image), Some((epoch, handover))) = (self.image.take(), self.state.take()) else {
            unreachable!("the machine starts only what was committed");
        };
        if self.doomed || self.spoiled {
            around.effects.push(Effect::StartFailed);
            return self.step(Event::StartFailed("start".into()), around);
        }
        if is_held && let Some(session) = &self.session {
            self.reversed = Some((session.primary, self.machine.generation(), epoch));
        }
        let is_held = is_held && around.broken != Some(Broken::SpeaksBeforeReached);
        *around.vm = Some(if is_held { V::start_held(&image) } else { V::start(&image) });
        around.effects.push(Effect::Started { epoch, handover });
        self.step(Event::Started, around);
    }
}
