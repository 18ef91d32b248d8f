//! `file:<dir>`: one directory per VM on storage that both hosts see.
//!
//! A record is a file `gen-<n>`, written beside under a temporary name, fsynced, and linked to
//! its name: link(2) fails if the name exists, on NFS too, which makes it the compare-and-swap.
//! Records are never changed, deleted or expired; the highest number stands.

use std::io;
use std::path::{Path, PathBuf};

use super::folder::{Directory, Folder, Place};
use super::{Arbiter, ArbiterError, Outcome, Record};
use crate::ids::Generation;

/// Longest record that is read.
const RECORD_BYTES_MAX: u64 = 4096;

/// The arbiter in a directory.
#[derive(Clone, Debug)]
pub struct FileArbiter<P = Directory> {
    /// For messages.
    dir: PathBuf,
    place: P,
}

fn name(generation: Generation) -> String {
    format!("gen-{generation}")
}

impl FileArbiter {
    #[must_use]
    pub fn new(dir: PathBuf) -> Self {
        let place = Directory(dir.clone());
        Self { dir, place }
    }
}

impl<P: Place> FileArbiter<P> {
    /// In a directory that somebody else looks after.
    #[must_use]
    pub fn over(place: P) -> Self {
        Self { dir: PathBuf::new(), place }
    }

    /// The directory, for one operation from its first call to its last.
    fn open(&self) -> Result<Operation<'_, P::Folder>, ArbiterError> {
        let folder =
            self.place.open().map_err(|error| ArbiterError::List(self.dir.clone(), error))?;
        Ok(Operation { dir: &self.dir, folder })
    }
}

/// One operation, of what was there as it began.
struct Operation<'a, F> {
    dir: &'a Path,
    folder: F,
}

impl<F: Folder> Operation<'_, F> {
    fn path(&self, generation: Generation) -> PathBuf {
        self.dir.join(name(generation))
    }

    /// The highest generation that has a file.
    fn newest(&self) -> Result<Option<Generation>, ArbiterError> {
        let failed = |error| ArbiterError::List(self.dir.to_owned(), error);
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

    fn standing(&self) -> Result<Option<Record>, ArbiterError> {
        self.newest()?.map(|newest| self.load(newest)).transpose()
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

impl<P: Place + Send> Arbiter for FileArbiter<P> {
    fn read(&self) -> Result<Option<Record>, ArbiterError> {
        self.open()?.standing()
    }

    fn compare_and_swap(
        &self,
        expected: Generation,
        next: &Record,
    ) -> Result<Outcome, ArbiterError> {
        assert_eq!(next.generation, expected.next(), "a swap raises the generation by one");
        let operation = self.open()?;
        let standing = operation.standing()?;
        let found = standing.map_or(Generation(0), |record| record.generation);
        if found < expected {
            // An empty mount point, or a listing from before: records are never deleted.
            return Err(ArbiterError::Vanished(expected));
        }
        if let Some(record) = standing.filter(|record| record.vm != next.vm) {
            return Err(ArbiterError::OtherVm(record));
        }
        if standing == Some(*next) {
            return operation.settled(next);
        }
        if found > expected {
            return Ok(Outcome::Lost(standing));
        }
        let path = operation.path(next.generation);
        let failed = |error| ArbiterError::Write(path.clone(), error);
        let folder = &operation.folder;
        let beside = folder.fresh();
        let written = operation.write_beside(&beside, next);
        let linked = written.and_then(|()| folder.link(&beside, &name(next.generation)));
        // The link is what counts; a temporary file left behind harms nobody.
        let _ = folder.remove(&beside);
        match linked {
            Ok(()) => {}
            // Somebody was first; or NFS repeated a request of ours that had succeeded.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let standing = operation.load(next.generation)?;
                if standing != *next {
                    // The winner itself: what a second listing says may be older.
                    return Ok(Outcome::Lost(Some(standing)));
                }
            }
            Err(error) => return Err(failed(error)),
        }
        operation.settled(next)
    }
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
