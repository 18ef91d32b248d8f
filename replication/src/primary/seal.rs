//! One seal: the pause, and nothing in it that can be done outside.

use std::sync::Arc;
use std::time::{Duration, Instant};

use api::replication::Cow;

use super::send::Source;
use crate::capture::cow::copy::CopyFreezer;
use crate::capture::cow::protect::ProtectFreezer;
use crate::capture::cow::{Freezer, Kept};
use crate::capture::dirty::Dirty;
use crate::checking::{self, Delays, Equality};
use crate::disk::{Journal, Log};
use crate::engine::clock;
use crate::error::{Error, chain};
use crate::guest::{Guest, GuestError};
use crate::ids::{EpochId, PAGE_SIZE};
use crate::ram::{PageSet, Ram};

/// What an epoch is made of.
pub(super) struct Sealed<S> {
    pub(super) state: S,
    pub(super) source: Source,
    /// Of the disks.
    pub(super) log: Log,
    /// How long the guest stood still.
    pub(super) stood: Duration,
    /// Of that, each step's part: stop, harvest, keep, capture, release.
    pub(super) steps: [Duration; 5],
}

/// Times the steps of a pause.
struct Steps {
    began: Instant,
    steps: [Duration; 5],
    next: usize,
}

impl Steps {
    fn since(began: Instant) -> Self {
        Self { began, steps: Default::default(), next: 0 }
    }

    /// The next step is over.
    fn done(&mut self) {
        let now = clock::now();
        self.steps[self.next] = now.duration_since(self.began);
        (self.began, self.next) = (now, self.next + 1);
    }
}

/// What a pause brought.
pub(super) enum Pause<S> {
    /// The guest runs, except for [`Cow::Off`].
    Sealed(Sealed<S>),
    /// The set or the log is too large for the backup; the guest still stands.
    TooLarge { bytes: u64 },
}

/// What an epoch may have at most.
pub(super) struct Room {
    pub(super) pages: u64,
    /// Of the log of the disks.
    pub(super) log_bytes: u64,
}

/// The parts of a primary that a seal needs.
pub(super) struct Sealer {
    pub(super) ram: Ram,
    pub(super) dirty: Dirty,
    /// `None`: the guest stands until its pages are sent.
    freezer: Option<Box<dyn Freezer>>,
    pub(super) journal: Option<Arc<Journal>>,
    /// The set that was sealed last: its pages are on their way, until [`Sealer::ahead`] of the next seal.
    sealed: Arc<PageSet>,
    /// Takes the place of a set whose epoch is not acknowledged when the next one is sealed.
    spare: Option<PageSet>,
    /// Since when the guest stands still.
    stands: Option<Instant>,
    /// It does so because there is no room for more, and how long it did in all.
    waits: bool,
    waited: Duration,
    /// For tests: compares all of memory, and sends pages that are not frozen.
    equality: Option<Equality>,
    is_thawed: bool,
    pub(super) delays: Delays,
}

fn failed(what: &'static str) -> impl FnOnce(GuestError) -> Error {
    move |source| Error::Guest { what, source }
}

/// How pages are kept. Where the kernel has no write protection for us, all are copied if that is
/// left to us.
fn freezer(
    ram: &Ram,
    cow: Cow,
    pages_max: u64,
    patience: Duration,
) -> Result<Option<Box<dyn Freezer>>, Error> {
    let copies = || -> Result<Option<Box<dyn Freezer>>, Error> {
        let freezer = CopyFreezer::new(pages_max);
        Ok(Some(Box::new(freezer.map_err(|error| Error::Failed(chain(&error)))?)))
    };
    Ok(match cow {
        Cow::Off => None,
        Cow::Copy => copies()?,
        Cow::Protect | Cow::Hybrid => match ProtectFreezer::new(ram, cow, patience) {
            Ok(freezer) => Some(Box::new(freezer) as _),
            Err(error) if cow == Cow::Hybrid => {
                tracing::warn!("no copy-on-write, dirty pages are copied: {}", chain(&error));
                copies()?
            }
            // A sender of the session before, held up by its device, has not let go of the memory yet.
            Err(error) if error.is_busy() => return Err(Error::Failed(chain(&error))),
            Err(error) => {
                return Err(Error::Option { option: "cow", reason: chain(&error) });
            }
        },
    })
}

