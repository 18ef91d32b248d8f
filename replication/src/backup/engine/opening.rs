//! Opening the image to the primary's device, for a copy that nobody could start yet.
//!
//! Enters: what the primary asks, each piece that is registered, what became of registering. Leaves: what it is told.
//! Always holds: an engine does not wait for a device: threads `repl-open` and `repl-shut` do; a piece that the primary
//! was told of stays open until it ends the window, unless the session ends before; no epoch is verified, and so none
//! acknowledged, before the image is this side's alone ([`Gate`]); a device that does not give it back ends the
//! session, and the image with it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::{Engine, Event, Input, Message, ReplicaBuilder};
use crate::engine::spawn;
use crate::error::chain;
use crate::protocol::backup::State;
use crate::protocol::window::{Gate, OUT_OF_TURN, Outcome, Work};
use crate::transport::rdma;
use crate::wire::Grant;

/// What became of registering an image: it, or why not.
pub(in crate::backup) type Registered = Result<rdma::Opened, Unopened>;

/// Why an image was not opened.
pub(in crate::backup) enum Unopened {
    /// Nobody writes it.
    Refused(String),
    /// No more than this, at which the primary may be.
    Short(rdma::Opened, String),
    /// A device has some of it, and the peer may write that.
    Kept(String),
}

/// How often a primary may ask for one copy. It does once; each time all of the image is registered.
const ASKS_MAX: u32 = 8;

/// The opening of a session's image.
#[derive(Default)]
pub(super) struct Opening {
    gate: Gate,
    /// How often it was asked for, for the present copy.
    asks: u32,
    /// What is open.
    opened: Option<rdma::Opened>,
    /// Raised: registering is to end.
    is_called_off: Arc<AtomicBool>,
}

impl Opening {
    /// Whether the image is this side's alone.
    pub(super) fn is_shut(&self) -> bool {
        self.gate.is_shut()
    }

    /// The primary copies anew.
    pub(super) fn begins_anew(&mut self) {
        self.asks = 0;
    }
}

impl Drop for Opening {
    /// What was opened is closed by a thread that holds the image's memory, and nobody else has that any more.
    fn drop(&mut self) {
        self.is_called_off.store(true, Ordering::Release);
    }
}

impl<B: ReplicaBuilder> Engine<B> {
    /// Whether nobody else writes the present session's image.
    pub(super) fn is_shut(&self) -> bool {
        self.session.as_ref().is_none_or(|session| session.opening.is_shut())
    }

    /// The primary wants to write the image.
    pub(super) fn window_asked(&mut self, number: u64) {
        let is_in_turn = self.machine.state() == State::Syncing && self.pairing.is_none();
        let Some(session) = &mut self.session else { return };
        session.opening.asks += 1;
        if !is_in_turn || session.opening.asks > ASKS_MAX {
            return self.step(Event::Bad(OUT_OF_TURN.to_owned()));
        }
        let asked = session.opening.gate.asked(number);
        self.window_work(asked);
    }

    /// It has done so.
    pub(super) fn window_ended(&mut self, number: u64) {
        let Some(session) = &mut self.session else { return };
        let ended = session.opening.gate.ended(number);
        self.window_work(ended);
    }

    /// Some more of it is registered.
    pub(super) fn window_widened(&mut self, grants: Vec<Grant>) {
        let Some(session) = &mut self.session else { return };
        match session.opening.gate.widened() {
            Some(Work::TellOpen(number)) => self.tell(Message::WindowOpen { number, grants }),
            work => self.window_work(work.ok_or(OUT_OF_TURN)),
        }
    }

    /// Registering is over; `registered` is closed again if the session it is for is gone.
    pub(super) fn window_opened(&mut self, registered: Registered) {
        let Some(session) = &mut self.session else { return };
        let opening = &mut session.opening;
        let (outcome, reason) = match registered {
            Ok(opened) => {
                opening.opened = Some(opened);
                (Outcome::All, None)
            }
            Err(Unopened::Short(opened, why)) => {
                opening.opened = Some(opened);
                (Outcome::Some, Some(why))
            }
            Err(Unopened::Refused(why)) => (Outcome::Nothing, Some(why)),
            // Not shut, and not to be.
            Err(Unopened::Kept(why)) => return self.step(Event::Bad(why)),
        };
        let work = opening.gate.opened(outcome);
        if outcome == Outcome::Nothing {
            self.show_opened(0);
        }
        if let (Some(Work::TellNone(number)), Some(reason)) = (work, reason) {
            let what = if outcome == Outcome::Some {
                "the rest of the first copy"
            } else {
                "the first copy"
            };
            tracing::warn!("{what} comes through the rings: {reason}");
            self.status.failed(&reason);
            return self.tell(Message::WindowNone { number, reason });
        }
        self.window_work(work.ok_or(OUT_OF_TURN));
    }

