# A replicated Debian guest goes on counting when its primary is killed, its epochs sent by RDMA over Soft-RoCE.
# Settings: those of the suite linux, with fewer rounds by default, and
RDMA_KILLS=${RDMA_KILLS:-5}       # rounds of the test guest, which verifies its own memory
RDMA_TIMEOUT_MS=${RDMA_TIMEOUT_MS:-20000} # of those rounds: a device that is emulated on a busy machine is slow
RDMA_EPOCHS=${RDMA_EPOCHS:-20}    # epochs that are compared page by page, for each cow mode
RDMA_WAKES=${RDMA_WAKES:-2}       # and of those in which its primary stands still and wakes up
RDMA_STAGING=${RDMA_STAGING:-2M}  # of the backup of the case small-staging, which asks for epochs that exceed it
RDMA_CASES=${RDMA_CASES-*}      # patterns with blanks between them: which cases run beside those of the suite linux
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
    grep -qa "guest memory is registered" "$CASE/a.err" || fail "guest memory was not registered"
    detail "$(cat "$CASE/detail"), $(cat /sys/class/infiniband/rxe_verbs/ports/1/hw_counters/sent_pkts) packets"
}

# One side says that the VM is its own.
alone() { in_state a Degraded || in_state b TakenOver; }

# Whether the command that takes the device away was given, and still waits. (A zombie does not.)
is_deleting() { [ -n "$deleting" ] && grep -q "^State:.[^Z]" "/proc/$deleting/status"; }

# It does, and epochs are committed by it all the same.
goes_on() {
    is_deleting && in_state a Protected &&
        [ "$(replication a epoch_committed)" -ge $((committed + 20)) ]
}

# At which step of an epoch the fault comes: the next primary is held up or stopped there (ACTION: wait, stop)
# once `strike` says so. Without: at any moment.
STRIKE_AT=
strike_at() { # POINT ACTION
    STRIKE_AT=$1
    # Only the primary gets to such a step, though both have it in their environment.
    export "UNDERSTUDY_TEST_FAULT=$1:$2:$CASE/strike"
    # Its senders are at work for as long as the shell needs: a pause before each group of pages.
    [ "$1" != given ] || export UNDERSTUDY_TEST_DELAYS=send:20000
}

# The next thread that gets to the step has got there.
strike() {
    local end=$(($(seconds) + 60))
    : >"$CASE/strike"
    # Looked at often: a guest that stands still for a page waits for it no longer than the timeout.
    until [ -e "$CASE/strike.reached" ]; do
        [ "$(seconds)" -lt "$end" ] || fail "the primary does not get to '$STRIKE_AT'"
        usleep 5000
    done
}

# It goes on from there.
let_go() { rm "$CASE/strike.reached"; }

# pages_given NAME: bytes of pages that were given to its device so far, and of the machine's state.
pages_given() { replication "$1" bytes_raw; }

# mid_epoch POINT COMMAND...: device_fails, while the primary is held up at that step of an epoch.
mid_epoch() {
    strike_at "$1" wait
    shift
    # Each count makes an epoch of several groups of pages, of which most leave from memory.
    L2_CMDLINE="$L2_CMDLINE bed.load=2:30"
    L2_READY_S=$((3 * L2_READY_S))
    PAIR_OPTIONS=,cow=protect,compression=none
    device_fails "$@"
}

