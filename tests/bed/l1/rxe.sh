# Soft-RoCE, for suites that need RDMA. Sourced after lib.sh.

# A device on one end of a veth pair, with an address of either kind.
rxe() {
    rdma link delete rxe_verbs 2>/dev/null
    /sbin/ip link del verbs0 2>/dev/null
    /sbin/ip link add verbs0 type veth peer name verbs1 || fail "cannot make a veth pair"
    /sbin/ip addr add 10.77.0.1/24 dev verbs0
    /sbin/ip addr add fd77::1/64 dev verbs0 nodad
    for link in verbs0 verbs1; do
        /sbin/ip link set "$link" mtu 4200 up || fail "cannot set $link up"
    done
    rdma link add rxe_verbs type rxe netdev verbs0 || fail "cannot add the rxe link"
    wait_for 20 "rxe_verbs to be active" sh -c "rdma link show rxe_verbs/1 | grep -q 'state ACTIVE'"
}
