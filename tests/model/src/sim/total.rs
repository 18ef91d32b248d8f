//! What many runs came to.

use std::time::Duration;

use super::coverage::Coverage;
use super::run::Summary;

#[derive(Debug, Default)]
pub struct Total {
    pub seeds: u64,
    pub events: u64,
    pub commits: u64,
    pub responses: u64,
    pub lines: u64,
    pub takeovers: u64,
    pub bases: u64,
    pub refused: u64,
    pub garbled: u64,
    pub wire_bytes: u64,
    pub storage_calls: u64,
    pub storage_faults: u64,
    pub records_lost: u64,
    pub etcd_requests: u64,
    pub etcd_faults: u64,
    pub coverage: Coverage,
    failure: Option<(u64, String)>,
}

impl Total {
    pub fn add(&mut self, seed: u64, summary: Summary) {
        self.seeds += 1;
        self.events += summary.events;
        self.commits += summary.commits;
        self.responses += summary.responses;
        self.lines += summary.lines;
        self.takeovers += summary.takeovers;
        self.bases += summary.bases;
        self.refused += summary.refused;
        self.garbled += summary.garbled;
        self.wire_bytes += summary.wire_bytes;
        self.storage_calls += summary.storage_calls;
        self.storage_faults += summary.storage_faults;
        self.records_lost += summary.records_lost;
        self.etcd_requests += summary.etcd_requests;
        self.etcd_faults += summary.etcd_faults;
        self.coverage.add(&summary.coverage);
        if let Some(failure) = summary.failure
            && self.failed().is_none_or(|first| seed < first)
        {
            self.failure = Some((seed, failure));
        }
    }

    /// The first seed that failed.
    #[must_use]
    pub fn failed(&self) -> Option<u64> {
        self.failure.as_ref().map(|(seed, _)| *seed)
    }

    #[must_use]
    pub fn failure(&self) -> Option<&(u64, String)> {
        self.failure.as_ref()
    }

    pub fn print(&self, took: Duration) {
        let counts = self.coverage.counts();
        println!("transitions of the shipped machines:");
        for (name, count) in &counts {
            let mark = if *count == 0 { "  NOT EXERCISED" } else { "" };
            println!("{count:>12}  {name}{mark}");
        }
        let made = counts.iter().filter(|(_, count)| *count > 0).count();
        println!(
            "{} bytes of pages' frames, {} bits garbled, {} copies from what was kept, {} calls refused",
            self.wire_bytes, self.garbled, self.bases, self.refused
        );
        println!(
            "{} calls of the arbiter's storage, {} of them wrong, {} records lost in power cuts",
            self.storage_calls, self.storage_faults, self.records_lost
        );
        println!(
            "{} requests to the arbiter's cluster, {} of them wrong",
            self.etcd_requests, self.etcd_faults
        );
        println!(
            "{} seeds, {} events, {} epochs committed and compared, {} take-overs, {} answers, \
             {} lines, {made} of {} transitions, {:.1} s",
            self.seeds,
            self.events,
            self.commits,
            self.takeovers,
            self.responses,
            self.lines,
            counts.len(),
            took.as_secs_f64()
        );
        match &self.failure {
            Some((seed, failure)) => println!("seed {seed} FAILED: {failure}"),
            None => println!("0 seeds failed"),
        }
    }
}
