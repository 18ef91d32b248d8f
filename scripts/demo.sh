#!/usr/bin/env bash
# The main job, to watch: a protected VM outlives its primary.
set -euo pipefail
. "$(dirname "$0")/lib/common.sh"
. "$(dirname "$0")/lib/build.sh"

usage() {
    cat <<TXT
usage: scripts/demo.sh [options]

Installs what is missing, builds in release mode, starts a backup and a primary on this machine
(TCP on loopback, a file arbiter), protects the test guest under a workload that verifies its own
memory, kills the primary with SIGKILL at a random moment, and reports the take-over. Exits 0 only
if every check held.

  --vcpus N             vCPUs of the guest (default 2)
  --memory SIZE         memory of the guest (default 512M)
  --seconds S           seconds under protection before the kill, a day at most (default: a random
                        2 to 6)
  --kernel FILE --initramfs FILE [--cmdline TEXT]
                        your own Linux instead of the test guest
  --svg FILE            where the picture of the timeline goes (default target/demo-timeline.svg)
  --help                this text
TXT
}

run_release demo "$@"