# device_fails COMMAND...: the guest goes on, on one side, or on both when the kernel keeps the device.
device_fails() {
    rxe
    local committed deleting='' counts why before=0 given=''
    pair 2
    unset UNDERSTUDY_TEST_FAULT UNDERSTUDY_TEST_DELAYS
    wait_state a Protected 300
    wait_serial a "^L2 READY cpus 2 " "$L2_READY_S"
    wait_serial a "^count " 120
    usleep $(($(random 500 3000) * 1000))
    committed=$(replication a epoch_committed)
    [ -z "$STRIKE_AT" ] || strike
    "$@" || fail "cannot: $*"
    if [ -n "$STRIKE_AT" ]; then
        before=$(pages_given a)
        let_go
    fi
    wait_for 120 "one side to own the VM alone, or epochs to go on" eval 'alone || goes_on'
    why=$(replication a last_error)
    if [ -n "$STRIKE_AT" ]; then
        # The epoch was not over: its device was given more of it after that. A machine state alone has less.
        given=$(($(pages_given a) - before))
        [ "$given" -ge 65536 ] || fail "only $given bytes of the epoch were left to be sent"
        given="$given bytes more after the fault at '$STRIKE_AT'; "
    fi
    if in_state b TakenOver; then
        wait_serial b "^L2 END" $((LINUX_COUNTS + 120))
        expect_status b 0 60
        local verdict
        verdict=$(judge) || fail "$verdict"
        detail "${given}the backup goes on, $verdict"
        return
    fi
    wait_serial a "^L2 END" $((LINUX_COUNTS + 120))
    expect_status a 0 60
    no_complaints a
    ! serial_has b "^count" || fail "both sides counted"
    counts=$(grep -a "^count" "$CASE/a.serial" | awk '{ if ($2 != NR) exit 1 } END { print NR }') ||
        fail "the primary's counts are not whole"
    [ "$counts" -eq "$LINUX_COUNTS" ] || fail "$counts counts of $LINUX_COUNTS"
    if [ -n "$deleting" ]; then
        # Both sides have given it back, the backup's process lives.
        wait_for 60 "the device to be gone" eval '! is_deleting'
        ! rdma link show rxe_verbs/1 || fail "the device is still there"
    fi
    if [ -n "$deleting" ] && [ -z "$why" ]; then
        detail "${given}the kernel kept it while it was in use, the VM was protected to its end, $(
            )$committed epochs before that and at least 20 more; then it was gone"
        return
    fi
    [ -n "$why" ] || fail "the primary does not say why it is alone"
    detail "${given}the primary goes on: $(grep -a "replication-degraded" "$CASE/a.err" | head -n 1 |
        sed 's/.*replication-degraded: //' | cut -c 1-250)"
}

# The backup's process is no more, with requests under way to its memory.
backup_is_killed() { kill -KILL "$(pid_of b)"; }

link_goes_down() {
    /sbin/ip link set verbs0 down
}

# A primary that stands still for longer than the timeout, and wakes up when the VM is the backup's: it has to find
# out by itself that it lost, and destroy its VM.
wakes_up() {
    rxe
    local before late lost sent taken verdict
    PAIR_MORE="$PAIR_MORE --event-monitor path=$CASE/a.events"
    pair 2
    unset UNDERSTUDY_TEST_FAULT
    wait_state a Protected 300
    wait_serial a "^count " 120
    usleep $(($(random 500 3000) * 1000))
    if [ -n "$STRIKE_AT" ]; then strike; else kill -STOP "$(pid_of a)"; fi
    wait_state_or_end b TakenOver 120
    wait_serial b "^count [0-9]* up" 120
    before=$(wc -c <"$CASE/a.serial")
    sent=$(device_counts sent_pkts) taken=$(device_counts rdma_recvs)
    [ "$taken" -gt 0 ] || fail "the device does not count what it takes"
    kill -CONT "$(pid_of a)"
    wait_state a Lost 60
    lost=$(grep -a "ERROR.*replication-lost: " "$CASE/a.err") || fail "the primary's log does not say that it lost"
    grep -q replication-lost "$CASE/a.events" || fail "the primary has no event replication-lost"
    wait_for 60 "the primary's VM to be gone" has_no_vm a
    wait_serial b "^L2 END" $((LINUX_COUNTS + 120))
    expect_status b 0 60
    no_complaints b
    # An acknowledgement from before the take-over may have been in its socket, and let output go: the backup says
    # the same, or the two are not one stream.
    late=$(($(wc -c <"$CASE/a.serial") - before))
    # Nobody else sends since the take-over, and the backup gave its queue pair back before it.
    sent=$(($(device_counts sent_pkts) - sent)) taken=$(($(device_counts rdma_recvs) - taken))
    [ "$taken" -eq 0 ] || fail "the backup's device took $taken chunks of the woken primary"
    verdict=$(judge) || fail "$verdict"
    detail "${STRIKE_AT:+stopped at '$STRIKE_AT', }lost: $(echo "$lost" | sed 's/.*replication-lost: //'), $late bytes late, $(
        )$sent packets, of which nothing was taken; $verdict"
}

