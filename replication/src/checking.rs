//! Switches for tests that run the very program that ships. They are in the environment, where no
//! client, no file and no peer can put them.
//!
//! - `UNDERSTUDY_TEST_EQUALITY=DIR`, for both sides of a pair on one host: at each seal the
//!   primary leaves a checksum of every page in DIR, while the guest stands still; when the backup
//!   has applied that epoch it compares its own memory, and adds a line to `DIR/verdict`:
//!   `epoch pages different first`, the last being the guest address of the first page that
//!   differs, or `-`.
//! - `UNDERSTUDY_TEST_BREAK=PART`, see [`is_broken`]. `cow`: pages are sent as they are when they
//!   are sent, not as they were at the seal; the switch above must find that out. `protect`: pages
//!   that count as write-protected are not; so must it that. `net-gate`, `disk-gate`: nothing waits
//!   for its epoch there. `reset`: the guest's wish for one is not fulfilled. `queue-pair`: a data connection's
//!   by RDMA fails at the primary, under WRITEs that read guest memory. `peer-queue-pair`: one is gone at the backup, which
//!   says nothing by TCP. `place`: some pages of a copy
//!   that goes straight into the backup's memory are not written; the comparison of checksums must find that out.
//! - `UNDERSTUDY_TEST_DELAYS=POINT:MICROSECONDS[,...]`: at each such point of an epoch the thread
//!   that gets there sleeps for a random time up to that: `seal` (pages are kept, the guest still
//!   stands), `arm` (after each call that protects), `fault` (before one is served), `take` (between
//!   claiming pages and copying them), `send` (before a chunk of pages goes out), `unprotect` (after that), `ack` (before an acknowledgement is
//!   looked at).
//! - `UNDERSTUDY_TEST_FAULT=POINT:ACTION:FILE`: once FILE is there, the thread that gets to POINT next
//!   renames it to `FILE.reached` and does ACTION: `kill` and `stop` send the process SIGKILL and
//!   SIGSTOP, `wait` stays there until `FILE.reached` is gone. So a test says when, knows that it
//!   happened, and it happens once. Points of the primary: `copy` (the first pages of a copy are on
//!   their way), `paired` (the record says so, the backup does not know), `seal` (the guest stands),
//!   `sealed` (it runs again, nothing is sent), `given` (the epoch is the senders'), `send` (a sender is about to
//!   send a group of its pages, as `UNDERSTUDY_TEST_DELAYS` has it), `sent` (it is out), `ack`, `acked` (its output is released), `handover` (the last epoch of a switch-over is
//!   to be sealed), `handed` (it is acknowledged). Of the backup: `accepted` (it has built the
//!   machine), `paired` (it has read the record), `staged` (it has some pages of an epoch), `verified` (the epoch is whole, not acknowledged),
//!   `acked` (it is, and not applied), `applying` (half of a connection's runs of pages are in the
//!   image), `applied`, `start` (it owns the VM), `started`. Of both: `reset` (the machine is to be reset), `cleared` (it is being reset, its memory is empty), `claim` (suspicion, nobody was asked), `swap` and `swapped` (around the arbiter's
//!   compare-and-swap, its answer not used yet).

use std::fs::{self, File};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use nix::sys::signal::Signal;
use vm_memory::Bytes;

use crate::ids::{PAGE_SIZE, PageIndex};
use crate::ram::Ram;

/// Pages that are read at a time.
const BATCH: usize = 64;

/// Whether a test wants to see that it finds out what happens without `part`.
#[must_use]
pub fn is_broken(part: &str) -> bool {
    std::env::var_os("UNDERSTUDY_TEST_BREAK").is_some_and(|broken| broken == part)
}

#[cfg(test)]
type Hook = Box<dyn Fn(&str) + Send + Sync>;

/// Sleeps where a test wants to see what a race does.
#[derive(Default)]
pub(crate) struct Delays {
    /// Points, and for how long at most.
    points: Vec<(String, u64)>,
    /// What a test of this crate does at a point instead.
    #[cfg(test)]
    hook: Option<Hook>,
}

impl Delays {
    pub(crate) fn from_environment() -> Self {
        let Ok(text) = std::env::var("UNDERSTUDY_TEST_DELAYS") else { return Self::default() };
        tracing::warn!("threads sleep at random for a test: {text}");
        let delay = |part: &str| {
            let (point, most_us) = part.split_once(':')?;
            Some((point.to_owned(), most_us.parse().ok()?))
        };
        Self {
            points: text.split(',').filter_map(delay).collect(),
            #[cfg(test)]
            hook: None,
        }
    }

