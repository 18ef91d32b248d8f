//! The binary interface of libibverbs, as far as it is used here: `infiniband/verbs.h`, symbol versions
//! IBVERBS_1.0 and IBVERBS_1.1, which have been the same since 2008.
//!
//! `tests` compares each offset, size and constant with what the C compiler says of the header.

// Unions of the header are flattened to the member that is used; what follows is padding.

use std::ffi::{c_char, c_int, c_void};

/// A structure that is only pointed to.
macro_rules! opaque {
    ($($name:ident),*) => {$(
        #[repr(C)]
        pub struct $name {
            _private: [u8; 0],
        }
    )*};
}
opaque!(Device, Pd, Cq, Srq);

pub const GID_BYTES: usize = 16;
/// `union ibv_gid`, which is aligned as its second member, two words, is.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default)]
pub struct Gid(pub [u8; GID_BYTES]);

/// `struct ibv_context_ops`: 32 pointers, of which four are used.
#[repr(C)]
pub struct ContextOps {
    _query_to_create_cq: [*mut c_void; 11],
    pub poll_cq: Option<unsafe extern "C" fn(*mut Cq, c_int, *mut Wc) -> c_int>,
    pub req_notify_cq: Option<unsafe extern "C" fn(*mut Cq, c_int) -> c_int>,
    _cq_event_to_destroy_qp: [*mut c_void; 12],
    pub post_send: Option<unsafe extern "C" fn(*mut Qp, *mut SendWr, *mut *mut SendWr) -> c_int>,
    pub post_recv: Option<unsafe extern "C" fn(*mut Qp, *mut RecvWr, *mut *mut RecvWr) -> c_int>,
    _create_ah_to_async_event: [*mut c_void; 5],
}

/// `struct ibv_context`, up to what is used.
#[repr(C)]
pub struct Context {
    pub device: *mut Device,
    pub ops: ContextOps,
    pub cmd_fd: c_int,
    pub async_fd: c_int,
    pub num_comp_vectors: c_int,
}

/// `struct ibv_device_attr`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct DeviceAttr {
    pub fw_ver: [c_char; 64],
    pub node_guid: u64,
    pub sys_image_guid: u64,
    pub max_mr_size: u64,
    pub page_size_cap: u64,
    pub vendor_id: u32,
    pub vendor_part_id: u32,
    pub hw_ver: u32,
    pub max_qp: c_int,
    pub max_qp_wr: c_int,
    pub device_cap_flags: u32,
    pub max_sge: c_int,
    pub max_sge_rd: c_int,
    pub max_cq: c_int,
    pub max_cqe: c_int,
    pub max_mr: c_int,
    pub max_pd: c_int,
    pub max_qp_rd_atom: c_int,
    pub max_ee_rd_atom: c_int,
    pub max_res_rd_atom: c_int,
    pub max_qp_init_rd_atom: c_int,
    _max_ee_init_rd_atom_to_max_srq_sge: [c_int; 16],
    pub max_pkeys: u16,
    pub local_ca_ack_delay: u8,
    pub phys_port_cnt: u8,
}

/// `struct ibv_port_attr`; the exported function leaves what follows `link_layer` as it is.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct PortAttr {
    pub state: c_int,
    pub max_mtu: c_int,
    pub active_mtu: c_int,
    pub gid_tbl_len: c_int,
    pub port_cap_flags: u32,
    pub max_msg_sz: u32,
    pub bad_pkey_cntr: u32,
    pub qkey_viol_cntr: u32,
    pub pkey_tbl_len: u16,
    pub lid: u16,
    pub sm_lid: u16,
    pub lmc: u8,
    pub max_vl_num: u8,
    pub sm_sl: u8,
    pub subnet_timeout: u8,
    pub init_type_reply: u8,
    pub active_width: u8,
    pub active_speed: u8,
    pub phys_state: u8,
    pub link_layer: u8,
    pub flags: u8,
    pub port_cap_flags2: u16,
}

