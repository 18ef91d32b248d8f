//! What [`super::FileArbiter`] needs of storage, call by call: a directory of the host's, or what a
//! simulator has in its place.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::PathBuf;

use uuid::Uuid;

/// A directory that several hosts see. Names are of its files.
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

/// A directory that this host has mounted.
#[derive(Clone, Debug)]
pub struct Directory(pub PathBuf);

impl Folder for Directory {
    fn names(&self) -> io::Result<Vec<String>> {
        let names = fs::read_dir(&self.0)?.map(|entry| entry.map(|entry| entry.file_name()));
        // What is no text is no record.
        let texts = names.filter_map(|name| name.map(|name| name.into_string().ok()).transpose());
        texts.collect()
    }

    fn read(&self, name: &str, most: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(self.0.join(name))?.take(most).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn fresh(&self) -> String {
        format!(".{}.new", Uuid::new_v4())
    }

    fn create(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).open(self.0.join(name))?;
        file.write_all(bytes)?;
        file.sync_all()
    }

    fn link(&self, from: &str, to: &str) -> io::Result<()> {
        fs::hard_link(self.0.join(from), self.0.join(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.0.join(name))
    }

    fn sync(&self) -> io::Result<()> {
        File::open(&self.0)?.sync_all()
    }
}