has_no_vm() { "$REMOTE" "--api-socket=$CASE/$1.sock" info 2>&1 | grep -q "No VM has been created"; }

device_counts() { cat "/sys/class/infiniband/rxe_verbs/ports/1/hw_counters/$1"; }

# The same for one that stops in the middle of sending an epoch, and wakes up there.
wakes_up_mid_epoch() {
    strike_at send stop
    L2_CMDLINE="$L2_CMDLINE bed.load=2:30"
    PAIR_OPTIONS=,compression=none
    wakes_up
}

PAIR_MORE="-v" PAIR_MORE_BACKUP="-v"
LINUX_SURVIVES=by_rdma
. /h/suites/linux.sh

# rdma_case NAME LIMIT COMMAND...: unless the setting leaves it out.
rdma_case() { ! chosen "$1" "$RDMA_CASES" || run_case "$@"; }

# resident NAME: how much of the guest's memory is there, and how much of it is locked, or pinned for a device.
resident() {
    echo "$1 $(grep -E '^(RssShmem|VmLck|VmPin):' "/proc/$(pid_of "$1")/status" | tr -s ' \t\n' ' ')"
}

# told NAME: what NAME says it uses, without spaces.
told() {
    "$REMOTE" "--api-socket=$CASE/$1.sock" replication-info | tr -d ' \n' |
        sed -n 's/.*\("rdma":{[^}]*}\).*/\1/p'
}

# All options, and several connections: each side opens the device once, and says what it uses.
options_are_kept() {
    rxe
    local gid name options contexts want
    gid=$("$REMOTE" rdma-devices | sed -n 's/^10.77.0.1 .*, GID \([0-9]*\) .*/\1/p')
    options=,rdma_device=rxe_verbs,rdma_port=1,rdma_gid_index=$gid
    # The smaller depth counts.
    PAIR_OPTIONS=$options,rdma_depth=16,connections=8
    PAIR_OPTIONS_BACKUP=$options,rdma_depth=5
    L2_READY_S=$((3 * L2_READY_S))
    pair 2
    wait_state a Protected 300
    # Protected: all of the primary's memory is registered, and nothing of the backup's.
    for name in a b; do
        want="\"rdma\":{\"device\":\"rxe_verbs\",\"port\":1,\"gid_index\":$gid,$(
        )\"gid\":\"::ffff:10.77.0.1\",\"mtu_bytes\":4096,\"depth\":5,$(
        )\"registered_bytes\":$([ $name = b ] && echo 0 || echo $((256 << 20)))"
        [ "$(told $name | sed 's/,"from_memory_bytes":.*}$//')" = "$want" ] || fail "$name says $(told $name), not $want"
        contexts=$(ls -l /proc/"$(pid_of $name)"/fd | grep -c uverbs)
        [ "$contexts" -eq 1 ] || fail "$name has the device open $contexts times"
        [ "$(grep -ca "by RDMA: device rxe_verbs, port 1, GID $gid (::ffff:10.77.0.1), MTU 4096, depth 5" \
            "$CASE/$name.err")" -eq 8 ] || fail "the log of $name is another"
    done
    wait_serial a "^L2 READY cpus 2 " "$L2_READY_S"
    wait_serial a "^count [0-9]* up" 120
    detail "8 connections, one context on each side, $want, $(resident a), $(
        )$(grep -a "memory is registered" "$CASE/a.err" | tail -n 1 | grep -o "registered, after.*")"
}

# urls_differ PRIMARY BACKUP WORDS: the primary hears why it is not served.
urls_differ() {
    rxe
    LINUX_URL=$1 LINUX_URL_BACKUP=$2
    pair 1
    wait_for 60 "the primary to say why" grep -qa "refused the replica.*$3" "$CASE/a.err"
    detail "$(grep -a "refused the replica" "$CASE/a.err" | tail -n 1 | cut -c 1-250)"
}

