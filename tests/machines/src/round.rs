//! One kill round: sync, run protected, SIGKILL the primary, take over, the guest's verdict.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use api::replication::{ReplicationInfo, ReplicationState, Role};

use crate::now_us;
use crate::pair::{Pair, Setup};

/// Longest wait for anything in a round; a machine under load is slow, a broken one for ever.
const LIMIT: Duration = Duration::from_secs(120);

/// What a round showed. Times are microseconds since the kill.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub sync_us: u64,
    pub protected_us: u64,
    pub detected_us: u64,
    pub owned_us: u64,
    pub resumed_us: u64,
    pub first_output_us: u64,
    /// The primary's last words before the kill.
    pub primary: ReplicationInfo,
    pub backup: ReplicationInfo,
    pub verdict: String,
    pub last_tick_primary: Option<u64>,
    pub first_tick_backup: Option<u64>,
    /// What a primary that was stopped said of itself when it woke up.
    pub fence: Option<String>,
}

/// Told while a round runs.
pub trait Watcher {
    fn syncing(&mut self, _info: &ReplicationInfo) {}
    fn protected(&mut self, _info: &ReplicationInfo) {}
    fn killed(&mut self) {}
}

impl Watcher for () {}

/// What is done to the primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blow<'a> {
    /// SIGKILL.
    Kill,
    /// SIGSTOP, until the backup has taken over.
    Stop,
    /// The same, by the thread that gets to this step of an epoch next (`UNDERSTUDY_TEST_FAULT` of the crate
    /// `replication` has the names): when it wakes up, it goes on there.
    StopAt(&'a str),
}

impl Blow<'_> {
    /// What the primary is started with, so that it can be struck in `folder`.
    fn prepare(self, folder: &Path, setup: &Setup) -> Setup {
        let mut setup = setup.clone();
        if let Self::StopAt(point) = self {
            let fault = format!("{point}:stop:{}", fault_file(folder).display());
            setup.primary_environment.push(("UNDERSTUDY_TEST_FAULT".to_owned(), fault));
        }
        setup
    }

    fn strike(self, folder: &Path, pair: &mut Pair) -> Result<()> {
        match self {
            Self::Kill => pair.primary.kill(),
            Self::Stop => pair.primary.signal(libc::SIGSTOP),
            Self::StopAt(point) => {
                let file = fault_file(folder);
                File::create(&file).context("Cannot arm a fault")?;
                pair.primary.wait(&format!("the step {point:?}"), LIMIT, |_| {
                    file.with_extension("reached").exists().then_some(())
                })
            }
        }
    }
}

fn fault_file(folder: &Path) -> PathBuf {
    folder.join("fault")
}

/// Runs a round in which the primary is killed, with the test guest's `verify` workload, or with any
/// payload whose output goes on.
pub fn run(
    folder: &Path,
    setup: &Setup,
    protected_for: Duration,
    watcher: &mut dyn Watcher,
) -> Result<Outcome> {
    run_by(Blow::Kill, folder, setup, protected_for, watcher)
}

