//! The arbiter's directory fails as a host that lost the other one asks there: it holds until that is mended.

use std::fs::{self, File};

use anyhow::{Context, Result, ensure};
use nix::sys::stat::Mode;

use super::storage::{fill, small_storage};
use crate::failing::Call;
use crate::row::{End, Expect, FILE, Row};
use crate::scene::Scene;
use crate::world::Place;

/// A record that no host of the pair has written.
const NEXT_RECORD: &str = "storage/gen-2";

/// What is wrong with the directory as a host sees it.
struct Trouble {
    name: &'static str,
    what: &'static str,
    /// What is so once it is mended.
    then: &'static str,
    begin: fn(&Scene, Place) -> Result<()>,
    mend: fn(&Scene, Place) -> Result<()>,
}

const TROUBLES: [Trouble; 5] = [
    Trouble {
        name: "read-only",
        what: "The arbiter's directory is read-only",
        then: "it is writable again",
        begin: |scene, place| remount(scene, place, "ro"),
        mend: |scene, place| remount(scene, place, "rw"),
    },
    Trouble {
        name: "full",
        what: "There is no room in the arbiter's directory",
        then: "there is",
        begin: |scene, _| fill(&scene.folder.join("storage/filler")),
        mend: |scene, _| Ok(fs::remove_file(scene.folder.join("storage/filler"))?),
    },
    Trouble {
        name: "hangs",
        what: "The arbiter's storage hangs",
        then: "the storage answers",
        // Whoever opens it waits for a writer.
        begin: |scene, _| {
            let pipe = scene.folder.join(NEXT_RECORD);
            nix::unistd::mkfifo(&pipe, Mode::S_IRWXU).context("Cannot make a pipe")
        },
        mend: |scene, _| {
            let away = scene.folder.join("pipe");
            fs::rename(scene.folder.join(NEXT_RECORD), &away)?;
            drop(File::options().write(true).open(&away)?);
            Ok(())
        },
    },
    Trouble {
        name: "damaged",
        what: "The arbiter's newest record is no record",
        then: "it is gone",
        begin: |scene, _| Ok(fs::write(scene.folder.join(NEXT_RECORD), "{\"generation\":2")?),
        mend: |scene, _| Ok(fs::remove_file(scene.folder.join(NEXT_RECORD))?),
    },
    Trouble {
        name: "eio",
        what: "Records cannot be made durable (EIO of the arbiter's directory)",
        then: "they can",
        begin: |scene, place| scene.fail(place, Call::SyncRecord),
        mend: |scene, place| scene.mend(place, Call::SyncRecord),
    },
];

pub fn rows() -> Vec<Row> {
    let of = |trouble| [kill_a(trouble), kill_b(trouble)];
    TROUBLES.iter().flat_map(of).map(|row| row.with(FILE)).collect()
}

fn kill_a(trouble: &'static Trouble) -> Row {
    let act = |scene: &mut Scene| {
        scene.blow();
        (trouble.begin)(scene, Place::B)?;
        scene.a.kill()?;
        holds(scene, Place::B, "failover-finished")?;
        (trouble.mend)(scene, Place::B)?;
        scene.wait_b_took_over()?;
        Ok(End::B)
    };
    let Trouble { name, what, then, .. } = trouble;
    let what = format!("{what}, A is killed: B holds; then {then}");
    prepared(trouble, Row::new(format!("directory-{name}"), what, Expect::Only(End::B), act))
}

fn kill_b(trouble: &'static Trouble) -> Row {
    let act = |scene: &mut Scene| {
        scene.blow();
        (trouble.begin)(scene, Place::A)?;
        scene.b.kill()?;
        holds(scene, Place::A, "replication-degraded")?;
        // A call that hangs has not failed: there is nothing to tell yet.
        if trouble.name != "hangs" {
            scene.wait_event(Place::A, &["replication-undecided"])?;
        }
        (trouble.mend)(scene, Place::A)?;
        scene.wait_a_alone()?;
        Ok(End::A)
    };
    let Trouble { name, what, then, .. } = trouble;
    let what = format!("{what}, B is killed: A holds; then {then}");
    let name = format!("directory-{name}-kill-b");
    prepared(trouble, Row::new(name, what, Expect::Only(End::A), act))
}

fn prepared(trouble: &Trouble, mut row: Row) -> Row {
    row.prepared.images = (trouble.name == "full").then_some(small_storage);
    row.prepared.has_failures = trouble.name == "eio";
    row
}

fn remount(scene: &Scene, place: Place, how: &str) -> Result<()> {
    let path = scene.folder.join("arbiter").display().to_string();
    scene.host(place).mounts.run("mount", &format!("-o remount,bind,{how} {path}"))
}

/// A host that lost the other one says that it holds, and nobody hears its VM; nor has it the event that
/// would say whose that is.
fn holds(scene: &mut Scene, place: Place, decided: &str) -> Result<()> {
    scene.wait_holds(place)?;
    scene.is_held()?;
    ensure!(!scene.has_event(place, decided), "{place:?} holds, and says '{decided}'");
    Ok(())
}
