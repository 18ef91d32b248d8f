//! A reliable connection (RC): requests leave it in order, and the peer's device does them without the
//! peer's processor.
//!
//! ```text
//!  new()            connect()                          invalidate(), or any failure
//! -------> INIT ----> RTR ----> RTS ---------------------------------------------> ERR
//!          receives may be posted; the peer's    requests may be posted     what was posted is
//!          packets are answered from RTR on                                 flushed; for good
//! ```

use std::ffi::c_int;
use std::fmt;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::abi;
use crate::completion::CompletionQueue;
use crate::context::{Context, mtu_code};
use crate::devices::LinkLayer;
use crate::endpoint::{ConnectOptions, Depths, Endpoint, Origin};
use crate::error::{Error, check, given_back};
use crate::memory::{ProtectionDomain, Segment};
use crate::work::RequestList;

/// Empty receives that are posted at once.
const RECEIVE_BATCH: usize = 32;

/// One end of a connection.
pub struct QueuePair {
    domain: Arc<ProtectionDomain>,
    raw: NonNull<abi::Qp>,
    origin: Origin,
    endpoint: Endpoint,
    link_layer: LinkLayer,
    reads_begun_max: u8,
    granted: Depths,
    /// Kept until the queue pair is gone.
    _queues: [Arc<CompletionQueue>; 2],
}

// SAFETY: as for `Context`.
unsafe impl Send for QueuePair {}
// SAFETY: as for `Context`.
unsafe impl Sync for QueuePair {}

impl QueuePair {
    /// Makes a queue pair that takes receives. Completions of requests come in `sends`, those of
    /// receives in `receives`, which may be the same queue.
    ///
    /// # Errors
    /// If the device has no room for it, or the port or its GID is not there.
    pub fn new(
        domain: &Arc<ProtectionDomain>,
        sends: &Arc<CompletionQueue>,
        receives: &Arc<CompletionQueue>,
        depths: &Depths,
        origin: Origin,
    ) -> Result<Self, Error> {
        let context = domain.context();
        if [sends, receives].iter().any(|queue| !Arc::ptr_eq(queue.context(), context)) {
            return Err(Error::Option { what: "a completion queue of another device".to_owned() });
        }
        let (port, limits) = (context.port(origin.port)?, context.limits()?);
        let endpoint = Endpoint {
            queue_pair: 0,
            packet_number: Endpoint::packet_number(random(context)?),
            gid: context.gid(origin.port, origin.gid_index)?.0,
            lid: port.lid,
            mtu_bytes: port.mtu_bytes,
            reads_answered: limits.reads_answered_max,
        };
        let (raw, granted) = create(domain, sends, receives, depths)?;
        let mut this = Self {
            domain: Arc::clone(domain),
            raw,
            origin,
            endpoint,
            link_layer: port.link_layer,
            reads_begun_max: limits.reads_begun_max,
            granted,
            _queues: [Arc::clone(sends), Arc::clone(receives)],
        };
        // SAFETY: the queue pair is there, and its number does not change.
        this.endpoint.queue_pair = unsafe { (*this.raw()).qp_num };
        this.initialize()?;
        Ok(this)
    }

    fn context(&self) -> &Context {
        self.domain.context()
    }

    fn raw(&self) -> *mut abi::Qp {
        self.raw.as_ptr()
    }

    /// What the peer must know to connect.
    #[must_use]
    pub fn endpoint(&self) -> Endpoint {
        self.endpoint
    }

