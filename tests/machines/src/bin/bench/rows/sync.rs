//! How fast a VM becomes protected.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use understudy_tests::interrupt::Folder;
use understudy_tests::pair::Setup;

use crate::Effort;
use crate::bare::Bare;
use crate::host;
use crate::row::{Bound, FLOOR, OURS, Row};
use crate::samples::Samples;
use crate::stream::{Source, back_free_memory};

const FILL_LIMIT: Duration = Duration::from_secs(180);
/// As `--replicate` has it by default.
const CONNECTIONS: usize = 1;
const TURNS: u32 = 3;

/// A VM whose every page has a content, and a backup for it.
fn filled(mib: u64, options: &str) -> Result<Bare> {
    let mut setup = Setup::verify(1, &format!("{mib}M"));
    setup.command_line = "workload=dirty vcpus=1 tick_ms=250 dirty_set=100 dirty_period_ms=25 \
                          dirty_fill=all"
        .into();
    setup.replicate_options = format!(",console_output=pass{options}");
    setup.receive_options = options.to_owned();
    let machine = Bare::start(setup)?;
    machine
        .serial
        .wait_line("'dirty filled'", 0, FILL_LIMIT, |line| line.starts_with("dirty filled"))?;
    Ok(machine)
}

pub fn first(effort: &Effort) -> Result<Row> {
    let wanted_mib: u64 = if effort.is_full { 4096 } else { 768 };
    let what = format!("first sync of {} MiB, every page with a content", wanted_mib);
    let mut row = Row::new("first-sync", what, "MiB/s");
    // The primary, its backup, and the source of the bare stream.
    if host::memory_mib("MemAvailable:") < 3 * wanted_mib + 1024 {
        return Ok(row.not_run(format!("three memories of {wanted_mib} MiB do not fit this host")));
    }
    let mib = f64::from(u32::try_from(wanted_mib)?);
    let mut machine = filled(wanted_mib, "")?;
    let (mut floor, mut ours) = (Samples::default(), Samples::default());
    // A memory, and what the sockets and the processes take beside it.
    let taken = (wanted_mib + 256) << 20;
    for _ in 0..TURNS {
        // The source goes before the backup comes: all of them together need not fit.
        let source = Source::new(wanted_mib << 20)?;
        back_free_memory(taken)?;
        floor.add(vec![mib / source.send(CONNECTIONS)?.as_secs_f64()]);
        drop(source);
        back_free_memory(taken)?;
        ours.add(vec![mib / machine.protect()?.as_secs_f64()]);
        machine.set_free()?;
    }
    row.column(FLOOR, &floor);
    row.column(OURS, &ours);
    row.note(format!("{CONNECTIONS} data connection; the guest rewrites 100 pages each 25 ms"));
    row.check_medians(OURS, FLOOR, Bound::AtLeast(0.85));
    Ok(row)
}

const CERTIFICATES: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/make-certificates.sh");

fn make_certificates(directory: &Path) -> Result<()> {
    let made = Command::new("bash").arg(CERTIFICATES).arg(directory).arg("127.0.0.1").output()?;
    ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    Ok(())
}

/// What TLS takes of it.
pub fn by_tls(effort: &Effort) -> Result<Row> {
    const PLAIN: &str = "plain";
    let wanted_mib: u64 = if effort.is_full { 4096 } else { 768 };
    let what =
        format!("first sync of {wanted_mib} MiB by TLS and without, every page with a content");
    let mut row = Row::new("first-sync-tls", what, "MiB/s");
    // Two primaries, and the backup of one of them.
    if host::memory_mib("MemAvailable:") < 3 * wanted_mib + 1024 {
        return Ok(row.not_run(format!("three memories of {wanted_mib} MiB do not fit this host")));
    }
    let mib = f64::from(u32::try_from(wanted_mib)?);
    let folder = Folder::new()?;
    let directory = folder.path().join("tls");
    make_certificates(&directory)?;
    let mut plain = filled(wanted_mib, "")?;
    let mut tls = filled(wanted_mib, &format!(",tls_dir={}", directory.display()))?;
    let taken = (wanted_mib + 256) << 20;
    let (mut without, mut with) = (Samples::default(), Samples::default());
    for _ in 0..TURNS {
        for (machine, samples) in [(&mut plain, &mut without), (&mut tls, &mut with)] {
            back_free_memory(taken)?;
            samples.add(vec![mib / machine.protect()?.as_secs_f64()]);
            machine.set_free()?;
        }
    }
    row.column(PLAIN, &without);
    row.column(OURS, &with);
    row.note(format!("{CONNECTIONS} data connection; each guest rewrites 100 pages each 25 ms"));
    row.check_medians(OURS, PLAIN, Bound::AtLeast(0.5));
    Ok(row)
}
