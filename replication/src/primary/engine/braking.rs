//! A guest that writes faster than a copy of its memory gets on is slowed, see [`Brake`].

use std::sync::atomic::Ordering;
use std::time::Instant;

use super::{Engine, Error, Event, Guest, REST_PAGES, Work};
use crate::capture::brake::Brake;
use crate::engine::clock;

/// The brake of the pass that is under way.
pub(super) struct Braking {
    rule: Brake,
    /// What the copy had sent before this pass.
    sent_before: u64,
    looked: Instant,
}

impl<G: Guest> Engine<'_, G> {
    /// Pages that a copy may leave to the first epoch.
    pub(super) fn rest_max(&self) -> u64 {
        REST_PAGES.min(self.cadence.staging_pages() / 4).min(self.cadence.link_pages())
    }

    /// A pass begins, of which the guest's writes are to leave at most half.
    pub(super) fn begin_brake(&mut self) {
        self.braking = Some(Braking {
            rule: Brake::new(self.rest_max()),
            sent_before: self.status.counters.synced_pages.load(Ordering::Relaxed),
            looked: clock::now(),
        });
    }

    /// The guest runs again, if it stood for a pass.
    pub(super) fn end_brake(&mut self) {
        if self.braking.take().is_some() {
            self.release();
        }
    }

    pub(super) fn brake_due(&self) -> Option<Instant> {
        self.braking.as_ref().map(|braking| braking.looked + braking.rule.look())
    }

    /// Looks at how far the pass and the guest are.
    pub(super) fn brake(&mut self) {
        if !matches!(self.work, Work::Copying { .. }) {
            return self.end_brake();
        }
        if let Err(error) = self.weigh() {
            self.step(Event::GiveUp(error.chain()));
        }
    }

    fn weigh(&mut self) -> Result<(), Error> {
        let stands = self.sealer.stands();
        let counted = self.guest.written_pages();
        let counted =
            counted.map_err(|source| Error::Guest { what: "count the dirty pages", source })?;
        if counted.is_none() {
            self.sealer.harvest(&mut *self.guest)?;
        }
        let written = counted.unwrap_or(0).saturating_add(self.sealer.dirty.pages().len());
        let sent = self.status.counters.synced_pages.load(Ordering::Relaxed);
        let now = clock::now();
        let Some(braking) = &mut self.braking else { return Ok(()) };
        let ran = (!stands).then(|| now - braking.looked);
        braking.looked = now;
        match braking.rule.is_held(sent.saturating_sub(braking.sent_before), written, ran) {
            true => self.sealer.hold_up(&mut *self.guest),
            false => self.sealer.release(&mut *self.guest).map(|_| ()),
        }
    }
}