    /// Calls `hook` at each point.
    #[cfg(test)]
    pub(crate) fn hook(hook: impl Fn(&str) + Send + Sync + 'static) -> Self {
        Self { points: vec![], hook: Some(Box::new(hook)) }
    }

    /// A point is reached.
    pub(crate) fn at(&self, point: &str) {
        reach(point);
        #[cfg(test)]
        if let Some(hook) = &self.hook {
            hook(point);
        }
        if let Some((_, most_us)) = self.points.iter().find(|(at, _)| at == point) {
            // Nothing needs a better dice: the hasher of each map has keys of its own.
            let random = RandomState::new().hash_one(point);
            std::thread::sleep(Duration::from_micros(random % (most_us + 1)));
        }
    }
}

/// How often a thread that waits at a point looks whether it may go on.
const FAULT_POLL: Duration = Duration::from_millis(1);

/// What happens to the process at a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FaultAction {
    Signal(Signal),
    Wait,
}

/// A fault that a test has prepared.
#[derive(Debug, PartialEq, Eq)]
struct Fault {
    point: String,
    action: FaultAction,
    file: PathBuf,
}

impl Fault {
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.splitn(3, ':');
        let (point, action, file) = (parts.next()?, parts.next()?, parts.next()?);
        let action = match action {
            "kill" => FaultAction::Signal(Signal::SIGKILL),
            "stop" => FaultAction::Signal(Signal::SIGSTOP),
            "wait" => FaultAction::Wait,
            _ => return None,
        };
        Some(Self { point: point.to_owned(), action, file: file.into() })
    }

    fn from_environment() -> Option<Self> {
        let text = std::env::var("UNDERSTUDY_TEST_FAULT").ok()?;
        let fault = Self::parse(&text);
        match &fault {
            Some(fault) => tracing::warn!("a test has prepared a fault: {fault:?}"),
            None => tracing::error!("UNDERSTUDY_TEST_FAULT is not POINT:ACTION:FILE: {text}"),
        }
        fault
    }

    fn at(&self, point: &str) {
        if self.point != point {
            return;
        }
        let mut reached = self.file.clone().into_os_string();
        reached.push(".reached");
        // Of all threads one succeeds, and only if the test wants it now.
        if fs::rename(&self.file, &reached).is_err() {
            return;
        }
        match self.action {
            FaultAction::Signal(signal) => {
                // To this very thread, which then goes no further: one for the process another
                // thread may take, and this one get to the next step.
                if let Err(error) = nix::sys::signal::raise(signal) {
                    tracing::error!("no signal at {point}: {error}");
                }
            }
            FaultAction::Wait => {
                while fs::exists(&reached).unwrap_or(false) {
                    std::thread::sleep(FAULT_POLL);
                }
            }
        }
    }
}

/// A point is reached at which a test may have prepared a fault. Where none has, one load.
pub fn reach(point: &str) {
    static FAULT: OnceLock<Option<Fault>> = OnceLock::new();
    if let Some(fault) = FAULT.get_or_init(Fault::from_environment) {
        fault.at(point);
    }
}

/// Compares all of memory, epoch by epoch.
#[derive(Debug)]
pub(crate) struct Equality {
    folder: PathBuf,
}

impl Equality {
    pub(crate) fn from_environment() -> Option<Self> {
        let folder = PathBuf::from(std::env::var_os("UNDERSTUDY_TEST_EQUALITY")?);
        tracing::warn!("all of memory is compared at each epoch, in {}", folder.display());
        Some(Self { folder })
    }

    /// The primary's side. Only while nobody writes `ram`, and before the epoch is sent.
    pub(crate) fn sealed(&self, ram: &Ram, epoch: u64) {
        if let Err(error) = self.leave(ram, epoch) {
            tracing::error!("epoch {epoch} cannot be compared: {error}");
        }
    }

    /// The backup's side. Only when all of the epoch is applied, and nothing of the next.
    pub(crate) fn applied(&self, ram: &Ram, epoch: u64) {
        if let Err(error) = self.compare(ram, epoch) {
            tracing::error!("epoch {epoch} cannot be compared: {error}");
        }
    }

    fn leave(&self, ram: &Ram, epoch: u64) -> io::Result<()> {
        let bytes: Vec<u8> = checksums(ram)?.into_iter().flat_map(u32::to_le_bytes).collect();
        fs::write(self.file(epoch), bytes)
    }

