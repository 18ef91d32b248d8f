#!/usr/bin/env bash
# All tests: format, lints, units, KVM, whole machines, the nested bed.
set -euo pipefail
. "$(dirname "$0")/lib/common.sh"
. "$(dirname "$0")/lib/build.sh"
. "$(dirname "$0")/lib/results.sh"

usage() {
    cat <<TXT
usage: scripts/test.sh [--without kvm] [--without nested] [--help]

Runs everything that says whether this tree works, on this machine: formatting, lints, the scripts'
syntax, the fuzz targets over their seeds, the nested bed's own judgement, the unit and property
tests, the tests that need /dev/kvm, the tests with whole VMMs, and the nested bed with a stock Debian
guest. Installs what is missing. Says how long each step took. Ends with 'N passed, N failed, N s in
all'; exits 0 only if nothing failed.

  --without kvm      leave out what needs a usable KVM (the nested bed brings its own)
  --without nested   leave out the nested bed

Where this host has no usable /dev/kvm, the KVM tests run inside the nested bed, and the output
says so.
TXT
}

WITH_KVM=1 WITH_NESTED=1
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) usage && exit 0 ;;
    --without)
        case ${2:-} in
        kvm) WITH_KVM='' ;;
        nested) WITH_NESTED='' ;;
        *) usage_error "--without takes kvm or nested" ;;
        esac
        shift
        ;;
    *) usage_error "Unknown option $1" ;;
    esac
    shift
done

# Crates whose tests open /dev/kvm.
KVM_CRATES=(hypervisor guest-image understudy-tests)
# The status of nested.sh that says: no verdict. And what to do about it.
EXIT_BED=3 WAIVE_BED="to leave it out: --without nested"
KVM_PROBLEM=''
PASSED=0 FAILED=0
scratch_dir SCRATCH

# timed NAME COMMAND...: says what begins, and how long it took; its status is the command's.
timed() {
    local name=$1 started=$SECONDS status=0
    shift
    log "$name"
    "$@" || status=$?
    note "$name: $((SECONDS - started)) s"
    return "$status"
}

# step NAME COMMAND...: one check that passes or fails as a whole.
step() {
    if timed "$@"; then PASSED=$((PASSED + 1)); else
        FAILED=$((FAILED + 1))
        warn "$1 failed"
    fi
}

# cargo_tests ARGUMENT...: runs cargo's tests with nextest where it is there, and adds them up.
cargo_tests() {
    local out=$SCRATCH/tests.log status=0 runner=(cargo test) kind=libtest
    if cargo nextest --version >/dev/null 2>&1; then runner=(cargo nextest run) kind=nextest; fi
    "${runner[@]}" --release --locked --no-fail-fast "$@" 2>&1 | tee "$out" || status=$?
    count "$status" $("${kind}_results" "$out")
}

# count STATUS PASSED FAILED: adds up what a runner says. One that failed without a failed test, or
# without a count, is a failure of its own.
count() {
    local passed=${2:-0} failed=${3:-0}
    if [ "$failed" -eq 0 ] && { [ "$1" -ne 0 ] || [ "$passed" -eq 0 ]; }; then failed=1; fi
    PASSED=$((PASSED + passed)) FAILED=$((FAILED + failed))
}

