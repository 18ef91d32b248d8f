# A round of Redis, for suites that kill its primary. Sourced after lib.sh, beside the suite linux's helpers and,
# where TRANSPORT is rdma, rxe.sh. Settings:
REDIS_KEYS=${REDIS_KEYS:-40} # acknowledged under protection before the kill, and after it, at least
REDIS_EPOCH_MS=${REDIS_EPOCH_MS:-100}
REDIS_TIMEOUT_MS=${REDIS_TIMEOUT_MS:-10000} # a process that dies is noticed at once all the same
REDIS_BOOT_S=${REDIS_BOOT_S:-300} # seconds until Redis may have its disk
REDIS_DISK_MIB=${REDIS_DISK_MIB:-32}
TOOLS=${TOOLS:-/h/bin} # e2fsprogs: busybox' shell would run applets of its own
WRITER=/h/bin/redis-writer
GUEST_IP=10.99.0.2
GUEST_MAC=52:54:00:12:34:56

# Each VMM has a tap of its own, and both are on a bridge with an address of L1.
network() {
    local tap
    # What the round before left.
    for tap in tapa tapb br0; do /sbin/ip link del "$tap" 2>/dev/null; done
    /sbin/ip link add br0 type bridge
    /sbin/ip addr add 10.99.0.1/24 dev br0
    /sbin/ip link set br0 up
    for tap in tapa tapb; do
        /sbin/ip tuntap add dev "$tap" mode tap || fail "no tap"
        /sbin/ip link set "$tap" master br0 up
    done
}

# A file system on the primary's image; the backup's is as large and empty.
images() {
    local name
    for name in a b; do
        dd if=/dev/null of="$CASE/$name.img" bs=1M seek="$REDIS_DISK_MIB" 2>/dev/null
    done
    "$TOOLS/mke2fs" -q -F -t ext4 "$CASE/a.img" || fail "no file system"
}

acknowledged() { wc -l <"$CASE/acknowledged"; }

# wait_keys COUNT LIMIT_S: as wait_for, and it notices when the writer gives up or a guest panics.
wait_keys() {
    local end=$(($(seconds) + $2)) name
    while [ "$(acknowledged)" -lt "$1" ]; do
        still_up writer
        for name in a b; do
            serial_has "$name" "Kernel panic" && fail "$name's guest panicked: $(complaints "$name")"
        done
        [ "$(seconds)" -lt "$end" ] || fail "waited $2 s for key $1; acknowledged: $(acknowledged)"
        sleep 0.2
    done
}

# As wait_state, and a protection that failed says so at once.
wait_protected() {
    local end=$(($(seconds) + $1)) state
    until state=$(replication a state) && [ "$state" = Protected ]; do
        still_up a
        case $state in
            Stopped | Degraded | Lost) fail "a is $state: $(replication a last_error)" ;;
        esac
        [ "$(seconds)" -lt "$end" ] || fail "waited $1 s for a to be Protected; it is '$state'"
        sleep 0.3
    done
}

redis_survives() {
    network
    images
    [ "$TRANSPORT" != rdma ] || rxe
    L2_CMDLINE="$L2_CMDLINE bed.ip=$GUEST_IP/24 bed.redis=1"
    LINUX_COUNTS=0 LINUX_PAUSE=2 LINUX_EPOCH_MS=$REDIS_EPOCH_MS LINUX_TIMEOUT_MS=$REDIS_TIMEOUT_MS
    PAIR_INITRAMFS=/bed/l2/redis.img
    PAIR_MORE="-v --disk path=$CASE/a.img --net tap=tapa,mac=$GUEST_MAC"
    PAIR_MORE_BACKUP="-v --disk path=$CASE/b.img --net tap=tapb"
    pair 2
    wait_serial a "^redis mounted" "$REDIS_BOOT_S"
    : >"$CASE/acknowledged"
    start writer "$WRITER" write "$GUEST_IP:6379" "$CASE/acknowledged" "$CASE/finish"
    wait_keys 1 300
    wait_protected 300
    wait_keys $(($(acknowledged) + REDIS_KEYS)) 300
    local pause_ms
    pause_ms=$(random 0 5000)
    usleep $((pause_ms * 1000))
    still_up b
    in_state a Protected || fail "the primary is $(replication a state) before the kill"
    kill -KILL "$(pid_of a)"
    local before
    before=$(acknowledged)
    wait_for 10 "the primary to be gone" ended a
    wait_state b TakenOver 120
    wait_keys $((before + REDIS_KEYS)) 300
    : >"$CASE/finish"
    expect_status writer 0 300
    "$WRITER" check "$GUEST_IP:6379" "$CASE/acknowledged" >"$CASE/check.out" 2>"$CASE/check.err" ||
        fail "over a new connection: $(cat "$CASE/check.err")"
    orderly_end
    image_holds_all "$CASE/b.img"
    went_by_transport
    detail "by $TRANSPORT; $before keys before the kill, $(($(acknowledged) - before)) after;" \
        "$(cat "$CASE/writer.out"); $(cat "$CASE/check.out" "$CASE/aof.out" | tr '\n' ',')" \
        "the backup's ext4 is clean"
}

# Nothing stood in for what was asked for.
went_by_transport() {
    local name
    for name in a b; do
        case $TRANSPORT in
            rdma) grep -qa "by RDMA: device rxe_verbs" "$CASE/$name.err" ;;
            *) ! grep -qa "by RDMA" "$CASE/$name.err" ;;
        esac || fail "$name did not go by $TRANSPORT"
    done
}

# Redis ends by a command, the guest after it, and the backup's VMM after the guest.
orderly_end() {
    echo SHUTDOWN | nc -w 60 "$GUEST_IP" 6379
    wait_serial b "^redis ended" 120
    wait_serial b "^redis unmounted" 120
    wait_serial b "^L2 END" 120
    expect_status b 0 60
    serial_has b "^redis ended 0" || fail "Redis did not end in order"
    serial_has b "redis FAILED" && fail "$(grep -a "redis FAILED" "$CASE/b.serial")"
    local name
    for name in a b; do never_reset "$name"; done
    no_complaints b
    name=$(complaints a)
    [ -z "$name" ] || fail "a's guest complains: $name"
}

# image_holds_all IMAGE: its file system was unmounted and is whole, and so is the log of Redis.
image_holds_all() {
    local log=/appendonlydir/appendonly.aof.1.incr.aof
    "$TOOLS/e2fsck" -fn "$1" >"$CASE/fsck.out" 2>&1 ||
        fail "e2fsck: status $?: $(tail -n 4 "$CASE/fsck.out" | tr '\n' ' ')"
    # With -n it goes over a journal that was not replayed, and may find nothing all the same.
    ! grep -i "journal recovery" "$CASE/fsck.out" || fail "the image was not unmounted"
    "$TOOLS/debugfs" -R "dump $log $CASE/aof" "$1" >"$CASE/debugfs.out" 2>&1
    [ -s "$CASE/aof" ] || fail "no $log on the image: $(cat "$CASE/debugfs.out")"
    "$WRITER" aof "$CASE/aof" "$CASE/acknowledged" >"$CASE/aof.out" 2>"$CASE/aof.err" ||
        fail "on the image: $(cat "$CASE/aof.err")"
}
