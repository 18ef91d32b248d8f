//! What becomes of requests: completions, the queues they come in, and the channel that wakes.
//!
//! ```text
//!            arm()                       a completion comes
//! [polled] ---------> [armed, polled] ----------------------> descriptor readable
//!    ^                                                              |
//!    +---- poll() until it gives none <---- take_wakeups() <--------+
//! ```
//!
//! A completion that came before `arm` wakes nobody: poll once more after arming, then sleep.

use std::ffi::c_int;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use crate::abi;
use crate::context::{Context, set_nonblocking};
use crate::error::{Error, check, given_back};

/// Completions that are taken from a device at once.
const BATCH: usize = 16;

/// A descriptor that becomes readable when an armed queue has a completion.
pub struct CompletionChannel {
    context: Arc<Context>,
    raw: NonNull<abi::CompChannel>,
}

// SAFETY: as for `Context`.
unsafe impl Send for CompletionChannel {}
// SAFETY: as for `Context`.
unsafe impl Sync for CompletionChannel {}

impl CompletionChannel {
    /// Makes one, whose descriptor does not block.
    ///
    /// # Errors
    /// If the device has no room for it.
    pub fn new(context: &Arc<Context>) -> Result<Arc<Self>, Error> {
        let failed = |source| context.failed("make a completion channel", source);
        // SAFETY: the context is open.
        let raw = unsafe { (context.library().ibv_create_comp_channel)(context.raw()) };
        let raw = NonNull::new(raw).ok_or_else(|| failed(io::Error::last_os_error()))?;
        let this = Self { context: Arc::clone(context), raw };
        set_nonblocking(this.as_fd()).map_err(failed)?;
        Ok(Arc::new(this))
    }

    /// Takes what made the descriptor readable, and says how often queues woke it. Each wake-up was of
    /// an armed queue, which is not armed any more.
    ///
    /// # Errors
    /// If the descriptor cannot be read.
    pub fn take_wakeups(&self) -> Result<u32, Error> {
        let library = self.context.library();
        let mut count = 0;
        loop {
            let (mut queue, mut cookie) = (std::ptr::null_mut(), std::ptr::null_mut());
            // SAFETY: the channel is there, and the library writes two pointers.
            let returned = unsafe {
                (library.ibv_get_cq_event)(self.raw.as_ptr(), &raw mut queue, &raw mut cookie)
            };
            if returned != 0 {
                let error = io::Error::last_os_error();
                return match error.kind() {
                    io::ErrorKind::WouldBlock => Ok(count),
                    io::ErrorKind::Interrupted => continue,
                    _ => Err(self.context.failed("report completions", error)),
                };
            }
            // SAFETY: the queue is the one of the event. Its destruction waits until all its events are
            // acknowledged, so it is still there; each is acknowledged once.
            unsafe { (library.ibv_ack_cq_events)(queue, 1) };
            count += 1;
        }
    }
}

impl AsFd for CompletionChannel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is the channel's, which closes it when `self` is dropped.
        unsafe { BorrowedFd::borrow_raw((*self.raw.as_ptr()).fd) }
    }
}

impl fmt::Debug for CompletionChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("CompletionChannel").field(&self.context.name()).finish()
    }
}

impl Drop for CompletionChannel {
    fn drop(&mut self) {
        let destroy = self.context.library().ibv_destroy_comp_channel;
        // SAFETY: the channel is there, and the queues that use it held it, so are gone.
        given_back("a completion channel", unsafe { destroy(self.raw.as_ptr()) });
    }
}

/// Where completions come.
pub struct CompletionQueue {
    context: Arc<Context>,
    raw: NonNull<abi::Cq>,
    channel: Option<Arc<CompletionChannel>>,
}

// SAFETY: as for `Context`.
unsafe impl Send for CompletionQueue {}
// SAFETY: as for `Context`.
unsafe impl Sync for CompletionQueue {}

