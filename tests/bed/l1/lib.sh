# Helpers for the suites, sourced in L1 (busybox sh). Nothing here asserts a time under a second.

OUT=/out
L1=/h/l1
CASES=/run/cases
SKIPPED=77
VMM=/h/bin/cloud-hypervisor
REMOTE=/h/bin/ch-remote
L2_CMDLINE="console=ttyS0 panic=-1 quiet mitigations=off tsc=reliable no_timer_check nokaslr"
L2_CMDLINE="$L2_CMDLINE random.trust_cpu=on cryptomgr.notests"
# Settings of the host's command line (NAME=value), see nested.sh --set.
[ -r /h/settings ] && . /h/settings
. /h/l1/linux-log.sh
L2_CMDLINE="$L2_CMDLINE${L2_EXTRA:+ $L2_EXTRA}"
L2_READY_S=${L2_READY_S:-120} # seconds that L2 may take from the VMM's start to its init

say() { echo "$*" | tr -cd '\11\12\40-\176' >&3; }
note() { say "@note $*"; }

# --- cases ---------------------------------------------------------------------------------------

# run_case NAME LIMIT_S FUNCTION [WORD...]: one result. The function runs in a shell of its own, in
# a fresh folder ($CASE); it fails by `fail`, by a status that is not 0, or by its limit.
run_case() {
    local name=$1 limit=$2 status=0 detail
    shift 2
    # In an earlier boot of L1.
    ! grep -qx "$SUITE $name" /h/settled.list 2>/dev/null || return 0
    CASE=$CASES/$SUITE-$name
    export CASE
    rm -rf "$CASE" && mkdir -p "$CASE" && cd "$CASE" || exit 1
    say "@run $SUITE $name $limit"
    # A second shell reads the same files, and instead of all cases runs this one function.
    CASE_SUITE=/h/suites/$SUITE.sh CASE_FUNCTION="$*" setsid timeout -s KILL "$limit" sh -c '
        cut -d" " -f6 /proc/$$/stat >"$CASE/session"
        . /h/l1/lib.sh
        run_case() { :; }
        . "$CASE_SUITE"
        set -u
        $CASE_FUNCTION' >"$CASE/log" 2>&1 </dev/null
    status=$?
    detail=$(cat "$CASE/detail" 2>/dev/null)
    case $status in
        0) say "@pass $SUITE $name $detail" ;;
        "$SKIPPED") say "@skip $SUITE $name $detail" ;;
        137) failed "$name" "${detail:-was still running after $limit s, or was killed}" ;;
        *) failed "$name" "${detail:-status $status}" ;;
    esac
    stop_all
    cd /
    if [ "$status" -ne 0 -a "$status" -ne "$SKIPPED" ] || [ -n "${KEEP:-}" ]; then
        mkdir -p "$OUT/$SUITE-$name" && cp -r "$CASE/." "$OUT/$SUITE-$name/"
    fi
    rm -rf "$CASE"
}

# chosen NAME PATTERNS: whether one of the patterns, with blanks between them, is NAME's.
chosen() {
    local name=$1 pattern found=1
    # A pattern is none of file names.
    set -f
    for pattern in $2; do
        case $name in
            $pattern) found=0 ;;
        esac
    done
    set +f
    return $found
}

failed() {
    local name=$1 file
    shift
    say "@fail $SUITE $name $*"
    for file in "$CASE"/*.sock; do
        [ -S "$file" ] && state_of "$(basename "$file" .sock)" >"$CASE/$(basename "$file" .sock).state" 2>&1
    done
    for file in "$CASE"/log "$CASE"/*.err "$CASE"/*.state "$CASE"/*.serial; do
        [ -s "$file" ] || continue
        say "@log --- end of $(basename "$file")"
        tail -n 25 "$file" | sed 's/^/@log /' | tr -cd '\11\12\40-\176' >&3
    done
}

# state_of NAME: what a VMM that lives says of itself, and what its threads do in a second.
state_of() {
    ended "$1" && return
    timeout 10 "$REMOTE" "--api-socket=$CASE/$1.sock" replication-info
    thread_times "$1"
    sleep 1
    thread_times "$1"
    timeout 10 "$REMOTE" "--api-socket=$CASE/$1.sock" counters
}

# thread_times NAME: each thread with its state and its ticks in user and kernel mode.
thread_times() {
    cat /proc/"$(pid_of "$1")"/task/*/stat | sed 's/^[0-9]* (\(.*\)) /\1 /; s/ /_/' |
        awk '{ printf "%s %s/%s  ", $1, $13, $14 } END { print "" }'
}

# In a case: the reason, and the end.
fail() {
    echo "$*" >"$CASE/detail"
    echo "FAILED: $*"
    exit 1
}

