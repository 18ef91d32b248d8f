//! Our declarations against those of the header, as the C compiler sees them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use super::*;

const HEADER: &str = "/usr/include/infiniband/verbs.h";
/// Set to anything, it waives what needs the package libibverbs-dev.
pub const WAIVER: &str = "UNDERSTUDY_TEST_WITHOUT_VERBS";

/// A C expression, and what we hold it for.
type Facts = Vec<(String, i64)>;

/// The size of a field.
fn field_size<T, F>(_: fn(&T) -> &F) -> usize {
    size_of::<F>()
}

fn number(value: usize) -> i64 {
    i64::try_from(value).unwrap()
}

/// Offset and size of each field of a structure. A field has the header's name, or says which.
macro_rules! fields {
    ($facts:ident, $name:ident, $c:literal, $($field:ident $(= $path:literal)?),*) => {$(
        #[allow(unused_mut, unused_assignments)]
        let mut path = stringify!($field);
        $(path = $path;)?
        let offset = std::mem::offset_of!($name, $field);
        $facts.push((format!("offsetof(struct {}, {path})", $c), number(offset)));
        let size = field_size(|value: &$name| &value.$field);
        $facts.push((format!("sizeof(((struct {} *)0)->{path})", $c), number(size)));
    )*};
}

/// The same, and the structure's size: for what we make room for.
macro_rules! whole {
    ($facts:ident, $name:ident, $c:literal, $($fields:tt)*) => {
        $facts.push((concat!("sizeof(struct ", $c, ")").to_owned(), number(size_of::<$name>())));
        $facts.push((concat!("_Alignof(struct ", $c, ")").to_owned(), number(align_of::<$name>())));
        fields!($facts, $name, $c, $($fields)*);
    };
}

fn structures() -> Facts {
    let mut facts = vec![
        ("sizeof(union ibv_gid)".to_owned(), number(size_of::<Gid>())),
        ("_Alignof(union ibv_gid)".to_owned(), number(align_of::<Gid>())),
    ];
    whole!(facts, ContextOps, "ibv_context_ops", poll_cq, req_notify_cq, post_send, post_recv);
    fields!(facts, Context, "ibv_context", device, ops, cmd_fd, async_fd, num_comp_vectors);
    fields!(facts, Mr, "ibv_mr", context, pd, addr, length, handle, lkey, rkey);
    fields!(facts, CompChannel, "ibv_comp_channel", context, fd, refcnt);
    fields!(facts, Qp, "ibv_qp", context, qp_context, pd, send_cq, recv_cq, srq, handle, qp_num);
    whole!(
        facts,
        DeviceAttr,
        "ibv_device_attr",
        fw_ver,
        node_guid,
        sys_image_guid,
        max_mr_size,
        page_size_cap,
        vendor_id,
        vendor_part_id,
        hw_ver,
        max_qp,
        max_qp_wr,
        device_cap_flags,
        max_sge,
        max_sge_rd,
        max_cq,
        max_cqe,
        max_mr,
        max_pd,
        max_qp_rd_atom,
        max_ee_rd_atom,
        max_res_rd_atom,
        max_qp_init_rd_atom,
        max_pkeys,
        local_ca_ack_delay,
        phys_port_cnt
    );
    whole!(
        facts,
        PortAttr,
        "ibv_port_attr",
        state,
        max_mtu,
        active_mtu,
        gid_tbl_len,
        port_cap_flags,
        max_msg_sz,
        bad_pkey_cntr,
        qkey_viol_cntr,
        pkey_tbl_len,
        lid,
        sm_lid,
        lmc,
        max_vl_num,
        sm_sl,
        subnet_timeout,
        init_type_reply,
        active_width,
        active_speed,
        phys_state,
        link_layer,
        flags,
        port_cap_flags2
    );
    whole!(
        facts,
        QpCap,
        "ibv_qp_cap",
        max_send_wr,
        max_recv_wr,
        max_send_sge,
        max_recv_sge,
        max_inline_data
    );
    whole!(
        facts,
        QpInitAttr,
        "ibv_qp_init_attr",
        qp_context,
        send_cq,
        recv_cq,
        srq,
        cap,
        qp_type,
        sq_sig_all
    );
    whole!(
        facts,
        GlobalRoute,
        "ibv_global_route",
        dgid,
        flow_label,
        sgid_index,
        hop_limit,
        traffic_class
    );
    whole!(
        facts,
        AhAttr,
        "ibv_ah_attr",
        grh,
        dlid,
        sl,
        src_path_bits,
        static_rate,
        is_global,
        port_num
    );
    whole!(
        facts,
        QpAttr,
        "ibv_qp_attr",
        qp_state,
        cur_qp_state,
        path_mtu,
        path_mig_state,
        qkey,
        rq_psn,
        sq_psn,
        dest_qp_num,
        qp_access_flags,
        cap,
        ah_attr,
        alt_ah_attr,
        pkey_index,
        alt_pkey_index,
        en_sqd_async_notify,
        sq_draining,
        max_rd_atomic,
        max_dest_rd_atomic,
        min_rnr_timer,
        port_num,
        timeout,
        retry_cnt,
        rnr_retry,
        alt_port_num,
        alt_timeout,
        rate_limit
    );
    whole!(facts, Sge, "ibv_sge", addr, length, lkey);
    whole!(
        facts,
        SendWr,
        "ibv_send_wr",
        wr_id,
        next,
        sg_list,
        num_sge,
        opcode,
        send_flags,
        imm_data,
        remote_addr = "wr.rdma.remote_addr",
        rkey = "wr.rdma.rkey"
    );
    whole!(facts, RecvWr, "ibv_recv_wr", wr_id, next, sg_list, num_sge);
    whole!(
        facts,
        Wc,
        "ibv_wc",
        wr_id,
        status,
        opcode,
        vendor_err,
        byte_len,
        imm_data,
        qp_num,
        src_qp,
        wc_flags,
        pkey_index,
        slid,
        sl,
        dlid_path_bits
    );
    whole!(facts, AsyncEvent, "ibv_async_event", element, event_type);
    facts
}