impl Sealer {
    /// Keeps pages as `cow` says, `pages_max` an epoch; a guest waits no longer than `patience` for a device
    /// that reads them.
    pub(super) fn new(
        ram: Ram,
        cow: Cow,
        pages_max: u64,
        patience: Duration,
    ) -> Result<Self, Error> {
        let pages = ram.pages();
        Ok(Self {
            dirty: Dirty::new(pages),
            freezer: freezer(&ram, cow, pages_max, patience)?,
            ram,
            journal: None,
            sealed: Arc::new(PageSet::new(pages)),
            spare: None,
            stands: None,
            waits: false,
            waited: Duration::ZERO,
            equality: Equality::from_environment(),
            is_thawed: checking::is_broken("cow"),
            delays: Delays::from_environment(),
        })
    }

    /// Makes ready, while the guest runs, for the next pause.
    pub(super) fn prepare(&mut self) {
        if let Some(freezer) = &mut self.freezer {
            freezer.prepare();
        }
        if Arc::strong_count(&self.sealed) > 1 && self.spare.is_none() {
            self.spare = Some(PageSet::new(self.dirty.pages().universe()));
        }
    }

    /// The set of an epoch that was acknowledged.
    pub(super) fn recycle(&mut self, set: Arc<PageSet>) {
        if self.spare.is_none()
            && let Ok(mut set) = Arc::try_unwrap(set)
        {
            set.clear();
            self.spare = Some(set);
        }
    }

    /// Keeps no pages any more: nothing is sealed after this.
    pub(super) fn let_go(&mut self) {
        self.freezer = None;
    }

    /// What became of pages so far.
    pub(super) fn kept(&self) -> Kept {
        self.freezer.as_ref().map_or(Kept::default(), |freezer| freezer.kept())
    }

    /// Whether the guest stands still for this side.
    pub(super) fn stands(&self) -> bool {
        self.stands.is_some()
    }

    /// The set that was sealed last, if nothing was done ahead of the next one.
    pub(super) fn sealed(&self) -> &Arc<PageSet> {
        &self.sealed
    }

    /// Adds what the guest wrote since the last harvest.
    pub(super) fn harvest(&mut self, guest: &mut impl Guest) -> Result<(), Error> {
        self.dirty.harvest(guest).map_err(failed("read the dirty pages"))
    }

    /// Takes the set as it is; for copies that go straight into the backup's image.
    pub(super) fn take(&mut self) -> Arc<PageSet> {
        let universe = self.dirty.pages().universe();
        let spare = match Arc::get_mut(&mut self.sealed) {
            Some(sealed) => std::mem::replace(sealed, PageSet::new(0)),
            None => self.spare.take().unwrap_or_else(|| PageSet::new(universe)),
        };
        self.sealed = Arc::new(self.dirty.take(spare));
        Arc::clone(&self.sealed)
    }

    /// Does ahead of the pause what can be done while the guest runs.
    pub(super) fn ahead(&mut self, guest: &mut impl Guest) -> Result<(), Error> {
        // What was sealed last makes room for what is next, unless its pages are still on their way.
        if let Some(spare) = Arc::get_mut(&mut self.sealed) {
            spare.clear();
        }
        let Some(freezer) = self.freezer.as_mut().filter(|_| self.stands.is_none()) else {
            return Ok(());
        };
        if !freezer.wants_ahead() {
            return Ok(());
        }
        self.dirty.harvest(guest).map_err(failed("read the dirty pages"))?;
        self.dirty.begin_late();
        let copied = freezer.ahead(&self.ram, self.dirty.pages());
        copied.map_err(|error| Error::Memory(chain(&error)))
    }

