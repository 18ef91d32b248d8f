# The benchmark's rows of RDMA, beside ib_write_bw and TCP: figures, of which none can fail the suite.
# Settings:
BENCH_EFFORT=${BENCH_EFFORT:---quick} # or --full
BENCH_CASES=${BENCH_CASES-*}          # patterns with blanks between them: sync, commit, rate-1, rate-2, rate-4
BENCH_LIMIT_S=${BENCH_LIMIT_S:-1200}  # seconds for a case
. /h/l1/rxe.sh
# The bed has no source tree.
export UNDERSTUDY_TEST_GUEST=/h/understudy-guest

# rows NAME,...: what they say, line by line. Rows of one case are of the same turns, of one process.
rows() {
    rxe
    local status=0
    /h/bin/bench "$BENCH_EFFORT" --rows "$1" --rdma 10.77.0.1 --out "$CASE/bench" >"$CASE/bench.out" \
        2>"$CASE/bench.err" || status=$?
    # Without a figure there is nothing to hold against a promise.
    [ "$status" -eq 0 ] || fail "status $status: $(tail -n 3 "$CASE/bench.err")"
    while IFS= read -r line; do note "$line"; done <"$CASE/bench.out"
    ! grep -q "not run" "$CASE/bench.out" || fail "$(grep -m 1 "not run:" "$CASE/bench.out")"
    detail "$(head -n 1 "$CASE/bench.out")"
}

# bench_case NAME ROWS: unless the setting leaves it out.
bench_case() { ! chosen "$1" "$BENCH_CASES" || run_case "$1" "$BENCH_LIMIT_S" rows "$2"; }

bench_case sync rdma-sync,rdma-cpu
bench_case commit rdma-commit
for vcpus in 1 2 4; do
    bench_case "rate-$vcpus" "rdma-rate-$vcpus"
done