/// Runs a C program that prints each expression's value.
fn in_c(facts: &Facts) -> BTreeMap<String, i64> {
    let folder = tempfile::tempdir().unwrap();
    let mut source = String::from("#include <stdio.h>\n#include <infiniband/verbs.h>\n");
    source.push_str("int main(void) {\n");
    for (expression, _) in facts {
        writeln!(source, "printf(\"%s\\t%lld\\n\", \"{expression}\", (long long)({expression}));")
            .unwrap();
    }
    source.push_str("return 0; }\n");
    let (file, program) = (folder.path().join("layout.c"), folder.path().join("layout"));
    std::fs::write(&file, source).unwrap();
    let compiled = Command::new("cc").arg("-o").arg(&program).arg(&file).output();
    let compiled = compiled.expect("a C compiler, cc");
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let printed = Command::new(&program).output().unwrap();
    assert!(printed.status.success());
    let text = String::from_utf8(printed.stdout).unwrap();
    let lines = text.lines().map(|line| line.split_once('\t').unwrap());
    lines.map(|(expression, value)| (expression.to_owned(), value.parse().unwrap())).collect()
}

/// Whether what libibverbs-dev has is waived; if it is neither there nor waived, the test fails.
pub fn waived() -> bool {
    if std::env::var_os(WAIVER).is_some() {
        eprintln!("NOT TESTED: {WAIVER} is set");
        return true;
    }
    assert!(
        Path::new(HEADER).exists(),
        "There is no {HEADER}: install the package libibverbs-dev, or set {WAIVER} to leave this out"
    );
    false
}

#[test]
fn declarations_are_those_of_the_header() {
    if waived() {
        return;
    }
    let mut facts = structures();
    let named = all_constants!(constant_names).into_iter().chain(all_bits!(constant_names));
    facts.extend(named.map(|(name, value)| (name.to_owned(), value)));
    assert!(facts.len() > 250, "{} facts only", facts.len());
    let theirs = in_c(&facts);
    let wrong: Vec<String> = facts
        .iter()
        .filter(|(expression, ours)| theirs[expression] != *ours)
        .map(|(expression, ours)| format!("{expression}: {}, ours {ours}", theirs[expression]))
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}
