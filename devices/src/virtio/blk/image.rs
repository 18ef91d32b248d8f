//! The image behind a disk: a raw file or block device.
//!
//! What enters: byte ranges that were checked against the image's size when it was looked at; what
//! leaves: the host's verdict. What always holds: an image that this process writes is locked, by
//! open file description and in full, from [`open`] until its last user has gone.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, fallocate, fcntl};
use nix::unistd::{Whence, lseek};
use thiserror::Error;

use super::buffer::{BUFFER_BYTES_MAX, BufferPool};
use super::config::{BlkConfig, ImageType};
use super::layout::SECTOR_BYTES;

/// First bytes of formats that are not raw.
const FORMATS: [(&[u8], &str); 3] =
    [(b"QFI\xfb", "qcow2"), (b"vhdxfile", "vhdx"), (b"KDMV", "vmdk")];

/// An image cannot be looked at.
#[derive(Debug, Error)]
pub enum ImageError {
    #[error("Cannot read the image {0}")]
    Read(PathBuf, #[source] io::Error),
    #[error("The image {0} is neither a file nor a block device")]
    Kind(PathBuf),
    #[error("The image {0} is {1}, only raw images are supported; say image_type=raw to force")]
    Format(PathBuf, &'static str),
}

/// An image cannot be had.
#[derive(Debug, Error)]
pub(super) enum OpenError {
    #[error("Cannot open the image {0}")]
    Open(PathBuf, #[source] io::Error),
    #[error("The image {0} is in use: another process holds its lock")]
    Locked(PathBuf),
    #[error("Cannot lock the image {0}")]
    Lock(PathBuf, #[source] io::Error),
    #[error("The image {0} has shrunk to {1} bytes")]
    Size(PathBuf, u64),
    #[error("The image {0} cannot be read in 512-byte blocks past the page cache")]
    Direct(PathBuf, #[source] io::Error),
}

/// What carries out a disk's I/O. Calls may block as long as the host wants; they come from
/// several threads, never two at a time that overlap and of which one changes something.
pub trait Image: Send + Sync {
    /// Bytes that it has.
    fn len_bytes(&self) -> io::Result<u64>;
    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()>;
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// Makes a range read as zeroes, and frees its room if `unmap`.
    fn zero(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;
    /// The range's contents are of no use any more.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;
    /// What was written before is durable on return.
    fn flush(&self) -> io::Result<()>;
    /// Bytes from `offset` on that are known to be zero without reading them; 0 if that is not
    /// known.
    fn hole_bytes(&self, offset: u64) -> u64 {
        let _ = offset;
        0
    }
}

/// An open image.
#[derive(Debug)]
pub(super) struct FileImage {
    file: File,
    /// Zeroes, for file systems that cannot zero a range.
    buffers: BufferPool,
}

/// Looks at an image, without a lock. Its size in bytes.
pub(super) fn probe(path: &Path, image_type: ImageType) -> Result<u64, ImageError> {
    let read = |source| ImageError::Read(path.into(), source);
    // A look before the opening: to open a pipe could block.
    let kind = fs::metadata(path).map_err(read)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(ImageError::Kind(path.into()));
    }
    let mut file = File::open(path).map_err(read)?;
    let mut first = Vec::new();
    (&file).take(8).read_to_end(&mut first).map_err(read)?;
    let format = FORMATS.iter().find(|(magic, _)| first.starts_with(magic));
    if let (ImageType::Detect, Some((_, name))) = (image_type, format) {
        return Err(ImageError::Format(path.into(), name));
    }
    file.seek(SeekFrom::End(0)).map_err(read)
}

/// Opens and locks an image of at least `len` bytes.
pub(super) fn open(config: &BlkConfig, len: u64) -> Result<FileImage, OpenError> {
    let path = || config.path.clone();
    let flags = if config.direct { libc::O_DIRECT } else { 0 };
    let file = OpenOptions::new()
        .read(true)
        .write(!config.readonly)
        .custom_flags(flags)
        .open(&config.path)
        .map_err(|source| OpenError::Open(path(), source))?;
    lock(&file, config)?;
    let image = FileImage { file, buffers: BufferPool::default() };
    let found = image.len_bytes().map_err(|source| OpenError::Open(path(), source))?;
    if found < len {
        return Err(OpenError::Size(path(), found));
    }
    // Storage of 4096-byte blocks refuses what the guest is told it may do: better now than later.
    if config.direct && len >= SECTOR_BYTES {
        let mut buffer = image.buffers.take(512);
        image
            .read_at(len - len % SECTOR_BYTES - SECTOR_BYTES, buffer.bytes_mut())
            .map_err(|source| OpenError::Direct(path(), source))?;
    }
    Ok(image)
}

/// Takes an open-file-description lock over the whole file: it ends with the last descriptor, and
/// excludes another VM of the same process too.
fn lock(file: &File, config: &BlkConfig) -> Result<(), OpenError> {
    let kind = if config.readonly { libc::F_RDLCK } else { libc::F_WRLCK };
    let lock = libc::flock {
        l_type: libc::c_short::try_from(kind).unwrap_or_default(),
        l_whence: libc::c_short::try_from(libc::SEEK_SET).unwrap_or_default(),
        l_start: 0,
        // To the end, wherever that is.
        l_len: 0,
        l_pid: 0,
    };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&lock)) {
        Ok(_) => Ok(()),
        Err(Errno::EAGAIN | Errno::EACCES) => Err(OpenError::Locked(config.path.clone())),
        Err(errno) => Err(OpenError::Lock(config.path.clone(), errno.into())),
    }
}

impl FileImage {
    fn allocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> Result<(), Errno> {
        let offset = libc::off_t::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
        let len = libc::off_t::try_from(len).map_err(|_| Errno::EOVERFLOW)?;
        loop {
            match fallocate(&self.file, flags | FallocateFlags::FALLOC_FL_KEEP_SIZE, offset, len) {
                Err(Errno::EINTR) => {}
                done => return done,
            }
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        let size = usize::try_from(len).unwrap_or(usize::MAX).min(BUFFER_BYTES_MAX);
        let mut buffer = self.buffers.take(size);
        buffer.bytes_mut().fill(0);
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let part = usize::try_from(end - at).unwrap_or(usize::MAX).min(size);
            self.file.write_all_at(&buffer.bytes()[..part], at)?;
            at += u64::try_from(part).unwrap_or(u64::MAX);
        }
        self.buffers.give(buffer);
        Ok(())
    }
}

/// The file system or the device does not know the operation, or not for such a range: a block
/// device takes whole logical blocks only, of 4096 bytes maybe.
fn cannot(errno: Errno) -> bool {
    matches!(errno, Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::ENOTTY | Errno::EINVAL)
}

impl Image for FileImage {
    fn len_bytes(&self) -> io::Result<u64> {
        (&self.file).seek(SeekFrom::End(0))
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, offset)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    fn zero(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let keep = FallocateFlags::FALLOC_FL_ZERO_RANGE;
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE;
        let ways: &[_] = if unmap { &[hole, keep] } else { &[keep] };
        for way in ways {
            match self.allocate(*way, offset, len) {
                Err(errno) if cannot(errno) => {}
                done => return done.map_err(io::Error::from),
            }
        }
        self.write_zeroes(offset, len)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match self.allocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, offset, len) {
            // The guest need not know: what it reads there is undefined anyway.
            Err(errno) if cannot(errno) => Ok(()),
            done => done.map_err(io::Error::from),
        }
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn hole_bytes(&self, offset: u64) -> u64 {
        let Ok(from) = libc::off_t::try_from(offset) else { return 0 };
        // The file's own position is nobody's: all I/O names its offset.
        match lseek(&self.file, from, Whence::SeekData) {
            Ok(data) => u64::try_from(data).unwrap_or(0).saturating_sub(offset),
            // No data up to the end.
            Err(Errno::ENXIO) => self.len_bytes().unwrap_or(0).saturating_sub(offset),
            Err(_) => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_that_the_host_cannot_take_whole_is_no_error_of_the_guest() {
        for errno in [Errno::EOPNOTSUPP, Errno::ENOSYS, Errno::ENOTTY, Errno::EINVAL] {
            assert!(cannot(errno), "{errno}");
        }
        assert!(!cannot(Errno::EIO) && !cannot(Errno::ENOSPC));
    }
}
