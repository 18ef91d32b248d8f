#!/usr/bin/env bash
# Kill rounds: protect the test guest, kill its primary, let the guest say whether it lost a byte.
set -euo pipefail
. "$(dirname "$0")/lib/common.sh"
. "$(dirname "$0")/lib/build.sh"

usage() {
    cat <<TXT
usage: scripts/kill-rounds.sh [options]

Each round starts a backup and a primary on loopback, protects the test guest under its 'verify'
workload, kills the primary with SIGKILL at a random moment, and has the guest check all of its
memory on the backup. A line a round; the verdict and the take-over times at the end. Exits 0 only
if every round passed.

  --rounds N      how many rounds (default 5)
  --vcpus N       vCPUs of the guest (default 2)
  --memory SIZE   memory of the guest (default 512M)
  --epoch-ms N    longest epoch (default 25)
  --seed N        repeats a run's random moments (printed by each run)
  --keep DIR      keeps the logs of failed rounds there
  --help          this text
TXT
}

for argument in "$@"; do
    case "$argument" in
    -h | --help) usage && exit 0 ;;
    esac
done

need_build_tools
need_kvm
build_release
cd "$ROOT"
exec target/release/kill-rounds "$@"
