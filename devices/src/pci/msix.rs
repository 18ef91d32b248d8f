//! MSI-X (PCI 3.0, 6.8.2): a table of messages, a mask for each and one for all, pending bits.
//!
//! What enters: a device's wish to interrupt, on any thread, and the driver's writes; what leaves:
//! messages. What always holds: a masked vector sends nothing and remembers one interrupt, which
//! is sent when the last mask goes; messages leave with the table locked, so that after a write
//! that masks a vector has returned none of it is under way.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::MessageSink;
use crate::counters::Counter;

/// Capability id.
pub const CAPABILITY_MSIX: u8 = 0x11;
/// Bytes of a table entry.
pub const ENTRY_BYTES: u64 = 16;
/// Most vectors of a function.
pub const VECTORS_MAX: u16 = 2048;

const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_MASK: u16 = 1 << 14;
const VECTOR_MASKED: u32 = 1;

/// A saved table entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    pub address: u64,
    pub data: u32,
    pub masked: bool,
    /// An interrupt waits for the mask to go.
    pub pending: bool,
}

impl Default for Entry {
    fn default() -> Self {
        Self { address: 0, data: 0, masked: true, pending: false }
    }
}

/// The saved form. Enable and function mask are a part of configuration space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    pub entries: Vec<Entry>,
}

/// A saved table is not usable.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("The MSI-X table has {found} vectors instead of {expected}")]
pub struct MsixError {
    pub found: usize,
    pub expected: usize,
}

#[derive(Debug)]
struct Inner {
    enabled: bool,
    masked: bool,
    entries: Vec<Entry>,
}

/// The table, the pending bits, and where messages go.
pub struct Msix {
    inner: Mutex<Inner>,
    sink: Arc<dyn MessageSink>,
    sent: Counter,
}

impl Msix {
    /// All vectors masked, the function disabled. `vectors` is 1 to [`VECTORS_MAX`].
    #[must_use]
    pub fn new(vectors: u16, sink: Arc<dyn MessageSink>) -> Self {
        assert!((1..=VECTORS_MAX).contains(&vectors));
        let inner = Inner {
            enabled: false,
            masked: false,
            entries: vec![Entry::default(); vectors.into()],
        };
        Self { inner: Mutex::new(inner), sink, sent: Counter::default() }
    }