# A device that is not there is refused by its name, before anything else.
device_is_not_there() {
    rxe
    PAIR_OPTIONS=,rdma_device=rxe_other
    pair 1
    wait_for 60 "the primary to refuse" grep -qa "No RDMA port here is of the device rxe_other" "$CASE/a.err"
    detail "$(grep -a "rxe_other" "$CASE/a.err" | tail -n 1 | cut -c 1-250)"
}

# The backup's device fails at set-up: none has the address at which it is called. The primary's is named.
backup_has_no_device() {
    rxe
    LINUX_URL=rdma:127.0.0.1:7000
    PAIR_OPTIONS=,rdma_device=rxe_verbs,rdma_gid_index=1
    pair 1
    wait_for 60 "the primary to say why" \
        grep -qa "refused the replica: .*No RDMA port here is with the address 127.0.0.1" "$CASE/a.err"
    detail "$(grep -a "refused the replica" "$CASE/a.err" | tail -n 1 | cut -c 1-250)"
}

tcp=tcp:10.77.0.1:7000
rdma_case options 600 options_are_kept
rdma_case rdma-to-tcp 300 urls_differ "$LINUX_URL" "$tcp" "destination_url is rdma: and the backup's"
rdma_case tcp-to-rdma 300 urls_differ "$tcp" "$LINUX_URL" "receiver_url is rdma: and the primary's"
rdma_case backup-without-device 300 backup_has_no_device
rdma_case no-such-device 300 device_is_not_there

# The test guest, and programs that judge what becomes of it.
export UNDERSTUDY_TEST_GUEST=/h/understudy-guest

kill_rounds() {
    rxe
    /h/bin/kill-rounds --rounds "$RDMA_KILLS" --vcpus 2 --memory 64M --epoch-ms 100 \
        --transport rdma:10.77.0.1 --timeout-ms "$RDMA_TIMEOUT_MS" >"$CASE/kill.out" 2>&1 || fail "$(tail -n 5 "$CASE/kill.out")"
    detail "$(tail -n 1 "$CASE/kill.out")"
}

# Its primary is stopped past the timeout, at any moment and while it sends an epoch, and wakes up when the VM is the
# backup's, which verifies its memory after that.
verified_wakes_up() { # MORE...
    rxe
    local said
    /h/bin/kill-rounds --rounds "$RDMA_WAKES" --vcpus 2 --memory 64M --epoch-ms 100 --kill stop "$@" \
        --transport rdma:10.77.0.1 --timeout-ms 5000 --keep "$CASE" >"$CASE/kill.out" 2>&1 ||
        fail "$(tail -n 5 "$CASE/kill.out")"
    said=$(grep -c "VERDICT ok.*; woke up, lost to .*generation 2" "$CASE/kill.out")
    [ "$said" -eq "$RDMA_WAKES" ] || fail "$said primaries of $RDMA_WAKES ended by their own fence"
    detail "$(tail -n 1 "$CASE/kill.out"); $(grep "woke up" "$CASE/kill.out" | tail -n 1)"
}

# A round of Redis, as in the suite of that name.
TRANSPORT=rdma
. /h/l1/redis.sh

equality() { # COW WORKLOAD COMPRESSION
    rxe
    # Pages that are not hot, and go as they are: those that leave from memory.
    /h/bin/check-equality --cow "$1" --epochs "$RDMA_EPOCHS" --vcpus 2 --memory 64M --epoch-ms 100 \
        --workload "$2" --compression "$3" --transport rdma:10.77.0.1 >"$CASE/equality.out" 2>&1 || fail "$(tail -n 5 "$CASE/equality.out")"
    # What may leave from memory did.
    case $1-$2 in
        copy-*) grep -q " registered, 0 KiB of pages read there" "$CASE/equality.out" ;;
        *-hot) grep -q " registered, " "$CASE/equality.out" ;;
        # Where a call is dear beside a copy, it protects nothing; its line says how many pages.
        hybrid-*)
            grep -q "^0 pages protected" "$CASE/equality.out" ||
                grep -q " registered, [1-9][0-9]* KiB of pages read there" "$CASE/equality.out"
            ;;
        *) grep -q " registered, [1-9][0-9]* KiB of pages read there" "$CASE/equality.out" ;;
    esac || fail "it says of guest memory: $(grep registered "$CASE/equality.out")"
    detail "$(grep compared "$CASE/equality.out" | tail -n 1); $(grep registered "$CASE/equality.out" | tail -n 1); $(
        )$(grep protected "$CASE/equality.out" | tail -n 1)"
}

