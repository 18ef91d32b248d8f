//! Storage that fails: the images of the disks.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use api::replication::ReplicationState;
use understudy_tests::network::run;

use crate::failing::Call;
use crate::row::{End, Expect, Kept, Row};
use crate::scene::{LIMIT, Scene};
use crate::world::Place;

pub fn rows() -> Vec<Row> {
    let mut rows = images();
    rows.extend(input_output_errors());
    rows
}

/// EIO, of the calls themselves.
fn input_output_errors() -> Vec<Row> {
    let of_b = |name, what, call| {
        Row::new(name, what, Expect::Only(End::A), move |scene: &mut Scene| {
            scene.blow();
            scene.fail(Place::B, call)?;
            scene.wait_a_alone()?;
            scene.wait_b_without_primary()?;
            has_given_up(scene)?;
            Ok(End::A)
        })
    };
    let of_a = |name, what, call| {
        let act = move |scene: &mut Scene| {
            scene.blow();
            scene.fail(Place::A, call)?;
            scene.wait_refused()?;
            scene.mend(Place::A, call)?;
            scene.gather_anew()?;
            Ok(End::Pair)
        };
        Row::new(name, what, Expect::Only(End::Pair), act).felt()
    };
    let rows = vec![
        of_b(
            "image-b-write-eio",
            "B's image cannot be written (EIO): B gives up and listens again",
            Call::Write,
        ),
        of_b(
            "image-b-sync-eio",
            "B's image cannot be made durable (EIO of fdatasync): B gives up and listens again",
            Call::SyncImage,
        ),
        of_a(
            "image-a-write-eio",
            "A's image cannot be written (EIO): the guest hears of it, as without replication, and the \
             pair goes on; then it can",
            Call::Write,
        ),
        of_a(
            "image-a-sync-eio",
            "A's image cannot be made durable (EIO): the guest hears of it, and the pair goes on; then it \
             can",
            Call::SyncImage,
        ),
        image_a_unreadable(),
        image_a_unreadable_at_boot(),
    ];
    let with_failures = |mut row: Row| {
        row.prepared.has_failures = true;
        row
    };
    rows.into_iter().map(with_failures).collect()
}

/// What A reads of its image goes to B in the first copy, and nowhere else: the guest does not read.
fn image_a_unreadable() -> Row {
    let act = |scene: &mut Scene| {
        scene.blow();
        scene.fail(Place::A, Call::Read)?;
        let is_begun = scene.protect()?;
        scene.wait_a_unprotected(is_begun)?;
        scene.wait_event(Place::A, &["replication-failed"])?;
        scene.mend(Place::A, Call::Read)?;
        scene.wait_b_without_primary()?;
        scene.wait_served()?;
        scene.protect()?;
        scene.wait_protected()?;
        Ok(End::Pair)
    };
    let what = "A's image cannot be read (EIO) in the first copy: the protection fails, and A runs on; then \
                it can, and the VM is protected (vm.replicate)";
    Row::new("image-a-read-eio", what, Expect::Only(End::Pair), act).unprotected()
}

/// The test guest reads its image as it boots, and powers off where it cannot: that is what the clients would
/// have met with on any machine, and nothing that B is to make good.
fn image_a_unreadable_at_boot() -> Row {
    let act = |scene: &mut Scene| {
        scene.blow();
        scene.fail(Place::A, Call::Read)?;
        let mark = scene.serial.mark();
        scene.a.put_ok("vm.reboot", None)?;
        scene.wait_said(mark, "ERROR the disk cannot be read")?;
        let status = scene.a.wait_exit(LIMIT)?;
        ensure!(status.success(), "A ended with {status}");
        scene.b.wait_state(ReplicationState::Disconnected, LIMIT)?;
        ensure!(!scene.has_event(Place::B, "failover-started"), "B has taken over");
        Ok(End::Nobody)
    };
    let what = "The guest is reset, and A's image cannot be read (EIO) as it boots: the guest hears of it, and \
                ends itself; nobody takes over";
    let mut row = Row::new("image-a-read-eio-reset", what, Expect::Only(End::Nobody), act);
    row.prepared.silence_limit = Duration::from_secs(4);
    row
}

