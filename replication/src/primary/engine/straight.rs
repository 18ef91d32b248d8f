//! A copy by the device, straight from guest memory into the backup's.
//!
//! ```text
//!   approach ──a piece is registered on both sides──> a part of the first pass ──the last──> passes ──small──┐
//!      │                         └─<───next piece──────┘  │                                                 v
//!      │                                                  └──one side comes short──────> the backup closes ──> passes
//!      └───────one side has none of it────────────────────────────────────────────────────────────> through the rings
//! ```
//!
//! Why a page that the guest writes while the device reads it does no harm: what is in a pass, or in a part of the first
//! one, was harvested
//! before the device began to read, so a write after that is in a later harvest, at the latest in that of the
//! seal, for which the guest stands; the page goes again, in a later pass or in the first epoch. A pass, or a part,
//! is over when its WRITEs have completed, on every connection, and the next harvest comes after that. So of a page that is
//! in no later harvest the last WRITE read bytes that nobody was writing.
//!
//! A part takes the pages of the pieces that have become ready, and no others ([`advance`]); what is left, and what the
//! guest writes meanwhile, stays in the dirty set. So all parts together are one pass, and whatever does not
//! go straight is in what goes through the rings.
//!
//! The checksum of a page is made just before the device reads it, and follows it on the same connection, so the
//! backup compares while the rest is copied; what it finds of a page that comes again counts no more.
//!
//! Where nothing was sent before, the backup's memory reads as zero: the first pass, whose parts have no page twice,
//! leaves out pages that do, too.
//! One that is written after it was looked at is in a later harvest, as above.
//!
//! A copy turns once: what goes through the rings is put into the image by software, at its time, and
//! a WRITE does not wait for that. So after the last WRITE the window is closed, and only then is
//! something sent through the rings, where WRITEs were made.

use std::sync::Arc;

use api::replication::{Compression, Cow, RdmaPin};

use super::{Engine, Error, Event, Guest, Message, Source, WireError, Work};
use crate::engine::clock;
use crate::ids::{EpochId, PAGE_SIZE};
use crate::primary::send::Straight;
use crate::protocol::advance::{self, Next, Side};
use crate::ram::PageSet;
use crate::transport::rdma::{Window, registering_patience};
use crate::wire::{Grant, Kind};

/// A copy anew of less than this part of the memory is not worth registering all of it at the backup.
const WORTH_PART: u64 = 4;

/// A copy that goes straight.
pub(super) struct Copying {
    window: Arc<Window>,
    /// Pages from the first on that the parts of the first pass had.
    sent: u64,
    /// What went so.
    copied: PageSet,
}

impl Copying {
    fn new(pages: u64) -> Self {
        Self { window: Arc::new(Window::new(pages)), sent: 0, copied: PageSet::new(pages) }
    }

    fn is_whole(&self) -> bool {
        self.sent == self.copied.universe()
    }
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
        if let Err(error) = self.sealer.harvest(&mut *self.guest) {
            self.step(Event::GiveUp(error.chain()));
            return true;
        }
        self.opens_zero = self.fresh;
        if std::mem::take(&mut self.fresh) {
            // Before the memory is registered, which touches all of it.
            self.sealer.dirty.drop_untouched(&mut *self.guest);
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
        self.window_due = Some(clock::now() + registering_patience(self.sealer.ram.bytes()));
    }

    /// Goes on with the copy as far as it is known which way that goes.
    pub(super) fn approached(&mut self) {
        // Of a session that has ended pieces may still come.
        let Some(lent) = self.lent.as_ref().filter(|_| self.work == Work::Opening) else { return };
        let all = self.sealer.ram.pages();
        let here = Side { pages: lent.ready_pages(), is_over: !self.lending };
        let open = self.straight.as_ref().map_or(0, |copying| copying.window.open_pages());
        // Nothing is waited for once all is open, it says that there is no more, or is late.
        let there = Side { pages: open, is_over: self.window_due.is_none() };
        let sent = self.straight.as_ref().map_or(0, |copying| copying.sent);
        match advance::next(here, there, sent, all) {
            Next::Wait => {}
            Next::Straight { first, pages } => self.copy_part(first, pages),
            Next::Close => {
                tracing::info!("the copy goes on through the rings: not all could be registered");
                self.end_straight();
            }
            Next::Rings => {
                tracing::info!("the copy goes through the rings");
                self.straight = None;
                self.unlend();
                self.tell_end();
                self.copy(0);
            }
        }
    }