skip() {
    echo "$*" >"$CASE/detail"
    exit "$SKIPPED"
}

detail() { echo "$*" >"$CASE/detail"; }

# Kills whatever lives in the case's session, until nothing does.
stop_all() {
    local session pids
    session=$(cat "$CASE/session") || return
    while pids=$(session_members "$session") && [ -n "$pids" ]; do
        kill -KILL $pids 2>/dev/null
        sleep 0.1
    done
}

# The living processes of a session (Linux: proc_pid_stat(5), fields 1, 3 and 6).
session_members() {
    cat /proc/[0-9]*/stat 2>/dev/null | sed 's/(.*)/x/' |
        awk -v session="$1" '$6 == session && $3 != "Z" { print $1 }'
}

# wait_for LIMIT_S WHAT COMMAND...: polls; fails the case with WHAT when the limit is over.
wait_for() {
    local limit=$1 what=$2 end
    shift 2
    end=$(($(seconds) + limit))
    while ! "$@" >/dev/null 2>&1; do
        [ "$(seconds)" -lt "$end" ] || fail "waited $limit s for: $what"
        sleep 0.2
    done
}

# Seconds since L1's boot: no wall clock that anyone sets.
seconds() { cut -d. -f1 /proc/uptime; }

# --- VMMs ----------------------------------------------------------------------------------------

# start NAME COMMAND...: in the background, output to $CASE/NAME.out and .err, its exit status to
# $CASE/NAME.status, its pid in $NAME_pid.
start() {
    local name=$1
    shift
    echo "+ $*"
    (
        "$@" >"$CASE/$name.out" 2>"$CASE/$name.err" &
        echo $! >"$CASE/$name.pid"
        wait $!
        echo $? >"$CASE/$name.status.new"
        mv "$CASE/$name.status.new" "$CASE/$name.status"
    ) &
    while [ ! -s "$CASE/$name.pid" ]; do sleep 0.05; done
}

pid_of() { cat "$CASE/$1.pid"; }

ended() { [ -s "$CASE/$1.status" ]; }

# still_up NAME: fails the case when NAME is gone, with its last words.
still_up() {
    ended "$1" || return 0
    fail "$1 ended with status $(cat "$CASE/$1.status"): $(last_words "$1")"
}

last_words() { grep -v '^$' "$CASE/$1.err" | tail -n 3 | tr '\n' ' ' | cut -c 1-300; }

expect_status() {
    local name=$1 want=$2 limit=$3
    wait_for "$limit" "$name to end by itself" ended "$name"
    [ "$(cat "$CASE/$name.status")" = "$want" ] ||
        fail "$name ended with $(cat "$CASE/$name.status"), not $want: $(last_words "$name")"
}

# replication NAME KEY: a value of `replication-info`, as plain text ("" when it has none).
replication() {
    "$REMOTE" "--api-socket=$CASE/$1.sock" replication-info 2>>"$CASE/remote.err" |
        tr -d '\n' | sed -n "s/.*\"$2\" *: *\"\{0,1\}\([^\",}]*\).*/\1/p"
}

in_state() { [ "$(replication "$1" state)" = "$2" ]; }

# wait_state NAME STATE LIMIT_S: as wait_for, and it notices when the VMM dies meanwhile.
wait_state() {
    local name=$1 state=$2 end=$(($(seconds) + $3))
    while ! in_state "$name" "$state"; do
        still_up "$name"
        [ "$(seconds)" -lt "$end" ] ||
            fail "waited $3 s for $name to be $state; it is '$(replication "$name" state)'," \
                "$(replication "$name" last_error)"
        sleep 0.3
    done
}

# serial_has NAME PATTERN: NAME's serial file holds a line that matches.
serial_has() { grep -qa "$2" "$CASE/$1.serial" 2>/dev/null; }

wait_serial() {
    local name=$1 pattern=$2 end=$(($(seconds) + $3))
    while ! serial_has "$name" "$pattern"; do
        if ended "$name" && ! serial_has "$name" "$pattern"; then still_up "$name"; fi
        serial_has "$name" "Kernel panic" && fail "$name's guest panicked: $(complaints "$name")"
        [ "$(seconds)" -lt "$end" ] ||
            fail "waited $3 s for '$pattern' on $name's serial port; it holds" \
                "$(wc -c <"$CASE/$name.serial") bytes, the last: $(tail -c 200 \
                    "$CASE/$name.serial" | tr -cd '\40-\176')"
        sleep 0.3
    done
}

# random MIN MAX: a number in between, both included.
random() {
    local word
    word=$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')
    echo $(($1 + word % ($2 - $1 + 1)))
}