    /// The capability's body: message control, table and pending bits, both in BAR 0. Both
    /// offsets are multiples of 8.
    #[must_use]
    pub fn capability(vectors: u16, table: u32, pending: u32) -> ([u8; 10], [u8; 10]) {
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(vectors - 1).to_le_bytes());
        body[2..6].copy_from_slice(&table.to_le_bytes());
        body[6..].copy_from_slice(&pending.to_le_bytes());
        let mut writable = [0; 10];
        writable[..2].copy_from_slice(&(CONTROL_ENABLE | CONTROL_MASK).to_le_bytes());
        (body, writable)
    }

    #[must_use]
    pub fn vectors(&self) -> u16 {
        u16::try_from(self.lock().entries.len()).unwrap_or(VECTORS_MAX)
    }

    /// Messages sent so far.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.sent.get()
    }

    /// Takes the capability's message control. Unmasking sends what is pending.
    pub fn set_control(&self, control: u16) {
        let mut inner = self.lock();
        inner.enabled = control & CONTROL_ENABLE != 0;
        inner.masked = control & CONTROL_MASK != 0;
        self.send_pending(&mut inner);
    }

    /// Interrupts by `vector`. False if the function does not use MSI-X now.
    pub fn signal(&self, vector: u16) -> bool {
        let mut inner = self.lock();
        if !inner.enabled {
            return false;
        }
        let all_masked = inner.masked;
        if let Some(entry) = inner.entries.get_mut(usize::from(vector)) {
            if all_masked || entry.masked {
                entry.pending = true;
            } else {
                self.send(entry);
            }
        }
        true
    }

    /// Reads the table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let inner = self.lock();
        for (at, byte) in (offset..).zip(data) {
            *byte = entry_at(at)
                .and_then(|(index, within)| Some((inner.entries.get(index)?, within)))
                .and_then(|(entry, within)| image(entry).get(within).copied())
                .unwrap_or(0);
        }
    }

    /// Writes the table: whole aligned registers of 32 bits, one or two; other writes are none
    /// that a driver may make, and change nothing.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let (words, rest) = data.as_chunks::<4>();
        if !offset.is_multiple_of(4) || !rest.is_empty() {
            return;
        }
        let mut inner = self.lock();
        for (at, word) in (offset..).step_by(4).zip(words) {
            let Some((index, within)) = entry_at(at) else { continue };
            let Some(entry) = inner.entries.get_mut(index) else { continue };
            let word = u32::from_le_bytes(*word);
            let (low, high) = (entry.address & 0xffff_ffff, entry.address >> 32 << 32);
            match within {
                0 => entry.address = high | u64::from(word),
                4 => entry.address = u64::from(word) << 32 | low,
                8 => entry.data = word,
                _ => entry.masked = word & VECTOR_MASKED != 0,
            }
        }
        self.send_pending(&mut inner);
    }

    /// Reads the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let inner = self.lock();
        for (at, byte) in (offset..).zip(data) {
            let first = at.saturating_mul(8);
            *byte = (0..8u8)
                .filter(|bit| {
                    let index = usize::try_from(first.saturating_add((*bit).into()));
                    index.is_ok_and(|index| inner.entries.get(index).is_some_and(|e| e.pending))
                })
                .fold(0, |bits, bit| bits | 1 << bit);
        }
    }

    #[must_use]
    pub fn save(&self) -> MsixState {
        MsixState { entries: self.lock().entries.clone() }
    }

    /// Whether [`Msix::restore`] would take this.
    pub fn check(&self, state: &MsixState) -> Result<(), MsixError> {
        let (found, expected) = (state.entries.len(), self.lock().entries.len());
        if found == expected { Ok(()) } else { Err(MsixError { found, expected }) }
    }

    /// Takes a saved table with the message control that belongs to it. Nothing is sent: what is
    /// pending is masked, or will be when the masks are as saved.
    pub fn restore(&self, state: &MsixState, control: u16) -> Result<(), MsixError> {
        self.check(state)?;
        let mut inner = self.lock();
        inner.entries.clone_from(&state.entries);
        inner.enabled = control & CONTROL_ENABLE != 0;
        inner.masked = control & CONTROL_MASK != 0;
        Ok(())
    }

    /// Back to power-on.
    pub fn reset(&self) {
        let mut inner = self.lock();
        inner.enabled = false;
        inner.masked = false;
        inner.entries.fill(Entry::default());
    }

    fn send_pending(&self, inner: &mut Inner) {
        if !inner.enabled || inner.masked {
            return;
        }
        for entry in inner.entries.iter_mut().filter(|entry| entry.pending && !entry.masked) {
            entry.pending = false;
            self.send(entry);
        }
    }

    fn send(&self, entry: &Entry) {
        self.sent.add(1);
        self.sink.send(entry.address, entry.data);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Which entry an offset is in, and where.
fn entry_at(offset: u64) -> Option<(usize, usize)> {
    let index = usize::try_from(offset / ENTRY_BYTES).ok()?;
    Some((index, usize::try_from(offset % ENTRY_BYTES).ok()?))
}

fn image(entry: &Entry) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&entry.address.to_le_bytes());
    bytes[8..12].copy_from_slice(&entry.data.to_le_bytes());
    bytes[12..].copy_from_slice(&u32::from(entry.masked).to_le_bytes());
    bytes
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Remembers messages.
    #[derive(Default)]
    pub struct Messages(pub Mutex<Vec<(u64, u32)>>);

    impl Messages {
        pub fn take(&self) -> Vec<(u64, u32)> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    impl MessageSink for Messages {
        fn send(&self, address: u64, data: u32) {
            self.0.lock().unwrap().push((address, data));
        }
    }

    const ON: u16 = CONTROL_ENABLE;

    fn table() -> (Msix, Arc<Messages>) {
        let messages = Arc::new(Messages::default());
        let msix = Msix::new(3, Arc::clone(&messages) as _);
        for vector in 0..3u32 {
            let at = u64::from(vector) * ENTRY_BYTES;
            msix.write_table(at, &0xfee0_1000_u64.to_le_bytes());
            msix.write_table(at + 8, &(0x40 + vector).to_le_bytes());
        }
        (msix, messages)
    }

    #[test]
    fn a_masked_vector_is_sent_once_when_unmasked() {
        let (msix, messages) = table();
        assert!(!msix.signal(0), "not enabled");
        msix.set_control(ON);
        assert!(msix.signal(1) && msix.signal(1));
        assert!(messages.take().is_empty());
        let mut bits = [0; 8];
        msix.read_pending(0, &mut bits);
        assert_eq!(bits, [2, 0, 0, 0, 0, 0, 0, 0]);
        msix.write_table(ENTRY_BYTES + 12, &[0; 4]);
        assert_eq!(messages.take(), [(0xfee0_1000, 0x41)]);
        msix.read_pending(0, &mut bits);
        assert_eq!(bits, [0; 8]);
        msix.signal(1);
        assert_eq!(messages.take(), [(0xfee0_1000, 0x41)]);
        assert_eq!(msix.sent(), 2);
    }

    #[test]
    fn the_function_mask_holds_all_vectors_back() {
        let (msix, messages) = table();
        for vector in 0..3 {
            msix.write_table(vector * ENTRY_BYTES + 12, &[0; 4]);
        }
        msix.set_control(ON | CONTROL_MASK);
        msix.signal(0);
        msix.signal(2);
        assert!(messages.take().is_empty());
        msix.set_control(ON);
        assert_eq!(messages.take(), [(0xfee0_1000, 0x40), (0xfee0_1000, 0x42)]);
    }

    #[test]
    fn the_table_reads_as_written() {
        let (msix, _) = table();
        let mut bytes = [0; 16];
        msix.read_table(ENTRY_BYTES, &mut bytes);
        assert_eq!(bytes, [0, 0x10, 0xe0, 0xfe, 0, 0, 0, 0, 0x41, 0, 0, 0, 1, 0, 0, 0]);
        msix.read_table(3 * ENTRY_BYTES, &mut bytes);
        assert_eq!(bytes, [0; 16]);
        msix.write_table(2, &[9; 4]);
        msix.write_table(4, &[9; 3]);
        let before = msix.save();
        msix.write_table(1 << 40, &[9; 4]);
        assert_eq!(msix.save(), before);
        assert_eq!(before.entries[0].address, 0xfee0_1000);
    }

    proptest! {
        /// Whatever is written, a signal of an enabled, unmasked vector is one message, and one
        /// of a masked vector a pending bit.
        #[test]
        fn garbage_changes_nothing_else(
            writes in prop::collection::vec(
                (0u64..80, prop::collection::vec(any::<u8>(), 0..17), any::<u16>(), 0u16..5),
                0..40,
            ),
        ) {
            let (msix, messages) = table();
            for (offset, data, control, vector) in writes {
                msix.write_table(offset, &data);
                msix.set_control(control);
                messages.take();
                let entry = msix.save().entries.get(usize::from(vector)).copied();
                let enabled = msix.signal(vector);
                prop_assert_eq!(enabled, control & CONTROL_ENABLE != 0);
                let open = control & CONTROL_MASK == 0 && entry.is_some_and(|e| !e.masked);
                let expected = usize::from(enabled && open);
                prop_assert_eq!(messages.take().len(), expected);
                let mut bits = [0; 9];
                msix.read_pending(offset, &mut bits);
                let copy = Msix::new(3, Arc::clone(&messages) as _);
                copy.restore(&msix.save(), control).unwrap();
                prop_assert_eq!(copy.save(), msix.save());
            }
        }
    }
}
