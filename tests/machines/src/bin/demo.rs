//! The main job, once, for a person to watch: protect a VM, kill its host process, see it go on.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use api::replication::ReplicationInfo;
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use understudy_tests::interrupt;
use understudy_tests::pair::Setup;
use understudy_tests::round::{self, Outcome, Watcher};
use understudy_tests::timeline;

/// Most seconds under protection: a day.
const SECONDS_MAX: f64 = 86_400.0;

/// Runs a backup and a primary on this machine, kills the primary, and reports.
#[derive(Parser)]
struct Options {
    /// vCPUs of the guest.
    #[arg(long, default_value_t = 2)]
    vcpus: u32,
    /// Memory of the guest, as --memory size= takes it.
    #[arg(long, default_value = "512M")]
    memory: String,
    /// Seconds under protection before the kill; by default a random moment of 2 to 6.
    #[arg(long, value_parser = seconds, allow_negative_numbers = true)]
    seconds: Option<f64>,
    /// A kernel of your own instead of the test guest; needs --initramfs.
    #[arg(long, requires = "initramfs")]
    kernel: Option<PathBuf>,
    /// Its initramfs.
    #[arg(long, requires = "kernel")]
    initramfs: Option<PathBuf>,
    /// Its command line.
    #[arg(long, default_value = "console=ttyS0 panic=-1")]
    cmdline: String,
    /// Where the picture of the timeline goes.
    #[arg(long, default_value = "target/demo-timeline.svg")]
    svg: PathBuf,
}

/// A number of seconds that a [`Duration`] can be made of.
fn seconds(text: &str) -> Result<f64, String> {
    let parsed = text.parse::<f64>().ok();
    let parsed = parsed.filter(|seconds| (0.0..=SECONDS_MAX).contains(seconds));
    parsed.ok_or_else(|| format!("expected seconds, 0 to {SECONDS_MAX}"))
}

fn main() -> ExitCode {
    let options = Options::parse();
    match interrupt::watch().and_then(|()| run(&options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nThe demo FAILED: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let mut setup = Setup::verify(options.vcpus, &options.memory);
    if let (Some(kernel), Some(initramfs)) = (&options.kernel, &options.initramfs) {
        ensure!(kernel.is_file(), "the kernel {} does not exist", kernel.display());
        setup.kernel.clone_from(kernel);
        setup.initramfs = Some(initramfs.clone());
        setup.command_line.clone_from(&options.cmdline);
    }
    let seconds = options.seconds.unwrap_or_else(|| rand::random_range(2.0..6.0));
    let folder = interrupt::Folder::new()?;
    println!(
        "A backup and a primary on this machine: {} vCPUs, {}, TCP on loopback, file arbiter.",
        options.vcpus, options.memory
    );
    let mut screen = Screen::new();
    let protected_for = Duration::from_secs_f64(seconds);
    let outcome = round::run(folder.path(), &setup, protected_for, &mut screen);
    screen.line.finish_and_clear();
    let outcome = outcome?;
    report(&outcome);
    timeline::draw(&outcome, &options.svg)?;
    println!("\nThe timeline is in {}", options.svg.display());
    println!("Every check held: the VM outlived its primary.");
    Ok(())
}

/// A progress bar for the first sync, a live line while protected.
struct Screen {
    bar: Option<ProgressBar>,
    line: ProgressBar,
    since: Instant,
}

impl Screen {
    fn new() -> Self {
        let style = ProgressStyle::with_template("first sync [{bar:40}] {percent} %")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::new(1000).with_style(style);
        let style = ProgressStyle::with_template("{spinner} {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_spinner());
        let line = ProgressBar::new_spinner().with_style(style);
        Self { bar: Some(bar), line, since: Instant::now() }
    }
}

impl Watcher for Screen {
    fn syncing(&mut self, info: &ReplicationInfo) {
        if let Some(bar) = &self.bar {
            let thousandths = (info.sync_progress.clamp(0.0, 1.0) * 1000.0).round();
            // A share of one in thousandths fits any integer.
            let at = (0..=1000u32).rev().find(|at| f64::from(*at) <= thousandths).unwrap_or(0);
            bar.set_position(at.into());
        }
    }

    fn protected(&mut self, info: &ReplicationInfo) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
            println!("First sync done after {:.1} s.", self.since.elapsed().as_secs_f64());
        }
        self.line.set_message(format!(
            "{:?}: epoch {} committed, pause p50 {} us, commit p50 {} us, {} dirty pages, {} MiB",
            info.state,
            info.epoch_committed,
            info.pause_us.p50,
            info.commit_latency_us.p50,
            info.dirty_pages.last,
            info.bytes_sent >> 20,
        ));
        self.line.tick();
    }

    fn killed(&mut self) {
        self.line.finish_and_clear();
        println!("SIGKILL to the primary.");
    }
}

fn report(outcome: &Outcome) {
    let ms = |us: u64| format!("{:>8}.{:01} ms", us / 1000, us % 1000 / 100);
    let info = &outcome.primary;
    println!("\nAfter the kill");
    println!("  detected            {}", ms(outcome.detected_us));
    println!("  owned               {}", ms(outcome.owned_us));
    println!("  resumed             {}", ms(outcome.resumed_us));
    println!("  first guest output  {}", ms(outcome.first_output_us));
    println!("Replication");
    println!("  first sync          {}", ms(outcome.sync_us));
    println!("  protected for       {}", ms(outcome.protected_us));
    println!("  epochs committed    {:>8}", outcome.backup.epoch_committed);
    println!("  last sealed         {:>8}", info.epoch_sealed);
    println!("  generation          {:>8}", outcome.backup.generation);
    println!(
        "  pause               p50 {} us, p99 {} us, max {} us",
        info.pause_us.p50, info.pause_us.p99, info.pause_us.max
    );
    println!(
        "  commit latency      p50 {} us, p99 {} us, max {} us",
        info.commit_latency_us.p50, info.commit_latency_us.p99, info.commit_latency_us.max
    );
    println!("  dirty pages/epoch   p50 {}, p99 {}", info.dirty_pages.p50, info.dirty_pages.p99);
    println!(
        "  bytes sent          {} MiB of {} MiB raw",
        info.bytes_sent >> 20,
        info.bytes_raw >> 20
    );
    println!("The guest");
    if let (Some(last), Some(first)) = (outcome.last_tick_primary, outcome.first_tick_backup) {
        println!("  last tick seen      {last} on the primary, {first} first on the backup");
    }
    println!("  verdict             {}", outcome.verdict);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_time_is_taken_for_seconds() {
        for good in ["0", "2.5", "86400"] {
            assert_eq!(seconds(good), Ok(good.parse().unwrap()));
        }
        for bad in ["-1", "-0.1", "nan", "inf", "1e30", "86401", "soon"] {
            assert_eq!(seconds(bad), Err("expected seconds, 0 to 86400".to_owned()), "{bad}");
            let error = Options::try_parse_from(["demo", "--seconds", bad]).err().unwrap();
            assert!(error.to_string().contains("expected seconds"), "{error}");
        }
    }
}
