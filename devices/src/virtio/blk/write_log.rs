//! Where a disk's changes are recorded for a copy of its image elsewhere.

/// A change that the host was given. Offsets and lengths in bytes, whole sectors, in the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change<'a> {
    Write {
        offset: u64,
        data: &'a [u8],
    },
    /// The range reads as zeroes; its room may be freed if `unmap`.
    Zero {
        offset: u64,
        len: u64,
        unmap: bool,
    },
    /// What the range reads as is of no use any more.
    Discard {
        offset: u64,
        len: u64,
    },
}

/// Records changes. The host may fail one afterwards: the guest then sees an error, and what the
/// range contains is undefined on both sides.
pub trait WriteLog: Send + Sync {
    /// Takes a change that the host is about to be given, under a pass: a change is recorded in
    /// the epoch in which it was given. Two that overlap come in the order in which the host
    /// carries them out, and the second after the first has ended. May not block on a peer.
    fn record(&self, change: &Change<'_>);
}