    fn compare(&self, ram: &Ram, epoch: u64) -> io::Result<()> {
        let file = self.file(epoch);
        let sealed = fs::read(&file)?;
        fs::remove_file(file)?;
        let applied = checksums(ram)?;
        if sealed.len() != applied.len() * size_of::<u32>() {
            return Err(io::Error::other("the two sides have not the same pages"));
        }
        let pairs = applied.iter().zip(sealed.chunks_exact(size_of::<u32>()));
        let mut bad = (0..).zip(pairs).filter(|(_, (mine, theirs))| mine.to_le_bytes() != **theirs);
        let first = bad.next().and_then(|(page, _)| ram.address(PageIndex(page)));
        let count = bad.count() + usize::from(first.is_some());
        let first = first.map_or_else(|| "-".to_owned(), |at| format!("{:#x}", at.0));
        let line = format!("{epoch} {} {count} {first}\n", applied.len());
        let mut verdict =
            File::options().create(true).append(true).open(self.folder.join("verdict"))?;
        verdict.write_all(line.as_bytes())
    }

    fn file(&self, epoch: u64) -> PathBuf {
        self.folder.join(format!("epoch-{epoch}"))
    }
}

/// One for each page.
fn checksums(ram: &Ram) -> io::Result<Vec<u32>> {
    let mut buffer = vec![0; BATCH * PAGE_SIZE];
    let mut sums = Vec::new();
    for region in ram.regions() {
        let mut address = region.start;
        let mut left = region.pages;
        while left > 0 {
            let count = left.min(BATCH as u64);
            let bytes = &mut buffer[..usize::try_from(count).map_or(0, |n| n * PAGE_SIZE)];
            ram.mapping().read_slice(bytes, address).map_err(io::Error::other)?;
            sums.extend(bytes.chunks_exact(PAGE_SIZE).map(crc32fast::hash));
            address.0 += count * PAGE_SIZE as u64;
            left -= count;
        }
    }
    Ok(sums)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::memory;

    #[test]
    fn a_fault_is_what_its_words_say_or_none() {
        let fault = |text: &str| Fault::parse(text);
        let file = PathBuf::from("/a:b/c");
        let (point, action) = ("ack".to_owned(), FaultAction::Wait);
        assert_eq!(fault("ack:wait:/a:b/c"), Some(Fault { point, action, file }));
        let killed = fault("seal:kill:/f").map(|fault| fault.action);
        assert_eq!(killed, Some(FaultAction::Signal(Signal::SIGKILL)));
        for text in ["", "ack", "ack:kill", "ack:hang:/f"] {
            assert_eq!(fault(text), None, "{text}");
        }
    }

    #[test]
    fn a_fault_comes_once_at_its_point_and_not_before_it_is_wanted() -> io::Result<()> {
        let folder = tempfile::tempdir()?;
        let (file, reached) = (folder.path().join("now"), folder.path().join("now.reached"));
        let fault =
            Fault { point: "ack".to_owned(), action: FaultAction::Wait, file: file.clone() };
        fault.at("ack");
        File::create(&file)?;
        fault.at("seal");
        assert!(file.exists(), "another point");
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| fault.at("ack"));
            while !reached.exists() {
                std::thread::yield_now();
            }
            // Whoever comes later passes.
            fault.at("ack");
            assert!(!waits.is_finished());
            fs::remove_file(&reached)
        })
    }

    #[test]
    fn a_page_that_differs_is_named() -> io::Result<()> {
        let folder = tempfile::tempdir()?;
        let equality = Equality { folder: folder.path().to_owned() };
        let (primary, backup) =
            (memory(&[(0, 3), (0x10000, 70)]), memory(&[(0, 3), (0x10000, 70)]));
        let page = [7; PAGE_SIZE];
        for ram in [&primary, &backup] {
            assert!(ram.write_page(PageIndex(2), &page));
        }
        equality.sealed(&primary, 1);
        equality.applied(&backup, 1);
        equality.sealed(&primary, 2);
        assert!(backup.write_page(PageIndex(4), &page));
        assert!(backup.write_page(PageIndex(72), &page));
        equality.applied(&backup, 2);
        let verdict = fs::read_to_string(folder.path().join("verdict"))?;
        assert_eq!(verdict, "1 73 0 -\n2 73 2 0x11000\n");
        assert_eq!(fs::read_dir(folder.path())?.count(), 1, "what was compared is gone");
        Ok(())
    }
}
