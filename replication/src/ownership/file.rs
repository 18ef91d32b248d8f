//! `file:<dir>`: one directory per VM on storage that both hosts see.
//!
//! A record is a file `gen-<n>`, written beside under a temporary name, fsynced, and linked to
//! its name: link(2) fails if the name exists, on NFS too, which makes it the compare-and-swap.
//! Records are never changed, deleted or expired; the highest number stands.

use std::io;
use std::path::PathBuf;

use super::folder::{Directory, Folder};
use super::{Arbiter, ArbiterError, Outcome, Record};
use crate::ids::Generation;

/// Longest record that is read.
const RECORD_BYTES_MAX: u64 = 4096;

/// The arbiter in a directory.
#[derive(Clone, Debug)]
pub struct FileArbiter<F = Directory> {
    /// For messages.
    dir: PathBuf,
    folder: F,
}

fn name(generation: Generation) -> String {
    format!("gen-{generation}")
}

impl FileArbiter {
    #[must_use]
    pub fn new(dir: PathBuf) -> Self {
        let folder = Directory(dir.clone());
        Self { dir, folder }
    }
}

impl<F: Folder> FileArbiter<F> {
    /// In a directory that somebody else looks after.
    #[must_use]
    pub fn over(folder: F) -> Self {
        Self { dir: PathBuf::new(), folder }
    }

    fn path(&self, generation: Generation) -> PathBuf {
        self.dir.join(name(generation))
    }

    /// The highest generation that has a file.
    fn newest(&self) -> Result<Option<Generation>, ArbiterError> {
        let failed = |error| ArbiterError::List(self.dir.clone(), error);
        let mut newest = None;
        for name in self.folder.names().map_err(failed)? {
            let Some(number) = name.strip_prefix("gen-") else { continue };
            let number = number.parse().ok().filter(|number| *number < u64::MAX);
            let number = number.ok_or_else(|| ArbiterError::Damaged {
                path: self.dir.join(&name),
                reason: "the name holds no generation".to_owned(),
            })?;
            newest = newest.max(Some(Generation(number)));
        }
        Ok(newest)
    }

    fn load(&self, generation: Generation) -> Result<Record, ArbiterError> {
        let path = self.path(generation);
        let text = self.folder.read(&name(generation), RECORD_BYTES_MAX);
        let text = text.map_err(|error| ArbiterError::Read(path.clone(), error))?;
        let record: Record = serde_json::from_slice(&text).map_err(|error| {
            ArbiterError::Damaged { path: path.clone(), reason: error.to_string() }
        })?;
        if record.generation != generation {
            let reason = format!("it says generation {}", record.generation);
            return Err(ArbiterError::Damaged { path, reason });
        }
        Ok(record)
    }

    fn write_beside(&self, name: &str, record: &Record) -> io::Result<()> {
        let mut text = serde_json::to_vec(record)?;
        text.push(b'\n');
        self.folder.create(name, &text)
    }

    /// Won only when the record would survive a crash of this host, and was not lost before it would: by
    /// storage that went on anew, of which a sync after that says nothing.
    fn settled(&self, next: &Record) -> Result<Outcome, ArbiterError> {
        let path = self.path(next.generation);
        self.folder.sync().map_err(|error| ArbiterError::Write(path, error))?;
        let standing = self.load(next.generation)?;
        Ok(if standing == *next { Outcome::Won } else { Outcome::Lost(Some(standing)) })
    }
}

impl<F: Folder + Send> Arbiter for FileArbiter<F> {
    fn read(&self) -> Result<Option<Record>, ArbiterError> {
        self.newest()?.map(|newest| self.load(newest)).transpose()
    }

    fn compare_and_swap(
        &self,
        expected: Generation,
        next: &Record,
    ) -> Result<Outcome, ArbiterError> {
        assert_eq!(next.generation, expected.next(), "a swap raises the generation by one");
        let standing = self.read()?;
        let found = standing.map_or(Generation(0), |record| record.generation);
        if found < expected {
            // An empty mount point, or a listing from before: records are never deleted.
            return Err(ArbiterError::Vanished(expected));
        }
        if standing == Some(*next) {
            return self.settled(next);
        }
        if found > expected {
            return Ok(Outcome::Lost(standing));
        }
        let path = self.path(next.generation);
        let failed = |error| ArbiterError::Write(path.clone(), error);
        let beside = self.folder.fresh();
        let written = self.write_beside(&beside, next);
        let linked = written.and_then(|()| self.folder.link(&beside, &name(next.generation)));
        // The link is what counts; a temporary file left behind harms nobody.
        let _ = self.folder.remove(&beside);
        match linked {
            Ok(()) => {}
            // Somebody was first; or NFS repeated a request of ours that had succeeded.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let standing = self.load(next.generation)?;
                if standing != *next {
                    // The winner itself: what a second listing says may be older.
                    return Ok(Outcome::Lost(Some(standing)));
                }
            }
            Err(error) => return Err(failed(error)),
        }
        self.settled(next)
    }
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
