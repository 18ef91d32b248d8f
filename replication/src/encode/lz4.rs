//! A page as an LZ4 block.
//!
//! Enters: a page; or bytes of a peer. Leaves: a block that is worth sending; or the page. Always
//! holds: a block of a peer fills exactly the page that is set aside for it, or is refused.
//!
//! Page by page, although pages together compress better: a page is then taken or left by itself,
//! and the backup puts each where it belongs without a second buffer.

use lz4_flex::block::{
    CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size,
};

use super::malformed;
use crate::capture::cow::Page;
use crate::ids::PAGE_SIZE;
use crate::wire::WireError;

/// Most bytes of a block: one that saves less than an eighth is not worth its decoding.
pub const LZ4_BYTES_MAX: usize = PAGE_SIZE / 8 * 7;

/// Room to compress in.
pub struct Compressor {
    table: CompressTable,
    room: Vec<u8>,
}

impl Default for Compressor {
    fn default() -> Self {
        let room = vec![0; get_maximum_output_size(PAGE_SIZE)];
        Self { table: CompressTable::small(), room }
    }
}

impl Compressor {
    /// Appends the block of `page` to `out`. `false`, with nothing appended, if it is longer than
    /// [`LZ4_BYTES_MAX`].
    pub fn compress(&mut self, page: &Page, out: &mut Vec<u8>) -> bool {
        let written = compress_into_with_table(page, &mut self.room, &mut self.table);
        let written = written.expect("room for the largest block");
        let fits = written <= LZ4_BYTES_MAX;
        if fits {
            out.extend_from_slice(&self.room[..written]);
        }
        fits
    }
}

/// Makes the page of a block of a peer.
///
/// # Errors
/// [`WireError::Malformed`] with what is wrong with it.
pub fn decompress(block: &[u8], into: &mut Page) -> Result<(), WireError> {
    if block.len() > LZ4_BYTES_MAX {
        return malformed("an LZ4 block that is too long");
    }
    match decompress_into(block, into) {
        Ok(PAGE_SIZE) => Ok(()),
        Ok(_) => malformed("an LZ4 block of less than a page"),
        Err(_) => malformed("an LZ4 block that is broken or more than a page"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn refused(block: &[u8]) -> &'static str {
        match decompress(block, &mut [0; PAGE_SIZE]) {
            Err(WireError::Malformed { what, .. }) => what,
            other => panic!("{other:?}"),
        }
    }

    proptest! {
        #[test]
        fn what_is_compressed_comes_back(
            pieces in prop::collection::vec((any::<u8>(), 1usize..200, any::<bool>()), 1..60),
        ) {
            let mut page = [0; PAGE_SIZE];
            let mut at = 0;
            for (value, len, varied) in pieces {
                let end = PAGE_SIZE.min(at + len);
                for (step, byte) in page[at..end].iter_mut().enumerate() {
                    let step = step.to_le_bytes()[0].wrapping_mul(91);
                    *byte = if varied { value ^ step } else { value };
                }
                at = end;
            }
            let mut out = vec![5];
            if Compressor::default().compress(&page, &mut out) {
                prop_assert!(out.len() <= 1 + LZ4_BYTES_MAX);
                let mut back = [1; PAGE_SIZE];
                decompress(&out[1..], &mut back).unwrap();
                prop_assert!(back == page);
            } else {
                prop_assert_eq!(out, [5]);
            }
        }

        #[test]
        fn random_bytes_never_panic(block in prop::collection::vec(any::<u8>(), 0..4000)) {
            let _ = decompress(&block, &mut [0; PAGE_SIZE]);
        }

        /// Blocks that were good but for some bytes.
        #[test]
        fn dented_blocks_never_panic(
            dents in prop::collection::vec((0usize..300, any::<u8>()), 1..6),
        ) {
            let page: Page = std::array::from_fn(|at| (at / 30).to_le_bytes()[0]);
            let mut block = vec![];
            prop_assert!(Compressor::default().compress(&page, &mut block));
            for (at, dent) in dents {
                let at = at % block.len();
                block[at] ^= dent;
            }
            let _ = decompress(&block, &mut [0; PAGE_SIZE]);
        }
    }

    #[test]
    fn noise_is_left_alone() {
        let mut state = 1u64;
        let page: Page = std::array::from_fn(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state.to_le_bytes()[7]
        });
        let mut out = vec![];
        assert!(!Compressor::default().compress(&page, &mut out) && out.is_empty());
    }

    #[test]
    fn a_block_of_another_size_than_a_page_is_refused() {
        let block = |bytes: usize| lz4_flex::block::compress(&vec![7; bytes]);
        decompress(&block(PAGE_SIZE), &mut [0; PAGE_SIZE]).unwrap();
        let more = "an LZ4 block that is broken or more than a page";
        assert_eq!(refused(&block(PAGE_SIZE + 1)), more);
        assert_eq!(refused(&block(1 << 18)), more);
        assert_eq!(refused(&block(PAGE_SIZE - 1)), "an LZ4 block of less than a page");
        assert_eq!(refused(&[]), more);
        assert_eq!(refused(&vec![0; LZ4_BYTES_MAX + 1]), "an LZ4 block that is too long");
    }
}