/// As [`run`], with another blow.
pub fn run_by(
    blow: Blow<'_>,
    folder: &Path,
    setup: &Setup,
    protected_for: Duration,
    watcher: &mut dyn Watcher,
) -> Result<Outcome> {
    let mut pair = Pair::start(folder, &blow.prepare(folder, setup))?;
    let start = Instant::now();
    let synced = pair.primary.wait("the first sync", LIMIT, |vmm| {
        let info = vmm.replication().ok()?;
        watcher.syncing(&info);
        (info.state == ReplicationState::Protected).then_some(())
    });
    synced.with_context(|| {
        let info = pair.primary.replication().map(|info| (info.state, info.last_error));
        format!("The backup says:\n{}\nThe primary is {info:?}", pair.backup.log())
    })?;
    let sync_us = micros(start.elapsed());
    let is_guest_ours = setup.initramfs.is_none();
    if is_guest_ours {
        // From here on every page has a content that can be torn or lost.
        pair.primary_serial
            .wait_line("'verify filled'", 0, LIMIT, |line| line.starts_with("verify filled"))?;
    }
    let until = Instant::now() + protected_for;
    let mut primary = pair.primary.replication()?;
    while let Some(left) = until.checked_duration_since(Instant::now()) {
        std::thread::sleep(left.min(Duration::from_millis(50)));
        primary = pair.primary.replication()?;
        watcher.protected(&primary);
    }
    ensure!(primary.role == Role::Primary, "the primary says it is {:?}", primary.role);
    let killed_us = now_us();
    blow.strike(folder, &mut pair)?;
    watcher.killed();
    let protected_us = micros(start.elapsed()) - sync_us;
    let backup = pair
        .backup
        .wait_state(ReplicationState::TakenOver, LIMIT)
        .context("The backup did not take over")?;
    pair.backup_serial.wait_line("any output", 0, LIMIT, |_| true)?;
    let first_output = pair.backup_serial.first_byte_us().context("no output")?;
    let fence = match blow {
        Blow::Kill => None,
        Blow::Stop | Blow::StopAt(_) => Some(wake(&mut pair)?),
    };
    // All of it: no client reads what comes after the end.
    let spoken = pair.primary_serial.whole(LIMIT)?;
    let times = backup.takeover.context("The backup does not say when it took over")?;
    let since = |time_us: u64| time_us.saturating_sub(killed_us);
    check_arbiter(&pair.arbiter)?;
    check_epochs(primary.epoch_committed, backup.epoch_committed)?;
    let verdict = if is_guest_ours { finish_guest(&mut pair)? } else { linux_goes_on(&pair)? };
    let said = pair.backup_serial.text();
    check_ticks(&spoken, &said)?;
    Ok(Outcome {
        sync_us,
        protected_us,
        detected_us: since(times.detected_us),
        owned_us: since(times.owned_us),
        resumed_us: since(times.resumed_us),
        first_output_us: since(first_output),
        primary,
        backup,
        verdict,
        last_tick_primary: ticks(&spoken).last().copied(),
        first_tick_backup: ticks(&said).first().copied(),
        fence,
    })
}

/// Wakes a primary whose VM is the backup's by now. It has to find that out by itself, destroy its VM, and say
/// nothing more that is not the backup's as well; what its log says of that.
pub fn wake(pair: &mut Pair) -> Result<String> {
    pair.primary_serial.settled()?;
    let before = pair.primary_serial.text();
    pair.primary.signal(libc::SIGCONT)?;
    pair.primary.wait_state(ReplicationState::Lost, LIMIT)?;
    pair.primary.wait("its VM to be gone", LIMIT, |vmm| {
        (vmm.get("vm.info").ok()?.status == 404).then_some(())
    })?;
    let after = pair.primary_serial.whole(LIMIT)?;
    let late = after.strip_prefix(&before).context("The woken primary takes back what it said")?;
    // An acknowledgement from before the take-over may have been in its socket: it lets that epoch's output go,
    // which the backup's VM says as well.
    ensure!(pair.backup_serial.text().contains(late), "The woken primary said by itself: {late:?}");
    let log = pair.primary.log();
    let says = |text: &str| {
        log.lines().rev().find_map(|line| line.split_once(text).map(|(_, said)| said.trim()))
    };
    let owner = says("replication-lost: ")
        .with_context(|| format!("The woken primary does not say that it lost:\n{log}"))?;
    let late = late.len();
    Ok(match says("a data connection ended: ") {
        Some(reason) => format!("lost to {owner}, {late} bytes late, data refused: {reason}"),
        None => format!("lost to {owner}, {late} bytes late"),
    })
}

/// Lets the guest check all of its memory once more and power off.
fn finish_guest(pair: &mut Pair) -> Result<String> {
    // It must first go on by itself.
    let (at, _, _) =
        pair.backup_serial.wait_line("'verify'", 0, LIMIT, |line| line.starts_with("verify "))?;
    pair.backup_serial
        .wait_line("'verify' again", at + 1, LIMIT, |line| line.starts_with("verify "))?;
    pair.backup_serial.send(b"q")?;
    let (_, _, verdict) = pair
        .backup_serial
        .wait_line("the verdict", 0, LIMIT, |line| line.starts_with("VERDICT"))?;
    let lines = pair.backup_serial.lines();
    if let Some(failed) = lines.iter().find(|line| line.contains("FAILED")) {
        bail!("The guest found its memory damaged: {failed}");
    }
    ensure!(verdict.starts_with("VERDICT ok"), "The guest says: {verdict}");
    let status = pair.backup.wait_exit(LIMIT)?;
    ensure!(status.success(), "The backup ended with {status}:\n{}", pair.backup.log());
    Ok(verdict)
}

