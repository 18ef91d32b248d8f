//! The arbiter's thread: its calls may block for as long as the storage does.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::spawn;
use crate::checking::reach;
use crate::error::{Error, chain};
use crate::ownership::{Arbiter, ArbiterError, carry_out};
use crate::protocol::asking::Asking;
pub(crate) use crate::protocol::asking::Next;
use crate::protocol::ownership::{Action, Claim, Event};

/// What the thread reports: the claim's number, what happened, and the error if a call failed.
pub(crate) struct Report {
    pub(crate) claim: u64,
    pub(crate) event: Event,
    pub(crate) error: Option<String>,
    /// It failed because an older record stands than was expected, or none.
    pub(crate) is_gone: bool,
}

/// Asks the arbiter on behalf of an engine: [`Asking`] decides, a thread calls.
pub(crate) struct Asker {
    calls: Option<Sender<(u64, Action)>>,
    asking: Asking,
    /// The next call is the first of a session.
    begins_anew: Arc<AtomicBool>,
}

impl Asker {
    /// Starts the thread where there is an arbiter.
    pub(crate) fn start(
        arbiter: Option<Box<dyn Arbiter>>,
        deliver: impl FnMut(Report) -> bool + Send + 'static,
    ) -> Result<Self, Error> {
        let begins_anew = Arc::<AtomicBool>::default();
        let calls = match arbiter {
            Some(arbiter) => {
                let (calls, queue) = unbounded();
                let begins = Arc::clone(&begins_anew);
                // Not joined: a call that hangs in the storage must not hang the engine's end.
                spawn("repl-arbiter", None, move || {
                    work(arbiter.as_ref(), &queue, &begins, deliver)
                })?;
                Some(calls)
            }
            None => None,
        };
        Ok(Self { calls, asking: Asking::default(), begins_anew })
    }

    /// Without a thread: who calls takes the calls, and reports.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn simulated(exists: bool) -> (Self, Receiver<(u64, Action)>) {
        let (calls, queue) = unbounded();
        let begins_anew = Arc::default();
        (Self { calls: exists.then_some(calls), asking: Asking::default(), begins_anew }, queue)
    }

    /// Whether there is an arbiter.
    pub(crate) fn exists(&self) -> bool {
        self.calls.is_some()
    }

    /// A session begins: see [`Arbiter::begin_anew`].
    pub(crate) fn begin_anew(&self) {
        self.begins_anew.store(true, Ordering::Release);
    }

    /// Begins a claim; an older one is forgotten.
    pub(crate) fn begin(&mut self, claim: Claim, first: Action) -> Next {
        let next = self.asked(|asking| asking.begin(claim, first));
        self.call(next)
    }

    /// Asks for the record; a claim under way is forgotten.
    pub(crate) fn read(&mut self) -> Next {
        let next = self.asking.read();
        self.call(next)
    }

    /// Goes on after a report.
    pub(crate) fn report(&mut self, report: &Report) -> Next {
        let next = self.asked(|asking| asking.answered(report.claim, report.event.clone()));
        self.call(next)
    }

    /// Goes on after a wait.
    pub(crate) fn timer(&mut self) -> Next {
        let next = self.asked(Asking::timer);
        self.call(next)
    }

    fn asked(&mut self, step: impl FnOnce(&mut Asking) -> Next) -> Next {
        #[cfg(any(test, feature = "testing"))]
        let before = self.asking.claim().map(Claim::state);
        let next = step(&mut self.asking);
        #[cfg(any(test, feature = "testing"))]
        crate::engine::trace::claim(before, &self.asking, &next);
        next
    }

    /// Makes a call on the thread, which will report.
    fn call(&mut self, next: Next) -> Next {
        let Next::Call(number, action) = next else { return next };
        let calls = self.calls.as_ref().expect("claims are begun with an arbiter only");
        // The thread lives as long as this sender.
        let _ = calls.send((number, action.clone()));
        Next::Call(number, action)
    }
}

fn work(
    arbiter: &dyn Arbiter,
    queue: &Receiver<(u64, Action)>,
    begins_anew: &AtomicBool,
    mut deliver: impl FnMut(Report) -> bool,
) {
    for (claim, action) in queue {
        let is_swap = matches!(action, Action::Swap { .. });
        if is_swap {
            reach("swap");
        }
        if begins_anew.swap(false, Ordering::AcqRel) {
            arbiter.begin_anew();
        }
        let answer = carry_out(arbiter, &action);
        if is_swap {
            reach("swapped");
        }
        let report = match answer {
            Ok(event) => Report { claim, event, error: None, is_gone: false },
            Err(error) => {
                let is_gone = matches!(error, ArbiterError::Vanished(_));
                Report { claim, event: Event::Failed, error: Some(chain(&error)), is_gone }
            }
        };
        if !deliver(report) {
            return;
        }
    }
}
