#!/usr/bin/env bash
# Equality: each epoch, every page of the backup's memory is compared with the primary's.
set -euo pipefail
. "$(dirname "$0")/lib/common.sh"
. "$(dirname "$0")/lib/build.sh"

usage() {
    cat <<'TXT'
Usage: scripts/check-equality.sh [OPTION...]

Runs the test guest on a protected pair on this machine and compares, at each epoch, every page of
the backup's memory with what the primary's page was at the seal. The release binaries as they
ship do it themselves (replication/src/checking.rs). Exits 0 only if no page ever differed.

  --epochs N        how many epochs to compare (default 1000)
  --vcpus N         vCPUs of the guest (default 2)
  --memory SIZE     memory of the guest (default 256M)
  --cow MODE,...    how pages are kept while they are sent, as --replicate cow= takes it (default
                    hybrid); several are compared one after the other, `all` is each of the four
  --epoch-ms N      longest epoch (default 10)
  --workload W      hot (default): all vCPUs rewrite a small set of pages, and verify the rest;
                    random: they write anywhere; kv: clients, a card and a disk write memory, too
                    (needs root and /dev/net/tun)
  --without-cow     tests the check: pages are sent as they are when they are sent, not as they
                    were at the seal. Exits 0 as soon as a page differs, 1 if none does
  --without-protection
                    the same, with cow=protect or hybrid: pages that count as write-protected are not
  --delays LIST     POINT:MICROSECONDS[,...]: threads of the primary sleep at random, up to so long, at
                    these points of an epoch: seal, arm, fault, take, unprotect, ack
  --transport T     tcp (default), unix, or rdma:ADDRESS, this host's address on an RDMA device
  --help            this text
TXT
}

run_release check-equality "$@"
