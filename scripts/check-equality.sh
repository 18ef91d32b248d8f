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
                    random: they write anywhere; runs: runs of 700 pages, each over a border of
                    huge pages; kv: clients, a card and a disk write memory, too; all: kv and hot at
                    once (both need root and /dev/net/tun)
  --huge-pages      keeps guest memory in huge pages, whose protection splits them: the host's
                    shmem_enabled is `advise` during the run (needs root)
  --without-cow     tests the check: pages are sent as they are when they are sent, not as they
                    were at the seal. Exits 0 as soon as a page differs, 1 if none does
  --without-protection
                    the same, with cow=protect or hybrid: pages that count as write-protected are not
  --delays LIST     POINT:MICROSECONDS[,...]: threads of the primary sleep at random, up to so long, at
                    these points of an epoch: seal, arm, fault, take, send, unprotect, ack
  --dirty-log LOG   where KVM notes the pages that the guest writes: bitmap or ring (default: what the
                    VMM finds cheaper)
  --matrix          each mode with 1, 2, 4 and 16 vCPUs, each workload with these, and with delays; huge
                    pages, rings, and the two broken builds; --epochs counts for each
  --transport T     tcp (default), unix, or rdma:ADDRESS, this host's address on an RDMA device
  --connections N   data connections (default 1)
  --compression C   as --replicate compression= takes it (default auto)
  --without-place   tests the check of a first copy by RDMA straight into the backup's memory: some
                    pages are not written. Exits 0 as soon as that is seen
  --help            this text
TXT
}

one() {
    log "check-equality $*"
    (run_release check-equality "$@")
}

# Each combination in turn; the first that fails ends it.
matrix() {
    local vcpus
    for vcpus in 1 2 4 16; do
        one --cow all --vcpus "$vcpus" "$@"
        one --cow all --vcpus "$vcpus" --workload random "$@"
        one --cow all --vcpus "$vcpus" --workload runs "$@"
        one --cow all --vcpus "$vcpus" --workload all "$@"
        one --cow all --vcpus "$vcpus" --delays \
            seal:2000,arm:500,fault:500,take:2000,send:2000,unprotect:500,ack:5000 "$@"
    done
    one --cow all --workload runs --huge-pages "$@"
    one --cow all --vcpus 4 --dirty-log ring "$@"
    # These end with the first page that differs, whatever --epochs says.
    one --cow copy,protect,hybrid --without-cow
    one --cow protect,hybrid --without-protection --workload random
}

ARGUMENTS=() MATRIX=''
for argument in "$@"; do
    case $argument in
    -h | --help) usage && exit 0 ;;
    --matrix) MATRIX=1 ;;
    *) ARGUMENTS+=("$argument") ;;
    esac
done
if [ -n "$MATRIX" ]; then
    matrix "${ARGUMENTS[@]}"
else
    run_release check-equality "${ARGUMENTS[@]}"
fi
