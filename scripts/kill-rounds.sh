#!/usr/bin/env bash
# Kill rounds: protect the test guest, strike its pair, say whether anything was lost.
set -euo pipefail
. "$(dirname "$0")/lib/common.sh"
. "$(dirname "$0")/lib/build.sh"

usage() {
    cat <<TXT
usage: scripts/kill-rounds.sh [options]

Each round starts a backup and a primary on loopback and protects the test guest.

With --workload verify, the primary is killed with SIGKILL, or stopped, at a random moment or at a
step of an epoch, and the guest checks all of its memory on the backup.

With --workload kv, the guest is a TCP server on a tap and logs each write on a disk; primary,
backup, bridge and taps are in a network namespace of their own, the clients in another. Many
clients, each with one connection, ask as fast as they are answered; the primary or the backup is
struck at a random moment. Afterwards: every connection must be open and in sequence, every
acknowledged write in memory and in the log of the host that goes on, the history linearizable.
Needs root and /dev/net/tun.

A line a round; the verdict, the take-over times and what the clients felt at the end. Exits 0 only
if every round passed.

  --workload W      verify (default) or kv
  --rounds N        how many rounds (default 5)
  --vcpus N         vCPUs of the guest (default 2)
  --memory SIZE     memory of the guest (default 512M)
  --epoch-ms N      longest epoch (default 25)
  --transport T     tcp (default), unix, or rdma:ADDRESS, this host's address on an RDMA device;
                    with --workload verify
  --timeout-ms N    silence after which a side suspects the other (default: the product's), and how
                    long an RDMA device may take; with --workload verify
  --kill WHAT       primary (default); stop: SIGSTOP of the primary until the backup has taken over, then
                    SIGCONT; backup, with --workload kv
  --at POINT        with --workload verify and --kill stop: the primary is stopped when it gets to this
                    step, not at any moment: `send`, for example (replication/src/checking.rs)
  --seed N          repeats a run's random moments (printed by each run)
  --keep DIR        keeps the logs of failed rounds there
  --help            this text

With --workload kv:
  --clients N       clients, 1 to 60 (default 16)
  --disk WHERE      the server's log: replicated (default, an image of each host), shared (one image
                    for both), none
  --bare-first      the clients first work for as long without protection, which is then switched on
                    with vm.replicate: the latency of both, in one round
  --without-gate    tests the checker: the primary lets frames out before their epoch is committed.
                    Exits 0 as soon as a round found that out, 1 if none did
TXT
}

run_release kill-rounds "$@"
