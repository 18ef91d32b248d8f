//! When to seal, and when the guest has to wait: a pure rule over times that the engine gives.
//!
//! Late when the guest is quiet, early when somebody waits for its output, and early when the
//! dirty set would outgrow what the backup can stage or what the link carries in a moment. A guest
//! that writes faster than the link stands still a little in each epoch, not long in one. Later than
//! `epoch_ms` where nobody waits and a seal costs more than it is worth ([`super::stretch`]).

use std::time::Duration;

use super::stretch::Stretch;
use crate::ids::PAGE_SIZE;

/// Longest epochs that an epoch's sending may take: what the guest may have to wait.
const SEND_EPOCHS_MAX: u32 = 2;
/// Least time for it, so that short epochs are not all pause.
const SEND_TIME_MIN: Duration = Duration::from_millis(20);
/// Fewer pages say little about the link: latency is most of their time.
const TELLING_PAGES: u64 = 256;
/// Pages that an epoch may have on any link.
const PAGES_MIN: u64 = 256;
/// An epoch that lasts longer than `epoch_ms` has at most these parts of what staging and link bear: its
/// sending takes half of `epoch_ms`, which output that begins meanwhile has to wait for.
const STRETCHED_STAGING_PARTS: u64 = 8;
const STRETCHED_LINK_PARTS: u64 = 2 * SEND_EPOCHS_MAX as u64;

/// The rule and what it has learnt.
#[derive(Clone, Debug)]
pub struct Cadence {
    longest: Duration,
    shortest: Duration,
    staging_pages: u64,
    limit: Duration,
    stretch: Stretch,
    /// Pages that the link carries in a second, once that is known.
    link_pages_per_s: Option<u64>,
}

impl Cadence {
    /// Epochs between `shortest` and `longest` whose pages should fit `staging_bytes`; up to
    /// `stretched` where nobody waits (`None`: eight times `longest`, 0.25 s at most).
    #[must_use]
    pub fn new(
        shortest: Duration,
        longest: Duration,
        stretched: Option<Duration>,
        staging_bytes: u64,
    ) -> Self {
        let staging_pages = staging_bytes / PAGE_SIZE as u64;
        let stretch = Stretch::new(longest, stretched);
        Self { longest, shortest, staging_pages, limit: longest, stretch, link_pages_per_s: None }
    }

    /// Most pages of an epoch.
    #[must_use]
    pub fn staging_pages(&self) -> u64 {
        self.staging_pages
    }

    /// Time from a seal to the next, with nothing in flight.
    #[must_use]
    pub fn interval(&self, output_waiting: bool) -> Duration {
        match output_waiting {
            true => self.shortest,
            false if self.limit == self.longest => self.stretch.interval(),
            false => self.limit.max(self.shortest),
        }
    }

    /// Time after which to look at what the guest wrote, where nothing is sealed then.
    #[must_use]
    pub fn look(&self) -> Duration {
        self.limit.max(self.shortest)
    }

    /// Whether an epoch may last longer than `longest`: then it is to be watched.
    #[must_use]
    pub fn is_stretched(&self) -> bool {
        self.limit == self.longest && self.stretch.is_stretched()
    }

    /// Whether a stretched epoch of so many pages, and as much of disks' changes, ends now.
    #[must_use]
    pub fn is_stretched_enough(&self, pages: u64) -> bool {
        pages > self.small()
    }

    /// Nobody can say what the guest writes meanwhile: no epoch is longer than `longest`.
    pub fn forgo_stretching(&mut self) {
        self.stretch.forgo();
    }

    /// Somebody waits for output, or did until a seal.
    pub fn output(&mut self) {
        self.stretch.output();
    }

    /// Most pages of an epoch that is longer than `longest`.
    fn small(&self) -> u64 {
        let staging = self.staging_pages / STRETCHED_STAGING_PARTS;
        staging.min(self.link_pages() / STRETCHED_LINK_PARTS)
    }