/// `struct ibv_mr`.
#[repr(C)]
pub struct Mr {
    pub context: *mut Context,
    pub pd: *mut Pd,
    pub addr: *mut c_void,
    pub length: usize,
    pub handle: u32,
    pub lkey: u32,
    pub rkey: u32,
}

/// `struct ibv_comp_channel`.
#[repr(C)]
pub struct CompChannel {
    pub context: *mut Context,
    pub fd: c_int,
    pub refcnt: c_int,
}

/// `struct ibv_qp`, up to what is used.
#[repr(C)]
pub struct Qp {
    pub context: *mut Context,
    pub qp_context: *mut c_void,
    pub pd: *mut Pd,
    pub send_cq: *mut Cq,
    pub recv_cq: *mut Cq,
    pub srq: *mut Srq,
    pub handle: u32,
    pub qp_num: u32,
}

/// `struct ibv_qp_cap`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct QpCap {
    pub max_send_wr: u32,
    pub max_recv_wr: u32,
    pub max_send_sge: u32,
    pub max_recv_sge: u32,
    pub max_inline_data: u32,
}

/// `struct ibv_qp_init_attr`.
#[repr(C)]
pub struct QpInitAttr {
    pub qp_context: *mut c_void,
    pub send_cq: *mut Cq,
    pub recv_cq: *mut Cq,
    pub srq: *mut Srq,
    pub cap: QpCap,
    pub qp_type: c_int,
    pub sq_sig_all: c_int,
}

/// `struct ibv_global_route`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct GlobalRoute {
    pub dgid: Gid,
    pub flow_label: u32,
    pub sgid_index: u8,
    pub hop_limit: u8,
    pub traffic_class: u8,
}

/// `struct ibv_ah_attr`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct AhAttr {
    pub grh: GlobalRoute,
    pub dlid: u16,
    pub sl: u8,
    pub src_path_bits: u8,
    pub static_rate: u8,
    pub is_global: u8,
    pub port_num: u8,
}

/// `struct ibv_qp_attr`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct QpAttr {
    pub qp_state: c_int,
    pub cur_qp_state: c_int,
    pub path_mtu: c_int,
    pub path_mig_state: c_int,
    pub qkey: u32,
    pub rq_psn: u32,
    pub sq_psn: u32,
    pub dest_qp_num: u32,
    pub qp_access_flags: u32,
    pub cap: QpCap,
    pub ah_attr: AhAttr,
    pub alt_ah_attr: AhAttr,
    pub pkey_index: u16,
    pub alt_pkey_index: u16,
    pub en_sqd_async_notify: u8,
    pub sq_draining: u8,
    pub max_rd_atomic: u8,
    pub max_dest_rd_atomic: u8,
    pub min_rnr_timer: u8,
    pub port_num: u8,
    pub timeout: u8,
    pub retry_cnt: u8,
    pub rnr_retry: u8,
    pub alt_port_num: u8,
    pub alt_timeout: u8,
    pub rate_limit: u32,
}

/// `struct ibv_sge`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Sge {
    pub addr: u64,
    pub length: u32,
    pub lkey: u32,
}

/// `struct ibv_send_wr`, its union `wr` as `rdma`.
#[repr(C)]
#[derive(Debug)]
pub struct SendWr {
    pub wr_id: u64,
    pub next: *mut SendWr,
    pub sg_list: *mut Sge,
    pub num_sge: c_int,
    pub opcode: c_int,
    pub send_flags: u32,
    /// In network byte order.
    pub imm_data: u32,
    pub remote_addr: u64,
    pub rkey: u32,
    pub _unused: [u64; 9],
}

/// `struct ibv_recv_wr`.
#[repr(C)]
pub struct RecvWr {
    pub wr_id: u64,
    pub next: *mut RecvWr,
    pub sg_list: *mut Sge,
    pub num_sge: c_int,
}

