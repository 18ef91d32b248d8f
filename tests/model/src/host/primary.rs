//! The primary's engine, as far as order matters: after `primary/engine.rs`.

use replication::ids::{EpochId, Generation};
use replication::ownership::{HostId, HostIdentity, Record, Standing};
use replication::protocol::asking::{Asking, Next};
use replication::protocol::backup::Handover;
use replication::protocol::ownership::{self as claim, Claim, Verdict};
use replication::protocol::primary::{
    Action, Event, IN_FLIGHT_MAX, Primary, State, is_transition_valid,
};

use super::{Around, Effect, Message, Seal, Step, asked, misread};
use crate::broken::Broken;
use crate::vm::Vm;

/// What reaches the engine.
#[derive(Clone, Debug)]
pub enum Input<C> {
    Message(Message<C>),
    /// The connection ended, or was silent for too long.
    Lost,
    /// All of a copy is out.
    Copied,
    /// An epoch is due.
    Due,
    /// The next epoch does not fit.
    TooLarge,
    GiveUp,
    Stop,
    Failover,
    /// The old host of a switch-over has answered.
    Reached,
    Answer(u64, claim::Event),
    Timer,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Work {
    Nothing,
    Copying,
    Epochs,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Engine {
    pub machine: Primary,
    identity: HostIdentity,
    backup: HostId,
    arbiter: bool,
    asking: Asking,
    connected: bool,
    work: Work,
    sealed: EpochId,
    /// Of an earlier session, from which this one goes on.
    base: EpochId,
    /// Epochs that wait for their acknowledgement, as the engine counts them.
    in_flight: u64,
    /// No epoch of the present copy was sealed yet.
    first: bool,
    handover: bool,
    /// Whether a switch-over is to reverse the pair, where there is an arbiter.
    reverses: bool,
    /// The next epoch does not fit.
    large: bool,
    /// A claim waits for its timer.
    pub waits: bool,
}

impl Engine {
    /// Of a machine that was handed over by what is its backup since; not connected yet.
    #[must_use]
    pub fn reversed(
        identity: HostIdentity,
        backup: HostId,
        generation: Generation,
        epoch: EpochId,
    ) -> Self {
        let machine = Primary::reversed(generation, epoch);
        let engine = Self::around(machine, identity, backup, true, true);
        Self { connected: false, first: false, ..engine }
    }

    #[must_use]
    pub fn backup(&self) -> HostId {
        self.backup
    }

    /// The last epoch that was sealed.
    #[must_use]
    pub fn sealed(&self) -> EpochId {
        self.sealed
    }

    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.connected
    }

    #[must_use]
    pub fn is_over(&self) -> bool {
        use State::{Alone, Failed, Gone, Heir, Stopped};
        matches!(self.machine.state(), Alone | Gone | Heir | Stopped | Failed)
    }

    /// Whether the old host of a switch-over has not answered yet.
    #[must_use]
    pub fn is_calling(&self) -> bool {
        self.machine.state() == State::Calling
    }

    /// Whether this side is the backup of the pair that it was the primary of.
    #[must_use]
    pub fn is_heir(&self) -> bool {
        self.machine.state() == State::Heir
    }

    /// Connected and welcomed; `None` where the record says that another host's machine runs.
    #[must_use]
    pub fn open(
        identity: HostIdentity,
        backup: HostId,
        arbiter: bool,
        reverses: bool,
        record: Option<Record>,
        again: bool,
    ) -> Option<Self> {
        let generation = match record {
            None => Generation(0),
            Some(record) if record.is_of(identity) => record.generation,
            Some(_) => return None,
        };
        let machine = match again {
            true => Primary::again(arbiter, generation),
            false => Primary::new(arbiter, generation),
        };
        Some(Self::around(machine, identity, backup, arbiter, reverses))
    }

    fn around(
        machine: Primary,
        identity: HostIdentity,
        backup: HostId,
        arbiter: bool,
        reverses: bool,
    ) -> Self {
        Self {
            sealed: machine.committed(),
            base: machine.committed(),
            machine,
            identity,
            backup,
            arbiter,
            asking: Asking::default(),
            connected: true,
            work: Work::Nothing,
            in_flight: 0,
            first: true,
            handover: false,
            reverses,
            large: false,
            waits: false,
        }
    }

    /// The epoch that this session goes on from.
    #[must_use]
    pub fn first(&self) -> EpochId {
        self.base
    }

    #[must_use]
    pub fn is_copying(&self) -> bool {
        self.work == Work::Copying
    }

    #[must_use]
    pub fn has_in_flight(&self) -> bool {
        self.in_flight > 0
    }

    /// Whether an epoch may be sealed now.
    #[must_use]
    pub fn may_seal(&self) -> bool {
        let room = self.in_flight < IN_FLIGHT_MAX && !self.handover && !self.first;
        self.work == Work::Epochs && (self.in_flight == 0 || room)
    }

    /// Whether epochs are sealed, and the next one may turn out to be too large.
    #[must_use]
    pub fn may_be_too_large(&self) -> bool {
        self.work == Work::Epochs && !self.first && !self.large
    }

    /// Begins to copy.
    pub fn begin<V: Vm>(&mut self, around: &mut Around<'_, V>) {
        self.copy(around);
    }

    pub fn input<V: Vm>(&mut self, input: Input<V::Content>, around: &mut Around<'_, V>) {
        match input {
            Input::Message(message) => self.message(message, around),
            Input::Lost if self.connected || self.is_calling() => {
                self.step(Event::PeerLost("lost".into()), around)
            }
            Input::Copied if self.is_copying() => {
                self.work = Work::Nothing;
                self.step(Event::Synced, around);
            }
            Input::Due if self.may_seal() => self.seal(around),
            Input::TooLarge => {
                self.large = true;
                if self.may_seal() {
                    self.seal(around);
                }
            }
            Input::GiveUp => self.step(Event::GiveUp("given up".into()), around),
            Input::Stop => self.step(Event::StopAsked, around),
            Input::Failover => {
                let reversal = self.reversal();
                self.step(Event::FailoverAsked { reversal }, around);
            }
            Input::Reached if self.is_calling() => {
                self.connected = true;
                self.step(Event::Reached, around);
            }
            Input::Answer(number, event) => {
                let ours = self.machine.generation().next();
                let me = self.identity.host;
                if let Some(verdict) = misread(around.broken, &self.asking, &event, ours, me) {
                    return self.step(Event::Verdict(verdict), around);
                }
                let next = asked(&mut self.asking, around.effects, |a| a.answered(number, event));
                self.claim_went(next, around);
            }
            Input::Timer if self.waits => {
                self.waits = false;
                let next = asked(&mut self.asking, around.effects, Asking::timer);
                self.claim_went(next, around);
            }
            Input::Lost | Input::Copied | Input::Due | Input::Timer | Input::Reached => {}
        }
    }

    fn message<V: Vm>(&mut self, message: Message<V::Content>, around: &mut Around<'_, V>) {
        match message {
            Message::Ack { epoch, generation } => self.acked(epoch, generation, around),
            Message::ResyncReady => self.step(Event::ResyncReady, around),
            Message::StopDone => {}
            Message::HandedOver { generation, reversed } => {
                self.step(Event::HandedOver { generation, reversed }, around);
            }
            Message::Refuse => self.step(Event::Refused("refused".into()), around),
            Message::Abort => self.step(Event::PeerLost("aborted".into()), around),
            _ if self.connected => self.step(Event::PeerLost("unexpected".into()), around),
            _ => {}
        }
    }

    fn reversal(&self) -> Option<Record> {
        let generation = self.machine.generation().next();
        let standing = Standing::Pair { primary: self.backup, backup: self.identity.host };
        let record = Record { generation, vm: self.identity.vm, standing };
        (self.reverses && self.arbiter).then_some(record)
    }

    fn acked<V: Vm>(&mut self, epoch: EpochId, generation: Generation, around: &mut Around<'_, V>) {
        self.step(Event::Acked { epoch, generation }, around);
        if self.machine.in_flight() >= self.in_flight {
            return;
        }
        self.in_flight -= 1;
        let waits = (self.handover || self.large) && self.in_flight == 0;
        if self.work == Work::Epochs && waits {
            self.seal(around);
        }
    }

    fn seal<V: Vm>(&mut self, around: &mut Around<'_, V>) {
        if self.large && !self.first {
            // With epochs in flight there may be room for it once they are acknowledged.
            if self.in_flight == 0 {
                self.large = false;
                self.handover = false;
                self.step(Event::TooLarge("large".to_owned()), around);
            }
            return;
        }
        let epoch = self.sealed.next();
        let handover = self.handover;
        let generation = self.machine.generation();
        let kind = match (handover, self.reversal()) {
            (false, _) => Handover::No,
            (true, None) => Handover::Leave,
            (true, Some(_)) => Handover::Reverse,
        };
        let Some(vm) = around.vm else { return };
        let content = vm.seal(epoch, kind);
        self.sealed = epoch;
        self.first = false;
        around.send(Message::Seal(Seal { epoch, generation, handover: kind, content }));
        self.in_flight += 1;
        if handover {
            self.work = Work::Nothing;
        }
        self.step(Event::Sealed(epoch), around);
        if around.broken == Some(Broken::ReleaseBeforeAck) {
            around.vm(|vm| vm.commit(epoch));
        }
    }

    fn step<V: Vm>(&mut self, event: Event, around: &mut Around<'_, V>) {
        let before = self.machine.state();
        let actions = self.machine.step(event);
        let after = self.machine.state();
        if before != after {
            assert!(is_transition_valid(before, after));
            around.effects.push(Effect::Went(Step::Primary(before, after)));
        }
        for action in actions {
            self.act(action, around);
        }
    }

    fn act<V: Vm>(&mut self, action: Action, around: &mut Around<'_, V>) {
        match action {
            Action::Pair { expected } => {
                let standing = Standing::Pair { primary: self.identity.host, backup: self.backup };
                self.claim(expected, standing, around);
            }
            Action::Claim { expected } => {
                if around.broken == Some(Broken::ReleaseOnClaim) {
                    around.vm(Vm::pass);
                }
                if around.broken == Some(Broken::ResyncWithoutClaim)
                    && self.machine.state()
                        == State::Claiming(replication::protocol::primary::Purpose::Resync)
                {
                    let owned = Verdict::Owned(expected.next());
                    return self.step(Event::Verdict(owned), around);
                }
                self.claim(expected, Standing::Solo { owner: self.identity.host }, around);
            }
            Action::TellPaired(generation) => self.tell(Message::Paired(generation), around),
            Action::TellStop => self.tell(Message::Stop, around),
            Action::TellResync => {
                (self.first, self.large) = (true, false);
                self.tell(Message::Resync, around);
            }
            Action::Copy => self.copy(around),
            Action::Hold => around.vm(Vm::hold),
            Action::BeginEpochs => {
                self.work = Work::Epochs;
                self.seal(around);
            }
            Action::EndEpochs => self.work = Work::Nothing,
            Action::SealHandover => {
                self.handover = true;
                if self.in_flight == 0 {
                    self.seal(around);
                }
            }
            Action::Handed(epoch) if around.broken == Some(Broken::HandedIsSaid) => {
                around.vm(|vm| vm.commit(epoch));
            }
            Action::Handed(epoch) => around.vm(|vm| vm.hand_over(epoch)),
            Action::Commit(epoch) => around.vm(|vm| vm.commit(epoch)),
            Action::Pass => around.vm(Vm::pass),
            Action::Release => around.vm(Vm::release),
            Action::Degrade => {
                self.handover = false;
                self.in_flight = 0;
                around.vm(Vm::release);
            }
            Action::Destroy if around.broken == Some(Broken::LoserGoesOn) => {
                around.vm(Vm::pass);
                around.vm(Vm::release);
            }
            Action::Destroy => *around.vm = None,
            // It stands, and nothing of it leaves: what follows this engine has it, see `Host::settle`.
            Action::Keep => {}
            Action::Close => {
                if self.connected {
                    around.effects.push(Effect::Close);
                }
                self.connected = false;
                self.in_flight = 0;
            }
            // A VM that is alone is not protected again here, and no guest is paused.
            Action::Regain | Action::Refuse(_) | Action::Report(_) => {}
        }
    }

    fn tell<V: Vm>(&self, message: Message<V::Content>, around: &mut Around<'_, V>) {
        if self.connected {
            around.send(message);
        }
    }

    fn copy<V: Vm>(&mut self, around: &mut Around<'_, V>) {
        self.work = Work::Copying;
        if let Some(content) = around.vm.as_mut().and_then(Vm::copy) {
            self.tell(Message::Pages(content), around);
        }
    }

    fn claim<V: Vm>(
        &mut self,
        expected: Generation,
        standing: Standing,
        around: &mut Around<'_, V>,
    ) {
        let generation = expected.next();
        if !self.arbiter {
            return self.step(Event::Verdict(Verdict::Owned(generation)), around);
        }
        let next = Record { generation, vm: self.identity.vm, standing };
        let (claim, first) = Claim::new(expected, next);
        let next = asked(&mut self.asking, around.effects, |asking| asking.begin(claim, first));
        self.claim_went(next, around);
    }

    fn claim_went<V: Vm>(&mut self, next: Next, around: &mut Around<'_, V>) {
        match next {
            Next::Call(number, action) => around.effects.push(Effect::Call(number, action)),
            Next::Nothing | Next::Record(_) | Next::ReadFailed => {}
            Next::Wait { ms } => {
                self.waits = true;
                around.effects.push(Effect::Wait(ms));
            }
            Next::Decided(verdict) => self.step(Event::of(verdict, self.identity), around),
        }
    }
}