    /// A part of the first pass: of pages that no part had, those that are ready on both sides by now.
    fn copy_part(&mut self, first: u64, pages: u64) {
        if let Err(error) = self.sealer.harvest(&mut *self.guest) {
            return self.step(Event::GiveUp(error.chain()));
        }
        if first == 0 {
            tracing::info!("the copy goes straight into the backup's memory");
            let to_sync = self.sealer.dirty.pages().len();
            self.begin_progress(to_sync);
        }
        let Some(copying) = &mut self.straight else { return };
        copying.sent = first + pages;
        let set = Arc::new(self.sealer.dirty.take_range(first, pages));
        copying.copied.union(&set);
        let window = Arc::clone(&copying.window);
        self.work = Work::Copying { pass: 0, pages: set.len(), since: clock::now() };
        let is_zero = self.opens_zero;
        self.give(EpochId(0), Source::Straight(Arc::new(Straight { pages: set, window, is_zero })));
    }

    /// Whether more of the first pass is to come.
    pub(super) fn is_part(&self) -> bool {
        self.straight.as_ref().is_some_and(|copying| !copying.is_whole())
    }

    fn tell_end(&mut self) {
        if let Some(number) = self.approach.end() {
            self.tell(Message::WindowEnd(number));
            self.await_answer();
        }
    }

    pub(super) fn window_opened(&mut self, number: u64, grants: &[Grant]) {
        let pages = self.sealer.ram.pages();
        let mut window = self
            .straight
            .as_ref()
            .map_or_else(|| Arc::new(Window::new(pages)), |copying| Arc::clone(&copying.window));
        // Senders may be at what it was.
        if !Arc::make_mut(&mut window).widen(grants) {
            return self.bad_window(Kind::WindowOpen);
        }
        match self.approach.opened(number, window.is_whole()) {
            Some(true) => {
                if window.is_whole() {
                    self.window_due = None;
                }
                self.straight.get_or_insert_with(|| Copying::new(pages)).window = window;
                self.approached();
            }
            // It was ended before this came.
            Some(false) => {}
            None => self.bad_window(Kind::WindowOpen),
        }
    }

    pub(super) fn window_refused(&mut self, number: u64, reason: &str) {
        if !self.approach.none(number) {
            return self.bad_window(Kind::WindowNone);
        }
        tracing::warn!("the backup does not open its memory for a copy: {reason}");
        if self.approach.is_over() || self.approach.is_open() {
            self.window_due = None;
            self.approached();
        }
    }

    pub(super) fn window_closed(&mut self, number: u64) {
        if !self.approach.closed(number) {
            return self.bad_window(Kind::WindowClosed);
        }
        self.window_due = None;
        if let Work::Shutting { pass } = self.work {
            // The guest went on meanwhile.
            self.copy(pass);
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
        let is_copying = matches!(self.work, Work::Copying { .. }) && self.is_part();
        // That it has closed is not to be done without.
        if self.work == Work::Opening || is_copying {
            tracing::warn!("the backup does not say whether it opens all of its memory for a copy");
            return self.approached();
        }
        let what = "The backup does not say that nobody writes its memory any more".to_owned();
        self.step(Event::PeerLost(Error::Failed(what).chain()));
    }

    /// How the pages of a pass go.
    pub(super) fn live(&mut self, pages: Arc<PageSet>) -> Source {
        let Some(copying) = &mut self.straight else { return Source::Live(pages) };
        copying.copied.union(&pages);
        let window = Arc::clone(&copying.window);
        // What is zero now may have been something else in a pass before.
        Source::Straight(Arc::new(Straight { pages, window, is_zero: false }))
    }

    /// What can go straight has gone. What was written since comes again, and what has not gone yet.
    pub(super) fn end_straight(&mut self) {
        let mut pass = 1;
        if let Some(mut copying) = self.straight.take() {
            pass = u32::from(copying.is_whole());
            copying.copied.subtract(self.sealer.dirty.pages());
            let mib = (copying.copied.len() * PAGE_SIZE as u64) >> 20;
            tracing::info!(
                "{mib} MiB went straight into the backup's memory, which compares checksums"
            );
        }
        self.unlend();
        self.end_window(pass);
    }

    /// Has the backup make its memory its own again, and waits for that; then goes on with this pass.
    pub(super) fn end_window(&mut self, pass: u32) {
        self.work = Work::Shutting { pass };
        self.tell_end();
    }
}
