# Linux uses a virtio disk and a virtio network card.

# The suite linux's helpers, without its cases.
LINUX_ROUNDS=0 LINUX_VCPUS=''
. /h/suites/linux.sh
TCP=${TCP:-}               # 1: and a TCP connection outlives the primary; only: nothing else
TCP_LINES=${TCP_LINES:-60} # lines that a client sends over one connection
TCP_OPTIONS=${TCP_OPTIONS:-}
GUEST_IP=10.99.0.2
GUEST_MAC=52:54:00:12:34:56

# A tap that stays when its VMM goes, on a bridge with an address of L1.
network() {
    /sbin/ip link add br0 type bridge
    /sbin/ip addr add 10.99.0.1/24 dev br0
    /sbin/ip link set br0 up
    /sbin/ip tuntap add dev tap0 mode tap || fail "no tap"
    /sbin/ip link set tap0 master br0 up
}

no_network() {
    /sbin/ip link del tap0
    /sbin/ip link del br0
}

disk() {
    local image=$CASE/disk.img n
    dd if=/dev/zero of="$image" bs=1M count=4 2>/dev/null
    start a "$VMM" --api-socket "path=$CASE/a.sock" --kernel /bed/l2/vmlinux \
        --initramfs /bed/l2/l2.img --cmdline "$L2_CMDLINE bed.count=10 bed.disk=1" \
        --cpus boot=2 --memory size=256M --serial "file=$CASE/a.serial" --console off \
        --disk "path=$image"
    wait_serial a "^disk 8192" "$L2_READY_S"
    wait_serial a "^disk 5 " 60
    "$REMOTE" "--api-socket=$CASE/a.sock" counters >"$CASE/counters" || fail "no counters"
    wait_serial a "^L2 END" 60
    expect_status a 0 60
    no_complaints a
    serial_has a "BAD" && fail "a sector came back wrong"
    n=1
    while [ "$n" -le 10 ]; do
        serial_has a "^disk $n ok" || fail "count $n did not come back from the disk"
        dd if="$image" bs=512 skip="$n" count=1 2>/dev/null | grep -q "^count $n " ||
            fail "count $n is not in the image"
        n=$((n + 1))
    done
    detail "$(tr -d '\n ' <"$CASE/counters" | grep -o '"_disk0":{[^}]*}')"
}

# client LINES SECONDS: one connection to the guest's echo; what came back is in $CASE/heard.
client() {
    (
        n=0
        while [ "$n" -lt "$1" ]; do
            n=$((n + 1))
            echo "line $n"
            sleep "$2"
        done
        # The last answers are still on their way.
        sleep 20
    ) | nc "$GUEST_IP" 7 >"$CASE/heard" 2>"$CASE/client.err" &
}

# What the card says if the wait is in vain.
heard_or_counters() {
    heard "$1" && return
    "$REMOTE" "--api-socket=$CASE/a.sock" counters >"$CASE/counters"
    "$REMOTE" "--api-socket=$CASE/a.sock" replication-info >"$CASE/replication"
    return 1
}

heard() { [ "$(wc -l <"$CASE/heard")" -ge "$1" ]; }

# Every line once, in order: nothing that the guest acknowledged was taken back.
heard_all() { # LINES
    wait_for 180 "the answer to line $1" heard "$1"
    awk -v lines="$1" '$0 != "line " NR { bad = 1 } END { exit bad || NR != lines }' "$CASE/heard" ||
        fail "the echo is not what was sent: $(tr '\n' ' ' <"$CASE/heard" | tail -c 300)"
}

net() {
    network
    start a "$VMM" --api-socket "path=$CASE/a.sock" --kernel /bed/l2/vmlinux \
        --initramfs /bed/l2/l2.img --cmdline "$L2_CMDLINE bed.ip=$GUEST_IP/24" \
        --cpus boot=2 --memory size=256M --serial "file=$CASE/a.serial" --console off \
        --net "tap=tap0,mac=$GUEST_MAC"
    wait_serial a "^net $GUEST_MAC" "$L2_READY_S"
    wait_serial a "^count " 60
    wait_for 60 "an answer to a ping" ping -c 1 -W 2 "$GUEST_IP"
    client 20 0.1
    heard_all 20
    "$REMOTE" "--api-socket=$CASE/a.sock" counters >"$CASE/counters" || fail "no counters"
    detail "$(tr -d '\n ' <"$CASE/counters" | grep -o '"_net0":{[^}]*}')"
}

# What a release refuses as yet: docs/design/0010.
tcp_survives() {
    network
    PAIR_MORE="--net tap=tap0,mac=$GUEST_MAC"
    L2_CMDLINE="$L2_CMDLINE bed.ip=$GUEST_IP/24"
    LINUX_COUNTS=0
    PAIR_OPTIONS=$TCP_OPTIONS
    pair 2
    wait_state a Protected 300
    wait_serial a "^net $GUEST_MAC" "$L2_READY_S"
    wait_serial a "^count " 60
    wait_for 60 "an answer to a ping" ping -c 1 -W 5 "$GUEST_IP"
    client "$TCP_LINES" 0.3
    wait_for 120 "answers before the kill" heard_or_counters $((TCP_LINES / 3))
    still_up b
    kill -KILL "$(pid_of a)"
    local killed before
    killed=$(seconds) before=$(wc -l <"$CASE/heard")
    wait_state b TakenOver 120
    wait_for 120 "an answer after the take-over" heard $((before + 1))
    local back=$(($(seconds) - killed))
    heard_all "$TCP_LINES"
    detail "$before of $TCP_LINES lines before the kill, the next after $back s, none lost or twice"
}

case $TCP in
    only) ;;
    *)
        run_case disk 400 disk
        run_case net 400 net
        no_network 2>/dev/null
        ;;
esac
if [ -n "$TCP" ]; then
    run_case tcp-survives 800 tcp_survives
    no_network 2>/dev/null
fi