# straight MODE MORE...: the first copy goes by four queue pairs into the backup's memory, and all of that is compared.
straight() {
    local mode=$1
    shift
    rxe
    /h/bin/check-equality --cow "$mode" --epochs 5 --vcpus 2 --memory 64M --epoch-ms 100 --connections 4 \
        --workload random --compression none --transport rdma:10.77.0.1 "$@" >"$CASE/equality.out" 2>&1 ||
        fail "$(tail -n 5 "$CASE/equality.out")"
    case $* in
        *without-place*) grep -q "the backup compared checksums" "$CASE/equality.out" ;;
        *) grep -q "there, [1-9][0-9]* KiB went straight" "$CASE/equality.out" ;;
    esac || fail "it says: $(tail -n 4 "$CASE/equality.out")"
    detail "$(grep "compared" "$CASE/equality.out" | tail -n 1); $(grep registered "$CASE/equality.out" | tail -n 1)"
}

rdma_case straight-hybrid 600 straight hybrid
rdma_case straight-off 600 straight off
rdma_case straight-without-place 600 straight hybrid --without-place
rdma_case kill-rounds 600 kill_rounds
rdma_case verified-wakes-up 600 verified_wakes_up
rdma_case verified-wakes-up-mid-epoch 600 verified_wakes_up --at send
rdma_case redis 1800 redis_survives
for cow in off copy protect hybrid; do
    rdma_case "equality-$cow" 600 equality "$cow" random none
    rdma_case "equality-$cow-hot" 600 equality "$cow" hot auto
done
# The command waits until nobody has the device open.
delete_link() {
    rdma link delete rxe_verbs &
    deleting=$!
}

# The network device goes from under it: the kernel unregisters it with that, and the command waits as well.
delete_netdev() {
    /sbin/ip link del verbs0 &
    deleting=$!
}

# A queue pair that fails under WRITEs of guest memory, while TCP lives: the primary hears it from its own
# device, waits for the control connection to say more, and goes on alone. No write of its guest hangs.
queue_pair_fails() {
    rxe
    export UNDERSTUDY_TEST_BREAK=queue-pair
    # Many pages leave from memory. Called again, the backup would be lost the same way again.
    PAIR_OPTIONS=,cow=protect,compression=none,reconnect=off
    pair 2
    unset UNDERSTUDY_TEST_BREAK
    wait_state a Degraded 400
    grep -qa "the queue pair fails for a test" "$CASE/a.err" || fail "another reason: $(tail -n 2 "$CASE/a.err")"
    wait_serial a "^L2 END" $((LINUX_COUNTS + 240))
    expect_status a 0 60
    no_complaints a
    ! serial_has b "^count" || fail "both sides counted"
    detail "$(grep -a "data connection ended" "$CASE/a.err" | tail -n 1 | cut -c 1-200)"
}

# The queue pair is gone at the other end, which answers nothing by RDMA and is well by TCP: the primary's device tries
# again, gives up, and TCP takes over.
peer_queue_pair_is_gone() {
    rxe
    PAIR_RUN_BACKUP="env UNDERSTUDY_TEST_BREAK=peer-queue-pair"
    PAIR_OPTIONS=,compression=none,fallback=on PAIR_OPTIONS_BACKUP=,fallback=on
    pair 2
    wait_for 400 "TCP to take over" by_tcp
    grep -qa "the queue pair is gone for a test" "$CASE/b.err" || fail "another reason: $(last_words a) $(last_words b)"
    grep -qa "a data connection ended: .*RDMA failed: transport retry counter exceeded" "$CASE/a.err" ||
        fail "its retries were not exhausted: $(grep -a "data connection ended" "$CASE/a.err" | tail -n 1)"
    local verdict
    killed_after_all
    detail "$(grep -a "data connection ended" "$CASE/a.err" | head -n 1 | sed 's/.*data connection ended: //' | cut -c 1-160); $verdict"
}