# shell_syntax: parses every shell script of the tree with the shell that runs it. What has no first
# line of its own is sourced: by busybox in the bed, by bash elsewhere.
shell_syntax() {
    local file first parser status=0
    while IFS= read -r file; do
        read -r first <"$file" || true
        case $first in
        '#!'*bash) parser=(bash -n) ;;
        '#!'*busybox*) parser=(busybox sh -n) ;;
        '#!/bin/sh') parser=(sh -n) ;;
        '#!'*) continue ;;
        *) case $file in
            tests/bed/*.sh) parser=(busybox sh -n) ;;
            *.sh) parser=(bash -n) ;;
            *) continue ;;
            esac ;;
        esac
        "${parser[@]}" "$file" || status=1
    done < <(find scripts tests/bed -type f | sort)
    return "$status"
}

# fuzz_targets: a workspace of its own, which must build with what it tests. Fuzzing is fuzz.sh's.
fuzz_targets() {
    (cd "$ROOT/fuzz" && cargo fmt --check &&
        cargo clippy --locked --features machine --all-targets -- -D warnings &&
        cargo test --locked --features machine)
}

# orders: all orders in which threads can meet at the record of written pages, by loom.
orders() {
    (cd "$ROOT" && RUSTFLAGS="--cfg loom" cargo test --locked -p guest-memory --lib --target-dir target/loom)
}

# without_rdma: the VMM as who has no use for RDMA builds it.
without_rdma() {
    (cd "$ROOT" &&
        cargo clippy --release --locked -p cloud-hypervisor --no-default-features --all-targets -- -D warnings &&
        cargo test --release --locked -p rdma --no-default-features --lib library)
}

# equality: a few epochs of each mode on whole VMMs, and that the comparison sees what it is for.
equality() {
    "$ROOT/scripts/check-equality.sh" --cow all --epochs 10 &&
        "$ROOT/scripts/check-equality.sh" --cow copy,protect,hybrid --without-cow &&
        "$ROOT/scripts/check-equality.sh" --cow protect,hybrid --without-protection --workload random
}

# kvm_test_list FILE: a line for each test program of a crate that needs KVM.
kvm_test_list() {
    local crates=() crate
    for crate in "${KVM_CRATES[@]}"; do crates+=(-p "$crate"); done
    cargo test --release --locked --no-run --message-format=json "${crates[@]}" 2>/dev/null |
        python3 -c '
import json, os, sys
for line in sys.stdin:
    item = json.loads(line)
    if item.get("executable") and item.get("profile", {}).get("test"):
        print(item["executable"], os.path.dirname(item["manifest_path"]), sep="\t")' >"$1"
    [ -s "$1" ] || die "Cannot build the KVM tests"
}

# nested ARGUMENT...: the nested bed. A bed that failed is no verdict on this tree, yet nothing that
# may pass silently.
nested() {
    local out=$SCRATCH/nested.log status=0 found
    "$ROOT/scripts/nested.sh" --binaries "$ROOT/target/release" "$@" 2>&1 | tee "$out" || status=$?
    found=$(sed -nE 's/^([0-9]+) passed, ([0-9]+) failed.*/\1 \2/p' "$out" | tail -n 1)
    count "$status" $found
    [ "$status" -ne "$EXIT_BED" ] || warn "no nested bed here: $(bed_problem "$out"); $WAIVE_BED"
}

# build_for_bed: what a suite of the bed runs and no package installs.
build_for_bed() {
    cargo build --release --locked -p rdma --example verbs_check || die "The build failed"
}

# bed_problem LOG: the last reason that the bed gave.
bed_problem() {
    local reason
    reason=$(sed -nE 's/^((build|nested)\.sh|THE BED FAILED[^:]*): //p' "$1" | tail -n 1)
    echo "${reason:-it gave no reason}"
}

if [ -n "$WITH_KVM" ]; then
    KVM_PROBLEM=$(kvm_problem)
    if [ -n "$KVM_PROBLEM" ]; then
        [ -n "$WITH_NESTED" ] || die "$KVM_PROBLEM; to leave out what needs it: --without kvm"
        WAIVE_BED="to leave it and the KVM tests out: --without nested --without kvm"
    fi
fi

cd "$ROOT"
need_build_tools
# The header says whether the crate rdma declares libibverbs as it is.
need_packages python3 iproute2 nftables libibverbs-dev openssl
command -v etcd >/dev/null || need_packages etcd-server
command -v busybox >/dev/null || need_packages busybox
step "Formatting" cargo fmt --all --check
step "Lints" cargo clippy --release --locked --workspace --all-targets -- -D warnings
step "Lints and a test without RDMA" without_rdma
step "Syntax of the scripts" shell_syntax
step "Orders in which threads meet" orders
step "Fuzz targets, over their seeds" fuzz_targets
step "The nested bed's own judgement" tests/bed/selftest.py
timed "Build" build_release
[ -z "$WITH_NESTED" ] || timed "Build of what the bed runs besides" build_for_bed

NESTED_ARGUMENTS=()
if [ -z "$WITH_KVM" ]; then
    note "left out by --without kvm: tests of ${KVM_CRATES[*]}"
    timed "Tests" cargo_tests --workspace "${KVM_CRATES[@]/#/--exclude=}"
elif [ -z "$KVM_PROBLEM" ]; then
    timed "Tests, with this host's /dev/kvm" cargo_tests --workspace
    step "Equality of memory, a few epochs" equality
    step "The fault matrix, its quick rows" scripts/fault-matrix.sh --quick
else
    note "$KVM_PROBLEM; so the KVM tests run inside the nested bed"
    timed "Tests without KVM" cargo_tests --workspace "${KVM_CRATES[@]/#/--exclude=}"
    kvm_test_list "$SCRATCH/kvm-tests"
    NESTED_ARGUMENTS=(--kvm-tests "$SCRATCH/kvm-tests")
fi

if [ -n "$WITH_NESTED" ]; then
    timed "The nested bed" nested "${NESTED_ARGUMENTS[@]}"
else
    note "left out by --without nested: the nested bed"
fi

echo "$PASSED passed, $FAILED failed, $SECONDS s in all"
[ "$FAILED" -eq 0 ]
