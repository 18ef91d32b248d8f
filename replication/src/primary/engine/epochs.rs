//! Copies and epochs: what is harvested, sealed and given to the senders, and when.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use api::replication::Cow;

use super::{
    Engine, Error, Event, Guest, InFlight, Job, Message, Owner, PASSES_MAX, Pause, Senders, Source,
    TOO_LARGE_MAX, Work,
};
use crate::capture::cow::Share;
use crate::checking::reach;
use crate::disk::Change;
use crate::engine::clock;
use crate::guest::{MachineState, STATE_BYTES_MAX};
use crate::ids::{EpochId, PAGE_SIZE};
use crate::primary::disk::Job as DiskJob;
use crate::primary::seal::{Room, Sealed};
use crate::protocol::backup::Handover;
use crate::wire::Seal;

impl<G: Guest> Engine<'_, G> {
    /// The interval is over.
    pub(super) fn due(&mut self) {
        let busy = !self.may_seal();
        if !busy {
            match self.goes_on() {
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => return self.step(Event::GiveUp(error.chain())),
            }
        }
        if busy || !(self.first || self.output_waiting()) {
            // What is harvested while the guest runs need not be harvested in the pause.
            if let Err(error) = self.sealer.harvest(&mut *self.guest) {
                return self.step(Event::GiveUp(error.chain()));
            }
        }
        if busy {
            self.last_look = clock::now();
            if self.cadence.is_near_full(self.sealer.dirty.pages().len())
                && let Err(error) = self.sealer.hold_up(&mut *self.guest)
            {
                // Bounded memory slows the guest, as does the link.
                self.step(Event::GiveUp(error.chain()));
            }
            return;
        }
        let quiet = self.sealer.dirty.pages().is_empty() && !self.output_waiting();
        if quiet && !self.first {
            self.last_seal = clock::now();
            return;
        }
        self.seal();
    }

    /// Whether the epoch is one that may last longer than `epoch_ms`, and is still small.
    fn goes_on(&mut self) -> Result<bool, Error> {
        let now = clock::now();
        let over = self.last_seal + self.cadence.interval(self.output_waiting());
        // A guest that stands has waited long enough.
        if self.first || self.sealer.stands() || now >= over {
            return Ok(false);
        }
        self.last_look = now;
        let written = self.guest.written_pages();
        let written =
            written.map_err(|source| Error::Guest { what: "count the dirty pages", source })?;
        let Some(written) = written else {
            self.cadence.forgo_stretching();
            return Ok(false);
        };
        let harvested = self.sealer.dirty.pages().len();
        let logged = self.disks.as_ref().map_or(0, |disks| disks.journal.open_bytes());
        let pages = written.saturating_add(harvested).saturating_add(logged / PAGE_SIZE as u64);
        Ok(!self.cadence.is_stretched_enough(pages))
    }

    pub(super) fn seal(&mut self) {
        let epoch = self.sealed.next();
        let handover = self.handover;
        let began = clock::now();
        let output = Arc::clone(&self.output);
        let mut waited = self.output_waiting();
        let quiet = || waited |= output.swap(false, Ordering::AcqRel);
        if let Err(error) = self.sealer.ahead(&mut *self.guest) {
            return self.step(Event::GiveUp(error.chain()));
        }
        let room = self.room();
        let pause = self.sealer.seal(&mut *self.guest, epoch, handover, &room, quiet);
        if waited {
            self.cadence.output();
        }
        match pause {
            Ok(Pause::Sealed(sealed)) => {
                // A guest that waited for room wrote nothing meanwhile.
                let stood = self.sealer.waited().saturating_sub(self.waited);
                let took = began.duration_since(self.last_seal).saturating_sub(stood);
                (self.last_seal, self.waited) = (began, self.sealer.waited());
                if let Err(error) = self.ship(epoch, handover, sealed, took) {
                    self.step(Event::GiveUp(error.chain()));
                }
            }
            // The guest stands until there is room: the backup is to have all of this in one epoch.
            Ok(Pause::TooLarge { .. }) if !self.in_flight.is_empty() => {
                self.awaits_room = true;
                if let Err(error) = self.sealer.hold_up(&mut *self.guest) {
                    self.step(Event::GiveUp(error.chain()));
                }
            }
            Ok(Pause::TooLarge { .. }) if self.first && self.log_is_over() => {
                // Nothing is committed yet: what was logged is marked and copied again.
                if let Err(error) = self.sealer.release(&mut *self.guest) {
                    return self.step(Event::GiveUp(error.chain()));
                }
                self.call_off_log();
                self.begin_epochs();
            }
            Ok(Pause::TooLarge { .. }) if self.first => {
                // Nothing is committed yet, so what an epoch cannot carry goes into the image.
                self.work = Work::Surplus;
                let set = self.sealer.take();
                self.give(EpochId(0), Source::Live(set));
            }
            Ok(Pause::TooLarge { bytes }) => self.too_large(bytes),
            Err(error) => self.step(Event::GiveUp(error.chain())),
        }
    }

    /// What the backup can stage beside what is in flight.
    fn room(&self) -> Room {
        Room {
            pages: self.cadence.staging_pages().saturating_sub(self.in_flight.pages()),
            log_bytes: self.log_bytes_max.saturating_sub(self.in_flight.log_bytes()),
        }
    }

    fn too_large(&mut self, bytes: u64) {
        let most = self.cadence.staging_pages() * PAGE_SIZE as u64;
        let reason = format!("An epoch of {bytes} bytes exceeds the backup's staging of {most}");
        self.too_large += 1;
        self.good = 0;
        // It was not sealed: a switch-over that it was to be the last of comes to nothing.
        self.handover = false;
        if self.too_large > TOO_LARGE_MAX {
            self.step(Event::GiveUp(reason));
        } else {
            self.step(Event::TooLarge(reason));
        }
    }

    fn ship(
        &mut self,
        epoch: EpochId,
        handover: bool,
        sealed: Sealed<G::State>,
        took: Duration,
    ) -> Result<(), Error> {
        reach("sealed");
        let Sealed { state, source, log, stood, steps } = sealed;
        let sealed_at = clock::now();
        self.sealed = epoch;
        self.first = false;
        let set = Arc::clone(self.sealer.sealed());
        let pages = set.len();
        let of = self.senders.as_ref().map_or(1, Senders::count);
        let counts = (0..of).map(|index| Share { index, of }.count(&set)).collect();
        self.give(epoch, source);
        let changes = log.changes.len() as u64;
        let log_bytes = log.changes.iter().map(Change::cost_bytes).sum();
        let touched_bytes =
            log.changes.iter().fold(0, |sum: u64, change| sum.saturating_add(change.len));
        self.cadence.sealed(pages, log_bytes, took, stood);
        if let Some(disks) = &self.disks {
            disks.give(DiskJob::Epoch { epoch, log });
        }
        let mut bytes = Vec::new();
        let encoded = state.encode(&mut bytes);
        encoded.map_err(|source| Error::Guest { what: "encode the machine state", source })?;
        if bytes.len() > STATE_BYTES_MAX {
            let size = bytes.len();
            return Err(Error::Failed(format!("The machine state has {size} bytes, too many")));
        }
        self.status.counters.raw_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.status.counters.wire_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let generation = self.machine.generation();
        let kind = match (handover, self.machine.reverses()) {
            (false, _) => Handover::No,
            (true, false) => Handover::Leave,
            (true, true) => Handover::Reverse,
        };
        if kind == Handover::Reverse {
            self.last_state = Some(bytes.clone());
        }
        let seal = Seal { epoch, generation, handover: kind, pages: counts, changes, state: bytes };
        self.tell(Message::Seal(seal));
        reach("given");
        self.in_flight.sealed(InFlight { sealed_at, set, pages, log_bytes, touched_bytes });
        let mut gathered = self.status.lock();
        if handover || self.options.cow != Cow::Off {
            gathered.pause_us.add_time(stood);
        }
        for (window, step) in gathered.steps_us.iter_mut().zip(steps) {
            window.add_time(step);
        }
        gathered.dirty_pages.add(pages);
        gathered.info.epoch_sealed = epoch.0;
        // The first of a session leaves the count of the one before.
        gathered.info.epoch_committed = self.machine.committed().0;
        let kept = self.sealer.kept();
        gathered.info.cow_faults = kept.faults;
        gathered.info.cow_ahead = kept.ahead;
        gathered.info.cow_copied = kept.copied;
        gathered.info.cow_protected = kept.protected;
        let waited_us = self.sealer.waited().as_micros();
        gathered.info.throttled_us = u64::try_from(waited_us).unwrap_or(u64::MAX);
        let interval_us = self.cadence.interval(false).as_micros();
        gathered.info.epoch_interval_us = u64::try_from(interval_us).unwrap_or(u64::MAX);
        drop(gathered);
        if handover {
            // The last one.
            self.work = Work::Nothing;
        }
        self.step(Event::Sealed(epoch));
        self.sealer.prepare();
        Ok(())
    }

    /// Gives a job to all senders.
    pub(super) fn give(&mut self, epoch: EpochId, source: Source) {
        self.job += 1;
        if let Some(senders) = &self.senders {
            self.unsent = senders.count();
            senders.send(&Job { number: self.job, epoch, source });
        }
    }

    /// The job is out on every connection.
    pub(super) fn sent(&mut self) {
        if self.work == Work::Epochs {
            reach("sent");
        }
        match self.work {
            Work::Copying { pass, pages, since } => {
                // A link that is slow is known to be so before the first epoch.
                // But for pages that were left out.
                if !(pass == 0 && self.opens_zero && self.straight.is_some()) {
                    self.cadence.sent(pages, clock::since(since));
                }
                self.copied(pass, pages);
            }
            Work::Surplus => {
                self.work = Work::Epochs;
                self.seal();
            }
            // With cow=off the guest stood until now.
            Work::Epochs if self.options.cow == Cow::Off && !self.handover => {
                match self.sealer.release(&mut *self.guest) {
                    Ok(stood) => self.status.lock().pause_us.add_time(stood),
                    Err(error) => self.step(Event::GiveUp(error.chain())),
                }
            }
            Work::Epochs => {
                if let Some(last) = self.in_flight.last() {
                    self.cadence.sent(last.pages, clock::since(last.sealed_at));
                }
            }
            // The memory of a guest that stands has been read.
            Work::Nothing => {
                self.go_on_in_doubt();
                if let Some(generation) = self.owned_when_sent.take() {
                    self.step(Event::Verdict(Owner::Owned(generation)));
                }
            }
            Work::Opening
            | Work::AwaitingRest
            | Work::Shutting { .. }
            | Work::Settling
            | Work::Rest => {}
        }
    }

    /// One pass of a copy straight into the backup's image, while the guest runs.
    pub(super) fn copy(&mut self, pass: u32) {
        if let Err(error) = self.sealer.harvest(&mut *self.guest) {
            return self.step(Event::GiveUp(error.chain()));
        }
        if std::mem::take(&mut self.fresh) {
            // The backup's memory is new: it reads as zero, too.
            self.sealer.dirty.drop_untouched(&mut *self.guest);
        }
        let set = self.sealer.take();
        let pages = set.len();
        if pass == 0 {
            self.begin_progress(pages);
        }
        self.work = Work::Copying { pass, pages, since: clock::now() };
        if pass > 0 {
            self.begin_brake();
        }
        let source = self.live(set);
        self.give(EpochId(0), source);
        reach("copy");
        self.sealer.prepare();
    }

    /// So many pages are to be copied.
    pub(super) fn begin_progress(&self, pages: u64) {
        let counters = &self.status.counters;
        counters.synced_pages.store(0, Ordering::Relaxed);
        counters.to_sync_pages.store(pages.max(1), Ordering::Relaxed);
        self.status.lock().info.sync_progress = 0.0;
    }

    fn copied(&mut self, pass: u32, pages: u64) {
        self.end_brake();
        if self.is_part() {
            // Pieces may have become ready meanwhile.
            self.work = Work::Opening;
            return self.approached();
        }
        if let Err(error) = self.sealer.harvest(&mut *self.guest) {
            return self.step(Event::GiveUp(error.chain()));
        }
        let rest = self.sealer.dirty.pages().len();
        // What the brake does not make smaller is what the guest writes between two looks.
        let shrinks = pass == 0 || rest < pages - pages / 4;
        if rest > self.rest_max() && shrinks && pass + 1 < PASSES_MAX {
            return self.copy(pass + 1);
        }
        // Not open for longer than it is of use: disks may take their time.
        if self.straight.is_some() {
            return self.end_straight();
        }
        if !self.approach.is_over() {
            return self.end_window(1);
        }
        if self.disks_copy || self.lending {
            self.work = Work::AwaitingRest;
            return;
        }
        self.work = Work::Nothing;
        self.step(Event::Synced);
    }

    /// Copies memory and disks straight into the backup's images, while the guest runs.
    pub(super) fn begin_copy(&mut self) {
        if let Some(disks) = &self.disks {
            let counters = &self.status.counters;
            counters.synced_disk_bytes.store(0, Ordering::Relaxed);
            let marked = disks.journal.marked_bytes();
            counters.to_sync_disk_bytes.store(marked, Ordering::Relaxed);
        }
        self.copy_disks(|number| DiskJob::Copy { number });
        if !self.approach() {
            self.copy(0);
        }
    }

    fn copy_disks(&mut self, job: impl FnOnce(u64) -> DiskJob) {
        if let Some(disks) = &self.disks {
            self.disk_job += 1;
            self.disks_copy = true;
            disks.give(job(self.disk_job));
        }
    }

    /// The disks' copy that was asked for last is out.
    pub(super) fn disks_copied(&mut self) {
        self.disks_copy = false;
        match self.work {
            // Memory was written meanwhile, perhaps a lot.
            Work::AwaitingRest if !self.lending => self.copy(1),
            Work::Settling => {
                self.work = Work::Rest;
                if let Some(disks) = &self.disks {
                    disks.journal.begin_log(self.log_bytes_max);
                }
                self.copy_disks(|number| DiskJob::Rest { number });
            }
            Work::Rest => self.seal_first(),
            Work::Nothing
            | Work::Opening
            | Work::Copying { .. }
            | Work::AwaitingRest
            | Work::Shutting { .. }
            | Work::Surplus
            | Work::Epochs => {}
        }
    }

    /// Paired: what the disks still lack goes first. The log begins no earlier than this, since the
    /// arbiter may take its time, and a log that nobody reads fills up.
    pub(super) fn begin_epochs(&mut self) {
        if self.disks.is_none() {
            return self.seal_first();
        }
        self.work = Work::Settling;
        self.copy_disks(|number| DiskJob::Copy { number });
    }

    fn seal_first(&mut self) {
        if self.disks.is_some() {
            // Not before: until the first commit there is nobody who could take over.
            self.guest.hold_output();
        }
        self.work = Work::Epochs;
        (self.last_seal, self.waited) = (clock::now(), self.sealer.waited());
        self.seal();
    }

    fn log_is_over(&self) -> bool {
        let open = self.disks.as_ref().map_or(0, |disks| disks.journal.open_bytes());
        open > self.log_bytes_max
    }

    /// Nobody reads the log from here on: what it has is marked, should there be a copy anew.
    pub(super) fn call_off_log(&mut self) {
        if let Some(disks) = &self.disks {
            disks.journal.stop_log();
        }
    }
}