# A primary gives up a backup whose staging too many epochs exceed, one after the other, as those of a boot
# may on a slow machine. The boot is over: the same backup will do now.
protect_again() {
    # And so is what the first counts write.
    wait_serial a "^count 6 " 240
    local end=$(($(seconds) + 120))
    until in_state a Protected; do
        still_up a
        [ "$(seconds)" -lt "$end" ] || fail "not protected again: $(replication a last_error)"
        # Refused as long as it copies anew by itself.
        "$REMOTE" "--api-socket=$CASE/a.sock" replicate "$replicate" >>"$CASE/again.out" 2>&1 &&
            again=$((again + 1))
        sleep 1
    done
}

by_tcp() {
    "$REMOTE" "--api-socket=$CASE/a.sock" replication-info | tr -d ' \n' | grep -q '"transport":"tcp"' &&
        in_state a Protected
}

# The primary is killed when TCP has taken over, and its guest goes on at the backup, as `verdict` says.
killed_after_all() {
    kill -KILL "$(pid_of a)"
    wait_state_or_end b TakenOver 120
    wait_serial b "^L2 END" $((LINUX_COUNTS + 240))
    expect_status b 0 60
    verdict=$(judge) || fail "$verdict"
}

# The same, where TCP may take over: the guest is protected again, and its backup goes on when it is killed.
queue_pair_falls_back() {
    rxe
    export UNDERSTUDY_TEST_BREAK=queue-pair
    PAIR_OPTIONS=,cow=protect,compression=none,fallback=on PAIR_OPTIONS_BACKUP=,fallback=on
    pair 2
    unset UNDERSTUDY_TEST_BREAK
    wait_for 400 "TCP to take over" by_tcp
    grep -qa "the queue pair fails for a test" "$CASE/a.err" || fail "another reason: $(tail -n 2 "$CASE/a.err")"
    usleep 2000000
    by_tcp || fail "it is not protected by TCP for long: $(tail -n 2 "$CASE/a.err")"
    local verdict
    killed_after_all
    detail "$(grep -a "by TCP, not by RDMA" "$CASE/a.err" | tail -n 1 | cut -c 1-200); $verdict"
}

# What a boot writes does not fit the staging, and surely not what the first counts do: epochs are sealed earlier, the
# guest waits for room, or is copied anew.
staging_is_small() {
    rxe
    local again=0 too_large
    L2_CMDLINE="$L2_CMDLINE bed.load=16:5"
    LINUX_READY=protect_again LINUX_COUNTS=$((LINUX_COUNTS + 60))
    PAIR_OPTIONS=,cow=protect,compression=none PAIR_OPTIONS_BACKUP=,staging_size=$RDMA_STAGING
    # A guest that waits for room boots slowly.
    L2_READY_S=$((3 * L2_READY_S))
    survives 2
    too_large=$(grep -ac "exceeds the backup's staging" "$CASE/a.err")
    [ "$too_large" -gt 0 ] || fail "no epoch was too large for a staging of $RDMA_STAGING"
    detail "$(cat "$CASE/detail"); $too_large epochs too large, $again times protected again"
}

# pin_is KIND: all of the memory is registered, or nothing is locked and pages are copied.
pin_is() {
    rxe
    PAIR_OPTIONS=,rdma_pin=$1
    pair 2
    wait_state a Protected 300
    wait_serial a "^L2 READY cpus 2 " $((3 * L2_READY_S))
    wait_serial a "^count " 120
    case $1-$(told a) in
        off-*'"registered_bytes":0,"from_memory_bytes":0,"straight_bytes":0}') ;;
        on-*"\"registered_bytes\":$((256 << 20)),"*) ;;
        *) fail "a says $(told a)" ;;
    esac
    detail "$(resident a)$(resident b)"
}

# mid_copy COMMAND...: once a first copy goes straight into the backup's memory. That takes a second, so nothing is
# asked that takes long; a copy that was over by then is no such case.
mid_copy() {
    local end=$(($(seconds) + 400))
    until grep -qa "the copy goes straight" "$CASE/a.err"; do
        [ "$(seconds)" -lt "$end" ] || fail "nothing is copied straight: $(last_words a) $(last_words b)"
        usleep 10000
    done
    "$@" || fail "cannot: $*"
    ! grep -qa "went straight into the backup's memory" "$CASE/a.err" || fail "the copy was over already"
}

