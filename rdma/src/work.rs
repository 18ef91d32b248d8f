//! Requests: a list of them is posted at once, with one doorbell.
//!
//! Enters: requests, each of which says whether it is signalled. Leaves: the linked list that a device
//! takes. A list is used again and again: after its first uses it allocates nothing.

use std::ffi::c_int;

use crate::abi;
use crate::memory::{Remote, Segment};

/// One request.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Comes back in the completion.
    pub id: u64,
    /// Whether it completes when it is done; otherwise only if it fails. A send queue has room for a
    /// request again only when one that is signalled, it or a later one, has completed *and was polled*:
    /// at least one in each half of the queue's depth, and the last one, are to be signalled.
    pub signalled: bool,
    /// Begins only when all READs before it are done.
    pub fence: bool,
    pub operation: Operation<'a>,
}

/// What a request does. Segments are of regions that permit it; the device refuses others.
#[derive(Clone, Copy, Debug)]
pub enum Operation<'a> {
    /// Writes the segments, one after the other, to the peer's memory.
    Write { from: &'a [Segment], to: Remote },
    /// The same, and then completes a receive of the peer's with `immediate`.
    WriteWithImmediate { from: &'a [Segment], to: Remote, immediate: u32 },
    /// Sends bytes, which are copied now, into a receive of the peer's; at most as many as the queue
    /// pair's `inline_bytes`.
    SendInline { bytes: &'a [u8] },
    /// Sends the segments into a receive of the peer's.
    Send { from: &'a [Segment] },
    /// Reads the peer's memory into the segments.
    Read { into: &'a [Segment], from: Remote },
}

/// Requests that are posted together, in this order.
#[derive(Debug, Default)]
pub struct RequestList {
    entries: Vec<Entry>,
    segments: Vec<abi::Sge>,
    inline: Vec<u8>,
    /// What is posted: rebuilt by `link`, since the vectors above move while they grow.
    linked: Vec<abi::SendWr>,
}

// SAFETY: the pointers in `linked` are into the list's own vectors, whose contents move with it, and they
// are made anew by each `link`.
unsafe impl Send for RequestList {}

#[derive(Clone, Copy, Debug)]
struct Entry {
    id: u64,
    opcode: c_int,
    flags: u32,
    immediate: u32,
    remote: Remote,
    /// Of `segments`.
    first: usize,
    count: usize,
    /// Where its bytes begin, if it has some.
    inline: Option<usize>,
}

impl RequestList {
    /// An empty list with room for so much.
    #[must_use]
    pub fn with_capacity(requests: usize, segments: usize, inline_bytes: usize) -> Self {
        Self {
            entries: Vec::with_capacity(requests),
            segments: Vec::with_capacity(segments),
            inline: Vec::with_capacity(inline_bytes),
            linked: Vec::with_capacity(requests),
        }
    }

    /// Requests in it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Empties it. What was posted is the device's already.
    pub fn clear(&mut self) {
        self.entries.clear();
        self.segments.clear();
        self.inline.clear();
    }

    /// Adds a request at the end.
    pub fn push(&mut self, request: Request<'_>) {
        let first = self.segments.len();
        let mut flags = 0;
        let (mut immediate, mut remote, mut inline) = (0, Remote::default(), None);
        let opcode = match request.operation {
            Operation::Write { from, to } => {
                remote = to;
                self.extend(from);
                abi::WR_RDMA_WRITE
            }
            Operation::WriteWithImmediate { from, to, immediate: value } => {
                (remote, immediate) = (to, value);
                self.extend(from);
                abi::WR_RDMA_WRITE_WITH_IMM
            }
            Operation::SendInline { bytes } => {
                flags |= abi::SEND_INLINE;
                if !bytes.is_empty() {
                    inline = Some(self.inline.len());
                    // No limit is so large: `refused` finds it. The address comes with `link`.
                    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
                    self.segments.push(abi::Sge { addr: 0, length, lkey: 0 });
                    self.inline.extend_from_slice(bytes);
                }
                abi::WR_SEND
            }
            Operation::Send { from } => {
                self.extend(from);
                abi::WR_SEND
            }
            Operation::Read { into, from } => {
                remote = from;
                self.extend(into);
                abi::WR_RDMA_READ
            }
        };
        if request.signalled {
            flags |= abi::SEND_SIGNALED;
        }
        if request.fence {
            flags |= abi::SEND_FENCE;
        }
        let count = self.segments.len() - first;
        let id = request.id;
        self.entries.push(Entry { id, opcode, flags, immediate, remote, first, count, inline });
    }

    fn extend(&mut self, segments: &[Segment]) {
        self.segments.extend(segments.iter().map(|segment| segment.0));
    }

    /// The first request that a queue pair with such limits cannot take, and why.
    pub(crate) fn refused(&self, segments_max: u32, inline_bytes: u32) -> Option<(usize, String)> {
        self.entries.iter().enumerate().find_map(|(index, entry)| {
            if entry.count > segments_max as usize {
                let count = entry.count;
                return Some((index, format!("{count} segments, the limit is {segments_max}")));
            }
            let length = self.segments.get(entry.first).map_or(0, |segment| segment.length);
            let long = entry.inline.is_some() && length > inline_bytes;
            long.then(|| (index, format!("{length} inline bytes, the limit is {inline_bytes}")))
        })
    }

    /// The linked list, whose pointers hold until `self` is used again; null if it is empty.
    pub(crate) fn link(&mut self) -> *mut abi::SendWr {
        let segments = self.segments.as_mut_ptr();
        self.linked.clear();
        for entry in &self.entries {
            // SAFETY: `push` has put `count` segments from `first` on into the vector.
            let sg_list = unsafe { segments.add(entry.first) };
            if let Some(offset) = entry.inline {
                let bytes = self.inline[offset..].as_ptr();
                // SAFETY: an inline request has one segment, and nobody else accesses it now.
                unsafe { (*sg_list).addr = bytes.expose_provenance() as u64 };
            }
            self.linked.push(abi::SendWr {
                wr_id: entry.id,
                next: std::ptr::null_mut(),
                sg_list,
                num_sge: c_int::try_from(entry.count).unwrap_or(c_int::MAX),
                opcode: entry.opcode,
                send_flags: entry.flags,
                imm_data: entry.immediate.to_be(),
                remote_addr: entry.remote.address,
                rkey: entry.remote.key,
                _unused: [0; 9],
            });
        }
        let first = self.linked.as_mut_ptr();
        for index in 1..self.linked.len() {
            // SAFETY: both are places of the vector.
            unsafe { (*first.add(index - 1)).next = first.add(index) };
        }
        if self.linked.is_empty() { std::ptr::null_mut() } else { first }
    }

    /// The place in the linked list of the request that a provider returned.
    pub(crate) fn index_of(&self, request: *const abi::SendWr) -> usize {
        self.linked.iter().position(|linked| std::ptr::eq(linked, request)).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(addr: u64, length: u32) -> Segment {
        Segment(abi::Sge { addr, length, lkey: 3 })
    }

    fn write(id: u64, from: &[Segment], signalled: bool) -> Request<'_> {
        let to = Remote { address: 0x1000 * id, key: 9 };
        Request { id, signalled, fence: false, operation: Operation::Write { from, to } }
    }

    /// What a provider would read: of each request its id, flags, and segments.
    fn read(mut next: *mut abi::SendWr) -> Vec<(u64, u32, Vec<abi::Sge>)> {
        let mut found = Vec::new();
        // SAFETY: the list is not used while its pointers are followed.
        while let Some(request) = unsafe { next.as_ref() } {
            let count = usize::try_from(request.num_sge).unwrap();
            // SAFETY: as above.
            let segments = unsafe { std::slice::from_raw_parts(request.sg_list, count) };
            found.push((request.wr_id, request.send_flags, segments.to_vec()));
            next = request.next;
        }
        found
    }

    #[test]
    fn a_list_is_linked_in_order() {
        let mut list = RequestList::default();
        assert!(list.link().is_null());
        for id in 1..=40 {
            list.push(write(id, &[segment(id, 1), segment(id, 2)], id == 40));
        }
        for _ in 0..2 {
            let found = read(list.link());
            assert_eq!(found.len(), 40);
            for ((id, flags, segments), expected) in found.into_iter().zip(1..) {
                assert_eq!((id, segments.len(), segments[1].length), (expected, 2, 2));
                assert_eq!((segments[0].addr, segments[0].lkey), (expected, 3));
                assert_eq!(flags, if id == 40 { abi::SEND_SIGNALED } else { 0 });
            }
        }
        list.clear();
        assert!(list.link().is_null());
    }

    #[test]
    fn inline_bytes_are_the_list_s_own() {
        let mut list = RequestList::default();
        for id in 0..20_u8 {
            let bytes = [id; 100];
            let operation = Operation::SendInline { bytes: &bytes };
            list.push(Request { id: 0, signalled: false, fence: false, operation });
        }
        list.push(Request {
            id: 0,
            signalled: false,
            fence: false,
            operation: Operation::SendInline { bytes: &[] },
        });
        for _ in 0..2 {
            for ((_, flags, segments), expected) in read(list.link()).into_iter().zip(0..20) {
                assert_eq!(flags, abi::SEND_INLINE);
                let address = usize::try_from(segments[0].addr).unwrap();
                let bytes = std::ptr::with_exposed_provenance::<u8>(address);
                // SAFETY: the segment is of the list's own bytes, which are not changed meanwhile.
                let bytes = unsafe { std::slice::from_raw_parts(bytes, 100) };
                assert_eq!(bytes, [expected; 100]);
            }
        }
        assert_eq!(list.refused(1, 100), None);
        let (index, why) = list.refused(1, 99).unwrap();
        assert_eq!((index, why.as_str()), (0, "100 inline bytes, the limit is 99"));
    }

    #[test]
    fn more_segments_than_a_queue_pair_takes_are_refused() {
        let mut list = RequestList::default();
        list.push(write(1, &[segment(0, 1)], true));
        list.push(write(2, &[segment(0, 1); 3], true));
        assert_eq!(list.refused(2, 0).unwrap().0, 1);
        assert_eq!(list.refused(3, 0), None);
    }

    #[test]
    fn an_immediate_value_is_put_in_the_wire_s_order() {
        let mut list = RequestList::default();
        let to = Remote::default();
        let operation = Operation::WriteWithImmediate { from: &[], to, immediate: 0x0102 };
        list.push(Request { id: 1, signalled: true, fence: true, operation });
        let first = list.link();
        // SAFETY: the list has one request and is not used meanwhile.
        let raw = unsafe { &*first };
        assert_eq!(raw.imm_data.to_ne_bytes(), [0, 0, 1, 2]);
        assert_eq!(raw.send_flags, abi::SEND_SIGNALED | abi::SEND_FENCE);
        assert_eq!(list.index_of(first), 0);
    }
}
