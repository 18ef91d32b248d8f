#!/usr/bin/env bash
# Explores the ownership protocol's state machines in every order of events, within bounds.
set -euo pipefail
. "$(dirname "$0")/lib/common.sh"
. "$(dirname "$0")/lib/build.sh"

usage() {
    cat <<'TXT'
Usage: scripts/model-check.sh [OPTION...]

Explores two hosts, a connection and an arbiter over the state machines that ship
(replication/src/protocol), in every order of events within bounds, and then looks for each rule of
the protocol that was broken on purpose. Prints states, depth and time for each, and ends with
'N passed, N failed'; exits 0 only if everything holds that should, and every broken rule is found.

  --large         more epochs, faults and requests: many minutes and gigabytes
  --only NAME     only bounds and broken rules with this in their name; may be given more than once
  --bounds B      one exploration with bounds of your own: NAME=N,... of epochs, sessions, crashes,
                  arbiter_faults, asks, too_large, give_ups, image_failures, and, 0 or 1, arbiter and
                  reverses
  --paths         prints each counterexample step by step
  --threads N     threads that explore (default 2)
  --help          this text

What is modelled and what is not: docs/design/0020-safety-argument.md.
TXT
}

for argument in "$@"; do
    case $argument in -h | --help) usage && exit 0 ;; esac
done
need_build_tools
log "Building the model"
(cd "$ROOT" && cargo build --release --locked -p protocol-model) || die "The build failed"
cd "$ROOT"
exec target/release/model-check "$@"