    /// Learns from an epoch whose pages are all out.
    pub fn sent(&mut self, pages: u64, took: Duration) {
        if pages < TELLING_PAGES {
            return;
        }
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1);
        let seen = pages.saturating_mul(1_000_000) / micros;
        let old = self.link_pages_per_s.unwrap_or(seen);
        self.link_pages_per_s = Some(old - old / 4 + seen / 4);
    }

    /// Pages that the link carries in the time that sending an epoch may take.
    #[must_use]
    pub fn link_pages(&self) -> u64 {
        let time = (self.longest * SEND_EPOCHS_MAX).max(SEND_TIME_MIN);
        let millis = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let rate = self.link_pages_per_s.unwrap_or(u64::MAX);
        (rate.saturating_mul(millis) / 1000).max(PAGES_MIN)
    }

    /// Learns from an epoch in which the guest ran for `took`, with `log_bytes` of disks' changes, for which the guest `stood`:
    /// at the same rate the next one shall fill half of what it may.
    pub fn sealed(&mut self, pages: u64, log_bytes: u64, took: Duration, stood: Duration) {
        let half = (self.staging_pages.min(self.link_pages()) / 2).max(1);
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1);
        let room = match pages {
            0 => u64::MAX,
            pages => half.saturating_mul(micros) / pages,
        };
        // Down at once, up by halves: one quiet epoch does not make the next one safe.
        let room = Duration::from_micros(room);
        let up = self.limit.saturating_mul(3) / 2 + Duration::from_micros(1);
        self.limit = room.min(up).min(self.longest);
        let logged = log_bytes / PAGE_SIZE as u64;
        self.stretch.sealed(pages.saturating_add(logged), self.small(), took, stood);
    }

    /// The guest has to wait: the dirty set is about to outgrow the staging, or the link carries no
    /// more in a moment.
    #[must_use]
    pub fn is_near_full(&self, pages: u64) -> bool {
        pages >= (self.staging_pages - self.staging_pages / 4).min(self.link_pages())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn output_shortens_and_dirt_bounds_the_interval() {
        let mut cadence = Cadence::new(MS, 25 * MS, None, 1000 * PAGE_SIZE as u64);
        assert_eq!(cadence.interval(false), 25 * MS);
        assert_eq!(cadence.interval(true), MS);
        cadence.sealed(1000, 0, 10 * MS, Duration::ZERO);
        assert_eq!(cadence.interval(false), 5 * MS);
        cadence.sealed(1, 0, 10 * MS, Duration::ZERO);
        assert!(cadence.interval(false) < 8 * MS);
        for _ in 0..20 {
            cadence.sealed(0, 0, MS, Duration::ZERO);
        }
        assert_eq!(cadence.interval(false), 25 * MS);
        cadence.sealed(u64::MAX, 0, MS, Duration::ZERO);
        assert_eq!(cadence.interval(false), MS);
    }

    #[test]
    fn a_slow_link_makes_epochs_small() {
        let mut cadence = Cadence::new(MS, 25 * MS, None, 65536 * PAGE_SIZE as u64);
        cadence.sealed(10_000, 0, 25 * MS, Duration::ZERO);
        assert_eq!(cadence.interval(false), 25 * MS);
        // 100 MiB/s: 1280 pages in 50 ms.
        cadence.sent(2560, 100 * MS);
        assert!(cadence.is_near_full(1280) && !cadence.is_near_full(1279));
        cadence.sealed(10_000, 0, 25 * MS, Duration::ZERO);
        assert_eq!(cadence.interval(false), Duration::from_micros(1600));
        cadence.sent(10, 1000 * MS);
        assert!(!cadence.is_near_full(1279), "a few pages say nothing");
        for _ in 0..20 {
            cadence.sent(1_000_000, MS);
        }
        assert!(!cadence.is_near_full(40_000), "a fast one does not bound");
        for _ in 0..50 {
            cadence.sent(256, 1000 * MS);
        }
        assert!(cadence.is_near_full(256) && !cadence.is_near_full(255), "never less");
    }

    #[test]
    fn a_stretched_epoch_ends_where_it_grows() {
        let mut cadence = Cadence::new(MS, 25 * MS, None, 65536 * PAGE_SIZE as u64);
        let seal = |cadence: &mut Cadence, count: u32, pages: u64| {
            for _ in 0..count {
                cadence.sealed(pages, 0, cadence.interval(false), MS);
            }
        };
        seal(&mut cadence, 50, 100);
        assert!(cadence.is_stretched());
        assert_eq!(cadence.interval(false), 200 * MS);
        assert_eq!((cadence.interval(true), cadence.look()), (MS, 25 * MS));
        assert!(cadence.is_stretched_enough(8193) && !cadence.is_stretched_enough(8192));
        // 64,000 pages in a second: half an epoch_ms for 800.
        cadence.sent(6400, 100 * MS);
        assert!(cadence.is_stretched_enough(801) && !cadence.is_stretched_enough(800));
        // Changes of disks have to be sent as well.
        cadence.sealed(100, 1500 * PAGE_SIZE as u64, 200 * MS, MS);
        assert_eq!(cadence.interval(false), 100 * MS);
        // More than the link bears: shorter than epoch_ms.
        cadence.sealed(20_000, 0, 200 * MS, MS);
        assert_eq!(cadence.interval(false), 16 * MS);
        cadence.sealed(20_000, 0, 25 * MS, MS);
        assert_eq!(cadence.interval(false), 2 * MS);
        assert!(!cadence.is_stretched());
        seal(&mut cadence, 50, 100);
        assert!(cadence.is_stretched());
        cadence.output();
        assert_eq!(cadence.interval(false), 25 * MS);
        seal(&mut cadence, 50, 100);
        cadence.forgo_stretching();
        assert_eq!(cadence.interval(false), 25 * MS);
    }

    #[test]
    fn three_quarters_are_near_full() {
        let cadence = Cadence::new(MS, MS, None, 100 * PAGE_SIZE as u64);
        assert!(!cadence.is_near_full(74));
        assert!(cadence.is_near_full(75));
    }
}
