//! Storage that fails: the arbiter's directory, and the images of the disks.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::sys::stat::Mode;
use understudy_tests::network::run;

use crate::failing::Call;
use crate::row::{End, Expect, FILE, Kept, Row};
use crate::scene::Scene;
use crate::world::Place;

/// A record that no host of the pair has written.
const NEXT_RECORD: &str = "storage/gen-2";

pub fn rows() -> Vec<Row> {
    let mut rows = directory();
    rows.extend(images());
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
        Row::new(
            "directory-eio",
            "Records cannot be made durable (EIO of the arbiter's directory at B), A is killed: B holds; \
             then they can",
            Expect::Only(End::B),
            |scene| {
                scene.blow();
                scene.fail(Place::B, Call::SyncRecord)?;
                b_holds(scene)?;
                scene.mend(Place::B, Call::SyncRecord)?;
                scene.wait_b_took_over()?;
                Ok(End::B)
            },
        ),
    ];
    let with_failures = |mut row: Row| {
        row.prepared.has_failures = true;
        row
    };
    rows.into_iter().map(with_failures).collect()
}

/// B shows that it ended the replica for what it could not do.
fn has_given_up(scene: &mut Scene) -> Result<()> {
    scene.wait_event(Place::B, &["replica-receive-failed"])
}

fn directory() -> Vec<Row> {
    let rows = vec![
        Row::new(
            "directory-read-only",
            "The arbiter's directory is read-only, A is killed: B holds; then it is writable again",
            Expect::Only(End::B),
            |scene| {
                scene.blow();
                let path = scene.folder.join("arbiter").display().to_string();
                scene.world.b.mounts.run("mount", &format!("-o remount,bind,ro {path}"))?;
                b_holds(scene)?;
                scene.world.b.mounts.run("mount", &format!("-o remount,bind,rw {path}"))?;
                scene.wait_b_took_over()?;
                Ok(End::B)
            },
        ),
        {
            let mut row = Row::new(
                "directory-full",
                "There is no room in the arbiter's directory, A is killed: B holds; then there is",
                Expect::Only(End::B),
                |scene| {
                    scene.blow();
                    let filler = scene.folder.join("storage/filler");
                    fill(&filler)?;
                    b_holds(scene)?;
                    fs::remove_file(filler)?;
                    scene.wait_b_took_over()?;
                    Ok(End::B)
                },
            );
            row.prepared.images = Some(small_storage);
            row
        },
        Row::new(
            "directory-hangs",
            "The arbiter's storage hangs, A is killed: B holds; then the storage answers",
            Expect::Only(End::B),
            |scene| {
                scene.blow();
                // Whoever opens it waits for a writer.
                let pipe = scene.folder.join(NEXT_RECORD);
                nix::unistd::mkfifo(&pipe, Mode::S_IRWXU).context("Cannot make a pipe")?;
                b_holds(scene)?;
                let away = scene.folder.join("pipe");
                fs::rename(&pipe, &away)?;
                drop(File::options().write(true).open(&away)?);
                scene.wait_b_took_over()?;
                Ok(End::B)
            },
        ),
        Row::new(
            "directory-damaged",
            "The arbiter's newest record is no record, A is killed: B holds; then it is gone",
            Expect::Only(End::B),
            |scene| {
                scene.blow();
                let record = scene.folder.join(NEXT_RECORD);
                fs::write(&record, "{\"generation\":2")?;
                b_holds(scene)?;
                fs::remove_file(record)?;
                scene.wait_b_took_over()?;
                Ok(End::B)
            },
        ),
    ];
    rows.into_iter().map(|row| row.with(FILE)).collect()
}

fn b_holds(scene: &mut Scene) -> Result<()> {
    scene.a.kill()?;
    scene.wait_holds(Place::B)?;
    scene.is_held()
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
fn fill(path: &Path) -> Result<()> {
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

fn small_storage(folder: &Path) -> Result<Kept> {
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
