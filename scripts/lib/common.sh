# Shared by every script here; sourced, never run.
#
# What enters: the caller's argv[0] for messages. What leaves: log/die/cleanup/package/cache helpers.
# What always holds: everything registered by `on_exit` runs once, in reverse order, whatever ends
# the script (a normal end, `die`, Ctrl-C, SIGTERM).

SCRIPT_NAME=$(basename "$0")
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

if [ -t 1 ]; then
    BOLD=$'\e[1m' RED=$'\e[31m' GREEN=$'\e[32m' DIM=$'\e[2m' PLAIN=$'\e[0m'
else
    BOLD='' RED='' GREEN='' DIM='' PLAIN=''
fi

log() { printf '%s==>%s %s\n' "$BOLD" "$PLAIN" "$*"; }
note() { printf '    %s%s%s\n' "$DIM" "$*" "$PLAIN"; }
good() { printf '%s%s%s\n' "$GREEN" "$*" "$PLAIN"; }
warn() { printf '%s%s: %s%s\n' "$RED" "$SCRIPT_NAME" "$*" "$PLAIN" >&2; }
die() {
    warn "$*"
    exit 1
}
usage_error() {
    warn "$* (see --help)"
    exit 2
}

# --- cleanup -------------------------------------------------------------------------------------

CLEANUPS=()

# on_exit COMMAND...: run at the end of the script, last registered first.
on_exit() {
    if [ ${#CLEANUPS[@]} -eq 0 ]; then
        trap run_cleanups EXIT
        trap 'exit 130' INT
        trap 'exit 143' TERM
        trap 'exit 129' HUP
    fi
    CLEANUPS+=("$(printf '%q ' "$@")")
}

run_cleanups() {
    local status=$? i
    trap '' INT TERM HUP
    trap - EXIT
    for ((i = ${#CLEANUPS[@]} - 1; i >= 0; i--)); do
        eval "${CLEANUPS[i]}" || true
    done
    exit "$status"
}

# scratch_dir VARIABLE: a temporary directory that goes away with the script.
scratch_dir() {
    local made
    made=$(mktemp -d "${TMPDIR:-/tmp}/understudy.XXXXXX") || die "Cannot make a scratch directory"
    on_exit rm -rf -- "$made"
    printf -v "$1" '%s' "$made"
}

# stop_process PID: asks politely, then insists. Waits for a child of ours, so that it is reaped.
stop_process() {
    local pid=$1 tries
    kill -TERM "$pid" 2>/dev/null || return 0
    for ((tries = 0; tries < 50; tries++)); do
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.1
    done
    kill -KILL "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
}

# --- long commands -------------------------------------------------------------------------------

# quietly WHAT LOGFILE COMMAND...: the output goes to LOGFILE, a line each 10 s says that it is
# still at work, and the end of the log is shown when it fails.
quietly() {
    local what=$1 logfile=$2 started=$SECONDS pid status=0 beat=10
    shift 2
    note "$what"
    "$@" >"$logfile" 2>&1 &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        sleep 0.2
        if ((SECONDS - started >= beat)); then
            note "$what: $((SECONDS - started)) s, $(tail -c 300 "$logfile" | tr '\r' '\n' |
                tail -n 1 | cut -c 1-100)"
            ((beat += 10))
        fi
    done
    wait "$pid" || status=$?
    if [ "$status" -ne 0 ]; then
        tail -n 25 "$logfile" >&2
        warn "$what failed with status $status"
    fi
    return "$status"
}

# retry TIMES COMMAND...: with a growing pause between the tries, for what the network may spoil.
retry() {
    local times=$1 try
    shift
    for ((try = 1; try <= times; try++)); do
        "$@" && return 0
        [ "$try" -lt "$times" ] && note "try $try of $times failed; again in $((try * 3)) s" &&
            sleep $((try * 3))
    done
    return 1
}

# --- packages ------------------------------------------------------------------------------------

# need_packages PACKAGE...: installs what is missing, or says how to.
need_packages() {
    local missing=() package as_root=() scratch
    command -v dpkg-query >/dev/null || die "Needs a Debian-like system: dpkg-query is missing"
    for package in "$@"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' ||
            missing+=("$package")
    done
    [ ${#missing[@]} -eq 0 ] && return 0
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null && sudo -n true 2>/dev/null && as_root=(sudo -n)
        [ ${#as_root[@]} -gt 0 ] ||
            die "Missing packages; install them with: apt-get install ${missing[*]}"
    fi
    scratch_dir scratch
    log "Installing packages: ${missing[*]}"
    local install=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y
        --no-install-recommends "${missing[@]}")
    if ! quietly "apt-get install" "$scratch/install.log" "${install[@]}"; then
        retry 3 quietly "apt-get update" "$scratch/update.log" "${as_root[@]}" apt-get update ||
            die "Cannot refresh the package lists"
        retry 3 quietly "apt-get install" "$scratch/install.log" "${install[@]}" ||
            die "Cannot install: ${missing[*]}"
    fi
    # A script that goes on with exec runs no cleanups.
    rm -rf -- "$scratch"
}

# --- cache ---------------------------------------------------------------------------------------

# cache_dir NAME: where NAME's downloads live, outside the tree. Made by whoever fills it.
cache_dir() {
    printf '%s/understudy/%s\n' "${XDG_CACHE_HOME:-${HOME:?HOME is not set}/.cache}" "$1"
}
