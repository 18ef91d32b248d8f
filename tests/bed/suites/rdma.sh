# A replicated Debian guest goes on counting when its primary is killed, its epochs sent by RDMA over Soft-RoCE.
# Settings: those of the suite linux, with fewer rounds by default.
LINUX_ROUNDS=${RDMA_ROUNDS:-2}
LINUX_VCPUS=${RDMA_VCPUS-1 4}
LINUX_URL=rdma:10.77.0.1:7000
# One device for both VMMs: rxe does not connect across network namespaces.
. /h/l1/rxe.sh

by_rdma() {
    rxe
    survives "$1"
    # It went by RDMA, not by something that stands in for it.
    for name in a b; do
        grep -qa "by RDMA: device rxe_verbs" "$CASE/$name.err" || fail "$name did not use RDMA"
    done
    detail "$(cat "$CASE/detail"), $(cat /sys/class/infiniband/rxe_verbs/ports/1/hw_counters/sent_pkts) packets"
}

PAIR_MORE="-v" PAIR_MORE_BACKUP="-v"
LINUX_SURVIVES=by_rdma
. /h/suites/linux.sh
