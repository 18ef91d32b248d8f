# A replicated Debian guest goes on counting when its primary is killed.
# Settings (nested.sh --set NAME=VALUE), with their defaults:
LINUX_ROUNDS=${LINUX_ROUNDS:-5}       # rounds with 2 vCPUs
LINUX_VCPUS=${LINUX_VCPUS-1 4}        # and one round with each of these
LINUX_COUNTS=${LINUX_COUNTS:-120}     # counts until the guest shows its log and powers off
LINUX_PAUSE=${LINUX_PAUSE:-0.1}       # seconds between two counts
LINUX_EPOCH_MS=${LINUX_EPOCH_MS:-100}
LINUX_GAP=${LINUX_GAP:-100}           # counts that may be missing between the two serial files
LINUX_JUMP_S=${LINUX_JUMP_S:-60}      # seconds that the guest's clock may jump at the take-over
PORT=7000

listens() { grep -qi "^ *[0-9]*: [0-9A-F]*:$(printf %04x "$1") 0*:0000 0A" /proc/net/tcp; }

pair() { # VCPUS
    mkdir "$CASE/arbiter"
    start b "$VMM" --api-socket "path=$CASE/b.sock" \
        --receive-replica "receiver_url=tcp:127.0.0.1:$PORT,arbiter=file:$CASE/arbiter" \
        --serial "file=$CASE/b.serial" --console off
    wait_for 60 "the backup to listen on port $PORT" listens "$PORT"
    start a "$VMM" --api-socket "path=$CASE/a.sock" --kernel /bed/l2/vmlinux \
        --initramfs /bed/l2/l2.img \
        --cmdline "$L2_CMDLINE bed.count=$LINUX_COUNTS bed.pause=$LINUX_PAUSE" \
        --cpus "boot=$1" --memory size=256M --serial "file=$CASE/a.serial" --console off \
        --replicate "destination_url=tcp:127.0.0.1:$PORT,arbiter=file:$CASE/arbiter,$(
        )epoch_ms=$LINUX_EPOCH_MS,timeout_ms=3000"
}

survives() { # VCPUS
    pair "$1"
    wait_state a Protected 300
    wait_serial a "^L2 READY cpus $1 " "$L2_READY_S"
    wait_serial a "^count " 120
    local pause_ms
    pause_ms=$(random 500 6000)
    usleep $((pause_ms * 1000))
    still_up b
    ended a && fail "the guest ended before the kill: raise LINUX_COUNTS"
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
    no_complaints b
    local verdict
    verdict=$(judge) || fail "$verdict"
    detail "epoch $committed, killed ${pause_ms} ms into protection, back after $back s, $verdict"
}

# The guest may power off before anybody asked for the state.
wait_state_or_end() {
    serial_has "$1" "^L2 END" || wait_state "$@"
}

# judge: reads both serial files, prints the verdict; status 1 when the counter or a clock is wrong.
#   - numbers rise by one everywhere, except that between the files some may be missing (those that
#     were committed, and whose release the primary did not live to see); none comes a second time
#   - uptime and wall clock never go back, never jump, and keep their distance
judge() {
    local line='^count [0-9]+ up [0-9]+\.[0-9]+ wall [0-9]+ cpu [0-9]+$' from
    from=$(tr -d '\r' <"$CASE/a.serial" | grep -aE "$line" | tail -n 1 | cut -d' ' -f2)
    # One stream: the line that the kill may have cut in two is whole again when nothing is lost.
    cat "$CASE/a.serial" "$CASE/b.serial" | tr -d '\r' >"$CASE/joined.txt"
    awk -v gap_max="$LINUX_GAP" -v jump_max="$LINUX_JUMP_S" -v counts="$LINUX_COUNTS" \
        -v from="${from:-0}" -v line="$line" '
        function bad(text) { print text; failed = 1; exit 1 }
        $0 !~ line { if (/^count /) torn++; next }
        {
            step = $2 - last; rise = $4 - up; tick = $6 - wall
            if (!seen) { distance = $6 - $4 }
            else {
                joint = last == from
                if (step <= 0) bad("count " $2 " came after " last)
                if (step > 1 && !joint) bad("count jumped from " last " to " $2)
                if (step - 1 > gap_max) bad("counts " last " to " $2 ": too many are missing")
                if (rise < 0) bad("uptime went back from " up " to " $4)
                if (tick < 0) bad("the wall clock went back from " wall " to " $6)
                if (rise > jump_max || tick > jump_max)
                    bad("the clock jumped by " rise " s (uptime), " tick " s (wall)")
                off = $6 - $4 - distance
                if (off > 5 || off < -5) bad("wall clock and uptime drifted by " off " s")
                if (joint) { to = $2; jump = rise }
                if (!joint && rise > jump_calm) jump_calm = rise
            }
            seen = 1; last = $2; up = $4; wall = $6
        }
        END {
            if (failed) exit 1
            if (!seen) { print "no count at all"; exit 1 }
            if (torn > 1) { print torn " lines are torn"; exit 1 }
            if (!to) { print "the backup shows no count after the primary"; exit 1 }
            if (last != counts) { print "the last count is " last ", not " counts; exit 1 }
            printf "counts %d|%d (%d missing), clock step %.2f s (elsewhere at most %.2f s)",
                from, to, to - from - 1, jump, jump_calm
        }' "$CASE/joined.txt"
}

limit=$((700 + LINUX_COUNTS))
round=1
while [ "$round" -le "$LINUX_ROUNDS" ]; do
    run_case "kill-2-vcpus-$round" "$limit" survives 2
    round=$((round + 1))
done
for vcpus in $LINUX_VCPUS; do
    run_case "kill-$vcpus-vcpus" "$limit" survives "$vcpus"
done