    /// The image was given back, or a device keeps some of it.
    pub(super) fn window_closed(&mut self, closed: Result<(), String>) {
        if let Err(error) = closed {
            return self.step(Event::Bad(not_alone(&error)));
        }
        let Some(session) = &mut self.session else { return };
        let work = session.opening.gate.closed();
        self.window_work(work.ok_or(OUT_OF_TURN));
        // Epochs may have waited for this.
        self.go_on();
    }

    fn window_work(&mut self, work: Result<Work, &'static str>) {
        match work {
            Ok(Work::Open) => self.open_image(),
            Ok(Work::CallOff) => {
                if let Some(session) = &self.session {
                    session.opening.is_called_off.store(true, Ordering::Release);
                }
            }
            Ok(Work::Shut) => self.shut_image(),
            // What is told with more is told where that is known.
            Ok(Work::Nothing | Work::TellOpen(_) | Work::TellNone(_)) => {}
            Ok(Work::TellClosed(number)) => self.tell(Message::WindowClosed(number)),
            Err(reason) => self.step(Event::Bad(reason.to_owned())),
        }
    }

    /// Registers the image beside the engine.
    fn open_image(&mut self) {
        let Some(session) = &mut self.session else { return };
        session.opening.is_called_off = Arc::default();
        let called_off = Arc::clone(&session.opening.is_called_off);
        let (number, deliver) = (session.number, self.inputs.clone());
        let pieces = deliver.clone();
        let (adapter, ram) = (session.shared.rdma.clone(), session.shared.ram.clone());
        let (counters, status) = (Arc::clone(&self.status.counters), self.status.clone());
        let Some(adapter) = adapter else {
            return self.window_opened(Err(Unopened::Refused("Data comes by TCP here".to_owned())));
        };
        let body = move || {
            let began = Instant::now();
            let mut before = 0;
            let opened = adapter.open(&ram, &called_off, |bytes, grants| {
                // The primary hears that this goes on.
                counters.opened_bytes.fetch_add(bytes - before, Ordering::Relaxed);
                before = bytes;
                if let Some(path) = &mut status.lock().info.rdma {
                    path.registered_bytes = bytes;
                }
                if !grants.is_empty() {
                    let _ = pieces.send(Input::Widened(number, grants));
                }
            });
            let opened = opened.map_err(|why_not| {
                let rdma::NotOpened { error, rest } = *why_not;
                let why = || {
                    format!(
                        "The image cannot be registered with the RDMA device: {}",
                        chain(&error)
                    )
                };
                match (&error, rest) {
                    (rdma::LendError::Kept(_), _) => Unopened::Kept(not_alone(&chain(&error))),
                    (_, Some(rest)) => Unopened::Short(rest, why()),
                    (_, None) => Unopened::Refused(why()),
                }
            });
            if opened.is_ok() {
                let mib = ram.bytes() >> 20;
                let took = began.elapsed();
                tracing::info!("the primary may write {mib} MiB of the image, after {took:?}");
            }
            // An engine that has ended drops it, and it is closed.
            let _ = deliver.send(Input::Opened(number, opened));
        };
        if let Err(error) = spawn("repl-open", None, body) {
            self.window_opened(Err(Unopened::Refused(error.chain())));
        }
    }

    /// Gives the image back beside the engine.
    fn shut_image(&mut self) {
        let Some(session) = &mut self.session else { return };
        let Some(opened) = session.opening.opened.take() else { return };
        let (number, deliver) = (session.number, self.inputs.clone());
        let counters = Arc::clone(&self.status.counters);
        let body = move || {
            let began = Instant::now();
            let closed = opened.close(|bytes| {
                counters.opened_bytes.fetch_add(bytes, Ordering::Relaxed);
            });
            if closed.is_ok() {
                let took = began.elapsed();
                tracing::info!("the image is this host's alone again, after {took:?}");
            }
            let _ = deliver.send(Input::Closed(number, closed.map_err(|error| chain(&error))));
        };
        self.show_opened(0);
        if let Err(error) = spawn("repl-shut", None, body) {
            // Without a thread it was dropped, and is closed by another, or by none.
            self.window_closed(Err(error.chain()));
        }
    }

    fn show_opened(&self, bytes: u64) {
        if let Some(path) = &mut self.status.lock().info.rdma {
            path.registered_bytes = bytes;
        }
    }
}

fn not_alone(error: &str) -> String {
    format!("The image is not this host's alone any more: {error}")
}
