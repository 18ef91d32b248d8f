# The crate rdma over Soft-RoCE: what is written arrives, what is refused does not, and what is missing is said.

VERBS_LIMIT_S=${VERBS_LIMIT_S:-240} # seconds for all checks over one address
CHECK=/h/bin/verbs_check

. /h/l1/rxe.sh

# all_checks ADDRESS
all_checks() {
    rxe
    local status=0
    "$CHECK" "$1" >"$CASE/check.out" 2>"$CASE/check.err" || status=$?
    cat "$CASE/check.out"
    [ "$status" -eq 0 ] ||
        fail "status $status: $(grep '^FAIL' "$CASE/check.out") $(tail -n 3 "$CASE/check.err")"
    detail "$(grep -c '^PASS' "$CASE/check.out") checks; $(head -n 1 "$CASE/check.out")"
}

port_goes_down() {
    rxe
    start check "$CHECK" 10.77.0.1 port-event
    wait_for 30 "the check to wait" grep -q READY "$CASE/check.out"
    /sbin/ip link set verbs0 down
    expect_status check 0 40
    detail "$(grep '^Port' "$CASE/check.out" | tail -n 1)"
}

memory_is_limited() {
    rxe
    (ulimit -l 64 && exec "$CHECK" 10.77.0.1 locked-memory) >"$CASE/check.out" 2>&1 ||
        fail "$(tail -n 3 "$CASE/check.out")"
    detail "$(grep '^[0-9]* bytes' "$CASE/check.out")"
}

devices_are_listed() {
    rxe
    "$REMOTE" rdma-devices >"$CASE/devices.out" 2>&1 || fail "status $?: $(cat "$CASE/devices.out")"
    cat "$CASE/devices.out"
    for line in "^rxe_verbs$" "^  port 1: Ethernet, Active, MTU 4096$" \
        "^10.77.0.1 (verbs0): device rxe_verbs, port 1, GID [0-9]* (RoCE v2)$" \
        "^fd77::1 (verbs0): device rxe_verbs, port 1, GID [0-9]* (RoCE v2)$"; do
        grep -q "$line" "$CASE/devices.out" || fail "there is no $line in $(cat "$CASE/devices.out")"
    done
    /sbin/ip link set verbs0 down
    "$REMOTE" rdma-devices >"$CASE/down.out" 2>&1 && fail "a port that is down: $(cat "$CASE/down.out")"
    grep -q "^  caused by: No port that can be used" "$CASE/down.out" || fail "$(cat "$CASE/down.out")"
    detail "$(grep ^10.77 "$CASE/devices.out")"
}

check() { "$CHECK" 10.77.0.1 >"$CASE/check.out" 2>&1; }

# says WORDS: setting up failed, and that is what it said.
says() {
    grep -q "^FAIL setup: .*$1" "$CASE/check.out" || fail "it said: $(cat "$CASE/check.out")"
    detail "$(cut -c 13- "$CASE/check.out")"
}

no_device() {
    rdma link delete rxe_verbs 2>/dev/null
    check
    says "no RDMA device at all"
    "$REMOTE" rdma-devices >"$CASE/devices.out" 2>&1 && fail "status 0 without a device"
    grep -q "^  caused by: There is no RDMA device" "$CASE/devices.out" ||
        fail "$(cat "$CASE/devices.out")"
}

no_provider() {
    rxe
    mount -t tmpfs hidden /h/lib/libibverbs || fail "cannot hide the provider"
    check
    umount /h/lib/libibverbs
    says "no provider: install ibverbs-providers"
}

no_library() {
    mount --bind /dev/null /h/lib/libibverbs.so.1 || fail "cannot hide the library"
    check
    "$REMOTE" rdma-devices >"$CASE/devices.out" 2>&1
    local status=$?
    umount /h/lib/libibverbs.so.1
    [ "$status" -eq 1 ] || fail "ch-remote: status $status, $(cat "$CASE/devices.out")"
    says "install the packages libibverbs1 and ibverbs-providers"
}

run_case ipv4 "$VERBS_LIMIT_S" all_checks 10.77.0.1
run_case ipv6 "$VERBS_LIMIT_S" all_checks fd77::1
run_case devices 60 devices_are_listed
run_case port-event 90 port_goes_down
run_case locked-memory 60 memory_is_limited
run_case no-device 60 no_device
run_case no-provider 60 no_provider
run_case no-library 60 no_library
