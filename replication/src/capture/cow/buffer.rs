//! Room for pages that are copied during a pause, in pieces that never move; who makes them before is in
//! [`super::rooms`].

use vm_memory::Bytes;

use super::{CowError, Page};
use crate::ids::{PAGE_SIZE, PageIndex};
use crate::ram::{PageBuffer, Ram};

/// Pages of a piece.
pub(super) const CHUNK_PAGES: usize = 256;

/// A piece. Memory of zeros is not there before it is written, and the first touch of a page takes the
/// host longer than all of its copying: it is made by `touched`.
pub(super) type Chunk = PageBuffer;

/// Pages in the order in which they were copied.
#[derive(Debug, Default)]
pub(super) struct Buffer {
    chunks: Vec<Chunk>,
    len: usize,
    grown: usize,
}

impl Buffer {
    /// Pages that fit without asking the host for memory.
    pub(super) fn room(&self) -> usize {
        self.chunks.len() * CHUNK_PAGES
    }

    /// Makes room for the pages of one piece more.
    pub(super) fn add(&mut self, chunk: Chunk) {
        self.chunks.push(chunk);
    }

    /// Takes what is beyond so many pages out of an empty buffer.
    pub(super) fn shrink(&mut self, pages: usize) -> Vec<Chunk> {
        self.clear();
        self.chunks.split_off(pages.div_ceil(CHUNK_PAGES).min(self.chunks.len()))
    }

    /// Pieces that had to be made while pages were copied, since this was asked last.
    pub(super) fn take_grown(&mut self) -> usize {
        std::mem::take(&mut self.grown)
    }

    pub(super) fn clear(&mut self) {
        self.len = 0;
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Copies `count` pages from `first` on, which lie in one region.
    pub(super) fn copy(&mut self, ram: &Ram, first: PageIndex, count: u64) -> Result<(), CowError> {
        let outside = || CowError::Outside(first);
        let mut address = ram.address(first).ok_or_else(outside)?;
        let mut left = usize::try_from(count).map_err(|_| outside())?;
        while left > 0 {
            let (chunk, at) = (self.len / CHUNK_PAGES, self.len % CHUNK_PAGES);
            if chunk == self.chunks.len() {
                self.chunks.push(Chunk::touched(CHUNK_PAGES));
                self.grown += 1;
            }
            let part = left.min(CHUNK_PAGES - at);
            let bytes = self.chunks[chunk].pages_mut(at, part);
            ram.mapping().read_slice(bytes, address).map_err(|_| outside())?;
            address.0 += (part * PAGE_SIZE) as u64;
            self.len += part;
            left -= part;
        }
        Ok(())
    }

    /// The page that was copied as the `at`-th.
    pub(super) fn page(&self, at: usize) -> &Page {
        self.chunks[at / CHUNK_PAGES].page(at % CHUNK_PAGES)
    }
}
