//! The contents of a pages frame, as a peer sent them and as they are staged.
//!
//! Enters: the runs of a frame, decoded, and its contents, bytes of a peer whose checksum was good.
//! Leaves: runs and contents as a backup stages them. Always holds: what left can be applied to the
//! image without a further check; nothing is allocated before its size is known and bounded.
//!
//! ```text
//! wire:   raw | 4096 bytes |   delta | length | delta |   lz4 | length | block |
//!             │                    │ checked                  │ decoded
//! staged: raw | 4096 bytes |   delta | length | delta |   raw | 4096 bytes |
//! ```
//!
//! An LZ4 block is decoded here, by the thread that received it, and not at the commit: there it
//! would make the guest's output wait, and must not fail. A delta needs the page as the epoch
//! before leaves it, so it stays one.

use super::WireError;
use super::pages::{Encoding, LENGTH_BYTES, Run};
use crate::encode::{delta, lz4, malformed};
use crate::ids::PAGE_SIZE;

/// Bytes that the contents take once staged, never more than a page for each: so a primary that
/// counts whole pages cannot run out of staging. Checks all lengths and deltas.
///
/// # Errors
/// [`WireError::Malformed`].
pub fn staged_bytes(runs: &[Run], contents: &[u8]) -> Result<usize, WireError> {
    let mut rest = contents;
    let mut staged = 0;
    for run in runs {
        if run.encoding == Encoding::Zero {
            continue;
        }
        for _ in 0..run.count {
            let content = take_content(run.encoding, &mut rest)?;
            if run.encoding == Encoding::Delta {
                delta::check(content)?;
                staged += LENGTH_BYTES + content.len();
            } else {
                staged += PAGE_SIZE;
            }
        }
    }
    if rest.is_empty() { Ok(staged) } else { malformed("bytes left over") }
}

/// Appends runs and contents as they are staged, [`staged_bytes`] of them.
///
/// # Errors
/// [`WireError::Malformed`]; then what was appended is of no use.
pub fn unpack(
    runs: &[Run],
    contents: &[u8],
    staged_runs: &mut Vec<Run>,
    staged: &mut Vec<u8>,
) -> Result<(), WireError> {
    let mut rest = contents;
    for run in runs {
        let encoding = match run.encoding {
            Encoding::Lz4 => Encoding::Raw,
            same => same,
        };
        staged_runs.push(Run { encoding, ..*run });
        if run.encoding == Encoding::Zero {
            continue;
        }
        for _ in 0..run.count {
            let content = take_content(run.encoding, &mut rest)?;
            match run.encoding {
                Encoding::Lz4 => decode(content, staged)?,
                Encoding::Delta => {
                    staged.extend(length_of(content).to_le_bytes());
                    staged.extend_from_slice(content);
                }
                Encoding::Zero | Encoding::Raw => staged.extend_from_slice(content),
            }
        }
    }
    Ok(())
}

fn decode(block: &[u8], staged: &mut Vec<u8>) -> Result<(), WireError> {
    let from = staged.len();
    staged.resize(from + PAGE_SIZE, 0);
    let (pages, _) = staged[from..].as_chunks_mut::<PAGE_SIZE>();
    lz4::decompress(block, &mut pages[0])
}

fn length_of(content: &[u8]) -> u16 {
    u16::try_from(content.len()).expect("less than a page")
}

/// Takes the content of the next page off `rest`.
///
/// # Errors
/// [`WireError::Malformed`].
pub(crate) fn take_content<'a>(
    encoding: Encoding,
    rest: &mut &'a [u8],
) -> Result<&'a [u8], WireError> {
    let bytes = match encoding {
        Encoding::Zero => 0,
        Encoding::Raw => PAGE_SIZE,
        Encoding::Delta | Encoding::Lz4 => {
            let Some((length, after)) = rest.split_first_chunk::<LENGTH_BYTES>() else {
                return malformed("length of the contents");
            };
            *rest = after;
            usize::from(u16::from_le_bytes(*length))
        }
    };
    let Some((content, after)) = rest.split_at_checked(bytes) else {
        return malformed("length of the contents");
    };
    *rest = after;
    Ok(content)
}

/// Begins a content that has a length: room for it is left, and filled by [`end_content`].
pub(crate) fn begin_content(out: &mut Vec<u8>) -> usize {
    out.extend([0; LENGTH_BYTES]);
    out.len()
}

/// The content that began at `from` is whole; returns where it is with its length.
pub(crate) fn end_content(from: usize, out: &mut [u8]) -> usize {
    let (length, start) = (length_of(&out[from..]), from - LENGTH_BYTES);
    out[start..from].copy_from_slice(&length.to_le_bytes());
    start
}

/// Takes back what was begun at `from`.
pub(crate) fn undo_content(from: usize, out: &mut Vec<u8>) {
    out.truncate(from - LENGTH_BYTES);
}