impl CompletionQueue {
    /// Makes a queue that holds at least `entries` completions; it must not get more, or it is lost.
    /// `channel` is of the same device.
    ///
    /// # Errors
    /// If the device has no room for it.
    pub fn new(
        context: &Arc<Context>,
        entries: u32,
        channel: Option<&Arc<CompletionChannel>>,
    ) -> Result<Arc<Self>, Error> {
        if channel.is_some_and(|channel| !Arc::ptr_eq(&channel.context, context)) {
            let what = "a completion channel of another device".to_owned();
            return Err(Error::Option { what });
        }
        let entries = c_int::try_from(entries).unwrap_or(c_int::MAX);
        let raw_channel = channel.map_or(std::ptr::null_mut(), |channel| channel.raw.as_ptr());
        let create = context.library().ibv_create_cq;
        // SAFETY: the context is open, the channel is there and of this context, or null; the vector 0
        // is there on every device.
        let raw = unsafe { create(context.raw(), entries, std::ptr::null_mut(), raw_channel, 0) };
        let raw = NonNull::new(raw).ok_or_else(|| {
            let what = format!("make a completion queue of {entries} entries");
            context.failed(what, io::Error::last_os_error())
        })?;
        Ok(Arc::new(Self { context: Arc::clone(context), raw, channel: channel.cloned() }))
    }

    pub(crate) fn raw(&self) -> *mut abi::Cq {
        self.raw.as_ptr()
    }

    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Lets the next completion make the channel's descriptor readable, once.
    ///
    /// # Errors
    /// If there is no channel, or the device refuses.
    pub fn arm(&self) -> Result<(), Error> {
        let failed = |source| self.context.failed("arm a completion queue", source);
        let unsupported = || io::Error::from(io::ErrorKind::Unsupported);
        self.channel.as_ref().ok_or_else(|| failed(unsupported()))?;
        let notify = self.context.ops().req_notify_cq.ok_or_else(|| failed(unsupported()))?;
        // SAFETY: the queue is there.
        check(unsafe { notify(self.raw(), 0) }).map_err(failed)
    }

    /// Takes completions that have come into the first places of `completions`, as many as there is
    /// room for, and says how many these are. A queue that gave fewer was empty.
    ///
    /// # Errors
    /// If the device is broken.
    pub fn poll(&self, completions: &mut [Completion]) -> Result<usize, Error> {
        let failed = |source| self.context.failed("say what has completed", source);
        let unsupported = || failed(io::Error::from(io::ErrorKind::Unsupported));
        let poll = self.context.ops().poll_cq.ok_or_else(unsupported)?;
        let mut count = 0;
        loop {
            let mut raw = [abi::Wc::default(); BATCH];
            let room = (completions.len() - count).min(BATCH);
            if room == 0 {
                return Ok(count);
            }
            // SAFETY: the queue is there, and the device's provider writes at most `room` completions.
            let taken =
                unsafe { poll(self.raw(), c_int::try_from(room).unwrap_or(0), raw.as_mut_ptr()) };
            let taken = usize::try_from(taken)
                .map_err(|_| failed(io::Error::from_raw_os_error(taken.saturating_neg())))?;
            for raw in &raw[..taken] {
                completions[count] = Completion::decode(raw);
                if let Outcome::Failed(failure) = &mut completions[count].outcome {
                    failure.text = self.context.library().status_text(raw.status);
                }
                count += 1;
            }
            if taken < room {
                return Ok(count);
            }
        }
    }
}

impl fmt::Debug for CompletionQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("CompletionQueue").field(&self.context.name()).finish()
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        let destroy = self.context.library().ibv_destroy_cq;
        // SAFETY: the queue is there, and the queue pairs that use it held it, so are gone; all events
        // that were taken are acknowledged.
        given_back("a completion queue", unsafe { destroy(self.raw()) });
    }
}

/// What became of a request. A request that was not signalled completes only if it fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// What the request gave; of a failed one, too.
    pub id: u64,
    /// The number of the queue pair, as in its endpoint.
    pub queue_pair: u32,
    pub outcome: Outcome,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A WRITE, with an immediate value or without, and all posted before it: the peer has them.
    Written,
    Sent,
    /// A READ: the bytes are here.
    Read {
        bytes: u32,
    },
    /// A receive: a SEND of the peer's, into its segments.
    Received {
        bytes: u32,
    },
    /// A receive, taken by the peer's WRITE with an immediate value, after the WRITE's bytes.
    WrittenHere {
        bytes: u32,
        immediate: u32,
    },
    /// A kind that nobody here asks for.
    Other {
        opcode: i32,
    },
    Failed(Failure),
}

