//! The image beside the guest's I/O: read for a copy elsewhere, or written because it is one.
//!
//! Ranges were checked by the caller against [`Disk::image_bytes`]. All I/O goes through aligned
//! buffers, as O_DIRECT wants. The disk must be claimed or attached.

use std::io;
use std::sync::Arc;

use super::buffer::BUFFER_BYTES_MAX;
use super::disk::Disk;
use super::image::Image;

impl Disk {
    fn open_image(&self) -> io::Result<Arc<dyn Image>> {
        self.core.image().ok_or_else(|| io::Error::other("the image is not open"))
    }

    /// Reads while the guest may write: a range that is being written may read as anything between
    /// before and after.
    pub fn read_image(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let image = self.open_image()?;
        let mut at = offset;
        for part in into.chunks_mut(BUFFER_BYTES_MAX) {
            let mut buffer = self.core.buffers.take(part.len());
            let read = image.read_at(at, buffer.bytes_mut());
            if read.is_ok() {
                part.copy_from_slice(buffer.bytes());
            }
            self.core.buffers.give(buffer);
            read?;
            at += part.len() as u64;
        }
        Ok(())
    }

    /// See [`Image::hole_bytes`].
    pub fn hole_bytes(&self, offset: u64) -> u64 {
        self.core.image().map_or(0, |image| image.hole_bytes(offset))
    }

    /// Writes an image that no guest uses yet.
    pub fn write_image(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let image = self.open_image()?;
        let mut at = offset;
        for part in data.chunks(BUFFER_BYTES_MAX) {
            let mut buffer = self.core.buffers.take(part.len());
            buffer.bytes_mut().copy_from_slice(part);
            let written = image.write_at(at, buffer.bytes());
            self.core.buffers.give(buffer);
            written?;
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Makes a range read as zeroes. A discard of the other host's disk is one too: most hosts'
    /// storage reads as zeroes after it, and then both images do.
    pub fn zero_image(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.open_image()?.zero(offset, len, unmap)
    }

    /// What was written before is durable on return.
    pub fn flush_image(&self) -> io::Result<()> {
        self.open_image()?.flush()
    }
}
