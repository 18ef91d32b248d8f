# Redis on ext4 keeps its connection and every acknowledged key when its primary is killed, by TCP or RDMA.

REDIS_ROUNDS=${REDIS_ROUNDS:-5}
TRANSPORT=${TRANSPORT:-tcp}  # or rdma: epochs over Soft-RoCE
# The suite linux's helpers, without its cases.
LINUX_ROUNDS=0 LINUX_VCPUS=''
if [ "$TRANSPORT" = rdma ]; then
    LINUX_URL=rdma:10.77.0.1:7000
    . /h/l1/rxe.sh
fi
. /h/suites/linux.sh
# Its settings and what a round is.
. /h/l1/redis.sh

round=1
while [ "$round" -le "$REDIS_ROUNDS" ]; do
    run_case "kill-$round" 1800 redis_survives
    round=$((round + 1))
done