/// Why a request failed. The queue pair is in error, and what else was posted fails with
/// [`Status::Flushed`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    pub status: Status,
    /// The library's words for it.
    pub text: &'static str,
    /// What the device's maker knows.
    pub vendor_error: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// More came than the receive's segments have room for.
    LocalLength,
    /// A segment that is not of a region of ours, or of one that does not permit it.
    LocalProtection,
    /// It was not done: the queue pair is in error, or was invalidated.
    Flushed,
    /// The peer cannot do such a thing with this queue pair.
    RemoteInvalidRequest,
    /// The peer's memory, by this key, does not permit it.
    RemoteAccess,
    /// The peer failed to do it.
    RemoteOperation,
    /// The peer did not answer, however often it was tried (`timeout`, `retries`).
    NoAnswer,
    /// The peer had no receive posted, however often it was tried (`receiver_retries`).
    ReceiverNotReady,
    Other(i32),
}

impl Default for Completion {
    /// A place for [`CompletionQueue::poll`].
    fn default() -> Self {
        Self { id: 0, queue_pair: 0, outcome: Outcome::Other { opcode: -1 } }
    }
}

impl Completion {
    fn decode(raw: &abi::Wc) -> Self {
        Self { id: raw.wr_id, queue_pair: raw.qp_num, outcome: Outcome::decode(raw) }
    }

    /// What the request did.
    ///
    /// # Errors
    /// If it failed.
    pub fn succeeded(&self) -> Result<Outcome, Failure> {
        match self.outcome {
            Outcome::Failed(failure) => Err(failure),
            outcome => Ok(outcome),
        }
    }
}

impl Outcome {
    fn decode(raw: &abi::Wc) -> Self {
        if raw.status != abi::WC_SUCCESS {
            let status = Status::decode(raw.status);
            return Self::Failed(Failure { status, text: "", vendor_error: raw.vendor_err });
        }
        let bytes = raw.byte_len;
        match raw.opcode {
            abi::WC_RDMA_WRITE => Self::Written,
            abi::WC_SEND => Self::Sent,
            abi::WC_RDMA_READ => Self::Read { bytes },
            abi::WC_RECV => Self::Received { bytes },
            abi::WC_RECV_RDMA_WITH_IMM if raw.wc_flags & abi::WC_WITH_IMM != 0 => {
                Self::WrittenHere { bytes, immediate: u32::from_be(raw.imm_data) }
            }
            opcode => Self::Other { opcode },
        }
    }
}

impl Status {
    fn decode(raw: c_int) -> Self {
        match raw {
            abi::WC_LOC_LEN_ERR => Self::LocalLength,
            abi::WC_LOC_PROT_ERR => Self::LocalProtection,
            abi::WC_WR_FLUSH_ERR => Self::Flushed,
            abi::WC_REM_INV_REQ_ERR => Self::RemoteInvalidRequest,
            abi::WC_REM_ACCESS_ERR => Self::RemoteAccess,
            abi::WC_REM_OP_ERR => Self::RemoteOperation,
            abi::WC_RETRY_EXC_ERR => Self::NoAnswer,
            abi::WC_RNR_RETRY_EXC_ERR => Self::ReceiverNotReady,
            other => Self::Other(other),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { status, text, vendor_error } = self;
        write!(f, "{text} ({status:?}, vendor's code {vendor_error:#x})")
    }
}

impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_immediate_value_comes_in_the_host_s_order() {
        let raw = abi::Wc {
            wr_id: 7,
            opcode: abi::WC_RECV_RDMA_WITH_IMM,
            wc_flags: abi::WC_WITH_IMM,
            imm_data: u32::from_ne_bytes([0, 0, 1, 2]),
            byte_len: 4096,
            qp_num: 17,
            ..abi::Wc::default()
        };
        let completion = Completion::decode(&raw);
        assert_eq!((completion.id, completion.queue_pair), (7, 17));
        let expected = Outcome::WrittenHere { bytes: 4096, immediate: 0x0102 };
        assert_eq!(completion.succeeded(), Ok(expected));
    }

    #[test]
    fn of_a_failed_request_only_status_and_id_count() {
        let (status, opcode) = (abi::WC_REM_ACCESS_ERR, 4711);
        let raw = abi::Wc { wr_id: 8, status, opcode, ..abi::Wc::default() };
        let failure = Completion::decode(&raw).succeeded().unwrap_err();
        assert_eq!(failure.status, Status::RemoteAccess);
        assert_eq!(Status::decode(77), Status::Other(77));
    }
}