pinned_kib() { sed -n 's/^VmPin:[^0-9]*\([0-9]*\).*/\1/p' "/proc/$(pid_of "$1")/status"; }

has_given_back() { [ "$(pinned_kib b)" -le 8192 ]; }

kill_primary() {
    pinned=$(pinned_kib b)
    kill -KILL "$pid"
}

# A primary that dies in the middle of a copy leaves nothing that could run, and the next one is served.
primary_dies_in_the_copy() {
    rxe
    pair 2
    local pinned pid
    pid=$(pid_of a)
    mid_copy kill_primary
    # More than the ring: a copy begins with the first piece.
    [ "$pinned" -gt 8192 ] || fail "the backup's memory was not open: VmPin $pinned kB"
    wait_for 120 "the backup to make its memory its own" has_given_back
    usleep 5000000
    still_up b
    ! in_state b TakenOver || fail "the backup has taken over half a copy"
    ! [ -s "$CASE/b.serial" ] || fail "the backup's guest ran"
    mv "$CASE/a.err" "$CASE/a-first.err"
    rm -f "$CASE"/a.sock "$CASE"/a.status "$CASE"/a.pid
    primary 2
    wait_state a Protected 400
    detail "VmPin of the backup $pinned kB when it was killed, then $(pinned_kib b) kB; the next primary is protected"
}

# goes_on_alone: the guest of a primary that has no backup any more counts to its end.
goes_on_alone() {
    wait_serial a "^L2 END" $((LINUX_COUNTS + 400))
    expect_status a 0 60
    no_complaints a
    [ "$(grep -ac "^count" "$CASE/a.serial")" -eq "$LINUX_COUNTS" ] || fail "counts are missing"
}

backup_dies_in_the_copy() {
    rxe
    pair 2
    local pid
    pid=$(pid_of b)
    mid_copy kill -KILL "$pid"
    wait_for 120 "the primary to notice" eval '[ -n "$(replication a last_error)" ]'
    local state why
    state=$(replication a state)
    why=$(replication a last_error)
    goes_on_alone
    detail "the primary is $state: $(echo "$why" | cut -c 1-200)"
}

# The port goes down under the WRITEs of a copy, or the kernel is told to take the device away.
device_fails_in_the_copy() {
    rxe
    local deleting='' state why
    pair 2
    mid_copy "$@"
    wait_for 400 "the copy to end one way or the other" \
        eval 'in_state a Protected || [ -n "$(replication a last_error)" ]'
    state=$(replication a state)
    why=$(replication a last_error)
    goes_on_alone
    ! serial_has b "^count" || fail "both sides counted"
    detail "the primary is $state${why:+: $(echo "$why" | cut -c 1-200)}"
}

# The backup dies, and is started again.
backup_dies() {
    kill -KILL "$(pid_of b)"
    wait_state a Degraded 120
    mv "$CASE/b.err" "$CASE/b-$1.err"
    rm -f "$CASE"/b.sock "$CASE"/b.status "$CASE"/b.pid
}

# A primary whose backup dies keeps its memory registered, so the next session need not wait for that. A device that is to
# go while the VM is alone is not kept from it.
stays_registered() {
    rxe
    local all=$((256 << 10)) deleting='' pinned
    # Alone and protected again to the end of the case.
    LINUX_COUNTS=100000
    pair 2
    wait_state a Protected 300
    wait_serial a "^count " 300
    backup_dies first
    pinned=$(pinned_kib a)
    [ "$pinned" -ge "$all" ] || fail "the primary's memory is registered no more: VmPin $pinned kB"
    backup
    wait_state a Protected 300
    grep -qa "memory are registered since an earlier session" "$CASE/a.err" || fail "it was registered anew"
    [ "$(grep -ca "registering 256 MiB" "$CASE/a.err")" -eq 1 ] || fail "it was registered more than once"
    told a | grep -q "\"registered_bytes\":$((256 << 20))," || fail "a says $(told a)"
    backup_dies second
    delete_link
    wait_for 60 "the device to be gone" eval '! is_deleting'
    [ "$(pinned_kib a)" -lt "$all" ] || fail "memory is pinned for a device that is gone"
    in_state a Degraded || in_state a Disconnected || fail "the primary is $(replication a state)"
    detail "VmPin $pinned kB while alone, protected again without registering; then $(
        )$(grep -ao "memory does not stay registered.*" "$CASE/a.err" | tail -n 1)"
}

