//! Switch-overs, seen from both hosts: the one that takes a VM over and is to have its old host as its
//! backup, and the old one, which is that backup.

use std::sync::PoisonError;
use std::time::Duration;

use super::arrivals::Refusal;
use super::{
    Backup, Base, Built, Engine, Error, Event, Generation, HostId, Legacy, Replica, ReplicaBuilder,
    VmId, WayBack,
};
use crate::engine::clock;
use crate::ids::EpochId;
use crate::primary::{check, layout};
use crate::protocol::backup::Handover;
use crate::ram::Ram;
use crate::wire::{self, Hello, Offer};

/// How many time-outs an old host waits for its new primary, which waits for one: the host that runs the VM is
/// the first to ask for it where both live and do not reach each other.
const HEIR_TIMEOUTS: u32 = 2;

/// A machine that was here, with the state that it is to be started from, if there is one.
type Rebuilt<R> = (R, Option<<R as Replica>::State>);

impl<B: ReplicaBuilder> Engine<B> {
    /// What becomes of a switch-over that the primary asks for: of the pair that it would reverse, if this host
    /// can call it as its backup. Nothing of that may be found out only after the claim.
    pub(super) fn handover(&mut self, asked: Handover) -> Handover {
        self.is_tracked = false;
        if asked == Handover::No {
            return asked;
        }
        let Some(way_back) = &self.way_back else { return Handover::Leave };
        let Some(replica) = &mut self.replica else { return Handover::Leave };
        let by_rdma = way_back.destination_url.starts_with("rdma:");
        let untracked = replica.track().err().map(|error| error.to_string());
        self.is_tracked = untracked.is_none();
        if asked == Handover::Leave {
            return asked;
        }
        let disks = self.images.is_some().then(|| "it has disks".to_owned());
        // Whatever carried this session: the first one back would have to register memory with output held.
        let by_rdma =
            by_rdma.then(|| "guest memory has to be registered with the RDMA device".to_owned());
        // A device is not asked: the guest stands meanwhile.
        let unusable = || check(way_back.clone()).err().map(|error| error.chain());
        match untracked.or(disks).or(by_rdma).or_else(unusable) {
            None => Handover::Reverse,
            Some(why) => {
                tracing::warn!("the VM is unprotected until it is copied back: {why}");
                Handover::Leave
            }
        }
    }

    /// What this host lacks to run the replica, if anything.
    pub(super) fn lacks(&mut self) -> Option<String> {
        let source = self.replica.as_mut()?.ready().err()?;
        let error = Error::Guest { what: "run the VM on this host, as it is now", source };
        Some(error.chain())
    }

    /// For whoever protects the VM from here.
    pub(super) fn leave_way_back(&mut self, generation: Generation, reversed: bool) {
        let Some(options) = self.way_back.take() else { return };
        let committed = self.machine.committed().filter(|_| self.is_tracked);
        // The old host's memory is that of the pair's last epoch, or of the reversed pair's first state.
        let before = Generation(generation.0.saturating_sub(1));
        let base = committed.zip(self.session.as_ref()).map(|(epoch, session)| wire::Base {
            session: session.id.0,
            generation: if reversed { generation } else { before },
            committed: epoch,
            sealed: epoch,
        });
        let way_back = WayBack { options, base, reversed };
        *self.handed_back.lock().unwrap_or_else(PoisonError::into_inner) = Some(way_back);
    }