    /// The number that completions and events name it by.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.endpoint.queue_pair
    }

    /// What it holds, at least what was asked for.
    #[must_use]
    pub fn depths(&self) -> Depths {
        self.granted
    }

    fn initialize(&self) -> Result<(), Error> {
        let attributes = abi::QpAttr {
            qp_state: abi::QPS_INIT,
            pkey_index: 0,
            port_num: self.origin.port,
            qp_access_flags: self.origin.access.bits(),
            ..abi::QpAttr::default()
        };
        let mask = abi::QP_STATE | abi::QP_PKEY_INDEX | abi::QP_PORT | abi::QP_ACCESS_FLAGS;
        self.modify(attributes, mask, "be initialized")
    }

    /// Connects it. The peer does the same with this end's endpoint; packets of a peer that was first
    /// are sent again until this end answers.
    ///
    /// # Errors
    /// If options or endpoint make no sense, or the device refuses.
    pub fn connect(&self, remote: &Endpoint, options: &ConnectOptions) -> Result<(), Error> {
        options.validate()?;
        remote.validate()?;
        let mtu_bytes = options.mtu_bytes_max.min(self.endpoint.mtu_bytes).min(remote.mtu_bytes);
        let attributes = abi::QpAttr {
            qp_state: abi::QPS_RTR,
            ah_attr: self.route(remote, options),
            path_mtu: mtu_code(mtu_bytes).unwrap_or(abi::MTU_256),
            dest_qp_num: remote.queue_pair,
            rq_psn: remote.packet_number,
            max_dest_rd_atomic: self.endpoint.reads_answered,
            min_rnr_timer: options.receiver_wait,
            ..abi::QpAttr::default()
        };
        let mask = abi::QP_STATE
            | abi::QP_AV
            | abi::QP_PATH_MTU
            | abi::QP_DEST_QPN
            | abi::QP_RQ_PSN
            | abi::QP_MAX_DEST_RD_ATOMIC
            | abi::QP_MIN_RNR_TIMER;
        self.modify(attributes, mask, "be made ready to receive")?;
        let reads = options.reads_begun_max.min(self.reads_begun_max).min(remote.reads_answered);
        let attributes = abi::QpAttr {
            qp_state: abi::QPS_RTS,
            sq_psn: self.endpoint.packet_number,
            timeout: options.timeout,
            retry_cnt: options.retries,
            rnr_retry: options.receiver_retries,
            max_rd_atomic: reads,
            ..abi::QpAttr::default()
        };
        let mask = abi::QP_STATE
            | abi::QP_SQ_PSN
            | abi::QP_TIMEOUT
            | abi::QP_RETRY_CNT
            | abi::QP_RNR_RETRY
            | abi::QP_MAX_QP_RD_ATOMIC;
        self.modify(attributes, mask, "be made ready to send")
    }

    fn route(&self, remote: &Endpoint, options: &ConnectOptions) -> abi::AhAttr {
        // Within an InfiniBand subnet the LID is enough, and no header for routers is needed.
        let global = self.link_layer != LinkLayer::InfiniBand || remote.lid == 0;
        abi::AhAttr {
            grh: abi::GlobalRoute {
                dgid: abi::Gid(remote.gid),
                flow_label: 0,
                sgid_index: self.origin.gid_index,
                hop_limit: options.hop_limit,
                traffic_class: options.traffic_class,
            },
            dlid: remote.lid,
            sl: options.service_level,
            src_path_bits: 0,
            static_rate: 0,
            is_global: u8::from(global),
            port_num: self.origin.port,
        }
    }

    /// Ends the connection: what was posted is flushed, the peer's requests are not answered any more.
    /// A packet that the device has begun with may still be written: the barrier for that is the end of
    /// the memory region, or of the queue pair.
    ///
    /// # Errors
    /// If the device refuses.
    pub fn invalidate(&self) -> Result<(), Error> {
        let attributes = abi::QpAttr { qp_state: abi::QPS_ERR, ..abi::QpAttr::default() };
        self.modify(attributes, abi::QP_STATE, "be invalidated")
    }

    fn modify(&self, mut attributes: abi::QpAttr, mask: c_int, what: &str) -> Result<(), Error> {
        let modify = self.context().library().ibv_modify_qp;
        // SAFETY: the queue pair is there; the library reads the attributes that the mask names.
        let returned = unsafe { modify(self.raw(), &raw mut attributes, mask) };
        check(returned).map_err(|source| {
            self.context().failed(format!("let queue pair {} {what}", self.number()), source)
        })
    }

    /// Posts all requests of a list, in order, with one doorbell. The list may be emptied and used again
    /// as soon as this returns. What is in memory must stay as it is to be sent until the completion;
    /// that it stays *there* is the promise that its region was made with, so posting is safe.
    ///
    /// # Errors
    /// Says which request was refused; those before it were posted, it and those after it were not.
    pub fn post(&self, list: &mut RequestList) -> Result<(), Error> {
        let (queue_pair, count) = (self.number(), list.len());
        let Depths { send_segments, inline_bytes, .. } = self.granted;
        if let Some((index, what)) = list.refused(send_segments, inline_bytes) {
            return Err(Error::Request { index, count, what });
        }
        let first = list.link();
        if first.is_null() {
            return Ok(());
        }
        let failed = |index, source| Error::Post { queue_pair, index, count, source };
        let unsupported = || failed(0, io::Error::from(io::ErrorKind::Unsupported));
        let post = self.context().ops().post_send.ok_or_else(unsupported)?;
        let mut bad = std::ptr::null_mut();
        // SAFETY: the queue pair is there. The list is linked, ends with null, and is not touched during
        // the call, which copies it and the inline bytes. A segment is of a region, whose memory is
        // there as long as the device accepts its key; the device refuses a key that has ended.
        let returned = unsafe { post(self.raw(), first, &raw mut bad) };
        check(returned).map_err(|source| failed(list.index_of(bad), source))
    }

    /// Posts `count` receives without a segment, for the peer's WRITEs with an immediate value; each
    /// completes with `id`.
    ///
    /// # Errors
    /// Says which was refused; those before it were posted.
    pub fn post_empty_receives(&self, id: u64, count: usize) -> Result<(), Error> {
        let mut done = 0;
        while done < count {
            let batch = (count - done).min(RECEIVE_BATCH);
            let mut requests: [abi::RecvWr; RECEIVE_BATCH] = std::array::from_fn(|_| receive(id));
            let first = requests.as_mut_ptr();
            for index in 1..batch {
                // SAFETY: both are places of the array.
                unsafe { (*first.add(index - 1)).next = first.add(index) };
            }
            // SAFETY: `batch` receives are linked from the first on, and have no segment.
            unsafe { self.post_receives(first, batch) }
                .map_err(|(index, source)| self.not_posted(done + index, count, source))?;
            done += batch;
        }
        Ok(())
    }

    /// Posts one receive, for one SEND of the peer's into `segments`, or one WRITE with an immediate
    /// value.
    ///
    /// # Errors
    /// If the queue is full, or takes no receive with so many segments.
    pub fn post_receive(&self, id: u64, segments: &[Segment]) -> Result<(), Error> {
        let max = self.granted.receive_segments;
        if segments.len() > max as usize {
            let what = format!("{} segments, the limit is {max}", segments.len());
            return Err(Error::Request { index: 0, count: 1, what });
        }
        let mut request = receive(id);
        request.num_sge = c_int::try_from(segments.len()).unwrap_or(c_int::MAX);
        request.sg_list = segments.as_ptr().cast_mut().cast();
        // SAFETY: one receive, with so many segments, which the provider only reads. They are of
        // regions: as in `post`.
        unsafe { self.post_receives(&raw mut request, 1) }
            .map_err(|(index, source)| self.not_posted(index, 1, source))
    }

    fn not_posted(&self, index: usize, count: usize, source: io::Error) -> Error {
        Error::Post { queue_pair: self.number(), index, count, source }
    }

    /// # Safety
    /// `first` is the first of `count` linked receives, whose segments are of regions.
    unsafe fn post_receives(
        &self,
        first: *mut abi::RecvWr,
        count: usize,
    ) -> Result<(), (usize, io::Error)> {
        let unsupported = || (0, io::Error::from(io::ErrorKind::Unsupported));
        let post = self.context().ops().post_recv.ok_or_else(unsupported)?;
        let mut bad = std::ptr::null_mut();
        // SAFETY: the queue pair is there, and the caller's promise is what the provider needs.
        let returned = unsafe { post(self.raw(), first, &raw mut bad) };
        check(returned).map_err(|source| {
            let index = (0..count).find(|index| std::ptr::eq(first.wrapping_add(*index), bad));
            (index.unwrap_or(0), source)
        })
    }
}

