# A replicated Debian guest goes on counting when its primary is killed, its epochs sent by RDMA over Soft-RoCE.
# Settings: those of the suite linux, with fewer rounds by default, and
RDMA_KILLS=${RDMA_KILLS:-3}       # rounds of the test guest, which verifies its own memory
RDMA_EPOCHS=${RDMA_EPOCHS:-20}    # epochs that are compared page by page, for each cow mode
LINUX_ROUNDS=${RDMA_ROUNDS:-2}
LINUX_VCPUS=${RDMA_VCPUS-1 4}
LINUX_URL=rdma:10.77.0.1:7000
# One device for both VMMs: rxe does not connect across network namespaces.
. /h/l1/rxe.sh

by_rdma() {
    rxe
    survives "$1"
    # It went by RDMA, not by something that stands in for it.
    for name in a b; do
        grep -qa "by RDMA: device rxe_verbs" "$CASE/$name.err" || fail "$name did not use RDMA"
    done
    detail "$(cat "$CASE/detail"), $(cat /sys/class/infiniband/rxe_verbs/ports/1/hw_counters/sent_pkts) packets"
}

# One side says that the VM is its own.
alone() { in_state a Degraded || in_state b TakenOver; }

# device_fails COMMAND...: the guest goes on, on one side.
device_fails() {
    rxe
    pair 2
    wait_state a Protected 300
    wait_serial a "^L2 READY cpus 2 " "$L2_READY_S"
    wait_serial a "^count " 120
    usleep $(($(random 500 3000) * 1000))
    "$@" || fail "cannot: $*"
    local end=$(($(seconds) + 40))
    while ! alone && [ "$(seconds)" -lt "$end" ]; do sleep 0.5; done
    if ! alone && in_state a Protected && in_state b Protected; then
        # The kernel keeps a device until nobody has it open.
        detail "it is kept while it is in use, and the VM protected"
        return
    fi
    wait_for 60 "one side to own the VM alone" alone
    if in_state b TakenOver; then
        wait_serial b "^L2 END" $((LINUX_COUNTS + 120))
        expect_status b 0 60
        local verdict
        verdict=$(judge) || fail "$verdict"
        detail "the backup goes on, $verdict"
        return
    fi
    wait_serial a "^L2 END" $((LINUX_COUNTS + 120))
    expect_status a 0 60
    no_complaints a
    ! serial_has b "^count" || fail "both sides counted"
    local counts
    counts=$(grep -a "^count" "$CASE/a.serial" | awk '{ if ($2 != NR) exit 1 } END { print NR }') ||
        fail "the primary's counts are not whole"
    [ "$counts" -eq "$LINUX_COUNTS" ] || fail "$counts counts of $LINUX_COUNTS"
    detail "the primary goes on: $(grep -a "suspect\|alone\|lost" "$CASE/a.err" | tail -n 1 | cut -c 1-200)"
}

link_goes_down() {
    /sbin/ip link set verbs0 down
}

# A primary that stands still for longer than the timeout, and wakes up when the VM is the backup's.
wakes_up() {
    rxe
    pair 2
    wait_state a Protected 300
    wait_serial a "^count " 120
    usleep $(($(random 500 3000) * 1000))
    kill -STOP "$(pid_of a)"
    wait_state_or_end b TakenOver 120
    wait_serial b "^count [0-9]* up" 120
    local before
    before=$(wc -c <"$CASE/a.serial")
    kill -CONT "$(pid_of a)"
    wait_serial b "^L2 END" $((LINUX_COUNTS + 120))
    expect_status b 0 60
    [ "$(wc -c <"$CASE/a.serial")" -eq "$before" ] || fail "the primary said more after it woke up"
    no_complaints b
    local verdict
    verdict=$(judge) || fail "$verdict"
    detail "$verdict"
}

PAIR_MORE="-v" PAIR_MORE_BACKUP="-v"
LINUX_SURVIVES=by_rdma
. /h/suites/linux.sh

# The test guest, and programs that judge what becomes of it.
export UNDERSTUDY_TEST_GUEST=/h/understudy-guest

kill_rounds() {
    rxe
    /h/bin/kill-rounds --rounds "$RDMA_KILLS" --vcpus 2 --memory 64M --epoch-ms 100 \
        --transport rdma:10.77.0.1 >"$CASE/kill.out" 2>&1 || fail "$(tail -n 5 "$CASE/kill.out")"
    detail "$(tail -n 1 "$CASE/kill.out")"
}

equality() { # COW
    rxe
    /h/bin/check-equality --cow "$1" --epochs "$RDMA_EPOCHS" --vcpus 2 --memory 64M --epoch-ms 100 \
        --transport rdma:10.77.0.1 >"$CASE/equality.out" 2>&1 || fail "$(tail -n 5 "$CASE/equality.out")"
    detail "$(grep compared "$CASE/equality.out" | tail -n 1)"
}

run_case kill-rounds 600 kill_rounds
for cow in off copy protect hybrid; do
    run_case "equality-$cow" 600 equality "$cow"
done
# The command waits until nobody has the device open.
delete_link() {
    rdma link delete rxe_verbs &
}

run_case link-deleted "$limit" device_fails delete_link
run_case link-down "$limit" device_fails link_goes_down
run_case primary-wakes-up "$limit" wakes_up
