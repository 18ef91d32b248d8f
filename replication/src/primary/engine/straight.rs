//! A copy by the device, straight from guest memory into the backup's.
//!
//! ```text
//!   approach ──both sides have registered──> passes ──small──> the backup closes ──> a pass
//!      └───────one of them has not──────────> passes ──────────────────┘       through the rings
//! ```
//!
//! Why a page that the guest writes while the device reads it does no harm: what is in a pass was harvested
//! before the device began to read, so a write after that is in a later harvest, at the latest in that of the
//! seal, for which the guest stands; the page goes again, in a later pass or in the first epoch. A pass
//! is over when its WRITEs have completed, on every connection, and the next harvest comes after that. So of a page that is
//! in no later harvest the last WRITE read bytes that nobody was writing.
//!
//! The checksum of a page is made just before the device reads it, and follows it on the same connection, so the
//! backup compares while the rest is copied; what it finds of a page that comes again counts no more.
//!
//! Where nothing was sent before, the backup's memory reads as zero: the first pass leaves out pages that do, too.
//! One that is written after it was looked at is in a later harvest, as above.
//!
//! A copy goes one way: what goes through the rings is put into the image by software, at its time, and
//! a WRITE does not wait for that.

use std::sync::Arc;
use std::time::Instant;

use api::replication::{Compression, Cow, RdmaPin};

use super::{Engine, Error, Event, Guest, Message, Source, WireError, Work};
use crate::ids::PAGE_SIZE;
use crate::primary::send::Straight;
use crate::ram::PageSet;
use crate::transport::rdma::{Window, registering_patience};
use crate::wire::{Grant, Kind};

/// A copy anew of less than this part of the memory is not worth registering all of it at the backup.
const WORTH_PART: u64 = 4;

/// A copy that goes straight.
pub(super) struct Copying {
    window: Arc<Window>,
    /// What went so.
    copied: PageSet,
}

impl<G: Guest> Engine<'_, G> {
    /// Asks the backup to open its memory, if that is to be; else `false`, and the copy can begin.
    pub(super) fn approach(&mut self) -> bool {
        let is_first = self.fresh && self.lender.is_some();
        let is_lent = self.lent.as_ref().is_some_and(|lent| lent.is_ready());
        let is_wanted = self.options.rdma_pin != Some(RdmaPin::Off)
            && self.options.cow != Cow::Copy
            && self.options.compression != Compression::Lz4;
        if !is_wanted || !(is_first || is_lent && !self.fresh) || !self.approach.is_over() {
            return false;
        }
        if let Err(error) = self.sealer.harvest(self.guest) {
            self.step(Event::GiveUp(error.chain()));
            return true;
        }
        self.opens_zero = self.fresh;
        if std::mem::take(&mut self.fresh) {
            // Before the memory is registered, which touches all of it.
            self.sealer.dirty.drop_untouched(self.guest);
        } else if self.sealer.dirty.pages().len() < self.sealer.ram.pages() / WORTH_PART {
            return false;
        }
        let number = self.approach.ask();
        self.tell(Message::WindowAsk(number));
        self.await_answer();
        self.work = Work::Opening;
        true
    }

    /// A device may take its time for a memory, on either side.
    fn await_answer(&mut self) {
        self.window_due = Some(Instant::now() + registering_patience(self.sealer.ram.bytes()));
    }

    /// Begins the copy once it is known which way it goes.
    pub(super) fn approached(&mut self) {
        let is_lent = self.lent.as_ref().is_some_and(|lent| lent.is_ready());
        let is_open = self.straight.is_some();
        if self.work != Work::Opening || self.lending {
            return;
        }
        if is_lent && self.approach.awaits_answer() && self.window_due.is_some() {
            return;
        }
        if !(is_lent && is_open) {
            self.straight = None;
            self.tell_end();
        }
        let way = if self.straight.is_some() {
            "straight into the backup's memory"
        } else {
            "through the rings"
        };
        tracing::info!("the copy goes {way}");
        self.copy(0);
    }

    fn tell_end(&mut self) {
        if let Some(number) = self.approach.end() {
            self.tell(Message::WindowEnd(number));
            self.await_answer();
        }
    }

    pub(super) fn window_opened(&mut self, number: u64, grants: &[Grant]) {
        let pages = self.sealer.ram.pages();
        match (self.approach.opened(number), Window::new(grants, pages)) {
            (Some(true), Some(window)) => {
                self.window_due = None;
                self.straight =
                    Some(Copying { window: Arc::new(window), copied: PageSet::new(pages) });
                self.approached();
            }
            // It was ended before this came.
            (Some(false), Some(_)) => {}
            _ => self.bad_window(Kind::WindowOpen),
        }
    }

    pub(super) fn window_refused(&mut self, number: u64, reason: &str) {
        if !self.approach.none(number) {
            return self.bad_window(Kind::WindowNone);
        }
        tracing::warn!("the backup does not open its memory for a copy: {reason}");
        if self.approach.is_over() {
            self.window_due = None;
            self.approached();
        }
    }

    pub(super) fn window_closed(&mut self, number: u64) {
        if !self.approach.closed(number) {
            return self.bad_window(Kind::WindowClosed);
        }
        self.window_due = None;
        if self.work == Work::Shutting {
            // The guest went on meanwhile.
            self.copy(1);
        }
    }

    fn bad_window(&mut self, kind: Kind) {
        self.lost(WireError::Malformed { kind, what: "what was not asked for" });
    }

    /// The backup does not answer.
    pub(super) fn window_late(&mut self) {
        if self.approach.is_over() || self.control.is_none() {
            return;
        }
        if self.work == Work::Opening && self.straight.is_none() {
            tracing::warn!("the backup does not say whether it opens its memory for a copy");
            return self.approached();
        }
        let what = "The backup does not say that nobody writes its memory any more".to_owned();
        self.step(Event::PeerLost(Error::Failed(what).chain()));
    }

    /// How the pages of a pass go.
    pub(super) fn live(&mut self, pages: Arc<PageSet>) -> Source {
        let Some(copying) = &mut self.straight else { return Source::Live(pages) };
        // The first pass of all.
        let is_zero = self.opens_zero && copying.copied.is_empty();
        copying.copied.union(&pages);
        let window = Arc::clone(&copying.window);
        Source::Straight(Arc::new(Straight { pages, window, is_zero }))
    }

    /// The passes are over. What was written since the last one comes again.
    pub(super) fn end_straight(&mut self) {
        if let Some(mut copying) = self.straight.take() {
            copying.copied.subtract(self.sealer.dirty.pages());
            let mib = (copying.copied.len() * PAGE_SIZE as u64) >> 20;
            tracing::info!(
                "{mib} MiB went straight into the backup's memory, which compares checksums"
            );
        }
        self.end_window();
    }

    /// Has the backup make its memory its own again, and waits for that.
    pub(super) fn end_window(&mut self) {
        self.work = Work::Shutting;
        self.tell_end();
    }
}
