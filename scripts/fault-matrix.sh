#!/usr/bin/env bash
# The fault matrix: abuse a pair of VMMs row by row, say whether anything was lost.
set -euo pipefail
. "$(dirname "$0")/lib/common.sh"
. "$(dirname "$0")/lib/build.sh"

usage() {
    cat <<TXT
usage: scripts/fault-matrix.sh [options] [row ...]

Each row starts two VMMs, an arbiter and clients, each in a network namespace of its own, with the test
guest as a key-value server, and does one thing to them: a process is killed or hangs at a step of the
protocol, stands still and wakes; the network is cut, one way too, or loses packets; the arbiter is gone;
storage is full or fails; a person pauses, resets or ends the VM. Then an oracle says whether the
right side goes on, the other is silent, and all that the clients saw is what one server could have said.
Needs root, /dev/kvm and /dev/net/tun. All that it makes is in namespaces that end with it.

A line a round, a table at the end. Exits 0 only if every row passed. Without any argument: three rounds
of each row, and the table is written to docs/fault-matrix.md.

  row ...           rows by name, or by the begin of their names; all where none is given
  --list            names the rows and does nothing else; needs what the build needs, and no root
  --quick           the few rows that scripts/test.sh takes
  --rounds N        rounds of each row (default 1)
  --jobs N          rows at a time (default 1)
  --clients N       clients, 1 to 30 (default 8)
  --arbiter KIND    only with this arbiter: file, etcd (one server), etcd3 (three)
  --keep DIR        keeps the logs of failed rounds there
  --write FILE      writes the table there, as a page of the documentation
  --help            this text
TXT
}

# list ARGUMENT...: has the program name its rows. One that this user cannot build counts as it is.
list() {
    local program=target/release/fault-matrix
    cd "$ROOT"
    if [ ! -x "$program" ] || { [ -w target/release ] && command -v cargo >/dev/null; }; then
        command -v cargo >/dev/null || die "Rust is missing: install it with rustup"
        build_release >&2
    fi
    exec "$program" "$@"
}

LISTS=''
for argument in "$@"; do
    case $argument in
    -h | --help) usage && exit 0 ;;
    --list) LISTS=1 ;;
    esac
done
[ -z "$LISTS" ] || list "$@"
[ "$(id -u)" -eq 0 ] || die "this needs root, for namespaces: run it with sudo"
[ -c /dev/net/tun ] || die "/dev/net/tun is missing: modprobe tun"
need_packages iproute2 nftables mount
# The rows in which clocks jump and calls fail, none of which is a quick one.
case " $* " in
*" --quick "*) ;;
*) need_packages libfaketime fiu-utils ;;
esac
command -v etcd >/dev/null || need_packages etcd-server
if [ $# -eq 0 ]; then
    set -- --rounds 3 --write docs/fault-matrix.md
fi
run_release fault-matrix "$@"
