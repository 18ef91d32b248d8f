#!/usr/bin/env bash
# Runs the replication protocol through seeded faults with simulated time.
set -euo pipefail
. "$(dirname "$0")/lib/common.sh"
. "$(dirname "$0")/lib/build.sh"

usage() {
    cat <<'TXT'
Usage: scripts/simulate.sh [--seeds N | --seconds N | --seed S] [OPTION...]

Runs the state machines that ship (replication/src/protocol) in two simulated hosts with a
connection, an arbiter, memory, clients and time, through faults that a seed decides. So runs what
ships of both sides' engines, page encodings, frames, staging, commit, output gates and the clients
of the arbiters in a directory and in an etcd cluster, over simulated storage and a simulated cluster.
Prints which transitions of the machines were made and which never, and the first seed that failed; exits 0 only if none did. 1000 seeds take some 25 s of two cores.

  --seeds N       so many seeds (default 1000)
  --first S       beginning with this one (default 0)
  --seconds N     seeds for so long instead
  --seed S        this seed alone, and all that happens in it; a seed gives the same run each time
  --broken RULE   breaks a rule on purpose; exits 0 only if a seed finds it. One of those that
                  scripts/model-check.sh prints, or of delta-of-another, applied-before-its-end,
                  rest-forgets, gate-lets-next-out, won-before-it-lasts, swap-overwrites,
                  unknown-write-is-lost, another-history-counts, own-refusal-is-lost,
                  compare-is-ignored, member-decides-alone
  --threads N     seeds at a time (default 2)
  --help          this text

What is simulated and what is not: docs/design/0020-safety-argument.md.
TXT
}

for argument in "$@"; do
    case $argument in -h | --help) usage && exit 0 ;; esac
done
need_build_tools
log "Building the simulator"
(cd "$ROOT" && cargo build --release --locked -p protocol-model) || die "The build failed"
cd "$ROOT"
exec target/release/simulate "$@"