# All that goes by TCP is TLS.
over_tls() {
    PAIR_OPTIONS=,tls_dir=/h/tls PAIR_OPTIONS_BACKUP=,tls_dir=/h/tls
    by_rdma 2
}

# limited KIB COMMAND...: without the right to lock more than that.
limited() {
    local kib=$1
    shift
    exec capsh --drop=cap_ipc_lock --shell=/bin/sh -- -c "ulimit -l $kib && exec \"\$@\"" sh "$@"
}

# too_little_locked KIND: memory that may not be locked is copied, or ends the protection; either way it is said what to set.
too_little_locked() {
    rxe
    PAIR_RUN="limited 32768"
    PAIR_OPTIONS=,rdma_pin=$1
    pair 2
    wait_for 300 "the primary to say what to set" grep -qa "raise RLIMIT_MEMLOCK" "$CASE/a.err"
    wait_serial a "^L2 READY cpus 2 " $((3 * L2_READY_S))
    case $1 in
        auto)
            wait_state a Protected 300
            told a | grep -q '"registered_bytes":0,' || fail "a says $(told a)"
            ;;
        on) ! in_state a Protected || fail "it is protected all the same" ;;
    esac
    wait_serial a "^count " 120
    detail "$(replication a state): $(grep -a "RLIMIT_MEMLOCK" "$CASE/a.err" | head -n 1 | cut -c 1-300)"
}

# The backup finds half-way that it may lock no more: the rest of the first copy goes through the rings, and what the backup
# has is the guest all the same.
backup_locks_too_little() {
    PAIR_RUN_BACKUP="limited 65536"
    by_rdma 2
    grep -qa "raise RLIMIT_MEMLOCK" "$CASE/b.err" || fail "the backup does not say what to set"
    grep -qa "comes through the rings" "$CASE/b.err" || fail "the backup registered all of it"
    detail "$(cat "$CASE/detail"); $(grep -ao "[0-9]* MiB went straight" "$CASE/a.err" | head -n 1)"
}

rdma_case copy-primary-dies "$limit" primary_dies_in_the_copy
rdma_case copy-backup-dies "$limit" backup_dies_in_the_copy
rdma_case copy-link-down "$limit" device_fails_in_the_copy link_goes_down
rdma_case copy-link-deleted "$limit" device_fails_in_the_copy delete_link
rdma_case stays-registered "$limit" stays_registered
rdma_case tls "$limit" over_tls
rdma_case memlock-auto "$limit" too_little_locked auto
rdma_case memlock-on "$limit" too_little_locked on
rdma_case memlock-backup "$limit" backup_locks_too_little
rdma_case queue-pair-fails "$limit" queue_pair_fails
rdma_case queue-pair-falls-back "$limit" queue_pair_falls_back
rdma_case peer-queue-pair-gone "$limit" peer_queue_pair_is_gone
rdma_case small-staging $((limit + 240)) staging_is_small
rdma_case pin-off "$limit" pin_is off
rdma_case pin-on "$limit" pin_is on
rdma_case link-deleted "$limit" device_fails delete_link
rdma_case link-deleted-mid-epoch "$limit" mid_epoch send delete_link
rdma_case link-down "$limit" device_fails link_goes_down
rdma_case link-down-mid-epoch "$limit" mid_epoch send link_goes_down
rdma_case link-down-given "$limit" mid_epoch given link_goes_down
rdma_case netdev-deleted-mid-epoch "$limit" mid_epoch send delete_netdev
rdma_case backup-dies-given "$limit" mid_epoch given backup_is_killed
rdma_case primary-wakes-up "$limit" wakes_up
rdma_case primary-wakes-up-mid-epoch "$limit" wakes_up_mid_epoch
