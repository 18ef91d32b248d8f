//! What [`super::FileArbiter`] needs of storage, call by call: a directory of the host's, or what a
//! simulator has in its place.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use nix::dir::Dir;
use nix::fcntl::{AtFlags, OFlag, open, openat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, fsync, linkat, unlinkat};
use uuid::Uuid;

/// A directory that several hosts see, opened. Names are of its files.
pub trait Folder {
    /// The names of all files.
    ///
    /// # Errors
    /// Of the storage.
    fn names(&self) -> io::Result<Vec<String>>;

    /// At most `most` bytes of a file.
    ///
    /// # Errors
    /// Of the storage.
    fn read(&self, name: &str, most: u64) -> io::Result<Vec<u8>>;

    /// A name that no file ever had.
    fn fresh(&self) -> String;

    /// Writes a new file; on return it survives a crash of any host.
    ///
    /// # Errors
    /// Of the storage. What is there after that is unknown.
    fn create(&self, name: &str, bytes: &[u8]) -> io::Result<()>;

    /// Gives a file a second name, which must be new, at once for all who look.
    ///
    /// # Errors
    /// [`io::ErrorKind::AlreadyExists`], or of the storage: then whether it was done is unknown.
    fn link(&self, from: &str, to: &str) -> io::Result<()>;

    /// Removes a file's name.
    ///
    /// # Errors
    /// Of the storage.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// On return all names survive a crash of any host.
    ///
    /// # Errors
    /// Of the storage.
    fn sync(&self) -> io::Result<()>;
}

/// Where a [`Folder`] is found. What is mounted there may change at any time.
pub trait Place {
    type Folder: Folder;

    /// What is there now. Whatever is mounted or unmounted later, what was opened stays what it is: its calls reach
    /// the same directory, or fail. What an operation has read and what it writes by that are of one history.
    ///
    /// # Errors
    /// Of the storage.
    fn open(&self) -> io::Result<Self::Folder>;
}

/// A directory that this host has mounted.
#[derive(Clone, Debug)]
pub struct Directory(pub PathBuf);

/// It, opened.
#[derive(Debug)]
pub struct Opened(OwnedFd);

const FLAGS: OFlag = OFlag::O_CLOEXEC;

impl Place for Directory {
    type Folder = Opened;

    fn open(&self) -> io::Result<Opened> {
        let flags = FLAGS | OFlag::O_RDONLY | OFlag::O_DIRECTORY;
        Ok(Opened(open(&self.0, flags, Mode::empty())?))
    }
}

impl Opened {
    fn file(&self, name: &str, flags: OFlag) -> io::Result<File> {
        let mode = Mode::S_IRUSR | Mode::S_IWUSR | Mode::S_IRGRP | Mode::S_IROTH;
        Ok(File::from(openat(&self.0, name, flags | FLAGS, mode)?))
    }
}

impl Folder for Opened {
    fn names(&self) -> io::Result<Vec<String>> {
        let flags = FLAGS | OFlag::O_RDONLY | OFlag::O_DIRECTORY;
        let mut dir = Dir::openat(&self.0, ".", flags, Mode::empty())?;
        let mut names = vec![];
        for entry in dir.iter() {
            // What is no text is no record.
            names.extend(entry?.file_name().to_str().ok().map(str::to_owned));
        }
        Ok(names)
    }

    fn read(&self, name: &str, most: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.file(name, OFlag::O_RDONLY)?.take(most).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn fresh(&self) -> String {
        format!(".{}.new", Uuid::new_v4())
    }

    fn create(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let mut file = self.file(name, OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL)?;
        file.write_all(bytes)?;
        file.sync_all()
    }

    fn link(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(linkat(&self.0, from, &self.0, to, AtFlags::empty())?)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        Ok(unlinkat(&self.0, name, UnlinkatFlags::NoRemoveDir)?)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(fsync(&self.0)?)
    }
}
