//! The longest time in which a processor did not run, as it sees it itself: the largest gap
//! between two readings of its clock, while it was working or after the end of a wait.

/// Gaps above this are counted.
const COUNTED_NS: u64 = 1_000_000;

/// Collects gaps until they are reported.
#[derive(Clone, Debug)]
pub struct Standstill {
    last_ns: u64,
    max_ns: u64,
    counted: u64,
}

/// What one report says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    pub max_us: u64,
    pub over_1ms: u64,
}

impl Standstill {
    #[must_use]
    pub fn new(now_ns: u64) -> Self {
        Self { last_ns: now_ns, max_ns: 0, counted: 0 }
    }

    /// The processor has been working since the last call.
    pub fn worked(&mut self, now_ns: u64) {
        self.gap(now_ns.saturating_sub(self.last_ns));
        self.last_ns = now_ns;
    }

    /// The processor waited, and meant to wake at `until_ns`.
    pub fn waited(&mut self, until_ns: u64, now_ns: u64) {
        self.gap(now_ns.saturating_sub(until_ns.max(self.last_ns)));
        self.last_ns = now_ns;
    }

    /// What happened until now (a line that was printed) is not to count.
    pub fn skip(&mut self, now_ns: u64) {
        self.last_ns = now_ns;
    }

    /// Reports and begins anew.
    pub fn report(&mut self) -> Report {
        let report = Report { max_us: self.max_ns / 1000, over_1ms: self.counted };
        self.max_ns = 0;
        self.counted = 0;
        report
    }

    fn gap(&mut self, gap_ns: u64) {
        self.max_ns = self.max_ns.max(gap_ns);
        self.counted += u64::from(gap_ns > COUNTED_NS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_gap_is_reported_once() {
        let mut standstill = Standstill::new(1000);
        standstill.worked(3000);
        standstill.worked(2_503_000);
        standstill.worked(2_504_000);
        assert_eq!(standstill.report(), Report { max_us: 2500, over_1ms: 1 });
        assert_eq!(standstill.report(), Report { max_us: 0, over_1ms: 0 });
    }

    #[test]
    fn only_the_time_after_a_wait_counts() {
        let mut standstill = Standstill::new(0);
        standstill.waited(10_000_000, 10_050_000);
        standstill.waited(10_000_000, 10_060_000);
        standstill.skip(50_000_000);
        standstill.worked(50_001_000);
        assert_eq!(standstill.report(), Report { max_us: 50, over_1ms: 0 });
    }
}
