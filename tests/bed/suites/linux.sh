# A replicated Debian guest goes on counting when its primary is killed.
# Settings (nested.sh --set NAME=VALUE), with their defaults:
LINUX_ROUNDS=${LINUX_ROUNDS:-5}       # rounds with 2 vCPUs
LINUX_VCPUS=${LINUX_VCPUS-1 4}        # and one round with each of these
LINUX_COUNTS=${LINUX_COUNTS:-120}     # counts until the guest shows its log and powers off
LINUX_PAUSE=${LINUX_PAUSE:-0.1}       # seconds between two counts
LINUX_EPOCH_MS=${LINUX_EPOCH_MS:-100}
LINUX_TIMEOUT_MS=${LINUX_TIMEOUT_MS:-3000}
LINUX_JUMP_S=${LINUX_JUMP_S:-60}      # seconds that the guest's clock may jump at the take-over
PORT=7000
LINUX_URL=${LINUX_URL:-tcp:127.0.0.1:$PORT}

listens() { grep -qi "^ *[0-9]*: [0-9A-F]*:$(printf %04x "$1") 0*:0000 0A" /proc/net/tcp; }

pair() { # VCPUS
    mkdir "$CASE/arbiter"
    replicate="destination_url=$LINUX_URL,arbiter=file:$CASE/arbiter,$(
        )epoch_ms=$LINUX_EPOCH_MS,timeout_ms=$LINUX_TIMEOUT_MS${PAIR_OPTIONS:-}"
    backup
    primary "$1"
}

backup() {
    start b ${PAIR_RUN_BACKUP:-} "$VMM" --api-socket "path=$CASE/b.sock" \
        --receive-replica "receiver_url=${LINUX_URL_BACKUP:-$LINUX_URL},arbiter=file:$CASE/arbiter$(
        )${PAIR_OPTIONS_BACKUP:-}" \
        --serial "file=$CASE/b.serial" --console off ${PAIR_MORE_BACKUP:-}
    wait_for 60 "the backup to listen on port $PORT" listens "$PORT"
}

primary() { # VCPUS
    start a ${PAIR_RUN:-} "$VMM" --api-socket "path=$CASE/a.sock" --kernel /bed/l2/vmlinux \
        --initramfs "${PAIR_INITRAMFS:-/bed/l2/l2.img}" \
        --cmdline "$L2_CMDLINE bed.count=$LINUX_COUNTS bed.pause=$LINUX_PAUSE" \
        --cpus "boot=$1" --memory size=256M --serial "file=$CASE/a.serial" --console off \
        ${PAIR_MORE:-} \
        --replicate "$replicate"
}

survives() { # VCPUS
    pair "$1"
    wait_state a Protected 300
    wait_serial a "^L2 READY cpus $1 " "$L2_READY_S"
    wait_serial a "^count " 120
    ${LINUX_READY:-true}
    local pause_ms
    pause_ms=$(random 500 6000)
    usleep $((pause_ms * 1000))
    still_up b
    ended a && fail "the guest ended before the kill: raise LINUX_COUNTS"
    # One who is not has no backup that could go on.
    in_state a Protected || fail "the primary is $(replication a state) before the kill: $(replication a last_error)"
    local committed
    committed=$(replication a epoch_committed)
    [ "${committed:-0}" -gt 0 ] || fail "nothing was committed before the kill"
    kill -KILL "$(pid_of a)"
    local killed
    killed=$(seconds)
    wait_for 10 "the primary to be gone" ended a
    wait_state_or_end b TakenOver 120
    wait_serial b "^count [0-9]* up" 120
    local back=$(($(seconds) - killed))
    wait_serial b "^L2 END" $((LINUX_COUNTS + 120))
    expect_status b 0 60
    local verdict
    for verdict in a b; do
        never_reset "$verdict"
    done
    no_complaints b
    verdict=$(complaints a)
    [ -z "$verdict" ] || fail "a's guest complains: $verdict"
    verdict=$(judge) || fail "$verdict"
    detail "epoch $committed, killed ${pause_ms} ms into protection, back after $back s, $verdict"
}

# never_reset NAME: no vCPU of NAME's guest had a triple fault, after which the guest boots again.
never_reset() {
    local found
    found=$(grep -a "triple fault" "$CASE/$1.err" | tail -n 1)
    [ -z "$found" ] || fail "$1: $found"
}

# The guest may power off before anybody asked for the state.
wait_state_or_end() {
    serial_has "$1" "^L2 END" || wait_state "$@"
}

# judge: reads both serial files, prints the verdict; status 1 when they are not one stream in which
# the backup repeats at most the primary's end, the counter is whole and the clocks are right.
judge() {
    local name
    for name in a b; do
        # What is no text stays visible, as what it is not.
        tr '\000\001\200-\377' '?' <"$CASE/$name.serial" >"$CASE/$name.text"
    done
    awk -v FIRST="$CASE/a.text" -v SECOND="$CASE/b.text" -v COUNTS="$LINUX_COUNTS" \
        -v JUMP_S="$LINUX_JUMP_S" -f "$L1/one-stream.awk"
}

limit=$((700 + LINUX_COUNTS))
round=1
while [ "$round" -le "$LINUX_ROUNDS" ]; do
    run_case "kill-2-vcpus-$round" "$limit" "${LINUX_SURVIVES:-survives}" 2
    round=$((round + 1))
done
for vcpus in $LINUX_VCPUS; do
    run_case "kill-$vcpus-vcpus" "$limit" "${LINUX_SURVIVES:-survives}" "$vcpus"
done