    /// Has the guest wait until there is room for what it writes.
    pub(super) fn hold_up(&mut self, guest: &mut impl Guest) -> Result<(), Error> {
        if self.stands.is_none() {
            self.stands = Some(clock::now());
            guest.hold().map_err(failed("stop the vCPUs"))?;
        }
        self.waits = true;
        Ok(())
    }

    /// How long the guest waited for room, in all.
    pub(super) fn waited(&self) -> Duration {
        self.waited
    }

    /// From here on the guest stands for a seal.
    fn end_wait(&mut self) {
        if std::mem::take(&mut self.waits)
            && let Some(since) = self.stands.replace(clock::now())
        {
            self.waited += clock::since(since);
        }
    }

    /// Lets the guest run if it stands still; returns how long it did.
    pub(super) fn release(&mut self, guest: &mut impl Guest) -> Result<Duration, Error> {
        self.end_wait();
        let Some(since) = self.stands.take() else { return Ok(Duration::ZERO) };
        guest.release().map_err(failed("let the vCPUs run"))?;
        Ok(clock::since(since))
    }

    /// Seals `epoch`. The guest stands still while this runs and, unless `stay` (the last epoch of a
    /// switch-over), runs after it.
    pub(super) fn seal<G: Guest>(
        &mut self,
        guest: &mut G,
        epoch: EpochId,
        stay: bool,
        room: &Room,
        quiet: impl FnOnce(),
    ) -> Result<Pause<G::State>, Error> {
        self.end_wait();
        self.stands.get_or_insert_with(clock::now);
        guest.quiesce().map_err(failed("stop the vCPUs"))?;
        let mut steps = Steps::since(self.stands.unwrap_or_else(clock::now));
        steps.done();
        if stay {
            guest.settle_output();
        }
        // Nothing more is sent from here on: a wish for an early seal is fulfilled.
        quiet();
        self.harvest(guest)?;
        steps.done();
        let pages = self.dirty.pages().len();
        if pages > room.pages {
            return Ok(Pause::TooLarge { bytes: pages * PAGE_SIZE as u64 });
        }
        // Changes that were under way before the journal was there have no room in it.
        let open = self.journal.as_ref().map_or(0, |journal| journal.open_bytes());
        if open > room.log_bytes {
            return Ok(Pause::TooLarge { bytes: open });
        }
        let set = self.take();
        let frozen = match &mut self.freezer {
            Some(freezer) if !self.is_thawed => {
                let frozen = freezer.freeze(&self.ram, &set, self.dirty.late());
                Some(frozen.map_err(|error| Error::Memory(chain(&error)))?)
            }
            _ => None,
        };
        self.delays.at("seal");
        steps.done();
        let state = guest.capture().map_err(failed("read the machine state"))?;
        guest.seal_output(epoch);
        let log = self.journal.as_ref().map(|journal| journal.seal()).unwrap_or_default();
        steps.done();
        if let Some(equality) = &self.equality {
            equality.sealed(&self.ram, epoch.0);
        }
        let since = self.stands.unwrap_or_else(clock::now);
        let runs_on = (frozen.is_some() || self.is_thawed) && !stay;
        let stood = if runs_on { self.release(guest)? } else { clock::since(since) };
        steps.done();
        let source = match frozen {
            Some(frozen) => Source::Frozen(frozen),
            None if runs_on => Source::Live(set),
            None => Source::Still(set),
        };
        Ok(Pause::Sealed(Sealed { state, source, log, stood, steps: steps.steps }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::memory;

    #[test]
    fn memory_that_a_session_before_still_protects_is_waited_for() {
        let ram = memory(&[(0, 64)]);
        let kept = |cow| freezer(&ram, cow, 64, Duration::from_secs(1));
        let before = kept(Cow::Protect).unwrap();
        let error = kept(Cow::Protect).err().unwrap();
        assert!(error.may_pass(), "{error}");
        assert!(kept(Cow::Hybrid).unwrap().is_some());
        drop(before);
        kept(Cow::Protect).unwrap();
    }
}
