# The bed itself: L1 is up, KVM and Soft-RoCE work, our VMM starts.

kvm_is_there() {
    [ -d /sys/module/kvm_amd ] || fail "kvm_amd is not loaded"
    [ -c /dev/kvm ] || fail "there is no /dev/kvm"
    [ "$(cat /sys/module/kvm_amd/parameters/npt)" = Y ] || fail "nested paging is off"
    detail "kernel $(uname -r), nested paging"
}

rdma_link_is_up() {
    /sbin/ip link add veth0 type veth peer name veth1 || fail "cannot make a veth pair"
    /sbin/ip addr add 10.77.0.1/24 dev veth0
    for link in veth0 veth1; do
        /sbin/ip link set "$link" mtu 4200 up || fail "cannot set $link up"
    done
    rdma link add rxe0 type rxe netdev veth0 || fail "cannot add the rxe link"
    wait_for 20 "rxe0 to be active" sh -c "rdma link show rxe0/1 | grep -q 'state ACTIVE'"
    rdma link show >&2
    [ -c /dev/infiniband/uverbs0 ] || fail "there is no uverbs device"
    detail "$(rdma link show rxe0/1 | tr -s ' ' | cut -c 1-60)"
    rdma link delete rxe0
    /sbin/ip link del veth0
}

vmm_says_its_version() {
    version=$("$VMM" --version) || fail "the VMM does not start: status $?"
    case $version in
        "cloud-hypervisor v"[4-9][0-9].*) detail "$version" ;;
        *) fail "an unexpected version line: $version" ;;
    esac
    "$REMOTE" --help >/dev/null || fail "ch-remote does not start: status $?"
}

run_case kvm 30 kvm_is_there
run_case rdma-link 60 rdma_link_is_up
run_case version 60 vmm_says_its_version