/// A user's own Linux: its console must go on, without an oops.
fn linux_goes_on(pair: &Pair) -> Result<String> {
    std::thread::sleep(Duration::from_secs(5));
    let lines = pair.backup_serial.lines();
    for bad in ["Oops", "BUG:", "Kernel panic", "soft lockup"] {
        if let Some(line) = lines.iter().find(|line| line.contains(bad)) {
            bail!("The guest's kernel complains: {line}");
        }
    }
    Ok(format!("the console went on for {} lines", lines.len()))
}

/// Exactly one record after the first: the backup's, alone.
fn check_arbiter(folder: &Path) -> Result<()> {
    let mut records: Vec<String> = std::fs::read_dir(folder)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    records.retain(|name| name.starts_with("gen-"));
    ensure!(records.len() == 2, "the arbiter has {} records: {records:?}", records.len());
    Ok(())
}

/// What the primary took for committed is in the backup, which may know of later epochs.
fn check_epochs(primary: u64, backup: u64) -> Result<()> {
    ensure!(
        backup >= primary,
        "the primary says that epoch {primary} is committed, the backup went on from {backup}"
    );
    Ok(())
}

/// Longest piece, in bytes, that the backup may say again: more than a primary holds back.
const SEAM: usize = 4096;

/// Committed output is never taken back and never skipped. The backup goes on at the byte after
/// the primary's last, in mid-line as well, or repeats the primary's end from some byte on: a
/// primary that dies between the release and the next seal cannot say how much it had written.
pub fn check_ticks(primary: &str, backup: &str) -> Result<()> {
    let mut gap = None;
    for repeated in (0..=SEAM.min(backup.len())).filter(|at| backup.is_char_boundary(*at)) {
        let (again, new) = backup.split_at(repeated);
        if primary.ends_with(again) {
            match first_gap(&ticks(&format!("{primary}{new}"))) {
                None => return Ok(()),
                found => gap = gap.or(found),
            }
        }
    }
    let (last, next) = gap.context("the empty piece is always repeated")?;
    bail!("ticks {} to {} were lost", last + 1, next - 1)
}

/// The ticks of the whole lines.
fn ticks(text: &str) -> Vec<u64> {
    text.split_inclusive('\n').filter(|line| line.ends_with('\n')).filter_map(tick).collect()
}

fn first_gap(ticks: &[u64]) -> Option<(u64, u64)> {
    let mut pairs = ticks.windows(2).map(|pair| (pair[0], pair[1]));
    pairs.find(|(before, after)| *after > before + 1)
}

fn tick(line: &str) -> Option<u64> {
    let (_, value) = line.rsplit_once("tick=")?;
    value.split_whitespace().next()?.parse().ok()
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_epoch_is_seen() {
        assert!(check_epochs(7, 7).is_ok());
        assert!(check_epochs(7, 8).is_ok());
        assert!(check_epochs(7, 6).is_err());
    }

    #[test]
    fn a_gap_in_the_ticks_is_seen() {
        let primary = "tick=6\ntick=7\n";
        assert!(check_ticks(primary, "tick=8\ntick=9\n").is_ok());
        assert!(check_ticks(primary, "tick=9\n").is_err());
        assert!(check_ticks("", "tick=9\n").is_ok());
        assert_eq!(ticks("verify ok pages=3 failures=0 tick=12\nverify ok tick=1"), [12]);
    }

    #[test]
    fn a_line_may_go_over_the_seam_or_come_twice() {
        let primary = "tick=340\r\nverify ok pages=1 tick=34";
        assert!(check_ticks(primary, "1\r\ntick=342\r\n").is_ok());
        assert!(check_ticks(primary, "=341\r\ntick=342\r\n").is_ok());
        assert!(check_ticks(primary, "\r\ntick=342\r\n").is_err());
        assert!(check_ticks(primary, "tick=341\r\ntick=342\r\n").is_ok());
        assert!(check_ticks("tick=340\r\ntick=341\r", "41\r\ntick=342\r\n").is_ok());
        assert!(check_ticks("tick=340\r\nverify ok", "\r\ntick=342\r\n").is_err());
    }
}
