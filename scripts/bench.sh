#!/usr/bin/env bash
# The benchmark: floor, baselines and ours in one run, as a table, as JSON and as pictures.
set -euo pipefail
. "$(dirname "$0")/lib/common.sh"
. "$(dirname "$0")/lib/build.sh"

usage() {
    cat <<'TXT'
Usage: scripts/bench.sh [--quick | --full] [--rows NAME,...] [--rdma ADDRESS] [--out DIR]

Measures what docs/SPECIFICATION.md promises under "Performance". Every figure stands beside a floor
or a baseline that was measured in the same run, by turns; docs/benchmark.md says what exactly each
row measures. A promise that is not kept is a row that says MISSED, not a failure of the run.

  --quick           in less than five minutes on a quiet host (default)
  --full            more and longer turns, 16 GiB, the slow link; some forty minutes
  --rows NAME,...   only these rows; a name that there is not lists them all
  --rdma ADDRESS    this host's address on an RDMA device: the rows rdma-*, too, which are left out
                    without it (in the nested bed: scripts/nested.sh rdma-bench)
  --out DIR         where bench.json and the pictures go (default target/bench)
  --help            this text

The rows with clients and the slow link need root, iproute2 and /dev/net/tun; without them they say
so instead of a figure.
TXT
}

run_release bench "$@"