fn receive(id: u64) -> abi::RecvWr {
    abi::RecvWr { wr_id: id, next: std::ptr::null_mut(), sg_list: std::ptr::null_mut(), num_sge: 0 }
}

fn create(
    domain: &Arc<ProtectionDomain>,
    sends: &Arc<CompletionQueue>,
    receives: &Arc<CompletionQueue>,
    depths: &Depths,
) -> Result<(NonNull<abi::Qp>, Depths), Error> {
    let context = domain.context();
    let mut attributes = abi::QpInitAttr {
        qp_context: std::ptr::null_mut(),
        send_cq: sends.raw(),
        recv_cq: receives.raw(),
        srq: std::ptr::null_mut(),
        cap: abi::QpCap {
            max_send_wr: depths.sends,
            max_recv_wr: depths.receives,
            max_send_sge: depths.send_segments,
            max_recv_sge: depths.receive_segments,
            max_inline_data: depths.inline_bytes,
        },
        qp_type: abi::QPT_RC,
        sq_sig_all: 0,
    };
    // SAFETY: domain and queues are there and of one device; the library reads the attributes, and
    // writes what it grants into them.
    let raw = unsafe { (context.library().ibv_create_qp)(domain.raw(), &raw mut attributes) };
    let raw = NonNull::new(raw).ok_or_else(|| {
        let what = format!("make a queue pair with {depths:?}");
        context.failed(what, io::Error::last_os_error())
    })?;
    let abi::QpCap { max_send_wr, max_recv_wr, max_send_sge, max_recv_sge, max_inline_data } =
        attributes.cap;
    let granted = Depths {
        sends: max_send_wr,
        receives: max_recv_wr,
        send_segments: max_send_sge,
        receive_segments: max_recv_sge,
        inline_bytes: max_inline_data,
    };
    Ok((raw, granted))
}

/// A random number, from the kernel.
fn random(context: &Context) -> Result<u32, Error> {
    let mut bytes = [0_u8; 4];
    // SAFETY: the kernel writes at most so many bytes.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if usize::try_from(got) != Ok(bytes.len()) {
        return Err(context.failed("get a random number", io::Error::last_os_error()));
    }
    Ok(u32::from_ne_bytes(bytes))
}

impl fmt::Debug for QueuePair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("QueuePair").field(&self.endpoint).finish()
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // SAFETY: the queue pair is there, and all events that were taken are acknowledged.
        let returned = unsafe { (self.context().library().ibv_destroy_qp)(self.raw()) };
        given_back("a queue pair", returned);
    }
}
