//! Calls to the kernel that fail, as a broken disk's do: libfiu in each side's process, which is told
//! by a pipe which of the C library's functions are to fail, and how.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;

use anyhow::{Context, Result, ensure};

use crate::scene::LIMIT;
use crate::world::Place;

const LIBRARIES: [&str; 2] =
    ["/usr/lib/fiu/fiu_run_preload.so", "/usr/lib/fiu/fiu_posix_preload.so"];

/// Functions that can be made to fail, all of that name in a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// `pread`: how images are read.
    Read,
    /// `pwrite`: how images are written.
    Write,
    /// `fdatasync`: how they are made durable.
    SyncImage,
    /// `fsync`: how a record of the arbiter's directory is.
    SyncRecord,
}

impl Call {
    fn name(self) -> &'static str {
        match self {
            Self::Read => "posix/io/rw/pread",
            Self::Write => "posix/io/rw/pwrite",
            Self::SyncImage => "posix/io/sync/fdatasync",
            Self::SyncRecord => "posix/io/sync/fsync",
        }
    }
}

fn pipes(folder: &Path, place: Place) -> PathBuf {
    folder.join(if place == Place::A { "calls-a" } else { "calls-b" })
}

/// What a side's process is started with.
///
/// # Errors
/// A library is not there.
pub fn environment(folder: &Path, place: Place) -> Result<Vec<(String, String)>> {
    for library in LIBRARIES {
        ensure!(Path::new(library).exists(), "{library} is missing: apt-get install fiu-utils");
    }
    let pipes = pipes(folder, place).display().to_string();
    Ok(vec![("LD_PRELOAD".into(), LIBRARIES.join(":")), ("FIU_CTRL_FIFO".into(), pipes)])
}

/// From here on `call` fails in a side's process with `errno`.
pub fn begin(folder: &Path, place: Place, call: Call, errno: i32) -> Result<()> {
    tell(folder, place, format!("enable name={},failinfo={errno}", call.name()))
}

/// From here on it works again.
pub fn end(folder: &Path, place: Place, call: Call) -> Result<()> {
    tell(folder, place, format!("disable name={}", call.name()))
}

fn tell(folder: &Path, place: Place, command: String) -> Result<()> {
    let prefix = pipes(folder, place).display().to_string();
    let is_ours = |path: &PathBuf| {
        let path = path.display().to_string();
        path.starts_with(&prefix) && path.ends_with(".in")
    };
    let paths = fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    let to = paths.into_iter().find(is_ours).context("The process has no pipe for its faults")?;
    let (sender, answer) = channel();
    // A process that has died neither reads nor answers.
    std::thread::spawn(move || {
        let mut reply = String::new();
        let asked = fs::write(&to, format!("{command}\n"))
            .and_then(|()| File::open(to.with_extension("out"))?.read_to_string(&mut reply));
        let _ = sender.send(asked.map(|_| (command, reply)));
    });
    let (command, reply) = answer.recv_timeout(LIMIT).context("no answer")??;
    ensure!(reply.trim() == "0", "'{command}' was answered by {reply:?}");
    Ok(())
}