    /// The VM was this host's: what is left of it is a replica, or memory to go on from.
    pub(super) fn inherit(&mut self, legacy: Legacy) {
        let Legacy { primary, session, epoch, generation, description, state, .. } = legacy;
        let vm = self.identity().vm;
        let built = Built { primary, vm, session, description };
        match self.rebuild(&built, state.as_deref()) {
            Ok((replica, Some(state))) => {
                tracing::info!(
                    "this host is the VM's backup since the switch-over, with its epoch {epoch}"
                );
                (self.replica, self.state, self.built) = (Some(replica), Some(state), Some(built));
                self.machine = Backup::heir(generation, epoch);
                self.heir_session = Some(session);
                let timeout = Duration::from_millis(self.options.timeout_ms);
                self.heir_until = Some(clock::now() + timeout * HEIR_TIMEOUTS);
            }
            Ok((replica, None)) => {
                tracing::info!("the memory of epoch {epoch} is kept for its copy back");
                self.base = Some(keep(replica, built, generation, epoch));
            }
            Err(error) => {
                let line = format!("What this host has of the VM is lost: {}", error.chain());
                tracing::error!("{line}");
                self.session_failed(&line);
            }
        }
        self.show();
    }

    /// The machine that was here, as a replica.
    fn rebuild(
        &mut self,
        built: &Built,
        state: Option<&[u8]>,
    ) -> Result<Rebuilt<B::Replica>, Error> {
        let replica = self.builder.build(&built.description);
        let mut replica =
            replica.map_err(|source| Error::Guest { what: "build the replica", source })?;
        let state = state.map(|state| replica.parse(state)).transpose();
        let state =
            state.map_err(|source| Error::Guest { what: "load the machine state", source })?;
        Ok((replica, state))
    }

    /// Why a primary is not served by the backup of a reversed pair: only its new primary is, and only
    /// for what it knows to be here.
    pub(super) fn refusal_by_heir(&self, hello: &Hello, offer: &Offer) -> Option<Refusal> {
        let awaits = "This host is the backup of a pair that a switch-over reversed (Protected)";
        if self.session.is_some() {
            let what = format!("{awaits}, and its primary is here");
            return Some(Refusal::Passing(what));
        }
        let (Some(built), Some(session)) = (&self.built, self.heir_session) else {
            return Some(Refusal::Passing(format!("{awaits}, and has lost its machine")));
        };
        let is_theirs = HostId(hello.host) == built.primary && VmId(hello.vm) == built.vm;
        if !is_theirs || !offer.reversed {
            return Some(Refusal::Passing(format!("{awaits}, and awaits its primary")));
        }
        let has_epoch = self.machine.committed().is_some_and(|epoch| {
            let generation = self.machine.generation();
            offer.base.is_some_and(|base| base.fits(session.0, generation, epoch))
        });
        let is_same = self.builder.is_same(&built.description, &offer.description)
            && self.replica.as_ref().is_some_and(|replica| layout(&replica.ram()) == offer.regions)
            && offer.disks.is_empty();
        if !has_epoch || !is_same {
            return Some(Refusal::Passing(format!("{awaits}, and has another machine or epoch")));
        }
        self.misfit(offer).map(Refusal::Lasting)
    }

    /// A primary was refused. The new primary of a reversed pair that wants to copy owns the VM alone by
    /// then, or says so: the record tells.
    pub(super) fn was_left(&mut self, hello: &Hello, offer: &Offer) {
        let is_its = self.built.as_ref().is_some_and(|built| HostId(hello.host) == built.primary);
        if self.is_awaiting() && is_its && !offer.reversed {
            self.step(Event::Lost("The VM's new primary wants to copy it anew".to_owned()));
        }
    }

    /// The session of the new primary goes on from what is here.
    pub(super) fn prepare_heir(&mut self, built: Built) -> Result<(Ram, bool), Error> {
        let (Some(replica), Some(old)) = (&self.replica, &mut self.built) else {
            return Err(Error::Conflict("There is no replica here".to_owned()));
        };
        let description = std::mem::take(&mut old.description);
        *old = Built { description, ..built };
        Ok((replica.ram(), true))
    }
}

fn keep<R>(replica: R, built: Built, generation: Generation, committed: EpochId) -> Base<R> {
    let Built { primary, vm, session, description } = built;
    Base { replica, primary, vm, session, generation, committed, description }
}