/// `struct ibv_wc`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Wc {
    pub wr_id: u64,
    pub status: c_int,
    pub opcode: c_int,
    pub vendor_err: u32,
    pub byte_len: u32,
    /// In network byte order.
    pub imm_data: u32,
    pub qp_num: u32,
    pub src_qp: u32,
    pub wc_flags: u32,
    pub pkey_index: u16,
    pub slid: u16,
    pub sl: u8,
    pub dlid_path_bits: u8,
}

/// `struct ibv_async_event`; `element` is a pointer, or in its first bytes a port's number.
#[repr(C)]
pub struct AsyncEvent {
    pub element: *mut c_void,
    pub event_type: c_int,
}

/// Constants with their names in the header, which the test looks up.
macro_rules! constants {
    ($kind:ty: $($name:ident = $value:expr, $c:literal;)*) => {
        $(pub const $name: $kind = $value;)*
    };
}
#[cfg(test)]
macro_rules! constant_names {
    ($kind:ty: $($name:ident = $value:expr, $c:literal;)*) => {
        [$(($c, i64::from($name))),*]
    };
}
/// All of them, given to one of the macros above.
macro_rules! all_constants {
    ($use:ident) => {
        $use! { i32:
            PORT_DOWN = 1, "IBV_PORT_DOWN";
            PORT_INIT = 2, "IBV_PORT_INIT";
            PORT_ARMED = 3, "IBV_PORT_ARMED";
            PORT_ACTIVE = 4, "IBV_PORT_ACTIVE";
            MTU_256 = 1, "IBV_MTU_256";
            MTU_4096 = 5, "IBV_MTU_4096";
            LINK_LAYER_INFINIBAND = 1, "IBV_LINK_LAYER_INFINIBAND";
            LINK_LAYER_ETHERNET = 2, "IBV_LINK_LAYER_ETHERNET";
            EVENT_CQ_ERR = 0, "IBV_EVENT_CQ_ERR";
            EVENT_QP_FATAL = 1, "IBV_EVENT_QP_FATAL";
            EVENT_QP_REQ_ERR = 2, "IBV_EVENT_QP_REQ_ERR";
            EVENT_QP_ACCESS_ERR = 3, "IBV_EVENT_QP_ACCESS_ERR";
            EVENT_COMM_EST = 4, "IBV_EVENT_COMM_EST";
            EVENT_SQ_DRAINED = 5, "IBV_EVENT_SQ_DRAINED";
            EVENT_PATH_MIG = 6, "IBV_EVENT_PATH_MIG";
            EVENT_PATH_MIG_ERR = 7, "IBV_EVENT_PATH_MIG_ERR";
            EVENT_DEVICE_FATAL = 8, "IBV_EVENT_DEVICE_FATAL";
            EVENT_PORT_ACTIVE = 9, "IBV_EVENT_PORT_ACTIVE";
            EVENT_PORT_ERR = 10, "IBV_EVENT_PORT_ERR";
            EVENT_LID_CHANGE = 11, "IBV_EVENT_LID_CHANGE";
            EVENT_PKEY_CHANGE = 12, "IBV_EVENT_PKEY_CHANGE";
            EVENT_SM_CHANGE = 13, "IBV_EVENT_SM_CHANGE";
            EVENT_QP_LAST_WQE_REACHED = 16, "IBV_EVENT_QP_LAST_WQE_REACHED";
            EVENT_CLIENT_REREGISTER = 17, "IBV_EVENT_CLIENT_REREGISTER";
            EVENT_GID_CHANGE = 18, "IBV_EVENT_GID_CHANGE";
            WC_SUCCESS = 0, "IBV_WC_SUCCESS";
            WC_LOC_LEN_ERR = 1, "IBV_WC_LOC_LEN_ERR";
            WC_LOC_PROT_ERR = 4, "IBV_WC_LOC_PROT_ERR";
            WC_WR_FLUSH_ERR = 5, "IBV_WC_WR_FLUSH_ERR";
            WC_REM_INV_REQ_ERR = 9, "IBV_WC_REM_INV_REQ_ERR";
            WC_REM_ACCESS_ERR = 10, "IBV_WC_REM_ACCESS_ERR";
            WC_REM_OP_ERR = 11, "IBV_WC_REM_OP_ERR";
            WC_RETRY_EXC_ERR = 12, "IBV_WC_RETRY_EXC_ERR";
            WC_RNR_RETRY_EXC_ERR = 13, "IBV_WC_RNR_RETRY_EXC_ERR";
            WC_SEND = 0, "IBV_WC_SEND";
            WC_RDMA_WRITE = 1, "IBV_WC_RDMA_WRITE";
            WC_RDMA_READ = 2, "IBV_WC_RDMA_READ";
            WC_RECV = 128, "IBV_WC_RECV";
            WC_RECV_RDMA_WITH_IMM = 129, "IBV_WC_RECV_RDMA_WITH_IMM";
            QPT_RC = 2, "IBV_QPT_RC";
            QPS_INIT = 1, "IBV_QPS_INIT";
            QPS_RTR = 2, "IBV_QPS_RTR";
            QPS_RTS = 3, "IBV_QPS_RTS";
            QPS_ERR = 6, "IBV_QPS_ERR";
            QP_STATE = 1, "IBV_QP_STATE";
            QP_ACCESS_FLAGS = 1 << 3, "IBV_QP_ACCESS_FLAGS";
            QP_PKEY_INDEX = 1 << 4, "IBV_QP_PKEY_INDEX";
            QP_PORT = 1 << 5, "IBV_QP_PORT";
            QP_AV = 1 << 7, "IBV_QP_AV";
            QP_PATH_MTU = 1 << 8, "IBV_QP_PATH_MTU";
            QP_TIMEOUT = 1 << 9, "IBV_QP_TIMEOUT";
            QP_RETRY_CNT = 1 << 10, "IBV_QP_RETRY_CNT";
            QP_RNR_RETRY = 1 << 11, "IBV_QP_RNR_RETRY";
            QP_RQ_PSN = 1 << 12, "IBV_QP_RQ_PSN";
            QP_MAX_QP_RD_ATOMIC = 1 << 13, "IBV_QP_MAX_QP_RD_ATOMIC";
            QP_MIN_RNR_TIMER = 1 << 15, "IBV_QP_MIN_RNR_TIMER";
            QP_SQ_PSN = 1 << 16, "IBV_QP_SQ_PSN";
            QP_MAX_DEST_RD_ATOMIC = 1 << 17, "IBV_QP_MAX_DEST_RD_ATOMIC";
            QP_DEST_QPN = 1 << 20, "IBV_QP_DEST_QPN";
            WR_RDMA_WRITE = 0, "IBV_WR_RDMA_WRITE";
            WR_RDMA_WRITE_WITH_IMM = 1, "IBV_WR_RDMA_WRITE_WITH_IMM";
            WR_SEND = 2, "IBV_WR_SEND";
            WR_RDMA_READ = 4, "IBV_WR_RDMA_READ";
        }
    };
}
all_constants!(constants);

/// Bits, which are unsigned in the structures.
macro_rules! all_bits {
    ($use:ident) => {
        $use! { u32:
            WC_WITH_IMM = 1 << 1, "IBV_WC_WITH_IMM";
            ACCESS_LOCAL_WRITE = 1, "IBV_ACCESS_LOCAL_WRITE";
            ACCESS_REMOTE_WRITE = 1 << 1, "IBV_ACCESS_REMOTE_WRITE";
            ACCESS_REMOTE_READ = 1 << 2, "IBV_ACCESS_REMOTE_READ";
            SEND_FENCE = 1, "IBV_SEND_FENCE";
            SEND_SIGNALED = 1 << 1, "IBV_SEND_SIGNALED";
            SEND_INLINE = 1 << 3, "IBV_SEND_INLINE";
        }
    };
}
all_bits!(constants);

#[cfg(test)]
pub mod tests;