/// B shows that it ended the replica for what it could not do.
fn has_given_up(scene: &mut Scene) -> Result<()> {
    scene.wait_event(Place::B, &["replica-receive-failed"])
}

fn images() -> Vec<Row> {
    let mut rows = vec![];
    for (name, what, prepare) in [
        (
            "image-b-full",
            "There is no room for B's image (ENOSPC): B gives up and listens again",
            (|folder| small_image(folder, "backup.img")) as fn(&Path) -> Result<Kept>,
        ),
        (
            "image-b-eio",
            "B's image cannot be made durable (EIO of a loop device): B gives up and listens again",
            |folder| loop_image(folder, "backup.img"),
        ),
    ] {
        let mut row = Row::new(name, what, Expect::Only(End::A), |scene| {
            scene.blow();
            fill(&scene.folder.join("small/filler"))?;
            scene.wait_a_alone()?;
            scene.wait_b_without_primary()?;
            has_given_up(scene)?;
            Ok(End::A)
        });
        row.prepared.images = Some(prepare);
        rows.push(row);
    }
    let mut row = Row::new(
        "image-a-full",
        "There is no room for A's image (ENOSPC): the guest hears of it, as without replication, and the \
         pair goes on; then there is",
        Expect::Only(End::Pair),
        |scene| {
            scene.blow();
            let filler = scene.folder.join("small/filler");
            fill(&filler)?;
            scene.wait_refused()?;
            fs::remove_file(filler)?;
            scene.gather_anew()?;
            Ok(End::Pair)
        },
    )
    .felt();
    row.prepared.images = Some(|folder| small_image(folder, "primary.img"));
    rows.push(row);
    rows
}

/// A file system that has no room left: all of it is in this file.
pub(super) fn fill(path: &Path) -> Result<()> {
    let mut file = File::create(path)?;
    let block = [0x5a; 4096];
    loop {
        match file.write_all(&block) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::StorageFull => return Ok(()),
            Err(error) => return Err(error).with_context(|| format!("Cannot fill {path:?}")),
        }
    }
}

fn small(path: &Path, size: &str) -> Result<()> {
    fs::create_dir_all(path)?;
    run("mount", &format!("-t tmpfs -o size={size} fault {}", path.display()))
}

pub(super) fn small_storage(folder: &Path) -> Result<Kept> {
    small(&folder.join("storage"), "64k").map(|()| vec![])
}

/// Puts a copy of an image, with all its holes, on a small file system; its path.
fn on_small(folder: &Path, name: &str) -> Result<String> {
    let at = folder.join("small");
    small(&at, "16m")?;
    let (image, copy) = (folder.join(name), at.join(name));
    File::create(&copy)?.set_len(fs::metadata(&image)?.len())?;
    Ok(copy.display().to_string())
}

fn small_image(folder: &Path, name: &str) -> Result<Kept> {
    let copy = on_small(folder, name)?;
    run("mount", &format!("--bind {copy} {}", folder.join(name).display()))?;
    Ok(vec![])
}

/// A block device whose writes are lost once the small file system is full. It ends with its last
/// user, of which the row is one.
fn loop_image(folder: &Path, name: &str) -> Result<Kept> {
    let copy = on_small(folder, name)?;
    let output = std::process::Command::new("losetup").args(["-f", "--show", &copy]).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "losetup: {}", said.trim());
    let device = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let kept = File::open(&device);
    // In use, so this only says that it goes with its last user.
    run("losetup", &format!("-d {device}"))?;
    let image = folder.join(name);
    fs::remove_file(&image)?;
    std::os::unix::fs::symlink(&device, &image)?;
    Ok(vec![kept?])
}
